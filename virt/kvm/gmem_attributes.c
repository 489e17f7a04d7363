// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tracking of private and shared pages of guest_memfd files
 */

/**
 * DOC: attributes of guest_memfd pages
 *
 * Attributes belong to the memory, not to its mappings into VMs.  They are
 * stored with the inode, by page index.  Guests convert memory in ranges, and
 * most of it only once, so the tree stores ranges.
 *
 * Two rules keep the number of ranges minimal and lookups simple:
 *
 * - every index of the file is in exactly one range at all times;
 * - adjacent ranges have different attributes.
 *
 * A lookup of one index thus also returns how far its attributes extend.
 *
 * The file's change_lock protects the tree.  It is held from
 * kvm_gmem_attributes_prepare() to the commit or abort, so that the prepared
 * change still fits.  A lookup needs RCU only, and then returns the state at
 * some point during the call.  A caller that needs a stable result holds the
 * lock, locks the page by kvm_gmem_range_lock(), or checks mmu_invalidate_seq
 * afterward.
 */
#include <linux/kvm.h>
#include <linux/kvm_types.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/xarray.h>

#include "gmem_attributes.h"

/* Store a value entry: attributes of 0 must differ from an absent entry. */
static void *kvm_gmem_to_entry(u64 attributes)
{
	return xa_mk_value(attributes);
}

static u64 kvm_gmem_from_entry(void *entry)
{
	return xa_to_value(entry);
}

/*
 * Initialize the attributes of a new file.
 * @ga: attributes to initialize
 * @lock: protects @ga, normally the change_lock of the file
 * @nr_pages: size of the file, at least 1
 * @attributes: KVM_MEMORY_ATTRIBUTE_* of all pages
 *
 * Context: May sleep, takes @lock.  No other task can access @ga yet.
 * Return: 0 or -ENOMEM.  On error there is nothing to destroy.
 */
int kvm_gmem_attributes_init(struct gmem_attributes *ga, struct mutex *lock,
			     pgoff_t nr_pages, u64 attributes)
{
	MA_STATE(mas, &ga->tree, 0, nr_pages - 1);
	int r;

	ga->nr_pages = nr_pages;
	mt_init_flags(&ga->tree, MT_FLAGS_LOCK_EXTERN | MT_FLAGS_USE_RCU);
	mt_set_external_lock(&ga->tree, lock);

	mutex_lock(lock);
	r = mas_store_gfp(&mas, kvm_gmem_to_entry(attributes),
			  GFP_KERNEL_ACCOUNT);
	mutex_unlock(lock);

	return r;
}

/*
 * Free the attributes of a file.
 * @ga: attributes to free, or zeroed memory
 *
 * Context: Any that may free memory.  No other task can access @ga any more.
 */
void kvm_gmem_attributes_destroy(struct gmem_attributes *ga)
{
	if (!ga->nr_pages)
		return;

	/* No other task can access the tree: do not require the lock. */
	mt_on_stack(ga->tree);
	__mt_destroy(&ga->tree);
}

/*
 * Look up the attributes of a page and their range.
 * @ga: attributes of the file
 * @index: page of the file
 *
 * Context: Any.  See the top of this file for the validity of the result.
 * Return: The largest range around @index that has the same attributes.
 */
struct gmem_attributes_range kvm_gmem_attributes_get(struct gmem_attributes *ga,
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
		.attributes = kvm_gmem_from_entry(entry),
	};
	/* Treat an index beyond the file as private: the host has no access. */
	if (WARN_ON_ONCE(!entry))
		range.attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;

	return range;
}

/*
 * Check whether all pages of a range have @attributes.
 * @ga: attributes of the file
 * @start: index of the first page
 * @end: index after the last page
 * @attributes: KVM_MEMORY_ATTRIBUTE_*
 *
 * Context: Any.  See the top of this file for the validity of the result.
 */
bool kvm_gmem_attributes_are(struct gmem_attributes *ga, pgoff_t start, pgoff_t end,
			     u64 attributes)
{
	struct gmem_attributes_range range = kvm_gmem_attributes_get(ga, start);

	return range.attributes == attributes && range.last >= end - 1;
}

/*
 * Allocate the memory for a change of attributes.
 * @ga: attributes of the file
 * @mas: state of the change until it is committed or aborted
 * @start: index of the first page
 * @end: index after the last page; not after the end of the file
 * @attributes: new KVM_MEMORY_ATTRIBUTE_* of the pages
 * @gfp: flags for the allocation
 *
 * The change merges neighboring ranges that have the same attributes:
 * @mas->index to @mas->last is the range that has @attributes after the commit.
 *
 * Context: May sleep if @gfp allows it.  The caller holds the lock until it
 *	    commits or aborts the change, and makes one change at a time.
 * Return: 0, -EALREADY if there is nothing to change, or -ENOMEM.  On error
 *	   nothing has changed and there is nothing to abort.
 */
int kvm_gmem_attributes_prepare(struct gmem_attributes *ga, struct ma_state *mas,
				pgoff_t start, pgoff_t end, u64 attributes, gfp_t gfp)
{
	pgoff_t first = start, last = end - 1;
	void *found, *entry = kvm_gmem_to_entry(attributes);
	struct ma_state before;

	lockdep_assert(mt_write_lock_is_held(&ga->tree));

	if (WARN_ON_ONCE(start >= end || end > ga->nr_pages))
		return -EINVAL;

	mas_init(mas, &ga->tree, start);

	/* A walk is expensive: reach the neighbors from where it ends. */
	found = mas_walk(mas);
	if (found == entry && mas->last >= last)
		return -EALREADY;

	if (found == entry) {
		first = mas->index;
	} else if (mas->index == start && start) {
		before = *mas;
		if (mas_prev(&before, 0) == entry)
			first = before.index;
	}

	if (mas->last < last) {
		mas_set(mas, last);
		found = mas_walk(mas);
	}
	if (found != entry && mas->last == last && last < ga->nr_pages - 1)
		found = mas_next(mas, ga->nr_pages - 1);
	if (found == entry)
		last = mas->last;

	/* Most changes are inside of the range that the walk has found. */
	if (mas->index <= first && last <= mas->last)
		__mas_set_range(mas, first, last);
	else
		mas_set_range(mas, first, last);
	return mas_preallocate(mas, entry, gfp);
}

/*
 * Make a prepared change.
 * @mas: from kvm_gmem_attributes_prepare()
 * @attributes: as passed to kvm_gmem_attributes_prepare()
 *
 * Context: The caller has held the lock since the preparation.
 */
void kvm_gmem_attributes_commit(struct ma_state *mas, u64 attributes)
{
	lockdep_assert(mt_write_lock_is_held(mas->tree));

	mas_store_prealloc(mas, kvm_gmem_to_entry(attributes));
}

/*
 * Drop a prepared change.
 * @mas: from kvm_gmem_attributes_prepare()
 *
 * Context: As for kvm_gmem_attributes_commit().
 */
void kvm_gmem_attributes_abort(struct ma_state *mas)
{
	lockdep_assert(mt_write_lock_is_held(mas->tree));

	mas_destroy(mas);
}
