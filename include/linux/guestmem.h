/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Allocators of guest_memfd memory
 *
 * A guest_memfd file picks an allocator when it is created and keeps it for life.  The
 * allocator reserves memory, hands it out folio by folio, and takes it back.
 */
#ifndef _LINUX_GUESTMEM_H
#define _LINUX_GUESTMEM_H

#include <linux/err.h>
#include <linux/list.h>
#include <linux/types.h>

struct address_space;
struct folio;
struct guestmem_allocator_operations;
struct mutex;
struct page;
struct shared_policy;

/**
 * struct guestmem_allocator - the memory of one guest_memfd file
 * @ops: operations of the allocator
 * @mapping: page cache of the file, which holds every folio that is allocated
 * @policy: NUMA policies that userspace set for ranges of the file
 * @change_lock: held by the caller of an operation that changes a range of the file
 * @order: the page size of the file is PAGE_SIZE << @order
 * @is_mappable: userspace can map all of the file, and that cannot change
 * @may_be_large: tells whether a folio may cover [start, end); NULL if the attributes of
 *		  the file cannot change
 * @part_order: order of the folios that a page of the file is split into first
 * @private: state of the allocator
 *
 * Embedded in the inode of the file.  The allocator sets @part_order and @private in
 * &guestmem_allocator_operations.reserve, the file sets everything else before.  Neither
 * changes later.
 */
struct guestmem_allocator {
	const struct guestmem_allocator_operations *ops;
	struct address_space *mapping;
	struct shared_policy *policy;
	struct mutex *change_lock;	/* see above */
	unsigned int order;
	bool is_mappable;
	bool (*may_be_large)(struct guestmem_allocator *gm, pgoff_t start, pgoff_t end);
	unsigned int part_order;
	void *private;
};

/**
 * struct guestmem_change - a change of the folios of a file
 * @wait: waits for references to go; returns false when the time for that is used up
 * @prepare_folio: called for each folio that splits, while it can be found; optional.  May
 *		   sleep and allocate.  An error fails the preparation.
 * @commit_folio: called by the commit for the pages of the range in each folio that
 *		  splits, while that is still one folio; optional
 * @busy: index of a page that is referenced, if preparation fails with -EAGAIN
 *
 * The caller provides the functions.  The remaining fields belong to the allocator.
 */
struct guestmem_change {
	bool (*wait)(struct guestmem_change *change);
	int (*prepare_folio)(struct guestmem_change *change, struct folio *folio);
	void (*commit_folio)(struct guestmem_change *change, struct page *page,
			     unsigned long nr_pages);
	pgoff_t busy;

	/* private: */
	pgoff_t start;
	pgoff_t end;
	bool is_merge;
	bool need_grace_period;
	struct list_head splits;
};

/**
 * struct guestmem_allocator_operations - operations of an allocator
 *
 * All operations but @max_order may sleep.  An operation can be NULL if an allocator has
 * nothing to do for it, @allocate and @free excepted.
 *
 * @free, @prepare_split, @prepare_merge and @commit change a range of the file.  Their
 * caller holds &guestmem_allocator.change_lock and excludes @allocate in all pages of the
 * file that the range is in.  The rest of the file can be allocated meanwhile.
 *
 * Two callers of @allocate for the same page get the same folio, and neither fails because
 * of the other.  This needs a rule for callers of @allocate: drop the reference before the
 * folio lock.  The page cache keeps the folio alive until then, and the next holder of
 * the lock, which may free the memory, finds no stray reference.
 *
 * Lock order::
 *
 *	&guestmem_allocator.change_lock, or a lock that excludes changes of the page
 *	  mutex of the allocator for a page of the file
 *	    folio lock
 */
struct guestmem_allocator_operations {
	/**
	 * @reserve: Reserve memory for a file of @size bytes.
	 *
	 * Called once, before any other operation.  Charges the calling task if the
	 * allocator charges reservations.
	 *
	 * Return: 0, -EINVAL if there are no pages of this order or @size is not a
	 * multiple of their size, or -ENOMEM if the memory cannot be reserved.  On
	 * error nothing is reserved or charged.
	 */
	int (*reserve)(struct guestmem_allocator *gm, loff_t size);

	/**
	 * @unreserve: Undo @reserve when the file goes away.
	 *
	 * Called once, after @free of the whole file.  A folio with references goes
	 * back when the last reference is dropped, possibly long after @gm and the
	 * caller's module are gone.
	 */
	void (*unreserve)(struct guestmem_allocator *gm);

	/**
	 * @allocate: Get the folio for the page at @index of the file.
	 *
	 * Zeroing a huge page takes long, and ends early if there is a signal that ends a
	 * sleep in @state.  The next call for the page continues where this one stopped.
	 *
	 * Looks up the folio, or else allocates it according to @policy or the policy
	 * of the calling task, and adds it to @mapping.
	 *
	 * A folio of more than one page is uptodate and was zeroed before it could be
	 * found.  A single page that is not uptodate has stale contents: the caller has
	 * to clear or overwrite all of it.
	 *
	 * Context: The caller excludes changes of the page.
	 *
	 * Return: The folio, locked and with a reference, or an ERR_PTR(): -ENOMEM or
	 * -ENOSPC if there is no memory, -EINTR, or an error of the page cache.  On error the
	 * page at @index is unchanged.
	 */
	struct folio *(*allocate)(struct guestmem_allocator *gm, pgoff_t index,
				  unsigned int state);

	/**
	 * @free: Remove the pages in [@start, @end) from the file.
	 *
	 * Both are multiples of the page size of the file, and no page is mapped into a
	 * guest.  A folio with references leaves the file now, and goes back when they
	 * are dropped.  Memory that goes back before @unreserve is reserved for the file
	 * again.
	 *
	 * Context: The caller makes a change, or evicts the inode.
	 */
	void (*free)(struct guestmem_allocator *gm, pgoff_t start, pgoff_t end);

	/**
	 * @max_order: Return the order of the largest block that one mapping can cover.
	 *
	 * The block is naturally aligned and includes @folio.  A page of the file is
	 * physically contiguous and aligned, so memory errors alone limit the order.  If
	 * NULL, the order is 0.
	 *
	 * Context: Atomic with interrupts enabled.  The caller holds a reference to
	 * @folio, or its lock.
	 */
	unsigned int (*max_order)(struct guestmem_allocator *gm, struct folio *folio);

	/**
	 * @prepare_split: Prepare to split [@start, @end) into single pages.
	 *
	 * The rest of a page of the file becomes folios of @part_order where [@start,
	 * @end) allows it.
	 *
	 * The folios that change are frozen and cannot be found until @commit.  So the
	 * caller prepares everything else before, and always calls @commit after success.
	 *
	 * Context: The caller makes a change, which includes @commit.
	 *
	 * Return: 0, -ENOMEM, -EINTR if the task is being killed, or -EAGAIN if the
	 * folio at @change->busy has a reference.  On error the folios are as before.
	 */
	int (*prepare_split)(struct guestmem_allocator *gm, struct guestmem_change *change,
			     pgoff_t start, pgoff_t end);

	/**
	 * @prepare_merge: Prepare to merge the folios in [@start, @end).
	 *
	 * Both are multiples of the page size of the file.  A page of the file is merged
	 * if @may_be_large allows that, else each part of @part_order for which it does.
	 * Folios with memory errors stay as they are.
	 *
	 * Context: As for @prepare_split.  No page that can be merged is mapped to
	 * userspace.
	 *
	 * Return: As for @prepare_split.
	 */
	int (*prepare_merge)(struct guestmem_allocator *gm, struct guestmem_change *change,
			     pgoff_t start, pgoff_t end);

	/**
	 * @commit: Make a prepared change.
	 *
	 * Nothing that is split is mapped into a guest.  Needs no memory.
	 */
	void (*commit)(struct guestmem_allocator *gm, struct guestmem_change *change);
};

#ifdef CONFIG_GUESTMEM_HUGETLB
unsigned long guestmem_hugetlb_orders(void);
const struct guestmem_allocator_operations *
guestmem_hugetlb_find(unsigned int size_log2, unsigned int *order);
#else
static inline unsigned long guestmem_hugetlb_orders(void)
{
	return 0;
}

static inline const struct guestmem_allocator_operations *
guestmem_hugetlb_find(unsigned int size_log2, unsigned int *order)
{
	return ERR_PTR(-EINVAL);
}
#endif /* CONFIG_GUESTMEM_HUGETLB */

#endif /* _LINUX_GUESTMEM_H */
