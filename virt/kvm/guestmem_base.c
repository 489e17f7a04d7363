// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files of base pages
 *
 * Nothing is set aside.  Pages come from the buddy allocator one by one as they
 * are needed and are charged to the memory cgroup then.
 */
#include <linux/guestmem.h>
#include <linux/mempolicy.h>
#include <linux/pagemap.h>

#include "guest_memfd.h"

static int guestmem_base_reserve(struct guestmem_allocator *gm, loff_t size)
{
	return 0;
}

static void guestmem_base_unreserve(struct guestmem_allocator *gm)
{
}

/*
 * Ignore accessed, referenced, and dirty flags.  The memory is
 * unevictable and there is no storage to write back to.
 */
static struct folio *guestmem_base_allocate(struct guestmem_allocator *gm,
					    pgoff_t index)
{
	struct address_space *mapping = gm->mapping;
	struct mempolicy *policy;
	struct folio *folio;

	/*
	 * Fast-path: See if folio is already present in mapping to avoid
	 * policy_lookup.
	 */
	folio = filemap_lock_folio(mapping, index);
	if (!IS_ERR(folio))
		return folio;

	policy = mpol_shared_policy_lookup(gm->policy, index);
	folio = __filemap_get_folio_mpol(mapping, index, FGP_LOCK | FGP_CREAT,
					 mapping_gfp_mask(mapping), policy);
	mpol_cond_put(policy);

	/* Large folios are not enabled for the mapping. */
	WARN_ON_ONCE(!IS_ERR(folio) && folio_order(folio));

	return folio;
}

static void guestmem_base_free(struct guestmem_allocator *gm, pgoff_t start,
			       pgoff_t end)
{
	truncate_inode_pages_range(gm->mapping, (loff_t)start << PAGE_SHIFT,
				   ((loff_t)end << PAGE_SHIFT) - 1);
}

static unsigned int guestmem_base_max_order(struct guestmem_allocator *gm,
					    struct folio *folio)
{
	return 0;
}

/* Pages need not be split, and are not merged. */
static int guestmem_base_prepare(struct guestmem_allocator *gm,
				 struct guestmem_change *change)
{
	return 0;
}

static void guestmem_base_commit(struct guestmem_allocator *gm,
				 struct guestmem_change *change)
{
}

static void guestmem_base_abort(struct guestmem_allocator *gm,
				struct guestmem_change *change)
{
}

const struct guestmem_allocator_operations guestmem_base_ops = {
	.reserve	= guestmem_base_reserve,
	.unreserve	= guestmem_base_unreserve,
	.allocate	= guestmem_base_allocate,
	.free		= guestmem_base_free,
	.max_order	= guestmem_base_max_order,
	.prepare	= guestmem_base_prepare,
	.commit		= guestmem_base_commit,
	.abort		= guestmem_base_abort,
};
