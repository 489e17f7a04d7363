// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files of HugeTLB pages
 */

/**
 * DOC: guest_memfd files of HugeTLB pages
 *
 * The file reserves all its memory from the HugeTLB pool when it is created, with a
 * subpool of exactly its size.  An allocation uses a page of the reservation, and a
 * page that is freed while the file exists returns to the reservation.  When the file
 * goes away, the unused reservation returns to the pool at once.  Surplus pages are
 * never used.
 *
 * Accounting is the same as for hugetlbfs.  The reservation is charged to the hugetlb
 * cgroup of the task that creates the file.  A page is charged to the hugetlb cgroup of
 * the task that first touches it, and with memory_hugetlb_accounting to its memory
 * cgroup.
 *
 * guestmem_split.c determines the folios of a huge page.
 *
 * A mutex serializes allocation and lookups of a huge page.  It nests outside the folio
 * lock.  The caller of the operations excludes them while the folios of a huge page are
 * freed, split or merged.
 *
 * The last reference to a folio can be dropped after the file has gone, in any context.
 * Then free_huge_folio() or free_hugetlb_piece() takes the folio back.  They need the
 * folio, its subpool and a worker only, so this code is built in even if KVM is a
 * module.
 */
#include <linux/export.h>
#include <linux/guestmem.h>
#include <linux/hugetlb.h>
#include <linux/hugetlb_cgroup.h>
#include <linux/kvm_types.h>
#include <linux/mempolicy.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "guestmem_split.h"
#include "hugetlb_internal.h"
#include "hugetlb_split.h"

/* Number of huge pages that can be added or removed concurrently. */
#define GUESTMEM_HUGETLB_NR_MUTEXES	64

/**
 * struct guestmem_hugetlb - state of the allocator for a file of HugeTLB pages
 * @h: hstate of the pages
 * @spool: the reservation; allocated pages count as used
 * @rsvd_cgroup: hugetlb cgroup that the reservation is charged to, or NULL
 * @nr_pages: size of the reservation in base pages
 * @partial: huge pages that are being zeroed, by number of the huge page in the file
 * @mutexes: one for every GUESTMEM_HUGETLB_NR_MUTEXES-th huge page of the file
 */
struct guestmem_hugetlb {
	struct hstate *h;
	struct hugepage_subpool *spool;
	struct hugetlb_cgroup *rsvd_cgroup;
	unsigned long nr_pages;
	struct xarray partial;
	/* Serialize changes of a huge page, see guestmem_hugetlb_mutex(). */
	struct mutex mutexes[GUESTMEM_HUGETLB_NR_MUTEXES];
};

/* Return the mutex that serializes operations on the huge page at @index. */
static struct mutex *guestmem_hugetlb_mutex(struct guestmem_allocator *gm,
					    pgoff_t index)
{
	struct guestmem_hugetlb *gh = gm->private;

	return &gh->mutexes[(index >> gm->order) % GUESTMEM_HUGETLB_NR_MUTEXES];
}

static int guestmem_hugetlb_reserve(struct guestmem_allocator *gm, loff_t size)
{
	struct hstate *h = size_to_hstate(PAGE_SIZE << gm->order);
	struct guestmem_hugetlb *gh;
	int i, r;

	if (!h || !IS_ALIGNED(size, huge_page_size(h)))
		return -EINVAL;

	gh = kzalloc_obj(*gh, GFP_KERNEL_ACCOUNT);
	if (!gh)
		return -ENOMEM;

	gh->h = h;
	gh->nr_pages = size >> PAGE_SHIFT;
	xa_init(&gh->partial);

	r = hugetlb_cgroup_charge_cgroup_rsvd(hstate_index(h), gh->nr_pages,
					      &gh->rsvd_cgroup);
	if (r)
		goto err_free;

	gh->spool = hugepage_new_reserved_subpool(h, gh->nr_pages >> gm->order);
	if (IS_ERR(gh->spool)) {
		r = PTR_ERR(gh->spool);
		goto err_uncharge;
	}

	for (i = 0; i < GUESTMEM_HUGETLB_NR_MUTEXES; i++)
		mutex_init(&gh->mutexes[i]);

	gm->part_order = min_t(unsigned int, gm->order, PMD_ORDER);
	gm->private = gh;
	return 0;

err_uncharge:
	hugetlb_cgroup_uncharge_cgroup_rsvd(hstate_index(h), gh->nr_pages,
					    gh->rsvd_cgroup);
err_free:
	kfree(gh);
	return r;
}

static void guestmem_hugetlb_unreserve(struct guestmem_allocator *gm)
{
	struct guestmem_hugetlb *gh = gm->private;

	hugepage_put_reserved_subpool(gh->spool);
	hugetlb_cgroup_uncharge_cgroup_rsvd(hstate_index(gh->h), gh->nr_pages,
					    gh->rsvd_cgroup);
	kfree(gh);
}

/* Allocate a huge page from the reservation of the file, according to its policy. */
static struct folio *guestmem_hugetlb_get(struct guestmem_allocator *gm,
					  pgoff_t index)
{
	struct guestmem_hugetlb *gh = gm->private;
	struct mempolicy_interpreted mpoli = {};
	struct mempolicy *policy, *shared;
	unsigned int pin;
	struct folio *folio;

	/*
	 * Fails only if a huge page that was removed from the file is still referenced:
	 * it returns to the reservation when the last reference is dropped.
	 */
	if (hugepage_subpool_get_pages(gh->spool, 1))
		return ERR_PTR(-ENOSPC);

	shared = mpol_shared_policy_lookup(gm->policy, index);
	policy = shared ?: get_task_policy(current);
	mpoli.nid = mpol_huge_node(policy, htlb_alloc_mask(gh->h),
				   index >> gm->order, &mpoli.nodemask);
#ifdef CONFIG_NUMA
	mpoli.mode = policy->mode;
#endif
	/* The folio cannot migrate: do not allocate it from movable memory. */
	pin = memalloc_pin_save();
	folio = hugetlb_alloc_folio(gh->h, &mpoli, current->mm,
				    HUGETLB_ALLOC_USE_GLOBAL_RESERVATIONS |
				    HUGETLB_ALLOC_NO_SURPLUS);
	memalloc_pin_restore(pin);
	mpol_cond_put(shared);

	if (IS_ERR(folio)) {
		hugepage_subpool_put_pages(gh->spool, 1);
		return folio;
	}

	/*
	 * From now on the subpool counts the page: freeing the page restores the
	 * reservation through the subpool.
	 */
	hugetlb_set_folio_subpool(folio, gh->spool);
	folio_clear_hugetlb_restore_reserve(folio);
	folio_set_hugetlb_owned(folio);

	return folio;
}

/* Add a new huge page to the page cache as one folio. */
static struct folio *guestmem_hugetlb_add_whole(struct guestmem_allocator *gm,
						struct folio *folio, pgoff_t index)
{
	int r;

	folio_mark_uptodate(folio);
	__folio_set_locked(folio);
	r = __filemap_add_folio(gm->mapping, folio, index, GFP_KERNEL, NULL);
	if (r) {
		__folio_clear_locked(folio);
		folio_clear_uptodate(folio);
		folio_put(folio);
		return ERR_PTR(r);
	}

	return folio;
}

/* Number of base pages to zero between checks for signals. */
#define GUESTMEM_HUGETLB_NR_ZERO	(SZ_2M >> PAGE_SHIFT)

/* Zero a new huge page.  The index of the folio is the number of pages that are zero. */
static int guestmem_hugetlb_zero(struct folio *folio, unsigned int state)
{
	unsigned long nr;

	while (folio->index < folio_nr_pages(folio)) {
		/* The contents do not matter yet: let the pool keep a page with an error. */
		if (folio_test_hwpoison(folio))
			return -EHWPOISON;

		nr = min(GUESTMEM_HUGETLB_NR_ZERO, folio_nr_pages(folio) - folio->index);
		clear_user_highpages(folio_page(folio, folio->index),
				     folio->index << PAGE_SHIFT, nr);
		folio->index += nr;
		cond_resched();
		if (folio->index < folio_nr_pages(folio) &&
		    signal_pending_state(state, current))
			return -EINTR;
	}

	return 0;
}

/* Get the huge page that an earlier attempt has begun to zero, or a new one. */
static struct folio *guestmem_hugetlb_get_partial(struct guestmem_allocator *gm,
						  pgoff_t index)
{
	struct guestmem_hugetlb *gh = gm->private;
	struct folio *folio;
	int r;

	folio = xa_load(&gh->partial, index >> gm->order);
	if (folio)
		return folio;

	folio = guestmem_hugetlb_get(gm, index);
	if (IS_ERR(folio))
		return folio;

	folio->index = 0;
	r = xa_err(xa_store(&gh->partial, index >> gm->order, folio, GFP_KERNEL_ACCOUNT));
	if (r) {
		folio_put(folio);
		return ERR_PTR(r);
	}

	return folio;
}

/*
 * Get a huge page that is zero.  If a signal interrupts that, keep the page for the next
 * attempt.  Replace a page that has an error meanwhile.
 */
static struct folio *guestmem_hugetlb_get_zeroed(struct guestmem_allocator *gm,
						 pgoff_t index, unsigned int state)
{
	struct guestmem_hugetlb *gh = gm->private;
	struct folio *folio;
	int r;

	do {
		folio = guestmem_hugetlb_get_partial(gm, index);
		if (IS_ERR(folio))
			return folio;

		r = guestmem_hugetlb_zero(folio, state);
		if (r == -EINTR)
			return ERR_PTR(r);

		xa_erase(&gh->partial, index >> gm->order);
		if (r)
			folio_put(folio);
	} while (r);

	return folio;
}

/* Allocate and zero a huge page, and add it to the page cache. */
static struct folio *guestmem_hugetlb_add(struct guestmem_allocator *gm,
					  pgoff_t index, unsigned int state)
{
	pgoff_t first = round_down(index, 1UL << gm->order);
	struct folio *folio;
	int r;

	lockdep_assert_held(guestmem_hugetlb_mutex(gm, index));

	folio = guestmem_hugetlb_get_zeroed(gm, first, state);
	if (IS_ERR(folio))
		return folio;

	if (guestmem_split_is_whole(gm, first))
		return guestmem_hugetlb_add_whole(gm, folio, first);

	r = guestmem_split_add(gm, folio, first);
	if (r)
		return ERR_PTR(r);

	return filemap_lock_folio(gm->mapping, index);
}

static struct folio *guestmem_hugetlb_allocate(struct guestmem_allocator *gm,
					       pgoff_t index, unsigned int state)
{
	struct mutex *mutex = guestmem_hugetlb_mutex(gm, index);
	struct folio *folio;
	int r;

	r = state == TASK_INTERRUPTIBLE ? mutex_lock_interruptible(mutex) :
					  mutex_lock_killable(mutex);
	if (r)
		return ERR_PTR(r);

	folio = filemap_lock_folio(gm->mapping, index);
	if (IS_ERR(folio))
		folio = guestmem_hugetlb_add(gm, index, state);

	mutex_unlock(mutex);
	return folio;
}

/* Free the huge pages of a range that have not been zeroed yet. */
static void guestmem_hugetlb_free_partial(struct guestmem_allocator *gm, pgoff_t start,
					  pgoff_t end)
{
	struct guestmem_hugetlb *gh = gm->private;
	struct folio *folio;
	unsigned long nr;

	xa_for_each_range(&gh->partial, nr, folio, start >> gm->order,
			  (end - 1) >> gm->order) {
		xa_erase(&gh->partial, nr);
		folio_put(folio);
	}
}

static void guestmem_hugetlb_remove(struct guestmem_allocator *gm, pgoff_t index,
				    enum lru_cache_drained *drained,
				    struct list_head *list)
{
	struct folio *folio;

	folio = filemap_lock_folio(gm->mapping, index);
	if (IS_ERR(folio))
		return;

	if (!folio_test_hugetlb(folio)) {
		folio_unlock(folio);
		folio_put(folio);
		guestmem_split_remove(gm, index, drained, list);
		return;
	}

	folio_clear_uptodate(folio);
	filemap_remove_folio(folio);
	folio_unlock(folio);

	/* This returns the page to the reservation, where the next allocation needs it. */
	folio_put(folio);
}

/* Unmap no more at a time than guests can wait for: they cannot fault meanwhile. */
static void guestmem_hugetlb_unmap(struct guestmem_allocator *gm, pgoff_t start,
				   pgoff_t end)
{
	pgoff_t step = max(PMD_SIZE, SZ_32M) >> PAGE_SHIFT;

	for (; start < end; start += step) {
		unmap_mapping_pages(gm->mapping, start, min(end - start, step), false);
		cond_resched();
	}
}

/* Number of huge pages to free per grace period. */
#define GUESTMEM_HUGETLB_NR_FREE	64

static void guestmem_hugetlb_free(struct guestmem_allocator *gm, pgoff_t start,
				  pgoff_t end)
{
	enum lru_cache_drained drained = LRU_CACHE_NOT_DRAINED;
	unsigned long index = start;
	unsigned int nr = 0;
	LIST_HEAD(list);

	/* An inode that is being evicted has no other users. */
	lockdep_assert(lockdep_is_held(gm->change_lock) ||
		       inode_state_read_once(gm->mapping->host) & I_FREEING);

	guestmem_hugetlb_free_partial(gm, start, end);

	/* Unmap everything first, so that folio batches are drained only once. */
	guestmem_hugetlb_unmap(gm, start, end);

	while (index < end &&
	       xa_find(&gm->mapping->i_pages, &index, end - 1, XA_PRESENT)) {
		index = round_down(index, 1UL << gm->order);
		guestmem_hugetlb_remove(gm, index, &drained, &list);
		index += 1UL << gm->order;
		if (!(++nr % GUESTMEM_HUGETLB_NR_FREE))
			hugetlb_split_free_list(&list);
		cond_resched();
	}
	hugetlb_split_free_list(&list);
}

static const struct guestmem_allocator_operations guestmem_hugetlb_ops = {
	.reserve	= guestmem_hugetlb_reserve,
	.unreserve	= guestmem_hugetlb_unreserve,
	.allocate	= guestmem_hugetlb_allocate,
	.free		= guestmem_hugetlb_free,
	.max_order	= guestmem_split_max_order,
	.prepare_split	= guestmem_split_prepare_split,
	.prepare_merge	= guestmem_split_prepare_merge,
	.commit		= guestmem_split_commit,
};

/**
 * guestmem_hugetlb_orders - return the HugeTLB page sizes that a file can have
 *
 * Pages of 4 GiB and more are excluded: st_blksize has 32 bits only.
 *
 * Return: A mask in which bit n stands for pages of PAGE_SIZE << n.
 */
unsigned long guestmem_hugetlb_orders(void)
{
	unsigned long orders = 0;
	struct hstate *h;

	if (!hugepages_supported())
		return 0;

	for_each_hstate(h) {
		if (huge_page_shift(h) < 32)
			orders |= BIT(huge_page_order(h));
	}

	return orders;
}
EXPORT_SYMBOL_FOR_KVM(guestmem_hugetlb_orders);

/**
 * guestmem_hugetlb_find - find the allocator for a HugeTLB page size
 * @size_log2: base-2 logarithm of the size in bytes, as userspace encodes it for
 *	       memfd_create(); 0 selects the default size
 * @order: set to the order of the pages
 *
 * Return: The operations of the allocator, or ERR_PTR(-EINVAL) if the host has no such
 *	   pages or a file cannot have them.
 */
const struct guestmem_allocator_operations *
guestmem_hugetlb_find(unsigned int size_log2, unsigned int *order)
{
	struct hstate *h;

	if (!hugepages_supported())
		return ERR_PTR(-EINVAL);

	h = hstate_sizelog(size_log2);
	if (!h || !(guestmem_hugetlb_orders() & BIT(huge_page_order(h))))
		return ERR_PTR(-EINVAL);

	*order = huge_page_order(h);
	return &guestmem_hugetlb_ops;
}
EXPORT_SYMBOL_FOR_KVM(guestmem_hugetlb_find);
