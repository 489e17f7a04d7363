// SPDX-License-Identifier: GPL-2.0-only
/*
 * Placeholders in the page cache of guest_memfd files
 *
 * A placeholder has the indices of a folio while that is split or merged, see
 * filemap_placeholder().  It can be split as a folio can, so the page cache has the nodes
 * for the new folios before the first one is stored.
 *
 * The inode is on no list of its superblock and has no device, so drop_caches and
 * POSIX_FADV_DONTNEED do not find placeholders to drop them as shadow entries.
 *
 * The owner of the huge page serializes changes of its entries.  Those of other huge
 * pages can change meanwhile.
 */
#include <linux/hugetlb.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/xarray.h>

#include "guestmem_placeholder.h"

bool guestmem_is_placeholder(struct address_space *mapping, pgoff_t index)
{
	return filemap_is_placeholder(xa_load(&mapping->i_pages, index));
}

/* Store an entry in place of one or many that cover the same indices. */
void guestmem_xas_store(struct xa_state *xas, void *entry)
{
	xas_lock_irq(xas);
	xas_store(xas, entry);
	xas_unlock_irq(xas);
	WARN_ON_ONCE(xas_error(xas));
	xas_destroy(xas);
}

/* As above.  Needs no memory if the entries there are of that order or less. */
void guestmem_store(struct address_space *mapping, pgoff_t index, unsigned int order,
		    void *entry)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	guestmem_xas_store(&xas, entry);
}

/* Replace placeholders by a folio, which is frozen or could not be frozen. */
void guestmem_insert(struct address_space *mapping, pgoff_t index, struct folio *folio)
{
	if (!folio_ref_count(folio)) {
		folio_mark_uptodate(folio);
		folio->mapping = mapping;
		folio->index = index;
		folio_ref_unfreeze(folio, folio_nr_pages(folio));
		if (folio_test_hugetlb(folio))
			folio_clear_hugetlb_frozen(folio);
	}
	guestmem_store(mapping, index, folio_order(folio), folio);

	/* memory_failure() cannot tell the file about an error in a frozen folio. */
	if (unlikely(folio_test_hwpoison(folio)))
		mapping->a_ops->error_remove_folio(mapping, folio);
}

/*
 * Prepare to store one entry for a huge page.  At index 0 the store can need a node: the
 * tree becomes lower as other entries go, and its root node may then cover no more than
 * the new entry.
 */
int guestmem_prepare_store(struct address_space *mapping, pgoff_t index,
			   unsigned int order, struct xa_state *store)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	*store = xas;
	if (index)
		return 0;

	return xas_prealloc(store, GFP_KERNEL) ? 0 : -ENOMEM;
}

/* Add a placeholder for a huge page that the file does not have yet. */
int guestmem_add_placeholder(struct address_space *mapping, pgoff_t index,
			     unsigned int order)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	do {
		xas_lock_irq(&xas);
		xas_store(&xas, filemap_placeholder());
		if (!xas_error(&xas))
			mapping->nrpages += 1UL << order;
		xas_unlock_irq(&xas);
	} while (xas_nomem(&xas, GFP_KERNEL));

	return xas_error(&xas);
}

/* Remove the entry of a huge page, of a part or of a piece from the page cache. */
void guestmem_del_entry(struct address_space *mapping, pgoff_t index, unsigned int order)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	xas_lock_irq(&xas);
	xas_store(&xas, NULL);
	mapping->nrpages -= 1UL << order;
	xas_unlock_irq(&xas);
}

/* One xas_split() can add one level of nodes.  Return the order it can get to. */
static unsigned int guestmem_split_step(unsigned int order, unsigned int new_order)
{
	unsigned int shift = rounddown(order, XA_CHUNK_SHIFT);

	return shift ? max(new_order, shift - XA_CHUNK_SHIFT) : new_order;
}

/* Split a placeholder.  On error some of it is split, which is harmless. */
int guestmem_split_placeholder(struct address_space *mapping, pgoff_t index,
			       unsigned int order, unsigned int new_order)
{
	pgoff_t end = index + (1UL << order), i;

	while (order > new_order) {
		unsigned int step = guestmem_split_step(order, new_order);

		for (i = index; i < end; i += 1UL << order) {
			XA_STATE_ORDER(xas, &mapping->i_pages, i, step);

			xas_split_alloc(&xas, filemap_placeholder(), order, GFP_KERNEL);
			if (xas_error(&xas))
				return xas_error(&xas);

			xas_lock_irq(&xas);
			xas_split(&xas, filemap_placeholder(), order);
			xas_unlock_irq(&xas);
		}
		order = step;
	}

	return 0;
}
