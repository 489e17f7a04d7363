/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * KUnit tests of the page cache when HugeTLB pages are split and merged
 *
 * The results depend on orders only, so the orders of other architectures can be
 * tested.
 */
#ifdef CONFIG_GUESTMEM_SPLIT_KUNIT_TEST

#ifndef _MM_GUESTMEM_SPLIT_KUNIT_H
#define _MM_GUESTMEM_SPLIT_KUNIT_H

#include <kunit/test.h>

/*
 * HugeTLB pages that a file can have on architectures where KVM has guest_memfd:
 *
 * - x86 has pages of PMD_SIZE and PUD_SIZE, see arch/x86/mm/hugetlbpage.c;
 * - arm64 has these and two contiguous sizes, see hugetlbpage_init() in
 *   arch/arm64/mm/hugetlbpage.c, ARM64_CONT_PTE_SHIFT and ARM64_CONT_PMD_SHIFT, and
 *   pud_sect_supported(): PUD_SIZE needs base pages of 4 KiB.
 *
 * With base pages of 64 KiB arm64 also has pages of 16 GiB.  No file can have these.
 */
struct guestmem_orders {
	const char *name;
	unsigned int order;
	unsigned int pmd_order;
};

static const struct guestmem_orders guestmem_orders[] = {
	{ "2 MiB in 4 KiB (x86, arm64)", 9, 9 },
	{ "1 GiB in 4 KiB (x86, arm64)", 18, 9 },
	{ "64 KiB in 4 KiB (arm64)", 4, 9 },
	{ "32 MiB in 4 KiB (arm64)", 13, 9 },
	{ "2 MiB in 16 KiB (arm64)", 7, 11 },
	{ "32 MiB in 16 KiB (arm64)", 11, 11 },
	{ "1 GiB in 16 KiB (arm64)", 16, 11 },
	{ "2 MiB in 64 KiB (arm64)", 5, 13 },
	{ "512 MiB in 64 KiB (arm64)", 13, 13 },
};

KUNIT_ARRAY_PARAM_DESC(guestmem_orders, guestmem_orders, name);

/* A huge page with a neighbor on each side. */
struct guestmem_kunit {
	struct address_space mapping;
	unsigned int order;
	unsigned int part_order;
	pgoff_t start;
	pgoff_t end;
};

/* Return an entry that represents the folio at @index. */
static void *guestmem_kunit_folio(pgoff_t index)
{
	return (void *)((index + 1) * sizeof(void *));
}

/*
 * Storing entries in place of placeholders must not need memory.  An attempt to
 * allocate without waiting decrements fail_nth, so check that it is unchanged.
 */
#define GUESTMEM_KUNIT_FAIL_NTH		UINT_MAX

#ifdef CONFIG_FAILSLAB
static void guestmem_kunit_expect_no_allocation(bool begin, struct kunit *test)
{
	if (!begin)
		KUNIT_EXPECT_EQ(test, GUESTMEM_KUNIT_FAIL_NTH, current->fail_nth);
	current->fail_nth = begin ? GUESTMEM_KUNIT_FAIL_NTH : 0;
}
#else
static void guestmem_kunit_expect_no_allocation(bool begin, struct kunit *test)
{
}
#endif

static void guestmem_kunit_expect_placeholder(struct kunit *test, pgoff_t start,
					      pgoff_t end, unsigned int order)
{
	struct guestmem_kunit *gk = test->priv;
	pgoff_t i;

	for (i = start; i < end; i++) {
		if (xa_load(&gk->mapping.i_pages, i) != filemap_placeholder() ||
		    xa_get_order(&gk->mapping.i_pages, i) != order)
			break;
	}
	KUNIT_EXPECT_EQ(test, end, i);
}

/* Store folios in place of placeholders, and check that lookups return them. */
static void guestmem_kunit_store(struct kunit *test, pgoff_t start, pgoff_t end,
				 unsigned int order)
{
	struct guestmem_kunit *gk = test->priv;
	pgoff_t i;

	guestmem_kunit_expect_no_allocation(true, test);
	for (i = start; i < end; i += 1UL << order)
		guestmem_store(&gk->mapping, i, order, guestmem_kunit_folio(i));
	guestmem_kunit_expect_no_allocation(false, test);

	for (i = start; i < end; i++) {
		if (xa_load(&gk->mapping.i_pages, i) !=
		    guestmem_kunit_folio(round_down(i, 1UL << order)) ||
		    xa_get_order(&gk->mapping.i_pages, i) != order)
			break;
	}
	KUNIT_EXPECT_EQ(test, end, i);
}

/* Replace folios of @order by placeholders, like guestmem_freeze_range(). */
static void guestmem_kunit_hide(struct kunit *test, pgoff_t start, pgoff_t end,
				unsigned int order)
{
	struct guestmem_kunit *gk = test->priv;
	pgoff_t i;

	guestmem_kunit_expect_no_allocation(true, test);
	for (i = start; i < end; i += 1UL << order)
		guestmem_store(&gk->mapping, i, order, filemap_placeholder());
	guestmem_kunit_expect_no_allocation(false, test);
	guestmem_kunit_expect_placeholder(test, start, end, order);
}

static void guestmem_kunit_split(struct kunit *test, pgoff_t index, unsigned int order,
				 unsigned int new_order)
{
	struct guestmem_kunit *gk = test->priv;

	KUNIT_ASSERT_EQ(test, 0, guestmem_split_placeholder(&gk->mapping, index, order,
							    new_order));
	guestmem_kunit_expect_placeholder(test, index, index + (1UL << order), new_order);
}

/* Split one placeholder into those of the parts, like guestmem_prepare_whole(). */
static void guestmem_kunit_split_whole(struct kunit *test)
{
	struct guestmem_kunit *gk = test->priv;

	guestmem_kunit_split(test, gk->start, gk->order, gk->part_order);
}

/* Merge everything, like guestmem_merge_whole(). */
static void guestmem_kunit_merge_prepared(struct kunit *test, struct xa_state *store)
{
	struct guestmem_kunit *gk = test->priv;
	pgoff_t i;

	for (i = gk->start; i < gk->end; i += 1UL << gk->part_order)
		guestmem_kunit_hide(test, i, i + (1UL << gk->part_order), gk->part_order);
	guestmem_kunit_expect_no_allocation(true, test);
	guestmem_xas_store(store, filemap_placeholder());
	guestmem_kunit_expect_no_allocation(false, test);
	guestmem_kunit_store(test, gk->start, gk->end, gk->order);
}

static void guestmem_kunit_prepare_store(struct kunit *test, struct xa_state *store)
{
	struct guestmem_kunit *gk = test->priv;

	KUNIT_ASSERT_EQ(test, 0, guestmem_prepare_store(&gk->mapping, gk->start, gk->order,
							store));
}

static void guestmem_kunit_merge_all(struct kunit *test)
{
	struct xa_state store;

	guestmem_kunit_prepare_store(test, &store);
	guestmem_kunit_merge_prepared(test, &store);
}

static struct guestmem_kunit *guestmem_kunit_alloc(struct kunit *test, pgoff_t nr)
{
	const struct guestmem_orders *orders = test->param_value;
	struct guestmem_kunit *gk;

	gk = kunit_kzalloc(test, sizeof(*gk), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, gk);
	xa_init_flags(&gk->mapping.i_pages, XA_FLAGS_LOCK_IRQ | XA_FLAGS_ACCOUNT);

	gk->order = orders->order;
	gk->part_order = min(orders->order, orders->pmd_order);
	gk->start = nr << gk->order;
	gk->end = (nr + 1) << gk->order;
	return gk;
}

static int guestmem_kunit_init(struct kunit *test)
{
	struct guestmem_kunit *gk = guestmem_kunit_alloc(test, 1);

	test->priv = gk;
	KUNIT_ASSERT_EQ(test, 0, guestmem_add_placeholder(&gk->mapping, gk->start - 1, 0));
	KUNIT_ASSERT_EQ(test, 0, guestmem_add_placeholder(&gk->mapping, gk->end, 0));
	guestmem_kunit_store(test, gk->start - 1, gk->start, 0);
	guestmem_kunit_store(test, gk->end, gk->end + 1, 0);

	KUNIT_ASSERT_EQ(test, 0, guestmem_add_placeholder(&gk->mapping, gk->start,
							  gk->order));
	KUNIT_EXPECT_EQ(test, gk->mapping.nrpages, 2 + (1UL << gk->order));
	guestmem_kunit_expect_placeholder(test, gk->start, gk->end, gk->order);
	return 0;
}

/* Every test leaves one huge page and its neighbors in the page cache. */
static void guestmem_kunit_exit(struct kunit *test)
{
	struct guestmem_kunit *gk = test->priv;
	struct xarray *xa;

	if (!gk)
		return;

	xa = &gk->mapping.i_pages;
	KUNIT_EXPECT_PTR_EQ(test, guestmem_kunit_folio(gk->start - 1),
			    xa_load(xa, gk->start - 1));
	KUNIT_EXPECT_PTR_EQ(test, guestmem_kunit_folio(gk->end), xa_load(xa, gk->end));

	guestmem_del_entry(&gk->mapping, gk->start, gk->order);
	guestmem_del_entry(&gk->mapping, gk->start - 1, 0);
	guestmem_del_entry(&gk->mapping, gk->end, 0);
	KUNIT_EXPECT_EQ(test, gk->mapping.nrpages, 0);
	KUNIT_EXPECT_TRUE(test, xa_empty(xa));
	xa_destroy(xa);
}

/* Abort prepared splits: replace the split placeholders by the huge page. */
static void abort_puts_the_whole_back(struct kunit *test)
{
	struct guestmem_kunit *gk = test->priv;

	guestmem_kunit_split_whole(test);
	guestmem_kunit_store(test, gk->start, gk->end, gk->order);
	guestmem_kunit_hide(test, gk->start, gk->end, gk->order);

	guestmem_kunit_split_whole(test);
	guestmem_kunit_split(test, gk->start, gk->part_order, 0);
	guestmem_kunit_store(test, gk->start, gk->end, gk->order);
}

/* Split the first part, the last part, or one in between.  The others stay whole. */
static void one_part_in_pages(struct kunit *test)
{
	struct guestmem_kunit *gk = test->priv;
	unsigned long size = 1UL << gk->part_order;
	pgoff_t parts[] = {
		gk->start, gk->end - size, round_down(gk->start + gk->start / 3, size),
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(parts); i++) {
		guestmem_kunit_split_whole(test);
		guestmem_kunit_split(test, parts[i], gk->part_order, 0);
		guestmem_kunit_store(test, parts[i], parts[i] + size, 0);
		guestmem_kunit_store(test, gk->start, parts[i], gk->part_order);
		guestmem_kunit_store(test, parts[i] + size, gk->end, gk->part_order);

		/* Merge the part, then the huge page. */
		guestmem_kunit_hide(test, parts[i], parts[i] + size, 0);
		guestmem_kunit_store(test, parts[i], parts[i] + size, gk->part_order);
		guestmem_kunit_merge_all(test);
		guestmem_kunit_hide(test, gk->start, gk->end, gk->order);
	}
}

static void all_in_pages(struct kunit *test)
{
	struct guestmem_kunit *gk = test->priv;
	pgoff_t i;

	guestmem_kunit_split_whole(test);
	for (i = gk->start; i < gk->end; i += 1UL << gk->part_order)
		guestmem_kunit_split(test, i, gk->part_order, 0);
	guestmem_kunit_store(test, gk->start, gk->end, 0);
	guestmem_kunit_hide(test, gk->start, gk->end, 0);
	guestmem_kunit_merge_all(test);
}

/*
 * When the huge page at index 0 is the only one, the XArray shrinks to its minimum
 * height.  It has to grow when the huge page becomes one entry again.  Another task can
 * remove the neighbor at any time, also after the merge or the abort has been prepared.
 */
static void first_page_is_left_alone(struct kunit *test)
{
	struct guestmem_kunit *gk, *neighbors = test->priv;
	const pgoff_t others[] = { 1, XA_CHUNK_SIZE };
	struct address_space *mapping;
	struct xa_state store;
	pgoff_t other;
	bool late;
	int i;

	for (i = 0; i < 2 * ARRAY_SIZE(others); i++) {
		gk = guestmem_kunit_alloc(test, 0);
		test->priv = gk;
		mapping = &gk->mapping;
		other = others[i / 2] << gk->order;
		late = i % 2;

		KUNIT_ASSERT_EQ(test, 0, guestmem_add_placeholder(mapping, 0, gk->order));
		KUNIT_ASSERT_EQ(test, 0, guestmem_add_placeholder(mapping, other, gk->order));
		guestmem_kunit_split_whole(test);
		guestmem_kunit_split(test, 0, gk->part_order, 0);
		if (!late)
			guestmem_del_entry(mapping, other, gk->order);
		guestmem_kunit_prepare_store(test, &store);
		if (late)
			guestmem_del_entry(mapping, other, gk->order);
		guestmem_kunit_merge_prepared(test, &store);

		guestmem_del_entry(mapping, 0, gk->order);
		KUNIT_EXPECT_EQ(test, mapping->nrpages, 0);
		KUNIT_EXPECT_TRUE(test, xa_empty(&mapping->i_pages));
		xa_destroy(&mapping->i_pages);
	}
	test->priv = neighbors;
}

struct guestmem_kunit_change {
	struct guestmem_change change;
	struct kunit *test;
	struct folio *folio;
	pgoff_t index;
	bool goes;		/* drop the reference during the wait */
};

static bool guestmem_kunit_wait(struct guestmem_change *change)
{
	struct guestmem_kunit_change *c = container_of(change, typeof(*c), change);

	guestmem_kunit_expect_placeholder(c->test, c->index,
					  c->index + folio_nr_pages(c->folio),
					  folio_order(c->folio));
	if (c->goes)
		folio_put(c->folio);
	return c->goes;
}

static void guestmem_kunit_freeze_busy(struct kunit *test, pgoff_t index,
				       unsigned int order)
{
	struct guestmem_kunit *gk = test->priv;
	struct guestmem_allocator gm = { .mapping = &gk->mapping };
	struct guestmem_kunit_change c = {
		.change.wait = guestmem_kunit_wait,
		.test = test,
		.index = index,
	};
	struct hugetlb_split split = { .change.index = index };
	const int refs = 1 << order;

	c.folio = folio_alloc(GFP_KERNEL, order);
	KUNIT_ASSERT_NOT_NULL(test, c.folio);
	split.page = &c.folio->page;
	/* Add the references of the page cache to the one from folio_alloc(). */
	folio_ref_add(c.folio, refs);
	guestmem_store(&gk->mapping, index, order, c.folio);

	KUNIT_EXPECT_EQ(test, -EAGAIN, guestmem_freeze_range(&gm, &c.change, &split, index,
							     index + refs));
	KUNIT_EXPECT_EQ(test, index, c.change.busy);
	KUNIT_EXPECT_EQ(test, refs + 1, folio_ref_count(c.folio));

	/* Lookups return the folio again, and its references are unchanged. */
	guestmem_insert(&gk->mapping, index, c.folio);
	KUNIT_EXPECT_PTR_EQ(test, (void *)c.folio,
			    xa_load(&gk->mapping.i_pages, index + refs - 1));
	KUNIT_EXPECT_EQ(test, order, xa_get_order(&gk->mapping.i_pages, index));
	KUNIT_EXPECT_EQ(test, refs + 1, folio_ref_count(c.folio));

	c.goes = true;
	KUNIT_EXPECT_EQ(test, 0, guestmem_freeze_range(&gm, &c.change, &split, index,
						       index + refs));
	guestmem_kunit_expect_placeholder(test, index, index + refs, order);
	KUNIT_EXPECT_EQ(test, 0, folio_ref_count(c.folio));

	guestmem_kunit_store(test, index, index + refs, order);
	folio_ref_unfreeze(c.folio, 1);
	folio_put(c.folio);
}

/* Lookups do not return a busy folio during the wait, but do afterward. */
static void folio_in_use_is_put_back(struct kunit *test)
{
	struct guestmem_kunit *gk = test->priv;

	guestmem_kunit_freeze_busy(test, gk->start - 1, 0);
	if (gk->order <= MAX_PAGE_ORDER)
		guestmem_kunit_freeze_busy(test, gk->start, gk->order);
}

static struct kunit_case guestmem_split_test_cases[] = {
	KUNIT_CASE_PARAM(abort_puts_the_whole_back, guestmem_orders_gen_params),
	KUNIT_CASE_PARAM(one_part_in_pages, guestmem_orders_gen_params),
	KUNIT_CASE_PARAM(all_in_pages, guestmem_orders_gen_params),
	KUNIT_CASE_PARAM(first_page_is_left_alone, guestmem_orders_gen_params),
	KUNIT_CASE_PARAM(folio_in_use_is_put_back, guestmem_orders_gen_params),
	{}
};

static struct kunit_suite guestmem_split_test_suite = {
	.name = "guestmem_split",
	.init = guestmem_kunit_init,
	.exit = guestmem_kunit_exit,
	.test_cases = guestmem_split_test_cases,
};

kunit_test_suite(guestmem_split_test_suite);

#endif /* _MM_GUESTMEM_SPLIT_KUNIT_H */

#endif /* CONFIG_GUESTMEM_SPLIT_KUNIT_TEST */
