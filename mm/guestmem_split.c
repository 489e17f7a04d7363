// SPDX-License-Identifier: GPL-2.0-only
/*
 * Splitting and merging of the folios of guest_memfd files
 */

/**
 * DOC: Folios of HugeTLB pages in guest_memfd files
 *
 * hugetlb_split.c splits and merges HugeTLB folios that are frozen.  This file takes them
 * out of the page cache for that, and puts the new ones in.  See hugetlb_split.c for the
 * terms.
 *
 * The attributes of a file determine its folios.  A huge page that is wholly private is
 * one HugeTLB folio.  In any other, each part that is wholly private is a folio, and the
 * rest are pieces: a pin then blocks the conversion of the pinned piece only, and the
 * guest keeps large mappings of the rest.  A file that cannot be converted is in whole
 * HugeTLB folios, or in parts if userspace can map it.
 *
 * A change of a range has two steps.  Its caller excludes other users of the huge pages
 * that the range is in:
 *
 * - Prepare: replace the folios that change by placeholders and freeze them.  Split the
 *   placeholder of a folio that splits, so that the page cache has the nodes for the new
 *   folios.  Allocate everything else, wait for references, and for a grace period.  If
 *   that fails, store the old folios again.
 * - Commit: split or merge the folios and store the new ones.  This cannot fail.
 *
 * A lookup that finds a placeholder returns at once, where it would spin on a frozen
 * folio.  See guestmem_placeholder.c.
 *
 * A new huge page is split before it is in the page cache.  The allocator's mutex for the
 * huge page excludes others.
 */
#include <linux/guestmem.h>
#include <linux/hugetlb.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>

#define CREATE_TRACE_POINTS
#include <trace/events/guestmem.h>

#include "guestmem_placeholder.h"
#include "guestmem_split.h"
#include "hugetlb_split.h"
#include "hugetlb_vmemmap.h"
#include "internal.h"

/* Merge the placeholders of each part, so that no store frees many nodes at once. */
static void guestmem_merge_placeholders(struct guestmem_allocator *gm, pgoff_t index)
{
	pgoff_t end = index + (1UL << gm->order);

	for (; index < end; index += 1UL << gm->part_order) {
		guestmem_store(gm->mapping, index, gm->part_order, filemap_placeholder());
		cond_resched();
	}
}

static pgoff_t guestmem_part_size(const struct guestmem_allocator *gm)
{
	return 1UL << gm->part_order;
}

static struct page *guestmem_page(const struct hugetlb_split *split, pgoff_t index)
{
	return split->page + (index - split->change.index);
}

static bool guestmem_range_has_poison(struct hugetlb_split *split, pgoff_t start,
				      pgoff_t end)
{
	return hugetlb_split_has_poison(split, guestmem_page(split, start), end - start);
}

/* Freeze a folio that is not in the page cache, but has @refs references from there. */
static bool guestmem_freeze(struct folio *folio, int refs)
{
	bool is_hugetlb = folio_test_hugetlb(folio);

	if (!folio_ref_count(folio))
		return true;

	/* Set first: without references and flag it would be on its way to the pool. */
	if (is_hugetlb)
		folio_set_hugetlb_frozen(folio);

	if (folio_ref_freeze(folio, refs)) {
		hugetlb_split_clear_mlocked(folio);
		return true;
	}

	if (is_hugetlb)
		folio_clear_hugetlb_frozen(folio);
	return false;
}

/* Insert the folios of a split huge page where placeholders are. */
static void guestmem_insert_range(struct guestmem_allocator *gm, struct hugetlb_split *split,
				  pgoff_t start, pgoff_t end)
{
	struct folio *folio;
	pgoff_t i;

	for (i = start; i < end; i += folio_nr_pages(folio)) {
		if (!(i % SZ_1K))
			cond_resched();
		folio = page_folio(guestmem_page(split, i));
		if (!guestmem_is_placeholder(gm->mapping, i))
			continue;
		folio->private = split;
		/* A folio that can be mapped has no type. */
		if (folio_test_large(folio) && !split->is_mappable)
			__folio_set_hugetlb_piece(folio);
		guestmem_insert(gm->mapping, i, folio);
	}

	hugetlb_split_mark_poisoned(split, guestmem_page(split, start), end - start);
	if (likely(!READ_ONCE(split->hwpoison)))
		return;

	for (i = start; i < end; i += folio_nr_pages(folio)) {
		folio = page_folio(guestmem_page(split, i));
		if (folio_test_hwpoison(folio))
			gm->mapping->a_ops->error_remove_folio(gm->mapping, folio);
	}
}

/*
 * Replace the folios of a range by placeholders and freeze them.  All are replaced before
 * the first wait: a lookup cannot add references then, and short ones go meanwhile.
 */
static int guestmem_freeze_range(struct guestmem_allocator *gm, struct guestmem_change *c,
				 struct hugetlb_split *split, pgoff_t start, pgoff_t end)
{
	pgoff_t i, busy = end;
	struct folio *folio;

	for (i = start; i < end; i += folio_nr_pages(folio)) {
		folio = page_folio(guestmem_page(split, i));
		guestmem_store(gm->mapping, i, folio_order(folio), filemap_placeholder());
		if (!guestmem_freeze(folio, folio_nr_pages(folio)))
			busy = min(busy, i);
		if (i % SZ_1K)
			continue;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}

	for (i = busy; i < end; i += folio_nr_pages(folio)) {
		folio = page_folio(guestmem_page(split, i));
		while (!guestmem_freeze(folio, folio_nr_pages(folio))) {
			/* Do not use up the time for a reference of memory_failure(). */
			if ((c->is_merge && folio_test_hwpoison(folio)) || !c->wait(c)) {
				c->busy = i;
				return -EAGAIN;
			}
		}
	}

	return 0;
}

static int guestmem_freeze_for_split(struct guestmem_allocator *gm,
				     struct guestmem_change *c, struct hugetlb_split *split,
				     pgoff_t start, pgoff_t end)
{
	int r = 0;

	if (c->prepare_folio)
		r = c->prepare_folio(c, page_folio(guestmem_page(split, start)));

	return r ?: guestmem_freeze_range(gm, c, split, start, end);
}

/* Report a frozen folio to the caller before it splits. */
static void guestmem_commit_folio(struct guestmem_change *c, struct hugetlb_split *split,
				  pgoff_t start, pgoff_t end)
{
	start = max(start, c->start);
	end = min(end, c->end);
	if (c->commit_folio)
		c->commit_folio(c, guestmem_page(split, start), end - start);
}

/* Tell whether a part of a huge page that is being split is split, too. */
static bool guestmem_needs_pieces(struct guestmem_allocator *gm,
				  const struct guestmem_change *c, pgoff_t index)
{
	pgoff_t end = index + guestmem_part_size(gm);

	if (c)
		return c->start < end && c->end > index;

	return !gm->is_mappable && !gm->may_be_large(gm, index, end);
}

/* Prepare to split a part that has one placeholder. */
static int guestmem_prepare_part(struct guestmem_allocator *gm, struct hugetlb_split *split,
				 pgoff_t index)
{
	int r = hugetlb_split_prepare_part(split, guestmem_page(split, index));

	return r ?: guestmem_split_placeholder(gm->mapping, index, gm->part_order, 0);
}

/* Prepare to split a huge page that has one placeholder. */
static int guestmem_prepare_whole(struct guestmem_allocator *gm, struct hugetlb_split *split,
				  const struct guestmem_change *c)
{
	pgoff_t index = split->change.index, end = index + (1UL << gm->order);
	int r = guestmem_split_placeholder(gm->mapping, index, gm->order, gm->part_order);

	for (; !r && index < end; index += guestmem_part_size(gm)) {
		if (guestmem_needs_pieces(gm, c, index))
			r = guestmem_prepare_part(gm, split, index);
	}

	return r;
}

static void guestmem_split_part(struct guestmem_allocator *gm, struct hugetlb_split *split,
				pgoff_t index)
{
	trace_guestmem_split(gm->mapping->host, index, gm->part_order, 0);
	hugetlb_split_part(split, guestmem_page(split, index));
}

static void guestmem_split_whole(struct guestmem_allocator *gm, struct hugetlb_split *split,
				 struct guestmem_change *c)
{
	pgoff_t i, index = split->change.index, end = index + (1UL << gm->order);

	if (c)
		guestmem_commit_folio(c, split, index, end);
	if (gm->part_order < gm->order)
		trace_guestmem_split(gm->mapping->host, index, gm->order, gm->part_order);
	hugetlb_split_commit(split);

	for (i = index; i < end; i += guestmem_part_size(gm)) {
		if (guestmem_needs_pieces(gm, c, i))
			guestmem_split_part(gm, split, i);
	}
}

/**
 * guestmem_split_is_whole - tell whether a new huge page has to be one folio
 * @gm: allocator of the file
 * @index: index of its first page
 *
 * Context: Any.  The caller keeps the attributes of the huge page from changing.
 */
bool guestmem_split_is_whole(struct guestmem_allocator *gm, pgoff_t index)
{
	if (gm->is_mappable)
		return false;

	if (!gm->may_be_large)
		return true;

	return gm->may_be_large(gm, index, index + (1UL << gm->order));
}

/* Freeze a new folio: only a PFN walker or memory_failure() can have a reference. */
static int guestmem_freeze_new(struct folio *folio)
{
	while (!guestmem_freeze(folio, 1)) {
		if (folio_test_hwpoison(folio))
			return -EHWPOISON;
		if (fatal_signal_pending(current))
			return -EINTR;
		schedule_timeout_uninterruptible(1);
	}

	return 0;
}

/**
 * guestmem_split_add - split a new huge page and add it to a file
 * @gm: allocator of the file
 * @folio: HugeTLB folio, zeroed, with one reference, which this takes over
 * @index: index of its first page
 *
 * Context: May sleep.  The caller keeps the attributes of the huge page from changing,
 *	    and holds the allocator's mutex for it.
 * Return: 0, -ENOMEM, -EINTR if the task is being killed, or -EHWPOISON if the page has a
 *	   memory error.  On error the reference to @folio has been dropped.
 */
int guestmem_split_add(struct guestmem_allocator *gm, struct folio *folio, pgoff_t index)
{
	struct hugetlb_split *split;
	LIST_HEAD(list);
	int r = -ENOMEM;

	split = hugetlb_split_prepare(folio, gm->part_order, gm->is_mappable);
	if (!split)
		goto err_put;
	split->change.index = index;

	r = guestmem_add_placeholder(gm->mapping, index, gm->order);
	if (r)
		goto err_abort;

	r = guestmem_prepare_whole(gm, split, NULL);
	if (r)
		goto err_del;

	/* Last, so that the folio is frozen for a moment only. */
	r = guestmem_freeze_new(folio);
	if (r)
		goto err_del;

	guestmem_split_whole(gm, split, NULL);
	list_add(&split->change.node, &list);
	hugetlb_split_flush(&list);
	list_del(&split->change.node);
	guestmem_insert_range(gm, split, index, index + (1UL << gm->order));
	return 0;

err_del:
	guestmem_merge_placeholders(gm, index);
	guestmem_del_entry(gm->mapping, index, gm->order);
err_abort:
	hugetlb_split_abort(split);
err_put:
	folio_put(folio);
	return r;
}

/* Unmap a folio again: a fault that had it before the unmap may have mapped it since. */
static void guestmem_unmap_piece(struct folio *folio, enum lru_cache_drained *drained)
{
	folio_lock(folio);
	if (folio_mapped(folio)) {
		unmap_mapping_folio(folio);
		*drained = LRU_CACHE_NOT_DRAINED;
	}
	folio_unlock(folio);

	lru_cache_drain_for_folio(folio, 0, drained);
}

/* Set the type under the folio lock and after the unmap: nothing can map it any more. */
static void guestmem_remove_piece(struct guestmem_allocator *gm, struct hugetlb_split *split,
				  struct folio *folio)
{
	unsigned int order = folio_order(folio);

	folio_lock(folio);
	__folio_set_hugetlb_piece(folio);
	atomic_long_add(1L << order, &split->nr_out);
	guestmem_del_entry(gm->mapping, folio->index, order);
	folio->mapping = NULL;
	folio_unlock(folio);

	if (gm->mapping->a_ops->free_folio)
		gm->mapping->a_ops->free_folio(folio);
	folio_put_refs(folio, 1 << order);
}

/**
 * guestmem_split_remove - remove a split huge page from a file
 * @gm: allocator of the file
 * @index: index of its first page
 * @drained: state of the per-CPU folio batches, which can hold mlocked folios
 * @list: gets the huge page if no folio has a reference, for hugetlb_split_free_list()
 *
 * Otherwise the last reference to a folio of the huge page frees it.
 *
 * Context: May sleep, locks folios.  The caller has unmapped the huge page, and excludes
 *	    its other users.
 */
void guestmem_split_remove(struct guestmem_allocator *gm, pgoff_t index,
			   enum lru_cache_drained *drained, struct list_head *list)
{
	struct folio *folio = xa_load(&gm->mapping->i_pages, index);
	struct hugetlb_split *split = folio->private;
	pgoff_t end = index + (1UL << gm->order);

	while (index < end) {
		folio = xa_load(&gm->mapping->i_pages, index);
		index += folio_nr_pages(folio);
		guestmem_unmap_piece(folio, drained);
		guestmem_remove_piece(gm, split, folio);
		if (!(index % SZ_1K))
			cond_resched();
	}

	hugetlb_split_release(split, list);
}

/* &guestmem_allocator_operations.max_order */
unsigned int guestmem_split_max_order(struct guestmem_allocator *gm, struct folio *folio)
{
	unsigned int orders[] = { gm->order, gm->part_order };
	struct hugetlb_split *split;
	struct page *page;
	int i;

	if (folio_test_hugetlb(folio))
		return gm->order;

	split = folio->private;
	for (i = 0; i < ARRAY_SIZE(orders); i++) {
		page = split->page + round_down(&folio->page - split->page, 1UL << orders[i]);
		if (!hugetlb_split_has_poison(split, page, 1UL << orders[i]))
			return orders[i];
	}

	return folio_order(folio);
}

static void guestmem_change_add(struct guestmem_allocator *gm, struct guestmem_change *c,
				struct hugetlb_split *split, pgoff_t index, bool is_first)
{
	XA_STATE(xas, &gm->mapping->i_pages, index);

	split->change.index = index;
	split->change.start = max(index, round_down(c->start, guestmem_part_size(gm)));
	split->change.end = min(index + (1UL << gm->order), c->end);
	split->change.is_first = is_first;
	split->change.is_merge = false;
	split->change.store = xas;
	list_add_tail(&split->change.node, &c->splits);
}

/* Prepare to split the huge page at @index as far as the range of the change goes. */
static int guestmem_prepare_split_page(struct guestmem_allocator *gm,
				       struct guestmem_change *c, pgoff_t index)
{
	struct folio *folio = xa_load(&gm->mapping->i_pages, index);
	pgoff_t i, end = index + (1UL << gm->order), size = guestmem_part_size(gm);
	struct hugetlb_split *split;
	bool is_added = false;
	int r = 0;

	if (!folio)
		return 0;

	if (folio_test_hugetlb(folio)) {
		split = hugetlb_split_prepare(folio, gm->part_order, false);
		if (!split)
			return -ENOMEM;

		guestmem_change_add(gm, c, split, index, true);
		/* For an abort after the placeholder has been split. */
		r = guestmem_prepare_store(gm->mapping, index, gm->order, &split->change.store);
		if (!r)
			r = guestmem_freeze_for_split(gm, c, split, index, end);
		return r ?: guestmem_prepare_whole(gm, split, c);
	}

	split = folio->private;
	for (i = max(index, round_down(c->start, size)); i < min(end, c->end); i += size) {
		folio = xa_load(&gm->mapping->i_pages, i);
		if (!folio_test_large(folio))
			continue;

		/* Often no part splits, and there is nothing to commit. */
		if (!is_added)
			guestmem_change_add(gm, c, split, index, false);
		is_added = true;
		r = guestmem_freeze_for_split(gm, c, split, i, i + size);
		if (!r)
			r = guestmem_prepare_part(gm, split, i);
		if (r)
			break;
	}

	return r;
}

/* Freeze folios to merge them.  Leave them in place if there is a memory error. */
static int guestmem_freeze_for_merge(struct guestmem_allocator *gm,
				     struct guestmem_change *c, struct hugetlb_split *split,
				     pgoff_t start, pgoff_t end)
{
	int r;

	if (guestmem_range_has_poison(split, start, end))
		return 0;

	c->need_grace_period |= split->optimized;
	r = guestmem_freeze_range(gm, c, split, start, end);
	if (r == -EAGAIN && guestmem_range_has_poison(split, start, end)) {
		guestmem_insert_range(gm, split, start, end);
		r = 0;
	}

	return r;
}

/* Prepare to merge the huge page at @index, or else those of its parts that can be. */
static int guestmem_prepare_merge_page(struct guestmem_allocator *gm,
				       struct guestmem_change *c, pgoff_t index)
{
	struct folio *folio = xa_load(&gm->mapping->i_pages, index);
	pgoff_t i, end = index + (1UL << gm->order), size = guestmem_part_size(gm);
	struct hugetlb_split *split;
	int r = 0;

	if (!folio || folio_test_hugetlb(folio))
		return 0;

	split = folio->private;
	guestmem_change_add(gm, c, split, index, false);
	if (gm->may_be_large(gm, index, end)) {
		r = guestmem_freeze_for_merge(gm, c, split, index, end);
		if (r)
			return r;

		split->change.is_merge = guestmem_is_placeholder(gm->mapping, index);
		if (split->change.is_merge)
			return guestmem_prepare_store(gm->mapping, index, gm->order,
						      &split->change.store);
	}

	for (i = index; !r && i < end; i += size) {
		if (!folio_test_large(xa_load(&gm->mapping->i_pages, i)) &&
		    gm->may_be_large(gm, i, i + size))
			r = guestmem_freeze_for_merge(gm, c, split, i, i + size);
		cond_resched();
	}

	return r;
}

static void guestmem_abort_page(struct guestmem_allocator *gm, struct hugetlb_split *split)
{
	pgoff_t index = split->change.index;

	if (split->change.is_first) {
		if (guestmem_is_placeholder(gm->mapping, index)) {
			guestmem_merge_placeholders(gm, index);
			guestmem_xas_store(&split->change.store, filemap_placeholder());
			guestmem_insert(gm->mapping, index, page_folio(split->page));
		}
		xas_destroy(&split->change.store);
		hugetlb_split_abort(split);
		return;
	}

	guestmem_insert_range(gm, split, index, index + (1UL << gm->order));
	xas_destroy(&split->change.store);
	hugetlb_vmemmap_free_pages(&split->change.vmemmap_pages);
}

/* Undo a preparation that has failed. */
static void guestmem_abort(struct guestmem_allocator *gm, struct guestmem_change *c)
{
	struct hugetlb_split *split, *next;

	list_for_each_entry_safe(split, next, &c->splits, change.node) {
		list_del(&split->change.node);
		guestmem_abort_page(gm, split);
	}
}

static int guestmem_prepare(struct guestmem_allocator *gm, struct guestmem_change *c,
			    pgoff_t start, pgoff_t end, bool is_merge)
{
	pgoff_t index, size = 1UL << gm->order;
	int r = 0;

	lockdep_assert_held(gm->change_lock);

	c->start = start;
	c->end = end;
	c->is_merge = is_merge;
	c->need_grace_period = false;
	INIT_LIST_HEAD(&c->splits);

	for (index = round_down(start, size); index < end && !r; index += size) {
		r = is_merge ? guestmem_prepare_merge_page(gm, c, index) :
			       guestmem_prepare_split_page(gm, c, index);
		if (!r && fatal_signal_pending(current))
			r = -EINTR;
	}

	/* See hugetlb_split_merge().  Guests would have to wait for it in commit. */
	if (!r && c->need_grace_period)
		synchronize_rcu_expedited();
	if (r)
		guestmem_abort(gm, c);

	return r;
}

/* &guestmem_allocator_operations.prepare_split */
int guestmem_split_prepare_split(struct guestmem_allocator *gm, struct guestmem_change *c,
				 pgoff_t start, pgoff_t end)
{
	return guestmem_prepare(gm, c, start, end, false);
}

/* &guestmem_allocator_operations.prepare_merge */
int guestmem_split_prepare_merge(struct guestmem_allocator *gm, struct guestmem_change *c,
				 pgoff_t start, pgoff_t end)
{
	return guestmem_prepare(gm, c, start, end, true);
}

/* Merge the huge page unless there is an error since its folios were frozen. */
static void guestmem_merge_whole(struct guestmem_allocator *gm, struct hugetlb_split *split)
{
	pgoff_t index = split->change.index, end = index + (1UL << gm->order);

	if (guestmem_range_has_poison(split, index, end)) {
		split->change.is_merge = false;
		return;
	}

	trace_guestmem_merge(gm->mapping->host, index,
			     gm->part_order < gm->order ? gm->part_order : 0, gm->order);
	hugetlb_split_merge(split);
}

/* Split or merge the part at @index if it is frozen. */
static void guestmem_commit_part(struct guestmem_allocator *gm, struct guestmem_change *c,
				 struct hugetlb_split *split, pgoff_t index)
{
	pgoff_t end = index + guestmem_part_size(gm);

	if (!guestmem_is_placeholder(gm->mapping, index))
		return;

	if (!c->is_merge) {
		guestmem_commit_folio(c, split, index, end);
		guestmem_split_part(gm, split, index);
	} else if (!guestmem_range_has_poison(split, index, end)) {
		trace_guestmem_merge(gm->mapping->host, index, 0, gm->part_order);
		hugetlb_split_merge_part(split, guestmem_page(split, index));
	}
}

/* Split or merge the folios of a huge page. */
static void guestmem_commit_page(struct guestmem_allocator *gm, struct guestmem_change *c,
				 struct hugetlb_split *split)
{
	pgoff_t size = guestmem_part_size(gm), i;

	if (split->change.is_first) {
		guestmem_split_whole(gm, split, c);
	} else if (split->change.is_merge) {
		guestmem_merge_whole(gm, split);
	} else {
		for (i = split->change.start; i < split->change.end; i += size)
			guestmem_commit_part(gm, c, split, i);
	}
}

/* Insert the folios of a huge page that have been split or merged. */
static void guestmem_insert_page(struct guestmem_allocator *gm, struct guestmem_change *c,
				 struct hugetlb_split *split)
{
	pgoff_t index = split->change.index, size = guestmem_part_size(gm), i;

	if (split->change.is_merge) {
		guestmem_merge_placeholders(gm, index);
		guestmem_xas_store(&split->change.store, filemap_placeholder());
		guestmem_insert(gm->mapping, index, hugetlb_split_finish_merge(split));
		return;
	}

	xas_destroy(&split->change.store);
	if (split->change.is_first) {
		split->change.is_first = false;
		guestmem_insert_range(gm, split, index, index + (1UL << gm->order));
		return;
	}

	for (i = split->change.start; i < split->change.end; i += size) {
		if (guestmem_is_placeholder(gm->mapping, i))
			guestmem_insert_range(gm, split, i, i + size);
	}
}

/* &guestmem_allocator_operations.commit */
void guestmem_split_commit(struct guestmem_allocator *gm, struct guestmem_change *c)
{
	struct hugetlb_split *split, *next;

	lockdep_assert_held(gm->change_lock);

	list_for_each_entry(split, &c->splits, change.node) {
		guestmem_commit_page(gm, c, split);
		cond_resched();
	}

	hugetlb_split_flush(&c->splits);

	list_for_each_entry_safe(split, next, &c->splits, change.node) {
		list_del(&split->change.node);
		guestmem_insert_page(gm, c, split);
		cond_resched();
	}
}

#include "tests/guestmem_split_kunit.h"
