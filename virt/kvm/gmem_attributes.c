// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which pages of a guest_memfd file are private, and which are shared
 */

/**
 * DOC: attributes of guest_memfd pages
 *
 * The attributes are those of the memory, not of the places where VMs see it, so
 * they are kept with the inode and found by page index.  Guests convert memory
 * in ranges, most of it once and for good, so ranges are what is stored.
 *
 * Two rules keep the number of ranges what it must be and lookups simple:
 *
 * - every index of the file belongs to exactly one range, from the beginning;
 * - two ranges that touch have different attributes.
 *
 * So the range that an index is in tells at once how far its attributes hold.
 *
 * The mapping's invalidate_lock protects the tree: it is held exclusively from
 * gmem_attributes_prepare() to the commit or abort that follows, so that what was
 * prepared still fits.  Lookups need no more than RCU, and then tell what was true
 * at some time during the call.  Whoever needs to know more holds the lock, or
 * looks at mmu_invalidate_seq afterward, as vCPU faults do.
 */
#include <linux/kvm.h>
#include <linux/kvm_types.h>
#include <linux/rcupdate.h>
#include <linux/rwsem.h>
#include <linux/xarray.h>

#include "gmem_attributes.h"

/* An entry for no attributes at all must not look like no entry. */
static void *attributes_to_entry(u64 attributes)
{
	return xa_mk_value(attributes);
}

static u64 entry_to_attributes(void *entry)
{
	return xa_to_value(entry);
}

/**
 * gmem_attributes_init - Give all pages of a new file the same attributes
 * @ga: what to initialize
 * @lock: protects @ga, normally the invalidate_lock of the file's mapping
 * @nr_pages: size of the file, at least 1
 * @attributes: KVM_MEMORY_ATTRIBUTE_* of all pages
 *
 * Context: May sleep.  Nobody else knows @ga yet.  @lock is taken.
 * Return: 0, or -ENOMEM, and then there is nothing to destroy.
 */
int gmem_attributes_init(struct gmem_attributes *ga, struct rw_semaphore *lock,
			 pgoff_t nr_pages, u64 attributes)
{
	MA_STATE(mas, &ga->tree, 0, nr_pages - 1);
	int r;

	ga->nr_pages = nr_pages;
	mt_init_flags(&ga->tree, MT_FLAGS_LOCK_EXTERN | MT_FLAGS_USE_RCU);
	mt_set_external_lock(&ga->tree, lock);

	down_write(lock);
	r = mas_store_gfp(&mas, attributes_to_entry(attributes),
			  GFP_KERNEL_ACCOUNT);
	up_write(lock);

	return r;
}

/**
 * gmem_attributes_destroy - Free what a file's attributes take
 * @ga: attributes of a file that is going away; zeroed memory is fine
 *
 * Context: Any that may free memory.  Nobody else knows @ga any more.
 */
void gmem_attributes_destroy(struct gmem_attributes *ga)
{
	if (!ga->nr_pages)
		return;

	/* The lock goes away with the inode, and there is nobody to exclude. */
	mt_on_stack(ga->tree);
	__mt_destroy(&ga->tree);
}

/**
 * gmem_attributes_get - Look up the attributes of a page, and how far they hold
 * @ga: attributes of the file
 * @index: page of the file
 *
 * Context: Any.  See the top of this file for what the answer is worth.
 * Return: The largest range around @index that has the same attributes.
 */
struct gmem_attributes_range gmem_attributes_get(struct gmem_attributes *ga,
						 pgoff_t index)
{
	MA_STATE(mas, &ga->tree, index, index);
	struct gmem_attributes_range range;
	void *entry;

	guard(rcu)();

	entry = mas_walk(&mas);
	range = (struct gmem_attributes_range) {
		.first = mas.index,
		.last = mas.last,
		.attributes = entry_to_attributes(entry),
	};
	/* What the file does not have is nothing for the host. */
	if (WARN_ON_ONCE(!entry))
		range.attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;

	return range;
}

/**
 * gmem_attributes_are - Tell whether all pages of a range have these attributes
 * @ga: attributes of the file
 * @start: index of the first page
 * @end: index after the last page
 * @attributes: KVM_MEMORY_ATTRIBUTE_*
 *
 * Context: Any.  See the top of this file for what the answer is worth.
 */
bool gmem_attributes_are(struct gmem_attributes *ga, pgoff_t start, pgoff_t end,
			 u64 attributes)
{
	struct gmem_attributes_range range = gmem_attributes_get(ga, start);

	return range.attributes == attributes && range.last >= end - 1;
}

/**
 * gmem_attributes_prepare - Get everything that a change of attributes needs
 * @ga: attributes of the file
 * @change: set to what has to be committed or aborted
 * @start: index of the first page
 * @end: index after the last page; not after the end of the file
 * @attributes: KVM_MEMORY_ATTRIBUTE_* that the pages shall have
 * @gfp: for the memory that the change needs
 *
 * Ranges on both sides that have the same attributes become part of what is
 * stored, so that all of it is one range afterward.
 *
 * Context: May sleep if @gfp allows it.  The lock is held exclusively until the
 *	    change is committed or aborted, and there is one change at a time.
 * Return: 0, -EALREADY if there is nothing to change, or -ENOMEM.  After an error
 *	   nothing has changed and @change is not to be used.
 */
int gmem_attributes_prepare(struct gmem_attributes *ga,
			    struct gmem_attributes_change *change,
			    pgoff_t start, pgoff_t end, u64 attributes, gfp_t gfp)
{
	MA_STATE(mas, &ga->tree, start, start);
	pgoff_t first = start, last = end - 1;
	void *found, *entry = attributes_to_entry(attributes);
	struct ma_state before;

	if (WARN_ON_ONCE(start >= end || end > ga->nr_pages))
		return -EINVAL;

	/* To walk down is what takes long, to go on from there does not. */
	found = mas_walk(&mas);
	if (found == entry && mas.last >= last)
		return -EALREADY;

	if (found == entry) {
		first = mas.index;
	} else if (mas.index == start && start) {
		before = mas;
		if (mas_prev(&before, 0) == entry)
			first = before.index;
	}

	if (mas.last < last) {
		mas_set(&mas, last);
		found = mas_walk(&mas);
	}
	if (found != entry && mas.last == last && last < ga->nr_pages - 1)
		found = mas_next(&mas, ga->nr_pages - 1);
	if (found == entry)
		last = mas.last;

	change->attributes = attributes;
	mas_init(&change->mas, &ga->tree, 0);
	mas_set_range(&change->mas, first, last);
	return mas_preallocate(&change->mas, entry, gfp);
}

/**
 * gmem_attributes_commit - Make a prepared change
 * @change: from gmem_attributes_prepare(), not to be used any more
 *
 * Context: The lock has been held exclusively since @change was prepared.
 */
void gmem_attributes_commit(struct gmem_attributes_change *change)
{
	mas_store_prealloc(&change->mas, attributes_to_entry(change->attributes));
}

/**
 * gmem_attributes_abort - Drop a prepared change
 * @change: from gmem_attributes_prepare(), not to be used any more
 *
 * Context: As for gmem_attributes_commit().
 */
void gmem_attributes_abort(struct gmem_attributes_change *change)
{
	mas_destroy(&change->mas);
}
