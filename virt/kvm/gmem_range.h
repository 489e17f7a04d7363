/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_GMEM_RANGE_H__
#define __KVM_GMEM_RANGE_H__

#include <linux/cache.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/types.h>

#define GMEM_NR_RANGE_LOCKS	64

/* Alone in its cache line, which vCPUs would contend for otherwise. */
struct gmem_range_lock {
	struct rw_semaphore rwsem;
} ____cacheline_aligned_in_smp;

/**
 * struct gmem_ranges - the range of a guest_memfd file that changes
 * @change_lock: held by the task that changes a range
 * @order: order of the pages of the file
 * @start: index of the first page of the range, a multiple of the page size
 * @end: index after the last page of the range; 0 if there is no change
 * @awaited: a user waits for the end of the change, or has waited for the last
 *	   one
 * @locks: shared by the users of pages, see kvm_gmem_range_lock()
 */
struct gmem_ranges {
	struct mutex change_lock;	/* see above */
	unsigned int order;
	pgoff_t start;
	pgoff_t end;
	bool awaited;
	struct gmem_range_lock locks[GMEM_NR_RANGE_LOCKS];
};

struct gmem_waiters;

/**
 * struct gmem_wait - a change to wait for
 * @waiters: where to wait; independent of the lifetime of the file
 * @seq: number of changes that had ended there
 */
struct gmem_wait {
	struct gmem_waiters *waiters;
	int seq;
};

void kvm_gmem_range_init_waiters(void);
void kvm_gmem_range_init(struct gmem_ranges *gr, unsigned int order);

int kvm_gmem_range_begin_change(struct gmem_ranges *gr, pgoff_t start, pgoff_t end);
void kvm_gmem_range_end_change(struct gmem_ranges *gr);

bool kvm_gmem_range_is_changing(struct gmem_ranges *gr, pgoff_t index);
bool kvm_gmem_range_trylock(struct gmem_ranges *gr, pgoff_t index);
int kvm_gmem_range_lock(struct gmem_ranges *gr, pgoff_t index, unsigned int state,
			struct gmem_wait *wait);
pgoff_t kvm_gmem_range_lock_end(struct gmem_ranges *gr, pgoff_t index);
bool kvm_gmem_range_is_contended(struct gmem_ranges *gr, pgoff_t index);
void kvm_gmem_range_unlock(struct gmem_ranges *gr, pgoff_t index);
void kvm_gmem_range_assert_locked(struct gmem_ranges *gr, pgoff_t index);
int kvm_gmem_range_wait(const struct gmem_wait *wait, unsigned int state);

#endif /* __KVM_GMEM_RANGE_H__ */
