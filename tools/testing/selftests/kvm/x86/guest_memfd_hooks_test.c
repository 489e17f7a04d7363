// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hooks through which guest_memfd tells the architecture about pages that become
 * private, become shared, or are freed.  Pages become private when the guest accesses
 * them.
 *
 * The hooks have nothing to do for the VMs here.  Tracepoints show their arguments.
 */
#include <fcntl.h>
#include <limits.h>
#include <sys/mount.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/log2.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PATTERN		0x600d600d00000000ull

#define TRACING		"/sys/kernel/tracing/"

enum hook {
	MAKE_PRIVATE,
	MAKE_SHARED,
	RECLAIM,
	PREPARE_SPLIT,
	NR_HOOKS,
};

static const char *const hooks[NR_HOOKS] = {
	[MAKE_PRIVATE] = "kvm_gmem_make_private",
	[MAKE_SHARED] = "kvm_gmem_make_shared",
	[RECLAIM] = "kvm_gmem_reclaim",
	[PREPARE_SPLIT] = "kvm_gmem_prepare_split",
};

struct hooks_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	size_t page_size;
	u64 size;
	/* Offset of the memslot in the file, and from GMEM_GPA in the guest. */
	u64 start;
	int fd;
	int check;
	u64 *pfns;	/* first pfn of each of the file's pages, as the hooks report it */
	u8 *told;	/* number of calls, for each 4 KiB of the file */
	u8 *expected;
	unsigned int nr_calls;
	struct hugetlb_counters counters;
};

FIXTURE(hooks)
{
	struct hooks_test t;
};

FIXTURE_VARIANT(hooks)
{
	size_t page_size;
	long nr;
	/* The slot begins in the middle of a page. */
	bool part;
};

FIXTURE_VARIANT_ADD(hooks, 4k) { .page_size = SZ_4K, .nr = 1024, };
FIXTURE_VARIANT_ADD(hooks, 2m) { .page_size = SZ_2M, .nr = 4, };
FIXTURE_VARIANT_ADD(hooks, 2m_part) { .page_size = SZ_2M, .nr = 4, .part = true, };
FIXTURE_VARIANT_ADD(hooks, 1g) { .page_size = SZ_1G, .nr = 1, };
FIXTURE_VARIANT_ADD(hooks, 1g_part) { .page_size = SZ_1G, .nr = 1, .part = true, };

static void close_file(struct hooks_test *t)
{
	gmem_close_check(t->check);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	t->fd = -1;
}

static void enable_hooks(int enable)
{
	char path[128];
	int i;

	for (i = 0; i < NR_HOOKS; i++) {
		snprintf(path, sizeof(path), TRACING "events/kvm/%s/enable", hooks[i]);
		write_number(path, enable);
	}
}

FIXTURE_SETUP(hooks)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct hooks_test *t = &self->t;
	char path[128];
	int i;

	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");
	if (reason)
		SKIP(return, "%s", reason);
	if (mount("none", TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "needs CONFIG_FTRACE");
	for (i = 0; i < NR_HOOKS; i++) {
		snprintf(path, sizeof(path), TRACING "events/kvm/%s", hooks[i]);
		if (access(path, F_OK))
			SKIP(return, "KVM has no hooks, needs CONFIG_KVM_GMEM_TEST");
	}

	t->page_size = variant->page_size;
	t->size = variant->nr * variant->page_size;
	t->start = variant->part ? variant->page_size / 2 : 0;
	hugetlb_get(t->page_size, &t->counters);

	t->vm = gmem_vm_create(1, &t->vcpu);
	t->fd = vm_create_guest_memfd(t->vm, t->size, gmem_flags(t->page_size) |
					 GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD,
				   GMEM_GPA + t->start, t->size - t->start, NULL,
				   t->fd, t->start);
	t->check = gmem_open_check(t->vm);

	t->pfns = calloc(variant->nr, sizeof(*t->pfns));
	t->told = malloc(t->size / SZ_4K);
	t->expected = malloc(t->size / SZ_4K);
	TEST_ASSERT(t->pfns && t->told && t->expected, "Out of memory");
	write_number(TRACING "trace", 0);
	enable_hooks(1);
}

FIXTURE_TEARDOWN(hooks)
{
	struct hooks_test *t = &self->t;

	enable_hooks(0);
	if (t->fd >= 0)
		close_file(t);
	free(t->pfns);
	free(t->told);
	free(t->expected);
	hugetlb_expect_released(&t->counters, "after close");
}

/* Count a call.  All blocks must be aligned, in memory and in the guest. */
static void tell(struct hooks_test *t, u64 index, u64 pfn, u64 nr)
{
	const u64 nr_pages = t->page_size / SZ_4K;
	u64 *first = &t->pfns[index / nr_pages];
	u64 i;

	TEST_ASSERT(is_power_of_2(nr) && !((index | pfn) & (nr - 1)),
		    "0x%lx pages at 0x%lx, pfn 0x%lx", nr, index, pfn);
	TEST_ASSERT(index % nr_pages + nr <= nr_pages, "More than a page of the file");

	if (!*first)
		*first = pfn - index % nr_pages;
	TEST_ASSERT_EQ(pfn, *first + index % nr_pages);

	for (i = index; i < index + nr; i++)
		if (t->told[i] < UCHAR_MAX)
			t->told[i]++;
}

static u64 index_of_pfn(struct hooks_test *t, u64 pfn)
{
	const u64 nr_pages = t->page_size / SZ_4K;
	u64 i;

	for (i = 0; i < t->size / t->page_size; i++)
		if (t->pfns[i] && pfn - t->pfns[i] < nr_pages)
			return i * nr_pages + pfn - t->pfns[i];
	TEST_FAIL("pfn 0x%lx is none of the file's", pfn);
}

static void read_hook(struct hooks_test *t, enum hook hook)
{
	FILE *file = fopen(TRACING "trace", "r");
	unsigned long gfn, pfn, nr;
	char line[512], *args;

	TEST_ASSERT(file, "Can't open the trace");
	memset(t->told, 0, t->size / SZ_4K);
	t->nr_calls = 0;
	while (fgets(line, sizeof(line), file)) {
		TEST_ASSERT(!strstr(line, "LOST"), "The trace has not all events");
		args = strstr(line, hooks[hook]);
		if (!args)
			continue;

		t->nr_calls++;
		args = strchr(args, ' ');
		if (hook == MAKE_PRIVATE) {
			if (sscanf(args, " gfn %lx pfn %lx nr_pages %lx", &gfn, &pfn, &nr) != 3)
				TEST_FAIL("Can't read: %s", line);
			TEST_ASSERT(gfn >= (GMEM_GPA + t->start) / SZ_4K &&
				    gfn + nr <= (GMEM_GPA + t->size) / SZ_4K,
				    "Not in the slot: 0x%lx pages at 0x%lx", nr, gfn);
			tell(t, gfn - GMEM_GPA / SZ_4K, pfn, nr);
			continue;
		}

		if (sscanf(args, " pfn %lx nr_pages %lx", &pfn, &nr) != 2)
			TEST_FAIL("Can't read: %s", line);
		/* A run need not be a block. */
		for (; hook == MAKE_SHARED && nr > 1; pfn++, nr--)
			tell(t, index_of_pfn(t, pfn), pfn, 1);
		tell(t, index_of_pfn(t, pfn), pfn, nr);
	}
	fclose(file);
}

enum {
	NOT_TOLD,
	TOLD,
	PERHAPS,
};

/* Expect no calls, and clear the trace. */
static void expect_none(struct hooks_test *t)
{
	memset(t->expected, 0, t->size / SZ_4K);
	write_number(TRACING "trace", 0);
}

static void expect(struct hooks_test *t, u64 start, u64 end, u8 expected)
{
	memset(t->expected + start / SZ_4K, expected, (end - start) / SZ_4K);
}

/* Several faults may make a page private, but it becomes shared once. */
static void expect_told(struct hooks_test *t, enum hook hook)
{
	enum hook other;
	u64 i, nr = 0;

	for (other = 0; other < PREPARE_SPLIT; other++) {
		if (other == hook)
			continue;
		read_hook(t, other);
		TEST_ASSERT(!t->nr_calls, "%u calls of %s, not of %s alone", t->nr_calls,
			    hooks[other], hooks[hook]);
	}

	read_hook(t, hook);
	for (i = 0; i < t->size / SZ_4K; i++) {
		TEST_ASSERT(t->told[i] <= 1 || hook == MAKE_PRIVATE,
			    "%u calls of %s for page 0x%lx", t->told[i], hooks[hook], i);
		TEST_ASSERT(t->expected[i] == PERHAPS || t->expected[i] == !!t->told[i],
			    "Page 0x%lx, calls of %s: %u", i, hooks[hook], t->told[i]);
		nr += !!t->told[i];
	}
	ksft_print_msg("%s: 0x%lx pages in %u calls\n", hooks[hook], nr, t->nr_calls);
	if (t->fd >= 0)
		gmem_check(t->check, t->fd, true);
}

/*
 * Pages became shared in contiguous runs.  Base pages need not be contiguous.  Calls
 * prepared the split of each folio that has split, the whole of it, and of no other.
 */
static void expect_shared(struct hooks_test *t, unsigned int runs, u64 split_start,
			  u64 split_end)
{
	u64 i;

	expect_told(t, MAKE_SHARED);
	TEST_ASSERT(t->page_size == SZ_4K || t->nr_calls == runs, "%u runs of %u",
		    t->nr_calls, runs);

	read_hook(t, PREPARE_SPLIT);
	if (t->page_size == SZ_4K)
		split_end = 0;
	for (i = 0; i < t->size / SZ_4K; i++)
		TEST_ASSERT_EQ(t->told[i], i >= split_start / SZ_4K && i < split_end / SZ_4K);
}

static void convert(struct hooks_test *t, u64 offset, u64 size, u64 attributes)
{
	TEST_ASSERT(!gmem_convert(t->fd, offset, size, attributes, NULL),
		    "No conversion: errno %d (%s)", errno, strerror(errno));
}

static void guest_do(struct hooks_test *t, enum gmem_op op)
{
	gmem_guest_do(t->vcpu, op, GMEM_GPA + t->start, t->size - t->start,
		      SZ_4K, PATTERN);
}

/*
 * The old mapping of the range up to @end also covered memory behind it: all or a part
 * of the rest of the slot's first page.  Expect that to be mapped again.  A call may be
 * for a larger block than is mapped, hence PERHAPS.
 */
static void expect_rest_of_page(struct hooks_test *t, u64 end)
{
	expect(t, end, max_t(u64, end, t->page_size), t->start ? PERHAPS : TOLD);
	if (t->start && t->page_size == SZ_1G)
		expect(t, end, t->start + SZ_2M, TOLD);
}

TEST_F_TIMEOUT(hooks, conversions, SLOW)
{
	struct hooks_test *t = &self->t;
	const u64 start = t->start;
	u64 first, end;

	expect_none(t);
	guest_do(t, GMEM_WRITE);
	expect(t, start, t->size, TOLD);
	expect_told(t, MAKE_PRIVATE);

	/* Convert some pages, then a range around them.  Only pages that change are reported. */
	expect_none(t);
	convert(t, start + SZ_4K, SZ_8K, SHARED);
	expect(t, start + SZ_4K, start + SZ_4K + SZ_8K, TOLD);
	expect_shared(t, 1, 0, t->page_size);

	expect_none(t);
	convert(t, start, SZ_32K, SHARED);
	expect(t, start, start + SZ_32K, TOLD);
	expect(t, start + SZ_4K, start + SZ_4K + SZ_8K, NOT_TOLD);
	expect_shared(t, 2, 0, 0);

	/* Memory in the same mapping has to be mapped again, without the shared pages. */
	expect_none(t);
	guest_do(t, GMEM_CHECK);
	expect_rest_of_page(t, start + SZ_32K);
	expect_told(t, MAKE_PRIVATE);

	/* Pages become private when the guest accesses them, not by the conversion. */
	expect_none(t);
	convert(t, start, SZ_32K, PRIVATE);
	expect_told(t, MAKE_PRIVATE);
	guest_do(t, GMEM_CHECK);
	expect(t, start, start + SZ_32K, TOLD);
	expect_rest_of_page(t, start + SZ_32K);
	expect_told(t, MAKE_PRIVATE);

	/* Convert across the end of a part or huge page. */
	expect_none(t);
	first = start + SZ_2M - SZ_4K;
	end = first + SZ_64K;
	convert(t, first, end - first, SHARED);
	expect(t, first, end, TOLD);
	first -= first % t->page_size;
	end = round_up(end, t->page_size);
	expect_shared(t, (end - first) / t->page_size, first, end);

	/* Another part of the huge page, or another huge page. */
	if (t->page_size == SZ_4K)
		return;
	expect_none(t);
	first = start + SZ_4M;
	convert(t, first, SZ_4K, SHARED);
	expect(t, first, first + SZ_4K, TOLD);
	first -= first % SZ_2M;
	expect_shared(t, 1, first, first + SZ_2M);
}

/* Each page that a file loses is reclaimed once, whatever folio it is in. */
static void expect_lost(struct hooks_test *t, void (*lose)(struct hooks_test *t))
{
	guest_do(t, GMEM_WRITE);
	convert(t, t->start + SZ_8K, SZ_4K, SHARED);
	convert(t, t->size - SZ_4K, SZ_4K, SHARED);
	/* Read the pfns from the trace. */
	read_hook(t, MAKE_PRIVATE);

	expect_none(t);
	lose(t);
	expect(t, t->page_size == SZ_4K ? t->start : 0, t->size, TOLD);
	expect_told(t, RECLAIM);
}

static void punch_all(struct hooks_test *t)
{
	kvm_fallocate(t->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, t->size);
}

TEST_F_TIMEOUT(hooks, punch, SLOW)
{
	expect_lost(&self->t, punch_all);
}

TEST_F_TIMEOUT(hooks, close, SLOW)
{
	expect_lost(&self->t, close_file);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_prepare_pools();
	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
