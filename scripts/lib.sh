# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# shellcheck disable=SC2034  # most variables are used by the scripts that source it
#
# Shared by all scripts (". lib.sh"): paths, reproducible and cached builds, messages.

set -euo pipefail
export LC_ALL=C
umask 022

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
build=$top/build			# all files built from this checkout
linux=$build/linux			# git tree: tag "base", then a commit per patch
qemu_tree=$build/qemu		# the same for QEMU
# Shared between checkouts: downloads, ccache, results.
cache=${GMEM_CACHE:-${XDG_CACHE_HOME:-${HOME:-$build}/.cache}/gmem-hugetlb}
[[ $cache == /* ]] || cache=$PWD/$cache
jobs=${JOBS:-$(nproc)}

# The directories of the files that the kernel series adds, and of no other files.
intree_dirs="Documentation arch drivers fs include kernel lib mm tools virt"

# of_series kernel | qemu: select the series for the functions below.  Set the paths of
# its patches, git tree and base and the prefix of its make targets, and read the
# description of its base (base_package, base_version, ...).
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
	base_note=$build/${prefix}base-commit	# the base of this checkout
}
of_series kernel

cover_letter=cover-letter.patch
# The files in the directory of a series that scripts/export writes, for rsync.
exported=(-m --include='*/' --include='*.patch' --include=series --include=README.md --exclude='*')

# The author of all commits and patches.
series_name=gmem-hugetlb
series_email=series@gmem-hugetlb.invalid

# ccache hits across trees and checkouts: the source directory is always called "linux"
# and the O= directories are next to it, so all paths relative to their parent
# (CCACHE_BASEDIR, set by kmake) are the same.
export CCACHE_DIR=$cache/ccache CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-10G}
# Reproducible builds.
export KBUILD_BUILD_TIMESTAMP=2026-01-01 KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_USER=gmem KBUILD_BUILD_HOST=hugetlb LOCALVERSION=
# An outer make can set these, which would affect the kernel's make.
unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES ARCH CROSS_COMPILE O KCFLAGS

# say TEXT...: print progress to stderr, one argument per line (stdout is for results)
say() { printf '%s\n' "$@" >&2; }

# die TEXT...: print an error, one argument per line, and exit
die()
{
	printf '%s: error: %s\n' "${0##*/}" "$1" >&2
	shift
	[ $# -eq 0 ] || printf '  %s\n' "$@" >&2
	exit 1
}

# need PROGRAM...: exit with advice if one of them is not installed
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

# lock NAME [DIR]: take a lock in DIR until exit (default: the cache, for all checkouts)
lock()
{
	local dir=${2:-$cache}

	mkdir -p "$dir"
	exec {lock_fd}>"$dir/$1.lock"
	flock -n "$lock_fd" || { say "waiting for another $1 to finish"; flock "$lock_fd"; }
}

# elapsed: print the time since the script started
elapsed() { printf '%dm%02ds' $((SECONDS / 60)) $((SECONDS % 60)); }

# kgit ARGS...: run git on a kernel tree, without the configuration of the user
kgit()
{
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
		git -c core.autocrlf=false -c gc.auto=0 -c advice.detachedHead=false "$@"
}

# place "" | --base: set src to the patched or the unpatched tree, and out_root to the
# parent of its O= directories
place()
{
	out_root=$build
	[ "${1:-}" != --base ] || out_root=$build/base
	src=$out_root/linux
}

# kmake SRC OUT ARGS...: run the kernel's make, for KARCH with the cross compiler CROSS
# if these are set
kmake()
{
	local src=$1 out=$2

	shift 2
	mkdir -p "$out"
	CCACHE_BASEDIR=$(dirname "$src") nice make -s -j"$jobs" -C "$src" O="$out" \
		${KARCH:+ARCH="$KARCH"} CROSS_COMPILE="${CROSS:-}" CC="ccache ${CROSS:-}gcc" "$@" </dev/null
}

# kselftest SRC OUT DIR HEADERS TARGET...: build static selftests of
# tools/testing/selftests/DIR in OUT/DIR, with the result of "make headers" in HEADERS.
# Without TARGET build all of them; a TARGET can also be VARIABLE=value.
kselftest()
{
	local src=$1 out=$2 dir=$3 headers=$4

	shift 4
	mkdir -p "$out/$dir"
	CCACHE_BASEDIR=$(dirname "$src") nice make -s -j"$jobs" CC="ccache gcc" \
		-C "$src/tools/testing/selftests/$dir" OUTPUT="$out/$dir" USERLDFLAGS=-static \
		KHDR_INCLUDES="-isystem $headers/usr/include" "$@"
}

# kconfig SRC OUT FRAGMENT...: configure with fragments on top of tinyconfig (or the
# target in KCONFIG_FROM=); fail with a list if an option is not in the result
kconfig()
{
	local src=$1 out=$2

	shift 2
	kmake "$src" "$out" "${KCONFIG_FROM:-tinyconfig}" >/dev/null
	"$src/scripts/kconfig/merge_config.sh" -m -O "$out" "$out/.config" "$@" >"$out/merge.log" 2>&1
	kmake "$src" "$out" olddefconfig >/dev/null
	kconfig_landed "$out/.config" "$@"
}

# own_options TREE: print the lines of configs/own.config, which has the options that
# the series adds, that are known in this git tree
own_options()
{
	local line option

	while read -r line; do
		option=${line#CONFIG_}
		! kgit -C "$1" grep -qE "^(menu)?config ${option%%=*}$" -- '*Kconfig*' || echo "$line"
	done < <(grep '^CONFIG_' "$top/configs/own.config")
}

# copy_with COPY DIR...: copy the repository, with these parts of the series only, and make
# its tree
copy_with()
{
	local copy=$1 dirs=("${@:2}") dir

	mkdir -p "$copy"
	(cd "$top" && git ls-files -z -co --exclude-standard |
		rsync -r -l -p --ignore-missing-args --files-from=- -0 . "$copy") || return
	for dir in "$copy/patches/$series_version"/[0-9]*-*; do
		[[ " ${dirs[*]} " == *" ${dir##*/} "* ]] || rm -rf "$dir"
	done
	series | grep -E "^($(IFS='|'; echo "${dirs[*]}"))/" >"$copy/patches/$series_version/series"
	"$copy/scripts/tree" || return
	own_options "$copy/build/linux" >"$copy/build/own.config" || return
	mv "$copy/build/own.config" "$copy/configs/own.config"
}

# kconfig_landed CONFIG FRAGMENT...: check that all requested options are in CONFIG.
# The last request for an option counts.
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

# base_commit: print the commit that the series applies to, recorded by scripts/fetch
base_commit()
{
	local commit tree

	read -r commit tree 2>/dev/null <"$base_note" || tree=
	[ "$tree" = "$base_tree" ] || die "the base is not here yet" "run: make ${prefix}tree"
	echo "$commit"
}

# series: print the names of the patches, in order
series() { sed 's/#.*//; s/[ \t]*$//; /^$/d' "$patches/series"; }

# mails: print the names of all files for git am, in order: each part of a series has a
# directory with a cover letter
mails()
{
	local patch dir=.

	series | while read -r patch; do
		[ "$(dirname "$patch")" = "$dir" ] || echo "${patch%/*}/$cover_letter"
		dir=$(dirname "$patch")
		echo "$patch"
	done
}

# is_cover_letter TREE COMMIT: succeed if COMMIT changes nothing.  Such a commit holds the
# cover letter of the part that it begins.
is_cover_letter()
{
	[ "$(kgit -C "$1" rev-parse "$2^{tree}")" = "$(kgit -C "$1" rev-parse "$2^^{tree}")" ]
}

# touched: print "blob path" for each file that the series changes, with its blob in
# the base (all zeroes: the series adds the file)
touched()
{
	# shellcheck disable=SC2016  # $4 is for awk
	series | sed "s|^|$patches/|" | xargs -r awk '
		/^diff --git / { path = substr($4, 3) }
		/^index / && !(path in seen) { seen[path]; split($2, id, /\.\./); print id[1], path }'
}

# scratch DIR: create a temporary git tree at the base.  It uses the objects of the
# cache and checks out only the files that the series touches, which takes a second
# (and .gitattributes, for function names in hunk headers).
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

# identify DIR: make the series the author of commits in this git tree.  Disable the
# rules of Debian's .gitignore that hide all new files.
identify()
{
	if grep -qxF '/*' "$1/.gitignore" 2>/dev/null; then
		sed -i '/^\/\*$/,$d' "$1/.gitignore"
		kgit -C "$1" update-index --skip-worktree .gitignore
	fi
	kgit -C "$1" config user.name "$series_name"
	kgit -C "$1" config user.email "$series_email"
}

# move TREE COMMIT OUT...: reset TREE to COMMIT.  Unchanged files keep their dates, so
# that they are not built again.  kbuild does not detect removed files: remove their
# objects in these O= directories.
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

# apply DIR: apply the series to the git tree at DIR with git am, without fuzz and
# without three-way merge; the commit ids depend on the patches only
apply()
{
	mails | sed "s|^|$patches/|" | xargs -r env \
		GIT_COMMITTER_NAME="$series_name" GIT_COMMITTER_EMAIL="$series_email" \
		GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
		git -C "$1" -c core.hooksPath=/dev/null am -q --no-3way --whitespace=error \
			--empty=keep --committer-date-is-author-date >&2
}

# series_commit: print the commit of the series in its git tree, after applying the
# patches if necessary
series_commit()
{
	local id dir=$build/scratch.$$

	id=$({ base_commit; mails; cd "$patches" && mails | xargs -r cat; } | sha256sum | cut -c 1-40)
	kgit -C "$series_tree" rev-parse -q --verify "refs/series/$id" && return
	scratch "$dir"
	apply "$dir" || { rm -rf "$dir"; return 1; }
	kgit -C "$series_tree" fetch -q --no-tags "$dir" "main:refs/series/$id"
	rm -rf "$dir"
	kgit -C "$series_tree" rev-parse "refs/series/$id"
}

# content COMMIT: print a hash of the export of base..COMMIT
content()
{
	kgit -C "$series_tree" log --reverse --format='%T%n%an <%ae> %ad%n%B' "base..$1" | sha256sum
}

# unexported: succeed if the tree of the series has work that is not in patches/, and
# print the reason
unexported()
{
	local git=$series_tree/.git ref head

	[ -d "$git" ] || return 1
	if [ -d "$git/rebase-merge" ] || [ -d "$git/rebase-apply" ]; then
		echo "a rebase or am is in progress there"
	elif [ -n "$(kgit -C "$series_tree" status --porcelain | sed -n 1p)" ]; then
		echo "files are changed but not committed there"
	elif [ "$(kgit -C "$series_tree" symbolic-ref -q HEAD)" != refs/heads/main ]; then
		echo "its HEAD is not the branch main"
	else
		# Commits that were applied or exported before are not lost.
		head=$(content HEAD)
		for ref in base $(kgit -C "$series_tree" for-each-ref --format='%(refname)' refs/series); do
			[ "$(content "$ref")" != "$head" ] || return 1
		done
		echo "its commits are not the ones in patches/"
	fi
}

# ---- results

# pass NAME, fail NAME [FILE]: print one result; FILE has the details of a failure
passed=0 failed=0
pass() { passed=$((passed + 1)); printf 'ok    %s\n' "$1"; }
fail()
{
	failed=$((failed + 1))
	printf 'FAIL  %s\n' "$1"
	[ -z "${2:-}" ] || sed -n '1,60s/^/      /p' "$2"
}

# summary: print the last line, return the exit status
summary()
{
	printf '%d passed, %d failed\n' "$passed" "$failed"
	[ "$failed" -eq 0 ]
}

# same_bytes WORK: check that the patches apply to the base, export to the same bytes
# again, and match the commits in the tree of the series.  WORK is for temporary files.
same_bytes()
{
	local work=$1 ours=$1/ours dir why

	scratch "$work/scratch"
	apply "$work/scratch"
	rm -rf "$work/export" "$ours"
	mkdir -p "$work/export" "$ours/patches/$series_version"
	"$top/scripts/export" ${prefix:+--qemu} --from "$work/scratch" --to "$work/export"
	rsync -r "${exported[@]}" "$patches/" "$ours/patches/$series_version/"
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

# checkpatch_each WORK COMMAND...: run COMMAND on each patch; it must succeed
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

# A result is stored in the cache under a hash of its inputs.  "key" hashes its
# arguments, stdin and the tools, "known KEY" looks a result up, "remember KEY" stores
# success.  Failures are not stored.
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

# demo_program NAME: build demo/NAME.c with the library of the KVM selftests of the
# series, and print its path
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
