// SPDX-License-Identifier: GPL-2.0-only
/*
 * Conversion of guest_memfd memory between private and shared, in place
 */

/**
 * DOC: conversion of guest_memfd pages
 *
 * A conversion changes all of a range, or nothing.  It has three steps:
 *
 * - Prepare: get the memory that the change needs.  If memory becomes private, take
 *   it away from the host: unmap it, and see that nobody still uses it.  This may
 *   fail, and all that is left of it then is memory that the host has to fault in
 *   again.
 * - Commit: unmap the range from all guests, tell the architecture, and change the
 *   attributes.  This cannot fail.
 * - Abort: give back what prepare has got.
 *
 * All of it happens under the mapping's invalidate_lock, held exclusively.  That
 * keeps new users away: faults of the host and of guests take the lock shared and
 * look at the attributes under it.  Those that had it before have no effect any
 * more, either.
 *
 * - A fault of the host holds the folio lock until its page table entry is written.
 *   So once a folio has been locked it is mapped, and can be unmapped, or it is not
 *   going to be.
 * - A guest's fault has dropped its reference together with the lock, and finds out
 *   by mmu_invalidate_seq.
 *
 * References that are left then belong to somebody who has got the page before, for
 * as long as he likes, and who could write to it whatever the attributes say; or
 * to somebody who needs it for a moment, such as a lookup in the page cache, or an
 * munmap() that has yet to flush TLBs.  The latter are waited for.
 */
#include <linux/delay.h>
#include <linux/folio_batch.h>
#include <linux/kvm_host.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/swap.h>

#include <trace/events/kvm.h>

#include "guest_memfd.h"

/* For how long a conversion waits for references to go, and how often: 10 ms in all. */
#define GMEM_CONVERT_WAIT_US	100
#define GMEM_CONVERT_NR_WAITS	100

/*
 * How many folios with references are put off until others have been checked, beside
 * those of the batch that has been looked at last.
 */
#define GMEM_CONVERT_NR_BUSY	16

/**
 * struct gmem_conversion - a conversion on its way
 * @inode: whose memory is converted
 * @start: index of the first page
 * @end: index after the last page
 * @attributes: KVM_MEMORY_ATTRIBUTE_* that the range shall have
 * @change: the new attributes, ready to be stored
 * @folios: what folios the allocator has to split and to merge
 * @drained: which of the CPUs' batches of folios have been emptied
 * @nr_waits: how often references have been waited for
 * @busy: folios that had references, by index, in that order
 * @nr_busy: how many
 * @error: index of the page that is to blame if the conversion fails
 */
struct gmem_conversion {
	struct inode *inode;
	pgoff_t start;
	pgoff_t end;
	u64 attributes;
	struct gmem_attributes_change change;
	struct guestmem_change folios;
	enum lru_cache_drained drained;
	unsigned int nr_waits;
	pgoff_t busy[GMEM_CONVERT_NR_BUSY + FOLIO_BATCH_SIZE];
	unsigned int nr_busy;
	pgoff_t error;
};

static bool gmem_convert_to_private(const struct gmem_conversion *c)
{
	return c->attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE;
}

/* Whether the page cache and the caller are the only users of an unmapped folio. */
static bool gmem_convert_is_unused(struct folio *folio)
{
	int surplus = folio_ref_count(folio) - folio_expected_ref_count(folio) - 1;

	if (folio_mapped(folio))
		return false;

	/* memory_failure() keeps a reference to what it has poisoned. */
	return !surplus || (surplus == 1 && folio_test_hwpoison(folio));
}

/*
 * Wait a little, unless that has been done often enough.  Only that counts, and not what
 * else takes time: the larger a range, and the busier the machine, the more references
 * are met with that others need for a moment only.
 */
static bool gmem_convert_wait(struct gmem_conversion *c)
{
	if (c->nr_waits++ >= GMEM_CONVERT_NR_WAITS)
		return false;

	usleep_range(GMEM_CONVERT_WAIT_US / 2, GMEM_CONVERT_WAIT_US);
	return true;
}

/* What has been put off until now must not be used any more, or not for long. */
static int gmem_convert_check_busy(struct gmem_conversion *c)
{
	struct folio *folio;
	unsigned int i;
	bool unused;

	for (i = 0; i < c->nr_busy; i++) {
		folio = filemap_get_folio(c->inode->i_mapping, c->busy[i]);
		if (IS_ERR(folio))
			continue;

		do {
			unused = gmem_convert_is_unused(folio);
		} while (!unused && gmem_convert_wait(c));
		folio_put(folio);

		if (!unused) {
			c->error = c->busy[i];
			return -EAGAIN;
		}
	}

	c->nr_busy = 0;
	return 0;
}

typedef int (*gmem_convert_fn)(struct gmem_conversion *c, struct folio *folio);

/*
 * Call @fn for every folio that the file has in the range, with a reference, until
 * it returns an error, or until the task is killed if @killable.  What it has put off
 * is checked when the walk itself has no references.
 */
static int gmem_convert_walk_folios(struct gmem_conversion *c, bool killable,
				    gmem_convert_fn fn)
{
	struct address_space *mapping = c->inode->i_mapping;
	pgoff_t index = c->start;
	struct folio_batch fbatch;
	unsigned int i;
	int r = 0;

	folio_batch_init(&fbatch);
	while (!r && filemap_get_folios(mapping, &index, c->end - 1, &fbatch)) {
		for (i = 0; i < folio_batch_count(&fbatch) && !r; i++)
			r = fn(c, fbatch.folios[i]);
		folios_put(&fbatch);
		cond_resched();
		if (!r && c->nr_busy >= GMEM_CONVERT_NR_BUSY)
			r = gmem_convert_check_busy(c);
		if (!r && killable && fatal_signal_pending(current))
			r = -EINTR;
	}

	return r;
}

/*
 * Unmap what a fault on the host has mapped since the range was unmapped.  Whoever has
 * the folio lock does not wait for anything that user space could hold up: a fault has
 * got its page table before, and memory_failure() leaves all that to a worker.
 */
static int gmem_convert_unmap_folio(struct gmem_conversion *c, struct folio *folio)
{
	if (folio_lock_killable(folio))
		return -EINTR;

	if (folio_mapped(folio))
		unmap_mapping_pages(folio->mapping, folio->index,
				    folio_nr_pages(folio), false);
	folio_unlock(folio);
	return 0;
}

/*
 * A reference that somebody needs for a moment is likely to be gone once the other
 * folios have been checked, and nobody can get one that lasts: come back later, instead
 * of waiting for each.
 */
static int gmem_convert_check_folio(struct gmem_conversion *c, struct folio *folio)
{
	/* Has never been shared. */
	if (folio_test_large(folio))
		return 0;

	if (gmem_convert_is_unused(folio))
		return 0;

	lru_cache_drain_for_folio(folio, 1, &c->drained);
	if (gmem_convert_is_unused(folio))
		return 0;

	c->busy[c->nr_busy++] = folio->index;
	return 0;
}

/*
 * Take the range away from the host.  All folios are unmapped before the first one
 * is checked: unmapping leaves folios in the CPUs' batches, which are to be emptied
 * no more than once.
 */
static int gmem_convert_take_from_host(struct gmem_conversion *c)
{
	int r;

	unmap_mapping_pages(c->inode->i_mapping, c->start, c->end - c->start, false);

	r = gmem_convert_walk_folios(c, true, gmem_convert_unmap_folio);
	if (r)
		return r;

	r = gmem_convert_walk_folios(c, true, gmem_convert_check_folio);
	return r ?: gmem_convert_check_busy(c);
}

static bool gmem_convert_wait_for_folio(struct guestmem_change *change)
{
	return gmem_convert_wait(container_of(change, struct gmem_conversion, folios));
}

/* Get ready to split and merge. */
static int gmem_convert_prepare_folios(struct gmem_conversion *c)
{
	struct guestmem_allocator *gm = &GMEM_I(c->inode)->allocator;
	int r;

	c->folios = (struct guestmem_change) {
		.start = c->start,
		.end = c->end,
		.private = gmem_convert_to_private(c),
		.wait = gmem_convert_wait_for_folio,
		.error = c->start,
	};

	r = gm->ops->prepare(gm, &c->folios);
	if (r)
		c->error = c->folios.error;

	return r;
}

static int gmem_convert_prepare(struct gmem_conversion *c)
{
	int r;

	lockdep_assert_held_write(&c->inode->i_mapping->invalidate_lock);

	r = gmem_attributes_prepare(&GMEM_I(c->inode)->attributes, &c->change,
				    c->start, c->end, c->attributes,
				    GFP_KERNEL_ACCOUNT);
	if (r)
		return r;

	if (gmem_convert_to_private(c))
		r = gmem_convert_take_from_host(c);
	if (!r)
		r = gmem_convert_prepare_folios(c);
	if (r)
		gmem_attributes_abort(&c->change);

	return r;
}

#ifdef CONFIG_HAVE_KVM_ARCH_GMEM_RECLAIM
/* All folios are single pages by now, and the attributes are still what they were. */
static int gmem_convert_make_shared(struct gmem_conversion *c, struct folio *folio)
{
	struct gmem_attributes *ga = &GMEM_I(c->inode)->attributes;

	if (gmem_attributes_get(ga, folio->index).attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE) {
		trace_kvm_gmem_reclaim(folio_pfn(folio), folio_nr_pages(folio));
		kvm_arch_gmem_reclaim(folio_pfn(folio), folio_nr_pages(folio));
	}
	return 0;
}

static void gmem_convert_give_to_host(struct gmem_conversion *c)
{
	gmem_convert_walk_folios(c, false, gmem_convert_make_shared);
}
#else
static void gmem_convert_give_to_host(struct gmem_conversion *c)
{
}
#endif

/*
 * Guests lose what they have mapped as what it is not any more, and keep the rest:
 * TDX cannot unmap private memory without losing what is in it.
 */
static void gmem_convert_commit(struct gmem_conversion *c)
{
	struct guestmem_allocator *gm = &GMEM_I(c->inode)->allocator;

	lockdep_assert_held_write(&c->inode->i_mapping->invalidate_lock);

	kvm_gmem_invalidate_start_filter(c->inode, c->start, c->end,
					 gmem_convert_to_private(c) ?
					 KVM_FILTER_SHARED : KVM_FILTER_PRIVATE);

	gm->ops->commit(gm, &c->folios);
	if (!gmem_convert_to_private(c))
		gmem_convert_give_to_host(c);
	gmem_attributes_commit(&c->change);

	kvm_gmem_invalidate_end(c->inode, c->start, c->end);
}

/**
 * kvm_gmem_convert - Make a range of a guest_memfd file private or shared
 * @inode: the file's inode
 * @start: index of the first page
 * @end: index after the last page, not after the end of the file
 * @attributes: KVM_MEMORY_ATTRIBUTE_* that the range shall have
 * @error: set to the index of the page that is to blame for -EAGAIN, else @start
 *
 * Memory keeps its contents, and so do pages that are not allocated keep being
 * that: they are what @attributes says once they are.
 *
 * Context: May sleep, takes invalidate_lock.
 * Return: 0 if the range has these attributes now, -ENOMEM, -EINTR if the task is
 *	   being killed, or -EAGAIN if somebody has a reference to a page that shall
 *	   become private.  After an error all attributes are as they were.
 */
int kvm_gmem_convert(struct inode *inode, pgoff_t start, pgoff_t end,
		     u64 attributes, pgoff_t *error)
{
	struct address_space *mapping = inode->i_mapping;
	struct gmem_conversion c = {
		.inode = inode,
		.start = start,
		.end = end,
		.attributes = attributes,
		.drained = LRU_CACHE_NOT_DRAINED,
		.error = start,
	};
	int r;

	/* Whoever frees or allocates much memory has it for a while. */
	if (down_write_killable(&mapping->invalidate_lock)) {
		*error = start;
		return -EINTR;
	}

	r = gmem_convert_prepare(&c);
	if (!r)
		gmem_convert_commit(&c);
	trace_kvm_gmem_convert(inode->i_ino, start, end, attributes, c.error, r);
	if (r == -EALREADY)
		r = 0;

	filemap_invalidate_unlock(mapping);
	*error = c.error;
	return r;
}
