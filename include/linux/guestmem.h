/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where guest_memfd files get their memory from
 *
 * A guest_memfd file does not care what its memory is made of.  It asks an
 * allocator, which it picks when it is created and keeps for life, to set
 * memory aside, to hand it out folio by folio, and to take it back.
 */
#ifndef _LINUX_GUESTMEM_H
#define _LINUX_GUESTMEM_H

#include <linux/err.h>
#include <linux/list.h>
#include <linux/types.h>

struct address_space;
struct folio;
struct guestmem_allocator_operations;
struct shared_policy;

/**
 * struct guestmem_allocator - the memory of one guest_memfd file
 * @ops: how to get and give back memory
 * @mapping: the file's page cache, where every folio lives that has been
 *	     allocated and not been freed
 * @policy: the NUMA policies that userspace has set for parts of the file
 * @order: page size of the file, PAGE_SIZE << @order
 * @is_mappable: whether userspace can map the memory of a file that has no @is_private
 * @is_private: tells whether all pages from @start up to, not including, @end are
 *		private, which is true if there are none; NULL if that cannot change
 * @private: state of the allocator
 *
 * Embedded in the file's inode.  The file sets everything but @private before
 * &guestmem_allocator_operations.reserve and does not change it later.
 */
struct guestmem_allocator {
	const struct guestmem_allocator_operations *ops;
	struct address_space *mapping;
	struct shared_policy *policy;
	unsigned int order;
	bool is_mappable;
	bool (*is_private)(struct guestmem_allocator *gm, pgoff_t start, pgoff_t end);
	void *private;
};

/**
 * struct guestmem_change - pages of a file becoming private or shared
 * @start: index of the first page
 * @end: index after the last page
 * @private: whether they become private
 * @wait: waits a little for references to go; false if that has been done long enough
 * @error: index of the page that is to blame if that fails
 * @list: what the allocator is going to change
 * @merges: whether it is going to put folios together that are optimized then
 */
struct guestmem_change {
	pgoff_t start;
	pgoff_t end;
	bool private;
	bool (*wait)(struct guestmem_change *change);
	pgoff_t error;
	struct list_head list;
	bool merges;
};

/**
 * struct guestmem_allocator_operations - one kind of memory
 *
 * All operations may sleep, and all of them must be implemented.
 *
 * Lookups of a page that is being added or removed wait for that to be over:
 * two callers of @allocate for the same page get the same folio, and neither
 * fails because of the other.  For that to work, whoever has got a folio from
 * @allocate and wants to be rid of it drops the reference first and the folio
 * lock second.  The page cache keeps the folio alive meanwhile, and whoever gets
 * the lock next, be it to free the memory, finds no stray reference.
 *
 * Locks nest in this order::
 *
 *	filemap_invalidate_lock(@mapping), if the caller holds it
 *	  lock of the allocator, e.g. hugetlb_fault_mutex_table[]
 *	    folio lock
 */
struct guestmem_allocator_operations {
	/**
	 * @reserve: Set aside the memory for a file of @size bytes.
	 *
	 * Called once, before anything else.  Charges to the calling task
	 * what the allocator charges at reservation.
	 *
	 * Return: 0, or -EINVAL if the allocator has no pages of this order or
	 * @size is not a multiple of their size, or -ENOMEM if it cannot set
	 * aside that much.  After an error nothing is reserved or charged.
	 */
	int (*reserve)(struct guestmem_allocator *gm, loff_t size);

	/**
	 * @unreserve: Undo @reserve when the file is gone.
	 *
	 * Called once, after @free of the whole file.  Folios that others still
	 * hold references to go back when the last reference is dropped, which
	 * may be long after @gm and the caller's module.
	 */
	void (*unreserve)(struct guestmem_allocator *gm);

	/**
	 * @allocate: Get the folio for the page at @index of the file.
	 *
	 * Looks the folio up, or allocates it according to @policy or else
	 * the policy of the calling task, and adds it to @mapping.
	 *
	 * A folio of more than one page is up to date: all of it was zeroed
	 * before anyone could find it.  A single page may have stale contents
	 * as long as it is not up to date, so the caller has to clear it or
	 * to overwrite it in full.
	 *
	 * Return: The folio, locked and with a reference, or an ERR_PTR():
	 * -ENOMEM or -ENOSPC if there is no memory, or another error from
	 * adding to the page cache.  After an error the page at @index is as
	 * it was.
	 */
	struct folio *(*allocate)(struct guestmem_allocator *gm, pgoff_t index);

	/**
	 * @free: Remove the pages from @start up to, not including, @end.
	 *
	 * Both are multiples of the file's page size.  Nothing may be mapped
	 * into a guest any more.  Memory that is still referenced by others
	 * leaves the file now and goes back when they let go of it.  Unless
	 * @unreserve has been called, memory that goes back is reserved for
	 * the file again.
	 *
	 * Context: The caller holds filemap_invalidate_lock() exclusively, or
	 * the file is going away.
	 */
	void (*free)(struct guestmem_allocator *gm, pgoff_t start, pgoff_t end);

	/**
	 * @max_order: Tell how much memory around a folio can be mapped at once.
	 *
	 * A page of the file is contiguous and naturally aligned in memory, so
	 * that is a matter of memory errors alone.
	 *
	 * Context: May be atomic, but not with interrupts disabled.  The caller has
	 * a reference to @folio, or its lock.
	 * Return: The order of a naturally aligned block that @folio lies in,
	 * at least that of @folio.
	 */
	unsigned int (*max_order)(struct guestmem_allocator *gm,
				  struct folio *folio);

	/**
	 * @prepare: Get ready to split and merge folios, as @change demands.
	 *
	 * What is private and what is shared decides what folios there are: a
	 * page of the file is one folio if it is wholly private.  Otherwise each
	 * part of PMD_ORDER that is wholly private is one, and all else are
	 * single pages.  What has memory errors is not put together.
	 *
	 * Pages that become private are mapped by nobody.  Until @commit or
	 * @abort nobody finds the folios that are going to change.
	 *
	 * Context: The caller holds filemap_invalidate_lock() exclusively until
	 * @commit or @abort.
	 * Return: 0, or -ENOMEM, or -EINTR if the task is being killed, or
	 * -EAGAIN if somebody has a reference to a folio.  After an error all is
	 * as it was, and there is nothing to abort.
	 */
	int (*prepare)(struct guestmem_allocator *gm, struct guestmem_change *change);

	/**
	 * @commit: Split and merge folios.
	 *
	 * Nothing that is going to be split may be mapped into a guest.  Needs
	 * no memory.
	 *
	 * Context: May sleep.
	 */
	void (*commit)(struct guestmem_allocator *gm, struct guestmem_change *change);

	/** @abort: Leave folios as they are. */
	void (*abort)(struct guestmem_allocator *gm, struct guestmem_change *change);
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
