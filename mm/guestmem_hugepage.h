/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _MM_GUESTMEM_HUGEPAGE_H
#define _MM_GUESTMEM_HUGEPAGE_H

#include <linux/atomic.h>
#include <linux/hugetlb.h>
#include <linux/list.h>
#include <linux/mm_types.h>
#include <linux/workqueue.h>

/**
 * struct guestmem_hugepage - a HugeTLB page that is in parts
 * @folio: what the page's folio was, and what it is going to be again
 * @page: first page
 * @h: pool that the page belongs to
 * @part_order: order of the parts that it is taken apart into first, can be its own
 * @is_mappable: whether userspace can map the parts
 * @optimized: whether its vmemmap was optimized, and is for parts that can have that
 * @vmemmap_pages: pages that have been prepared for a change, or that it has left over
 * @nr_out: how many pages are in folios that somebody may have a reference to; plus one
 *	    as long as somebody puts pages away
 * @free_work: puts the page together and frees it
 * @index: where it is in its file
 * @node: in &guestmem_change.list, or among those that are about to be freed
 * @is_new: the page is still whole, and about to be taken apart
 * @is_merging: all of it is about to be put together
 * @root: node of the page cache that this needs, and that the page cache has not, or NULL
 *
 * @folio is not a page.  It stands for one in the pool's list of pages that are in
 * use, so that a hugetlb cgroup that goes away finds what is charged to it.
 */
struct guestmem_hugepage {
	struct folio folio;
	struct page *page;
	struct hstate *h;
	unsigned int part_order;
	bool is_mappable;
	bool optimized;
	struct list_head vmemmap_pages;
	atomic_long_t nr_out;
	struct work_struct free_work;
	pgoff_t index;
	struct list_head node;
	bool is_new;
	bool is_merging;
	struct xa_node *root;
};

struct guestmem_hugepage *guestmem_hugepage_prepare(struct folio *folio,
						    unsigned int part_order,
						    bool is_mappable);
void guestmem_hugepage_abort(struct guestmem_hugepage *hp);
void guestmem_hugepage_split(struct guestmem_hugepage *hp);
int guestmem_hugepage_prepare_part(struct guestmem_hugepage *hp, struct page *page);
void guestmem_hugepage_split_part(struct guestmem_hugepage *hp, struct page *page);
void guestmem_hugepage_merge_part(struct guestmem_hugepage *hp, struct page *page);
struct folio *guestmem_hugepage_merge(struct guestmem_hugepage *hp);
void guestmem_clear_mlocked(struct folio *folio);
void guestmem_hugepage_release(struct guestmem_hugepage *hp, struct list_head *list);
void guestmem_hugepages_free(struct list_head *list);
unsigned long guestmem_hugepages_waiting(struct hstate *h);

#endif /* _MM_GUESTMEM_HUGEPAGE_H */
