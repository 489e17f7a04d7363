// SPDX-License-Identifier: GPL-2.0-only
/*
 * HugeTLB pages in parts
 */

/**
 * DOC: HugeTLB pages in parts
 *
 * A page of the HugeTLB pool that guest_memfd has got can be taken apart: into parts
 * of PMD_ORDER, and each of these into single pages.  Every one of them is a folio of
 * its own, with a reference count that keeps nobody else from what he does with the
 * rest of the huge page.  All of this is about how memory is described.  The memory
 * stays where it is, and it stays one page for the pool, for its cgroups and for its
 * subpool.
 *
 * To be taken apart or put together, folios are frozen: they are not in the page
 * cache, and their reference count is 0.  Nobody can get hold of them then, and whoever
 * looks at struct pages without a reference finds old or new folios.  Who has looked
 * them up under RCU may try to get a reference late, and writes to the struct page even
 * if he gets none: so a grace period has to end before struct pages become read-only,
 * as those of the tails of larger folios are.  Only splitting needs memory, and gets it
 * before anything changes.
 *
 * If the vmemmap of the huge page is optimized, that of parts of PMD_ORDER is, too,
 * unless userspace can map them: for that each page needs a struct page of its own.
 *
 * A piece that nobody can map is of type guestmem: a part that is private, and whatever
 * is no longer in a file.  The last reference to that may be dropped in any context,
 * after the file and KVM have gone.  It is only counted then.
 * When all pieces of a huge page have come back, that is put together and freed as
 * any HugeTLB page.  In the meantime the pool has it as a page that is in use.
 */
#include <linux/hugetlb.h>
#include <linux/hugetlb_cgroup.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>

#include "guestmem_hugepage.h"
#include "hugetlb_vmemmap.h"
#include "internal.h"

/* Flags that say where a page is. */
#define GUESTMEM_KEPT_FLAGS	(~PAGEFLAGS_MASK)

/*
 * The huge pages that are in parts, by the number of their first page frame.  What is
 * in there is protected by hugetlb_lock.
 */
static DEFINE_XARRAY_FLAGS(guestmem_hugepages, XA_FLAGS_LOCK_IRQ);

/* How many of each pool have left their files and wait for the last of their pieces. */
static atomic_long_t guestmem_nr_waiting[HUGE_MAX_HSTATE];

/* How many struct pages of a folio can be written, beginning with the first one. */
static unsigned long guestmem_nr_writable(const struct guestmem_hugepage *hp,
					  unsigned int order)
{
	if (hp->optimized && !hp->is_mappable && order >= VMEMMAP_TAIL_MIN_ORDER)
		return HUGETLB_VMEMMAP_RESERVE_PAGES;

	return 1UL << order;
}

static void guestmem_reset_page(struct page *page)
{
	page->flags.f &= GUESTMEM_KEPT_FLAGS;
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

/* Make a frozen folio of what is none, or is others that are frozen. */
static void guestmem_make_folio(const struct guestmem_hugepage *hp,
				struct page *page, unsigned int order)
{
	unsigned long i, nr = guestmem_nr_writable(hp, order);

	for (i = 1; i < nr; i++) {
		guestmem_reset_page(page + i);
		prep_compound_tail(page + i, page, order);
		if (!(i % SZ_16K))
			cond_resched();
	}

	guestmem_reset_page(page);
	if (order) {
		__folio_set_head((struct folio *)page);
		prep_compound_head(page, order);
		if (hp->is_mappable)
			folio_set_large_rmappable(page_folio(page));
	}
}

/*
 * Make frozen folios of a block that is one, and whose vmemmap is optimized: of what
 * its first vmemmap page describes, and by copies of that, of all others.
 */
static void guestmem_split_optimized(struct guestmem_hugepage *hp, struct page *page,
				     unsigned int block_order, unsigned int order)
{
	unsigned long i;

	for (i = 0; i < HUGETLB_VMEMMAP_RESERVE_PAGES; i += 1UL << order)
		guestmem_make_folio(hp, page + i, order);

	hugetlb_vmemmap_set_parts(page, block_order, order, &hp->vmemmap_pages);

	/* A copy has lists that are those of the original. */
	for (i = 0; order && i < 1UL << block_order; i += 1UL << order)
		prep_compound_head(page + i, order);
}

/* Make frozen folios of a block that is one. */
static void guestmem_split_block(struct guestmem_hugepage *hp, struct page *page,
				 unsigned int block_order, unsigned int order)
{
	unsigned long i;

	if (hp->optimized && block_order >= VMEMMAP_TAIL_MIN_ORDER) {
		/* Where each page needs a struct page, all of them become one before. */
		guestmem_split_optimized(hp, page, block_order,
					 hp->is_mappable ? 0 : order);
		if (!hp->is_mappable)
			return;
	}

	for (i = 0; i < 1UL << block_order; i += 1UL << order) {
		guestmem_make_folio(hp, page + i, order);
		if (!(i % SZ_16K))
			cond_resched();
	}
}

/* Make one frozen folio of a block that is several. */
static void guestmem_merge_block(struct guestmem_hugepage *hp, struct page *page,
				 unsigned int order)
{
	guestmem_make_folio(hp, page, order);
	if (hp->optimized && order >= VMEMMAP_TAIL_MIN_ORDER)
		hugetlb_vmemmap_set_parts(page, order, order, &hp->vmemmap_pages);
	hugetlb_vmemmap_free_pages(&hp->vmemmap_pages);
}

/**
 * guestmem_hugepages_free - free huge pages all pieces of which have come back
 * @list: the pages, by &guestmem_hugepage.node; empty afterward
 *
 * Context: May sleep.
 */
void guestmem_hugepages_free(struct list_head *list)
{
	struct guestmem_hugepage *hp, *next;
	bool optimized = false;
	struct folio *folio;
	struct hstate *h;

	/* See guestmem_hugepage_merge_part(). */
	list_for_each_entry(hp, list, node)
		optimized |= hp->optimized;
	if (optimized)
		synchronize_rcu_expedited();

	list_for_each_entry_safe(hp, next, list, node) {
		list_del(&hp->node);
		h = hp->h;
		folio = guestmem_hugepage_merge(hp);

		/* Who finds the page in the pool does not find it among those that wait. */
		atomic_long_dec(&guestmem_nr_waiting[hstate_index(h)]);
		folio_ref_unfreeze(folio, 1);
		folio_put(folio);
		cond_resched();
	}
}

static void guestmem_hugepage_free_work(struct work_struct *work)
{
	LIST_HEAD(list);

	list_add(&container_of(work, struct guestmem_hugepage, free_work)->node, &list);
	guestmem_hugepages_free(&list);
}

static struct guestmem_hugepage *guestmem_hugepage_alloc(struct folio *folio,
							 unsigned int part_order)
{
	struct guestmem_hugepage *hp;

	hp = kzalloc_obj(*hp, GFP_KERNEL_ACCOUNT);
	if (!hp)
		return NULL;

	hp->page = &folio->page;
	hp->h = folio_hstate(folio);
	hp->part_order = part_order;
	INIT_LIST_HEAD(&hp->vmemmap_pages);
	atomic_long_set(&hp->nr_out, 1);
	INIT_WORK(&hp->free_work, guestmem_hugepage_free_work);

	if (xa_reserve_irq(&guestmem_hugepages, page_to_pfn(hp->page), GFP_KERNEL)) {
		kfree(hp);
		return NULL;
	}

	return hp;
}

static void guestmem_hugepage_free(struct guestmem_hugepage *hp)
{
	xa_erase_irq(&guestmem_hugepages, page_to_pfn(hp->page));
	kfree(hp);
}

/**
 * guestmem_hugepage_prepare - get what it takes to take a HugeTLB page apart
 * @folio: the page
 * @part_order: order of the parts, less than the page's; 0 for single pages
 * @is_mappable: whether userspace can map the parts.  Then @part_order is PMD_ORDER or
 *		 less, it can be the page's own, and parts are not taken apart further.
 *
 * Context: May sleep.  The caller keeps others from splitting @folio.
 * Return: What guestmem_hugepage_split() or guestmem_hugepage_abort() wants, or NULL if
 *	   there is no memory.
 */
struct guestmem_hugepage *guestmem_hugepage_prepare(struct folio *folio,
						    unsigned int part_order,
						    bool is_mappable)
{
	struct guestmem_hugepage *hp = guestmem_hugepage_alloc(folio, part_order);

	if (!hp)
		return NULL;

	hp->is_mappable = is_mappable;
	hp->optimized = folio_test_hugetlb_vmemmap_optimized(folio);
	if (hp->optimized &&
	    hugetlb_vmemmap_prepare_parts(hp->page, folio_order(folio),
					  is_mappable ? 0 : part_order,
					  &hp->vmemmap_pages)) {
		guestmem_hugepage_free(hp);
		return NULL;
	}

	return hp;
}

/**
 * guestmem_hugepage_abort - do not take a HugeTLB page apart
 * @hp: from guestmem_hugepage_prepare(), not to be used any more
 */
void guestmem_hugepage_abort(struct guestmem_hugepage *hp)
{
	hugetlb_vmemmap_free_pages(&hp->vmemmap_pages);
	guestmem_hugepage_free(hp);
}

/**
 * guestmem_hugepage_split - take a HugeTLB page apart
 * @hp: from guestmem_hugepage_prepare(), whose folio is frozen
 *
 * All parts are frozen afterward.
 *
 * Context: May sleep, takes hugetlb_lock.
 */
void guestmem_hugepage_split(struct guestmem_hugepage *hp)
{
	struct folio *folio = page_folio(hp->page);

	VM_WARN_ON_ONCE_FOLIO(folio_ref_count(folio), folio);

	spin_lock_irq(&hugetlb_lock);
	memcpy(&hp->folio, folio, sizeof(*folio));
	list_replace(&folio->lru, &hp->folio.lru);
	__folio_clear_hugetlb(folio);
	xa_store(&guestmem_hugepages, page_to_pfn(hp->page), hp, GFP_NOWAIT);
	spin_unlock_irq(&hugetlb_lock);

	guestmem_split_block(hp, hp->page, huge_page_order(hp->h), hp->part_order);
}

/**
 * guestmem_hugepage_prepare_part - get what it takes to take a part apart
 * @hp: the huge page
 * @page: first page of the part
 *
 * Return: 0 or -ENOMEM.
 */
int guestmem_hugepage_prepare_part(struct guestmem_hugepage *hp, struct page *page)
{
	if (!hp->optimized || hp->part_order < VMEMMAP_TAIL_MIN_ORDER)
		return 0;

	return hugetlb_vmemmap_prepare_parts(page, hp->part_order, 0, &hp->vmemmap_pages);
}

/**
 * guestmem_hugepage_split_part - take a part of a huge page apart
 * @hp: the huge page
 * @page: first page of the part, which has been prepared and is frozen
 *
 * All pages are frozen afterward.
 */
void guestmem_hugepage_split_part(struct guestmem_hugepage *hp, struct page *page)
{
	guestmem_split_block(hp, page, hp->part_order, 0);
}

/**
 * guestmem_hugepage_merge_part - put a part of a huge page together
 * @hp: the huge page
 * @page: first page of the part, all of whose pages are frozen
 *
 * The part is frozen afterward.
 *
 * Context: May sleep.  If @hp is optimized, an RCU grace period has ended since the last
 * of the pages was frozen and could not be found any more.
 */
void guestmem_hugepage_merge_part(struct guestmem_hugepage *hp, struct page *page)
{
	guestmem_merge_block(hp, page, hp->part_order);
}

/**
 * guestmem_hugepage_merge - put a huge page together
 * @hp: the huge page, all of which is frozen; not to be used any more
 *
 * Context: As guestmem_hugepage_merge_part().
 * Return: The HugeTLB folio that it was, frozen.
 */
struct folio *guestmem_hugepage_merge(struct guestmem_hugepage *hp)
{
	unsigned int order = huge_page_order(hp->h);
	struct folio *folio = page_folio(hp->page);
	unsigned long i;

	for (i = 0; hp->part_order && i < 1UL << order; i += 1UL << hp->part_order) {
		if (!folio_test_large((struct folio *)(hp->page + i)))
			guestmem_hugepage_merge_part(hp, hp->page + i);
	}
	/* What is going to be the HugeTLB page again is optimized as that was. */
	hp->is_mappable = false;
	guestmem_merge_block(hp, hp->page, order);

	spin_lock_irq(&hugetlb_lock);
	__folio_set_hugetlb(folio);
	folio->private = hp->folio.private;
	folio->_hugetlb_subpool = hp->folio._hugetlb_subpool;
	folio->_hugetlb_cgroup = hp->folio._hugetlb_cgroup;
	folio->_hugetlb_cgroup_rsvd = hp->folio._hugetlb_cgroup_rsvd;
	folio->_hugetlb_hwpoison = hp->folio._hugetlb_hwpoison;
#ifdef CONFIG_MEMCG
	folio->memcg_data = hp->folio.memcg_data;
#endif
	if (folio_test_hwpoison(&hp->folio))
		folio_set_hwpoison(folio);
	list_replace(&hp->folio.lru, &folio->lru);
	xa_erase(&guestmem_hugepages, page_to_pfn(hp->page));
	spin_unlock_irq(&hugetlb_lock);

	kfree(hp);
	return folio;
}

/**
 * guestmem_whole_folio - find what keeps the state of a huge page that is in parts
 * @page: any page
 *
 * Context: The caller holds hugetlb_lock.
 * Return: NULL if @page does not belong to a huge page that is in parts.
 */
struct folio *guestmem_whole_folio(struct page *page)
{
	unsigned long pfn = page_to_pfn(page);
	struct guestmem_hugepage *hp;
	struct hstate *h;

	lockdep_assert_held(&hugetlb_lock);

	for_each_hstate(h) {
		hp = xa_load(&guestmem_hugepages, round_down(pfn, 1UL << huge_page_order(h)));
		if (hp && hp->h == h)
			return &hp->folio;
	}

	return NULL;
}

/**
 * guestmem_hugepage_release - give a huge page back that has left its file
 * @hp: the huge page; not to be used any more
 * @list: where it is added if all of its pieces have come back, for
 *	  guestmem_hugepages_free()
 *
 * If not, it is freed when the last one comes back.
 */
void guestmem_hugepage_release(struct guestmem_hugepage *hp, struct list_head *list)
{
	atomic_long_inc(&guestmem_nr_waiting[hstate_index(hp->h)]);
	if (atomic_long_dec_and_test(&hp->nr_out))
		list_add_tail(&hp->node, list);
}

/**
 * guestmem_hugepages_waiting - count huge pages that wait for their last piece
 * @h: the pool
 *
 * Return: How many pages of @h have left their files, but not come back to the pool,
 *	   because pieces of them are still in use.
 */
unsigned long guestmem_hugepages_waiting(struct hstate *h)
{
	return atomic_long_read(&guestmem_nr_waiting[hstate_index(h)]);
}

/* What a mapping may have left behind, and others have counted. */
void guestmem_clear_mlocked(struct folio *folio)
{
	if (folio_test_mlocked(folio)) {
		__folio_clear_mlocked(folio);
		zone_stat_mod_folio(folio, NR_MLOCK, -folio_nr_pages(folio));
		count_vm_events(UNEVICTABLE_PGCLEARED, folio_nr_pages(folio));
	}
}

/**
 * free_guestmem_folio - take back a piece of a huge page that has left its file
 * @folio: the piece
 *
 * Context: Any but NMI.
 */
void free_guestmem_folio(struct folio *folio)
{
	struct guestmem_hugepage *hp = folio->private;
	long nr_pages = folio_nr_pages(folio);

	VM_WARN_ON_ONCE_FOLIO(folio_ref_count(folio), folio);

	guestmem_clear_mlocked(folio);

	if (atomic_long_sub_and_test(nr_pages, &hp->nr_out))
		queue_work(system_dfl_wq, &hp->free_work);
}
