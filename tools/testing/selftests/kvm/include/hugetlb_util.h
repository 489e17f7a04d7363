/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * HugeTLB pools and everything the kernel reports about them, for tests of
 * guest_memfd files that take their memory from there.
 */
#ifndef SELFTEST_KVM_HUGETLB_UTIL_H
#define SELFTEST_KVM_HUGETLB_UTIL_H

#include "kvm_util.h"

#include <linux/sizes.h>

#define HUGETLB_MAX_NODES	8

/* Pool sizes the tests ask for; 1 GiB pages come from the command line. */
#define HUGETLB_POOL_2M		64
#define HUGETLB_POOL_1G		2

#define CGROUP_MOUNT		"/sys/fs/cgroup"

#define GMEM_SIZE_SHIFT		26
#define GMEM_SIZE_MASK		(0x3full << GMEM_SIZE_SHIFT)

/* Every figure that moves when a huge page is reserved, used or freed. */
enum hugetlb_counter {
	/* /sys/kernel/mm/hugepages/ */
	HUGETLB_TOTAL,
	HUGETLB_FREE,
	HUGETLB_RESV,
	HUGETLB_SURPLUS,
	/* /sys/devices/system/node/node<n>/hugepages/, the sum over all nodes */
	HUGETLB_NODES_TOTAL,
	HUGETLB_NODES_FREE,
	HUGETLB_NODES_SURPLUS,
	/* /proc/meminfo */
	HUGETLB_MEMINFO_TOTAL,
	HUGETLB_MEMINFO_FREE,
	HUGETLB_MEMINFO_RSVD,
	HUGETLB_MEMINFO_SURP,
	HUGETLB_MEMINFO_HUGETLB,
	/* /proc/vmstat */
	HUGETLB_VMSTAT,
	/* cgroup, if hugetlb_cgroup_enter() was called */
	HUGETLB_CG_CURRENT,
	HUGETLB_CG_RSVD,
	HUGETLB_CG_NUMA,
	HUGETLB_CG_MEMORY,
	NR_HUGETLB_COUNTERS,
};

struct hugetlb_counters {
	/* The pool, and whether it is only watched, for a file of base pages. */
	size_t size;
	bool untouched;
	long val[NR_HUGETLB_COUNTERS];
};

extern const char * const hugetlb_counter_names[NR_HUGETLB_COUNTERS];

/* Read the first number that follows @key, or starts the file. */
bool read_number(const char *path, const char *key, long *val);
void write_number(const char *path, long val);

bool hugetlb_has_size(size_t size);
size_t hugetlb_default_size(void);
const char *hugetlb_size_name(size_t size);

/* Flags for a guest_memfd file of @page_size pages. */
static inline u64 gmem_flags(size_t page_size)
{
	if (page_size == getpagesize())
		return 0;

	return GUEST_MEMFD_FLAG_HUGETLB |
	       ((u64)__builtin_ctzl(page_size) << GMEM_SIZE_SHIFT);
}

/* Why files of @page_size pages can't be tested here, or NULL. */
const char *gmem_unavailable(size_t page_size);

/* As gmem_unavailable(SZ_2M), with @nr such pages on each of two nodes. */
const char *gmem_two_nodes_unavailable(long nr);

/* Bring the pools to the sizes above, what was there returns at exit. */
void gmem_prepare_pools(void);

/* st_blocks */
u64 gmem_blocks(int fd);

/* There is no errno of its own for "the pool or the cgroup has no more". */
static inline bool gmem_is_full(int err)
{
	return err == ENOMEM || err == ENOSPC;
}

/* A file of @nr pages that must not be possible, and leave nothing behind. */
void gmem_expect_full(struct kvm_vm *vm, size_t page_size, long nr,
		      const char *why);

/* Pages that can still be reserved. */
long hugetlb_available(size_t size);

/* The files of one pool; on all nodes together or on one. */
long hugetlb_read(size_t size, const char *file);
void hugetlb_write(size_t size, const char *file, long val);
bool hugetlb_has_node(size_t size, int nid);
long hugetlb_read_node(size_t size, int nid, const char *file);
void hugetlb_write_node(size_t size, int nid, const char *file, long val);

void hugetlb_get(size_t size, struct hugetlb_counters *c);

/*
 * Assert that the pool's counters, wherever the kernel shows them, differ from
 * @before by exactly @free free and @resv reserved pages.  For files of base
 * pages nothing may have moved, whatever is asked for.
 */
#define hugetlb_expect(before, free, resv, fmt, ...)			\
	__hugetlb_expect(before, free, resv, false, __FILE__, __LINE__,	\
			 fmt, ##__VA_ARGS__)

/*
 * As hugetlb_expect(), when the last reference has gone and the pages may
 * come back from another context.  It polls, and gives up after ten seconds.
 */
#define hugetlb_expect_released(before, fmt, ...)			\
	__hugetlb_expect(before, 0, 0, true, __FILE__, __LINE__,	\
			 fmt, ##__VA_ARGS__)

void __printf(7, 8) __hugetlb_expect(const struct hugetlb_counters *before,
				     long free, long resv, bool wait,
				     const char *file, int line,
				     const char *fmt, ...);

/*
 * Bring the pool to exactly @nr pages for the rest of the test, no surplus.
 * Returns what could be had.  The first call for a size remembers the present
 * settings; hugetlb_pool_restore_at_exit() puts them back when the process
 * that called it ends.
 */
long hugetlb_pool_set(size_t size, long nr);
void hugetlb_pool_restore_at_exit(void);

/* A memfd of @nr huge pages, mapped, i.e. reserved; or MAP_FAILED. */
void *hugetlb_memfd_map(size_t size, long nr, int *fd);

/*
 * Take @nr free pages, fill them with HUGETLB_DIRT and give them back, so that
 * a page that isn't cleared before its next use shows.
 */
#define HUGETLB_DIRT		0xd1d1d1d1d1d1d1d1ull
#define HUGETLB_DIRT_STRIDE	512
void hugetlb_dirty_pool(size_t size, long nr);

/*
 * Move the calling process to a new cgroup with the hugetlb and memory
 * controllers, and back.  hugetlb_cgroup_path() is NULL outside.
 */
bool hugetlb_cgroup_enter(const char *name);
void hugetlb_cgroup_leave(void);
int hugetlb_cgroup_remove(void);
const char *hugetlb_cgroup_path(void);
void hugetlb_cgroup_write(size_t size, const char *file, const char *val);
long hugetlb_cgroup_read(size_t size, const char *file);

/* memory_hugetlb_accounting is an option of all mounts together. */
void hugetlb_cgroup_set_accounting(bool on);
bool hugetlb_cgroup_get_accounting(void);

/* Until there are @nr removed cgroups that hold something.  Returns how many. */
long hugetlb_cgroup_wait_for_dying(long nr);

#endif /* SELFTEST_KVM_HUGETLB_UTIL_H */
