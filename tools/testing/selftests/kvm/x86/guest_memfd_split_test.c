// SPDX-License-Identifier: GPL-2.0-only
/*
 * Conversion of guest_memfd memory on huge pages.  Huge pages are split only as far as
 * their attributes require, and merged as soon as these allow it.
 *
 * After every step, the kernel compares the folios with those that the attributes
 * require, and guest and host check the contents of every page.
 */
#include <fcntl.h>
#include <stdio.h>

#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <linux/elf.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "cgroup_util.h"
#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

/* A part of a huge page is 2 MiB. */
#define PAGES_PER_PART	(SZ_2M / SZ_4K)

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PATTERN		0x600d600d00000000ull

struct split_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct kvm_vcpu *victim;	/* for accesses that fail */
	size_t page_size;
	size_t size;
	int fd;
	int check;
	char *mem;
	struct hugetlb_counters counters;
};

FIXTURE(split)
{
	struct split_test t;
};

FIXTURE_VARIANT(split)
{
	size_t page_size;
	long nr;
	u64 flags;
};

FIXTURE_VARIANT_ADD(split, 2m) { .page_size = SZ_2M, .nr = 4, };
FIXTURE_VARIANT_ADD(split, 1g) { .page_size = SZ_1G, .nr = 1, };
FIXTURE_VARIANT_ADD(split, 2m_shared) {
	.page_size = SZ_2M, .nr = 4, .flags = GUEST_MEMFD_FLAG_INIT_SHARED,
};

FIXTURE_VARIANT_ADD(split, 1g_shared) {
	.page_size = SZ_1G, .nr = 1, .flags = GUEST_MEMFD_FLAG_INIT_SHARED,
};

static void check(struct split_test *t)
{
	gmem_check(t->check, t->fd, true);
}

static void convert_unchecked(struct split_test *t, u64 offset, u64 size, u64 attributes)
{
	u64 error;
	int r = gmem_convert(t->fd, offset, size, attributes, &error);

	TEST_ASSERT(!r, "0x%lx bytes at 0x%lx to 0x%lx: errno %d (%s) at 0x%lx",
		    size, offset, attributes, errno, strerror(errno), error);
}

static void convert(struct split_test *t, u64 offset, u64 size, u64 attributes)
{
	convert_unchecked(t, offset, size, attributes);
	check(t);
}

static u64 *word(struct split_test *t, u64 offset)
{
	return (u64 *)(t->mem + offset);
}

static void guest_write_all(struct split_test *t)
{
	gmem_guest_do(t->vcpu, GMEM_WRITE, GMEM_GPA, t->size, SZ_4K, PATTERN);
}

static void guest_check_all(struct split_test *t)
{
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, t->size, SZ_4K, PATTERN);
}

FIXTURE_SETUP(split)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct split_test *t = &self->t;
	struct kvm_vcpu *vcpus[2];

	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");
	if (reason)
		SKIP(return, "%s", reason);

	t->page_size = variant->page_size;
	t->size = variant->nr * variant->page_size;
	hugetlb_get(t->page_size, &t->counters);
	t->vm = gmem_vm_create(2, vcpus);
	t->vcpu = vcpus[0];
	t->victim = vcpus[1];
	t->fd = vm_create_guest_memfd(t->vm, t->size, gmem_flags(t->page_size) |
				      GUEST_MEMFD_FLAG_MMAP | variant->flags);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   t->size, NULL, t->fd, 0);
	t->mem = kvm_mmap(t->size, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	t->check = gmem_open_check(t->vm);
}

FIXTURE_TEARDOWN(split)
{
	struct split_test *t = &self->t;

	gmem_close_check(t->check);
	kvm_munmap(t->mem, t->size);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	hugetlb_expect_released(&t->counters, "after close");
}

TEST_F_TIMEOUT(split, pages_here_and_there, SLOW)
{
	struct split_test *t = &self->t;
	const u64 offsets[] = {
		0, SZ_4K, SZ_2M - SZ_4K, t->size / 2, t->size / 2 - SZ_4K,
		t->size - SZ_2M, t->size - SZ_4K,
	};
	int i;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	check(t);
	for (i = 0; i < ARRAY_SIZE(offsets); i++) {
		convert(t, offsets[i], SZ_4K, SHARED);
		TEST_ASSERT_EQ(READ_ONCE(*word(t, offsets[i])), PATTERN + offsets[i]);
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, offsets[i] ^ SZ_4K)));
		guest_check_all(t);
		convert(t, offsets[i], SZ_4K, PRIVATE);
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, offsets[i])));
		guest_check_all(t);
	}
}

TEST_F_TIMEOUT(split, everything, SLOW)
{
	struct split_test *t = &self->t;
	u64 i;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	convert(t, 0, t->size, SHARED);
	guest_check_all(t);
	for (i = 0; i < t->size; i += SZ_4K)
		TEST_ASSERT_EQ(READ_ONCE(*word(t, i)), PATTERN + i);
	convert(t, 0, t->size, PRIVATE);
	guest_check_all(t);
}

/* Checking all folios of 1 GiB takes longer than a step, so check only after some. */
#define STEPS_PER_CHECK	32

/* Convert one page of each part. */
static void convert_in_parts(struct split_test *t, u64 offset, u64 attributes)
{
	u64 i;

	for (i = 0; i < t->size; i += SZ_2M) {
		convert_unchecked(t, i + offset, SZ_4K, attributes);
		if (t->page_size == SZ_2M || !(i / SZ_2M % STEPS_PER_CHECK))
			check(t);
		if (attributes == SHARED)
			TEST_ASSERT_EQ(READ_ONCE(*word(t, i + offset)), PATTERN + i + offset);
	}
	check(t);
}

/* Tracepoints explain why a guest has small mappings. */
TEST_F_TIMEOUT(split, tracing, SLOW)
{
	struct split_test *t = &self->t;
	bool is_1g = t->page_size == SZ_1G;

	if (mount("none", GMEM_TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "needs CONFIG_FTRACE");

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	write_number(GMEM_TRACING "events/guestmem/enable", 1);
	write_number(GMEM_TRACING "events/kvm/kvm_gmem_convert/enable", 1);
	convert(t, SZ_4K, SZ_4K, SHARED);
	convert(t, SZ_4K, SZ_4K, SHARED);
	convert(t, SZ_4K, SZ_4K, PRIVATE);
	write_number(GMEM_TRACING "events/guestmem/enable", 0);
	write_number(GMEM_TRACING "events/kvm/kvm_gmem_convert/enable", 0);

	EXPECT_EQ(3, gmem_traced("kvm_gmem_convert:", "index 0x1 -- 0x2"));
	EXPECT_EQ(2, gmem_traced("kvm_gmem_convert:", "result 0"));
	EXPECT_EQ(1, gmem_traced("kvm_gmem_convert:", "result -114"));
	EXPECT_EQ(1 + is_1g, gmem_traced("guestmem_split:", "index 0x0 "));
	EXPECT_EQ(is_1g, gmem_traced("guestmem_split:", "order 18 to 9"));
	EXPECT_EQ(1, gmem_traced("guestmem_split:", "order 9 to 0"));
	EXPECT_EQ(1, gmem_traced("guestmem_merge:", "index 0x0 "));
	EXPECT_EQ(1, gmem_traced("guestmem_merge:", is_1g ? "order 9 to 18" : "order 0 to 9"));
	write_number(GMEM_TRACING "trace", 0);
}

/* Split and merge part by part, then merge all parts at once. */
TEST_F_TIMEOUT(split, each_part_in_turn, SLOW)
{
	struct split_test *t = &self->t;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	convert_in_parts(t, SZ_8K, SHARED);
	guest_check_all(t);
	convert_in_parts(t, SZ_8K, PRIVATE);
	guest_check_all(t);

	convert_in_parts(t, 0, SHARED);
	convert(t, 0, t->size, PRIVATE);
	guest_check_all(t);
}

/* Convert a page every @stride bytes, in random order. */
static void convert_comb(struct split_test *t, u64 offset, u64 stride, int nr, u64 attributes)
{
	int order[PAGES_PER_PART], i, j;

	TEST_ASSERT(nr <= ARRAY_SIZE(order), "too many teeth");
	for (i = 0; i < nr; i++) {
		j = kvm_random_u32(&kvm_rng) % (i + 1);
		order[i] = order[j];
		order[j] = i;
	}
	for (i = 0; i < nr; i++) {
		convert_unchecked(t, offset + order[i] * stride, SZ_4K, attributes);
		if (!(i % STEPS_PER_CHECK))
			check(t);
	}
	check(t);
}

static void share_and_merge_comb(struct split_test *t, u64 offset, u64 stride, int nr)
{
	u64 i;

	convert_comb(t, offset, stride, nr, SHARED);
	for (i = offset; i < offset + nr * stride; i += stride)
		TEST_ASSERT_EQ(READ_ONCE(*word(t, i)), PATTERN + i);
	guest_check_all(t);
	convert_comb(t, offset, stride, nr, PRIVATE);
	for (i = offset; i < offset + nr * stride; i += stride)
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, i)));
	guest_check_all(t);
}

/* Convert one page of each part, then each page of one part, then every other one. */
TEST_F_TIMEOUT(split, combs, SLOW)
{
	struct split_test *t = &self->t;

	ksft_print_msg("seed 0x%x\n", kvm_random_seed);
	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	share_and_merge_comb(t, 0, SZ_2M, t->size / SZ_2M);
	share_and_merge_comb(t, t->size - SZ_2M, SZ_4K, PAGES_PER_PART);
	share_and_merge_comb(t, t->size / 2 + SZ_4K, SZ_8K, PAGES_PER_PART / 2);
}

static long kernel_memory(void)
{
	return cg_read_key_long(hugetlb_cgroup_path(), "memory.stat", "kernel ");
}

/* memory.stat can lag by a few pages. */
static long wait_for_kernel_memory(long min, long max)
{
	int i;

	for (i = 0; i < 1000 && (kernel_memory() < min || kernel_memory() > max); i++)
		usleep(10 * 1000);
	return kernel_memory();
}

#define NOT_OPTIMIZED	"the vmemmap of huge pages is not optimized"

/* The guest determines how many struct pages there are, so charge its cgroup. */
TEST_F_TIMEOUT(split, struct_pages_are_charged, SLOW)
{
	struct split_test *t = &self->t;
	const long nr_huge = t->size / t->page_size;
	/*
	 * Struct pages are 64 bytes per 4 KiB.  An optimized huge page keeps 4 KiB of
	 * them.
	 */
	const long nr_bytes = t->size / SZ_4K * 64 - nr_huge * SZ_4K;
	long before, split;

	if (!hugetlb_is_optimized())
		SKIP(return, NOT_OPTIMIZED);
	if (!hugetlb_cgroup_enter("gmem_split"))
		SKIP(return, HUGETLB_NO_CGROUP);

	convert(t, 0, t->size, PRIVATE);
	kvm_fallocate(t->fd, FALLOC_FL_KEEP_SIZE, 0, t->size);
	before = kernel_memory();
	convert_comb(t, 0, SZ_2M, t->size / SZ_2M, SHARED);
	split = wait_for_kernel_memory(before + nr_bytes, LONG_MAX);
	EXPECT_LE(before + nr_bytes, split);
	convert_comb(t, 0, SZ_2M, t->size / SZ_2M, PRIVATE);
	EXPECT_GE(split - nr_bytes, wait_for_kernel_memory(0, split - nr_bytes));
	hugetlb_cgroup_leave();
	EXPECT_EQ(0, hugetlb_cgroup_remove());
}

static void limit_memory(long left)
{
	long max = cg_read_long(hugetlb_cgroup_path(), "memory.current") + left;

	TEST_ASSERT(!cg_write_numeric(hugetlb_cgroup_path(), "memory.max", max),
		    "Can't limit the cgroup");
}

/* Beyond the cgroup's limit the conversion fails, and the OOM killer does not run. */
TEST_F_TIMEOUT(split, struct_pages_beyond_a_limit, SLOW)
{
	struct split_test *t = &self->t;
	u64 error;

	if (t->page_size != SZ_1G)
		SKIP(return, "needs too few struct pages for a limit to matter");
	if (!hugetlb_is_optimized())
		SKIP(return, NOT_OPTIMIZED);

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	if (!hugetlb_cgroup_enter("gmem_split"))
		SKIP(return, HUGETLB_NO_CGROUP);

	limit_memory(SZ_1M);
	EXPECT_EQ(-1, gmem_convert(t->fd, 0, SZ_4K, SHARED, &error));
	EXPECT_EQ(ENOMEM, errno);
	check(t);
	guest_check_all(t);
	TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, 0)));

	/* A fault that needs struct pages fails likewise. */
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	convert(t, 0, SZ_4K, SHARED);
	TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, 0)));
	EXPECT_EQ(0, gmem_blocks(t->fd));

	limit_memory(SZ_1G);
	EXPECT_EQ(0, READ_ONCE(*word(t, 0)));
	check(t);
	hugetlb_cgroup_leave();
	EXPECT_EQ(0, hugetlb_cgroup_remove());
}

/* Convert ranges of any alignment, also across huge pages. */
TEST_F_TIMEOUT(split, ranges_of_any_alignment, SLOW)
{
	struct split_test *t = &self->t;
	const u64 ends[] = {
		0, SZ_4K, SZ_2M - SZ_4K, SZ_2M, SZ_2M + SZ_8K, t->size / 2,
		t->size / 2 + SZ_4K, t->size - SZ_2M, t->size - SZ_4K, t->size,
	};
	int i, j;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	for (i = 0; i < ARRAY_SIZE(ends); i++) {
		for (j = 0; j < ARRAY_SIZE(ends); j++) {
			if (ends[i] >= ends[j])
				continue;
			convert(t, ends[i], ends[j] - ends[i], SHARED);
			TEST_ASSERT_EQ(READ_ONCE(*word(t, ends[i])), PATTERN + ends[i]);
			convert(t, ends[i], ends[j] - ends[i], PRIVATE);
		}
	}
	guest_check_all(t);
}

/* KVM's mappings of guest memory, by size. */
struct mappings {
	long nr_1g, nr_2m, nr_4k;
};

static struct mappings get_mappings(struct split_test *t)
{
	return (struct mappings) {
		.nr_1g = vm_get_stat(t->vm, pages_1g),
		.nr_2m = vm_get_stat(t->vm, pages_2m),
		.nr_4k = vm_get_stat(t->vm, pages_4k),
	};
}

/* Access all memory from the guest, then compare the mappings added since @before. */
static void expect_mappings(struct split_test *t, const struct mappings *before,
			    struct mappings want, const char *what)
{
	struct mappings have;

	guest_check_all(t);
	have = get_mappings(t);
	have.nr_1g -= before->nr_1g;
	have.nr_2m -= before->nr_2m;
	have.nr_4k -= before->nr_4k;
	TEST_ASSERT(!memcmp(&have, &want, sizeof(have)),
		    "%s: %ld of 1 GiB, %ld of 2 MiB, %ld of 4 KiB expected, got %ld, %ld, %ld",
		    what, want.nr_1g, want.nr_2m, want.nr_4k, have.nr_1g, have.nr_2m,
		    have.nr_4k);
}

/* Mappings by the file's page size: one of 1 GiB, or several of 2 MiB. */
static struct mappings largest(struct split_test *t)
{
	if (t->page_size == SZ_1G)
		return (struct mappings) { .nr_1g = t->size / SZ_1G };

	return (struct mappings) { .nr_2m = t->size / SZ_2M };
}

/* Mappings by 2 MiB, except for @parts that are mapped by 4 KiB. */
static struct mappings mixed(struct split_test *t, int parts)
{
	return (struct mappings) {
		.nr_2m = t->size / SZ_2M - parts, .nr_4k = parts * PAGES_PER_PART,
	};
}

TEST_F_TIMEOUT(split, guest_mappings, SLOW)
{
	const u64 page = self->t.size / 2, other = page + SZ_2M - SZ_4K;
	struct mappings before = get_mappings(&self->t);
	struct split_test *t = &self->t;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	expect_mappings(t, &before, largest(t), "private");

	convert(t, page, SZ_4K, SHARED);
	expect_mappings(t, &before, mixed(t, 1), "one page shared");
	/* The last page of the next part. */
	convert(t, other + SZ_2M, SZ_4K, SHARED);
	expect_mappings(t, &before, mixed(t, 2), "pages of two parts shared");
	convert(t, page, SZ_4K, PRIVATE);
	expect_mappings(t, &before, mixed(t, 1), "one of them private again");
	convert(t, other + SZ_2M, SZ_4K, PRIVATE);
	expect_mappings(t, &before, largest(t), "private again");

	/* The host maps shared memory by 4 KiB, but the guest does not have to. */
	convert(t, page, SZ_2M, SHARED);
	expect_mappings(t, &before, mixed(t, 0), "2 MiB shared");
	convert(t, page, SZ_2M, PRIVATE);
	expect_mappings(t, &before, largest(t), "2 MiB private again");
	convert(t, 0, t->size, SHARED);
	expect_mappings(t, &before, largest(t), "shared");
	convert(t, other, SZ_8K, PRIVATE);
	expect_mappings(t, &before, mixed(t, 2), "pages of two parts private");
	convert(t, other, SZ_8K, SHARED);
	expect_mappings(t, &before, largest(t), "shared again");
	convert(t, 0, t->size, PRIVATE);
	expect_mappings(t, &before, largest(t), "private at last");
}

/* Access the range from the host, without any fault. */
static void expect_still_mapped(struct split_test *t, u64 offset, u64 size)
{
	struct rusage before, after;
	u64 i;

	for (i = offset; i < offset + size; i += SZ_4K)
		TEST_ASSERT(gmem_host_pfn(word(t, i)), "0x%lx is not mapped any more", i);

	TEST_ASSERT(!getrusage(RUSAGE_SELF, &before), "getrusage() failed");
	for (i = offset; i < offset + size; i += SZ_4K)
		TEST_ASSERT_EQ(READ_ONCE(*word(t, i)), PATTERN + i);
	TEST_ASSERT(!getrusage(RUSAGE_SELF, &after), "getrusage() failed");
	TEST_ASSERT_EQ(after.ru_minflt + after.ru_majflt,
		       before.ru_minflt + before.ru_majflt);
}

/* A conversion leaves the host's mappings outside of its range alone. */
TEST_F_TIMEOUT(split, host_mappings_of_neighbors, SLOW)
{
	struct split_test *t = &self->t;
	const u64 part = t->size / 2;
	u64 i;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	convert(t, part, SZ_2M, SHARED);
	for (i = part; i < part + SZ_2M; i += SZ_4K)
		READ_ONCE(*word(t, i));
	expect_still_mapped(t, part, SZ_2M);

	convert(t, part - SZ_4K, SZ_4K, SHARED);
	expect_still_mapped(t, part, SZ_2M);
	convert(t, part - SZ_4K, SZ_4K, PRIVATE);
	expect_still_mapped(t, part, SZ_2M);
	convert(t, part + SZ_2M, SZ_2M, SHARED);
	expect_still_mapped(t, part, SZ_2M);
	convert(t, part + SZ_2M, SZ_2M, PRIVATE);
	expect_still_mapped(t, part, SZ_2M);

	/* Convert one page of the mapped part: the rest of the part stays mapped. */
	convert(t, part + SZ_1M, SZ_4K, PRIVATE);
	EXPECT_EQ(0, gmem_host_pfn(word(t, part + SZ_1M)));
	expect_still_mapped(t, part, SZ_1M);
	expect_still_mapped(t, part + SZ_1M + SZ_4K, SZ_1M - SZ_4K);
	convert(t, part + SZ_1M, SZ_4K, SHARED);
	expect_still_mapped(t, part, SZ_1M);
	expect_still_mapped(t, part + SZ_1M + SZ_4K, SZ_1M - SZ_4K);
}

/* Allocate huge pages whose attributes are mixed. */
TEST_F_TIMEOUT(split, allocated_in_pieces, SLOW)
{
	struct split_test *t = &self->t;

	convert(t, 0, t->size, PRIVATE);
	convert(t, SZ_4K, SZ_8K, SHARED);
	convert(t, t->size - SZ_4K, SZ_4K, SHARED);
	TEST_ASSERT_EQ(READ_ONCE(*word(t, SZ_4K)), 0);
	check(t);
	gmem_guest_do(t->vcpu, GMEM_CHECK_ZERO, GMEM_GPA, t->size, SZ_4K, 0);
	check(t);
	guest_write_all(t);
	convert(t, 0, t->size, PRIVATE);
	guest_check_all(t);
}

TEST_F_TIMEOUT(split, pinned_pages, SLOW)
{
	struct split_test *t = &self->t;
	u64 error;
	int fds[2];

	TEST_ASSERT(!pipe(fds), "pipe() failed");
	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	convert(t, SZ_4K, SZ_8K, SHARED);
	gmem_pin(fds[1], word(t, SZ_4K));

	/* Other pages can be converted. */
	convert(t, SZ_8K, SZ_4K, PRIVATE);
	convert(t, SZ_2M, SZ_1M, SHARED);
	convert(t, SZ_2M, SZ_1M, PRIVATE);
	EXPECT_EQ(-1, gmem_convert(t->fd, 0, t->size, PRIVATE, &error));
	EXPECT_EQ(EAGAIN, errno);
	EXPECT_EQ(SZ_4K, error);
	check(t);
	TEST_ASSERT_EQ(READ_ONCE(*word(t, SZ_4K)), PATTERN + SZ_4K);

	kvm_close(fds[0]);
	kvm_close(fds[1]);
	convert(t, 0, t->size, PRIVATE);
	guest_check_all(t);
}

/* Expect that exactly the pages at @offsets are shared, with unchanged contents. */
static void expect_shared_in_parts(struct split_test *t, const u64 *offsets, int nr)
{
	int i;

	check(t);
	for (i = 0; i < nr; i++) {
		TEST_ASSERT_EQ(READ_ONCE(*word(t, offsets[i])), PATTERN + offsets[i]);
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, offsets[i] ^ SZ_4K)));
	}
	guest_check_all(t);
}

/* A conversion to private covers all parts or huge pages of the range, or none. */
TEST_F_TIMEOUT(split, pin_in_one_of_three_parts, SLOW)
{
	const u64 pages[] = { SZ_4K, SZ_2M + SZ_1M, 3 * SZ_2M - SZ_4K };
	const u64 starts[] = { 0, SZ_4K }, ends[] = { 3 * SZ_2M, self->t.size };
	struct split_test *t = &self->t;
	int i, j, k, fds[2];
	u64 error;

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		convert(t, pages[i], SZ_4K, SHARED);

	for (i = 0; i < ARRAY_SIZE(pages); i++) {
		TEST_ASSERT(!pipe(fds), "pipe() failed");
		gmem_pin(fds[1], word(t, pages[i]));
		for (j = 0; j < ARRAY_SIZE(starts); j++) {
			for (k = 0; k < ARRAY_SIZE(ends); k++) {
				EXPECT_EQ(-1, gmem_convert(t->fd, starts[j],
							   ends[k] - starts[j],
							   PRIVATE, &error));
				EXPECT_EQ(EAGAIN, errno);
				EXPECT_EQ(pages[i], error);
			}
		}
		expect_shared_in_parts(t, pages, ARRAY_SIZE(pages));
		kvm_close(fds[0]);
		kvm_close(fds[1]);
	}

	convert(t, SZ_4K, 3 * SZ_2M - SZ_4K, PRIVATE);
	for (i = 0; i < ARRAY_SIZE(pages); i++)
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, pages[i])));
	guest_check_all(t);
}

/* Punch a hole while one of its pages is pinned. */
TEST_F_TIMEOUT(split, punched_while_pinned, SLOW)
{
	struct split_test *t = &self->t;
	struct hugetlb_counters before;
	u64 value;
	int fds[2];

	TEST_ASSERT(!pipe(fds), "pipe() failed");
	convert(t, 0, t->size, PRIVATE);
	hugetlb_get(t->page_size, &before);
	guest_write_all(t);
	convert(t, SZ_4K, SZ_8K, SHARED);
	gmem_pin(fds[1], word(t, SZ_4K));
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	check(t);
	hugetlb_expect(&before, -1, -1, "while one page is in use");
	TEST_ASSERT_EQ(read(fds[0], &value, sizeof(value)), sizeof(value));
	TEST_ASSERT_EQ(value, PATTERN + SZ_4K);
	hugetlb_expect_released(&before, "after it is not in use any more");
	gmem_guest_do(t->vcpu, GMEM_CHECK_ZERO, GMEM_GPA, t->size, SZ_4K, 0);
	check(t);
	kvm_close(fds[0]);
	kvm_close(fds[1]);
}

/* Close the file and the VM while a page is pinned. */
TEST_F_TIMEOUT(split, closed_while_pinned, SLOW)
{
	struct split_test *t = &self->t;
	struct hugetlb_counters before;
	struct split_test other = {};
	int fds[2];

	hugetlb_get(t->page_size, &before);
	if (t->page_size == SZ_1G && hugetlb_available(SZ_1G) < 1)
		SKIP(return, "needs two pages of 1 GiB");

	TEST_ASSERT(!pipe(fds), "pipe() failed");
	other.vm = gmem_vm_create(1, &other.vcpu);
	other.fd = vm_create_guest_memfd(other.vm, t->page_size, gmem_flags(t->page_size) |
					 GUEST_MEMFD_FLAG_MMAP);
	other.mem = kvm_mmap(t->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, other.fd);
	TEST_ASSERT(!gmem_convert(other.fd, SZ_4K, SZ_4K, SHARED, NULL), "no conversion");
	*(u64 *)(other.mem + SZ_4K) = 1;
	gmem_pin(fds[1], other.mem + SZ_4K);
	kvm_munmap(other.mem, t->page_size);
	kvm_vm_free(other.vm);
	kvm_close(other.fd);
	hugetlb_expect(&before, -1, 0, "while one page is in use");
	kvm_close(fds[0]);
	kvm_close(fds[1]);
	hugetlb_expect_released(&before, "after it is not in use any more");
}

/* An error affects one page.  The huge page can be reused only after unpoisoning. */
TEST_F_TIMEOUT(split, memory_error, SLOW)
{
	struct split_test *t = &self->t;
	u64 pfn;
	int i;

	if (!gmem_can_poison())
		SKIP(return, "needs CONFIG_HWPOISON_INJECT and debugfs");

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	convert(t, SZ_4K, SZ_8K, SHARED);
	*word(t, SZ_8K) = PATTERN + SZ_8K;
	pfn = gmem_host_pfn(word(t, SZ_8K));
	ASSERT_NE(0, pfn);
	ASSERT_EQ(0, gmem_poison(pfn));
	EXPECT_EQ(-EHWPOISON, gmem_read_until_error(t->victim, GMEM_GPA + SZ_8K));
	for (i = 0; i < 4; i++) {
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, SZ_8K)));
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, 0)));
		gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, SZ_8K, SZ_4K, PATTERN);
		gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA + SZ_8K + SZ_4K,
			      t->size - SZ_8K - SZ_4K, SZ_4K, PATTERN + SZ_8K + SZ_4K);
		EXPECT_EQ(0, gmem_convert(t->fd, SZ_4K, SZ_8K, i & 1 ? SHARED : PRIVATE,
					  NULL));
	}
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->page_size);
	/* Unpoison the huge page, which is whole again, by its head page. */
	ASSERT_EQ(0, gmem_unpoison(pfn & ~(t->page_size / SZ_4K - 1)));
}

/* Read the first word of a page through /proc/kcore, as debuggers do. */
static u64 kcore_read(u64 pfn)
{
	u64 paddr = pfn * SZ_4K, value;
	struct elf64_phdr phdr;
	struct elf64_hdr ehdr;
	int fd, i;

	fd = open_path_or_exit("/proc/kcore", O_RDONLY);
	TEST_ASSERT_EQ(pread(fd, &ehdr, sizeof(ehdr), 0), sizeof(ehdr));
	for (i = 0; i < ehdr.e_phnum; i++) {
		TEST_ASSERT_EQ(pread(fd, &phdr, sizeof(phdr),
				     ehdr.e_phoff + i * sizeof(phdr)), sizeof(phdr));
		/* Segments without a physical address have -1 here. */
		if (phdr.p_type == PT_LOAD && phdr.p_paddr != -1ul &&
		    paddr - phdr.p_paddr < phdr.p_memsz)
			break;
	}
	TEST_ASSERT(i < ehdr.e_phnum, "page 0x%lx is not in /proc/kcore", pfn);
	TEST_ASSERT_EQ(pread(fd, &value, sizeof(value),
			     phdr.p_offset + paddr - phdr.p_paddr), sizeof(value));
	kvm_close(fd);
	return value;
}

/* Reads of a folio with an error return zeros, even if only its head is marked. */
TEST_F_TIMEOUT(split, kcore_reads_no_error, SLOW)
{
	const bool in_part = self->t.page_size == SZ_1G;
	const u64 bad = (in_part ? SZ_2M : 0) + SZ_4K;
	struct split_test *t = &self->t;
	u64 pfn;

	if (!gmem_can_poison())
		SKIP(return, "needs CONFIG_HWPOISON_INJECT and debugfs");
	if (access("/proc/kcore", R_OK))
		SKIP(return, "needs CONFIG_PROC_KCORE");

	convert(t, 0, t->size, PRIVATE);
	guest_write_all(t);
	convert(t, 0, SZ_4K, SHARED);
	*word(t, 0) = PATTERN;
	pfn = gmem_host_pfn(word(t, 0));
	ASSERT_NE(0, pfn);

	ASSERT_EQ(PATTERN + bad, kcore_read(pfn + bad / SZ_4K));
	ASSERT_EQ(0, gmem_poison(pfn + bad / SZ_4K));
	EXPECT_EQ(0, kcore_read(pfn + bad / SZ_4K));
	/* The error covers its folio, and nothing else. */
	EXPECT_EQ(in_part ? 0 : PATTERN + bad + SZ_4K, kcore_read(pfn + bad / SZ_4K + 1));
	if (in_part)
		EXPECT_EQ(PATTERN + bad + SZ_2M,
			  kcore_read(pfn + bad / SZ_4K + PAGES_PER_PART));

	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->page_size);
	ASSERT_EQ(0, gmem_unpoison(pfn));
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_prepare_pools();
	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
