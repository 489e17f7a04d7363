// SPDX-License-Identifier: GPL-2.0-only
/*
 * Merging of guest_memfd huge pages that have become private
 */

/**
 * DOC: merging of guest_memfd huge pages
 *
 * A guest that shares memory often takes it back soon, and shares it again.
 * Splitting and merging its huge page each time would be expensive for the
 * guest, and for the whole host, as it flushes the TLBs of all CPUs.  So a
 * conversion to private only marks the huge page, and a worker merges it when
 * none of its pages has become private for kvm.gmem_merge_delay_ms.  The
 * guest's mappings do not depend on that: a fault maps as much memory as is
 * private.
 *
 * Merging is a change of a range like any other, see gmem_range.c.  It has no
 * effect on the contents or attributes of the memory, so it may fail, and is
 * repeated after the next delay.  The worker makes short changes, so that
 * conversions do not wait long for it, but one change can merge many small huge
 * pages, which then share a TLB flush and a grace period.
 *
 * A huge page that leaves its file is merged on the way to its pool.
 */
#include <linux/bitmap.h>
#include <linux/kvm_host.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>

#include <trace/events/kvm.h>

#include "guest_memfd.h"

static unsigned int gmem_merge_delay_ms = 1000;
module_param(gmem_merge_delay_ms, uint, 0644);
MODULE_PARM_DESC(gmem_merge_delay_ms,
		 "Time after which huge pages that have become private are merged (0: at once)");

/* Number of base pages that one change of the worker covers at most. */
#define GMEM_MERGE_PAGES	(SZ_1G >> PAGE_SHIFT)

/**
 * struct gmem_merge_change - state of one change
 * @folios: the folios that the allocator merges
 * @waits_spent: waits for references, see kvm_gmem_wait_for_reference()
 */
struct gmem_merge_change {
	struct guestmem_change folios;
	unsigned int waits_spent;
};

static bool kvm_gmem_merge_wait(struct guestmem_change *change)
{
	struct gmem_merge_change *c = container_of(change, typeof(*c), folios);

	return kvm_gmem_wait_for_reference(&c->waits_spent);
}

static int kvm_gmem_merge_pages(struct gmem_inode *gi, pgoff_t start, pgoff_t end)
{
	struct guestmem_allocator *gm = &gi->allocator;
	struct gmem_merge_change c = {
		.folios.wait = kvm_gmem_merge_wait,
	};
	int r;

	r = gm->ops->prepare_merge(gm, &c.folios, start, end);
	if (!r)
		gm->ops->commit(gm, &c.folios);
	return r;
}

/* Without a delay the worker only repeats what failed, a second later. */
static void kvm_gmem_merge_queue(struct gmem_inode *gi)
{
	unsigned int delay_ms = READ_ONCE(gmem_merge_delay_ms) ?: MSEC_PER_SEC;

	queue_delayed_work(system_dfl_wq, &gi->merge.work, msecs_to_jiffies(delay_ms));
}

/* Merge consecutive huge pages that are due.  Return false if none is. */
static bool kvm_gmem_merge_next(struct gmem_inode *gi)
{
	unsigned int order = gi->allocator.order;
	struct gmem_merge *gg = &gi->merge;
	unsigned long first, end, max;
	int r;

	/* Not a hung task: another change can take long. */
	ACQUIRE(mutex_kill, lock)(&gi->ranges.change_lock);
	if (ACQUIRE_ERR(mutex_kill, &lock))
		return false;

	first = find_first_bit(gg->due, gg->nr_pages);
	if (first == gg->nr_pages)
		return false;

	max = first < gg->retry_end ? 1 : max(GMEM_MERGE_PAGES >> order, 1UL);
	end = find_next_zero_bit(gg->due, min(first + max, gg->nr_pages), first);
	bitmap_clear(gg->due, first, end - first);

	r = kvm_gmem_range_begin_change(&gi->ranges, first << order, end << order);
	if (!r) {
		r = kvm_gmem_merge_pages(gi, first << order, end << order);
		kvm_gmem_range_end_change(&gi->ranges);
	}

	trace_kvm_gmem_merge(gi->vfs_inode.i_ino, first << order, end << order, r);
	if (r && end - first > 1) {
		/* A page in use must not keep others split: retry each. */
		bitmap_set(gg->due, first, end - first);
		gg->retry_end = end;
	} else if (r) {
		bitmap_set(gg->later, first, 1);
	}
	return true;
}

static void kvm_gmem_merge_work(struct work_struct *work)
{
	struct gmem_inode *gi = container_of(to_delayed_work(work), struct gmem_inode,
					     merge.work);
	struct gmem_merge *gg = &gi->merge;

	while (kvm_gmem_merge_next(gi)) {
		/* The allocator merges pages of a file that goes away. */
		if (inode_state_read_once(&gi->vfs_inode) & I_FREEING)
			return;
		cond_resched();
	}

	ACQUIRE(mutex_kill, lock)(&gi->ranges.change_lock);
	if (ACQUIRE_ERR(mutex_kill, &lock))
		return;

	gg->retry_end = 0;
	swap(gg->due, gg->later);
	if (!bitmap_empty(gg->due, gg->nr_pages))
		kvm_gmem_merge_queue(gi);
}

/* Check whether the private memory around a range includes a part. */
static bool kvm_gmem_merge_has_part(struct gmem_inode *gi, pgoff_t start, pgoff_t end)
{
	pgoff_t size = 1UL << gi->allocator.part_order;
	struct gmem_attributes_range range;

	range = kvm_gmem_attributes_get(&gi->attributes, start);
	start = max(range.first, round_down(start, 1UL << gi->allocator.order));
	end = min(range.last + 1, round_up(end, 1UL << gi->allocator.order));
	return round_up(start, size) + size <= end;
}

/*
 * Merge the huge pages that the range is in, as far as the attributes allow: at
 * once if there is no delay and no page is in use, else later.  The range has
 * become private, and is still changing.
 */
void kvm_gmem_merge_range(struct gmem_inode *gi, pgoff_t start, pgoff_t end)
{
	pgoff_t size = 1UL << gi->allocator.order;
	struct gmem_merge *gg = &gi->merge;

	lockdep_assert_held(&gi->ranges.change_lock);

	/* Most changes are too small to merge folios. */
	if (!gg->nr_pages || !kvm_gmem_merge_has_part(gi, start, end))
		return;

	start = round_down(start, size);
	end = round_up(end, size);
	if (!READ_ONCE(gmem_merge_delay_ms) && !kvm_gmem_merge_pages(gi, start, end))
		return;

	bitmap_clear(gg->due, start / size, (end - start) / size);
	bitmap_set(gg->later, start / size, (end - start) / size);
	kvm_gmem_merge_queue(gi);
}

int kvm_gmem_merge_init(struct gmem_inode *gi)
{
	unsigned long nr_pages = i_size_read(&gi->vfs_inode) >>
				 (PAGE_SHIFT + gi->allocator.order);
	struct gmem_merge *gg = &gi->merge;

	if (!gi->allocator.ops->prepare_merge || !gi->allocator.may_be_large)
		return 0;

	gg->due = kvcalloc(BITS_TO_LONGS(nr_pages), sizeof(long), GFP_KERNEL_ACCOUNT);
	gg->later = kvcalloc(BITS_TO_LONGS(nr_pages), sizeof(long), GFP_KERNEL_ACCOUNT);
	if (!gg->due || !gg->later) {
		kvm_gmem_merge_destroy(gi);
		return -ENOMEM;
	}

	INIT_DELAYED_WORK(&gg->work, kvm_gmem_merge_work);
	gg->nr_pages = nr_pages;
	return 0;
}

/* Wait for the worker to stop.  No task can convert memory any more. */
void kvm_gmem_merge_stop(struct gmem_inode *gi)
{
	if (gi->merge.nr_pages)
		cancel_delayed_work_sync(&gi->merge.work);
}

void kvm_gmem_merge_destroy(struct gmem_inode *gi)
{
	kvfree(gi->merge.due);
	kvfree(gi->merge.later);
	gi->merge = (struct gmem_merge) {};
}
