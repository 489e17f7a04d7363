// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit tests of guest_memfd attributes
 *
 * The expected state of a small file is a bitmap with one bit per page.  The
 * expected state of a large file is computed.
 */
#include <kunit/test.h>

#include <linux/bitmap.h>
#include <linux/fault-inject.h>
#include <linux/kvm.h>
#include <linux/mutex.h>
#include <linux/sizes.h>

#include "gmem_attributes.h"

#define SHARED		0
#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE

/* Enough for a change with two more pages on each side. */
#define SMALL_PAGES	6

struct gmem_attributes_fixture {
	struct gmem_attributes ga;
	struct mutex lock;	/* protects the attributes */
};

static int gmem_attributes_test_init(struct kunit *test)
{
	struct gmem_attributes_fixture *f;

	f = kunit_kzalloc(test, sizeof(*f), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, f);
	mutex_init(&f->lock);
	test->priv = f;
	return 0;
}

static void gmem_attributes_test_exit(struct kunit *test)
{
	struct gmem_attributes_fixture *f = test->priv;

	kvm_gmem_attributes_destroy(&f->ga);
	/* RCU frees the nodes.  Wait for that: it is part of the test. */
	rcu_barrier();
}

/* Create a file whose pages all have @attributes. */
static void create(struct kunit *test, pgoff_t nr_pages, u64 attributes)
{
	struct gmem_attributes_fixture *f = test->priv;

	kvm_gmem_attributes_destroy(&f->ga);
	KUNIT_ASSERT_EQ(test, 0, kvm_gmem_attributes_init(&f->ga, &f->lock, nr_pages,
							  attributes));
}

static void set(struct kunit *test, pgoff_t start, pgoff_t end, u64 attributes)
{
	struct gmem_attributes_fixture *f = test->priv;
	struct ma_state mas;
	int want, r;

	mutex_lock(&f->lock);
	want = kvm_gmem_attributes_are(&f->ga, start, end, attributes) ? -EALREADY : 0;
	r = kvm_gmem_attributes_prepare(&f->ga, &mas, start, end, attributes,
					GFP_KERNEL);
	if (!r)
		kvm_gmem_attributes_commit(&mas, attributes);
	mutex_unlock(&f->lock);
	KUNIT_ASSERT_EQ(test, want, r);
}

static void expect_range(struct kunit *test, pgoff_t index, pgoff_t first,
			 pgoff_t last, u64 attributes)
{
	struct gmem_attributes_fixture *f = test->priv;
	struct gmem_attributes_range range = kvm_gmem_attributes_get(&f->ga, index);

	KUNIT_EXPECT_EQ(test, first, range.first);
	KUNIT_EXPECT_EQ(test, last, range.last);
	KUNIT_EXPECT_EQ(test, attributes, range.attributes);
}

/* Make page n of a small file private if bit n of @state is set. */
static void create_small(struct kunit *test, unsigned long state)
{
	unsigned int i;

	create(test, SMALL_PAGES, SHARED);
	for_each_set_bit(i, &state, SMALL_PAGES)
		set(test, i, i + 1, PRIVATE);
}

static void expect_small(struct kunit *test, unsigned long state)
{
	unsigned int i, first, last;
	bool private;

	for (i = 0; i < SMALL_PAGES; i++) {
		private = test_bit(i, &state);
		first = i;
		while (first && test_bit(first - 1, &state) == private)
			first--;
		last = i;
		while (last < SMALL_PAGES - 1 && test_bit(last + 1, &state) == private)
			last++;
		expect_range(test, i, first, last, private ? PRIVATE : SHARED);
	}
}

/*
 * Make every change to every state of a small file: this covers all ways to
 * split and merge ranges.
 */
static void every_change_of_a_small_file(struct kunit *test)
{
	unsigned long state, want;
	unsigned int start, end;

	for (state = 0; state < BIT(SMALL_PAGES); state++) {
		for (start = 0; start < SMALL_PAGES; start++) {
			for (end = start + 1; end <= SMALL_PAGES; end++) {
				want = state;
				bitmap_clear(&want, start, end - start);
				create_small(test, state);
				set(test, start, end, SHARED);
				expect_small(test, want);

				bitmap_set(&want, start, end - start);
				create_small(test, state);
				set(test, start, end, PRIVATE);
				expect_small(test, want);
			}
		}
	}
}

static void are_tells_about_the_whole_range(struct kunit *test)
{
	struct gmem_attributes_fixture *f = test->priv;
	unsigned int start, end;

	create_small(test, GENMASK(3, 2));
	for (start = 0; start < SMALL_PAGES; start++) {
		for (end = start + 1; end <= SMALL_PAGES; end++) {
			KUNIT_EXPECT_EQ(test, start >= 2 && end <= 4,
					kvm_gmem_attributes_are(&f->ga, start, end,
								PRIVATE));
			KUNIT_EXPECT_EQ(test, end <= 2 || start >= 4,
					kvm_gmem_attributes_are(&f->ga, start, end,
								SHARED));
		}
	}
}

static void file_of_one_page(struct kunit *test)
{
	create(test, 1, PRIVATE);
	expect_range(test, 0, 0, 0, PRIVATE);
	set(test, 0, 1, SHARED);
	expect_range(test, 0, 0, 0, SHARED);
	set(test, 0, 1, PRIVATE);
	expect_range(test, 0, 0, 0, PRIVATE);
}

#define HUGE_PAGES	(16ull * SZ_1T >> PAGE_SHIFT)

static void file_of_16_tib(struct kunit *test)
{
	const pgoff_t last = HUGE_PAGES - 1, middle = HUGE_PAGES / 2;

	create(test, HUGE_PAGES, PRIVATE);
	expect_range(test, 0, 0, last, PRIVATE);
	expect_range(test, last, 0, last, PRIVATE);

	set(test, 0, 1, SHARED);
	set(test, last, HUGE_PAGES, SHARED);
	set(test, middle, middle + 1, SHARED);
	expect_range(test, 0, 0, 0, SHARED);
	expect_range(test, 1, 1, middle - 1, PRIVATE);
	expect_range(test, middle, middle, middle, SHARED);
	expect_range(test, last - 1, middle + 1, last - 1, PRIVATE);
	expect_range(test, last, last, last, SHARED);

	set(test, 0, HUGE_PAGES, SHARED);
	expect_range(test, middle, 0, last, SHARED);
	set(test, 1, last, PRIVATE);
	expect_range(test, middle, 1, last - 1, PRIVATE);
	set(test, 0, HUGE_PAGES, PRIVATE);
	expect_range(test, middle, 0, last, PRIVATE);
}

#define MANY_RANGES	100000ul

static void very_many_ranges(struct kunit *test)
{
	struct gmem_attributes_fixture *f = test->priv;
	struct gmem_attributes_range range;
	unsigned long i, nr = 0;

	create(test, MANY_RANGES, SHARED);
	/* Go backward, so that no store appends to the tree. */
	for (i = MANY_RANGES; i; i -= 2)
		set(test, i - 1, i, PRIVATE);

	for (i = 0; i < MANY_RANGES; i = range.last + 1, nr++) {
		range = kvm_gmem_attributes_get(&f->ga, i);
		if (range.first != i || range.last != i ||
		    range.attributes != (i & 1 ? PRIVATE : SHARED))
			break;
	}
	KUNIT_EXPECT_EQ(test, MANY_RANGES, nr);

	/* Close every other gap, then all gaps, then make all pages shared. */
	for (i = 2; i < MANY_RANGES; i += 4)
		set(test, i, i + 1, PRIVATE);
	for (i = 0, nr = 0; i < MANY_RANGES; i = range.last + 1, nr++)
		range = kvm_gmem_attributes_get(&f->ga, i);
	KUNIT_EXPECT_EQ(test, MANY_RANGES / 2, nr);

	set(test, 1, MANY_RANGES, PRIVATE);
	expect_range(test, 0, 0, 0, SHARED);
	expect_range(test, MANY_RANGES / 2, 1, MANY_RANGES - 1, PRIVATE);
	set(test, 0, MANY_RANGES, SHARED);
	expect_range(test, MANY_RANGES / 2, 0, MANY_RANGES - 1, SHARED);
}

/*
 * Build trees of two and more levels with full nodes, nearly empty nodes, and
 * nodes in between.  Free a tree with its file, or by setting the same
 * attributes for all pages.
 */
static void trees_of_many_shapes(struct kunit *test)
{
	const pgoff_t nr_pages = SZ_1T / PAGE_SIZE;
	unsigned long nr, i, step = 1;

	for (nr = 2; nr < 20000; nr += step) {
		create(test, nr_pages, PRIVATE);
		for (i = 0; i < nr; i++)
			set(test, 2 * i + 1, 2 * i + 2, SHARED);
		expect_range(test, 2 * nr - 1, 2 * nr - 1, 2 * nr - 1, SHARED);
		if (nr & 1) {
			set(test, 0, nr_pages, SHARED);
			expect_range(test, nr, 0, nr_pages - 1, SHARED);
		}
		rcu_barrier();
		step = nr < 1000 ? max(1, nr / 20) : nr / 4;
	}
}

static void aborted_change_is_none(struct kunit *test)
{
	struct gmem_attributes_fixture *f = test->priv;
	const unsigned long state = GENMASK(3, 2);
	struct ma_state mas;
	unsigned int start, end;
	int want, r;

	create_small(test, state);
	for (start = 0; start < SMALL_PAGES; start++) {
		for (end = start + 1; end <= SMALL_PAGES; end++) {
			want = start >= 2 && end <= 4 ? -EALREADY : 0;
			mutex_lock(&f->lock);
			r = kvm_gmem_attributes_prepare(&f->ga, &mas, start, end,
							PRIVATE, GFP_KERNEL);
			if (!r)
				kvm_gmem_attributes_abort(&mas);
			mutex_unlock(&f->lock);
			KUNIT_EXPECT_EQ(test, want, r);
			expect_small(test, state);
		}
	}
}

#ifdef CONFIG_FAILSLAB
/* By default failslab fails only allocations that cannot wait. */
static bool prepare_fails(struct kunit *test, pgoff_t index)
{
	struct gmem_attributes_fixture *f = test->priv;
	struct ma_state mas;
	int r;

	mutex_lock(&f->lock);
	current->fail_nth = 1;
	r = kvm_gmem_attributes_prepare(&f->ga, &mas, index, index + 1, SHARED,
					GFP_NOWAIT);
	current->fail_nth = 0;
	if (!r)
		kvm_gmem_attributes_abort(&mas);
	mutex_unlock(&f->lock);

	KUNIT_EXPECT_TRUE(test, !r || r == -ENOMEM);
	return r;
}

static void failed_change_is_none(struct kunit *test)
{
	struct gmem_attributes_fixture *f = test->priv;
	unsigned int failed = 0;
	pgoff_t i;

	/* Grow the tree from one node to several. */
	create(test, 1000, PRIVATE);
	for (i = 1; i < 1000; i += 2) {
		failed += prepare_fails(test, i);
		expect_range(test, i, i - 1, 999, PRIVATE);
		KUNIT_EXPECT_EQ(test, i < 2,
				kvm_gmem_attributes_are(&f->ga, 0, i, PRIVATE));
		set(test, i, i + 1, SHARED);
	}
	kunit_info(test, "%u of 500 changes refused\n", failed);
	KUNIT_EXPECT_GT(test, failed, 0);
}
#else
static void failed_change_is_none(struct kunit *test)
{
	kunit_skip(test, "needs CONFIG_FAILSLAB");
}
#endif

static struct kunit_case gmem_attributes_test_cases[] = {
	KUNIT_CASE_SLOW(every_change_of_a_small_file),
	KUNIT_CASE(are_tells_about_the_whole_range),
	KUNIT_CASE(file_of_one_page),
	KUNIT_CASE(file_of_16_tib),
	KUNIT_CASE_SLOW(very_many_ranges),
	KUNIT_CASE_SLOW(trees_of_many_shapes),
	KUNIT_CASE(aborted_change_is_none),
	KUNIT_CASE(failed_change_is_none),
	{}
};

static struct kunit_suite gmem_attributes_test_suite = {
	.name = "gmem_attributes",
	.init = gmem_attributes_test_init,
	.exit = gmem_attributes_test_exit,
	.test_cases = gmem_attributes_test_cases,
};

kunit_test_suite(gmem_attributes_test_suite);
