// SPDX-License-Identifier: GPL-2.0-only
/*
 * Splitting and merging of HugeTLB folios
 */

/**
 * DOC: Split HugeTLB pages
 *
 * The owner of a HugeTLB page can split it, so that references to one base page do not
 * affect the rest.  Splitting changes how the memory is described.  The memory stays
 * where it is, and stays one page for the pool, the subpool and the cgroups.
 *
 * Terms:
 *
 * - huge page: a HugeTLB page as the pool has it, split or not;
 * - part: an aligned block of a huge page, of PMD_ORDER or of the whole if that is less;
 * - piece: a base page of a huge page, and in names any folio of a split huge page;
 * - split: make frozen folios of the parts of a huge page, or of the pieces of a part;
 * - merge: make one frozen folio of a part, or of all of a huge page;
 * - freeze: set the reference count of a folio to 0 while the owner has the only
 *   references.
 *
 * All folios that a function changes are frozen, and not in the page cache.  A PFN
 * walker finds an old or a new folio, and cannot get a reference to either.  A lookup
 * under RCU can still attempt to get a reference, and that writes to the struct page.
 * Merging makes struct pages read-only, so it needs a grace period after the freeze.
 *
 * Only splitting needs memory.  hugetlb_split_prepare() and hugetlb_split_prepare_part()
 * allocate it before anything changes.
 *
 * If the vmemmap of the huge page is optimized, the vmemmap of its parts is, too.
 * Mappable parts are the exception, as rmap needs a struct page for each page.
 *
 * Page type: a folio of a split huge page has type hugetlb_piece if it cannot be mapped
 * to userspace.  That is a private part, or any folio that has left its file.  The last
 * reference to such a folio can be dropped in any context, after the file and its module
 * are gone, and calls free_hugetlb_piece().  When all of them have come back a worker
 * merges the huge page and frees it to its pool.
 */
#include <linux/hugetlb.h>
#include <linux/hugetlb_cgroup.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>

#include "hugetlb_split.h"
#include "hugetlb_vmemmap.h"
#include "internal.h"

/* Section, node and zone: a page keeps them whatever folio it is in. */
#define HUGETLB_SPLIT_KEPT_FLAGS	(~PAGEFLAGS_MASK)

/* Return the index of a split in hstate.split_hugepages. */
static unsigned long hugetlb_split_index(const struct hugetlb_split *split)
{
	return page_to_pfn(split->page) >> huge_page_order(split->h);
}

static bool hugetlb_split_is_optimized(const struct hugetlb_split *split, unsigned int order)
{
	return split->optimized && order >= VMEMMAP_TAIL_MIN_ORDER;
}

static void reset_struct_page(struct page *page)
{
	page->flags.f &= HUGETLB_SPLIT_KEPT_FLAGS;
	clear_compound_head(page);
	page->mapping = NULL;
	page->__folio_index = 0;
	set_page_private(page, 0);
	atomic_set(&page->_mapcount, -1);
	set_page_count(page, 0);
#ifdef CONFIG_MEMCG
	page->memcg_data = 0;
#endif
}

/*
 * Initialize a frozen folio of @order at @page.  Its struct pages are stale, or those of
 * other frozen folios.
 */
static void init_frozen_folio(const struct hugetlb_split *split, struct page *page,
			      unsigned int order)
{
	unsigned long i, nr_writable = 1UL << order;

	/* The remaining struct pages map the zone's read-only tail page. */
	if (hugetlb_split_is_optimized(split, order) && !split->is_mappable)
		nr_writable = HUGETLB_VMEMMAP_RESERVE_PAGES;

	for (i = 1; i < nr_writable; i++) {
		reset_struct_page(page + i);
		prep_compound_tail(page + i, page, order);
		if (!(i % SZ_16K))
			cond_resched();
	}

	reset_struct_page(page);
	if (order) {
		__folio_set_head((struct folio *)page);
		prep_compound_head(page, order);
		if (split->is_mappable)
			folio_set_large_rmappable(page_folio(page));
	}
}

/*
 * Split a folio with an optimized vmemmap.  Only the struct pages in its first vmemmap
 * page are writable.  Initialize these; the other parts get copies of that page.
 */
static void split_optimized_block(struct hugetlb_split *split, struct page *page,
				  unsigned int old_order, unsigned int order)
{
	struct page *alias = hugetlb_vmemmap_alias(page);
	unsigned long i;

	if (order) {
		init_frozen_folio(split, page, order);
	} else {
		/* A base page has no pointers, and @page may have been remapped. */
		for (i = 0; i < HUGETLB_VMEMMAP_RESERVE_PAGES; i++)
			reset_struct_page(alias + i);
	}

	hugetlb_vmemmap_set_parts(page, old_order, order, alias, &split->change.vmemmap_pages);
	split->change.need_flush = true;
}

/* Split a frozen folio of @old_order into frozen folios of @order. */
static void split_block(struct hugetlb_split *split, struct page *page,
			unsigned int old_order, unsigned int order)
{
	unsigned long i;

	if (hugetlb_split_is_optimized(split, old_order)) {
		if (!split->is_mappable) {
			split_optimized_block(split, page, old_order, order);
			return;
		}
		/* Restore all of the vmemmap, and initialize larger folios in it. */
		split_optimized_block(split, page, old_order, 0);
		hugetlb_vmemmap_flush(page, page + (1UL << old_order));
		split->change.need_flush = false;
	}

	for (i = 0; i < 1UL << old_order; i += 1UL << order) {
		init_frozen_folio(split, page + i, order);
		if (!(i % SZ_16K))
			cond_resched();
	}
}

/* Merge frozen folios into one of @order. */
static void merge_block(struct hugetlb_split *split, struct page *page, unsigned int order)
{
	init_frozen_folio(split, page, order);
	if (hugetlb_split_is_optimized(split, order)) {
		hugetlb_vmemmap_set_parts(page, order, order, hugetlb_vmemmap_alias(page),
					  &split->change.vmemmap_pages);
		split->change.need_flush = true;
	}
}

/**
 * hugetlb_split_flush - flush TLBs after huge pages have been split or merged
 * @list: the huge pages, linked by &hugetlb_split_change.node
 *
 * Struct pages that a split or merge has changed can be used from now on.
 *
 * Context: May sleep.
 */
void hugetlb_split_flush(struct list_head *list)
{
	struct page *first = NULL, *end = NULL, *split_end;
	struct hugetlb_split *split;

	list_for_each_entry(split, list, change.node) {
		if (!split->change.need_flush)
			continue;

		split_end = split->page + pages_per_huge_page(split->h);
		first = first ? min(first, split->page) : split->page;
		end = max(end, split_end);
		split->change.need_flush = false;
	}

	if (first)
		hugetlb_vmemmap_flush(first, end);

	list_for_each_entry(split, list, change.node) {
		hugetlb_vmemmap_free_pages(&split->change.vmemmap_pages);
		cond_resched();
	}
}

/**
 * hugetlb_split_free_list - merge huge pages and free them to their pools
 * @list: splits whose folios have all come back, linked by &hugetlb_split_change.node;
 *	  empty on return
 *
 * Context: May sleep.
 */
void hugetlb_split_free_list(struct list_head *list)
{
	struct hugetlb_split *split, *next;
	bool optimized = false;
	struct folio *folio;
	struct hstate *h;

	list_for_each_entry(split, list, change.node)
		optimized |= split->optimized;
	/* One grace period for all of them, see hugetlb_split_merge(). */
	if (optimized)
		synchronize_rcu_expedited();

	list_for_each_entry(split, list, change.node) {
		hugetlb_split_merge(split);
		cond_resched();
	}
	hugetlb_split_flush(list);

	list_for_each_entry_safe(split, next, list, change.node) {
		list_del(&split->change.node);
		h = split->h;
		folio = hugetlb_split_finish_merge(split);

		/* Decrement first: a page back in the pool must not be counted as waiting. */
		atomic_long_dec(&h->waiting_huge_pages);
		folio_ref_unfreeze(folio, 1);
		folio_clear_hugetlb_frozen(folio);
		folio_put(folio);
		cond_resched();
	}
}

static void hugetlb_split_free_work(struct work_struct *work)
{
	struct hugetlb_split *split = container_of(work, struct hugetlb_split, free_work);
	LIST_HEAD(list);

	list_add(&split->change.node, &list);
	hugetlb_split_free_list(&list);
}

/**
 * hugetlb_split_prepare - allocate the memory to split a HugeTLB folio
 * @folio: the folio
 * @part_order: order of the parts, not more than the order of @folio
 * @is_mappable: the parts can be mapped to userspace; then @part_order is PMD_ORDER or
 *		 less, and the parts are not split further
 *
 * Context: May sleep.  The owner of @folio serializes its changes.
 * Return: A split for hugetlb_split_commit() or hugetlb_split_abort(), or NULL if there
 *	   is not enough memory.
 */
struct hugetlb_split *hugetlb_split_prepare(struct folio *folio, unsigned int part_order,
					    bool is_mappable)
{
	unsigned int order = folio_order(folio);
	struct hugetlb_split *split;

	split = kzalloc_obj(*split, GFP_KERNEL_ACCOUNT);
	if (!split)
		return NULL;

	split->page = &folio->page;
	split->h = folio_hstate(folio);
	split->part_order = part_order;
	split->is_mappable = is_mappable;
	split->optimized = folio_test_hugetlb_vmemmap_optimized(folio);
	INIT_LIST_HEAD(&split->change.vmemmap_pages);
	atomic_long_set(&split->nr_out, 1);
	INIT_WORK(&split->free_work, hugetlb_split_free_work);

	if (xa_reserve_irq(&split->h->split_hugepages, hugetlb_split_index(split), GFP_KERNEL))
		goto err_free;

	if (split->optimized && (is_mappable || part_order < order) &&
	    hugetlb_vmemmap_prepare_parts(split->page, order, is_mappable ? 0 : part_order,
					  &split->change.vmemmap_pages))
		goto err_erase;

	return split;

err_erase:
	xa_erase_irq(&split->h->split_hugepages, hugetlb_split_index(split));
err_free:
	kfree(split);
	return NULL;
}

/**
 * hugetlb_split_abort - free what hugetlb_split_prepare() allocated
 * @split: from hugetlb_split_prepare(), freed
 *
 * The folio is what it was before.
 *
 * Context: Process context, takes the xa_lock of the hstate's splits.
 */
void hugetlb_split_abort(struct hugetlb_split *split)
{
	hugetlb_vmemmap_free_pages(&split->change.vmemmap_pages);
	xa_erase_irq(&split->h->split_hugepages, hugetlb_split_index(split));
	kfree(split);
}

/**
 * hugetlb_split_commit - split a HugeTLB folio into parts
 * @split: from hugetlb_split_prepare(); the folio is frozen
 *
 * The parts are frozen on return.  hugetlb_split_flush() is needed before their struct
 * pages are used, other than by hugetlb_split_part().
 *
 * Context: May sleep, takes hugetlb_lock.
 */
void hugetlb_split_commit(struct hugetlb_split *split)
{
	struct folio *folio = page_folio(split->page);
	unsigned int order = huge_page_order(split->h);

	VM_WARN_ON_ONCE_FOLIO(folio_ref_count(folio), folio);

	spin_lock_irq(&hugetlb_lock);
	split->flags = (unsigned long)folio->private;
	split->subpool = folio->_hugetlb_subpool;
	split->cgroup = folio->_hugetlb_cgroup;
	split->cgroup_rsvd = folio->_hugetlb_cgroup_rsvd;
#ifdef CONFIG_MEMCG
	split->memcg_data = folio->memcg_data;
#endif
	split->hwpoison = folio_test_hwpoison(folio);
	split->raw_hwp_list.first = folio->_hugetlb_hwpoison;
	list_del(&folio->lru);
	__folio_clear_hugetlb(folio);
	/* The entry is reserved, so this needs no memory. */
	WARN_ON_ONCE(xa_is_err(xa_store(&split->h->split_hugepages,
					hugetlb_split_index(split), split, GFP_NOWAIT)));
	spin_unlock_irq(&hugetlb_lock);

	/* A private huge page without parts is split into pieces right after this. */
	if (split->is_mappable || split->part_order < order)
		split_block(split, split->page, order, split->part_order);
}

/**
 * hugetlb_split_prepare_part - allocate the memory to split a part
 * @split: the huge page
 * @page: first page of the part
 *
 * The memory stays with @split if the change is aborted.
 *
 * Context: May sleep.
 * Return: 0 or -ENOMEM.
 */
int hugetlb_split_prepare_part(struct hugetlb_split *split, struct page *page)
{
	if (!hugetlb_split_is_optimized(split, split->part_order))
		return 0;

	return hugetlb_vmemmap_prepare_parts(page, split->part_order, 0,
					     &split->change.vmemmap_pages);
}

/**
 * hugetlb_split_part - split a part into pieces
 * @split: the huge page
 * @page: first page of the part, which is frozen and has been prepared
 *
 * The pieces are frozen on return.  hugetlb_split_flush() is needed before their struct
 * pages are used.
 *
 * Context: May sleep.
 */
void hugetlb_split_part(struct hugetlb_split *split, struct page *page)
{
	split_block(split, page, split->part_order, 0);
}

/**
 * hugetlb_split_merge_part - merge the pieces of a part
 * @split: the huge page
 * @page: first page of the part, whose pieces are all frozen
 *
 * The part is frozen on return.  hugetlb_split_flush() is needed before its struct pages
 * are used.
 *
 * Context: May sleep.  If @split is optimized, an RCU grace period has passed since the
 *	    last piece was frozen and removed from the page cache.
 */
void hugetlb_split_merge_part(struct hugetlb_split *split, struct page *page)
{
	merge_block(split, page, split->part_order);
}

/**
 * hugetlb_split_merge - merge all of a huge page
 * @split: the huge page, whose folios are all frozen
 *
 * hugetlb_split_flush() and hugetlb_split_finish_merge() are needed before the folio is
 * used.
 *
 * Context: As for hugetlb_split_merge_part().
 */
void hugetlb_split_merge(struct hugetlb_split *split)
{
	/* The HugeTLB folio is optimized again, its parts need not have been. */
	split->is_mappable = false;
	merge_block(split, split->page, huge_page_order(split->h));
}

/**
 * hugetlb_split_finish_merge - make a HugeTLB folio of a huge page that has been merged
 * @split: the huge page; freed
 *
 * Context: Process context, takes hugetlb_lock.
 * Return: The HugeTLB folio that was split, frozen.
 */
struct folio *hugetlb_split_finish_merge(struct hugetlb_split *split)
{
	struct folio *folio = page_folio(split->page);
	struct hstate *h = split->h;

	spin_lock_irq(&hugetlb_lock);
	__folio_set_hugetlb(folio);
	folio->private = (void *)split->flags;
	folio->_hugetlb_subpool = split->subpool;
	folio->_hugetlb_cgroup = split->cgroup;
	folio->_hugetlb_cgroup_rsvd = split->cgroup_rsvd;
#ifdef CONFIG_MEMCG
	folio->memcg_data = split->memcg_data;
#endif
	folio->_hugetlb_hwpoison = split->raw_hwp_list.first;
	if (split->hwpoison)
		folio_set_hwpoison(folio);
	list_add(&folio->lru, &h->hugepage_activelist);
	xa_erase(&h->split_hugepages, hugetlb_split_index(split));
	spin_unlock_irq(&hugetlb_lock);

	kfree(split);
	return folio;
}

/**
 * hugetlb_split_find - find the split that a page belongs to
 * @page: any page
 *
 * Context: hugetlb_lock is held, and keeps the split from being merged.
 * Return: NULL if @page does not belong to a split huge page.
 */
struct hugetlb_split *hugetlb_split_find(struct page *page)
{
	struct hugetlb_split *split;
	struct hstate *h;

	lockdep_assert_held(&hugetlb_lock);

	for_each_hstate(h) {
		split = xa_load(&h->split_hugepages, page_to_pfn(page) >> huge_page_order(h));
		if (split)
			return split;
	}

	return NULL;
}

/**
 * hugetlb_split_release - let go of a huge page that left its file
 * @split: the huge page; the caller does not use it again unless it is on @list
 * @list: gets @split if all of its folios have come back
 *
 * Otherwise the last of them to come back frees the huge page.
 *
 * Context: Any.
 */
void hugetlb_split_release(struct hugetlb_split *split, struct list_head *list)
{
	atomic_long_inc(&split->h->waiting_huge_pages);
	if (atomic_long_dec_and_test(&split->nr_out))
		list_add_tail(&split->change.node, list);
}

/**
 * hugetlb_split_clear_mlocked - clear PG_mlocked that an unmap left behind
 * @folio: a frozen folio
 *
 * Context: Any but NMI.
 */
void hugetlb_split_clear_mlocked(struct folio *folio)
{
	if (folio_test_mlocked(folio)) {
		__folio_clear_mlocked(folio);
		zone_stat_mod_folio(folio, NR_MLOCK, -folio_nr_pages(folio));
		count_vm_events(UNEVICTABLE_PGCLEARED, folio_nr_pages(folio));
	}
}

/**
 * free_hugetlb_piece - take back a folio of a split huge page
 * @folio: a folio of type hugetlb_piece that left its file, without references
 *
 * Context: Any but NMI.
 */
void free_hugetlb_piece(struct folio *folio)
{
	struct hugetlb_split *split = folio->private;
	long nr_pages = folio_nr_pages(folio);

	VM_WARN_ON_ONCE_FOLIO(folio_ref_count(folio), folio);

	hugetlb_split_clear_mlocked(folio);

	if (atomic_long_sub_and_test(nr_pages, &split->nr_out))
		queue_work(system_dfl_wq, &split->free_work);
}
