// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files of HugeTLB pages
 */

/**
 * DOC: guest_memfd files of HugeTLB pages
 *
 * A file of this kind reserves all its memory from the HugeTLB pool when it is
 * created: it has a subpool of exactly its size.  An allocation takes a page of
 * that reservation, a page that is freed while the file lives goes back to it,
 * and when the file goes away what is not allocated goes back to the pool at
 * once.  Surplus pages are used at no point.
 *
 * Pages are counted and charged as those of hugetlbfs are: the reservation to
 * the hugetlb cgroup of the task that creates the file, a page to the hugetlb
 * cgroup, and to the memory cgroup if that is told to account HugeTLB, of the
 * task that first touches it.
 *
 * What folios a page is in is the job of guestmem_folios.c.
 *
 * hugetlb_fault_mutex_table[] serializes everything that happens to a huge page,
 * lookups included.  It nests inside filemap_invalidate_lock() and, as in hugetlbfs,
 * outside the folio lock.  Splitting and merging what the file has excludes all that by
 * holding the former exclusively.
 *
 * The last reference to a folio may be dropped after the file has gone, from
 * any context, by free_huge_folio(), or free_guestmem_folio() if it is a piece of a
 * huge page.  These need nothing but the folio, its subpool, and a worker, so this code
 * is built in even if KVM is a module.
 */
#include <linux/export.h>
#include <linux/guestmem.h>
#include <linux/hugetlb.h>
#include <linux/hugetlb_cgroup.h>
#include <linux/kvm_types.h>
#include <linux/mempolicy.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "guestmem_folios.h"
#include "guestmem_hugepage.h"
#include "hugetlb_internal.h"

/**
 * struct guestmem_hugetlb - what a file of HugeTLB pages has set aside
 * @h: the pool
 * @spool: the reservation; pages of the file that are allocated count as used
 * @rsvd_cgroup: the hugetlb cgroup that the reservation is charged to, or NULL
 * @nr_pages: size of the reservation in base pages
 */
struct guestmem_hugetlb {
	struct hstate *h;
	struct hugepage_subpool *spool;
	struct hugetlb_cgroup *rsvd_cgroup;
	unsigned long nr_pages;
};

/* Who holds this decides alone about the huge page that @index lies in. */
static struct mutex *guestmem_hugetlb_mutex(struct guestmem_allocator *gm,
					    pgoff_t index)
{
	u32 hash = hugetlb_fault_mutex_hash(gm->mapping, index >> gm->order);

	return &hugetlb_fault_mutex_table[hash];
}

static int guestmem_hugetlb_reserve(struct guestmem_allocator *gm, loff_t size)
{
	struct hstate *h = size_to_hstate(PAGE_SIZE << gm->order);
	struct guestmem_hugetlb *gh;
	int r;

	if (!h || !IS_ALIGNED(size, huge_page_size(h)))
		return -EINVAL;

	gh = kzalloc_obj(*gh, GFP_KERNEL_ACCOUNT);
	if (!gh)
		return -ENOMEM;

	gh->h = h;
	gh->nr_pages = size >> PAGE_SHIFT;

	r = hugetlb_cgroup_charge_cgroup_rsvd(hstate_index(h), gh->nr_pages,
					      &gh->rsvd_cgroup);
	if (r)
		goto err_free;

	gh->spool = hugepage_new_reserved_subpool(h, gh->nr_pages >> gm->order);
	if (IS_ERR(gh->spool)) {
		r = PTR_ERR(gh->spool);
		goto err_uncharge;
	}

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

/* Take a page of the file's reservation, from where the policy says. */
static struct folio *guestmem_hugetlb_get(struct guestmem_allocator *gm,
					  pgoff_t index)
{
	struct guestmem_hugetlb *gh = gm->private;
	struct mempolicy_interpreted mpoli = {};
	struct mempolicy *policy, *shared;
	unsigned int pin;
	struct folio *folio;

	/*
	 * Fails only if the file's page at this index has been freed but is
	 * still referenced: then it is not back in the reservation yet.
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
	/* It will not migrate out of where pages have to. */
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
	 * From here on the subpool knows about the page, and the reservation
	 * is restored through the subpool when the page is freed.
	 */
	hugetlb_set_folio_subpool(folio, gh->spool);
	folio_clear_hugetlb_restore_reserve(folio);

	return folio;
}

/* Let others find a new page. */
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

/* Make a zeroed page and let others find it. */
static struct folio *guestmem_hugetlb_add(struct guestmem_allocator *gm,
					  pgoff_t index)
{
	pgoff_t first = round_down(index, 1UL << gm->order);
	struct folio *folio;
	int r;

	lockdep_assert_held(guestmem_hugetlb_mutex(gm, index));

	folio = guestmem_hugetlb_get(gm, first);
	if (IS_ERR(folio))
		return folio;

	folio_zero_user(folio, 0);
	if (guestmem_folios_is_whole(gm, first))
		return guestmem_hugetlb_add_whole(gm, folio, first);

	r = guestmem_folios_add(gm, folio, first);
	if (r)
		return ERR_PTR(r);

	return filemap_lock_folio(gm->mapping, index);
}

static struct folio *guestmem_hugetlb_allocate(struct guestmem_allocator *gm,
					       pgoff_t index)
{
	struct folio *folio;

	guard(mutex)(guestmem_hugetlb_mutex(gm, index));

	folio = filemap_lock_folio(gm->mapping, index);
	if (!IS_ERR(folio))
		return folio;

	return guestmem_hugetlb_add(gm, index);
}

static void guestmem_hugetlb_remove(struct guestmem_allocator *gm, pgoff_t index,
				    enum lru_cache_drained *drained,
				    struct list_head *list)
{
	struct folio *folio;

	guard(mutex)(guestmem_hugetlb_mutex(gm, index));

	folio = filemap_lock_folio(gm->mapping, index);
	if (IS_ERR(folio))
		return;

	if (!folio_test_hugetlb(folio)) {
		folio_unlock(folio);
		folio_put(folio);
		guestmem_folios_remove(gm, index, drained, list);
		return;
	}

	folio_clear_uptodate(folio);
	filemap_remove_folio(folio);
	folio_unlock(folio);

	/*
	 * Drop the reference before anyone can look the index up again: this
	 * puts the page back into the reservation, and the next allocation
	 * needs it there.
	 */
	folio_put(folio);
}

/* How many huge pages are freed at once: they have to wait for readers, together. */
#define GUESTMEM_HUGETLB_NR_FREE	64

static void guestmem_hugetlb_free(struct guestmem_allocator *gm, pgoff_t start,
				  pgoff_t end)
{
	enum lru_cache_drained drained = LRU_CACHE_NOT_DRAINED;
	unsigned long index = start;
	unsigned int nr = 0;
	LIST_HEAD(list);

	/* All of it before the first page, so that batches are emptied once. */
	unmap_mapping_pages(gm->mapping, start, end - start, false);

	while (index < end &&
	       xa_find(&gm->mapping->i_pages, &index, end - 1, XA_PRESENT)) {
		index = round_down(index, 1UL << gm->order);
		guestmem_hugetlb_remove(gm, index, &drained, &list);
		index += 1UL << gm->order;
		if (!(++nr % GUESTMEM_HUGETLB_NR_FREE))
			guestmem_hugepages_free(&list);
		cond_resched();
	}
	guestmem_hugepages_free(&list);
}

static const struct guestmem_allocator_operations guestmem_hugetlb_ops = {
	.reserve	= guestmem_hugetlb_reserve,
	.unreserve	= guestmem_hugetlb_unreserve,
	.allocate	= guestmem_hugetlb_allocate,
	.free		= guestmem_hugetlb_free,
	.max_order	= guestmem_folios_max_order,
	.prepare	= guestmem_folios_prepare,
	.commit		= guestmem_folios_commit,
	.abort		= guestmem_folios_abort,
};

/**
 * guestmem_hugetlb_orders - tell which HugeTLB page sizes a file can have
 *
 * Pages of 4 GiB and more do not count: their size does not fit into the
 * 32 bits that st_blksize has.
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
 * @size_log2: base-2 logarithm of the size in bytes, as userspace encodes it
 *	       for memfd_create() and others; 0 stands for the default size
 * @order: set to the order of the pages
 *
 * Return: The operations to use for such a file, or ERR_PTR(-EINVAL) if the
 *	   host has no such pages or a file cannot have them.
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
