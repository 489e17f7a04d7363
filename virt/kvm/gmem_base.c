// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files of base pages
 *
 * Pages are not reserved.  The first use of a page allocates it from the buddy
 * allocator and charges it to the memory cgroup.
 */
#include <linux/guestmem.h>
#include <linux/mempolicy.h>
#include <linux/pagemap.h>

#include "guest_memfd.h"

/*
 * Ignore accessed, referenced, and dirty flags.  The memory is
 * unevictable and there is no storage to write back to.
 */
static struct folio *kvm_gmem_base_allocate(struct guestmem_allocator *gm,
					    pgoff_t index, unsigned int state)
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

static void kvm_gmem_base_free(struct guestmem_allocator *gm, pgoff_t start,
			       pgoff_t end)
{
	truncate_inode_pages_range(gm->mapping, (loff_t)start << PAGE_SHIFT,
				   ((loff_t)end << PAGE_SHIFT) - 1);
}

const struct guestmem_allocator_operations kvm_gmem_base_ops = {
	.allocate	= kvm_gmem_base_allocate,
	.free		= kvm_gmem_base_free,
};
