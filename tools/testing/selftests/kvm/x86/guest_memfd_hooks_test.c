// SPDX-License-Identifier: GPL-2.0-only
/*
 * What guest_memfd tells the architecture: which pages become private when the guest
 * gets to them, and which become shared or are freed.
 *
 * For the VMs here there is nothing to be done then.  Tracepoints show what the hooks are
 * called with.
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
#define TO_PRIVATE	"kvm_gmem_make_private"
#define RECLAIM		"kvm_gmem_reclaim"

struct hooks_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	size_t page_size;
	u64 size;
	/* What the guest has of the file begins here, and in the same place there. */
	u64 start;
	int fd;
	int check;
	u64 *pfns;	/* of the file's pages, of whatever size, as the hooks tell */
	u8 *told;	/* how often, for each 4 KiB of the file */
	u8 *expected;
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
	kvm_close(t->check);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	t->fd = -1;
}

FIXTURE_SETUP(hooks)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct hooks_test *t = &self->t;

	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");
	if (reason)
		SKIP(return, "%s", reason);
	if (mount("none", TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "no tracefs");
	if (access(TRACING "events/kvm/" TO_PRIVATE, F_OK) ||
	    access(TRACING "events/kvm/" RECLAIM, F_OK))
		SKIP(return, "nothing has to be told to the architecture");

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
	write_number(TRACING "events/kvm/" TO_PRIVATE "/enable", 1);
	write_number(TRACING "events/kvm/" RECLAIM "/enable", 1);
}

FIXTURE_TEARDOWN(hooks)
{
	struct hooks_test *t = &self->t;

	write_number(TRACING "events/kvm/" TO_PRIVATE "/enable", 0);
	write_number(TRACING "events/kvm/" RECLAIM "/enable", 0);
	if (t->fd >= 0)
		close_file(t);
	free(t->pfns);
	free(t->told);
	free(t->expected);
	hugetlb_expect_released(&t->counters, "after close");
}

/* All blocks are aligned, in memory and in the guest. */
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

static void read_hook(struct hooks_test *t, bool to_private)
{
	FILE *file = fopen(TRACING "trace", "r");
	unsigned long gfn, pfn, nr;
	char line[512], *args;

	TEST_ASSERT(file, "Can't open the trace");
	memset(t->told, 0, t->size / SZ_4K);
	while (fgets(line, sizeof(line), file)) {
		TEST_ASSERT(!strstr(line, "LOST"), "The trace has not all events");
		args = strstr(line, to_private ? TO_PRIVATE ": " : RECLAIM ": ");
		if (!args)
			continue;

		args = strchr(args, ' ');
		if (to_private) {
			if (sscanf(args, " gfn %lx pfn %lx nr_pages %lx", &gfn, &pfn, &nr) != 3)
				TEST_FAIL("Can't read: %s", line);
			TEST_ASSERT(gfn >= (GMEM_GPA + t->start) / SZ_4K &&
				    gfn + nr <= (GMEM_GPA + t->size) / SZ_4K,
				    "Not in the slot: 0x%lx pages at 0x%lx", nr, gfn);
			tell(t, gfn - GMEM_GPA / SZ_4K, pfn, nr);
		} else {
			if (sscanf(args, " pfn %lx nr_pages %lx", &pfn, &nr) != 2)
				TEST_FAIL("Can't read: %s", line);
			tell(t, index_of_pfn(t, pfn), pfn, nr);
		}
	}
	fclose(file);
}

enum {
	NOT_TOLD,
	TOLD,
	PERHAPS,
};

/* Start with nothing expected. */
static void expect_none(struct hooks_test *t)
{
	memset(t->expected, 0, t->size / SZ_4K);
	write_number(TRACING "trace", 0);
}

static void expect(struct hooks_test *t, u64 start, u64 end, u8 expected)
{
	memset(t->expected + start / SZ_4K, expected, (end - start) / SZ_4K);
}

/* A page is made private as often as there are faults on it, but shared once. */
static void expect_told(struct hooks_test *t, bool to_private)
{
	const char *what = to_private ? "private" : "shared";
	u64 i, nr = 0;

	read_hook(t, !to_private);
	for (i = 0; i < t->size / SZ_4K; i++)
		TEST_ASSERT(!t->told[i], "Told of page 0x%lx when others became %s", i, what);

	read_hook(t, to_private);
	for (i = 0; i < t->size / SZ_4K; i++) {
		TEST_ASSERT(t->told[i] <= 1 || to_private,
			    "Told %u times that page 0x%lx is shared", t->told[i], i);
		TEST_ASSERT(t->expected[i] == PERHAPS || t->expected[i] == !!t->told[i],
			    "Page 0x%lx, told to be %s: %u", i, what, t->told[i]);
		nr += !!t->told[i];
	}
	ksft_print_msg("told of 0x%lx pages that are %s\n", nr, what);
	if (t->fd >= 0)
		gmem_check(t->check, t->fd, true);
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
 * What of the slot's first page has been mapped with what is shared up to @end, all or a part
 * of it.  A block that is larger than the mapping can have been made private for that.
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

	expect_none(t);
	guest_do(t, GMEM_WRITE);
	expect(t, start, t->size, TOLD);
	expect_told(t, true);

	/* Some pages, then more of them: only those that become shared. */
	expect_none(t);
	convert(t, start + SZ_4K, SZ_8K, SHARED);
	expect(t, start + SZ_4K, start + SZ_4K + SZ_8K, TOLD);
	expect_told(t, false);

	expect_none(t);
	convert(t, start, SZ_32K, SHARED);
	expect(t, start, start + SZ_32K, TOLD);
	expect(t, start + SZ_4K, start + SZ_4K + SZ_8K, NOT_TOLD);
	expect_told(t, false);

	/* What was mapped with them has to be mapped again, without them. */
	expect_none(t);
	guest_do(t, GMEM_CHECK);
	expect_rest_of_page(t, start + SZ_32K);
	expect_told(t, true);

	/* Becomes private when the guest gets to it. */
	expect_none(t);
	convert(t, start, SZ_32K, PRIVATE);
	expect_told(t, true);
	guest_do(t, GMEM_CHECK);
	expect(t, start, start + SZ_32K, TOLD);
	expect_rest_of_page(t, start + SZ_32K);
	expect_told(t, true);

	/* From one part or huge page to the next. */
	expect_none(t);
	convert(t, start + SZ_2M - SZ_4K, SZ_64K, SHARED);
	expect(t, start + SZ_2M - SZ_4K, start + SZ_2M - SZ_4K + SZ_64K, TOLD);
	expect_told(t, false);
}

/* Whatever the pages of a file are when it loses them, each is given back once. */
static void expect_lost(struct hooks_test *t, void (*lose)(struct hooks_test *t))
{
	guest_do(t, GMEM_WRITE);
	convert(t, t->start + SZ_8K, SZ_4K, SHARED);
	convert(t, t->size - SZ_4K, SZ_4K, SHARED);
	/* To know where they are. */
	read_hook(t, true);

	expect_none(t);
	lose(t);
	expect(t, t->page_size == SZ_4K ? t->start : 0, t->size, TOLD);
	expect_told(t, false);
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
	return test_harness_run(argc, argv);
}
