// SPDX-License-Identifier: GPL-2.0-only
/*
 * In-place conversion of guest_memfd memory between private and shared
 */

/**
 * DOC: conversion of guest_memfd pages
 *
 * A conversion changes all of a range, or nothing.  It has three steps:
 *
 * - Prepare: allocate the memory for the change.  If memory becomes private,
 *   unmap it from the host and check that it has no other users.  If it becomes
 *   shared, let the allocator freeze the folios that split.  This can fail.
 *   Then the only effect is that the host has to fault the memory in again.
 * - Commit: unmap the range from all guests, notify the architecture, split
 *   folios, and change the attributes.  This cannot fail.  Folios merge later,
 *   see gmem_merge.c.
 * - Abort: free the memory allocated by prepare.  The allocator has put folios
 *   back if it has failed.
 *
 * The range is marked as changing throughout, which keeps new users away, see
 * gmem_range.c.  Faults that began earlier are harmless:
 *
 * - A fault of the host holds the folio lock until it has written the page
 *   table entry.  Once the conversion has locked the folio, the fault has
 *   mapped it, so that it can be unmapped, or the fault does not map it at all.
 * - A fault of a guest drops its reference before the lock of the page, and
 *   then detects by mmu_invalidate_seq that the range was unmapped.
 *
 * The remaining references are of two kinds.  A long-term pin allows writes to
 * the page whatever its attributes are, so it fails the conversion.  A
 * short-term reference comes, for example, from a lookup in the page cache, or
 * from an munmap() that has yet to flush TLBs.  The conversion waits for these.
 */
#include <linux/delay.h>
#include <linux/folio_batch.h>
#include <linux/kvm_host.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/sched/stat.h>
#include <linux/sizes.h>
#include <linux/swap.h>

#include <trace/events/kvm.h>

#include "guest_memfd.h"

/*
 * Interval of the waits for references, and their number: 10 ms in total on a
 * CPU that has time for the holder of a reference, and 100 ms on a busy one.
 */
#define GMEM_WAIT_US		100
#define GMEM_NR_WAITS		100
#define GMEM_NR_BUSY_WAITS	1000

/*
 * Number of pages to look up, or to unmap from the host, at a time.  A lookup
 * skips placeholders without rescheduling.  KVM regards MMU notifiers that run
 * at the same time as one range, in which no guest can fault.
 */
#define GMEM_CONVERT_NR_PAGES	(SZ_32M >> PAGE_SHIFT)

/*
 * Number of deferred folios that causes a recheck of all of them.  One more
 * batch can be added before the recheck.
 */
#define GMEM_CONVERT_NR_BUSY	16

/**
 * struct gmem_conversion - state of a conversion
 * @inode: inode of the file
 * @start: index of the first page
 * @end: index after the last page
 * @attributes: new KVM_MEMORY_ATTRIBUTE_* of the range
 * @mas: the new attributes, ready to be stored
 * @folios: the folios that the allocator has to split
 * @drained: state of the per-CPU folio batches
 * @waits_spent: waits for references, see kvm_gmem_wait_for_reference()
 * @busy: indices of folios that had references, in ascending order
 * @nr_busy: number of indices in @busy
 * @run_pfn: first of a run of contiguous pages that become shared
 * @run_pages: number of pages in that run
 * @error: index of the page that makes the conversion fail
 */
struct gmem_conversion {
	struct inode *inode;
	pgoff_t start;
	pgoff_t end;
	u64 attributes;
	struct ma_state mas;
	struct guestmem_change folios;
	enum lru_cache_drained drained;
	unsigned int waits_spent;
	pgoff_t busy[GMEM_CONVERT_NR_BUSY + FOLIO_BATCH_SIZE];
	unsigned int nr_busy;
	kvm_pfn_t run_pfn;
	kvm_pfn_t run_pages;
	pgoff_t error;
};

static bool kvm_gmem_convert_to_private(const struct gmem_conversion *c)
{
	return c->attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE;
}

/* Check that only the page cache and the caller use a folio. */
static bool kvm_gmem_convert_is_unused(struct folio *folio)
{
	int surplus = folio_ref_count(folio) - folio_expected_ref_count(folio) - 1;

	if (folio_mapped(folio))
		return false;

	/* memory_failure() keeps a reference to a poisoned folio. */
	return !surplus || (surplus == 1 && folio_test_hwpoison(folio));
}

/*
 * Wait briefly for a reference.  Limit the number of waits, not the elapsed
 * time: a change of a large range meets many short-term references.  A
 * preempted task drops its reference only when it runs again, so waits count
 * less if it had to compete for the CPU.
 */
bool kvm_gmem_wait_for_reference(unsigned int *spent)
{
	if (*spent >= GMEM_NR_BUSY_WAITS || fatal_signal_pending(current))
		return false;

	usleep_range(GMEM_WAIT_US / 2, GMEM_WAIT_US);
	*spent += single_task_running() ? GMEM_NR_BUSY_WAITS / GMEM_NR_WAITS : 1;
	return true;
}

/* Recheck the deferred folios; fail with -EAGAIN if a reference persists. */
static int kvm_gmem_convert_check_busy(struct gmem_conversion *c)
{
	struct folio *folio;
	unsigned int i;
	bool unused;

	for (i = 0; i < c->nr_busy; i++) {
		folio = filemap_get_folio(c->inode->i_mapping, c->busy[i]);
		if (IS_ERR(folio))
			continue;

		do {
			unused = kvm_gmem_convert_is_unused(folio);
		} while (!unused && kvm_gmem_wait_for_reference(&c->waits_spent));
		folio_put(folio);

		if (!unused) {
			c->error = c->busy[i];
			return -EAGAIN;
		}
	}

	c->nr_busy = 0;
	return 0;
}

typedef int (*kvm_gmem_convert_fn)(struct gmem_conversion *c, struct folio *folio);

/*
 * Call @fn for every folio in [@index, @end), with a reference.  Stop if it
 * returns an error, or if @killable and the task is being killed.  Recheck
 * deferred folios only when the walk itself has no references.
 */
static int kvm_gmem_convert_walk_folios(struct gmem_conversion *c, pgoff_t index,
					pgoff_t end, bool killable,
					kvm_gmem_convert_fn fn)
{
	struct address_space *mapping = c->inode->i_mapping;
	struct folio_batch fbatch;
	pgoff_t last;
	unsigned int i;
	int r = 0;

	folio_batch_init(&fbatch);
	while (!r && index < end) {
		last = end - 1;
		/* A file of base pages has no placeholders, but can have huge holes. */
		if (GMEM_I(c->inode)->allocator.order)
			last = min(last, index + GMEM_CONVERT_NR_PAGES - 1);
		filemap_get_folios(mapping, &index, last, &fbatch);
		for (i = 0; i < folio_batch_count(&fbatch) && !r; i++) {
			/* Skip the rest of a large folio. */
			index = max(index, folio_next_index(fbatch.folios[i]));
			r = fn(c, fbatch.folios[i]);
		}
		folios_put(&fbatch);
		cond_resched();
		if (!r && c->nr_busy >= GMEM_CONVERT_NR_BUSY)
			r = kvm_gmem_convert_check_busy(c);
		if (!r && killable && fatal_signal_pending(current))
			r = -EINTR;
	}

	return r;
}

/*
 * Unmap a folio again: a fault of the host may have mapped it since the range
 * was unmapped.  Userspace cannot delay a holder of the folio lock: a fault
 * allocates its page table before, and memory_failure() leaves the unmap of
 * guests to a worker.
 */
static int kvm_gmem_convert_unmap_folio(struct gmem_conversion *c, struct folio *folio)
{
	if (folio_lock_killable(folio))
		return -EINTR;

	if (folio_mapped(folio))
		unmap_mapping_pages(folio->mapping, folio->index,
				    folio_nr_pages(folio), false);
	folio_unlock(folio);
	return 0;
}

/*
 * A short-term reference is likely to be dropped while the other folios are
 * checked, and no task can take a new long-term reference.  Defer the folio
 * instead of waiting for it.
 */
static int kvm_gmem_convert_check_folio(struct gmem_conversion *c, struct folio *folio)
{
	/* A large folio is wholly private already. */
	if (folio_test_large(folio))
		return 0;

	if (kvm_gmem_convert_is_unused(folio))
		return 0;

	lru_cache_drain_for_folio(folio, 1, &c->drained);
	if (kvm_gmem_convert_is_unused(folio))
		return 0;

	c->busy[c->nr_busy++] = folio->index;
	return 0;
}

/*
 * Unmap the range from the host and check for other users.  Unmap all folios
 * before the first check: unmapping adds folios to the per-CPU batches, and
 * these should be drained only once.
 */
static int kvm_gmem_convert_take_from_host(struct gmem_conversion *c)
{
	struct address_space *mapping = c->inode->i_mapping;
	pgoff_t index = c->start;
	int r;

	/* Skip holes: a file can be much larger than the memory that it has. */
	while (index < c->end &&
	       xa_find(&mapping->i_pages, &index, c->end - 1, XA_PRESENT)) {
		unmap_mapping_pages(mapping, index,
				    min(c->end - index, GMEM_CONVERT_NR_PAGES), false);
		if (fatal_signal_pending(current))
			return -EINTR;
		index += GMEM_CONVERT_NR_PAGES;
		cond_resched();
	}

	r = kvm_gmem_convert_walk_folios(c, c->start, c->end, true,
					 kvm_gmem_convert_unmap_folio);
	if (r)
		return r;

	r = kvm_gmem_convert_walk_folios(c, c->start, c->end, true,
					 kvm_gmem_convert_check_folio);
	return r ?: kvm_gmem_convert_check_busy(c);
}

static bool kvm_gmem_convert_wait_for_folio(struct guestmem_change *change)
{
	struct gmem_conversion *c = container_of(change, struct gmem_conversion, folios);

	return kvm_gmem_wait_for_reference(&c->waits_spent);
}

#ifdef CONFIG_HAVE_KVM_ARCH_GMEM_CONVERT
static void kvm_gmem_make_shared(kvm_pfn_t pfn, kvm_pfn_t nr_pages)
{
	trace_kvm_gmem_make_shared(pfn, nr_pages);
	kvm_arch_gmem_make_shared(pfn, nr_pages);
}

static void kvm_gmem_convert_end_run(struct gmem_conversion *c)
{
	if (c->run_pages)
		kvm_gmem_make_shared(c->run_pfn, c->run_pages);
	c->run_pages = 0;
}

/* Add a folio to the run of contiguous pages that become shared. */
static int kvm_gmem_convert_share_folio(struct gmem_conversion *c,
					struct folio *folio)
{
	kvm_pfn_t pfn = folio_pfn(folio);

	if (pfn != c->run_pfn + c->run_pages)
		kvm_gmem_convert_end_run(c);
	if (!c->run_pages)
		c->run_pfn = pfn;
	c->run_pages += folio_nr_pages(folio);
	return 0;
}

/*
 * The attributes are still those from before the conversion.  Folios that
 * split are not in the page cache now: the allocator reports them.
 */
static void kvm_gmem_convert_give_to_host(struct gmem_conversion *c)
{
	struct gmem_attributes *ga = &GMEM_I(c->inode)->attributes;
	struct gmem_attributes_range range;
	pgoff_t index, end;

	for (index = c->start; index < c->end; index = end) {
		range = kvm_gmem_attributes_get(ga, index);
		end = min(c->end, range.last + 1);
		if (range.attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE)
			kvm_gmem_convert_walk_folios(c, index, end, false,
						     kvm_gmem_convert_share_folio);
	}
	kvm_gmem_convert_end_run(c);
}

static int kvm_gmem_convert_prepare_split(struct guestmem_change *change,
					  struct folio *folio)
{
	trace_kvm_gmem_prepare_split(folio_pfn(folio), folio_nr_pages(folio));
	return kvm_arch_gmem_prepare_split(folio_pfn(folio),
					   folio_nr_pages(folio));
}

static void kvm_gmem_convert_share_split(struct guestmem_change *change,
					 struct page *page, unsigned long nr_pages)
{
	kvm_gmem_make_shared(page_to_pfn(page), nr_pages);
}
#else
static void kvm_gmem_convert_give_to_host(struct gmem_conversion *c)
{
}

#define kvm_gmem_convert_prepare_split	NULL
#define kvm_gmem_convert_share_split	NULL
#endif

/* Prepare to split the folios of memory that becomes shared. */
static int kvm_gmem_convert_split_folios(struct gmem_conversion *c)
{
	struct guestmem_allocator *gm = &GMEM_I(c->inode)->allocator;
	int r;

	if (!gm->ops->prepare_split)
		return 0;

	c->folios.wait = kvm_gmem_convert_wait_for_folio;
	c->folios.prepare_folio = kvm_gmem_convert_prepare_split;
	c->folios.commit_folio = kvm_gmem_convert_share_split;
	r = gm->ops->prepare_split(gm, &c->folios, c->start, c->end);

	/* Report only pages in the range, not their neighbors. */
	if (r == -EAGAIN && c->folios.busy >= c->start && c->folios.busy < c->end)
		c->error = c->folios.busy;

	return r;
}

static int kvm_gmem_convert_prepare(struct gmem_conversion *c)
{
	if (kvm_gmem_convert_to_private(c))
		return kvm_gmem_convert_take_from_host(c);

	return kvm_gmem_convert_split_folios(c);
}

/* Folios are never larger than attributes allow: split first, merge last. */
static void kvm_gmem_convert_commit(struct gmem_conversion *c)
{
	struct gmem_inode *gi = GMEM_I(c->inode);
	struct guestmem_allocator *gm = &gi->allocator;
	bool to_private = kvm_gmem_convert_to_private(c);

	/*
	 * Unmap only mappings of the old kind from guests.  TDX cannot unmap
	 * private memory without losing its contents.
	 */
	kvm_gmem_unmap_guests(c->inode, c->start, c->end,
			      to_private ? KVM_FILTER_SHARED : KVM_FILTER_PRIVATE);

	if (!to_private) {
		kvm_gmem_convert_give_to_host(c);
		if (gm->ops->prepare_split)
			gm->ops->commit(gm, &c->folios);
	}

	kvm_gmem_attributes_commit(&c->mas, c->attributes);

	if (to_private)
		kvm_gmem_merge_range(gi, c->start, c->end);
}

/* Convert a range for which the attributes are ready to be stored. */
static int kvm_gmem_convert_range(struct gmem_conversion *c)
{
	struct gmem_ranges *gr = &GMEM_I(c->inode)->ranges;
	int r;

	r = kvm_gmem_range_begin_change(gr, c->start, c->end);
	if (r)
		goto abort;

	r = kvm_gmem_convert_prepare(c);
	if (!r)
		kvm_gmem_convert_commit(c);
	kvm_gmem_range_end_change(gr);

abort:
	if (r)
		kvm_gmem_attributes_abort(&c->mas);
	return r;
}

/*
 * Make a range of a guest_memfd file private or shared.
 * @inode: the file's inode
 * @start: index of the first page
 * @end: index after the last page, not after the end of the file
 * @attributes: new KVM_MEMORY_ATTRIBUTE_* of the range
 * @error: set to the index of the page in the range that caused -EAGAIN, if
 *	   any, else to @start
 *
 * Pages keep their contents.  A page that is not allocated stays unallocated,
 * and has @attributes once it is allocated.
 *
 * Context: May sleep, takes change_lock.
 * Return: 0 if the range has these attributes now, -ENOMEM, -EINTR if the task
 *	   is being killed, or -EAGAIN if a reference to a page persists.  On
 *	   error all attributes are unchanged.
 */
int kvm_gmem_convert(struct inode *inode, pgoff_t start, pgoff_t end,
		     u64 attributes, pgoff_t *error)
{
	struct gmem_inode *gi = GMEM_I(inode);
	struct gmem_conversion c = {
		.inode = inode,
		.start = start,
		.end = end,
		.attributes = attributes,
		.drained = LRU_CACHE_NOT_DRAINED,
		.error = start,
	};
	int r;

	*error = start;
	if (mutex_lock_killable(&gi->ranges.change_lock))
		return -EINTR;

	r = kvm_gmem_attributes_prepare(&gi->attributes, &c.mas, start, end,
					attributes, GFP_KERNEL_ACCOUNT);
	if (!r)
		r = kvm_gmem_convert_range(&c);
	trace_kvm_gmem_convert(inode->i_ino, start, end, attributes, c.error, r);

	mutex_unlock(&gi->ranges.change_lock);

	*error = c.error;
	return r == -EALREADY ? 0 : r;
}
