/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Splitting and merging of HugeTLB folios
 */
#ifndef _MM_HUGETLB_SPLIT_H
#define _MM_HUGETLB_SPLIT_H

#include <linux/atomic.h>
#include <linux/hugetlb.h>
#include <linux/list.h>
#include <linux/llist.h>
#include <linux/mm_types.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

/**
 * struct hugetlb_split_change - state of one change of a split huge page
 * @node: entry in the owner's list of changes, or in a list for hugetlb_split_free_list()
 * @index: index of the huge page in the owner's file, in base pages
 * @start: first page of the first part that the change is about, in base pages
 * @end: end of the pages that the change is about, in base pages
 * @is_first: the huge page is still whole, and this change splits it
 * @is_merge: this change merges all of the huge page
 * @store: how to store the merged folio in the owner's page cache, with the memory for it
 * @vmemmap_pages: vmemmap pages that have been allocated for the change or are left over
 * @need_flush: TLBs have to be flushed, see hugetlb_split_flush()
 *
 * The owner of the huge page makes one change at a time, and protects these fields.
 */
struct hugetlb_split_change {
	struct list_head node;
	pgoff_t index;
	pgoff_t start;
	pgoff_t end;
	bool is_first;
	bool is_merge;
	struct xa_state store;
	struct list_head vmemmap_pages;
	bool need_flush;
};

/**
 * struct hugetlb_split - a HugeTLB page that is split
 * @page: first page
 * @h: hstate that the page belongs to
 * @part_order: order of the parts that the page is split into first
 * @is_mappable: the parts have a struct page for each page, so that userspace can map them
 * @optimized: the vmemmap of the whole was optimized, and that of private parts is
 * @flags: HPG_* flags of the HugeTLB folio
 * @subpool: subpool of the HugeTLB folio
 * @cgroup: hugetlb cgroup that the page is charged to
 * @cgroup_rsvd: hugetlb cgroup that the reservation of the page is charged to
 * @memcg_data: memory cgroup that the page is charged to
 * @hwpoison: some page has a memory error
 * @raw_hwp_list: the pages with errors, see raw_hwp_list_head()
 * @nr_out: number of base pages in folios that left their file but have references,
 *	    plus one until hugetlb_split_release()
 * @free_work: merges and frees the page
 * @change: state of the change in progress
 *
 * A split exists from hugetlb_split_prepare() to hugetlb_split_abort(), or from
 * hugetlb_split_commit() to hugetlb_split_finish_merge().  In the latter period it holds the
 * state of the HugeTLB folio, which hugetlb_lock protects: @flags to @raw_hwp_list.
 */
struct hugetlb_split {
	struct page *page;
	struct hstate *h;
	unsigned int part_order;
	bool is_mappable;
	bool optimized;

	unsigned long flags;
	struct hugepage_subpool *subpool;
	struct hugetlb_cgroup *cgroup;
	struct hugetlb_cgroup *cgroup_rsvd;
#ifdef CONFIG_MEMCG
	unsigned long memcg_data;
#endif
	bool hwpoison;
	struct llist_head raw_hwp_list;

	atomic_long_t nr_out;
	struct work_struct free_work;

	struct hugetlb_split_change change;
};

#ifdef CONFIG_HUGETLB_SPLIT
struct hugetlb_split *hugetlb_split_prepare(struct folio *folio, unsigned int part_order,
					    bool is_mappable);
void hugetlb_split_abort(struct hugetlb_split *split);
void hugetlb_split_commit(struct hugetlb_split *split);
int hugetlb_split_prepare_part(struct hugetlb_split *split, struct page *page);
void hugetlb_split_part(struct hugetlb_split *split, struct page *page);
void hugetlb_split_merge_part(struct hugetlb_split *split, struct page *page);
void hugetlb_split_merge(struct hugetlb_split *split);
void hugetlb_split_flush(struct list_head *list);
struct folio *hugetlb_split_finish_merge(struct hugetlb_split *split);
void hugetlb_split_clear_mlocked(struct folio *folio);
void hugetlb_split_release(struct hugetlb_split *split, struct list_head *list);
void hugetlb_split_free_list(struct list_head *list);

struct hugetlb_split *hugetlb_split_find(struct page *page);
#endif /* CONFIG_HUGETLB_SPLIT */

#if defined(CONFIG_HUGETLB_SPLIT) && defined(CONFIG_MEMORY_FAILURE)
void hugetlb_split_mark_poisoned(struct hugetlb_split *split, struct page *page,
				 unsigned long nr_pages);
bool hugetlb_split_has_poison(struct hugetlb_split *split, struct page *page,
			      unsigned long nr_pages);
#else
static inline void hugetlb_split_mark_poisoned(struct hugetlb_split *split,
					       struct page *page, unsigned long nr_pages)
{
}

static inline bool hugetlb_split_has_poison(struct hugetlb_split *split,
					    struct page *page, unsigned long nr_pages)
{
	return false;
}
#endif

#endif /* _MM_HUGETLB_SPLIT_H */
