# SPDX-License-Identifier: GPL-2.0
#
# Each target runs the script of the same name in scripts/, which can also be run
# directly and describes itself with --help (qemu-tree and qemu-export: tree and export
# with --qemu).  "make help" lists the targets.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
S := ./scripts

# Options of run, shell, kernel: DEBUG=1 takes the debug kernel, ICOUNT=1 counts
# instructions instead of time, BASE=1 takes the unpatched kernel.
on = $(filter-out 0,$(1))
run-options = $(if $(call on,$(BASE)),--base) $(if $(call on,$(DEBUG)),--debug) \
	$(if $(call on,$(ICOUNT)),--icount) $(OPTIONS)
# Options of test, test-debug: FILTER=glob selects tests, REMEMBER=1 omits tests that
# have passed before, QUICK=1 omits slow ones.
test-options = $(if $(FILTER),--filter '$(FILTER)') $(if $(call on,$(REMEMBER)),--remember) \
	$(if $(call on,$(QUICK)),--quick)
# Pass LINUX=, KERNEL_TARBALL= and QEMU_SOURCE= to scripts/fetch in the environment.
export LINUX KERNEL_TARBALL QEMU_SOURCE JOBS GMEM_CACHE

##@ Use it
.PHONY: demo qemu-demo test run shell
demo: kernel ## boot the patched kernel and show a VM on 1 GiB HugeTLB pages
	@$S/demo
qemu-demo: kernel qemu guest ## show QEMU with Linux guests on 1 GiB pages, one of which converts memory
	@$S/qemu-demo
test: kernel ## run all tests on the patched kernel (FILTER=glob for some)
	@$S/test $(test-options)
run: need-cmd run-kernel ## boot and run CMD='static-binary args' (DEBUG=1 ICOUNT=1 BASE=1 OPTIONS='--mem 8G'); scripts/run returns the exit status of the command
	@$S/run $(run-options) -- $(CMD)
shell: run-kernel ## the same with an interactive shell (DEBUG=1 ICOUNT=1 BASE=1)
	@$S/run $(run-options) --shell

# Build the kernel that the options select.
.PHONY: run-kernel need-cmd
need-cmd:
	@$(if $(CMD),:,echo "usage: make run CMD='program arguments'" >&2; exit 2)
run-kernel: keep-tree
	@$S/kernel $(if $(call on,$(BASE)),--base) $(if $(call on,$(DEBUG)),--debug) >/dev/null

##@ Set up
.PHONY: deps fetch tree kernel kernel-debug qemu-tree qemu
deps: ## install the Debian packages that are missing (root), or print the command
	@$S/deps
fetch: deps ## get the base kernel sources into the cache (or LINUX=tree, KERNEL_TARBALL=file)
	@$S/fetch >/dev/null
tree: fetch ## make build/linux: the base, and one commit a patch
	@$S/tree
# Building does not refuse work in progress.
.PHONY: keep-tree
keep-tree: fetch
	@$S/tree --keep
kernel: keep-tree ## build the kernel that the tests run on
	@$S/kernel
kernel-debug: keep-tree ## build the debug kernel: KASAN, lockdep, kmemleak and more
	@$S/kernel --debug

qemu-tree: deps ## make build/qemu, the same for the series for QEMU (or QEMU_SOURCE=directory)
	@$S/tree --qemu
.PHONY: keep-qemu-tree
keep-qemu-tree: deps
	@$S/tree --qemu --keep
qemu: keep-qemu-tree ## build QEMU for the emulated machine
	@$S/qemu
.PHONY: guest
guest: keep-tree ## build the Linux guest of that QEMU
	@$S/guest

##@ Work on the series
.PHONY: export check check-full docs series parts git-am-check qemu-export qemu-check
export: ## rewrite patches/ and the in-tree files from build/linux
	@$S/export
check: ## quick consistency check of the repository; no kernel tree needed
	@$S/check
check-full: keep-tree ## apply, export and compare; checkpatch, kernel-doc, sparse, W=1
	@$S/check-full
docs: keep-tree ## render the documents of the series with the kernel's htmldocs; fail on a warning
	@$S/deps --docs
	@$S/docs
series: keep-tree ## build every commit, and the end of the series in many configurations
	@$S/series
parts: fetch ## build each part of the series on what it needs alone, and run its tests
	@$S/parts
git-am-check: fetch ## apply the patches as a distribution does: git am, quilt push
	@$S/git-am-check
qemu-export: ## rewrite patches/qemu-10.2/ from build/qemu
	@$S/export --qemu
qemu-check: keep-qemu-tree ## run all of these checks on the series for QEMU, and its tests (QUICK=1 builds only the last commit)
	@$S/qemu-check $(if $(call on,$(QUICK)),--quick)

##@ Test more
.PHONY: test-debug test-kcsan test-modules test-plain bench chart baseline results
test-debug: kernel-debug ## run all tests on the debug kernel (FILTER=glob for some)
	@$S/test --debug $(test-options)
test-modules: keep-tree ## build KVM as modules and unload them while guest memory is in use
	@$S/kernel --modules >/dev/null
	@$S/test --modules $(test-options)
test-plain: keep-tree ## run the tests of the series on a kernel without the hooks for tests
	@$S/kernel --plain >/dev/null
	@$S/test --plain $(test-options)
test-kcsan: keep-tree ## run the tests of the series on a kernel that detects data races
	@$S/kernel --kcsan >/dev/null
	@$S/test --kcsan $(test-options)
bench: kernel ## count instructions and compare with the base
	@$S/bench
chart: ## measure conversions and accesses beside them, and draw results/neighbors.svg
	@$S/chart
baseline: keep-tree ## run the existing tests on the unpatched base and write tests/baseline
	@$S/baseline

results: ## run demo, qemu-demo, test and bench, and save their output in results/
	@$S/results

##@ Tidy up
.PHONY: clean help
clean: ## remove build/ (refuses if that would lose work that is not exported)
	@$S/tree --clean
help: ## show this
	@awk 'BEGIN { FS = ":[^#]*## " } \
		/^##@/ { print "\n" substr($$0, 5) ":" } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
