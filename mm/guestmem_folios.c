// SPDX-License-Identifier: GPL-2.0-only
/*
 * The folios that guest_memfd files of HugeTLB pages are made of
 */

/**
 * DOC: folios of HugeTLB pages in guest_memfd files
 *
 * A page of a file that is wholly private is one folio, the HugeTLB folio.  As soon as
 * some of it is shared, each part of PMD_ORDER that is wholly private is one, and all
 * else are single pages: then who has a page pinned keeps nothing from becoming private
 * but that very page, and the guest keeps large mappings of the rest.  As soon as that
 * is possible it is merged again.  A page that is allocated gets its folios before it
 * can be found.
 *
 * In a file that cannot be converted, but be mapped, pages are in parts of PMD_ORDER,
 * or of their own order if that is less, all the time.  Then userspace can map these at
 * once.
 *
 * Folios that the file has change in three steps, all of them under
 * filemap_invalidate_lock(), held exclusively.  For new ones that is held shared, and who
 * adds them decides alone about the huge page.
 *
 * - Prepare: freeze the folios that are going to change, that is, see that nobody has a
 *   reference to them and keep it like that, and replace them in the page cache by
 *   placeholders, which are value entries.  Who looks them up finds nothing, and need
 *   not wait.  Placeholders of folios that are going to be split are split at once, so
 *   that the page cache itself holds the memory that it will need.
 * - Commit: make new folios of the memory, and put these in place of placeholders.
 * - Abort: put the old ones back.
 *
 * Prepare may have to wait for references to go, and for RCU readers.  Commit needs no
 * memory and waits for nobody.
 */
#include <linux/guestmem.h>
#include <linux/hugetlb.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>

#define CREATE_TRACE_POINTS
#include <trace/events/guestmem.h>

#include "guestmem_folios.h"
#include "guestmem_hugepage.h"
#include "hugetlb_vmemmap.h"
#include "internal.h"

/*
 * What is in the page cache in place of folios that are being split or merged.  Who looks
 * them up finds nothing, instead of spinning until they can be had again.  Nobody drops
 * them as old shadow entries: the inode is on no list of its superblock, where
 * drop_caches would find it, and on no device, so POSIX_FADV_DONTNEED does nothing.
 */
static void *guestmem_placeholder(void)
{
	return xa_mk_value(0);
}

/*
 * The order of what a page of the file is taken apart into first.  In a file that can
 * be converted it has parts only if it is larger than PMD_ORDER.  In one that cannot,
 * parts are what userspace can map at once.
 */
static unsigned int guestmem_part_order(const struct guestmem_allocator *gm,
					unsigned int pmd_order)
{
	if (gm->order > pmd_order)
		return pmd_order;

	return gm->is_private ? 0 : gm->order;
}

static unsigned int guestmem_file_part_order(const struct guestmem_allocator *gm)
{
	return guestmem_part_order(gm, PMD_ORDER);
}

/*
 * Store an entry in place of one, or of many, that cover the same indices, with a node
 * that may be needed for it.
 */
static void guestmem_replace_with_node(struct address_space *mapping, pgoff_t index,
				       unsigned int order, void *entry,
				       struct xa_node *node)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	xas.xa_alloc = node;
	xas_lock_irq(&xas);
	xas_store(&xas, entry);
	xas_unlock_irq(&xas);
	WARN_ON_ONCE(xas_error(&xas));
	xas_destroy(&xas);
}

static void guestmem_replace(struct address_space *mapping, pgoff_t index,
			     unsigned int order, void *entry)
{
	guestmem_replace_with_node(mapping, index, order, entry, NULL);
}

/*
 * An entry at index 0 can have as many indices as a node has only below another node.
 * The page cache drops that when nothing is left but what is in place of the entry.  Get
 * a new one if it has.
 */
static int guestmem_prepare_root(struct address_space *mapping, pgoff_t index,
				 unsigned int order, struct xa_node **root)
{
	XA_STATE(xas, &mapping->i_pages, 1UL << order);

	*root = NULL;
	if (index)
		return 0;

	rcu_read_lock();
	xas_load(&xas);
	rcu_read_unlock();
	if (xas.xa_node != XAS_BOUNDS)
		return 0;

	xas_set_err(&xas, -ENOMEM);
	if (!xas_nomem(&xas, GFP_KERNEL))
		return -ENOMEM;

	*root = xas.xa_alloc;
	return 0;
}

/* Have one placeholder for all of a page, for which there is a root if needed. */
static void guestmem_use_root(struct address_space *mapping, pgoff_t index,
			      unsigned int order, struct xa_node **root)
{
	if (*root)
		guestmem_replace_with_node(mapping, index, order, guestmem_placeholder(),
					   *root);
	*root = NULL;
}

static void guestmem_free_root(struct address_space *mapping, struct xa_node **root)
{
	XA_STATE(xas, &mapping->i_pages, 0);

	xas.xa_alloc = *root;
	xas_destroy(&xas);
	*root = NULL;
}

/* Make a placeholder for a page that the file does not have yet. */
static int guestmem_add_placeholder(struct address_space *mapping, pgoff_t index,
				    unsigned int order)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	do {
		xas_lock_irq(&xas);
		xas_store(&xas, guestmem_placeholder());
		if (!xas_error(&xas))
			mapping->nrpages += 1UL << order;
		xas_unlock_irq(&xas);
	} while (xas_nomem(&xas, GFP_KERNEL));

	return xas_error(&xas);
}

static void guestmem_del_placeholder(struct address_space *mapping, pgoff_t index,
				     unsigned int order)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, index, order);

	xas_lock_irq(&xas);
	xas_store(&xas, NULL);
	mapping->nrpages -= 1UL << order;
	xas_unlock_irq(&xas);
}

/* How far one split can go that leads to @new_order: it adds one level to the tree. */
static unsigned int guestmem_split_step(unsigned int order, unsigned int new_order)
{
	unsigned int shift = rounddown(order, XA_CHUNK_SHIFT);

	return shift ? max(new_order, shift - XA_CHUNK_SHIFT) : new_order;
}

/* Have many placeholders instead of one.  What is not needed does no harm. */
static int guestmem_split_placeholder(struct address_space *mapping, pgoff_t index,
				      unsigned int order, unsigned int new_order)
{
	pgoff_t end = index + (1UL << order), i;

	while (order > new_order) {
		unsigned int step = guestmem_split_step(order, new_order);

		for (i = index; i < end; i += 1UL << order) {
			XA_STATE_ORDER(xas, &mapping->i_pages, i, step);

			xas_split_alloc(&xas, guestmem_placeholder(), order, GFP_KERNEL);
			if (xas_error(&xas))
				return xas_error(&xas);

			xas_lock_irq(&xas);
			xas_split(&xas, guestmem_placeholder(), order);
			xas_unlock_irq(&xas);
		}
		order = step;
	}

	return 0;
}

/* Take a folio out of the page cache that nobody else uses. */
static bool guestmem_hold(struct address_space *mapping, struct folio *folio)
{
	XA_STATE_ORDER(xas, &mapping->i_pages, folio->index, folio_order(folio));
	bool frozen;

	xas_lock_irq(&xas);
	frozen = folio_ref_freeze(folio, folio_nr_pages(folio));
	if (frozen)
		xas_store(&xas, guestmem_placeholder());
	xas_unlock_irq(&xas);

	if (frozen)
		guestmem_clear_mlocked(folio);

	return frozen;
}

/* What has been taken out of the page cache is what changes. */
static bool guestmem_is_held(struct address_space *mapping, pgoff_t index)
{
	return xa_is_value(xa_load(&mapping->i_pages, index));
}

/* Have one placeholder of a part instead of many.  Do not free all nodes in one go. */
static void guestmem_merge_placeholders(struct guestmem_allocator *gm, pgoff_t index)
{
	unsigned int order = guestmem_file_part_order(gm) ?: gm->order;
	pgoff_t end = index + (1UL << gm->order);

	for (; index < end; index += 1UL << order) {
		guestmem_replace(gm->mapping, index, order, guestmem_placeholder());
		cond_resched();
	}
}

/* Put a frozen folio into the page cache, in place of its placeholders. */
static void guestmem_publish(struct address_space *mapping, pgoff_t index,
			     struct folio *folio)
{
	unsigned int order = folio_order(folio);

	/* Whoever notes an error does so without a reference. */
	folio_mark_uptodate(folio);
	folio->mapping = mapping;
	folio->index = index;
	folio_ref_unfreeze(folio, 1 << order);
	guestmem_replace(mapping, index, order, folio);
}

static struct page *guestmem_page(struct guestmem_hugepage *hp, pgoff_t index)
{
	return hp->page + (index - hp->index);
}

/*
 * An error that has hit a folio while it was frozen could not be told to the file, which
 * is to unmap it from guests.
 */
static void guestmem_report_error(struct address_space *mapping, struct folio *folio)
{
	if (unlikely(folio_test_hwpoison(folio)))
		mapping->a_ops->error_remove_folio(mapping, folio);
}

/* Put a whole huge page there, whose placeholders have been merged. */
static void guestmem_publish_whole(struct guestmem_allocator *gm, pgoff_t index,
				   struct folio *folio)
{
	guestmem_publish(gm->mapping, index, folio);
	guestmem_report_error(gm->mapping, folio);
}

static void guestmem_report_errors(struct address_space *mapping,
				   struct guestmem_hugepage *hp, pgoff_t start,
				   pgoff_t end)
{
	struct folio *folio;

	if (likely(!folio_test_hwpoison(&hp->folio)))
		return;

	for (; start < end; start += folio_nr_pages(folio)) {
		folio = page_folio(guestmem_page(hp, start));
		guestmem_report_error(mapping, folio);
	}
}

/* Put pieces of a huge page into the page cache, where they are not. */
static void guestmem_publish_pieces(struct address_space *mapping,
				    struct guestmem_hugepage *hp, pgoff_t start,
				    pgoff_t end)
{
	struct folio *folio;
	pgoff_t i;

	for (i = start; i < end; i += folio_nr_pages(folio)) {
		if (!(i % SZ_1K))
			cond_resched();
		folio = page_folio(guestmem_page(hp, i));
		if (!guestmem_is_held(mapping, i))
			continue;
		folio->private = hp;
		/* Nobody can map it. */
		if (folio_test_large(folio) && !hp->is_mappable)
			__folio_set_guestmem(folio);
		guestmem_publish(mapping, i, folio);
	}

	guestmem_mark_poisoned(&hp->folio, guestmem_page(hp, start), end - start);
	guestmem_report_errors(mapping, hp, start, end);
}

/* Whether all pages are private, or are going to be.  They are if they cannot change. */
static bool guestmem_is_private(struct guestmem_allocator *gm,
				const struct guestmem_change *c,
				pgoff_t start, pgoff_t end)
{
	if (!gm->is_private)
		return true;

	if (!c || c->end <= start || c->start >= end)
		return gm->is_private(gm, start, end);

	return c->private &&
	       (c->start <= start || gm->is_private(gm, start, c->start)) &&
	       (c->end >= end || gm->is_private(gm, c->end, end));
}

/* Whether a part of a huge page that is not one folio has to be one. */
static bool guestmem_part_is_folio(struct guestmem_allocator *gm,
				   const struct guestmem_change *c, pgoff_t index)
{
	unsigned int order = guestmem_file_part_order(gm);

	return order && guestmem_is_private(gm, c, index, index + (1UL << order));
}

static pgoff_t guestmem_part_size(struct guestmem_allocator *gm)
{
	return 1UL << (guestmem_file_part_order(gm) ?: gm->order);
}

/* Where the first part of a huge page begins that a change has something of. */
static pgoff_t guestmem_first_part(struct guestmem_allocator *gm,
				   const struct guestmem_hugepage *hp,
				   const struct guestmem_change *c)
{
	return max(hp->index, round_down(c->start, guestmem_part_size(gm)));
}

/* What is not before the end of the change, or of the huge page. */
static pgoff_t guestmem_end_of_parts(struct guestmem_allocator *gm,
				     const struct guestmem_hugepage *hp,
				     const struct guestmem_change *c)
{
	return min(hp->index + (1UL << gm->order), c->end);
}

/* Get ready to take one part apart, whose placeholder exists. */
static int guestmem_prepare_part(struct guestmem_allocator *gm,
				 struct guestmem_hugepage *hp, pgoff_t index)
{
	int r;

	r = guestmem_hugepage_prepare_part(hp, guestmem_page(hp, index));
	if (r)
		return r;

	return guestmem_split_placeholder(gm->mapping, index,
					  guestmem_file_part_order(gm), 0);
}

/* Get ready to take a whole huge page apart, whose placeholder exists. */
static int guestmem_prepare_parts(struct guestmem_allocator *gm,
				  struct guestmem_hugepage *hp,
				  const struct guestmem_change *c)
{
	unsigned int order = guestmem_file_part_order(gm);
	pgoff_t i, end = hp->index + (1UL << gm->order);
	int r;

	r = guestmem_split_placeholder(gm->mapping, hp->index, gm->order, order);
	for (i = hp->index; order && !r && i < end; i += 1UL << order) {
		if (!guestmem_part_is_folio(gm, c, i))
			r = guestmem_prepare_part(gm, hp, i);
	}

	return r;
}

static void guestmem_split_part(struct guestmem_allocator *gm,
				struct guestmem_hugepage *hp, pgoff_t index)
{
	trace_guestmem_split(gm->mapping->host, index, guestmem_file_part_order(gm), 0);
	guestmem_hugepage_split_part(hp, guestmem_page(hp, index));
}

static void guestmem_split_all(struct guestmem_allocator *gm,
			       struct guestmem_hugepage *hp,
			       const struct guestmem_change *c)
{
	unsigned int order = guestmem_file_part_order(gm);
	pgoff_t i, end = hp->index + (1UL << gm->order);

	trace_guestmem_split(gm->mapping->host, hp->index, gm->order, order);
	guestmem_hugepage_split(hp);
	hp->is_new = false;
	for (i = hp->index; order && i < end; i += 1UL << order) {
		if (!guestmem_part_is_folio(gm, c, i))
			guestmem_split_part(gm, hp, i);
	}
}

/*
 * Nobody can have got a reference to the new page for long: nobody can have found it,
 * except who looks at any page for a moment, or memory_failure().
 */
static int guestmem_freeze_new(struct folio *folio)
{
	while (!folio_ref_freeze(folio, 1)) {
		if (folio_test_hwpoison(folio))
			return -EHWPOISON;
		if (fatal_signal_pending(current))
			return -EINTR;
		schedule_timeout_uninterruptible(1);
	}

	return 0;
}

/**
 * guestmem_folios_add - add a page to a file that must not be one folio
 * @gm: the file's allocator
 * @folio: the page, zeroed, found by nobody, and with one reference that is taken over
 * @index: where it shall be, in base pages
 *
 * Context: May sleep.  The caller decides alone about the huge page at @index, and
 * keeps attributes from changing.
 * Return: 0, and then the file has the page, in folios that are not locked; or -ENOMEM,
 *	   -EINTR if the task is being killed, or -EHWPOISON if the page has an error.
 *	   After these the reference to @folio has been dropped.
 */
int guestmem_folios_add(struct guestmem_allocator *gm, struct folio *folio,
			pgoff_t index)
{
	struct guestmem_hugepage *hp;
	int r;

	r = -ENOMEM;
	hp = guestmem_hugepage_prepare(folio, guestmem_file_part_order(gm),
				       !gm->is_private);
	if (!hp)
		goto err_put;
	hp->index = index;

	r = guestmem_add_placeholder(gm->mapping, index, gm->order);
	if (r)
		goto err_abort;

	r = guestmem_prepare_parts(gm, hp, NULL);
	if (r)
		goto err_del;

	/* Last of all, as there are some that wait for a frozen HugeTLB folio to be free. */
	r = guestmem_freeze_new(folio);
	if (r)
		goto err_del;

	guestmem_split_all(gm, hp, NULL);
	guestmem_publish_pieces(gm->mapping, hp, index, index + (1UL << gm->order));
	return 0;

err_del:
	guestmem_merge_placeholders(gm, index);
	guestmem_del_placeholder(gm->mapping, index, gm->order);
err_abort:
	guestmem_hugepage_abort(hp);
err_put:
	folio_put(folio);
	return r;
}

/**
 * guestmem_folios_is_whole - tell whether a new page has to be one folio
 * @gm: the file's allocator
 * @index: index of its first base page
 *
 * Context: Any.  The caller keeps attributes from changing.
 */
bool guestmem_folios_is_whole(struct guestmem_allocator *gm, pgoff_t index)
{
	if (!gm->is_private)
		return !gm->is_mappable;

	return gm->is_private(gm, index, index + (1UL << gm->order));
}

/* A fault that had the folio before it was unmapped may have mapped it since. */
static void guestmem_unmap_piece(struct folio *folio, enum lru_cache_drained *drained)
{
	folio_lock(folio);
	if (folio_mapped(folio)) {
		unmap_mapping_folio(folio);
		*drained = LRU_CACHE_NOT_DRAINED;
	}
	folio_unlock(folio);

	lru_cache_drain_for_folio(folio, 0, drained);
}

/*
 * From here on it is the piece's type that says what happens to it.  It can have that
 * because nobody can map it any more.
 */
static void guestmem_remove_piece(struct guestmem_allocator *gm,
				  struct guestmem_hugepage *hp, struct folio *folio)
{
	unsigned int order = folio_order(folio);

	folio_lock(folio);
	__folio_set_guestmem(folio);
	atomic_long_add(1L << order, &hp->nr_out);
	guestmem_del_placeholder(gm->mapping, folio->index, order);
	folio->mapping = NULL;
	folio_unlock(folio);

	if (gm->mapping->a_ops->free_folio)
		gm->mapping->a_ops->free_folio(folio);
	folio_put_refs(folio, 1 << order);
}

/**
 * guestmem_folios_remove - remove a page from a file that is not one folio
 * @gm: the file's allocator
 * @index: index of its first base page
 * @drained: which of the CPUs' batches of folios have been emptied
 * @list: what the page is added to if the caller has to free it
 *
 * The page goes back to its pool, by guestmem_hugepages_free() or when nobody uses any
 * piece of it any more.  Nobody's use is what unmapping mlocked memory may have put
 * into a CPU's batch.
 *
 * Context: May sleep, locks folios.  The caller decides alone about the huge page, and
 * has unmapped it.
 */
void guestmem_folios_remove(struct guestmem_allocator *gm, pgoff_t index,
			    enum lru_cache_drained *drained, struct list_head *list)
{
	struct folio *folio = xa_load(&gm->mapping->i_pages, index);
	struct guestmem_hugepage *hp = folio->private;
	pgoff_t end = index + (1UL << gm->order);

	while (index < end) {
		folio = xa_load(&gm->mapping->i_pages, index);
		index += folio_nr_pages(folio);
		guestmem_unmap_piece(folio, drained);
		guestmem_remove_piece(gm, hp, folio);
		if (!(index % SZ_1K))
			cond_resched();
	}

	guestmem_hugepage_release(hp, list);
}

/* Whether there is an error in some pages of a huge page. */
static bool guestmem_range_has_poison(struct guestmem_hugepage *hp, pgoff_t start,
				      pgoff_t end)
{
	return guestmem_has_poison(&hp->folio, guestmem_page(hp, start), end - start);
}

/* &guestmem_allocator_operations.max_order */
unsigned int guestmem_folios_max_order(struct guestmem_allocator *gm,
				       struct folio *folio)
{
	struct guestmem_hugepage *hp;
	unsigned int orders[2] = { gm->order, min_t(unsigned int, gm->order, PMD_ORDER) };
	pgoff_t start;
	int i;

	if (folio_test_hugetlb(folio))
		return gm->order;

	/* Only who is unlucky has to look for more than one bit. */
	hp = folio->private;
	for (i = 0; i < ARRAY_SIZE(orders); i++) {
		start = round_down(folio->index, 1UL << orders[i]);
		if (!guestmem_range_has_poison(hp, start, start + (1UL << orders[i])))
			return orders[i];
	}

	return folio_order(folio);
}

/* How many folios with references are put off until others have been taken. */
#define GUESTMEM_NR_BUSY	16

/*
 * Wait for the references to a folio to go.  Nobody finds it meanwhile: who looks up one
 * page after the other gets the same large folio for all of them, and where RCU readers
 * cannot be preempted he is preempted right after that, each time.
 */
static bool guestmem_wait_and_hold(struct guestmem_allocator *gm,
				   struct guestmem_change *c, struct folio *folio)
{
	unsigned int order = folio_order(folio);

	guestmem_replace(gm->mapping, folio->index, order, guestmem_placeholder());
	while (!folio_ref_freeze(folio, 1 << order)) {
		/* Leave the time for those that are not memory_failure()'s. */
		if ((c->private && folio_test_hwpoison(folio)) || !c->wait(c)) {
			guestmem_replace(gm->mapping, folio->index, order, folio);
			return false;
		}
	}
	guestmem_clear_mlocked(folio);

	return true;
}

/* Take folios out of the page cache that had references. */
static int guestmem_hold_busy(struct guestmem_allocator *gm, struct guestmem_change *c,
			      const pgoff_t *busy, unsigned int nr)
{
	struct folio *folio;
	unsigned int i;

	for (i = 0; i < nr; i++) {
		folio = xa_load(&gm->mapping->i_pages, busy[i]);
		if (guestmem_hold(gm->mapping, folio) ||
		    guestmem_wait_and_hold(gm, c, folio))
			continue;
		/* What is to blame may be a neighbor. */
		if (busy[i] >= c->start && busy[i] < c->end)
			c->error = busy[i];
		return -EAGAIN;
	}

	return 0;
}

/* Take all folios that the file has in a range out of the page cache. */
static int guestmem_hold_range(struct guestmem_allocator *gm,
			       struct guestmem_change *c, pgoff_t index, pgoff_t end)
{
	pgoff_t busy[GUESTMEM_NR_BUSY];
	unsigned int nr_busy = 0;
	struct folio *folio;
	int r = 0;

	for (; index < end && !r; index += folio_nr_pages(folio)) {
		folio = xa_load(&gm->mapping->i_pages, index);
		if (!guestmem_hold(gm->mapping, folio))
			busy[nr_busy++] = index;
		if (nr_busy == GUESTMEM_NR_BUSY) {
			r = guestmem_hold_busy(gm, c, busy, nr_busy);
			nr_busy = 0;
		}
		if (!(index % SZ_1K))
			cond_resched();
	}

	return r ?: guestmem_hold_busy(gm, c, busy, nr_busy);
}

static int guestmem_prepare_split(struct guestmem_allocator *gm,
				  struct guestmem_change *c,
				  struct guestmem_hugepage *hp)
{
	pgoff_t i, end = guestmem_end_of_parts(gm, hp, c);
	unsigned int order = guestmem_file_part_order(gm);
	struct folio *folio;
	int r;

	if (hp->is_new) {
		r = guestmem_hold_range(gm, c, hp->index, hp->index + (1UL << gm->order));
		return r ?: guestmem_prepare_parts(gm, hp, c);
	}

	if (!order)
		return 0;

	for (i = guestmem_first_part(gm, hp, c); i < end; i += guestmem_part_size(gm)) {
		folio = xa_load(&gm->mapping->i_pages, i);
		if (folio_order(folio) != order)
			continue;
		r = guestmem_hold_range(gm, c, i, i + (1UL << order));
		if (!r)
			r = guestmem_prepare_part(gm, hp, i);
		if (r)
			return r;
	}

	return 0;
}

/* What has an error stays as it is, and what memory_failure() has is in nobody's way. */
static int guestmem_hold_for_merge(struct guestmem_allocator *gm,
				   struct guestmem_change *c,
				   struct guestmem_hugepage *hp, pgoff_t start,
				   pgoff_t end)
{
	int r;

	if (guestmem_range_has_poison(hp, start, end))
		return 0;

	c->merges |= hp->optimized;
	r = guestmem_hold_range(gm, c, start, end);
	if (r == -EAGAIN && guestmem_range_has_poison(hp, start, end)) {
		guestmem_publish_pieces(gm->mapping, hp, start, end);
		r = 0;
	}

	return r;
}

static int guestmem_prepare_merge_parts(struct guestmem_allocator *gm,
					struct guestmem_change *c,
					struct guestmem_hugepage *hp)
{
	pgoff_t i, end = guestmem_end_of_parts(gm, hp, c);
	struct folio *folio;
	int r;

	for (i = guestmem_first_part(gm, hp, c); i < end; i += guestmem_part_size(gm)) {
		folio = xa_load(&gm->mapping->i_pages, i);
		if (folio_order(folio) || !guestmem_part_is_folio(gm, c, i))
			continue;
		r = guestmem_hold_for_merge(gm, c, hp, i, i + guestmem_part_size(gm));
		if (r)
			return r;
	}

	return 0;
}

static int guestmem_prepare_merge(struct guestmem_allocator *gm,
				  struct guestmem_change *c,
				  struct guestmem_hugepage *hp)
{
	pgoff_t end = hp->index + (1UL << gm->order);
	int r;

	hp->is_merging = false;
	if (!guestmem_is_private(gm, c, hp->index, end))
		return guestmem_prepare_merge_parts(gm, c, hp);

	r = guestmem_hold_for_merge(gm, c, hp, hp->index, end);
	if (r)
		return r;

	hp->is_merging = guestmem_is_held(gm->mapping, hp->index);
	if (!hp->is_merging)
		return guestmem_prepare_merge_parts(gm, c, hp);

	return guestmem_prepare_root(gm->mapping, hp->index, gm->order, &hp->root);
}

static void guestmem_abort_hugepage(struct guestmem_allocator *gm,
				    struct guestmem_hugepage *hp)
{
	list_del(&hp->node);
	if (hp->is_new) {
		if (guestmem_is_held(gm->mapping, hp->index)) {
			guestmem_merge_placeholders(gm, hp->index);
			guestmem_publish_whole(gm, hp->index, page_folio(hp->page));
		}
		guestmem_hugepage_abort(hp);
		return;
	}

	guestmem_publish_pieces(gm->mapping, hp, hp->index,
				hp->index + (1UL << gm->order));
	guestmem_free_root(gm->mapping, &hp->root);
	hugetlb_vmemmap_free_pages(&hp->vmemmap_pages);
}

static void guestmem_commit_split(struct guestmem_allocator *gm,
				  struct guestmem_change *c,
				  struct guestmem_hugepage *hp)
{
	pgoff_t i, end = guestmem_end_of_parts(gm, hp, c);

	if (hp->is_new) {
		guestmem_split_all(gm, hp, c);
		guestmem_publish_pieces(gm->mapping, hp, hp->index,
					hp->index + (1UL << gm->order));
		return;
	}

	for (i = guestmem_first_part(gm, hp, c); i < end; i += guestmem_part_size(gm)) {
		if (!guestmem_is_held(gm->mapping, i))
			continue;
		guestmem_split_part(gm, hp, i);
		guestmem_publish_pieces(gm->mapping, hp, i, i + guestmem_part_size(gm));
	}
}

static void guestmem_merge_all(struct guestmem_allocator *gm,
			       struct guestmem_hugepage *hp)
{
	pgoff_t index = hp->index, end = index + (1UL << gm->order);

	/* It may have got one since. */
	if (guestmem_range_has_poison(hp, index, end)) {
		guestmem_publish_pieces(gm->mapping, hp, index, end);
		guestmem_free_root(gm->mapping, &hp->root);
		return;
	}

	trace_guestmem_merge(gm->mapping->host, index, hp->part_order, gm->order);
	guestmem_merge_placeholders(gm, index);
	guestmem_use_root(gm->mapping, index, gm->order, &hp->root);
	guestmem_publish_whole(gm, index, guestmem_hugepage_merge(hp));
}

static void guestmem_merge_part(struct guestmem_allocator *gm,
				struct guestmem_hugepage *hp, pgoff_t index)
{
	pgoff_t end = index + guestmem_part_size(gm);

	if (!guestmem_range_has_poison(hp, index, end)) {
		trace_guestmem_merge(gm->mapping->host, index, 0, hp->part_order);
		guestmem_hugepage_merge_part(hp, guestmem_page(hp, index));
	}
	guestmem_publish_pieces(gm->mapping, hp, index, end);
}

static void guestmem_commit_merge(struct guestmem_allocator *gm,
				  struct guestmem_change *c,
				  struct guestmem_hugepage *hp)
{
	pgoff_t i, end = guestmem_end_of_parts(gm, hp, c);

	if (hp->is_merging) {
		guestmem_merge_all(gm, hp);
		return;
	}

	for (i = guestmem_first_part(gm, hp, c); i < end; i += guestmem_part_size(gm)) {
		if (guestmem_is_held(gm->mapping, i))
			guestmem_merge_part(gm, hp, i);
	}
}

/* The huge page that a file has at an index if a change has to do with it. */
static struct guestmem_hugepage *
guestmem_change_hugepage(struct guestmem_allocator *gm, struct guestmem_change *c,
			 pgoff_t index)
{
	struct folio *folio = xa_load(&gm->mapping->i_pages, index);
	struct guestmem_hugepage *hp;

	if (!folio)
		return NULL;

	if (!folio_test_hugetlb(folio))
		return folio->private;

	if (c->private)
		return NULL;

	hp = guestmem_hugepage_prepare(folio, guestmem_file_part_order(gm), false);
	if (!hp)
		return ERR_PTR(-ENOMEM);

	hp->index = index;
	hp->is_new = true;
	return hp;
}

/* &guestmem_allocator_operations.abort */
void guestmem_folios_abort(struct guestmem_allocator *gm, struct guestmem_change *c)
{
	struct guestmem_hugepage *hp, *next;

	list_for_each_entry_safe(hp, next, &c->list, node)
		guestmem_abort_hugepage(gm, hp);
}

/*
 * Most changes are small, and in a part that is in pages and remains that.  Find that out
 * by looking at this part alone.
 */
static bool guestmem_nothing_changes(struct guestmem_allocator *gm,
				     const struct guestmem_change *c)
{
	pgoff_t start = round_down(c->start, guestmem_part_size(gm));
	pgoff_t end = start + guestmem_part_size(gm);
	struct folio *folio;

	if (c->end > end)
		return false;

	folio = xa_load(&gm->mapping->i_pages, start);
	if (!folio)
		return true;

	return !folio_test_large(folio) &&
	       (!c->private || !guestmem_is_private(gm, c, start, end));
}

/* &guestmem_allocator_operations.prepare */
int guestmem_folios_prepare(struct guestmem_allocator *gm, struct guestmem_change *c)
{
	struct guestmem_hugepage *hp;
	pgoff_t index;
	int r = 0;

	lockdep_assert_held_write(&gm->mapping->invalidate_lock);

	INIT_LIST_HEAD(&c->list);
	if (guestmem_nothing_changes(gm, c))
		return 0;

	for (index = round_down(c->start, 1UL << gm->order); index < c->end && !r;
	     index += 1UL << gm->order) {
		hp = guestmem_change_hugepage(gm, c, index);
		if (IS_ERR_OR_NULL(hp)) {
			r = PTR_ERR_OR_ZERO(hp);
			continue;
		}

		list_add_tail(&hp->node, &c->list);
		if (c->private)
			r = guestmem_prepare_merge(gm, c, hp);
		else
			r = guestmem_prepare_split(gm, c, hp);
		if (!r && fatal_signal_pending(current))
			r = -EINTR;
	}

	/* See guestmem_hugepage_merge_part().  In commit guests would wait for it. */
	if (!r && c->merges)
		synchronize_rcu_expedited();
	if (r)
		guestmem_folios_abort(gm, c);

	return r;
}

/* &guestmem_allocator_operations.commit */
void guestmem_folios_commit(struct guestmem_allocator *gm, struct guestmem_change *c)
{
	struct guestmem_hugepage *hp, *next;

	lockdep_assert_held_write(&gm->mapping->invalidate_lock);

	list_for_each_entry_safe(hp, next, &c->list, node) {
		list_del(&hp->node);
		if (c->private)
			guestmem_commit_merge(gm, c, hp);
		else
			guestmem_commit_split(gm, c, hp);
		cond_resched();
	}
}

#include "tests/guestmem_folios_kunit.h"
