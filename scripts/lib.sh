# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# shellcheck disable=SC2034  # most of the variables are for those who source it
#
# Shared by every script here (". lib.sh"): where things live, how builds are
# made repeatable and cached, how to speak to a person.

set -euo pipefail
export LC_ALL=C
umask 022

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
build=$top/build			# everything made from this checkout
linux=$build/linux			# git tree: tag "base", then a commit a patch
qemu_tree=$build/qemu		# the same for QEMU
# What is worth keeping between checkouts: the download, ccache, results.
cache=${GMEM_CACHE:-${XDG_CACHE_HOME:-${HOME:-$build}/.cache}/gmem-hugetlb}
[[ $cache == /* ]] || cache=$PWD/$cache
jobs=${JOBS:-$(nproc)}

# Files that the kernel's series adds lie below these, whole; nothing else does.
intree_dirs="Documentation arch drivers fs include kernel lib mm tools virt"

# of_series kernel | qemu: the series that everything below is about.  Sets where
# its patches, its git tree and its base are, how the targets of make for it begin,
# and reads what it applies to (base_package, base_version, ...).
of_series()
{
	case $1 in
	kernel)
		series_version=v7.3 series_tree=$linux prefix='' intree=$intree_dirs
		# shellcheck source=patches/v7.3/BASE
		. "$top/patches/$series_version/BASE" ;;
	qemu)
		series_version=qemu-10.2 series_tree=$qemu_tree prefix=qemu- intree=''
		# shellcheck source=patches/qemu-10.2/BASE
		. "$top/patches/$series_version/BASE" ;;
	esac
	patches=$top/patches/$series_version	# the source of truth
	base_repo=$cache/${series_tree##*/}-base.git	# the bases, made by scripts/fetch
	base_note=$build/${prefix}base-commit	# the one of this checkout
}
of_series kernel

# The identity of every commit and patch.
series_name=gmem-hugetlb
series_email=series@gmem-hugetlb.invalid

# ccache hits across trees and checkouts because the source directory is always
# called "linux" and the O= directories lie beside it: relative to their parent
# (CCACHE_BASEDIR, set by kmake) all trees look alike.
export CCACHE_DIR=$cache/ccache CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-10G}
# The same sources give the same kernel.
export KBUILD_BUILD_TIMESTAMP=2026-01-01 KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_USER=gmem KBUILD_BUILD_HOST=hugetlb LOCALVERSION=
# Set by an outer make, these would change what the kernel's own make does.
unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES ARCH CROSS_COMPILE O KCFLAGS

# say TEXT...: progress, for a person, one argument a line (stdout is for results)
say() { printf '%s\n' "$@" >&2; }

# die TEXT...: an error, one argument a line
die()
{
	printf '%s: error: %s\n' "${0##*/}" "$1" >&2
	shift
	[ $# -eq 0 ] || printf '  %s\n' "$@" >&2
	exit 1
}

# need PROGRAM...: stop, with what to do, if one of them is not installed
need()
{
	local p missing=()

	for p; do
		command -v "$p" >/dev/null || missing+=("$p")
	done
	[ ${#missing[@]} -eq 0 ] || die "not installed: ${missing[*]}" "run: make deps"
}

# help: print the comment at the head of the calling script
help() { sed -n '2{/SPDX/d}; 3,/^[^#]/{/^#/!q; s/^# \{0,1\}//; p}' "$0" | sed '/./,$!d'; }

# lock NAME [DIR]: wait for, then hold until exit, a lock in DIR (the cache: for
# all checkouts)
lock()
{
	local dir=${2:-$cache}

	mkdir -p "$dir"
	exec {lock_fd}>"$dir/$1.lock"
	flock -n "$lock_fd" || { say "waiting for another $1 to finish"; flock "$lock_fd"; }
}

# elapsed: seconds since the script started, for a person
elapsed() { printf '%dm%02ds' $((SECONDS / 60)) $((SECONDS % 60)); }

# kgit ARGS...: git on a kernel tree, deaf to the settings of who runs it
kgit()
{
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
		git -c core.autocrlf=false -c gc.auto=0 -c advice.detachedHead=false "$@"
}

# place "" | --base: sets src and out_root to the patched or the unpatched tree
# and to the directory its O= directories lie in
place()
{
	out_root=$build
	[ "${1:-}" != --base ] || out_root=$build/base
	src=$out_root/linux
}

# kmake SRC OUT ARGS...: the kernel's make, for KARCH with the cross compiler
# CROSS if these are set
kmake()
{
	local src=$1 out=$2

	shift 2
	mkdir -p "$out"
	CCACHE_BASEDIR=$(dirname "$src") nice make -s -j"$jobs" -C "$src" O="$out" \
		${KARCH:+ARCH="$KARCH"} CROSS_COMPILE="${CROSS:-}" CC="ccache ${CROSS:-}gcc" "$@" </dev/null
}

# kselftest SRC OUT DIR HEADERS TARGET...: static selftests of
# tools/testing/selftests/DIR into OUT/DIR, with what "make headers" left in
# HEADERS; without a target all of them (a TARGET may also be VARIABLE=value)
kselftest()
{
	local src=$1 out=$2 dir=$3 headers=$4

	shift 4
	mkdir -p "$out/$dir"
	CCACHE_BASEDIR=$(dirname "$src") nice make -s -j"$jobs" CC="ccache gcc" \
		-C "$src/tools/testing/selftests/$dir" OUTPUT="$out/$dir" USERLDFLAGS=-static \
		KHDR_INCLUDES="-isystem $headers/usr/include" "$@"
}

# kconfig SRC OUT FRAGMENT...: a configuration of fragments on tinyconfig (or
# what KCONFIG_FROM= names); fails with a list if a request did not land
kconfig()
{
	local src=$1 out=$2

	shift 2
	kmake "$src" "$out" "${KCONFIG_FROM:-tinyconfig}" >/dev/null
	"$src/scripts/kconfig/merge_config.sh" -m -O "$out" "$out/.config" "$@" >"$out/merge.log" 2>&1
	kmake "$src" "$out" olddefconfig >/dev/null
	kconfig_landed "$out/.config" "$@"
}

# own_options TREE: the lines of configs/own.config, options that the series
# brings, that this git tree knows already
own_options()
{
	local line option

	while read -r line; do
		option=${line#CONFIG_}
		! kgit -C "$1" grep -qE "^(menu)?config ${option%%=*}$" -- '*Kconfig*' || echo "$line"
	done < <(grep '^CONFIG_' "$top/configs/own.config")
}

# kconfig_landed CONFIG FRAGMENT...: is every requested line in CONFIG?  Of
# several requests for one option the last counts.
kconfig_landed()
{
	local config=$1

	shift
	awk '
		function option(line) { sub(/^# /, "", line); sub(/[ =].*/, "", line); return line }
		!/^CONFIG_[A-Za-z0-9_]+=/ && !/^# CONFIG_[A-Za-z0-9_]+ is not set/ { next }
		FILENAME == ARGV[ARGC - 1] { got[option($0)] = $0; next }
		{ sub(/[ \t]+$/, ""); want[option($0)] = $0; from[option($0)] = FILENAME }
		END {
			for (o in want) {
				w = want[o]; sub(/=n$/, "", w); off = w ~ /is not set$/ || w == o
				if (off ? got[o] ~ /=/ : got[o] != w) {
					sub(/.*\//, "", from[o])
					printf "  %s: asked for \"%s\", got \"%s\"\n", from[o], want[o],
						got[o] != "" ? got[o] : "nothing (unknown, or a dependency is off)"
					bad = 1
				}
			}
			exit bad
		}' "$@" "$config" >&2 || die "options above did not land in $config"
}

# ---- the base and the series

# base_commit: the commit that the series applies to, as scripts/fetch noted it
base_commit()
{
	local commit tree

	read -r commit tree 2>/dev/null <"$base_note" || tree=
	[ "$tree" = "$base_tree" ] || die "the base is not here yet" "run: make ${prefix}tree"
	echo "$commit"
}

# series: the names of the patches, in order
series() { sed 's/#.*//; s/[ \t]*$//; /^$/d' "$patches/series"; }

# touched: "blob path" for each file that the series changes, with the blob that
# it finds on the base (all zeroes: the series adds the file)
touched()
{
	# shellcheck disable=SC2016  # $4 is for awk
	series | sed "s|^|$patches/|" | xargs -r awk '
		/^diff --git / { path = substr($4, 3) }
		/^index / && !(path in seen) { seen[path]; split($2, id, /\.\./); print id[1], path }'
}

# scratch DIR: a throw-away git tree at the base.  It borrows the objects of the
# cache and checks out only what the series touches, so it is made in a second
# (and .gitattributes, which tell diff how to find the names of C functions).
scratch()
{
	local dir=$1

	rm -rf "$dir"
	kgit init -q --template= -b main "$dir"
	echo "$base_repo/objects" >"$dir/.git/objects/info/alternates"
	identify "$dir"
	kgit -C "$dir" update-ref refs/heads/main "$(base_commit)"
	kgit -C "$dir" tag base
	{ echo /.gitattributes; touched | sed 's|^[^ ]* |/|'; } | kgit -C "$dir" sparse-checkout set --no-cone --stdin
	kgit -C "$dir" reset -q --hard
}

# identify DIR: commits in this git tree are the series' own.  Debian's .gitignore
# hides every new file at the top level and below: here it must not.
identify()
{
	if grep -qxF '/*' "$1/.gitignore" 2>/dev/null; then
		sed -i '/^\/\*$/,$d' "$1/.gitignore"
		kgit -C "$1" update-index --skip-worktree .gitignore
	fi
	kgit -C "$1" config user.name "$series_name"
	kgit -C "$1" config user.email "$series_email"
}

# move TREE COMMIT OUT...: reset TREE to COMMIT.  Files that stay the same keep
# their dates, so that what is built stays built; but kbuild does not notice that
# a file has gone: remove what was built of it in these O= directories.
move()
{
	local tree=$1 to=$2 gone cmd object

	shift 2
	gone=$(kgit -C "$tree" diff --name-only --no-renames --diff-filter=D HEAD "$to" | sed 's|^|/|')
	kgit -C "$tree" reset -q --hard "$to"
	[ -n "$gone" ] && [ $# -gt 0 ] || return 0
	{ find "$@" -name '.*.o.cmd' -exec grep -lF -e "$gone" {} + 2>/dev/null || true; } |
		while read -r cmd; do
			object=${cmd##*/.}
			rm -f "$cmd" "${cmd%/*}/${object%.cmd}"
		done
}

# apply DIR: the series on top of the git tree at DIR, exactly: git am without
# fuzz and without three-way merge, each commit id a function of the patches
apply()
{
	series | sed "s|^|$patches/|" | xargs -r env \
		GIT_COMMITTER_NAME="$series_name" GIT_COMMITTER_EMAIL="$series_email" \
		GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
		git -C "$1" -c core.hooksPath=/dev/null am -q --no-3way --whitespace=error \
			--committer-date-is-author-date >&2
}

# series_commit: the commit in the series' tree that the patches make of the base
series_commit()
{
	local id dir=$build/scratch.$$

	id=$({ base_commit; series; cd "$patches" && series | xargs -r cat; } | sha256sum | cut -c 1-40)
	kgit -C "$series_tree" rev-parse -q --verify "refs/series/$id" && return
	scratch "$dir"
	apply "$dir" || { rm -rf "$dir"; return 1; }
	kgit -C "$series_tree" fetch -q --no-tags "$dir" "main:refs/series/$id"
	rm -rf "$dir"
	kgit -C "$series_tree" rev-parse "refs/series/$id"
}

# content COMMIT: a name for all that an export of base..COMMIT would hold
content()
{
	kgit -C "$series_tree" log --reverse --format='%T%n%an <%ae> %ad%n%B' "base..$1" | sha256sum
}

# unexported: why the series' tree holds work that is not in patches/, if it does
unexported()
{
	local git=$series_tree/.git ref head

	[ -d "$git" ] || return 1
	if [ -d "$git/rebase-merge" ] || [ -d "$git/rebase-apply" ]; then
		echo "a rebase or am is in progress there"
	elif [ -n "$(kgit -C "$series_tree" status --porcelain | head -n 1)" ]; then
		echo "files are changed but not committed there"
	elif [ "$(kgit -C "$series_tree" symbolic-ref -q HEAD)" != refs/heads/main ]; then
		echo "its HEAD is not the branch main"
	else
		# What was ever applied or exported is no work to lose.
		head=$(content HEAD)
		for ref in base $(kgit -C "$series_tree" for-each-ref --format='%(refname)' refs/series); do
			[ "$(content "$ref")" != "$head" ] || return 1
		done
		echo "its commits are not the ones in patches/"
	fi
}

# ---- results

# pass NAME, fail NAME [FILE]: one result, on stdout; FILE holds what went wrong
passed=0 failed=0
pass() { passed=$((passed + 1)); printf 'ok    %s\n' "$1"; }
fail()
{
	failed=$((failed + 1))
	printf 'FAIL  %s\n' "$1"
	[ -z "${2:-}" ] || sed 's/^/      /' "$2" | head -n 60
}

# summary: the last line, and the exit status
summary()
{
	printf '%d passed, %d failed\n' "$passed" "$failed"
	[ "$failed" -eq 0 ]
}

# same_bytes WORK: do the patches apply to the base, export to the same bytes again,
# and make the commits of the series' tree?  WORK is for what that takes.
same_bytes()
{
	local work=$1 ours=$1/ours dir why

	scratch "$work/scratch"
	apply "$work/scratch"
	rm -rf "$work/export" "$ours"
	mkdir -p "$work/export" "$ours/patches/$series_version"
	"$top/scripts/export" ${prefix:+--qemu} --from "$work/scratch" --to "$work/export"
	cp "$patches"/*.patch "$patches/series" "$ours/patches/$series_version" 2>/dev/null || true
	for dir in $intree; do
		[ ! -d "$top/$dir" ] || cp -r "$top/$dir" "$ours"
	done
	if diff -r "$ours" "$work/export" >"$work/log"; then
		pass "apply to the base, export again: the same bytes"
	else
		fail "apply to the base, export again: not the same bytes" "$work/log"
	fi
	if why=$(unexported); then
		echo "$why; run: make ${prefix}export" >"$work/log"
		fail "${series_tree#"$top/"} is what patches/ says" "$work/log"
	else
		pass "${series_tree#"$top/"} is what patches/ says"
	fi
}

# checkpatch_each WORK COMMAND...: run on each patch, it must be content
checkpatch_each()
{
	local log=$1/log patch id

	shift
	for patch in $(series); do
		id=$(key checkpatch "$base_tree" <"$patches/$patch")
		if known "$id" || "$@" "$patches/$patch" >"$log" 2>&1; then
			pass "checkpatch $patch"
			remember "$id"
		else
			fail "checkpatch $patch" "$log"
		fi
	done
}

# A result is remembered in the cache under a hash of all that it depends on:
# "key" hashes its arguments, stdin and the tools; "known KEY" asks, "remember
# KEY" notes success, and failures are never remembered.
key()
{
	{
		gcc --version
		[ -z "${CROSS:-}" ] || "${CROSS}gcc" --version
		cat "$0" "$top/scripts/lib.sh"
		printf '%s\n' "$@"
		cat
	} | sha256sum | cut -c 1-40
}
known() { [ -z "${AGAIN:-}" ] && [ -e "$cache/results/$1" ]; }
remember() { mkdir -p "$cache/results" && : >"$cache/results/$1"; }

# demo_program NAME: builds demo/NAME.c with the KVM selftests' library of the
# series, and prints where it is
demo_program()
{
	local out=$build/demo kvm=$linux/tools/testing/selftests/kvm lib=$build/selftests/kvm/lib
	local objects

	"$top/scripts/selftests" >/dev/null
	mkdir -p "$out"
	mapfile -t objects < <(find "$lib" -name '*.o' | sort)
	ccache gcc -std=gnu11 -O2 -Wall -static -D_GNU_SOURCE -fno-strict-aliasing \
		-fno-stack-protector -fno-PIE -no-pie -pthread -I "$top/demo" -I "$kvm/include" \
		-I "$kvm/include/x86" -I "$kvm/.." -I "$linux/tools/include" \
		-I "$linux/tools/arch/x86/include" -isystem "$build/selftests/headers/usr/include" \
		-o "$out/$1" "$top/demo/$1.c" "${objects[@]}" >&2 ||
		die "demo/$1.c does not build"
	echo "$out/$1"
}
