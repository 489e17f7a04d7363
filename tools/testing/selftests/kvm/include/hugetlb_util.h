/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * HugeTLB pools and all of their counters, for tests of guest_memfd files that
 * use pages of the pools.
 */
#ifndef SELFTEST_KVM_HUGETLB_UTIL_H
#define SELFTEST_KVM_HUGETLB_UTIL_H

#include "kvm_util.h"

#include <linux/sizes.h>

#define HUGETLB_MAX_NODES	8

/* Pool sizes that the tests need.  Reserve 1 GiB pages on the command line. */
#define HUGETLB_POOL_2M		64
#define HUGETLB_POOL_1G		2

#define CGROUP_MOUNT		"/sys/fs/cgroup"

#define GMEM_SIZE_SHIFT		26
#define GMEM_SIZE_MASK		(0x3full << GMEM_SIZE_SHIFT)

/* All counters that change when a huge page is reserved, used or freed. */
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
	/* The pool's page size, and whether the pool must not change. */
	size_t size;
	bool untouched;
	/* Whether the kernel has counters for each node. */
	bool has_nodes;
	long val[NR_HUGETLB_COUNTERS];
};

extern const char * const hugetlb_counter_names[NR_HUGETLB_COUNTERS];

/* Read the first number that follows @key, or that starts a line without @key. */
bool read_number(const char *path, const char *key, long *val);
void write_number(const char *path, long val);

/*
 * Print once that the test goes on without a check or step that this kernel has
 * no support for.  @needs names what is missing.
 */
void gmem_left_out(const char *what, const char *needs);

/*
 * Create a VM without vCPUs, for tests of files.  It has private memory if the
 * kernel supports that without special hardware.
 */
struct kvm_vm *gmem_vm_create_barebones(void);

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

/* Return why files of @page_size pages cannot be tested, or NULL. */
const char *gmem_unavailable(size_t page_size);

/* The same for 2 MiB, with @nr such pages on each of two nodes. */
const char *gmem_two_nodes_unavailable(long nr);

/* Set the pool of 2 MiB pages to the size above, and restore pools at exit. */
void gmem_prepare_pools(void);

/* Return st_blocks. */
u64 gmem_blocks(int fd);

/* An exhausted pool or cgroup has no errno of its own. */
static inline bool gmem_is_full(int err)
{
	return err == ENOMEM || err == ENOSPC;
}

/* Expect that creating a file of @nr pages fails and leaves counters unchanged. */
void gmem_expect_full(struct kvm_vm *vm, size_t page_size, long nr,
		      const char *why);

/* Return whether the pool optimizes the vmemmap of new huge pages. */
bool hugetlb_is_optimized(void);

/* Return the number of pages that can still be reserved. */
long hugetlb_available(size_t size);

/* Access the files of one pool, for all nodes or for one. */
long hugetlb_read(size_t size, const char *file);
void hugetlb_write(size_t size, const char *file, long val);
bool hugetlb_has_node(size_t size, int nid);
long hugetlb_read_node(size_t size, int nid, const char *file);
void hugetlb_write_node(size_t size, int nid, const char *file, long val);

void hugetlb_get(size_t size, struct hugetlb_counters *c);

/*
 * Assert that the pool's counters, wherever the kernel reports them, differ
 * from @before by exactly @free free and @resv reserved pages.  For files of
 * base pages, assert that no counter has changed.
 */
#define hugetlb_expect(before, free, resv, fmt, ...)			\
	__hugetlb_expect(before, free, resv, false, __FILE__, __LINE__,	\
			 fmt, ##__VA_ARGS__)

/*
 * Assert that the counters are what they were in @before.  Another context can
 * free pages after the last reference is dropped, so poll for up to ten
 * seconds.
 */
#define hugetlb_expect_released(before, fmt, ...)			\
	__hugetlb_expect(before, 0, 0, true, __FILE__, __LINE__,	\
			 fmt, ##__VA_ARGS__)

void __printf(7, 8) __hugetlb_expect(const struct hugetlb_counters *before,
				     long free, long resv, bool wait,
				     const char *file, int line,
				     const char *fmt, ...);

/*
 * Set the pool to exactly @nr pages, and allow no surplus.  Return the size
 * that the pool has reached.  The first call for a page size saves the present
 * settings.  After hugetlb_pool_restore_at_exit(), they are restored when the
 * process that called it exits.
 */
long hugetlb_pool_set(size_t size, long nr);
void hugetlb_pool_restore_at_exit(void);

/* Map a memfd of @nr huge pages, which reserves them.  May return MAP_FAILED. */
void *hugetlb_memfd_map(size_t size, long nr, int *fd);

/*
 * Allocate @nr pages, fill them with HUGETLB_DIRT and free them, so that a page
 * is recognizable if it is not cleared before its next use.
 */
#define HUGETLB_DIRT		0xd1d1d1d1d1d1d1d1ull
#define HUGETLB_DIRT_STRIDE	512
void hugetlb_dirty_pool(size_t size, long nr);

/* The reason to skip a test if hugetlb_cgroup_enter() fails. */
#define HUGETLB_NO_CGROUP \
	"needs cgroup2 with CONFIG_CGROUP_HUGETLB and CONFIG_MEMCG"

/*
 * Move the calling process to a new cgroup with the hugetlb and memory
 * controllers, and back.  hugetlb_cgroup_path() is NULL before
 * hugetlb_cgroup_enter() and after hugetlb_cgroup_remove().
 */
bool hugetlb_cgroup_enter(const char *name);
void hugetlb_cgroup_leave(void);
int hugetlb_cgroup_remove(void);
const char *hugetlb_cgroup_path(void);
void hugetlb_cgroup_write(size_t size, const char *file, const char *val);
long hugetlb_cgroup_read(size_t size, const char *file);

/* memory_hugetlb_accounting is a mount option, common to all mounts. */
void hugetlb_cgroup_set_accounting(bool on);
bool hugetlb_cgroup_get_accounting(void);

/* Wait until there are @nr removed but not yet freed cgroups.  Return their number. */
long hugetlb_cgroup_wait_for_dying(long nr);

#endif /* SELFTEST_KVM_HUGETLB_UTIL_H */
