// SPDX-License-Identifier: GPL-2.0-only
/*
 * Conversion of guest_memfd memory between private and shared, in place.
 *
 * Every step checks what the guest and the host see of each page: the host must have no
 * access to private memory, and contents must never change.  On huge pages the kernel
 * also checks that they are split exactly as far as the attributes demand.
 */
#include <fcntl.h>
#include <pthread.h>

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <asm/pvclock-abi.h>
#include <uapi/linux/stddef.h>	/* for io_uring.h */
#include <linux/falloc.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <linux/sizes.h>

#include "../../../../../mm/gup_test.h"
#include "kvm_test_harness.h"
#include "cgroup_util.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

/* Number and offset of the tested pages: in huge pages, on both sides of 2 MiB. */
#define NR_PAGES	4
#define HUGE_OFFSET	(SZ_2M - SZ_8K)

/* Guest address of memslots for other files. */
#define OTHER_GPA	(GMEM_GPA + SZ_4G)

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

/* Value to store.  @gen identifies the write or the page. */
#define VALUE(gen)	(0x600d000000000000ull + ((u64)(gen) << 32))

struct convert_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct kvm_vcpu *victim;	/* reads the poisoned page */
	size_t page_size;
	u64 file_size;
	u64 size;			/* mapped, and converted as a whole */
	u64 first;			/* offset of the first of NR_PAGES */
	u64 flags;
	char *mem;
	int fd;
	int check;			/* gmem_check in debugfs, or -1 */
	struct hugetlb_counters counters;
};

FIXTURE(convert)
{
	struct convert_test t;
};

FIXTURE_VARIANT(convert)
{
	size_t page_size;
	u64 flags;
	u64 attributes;		/* of a new file */
};

FIXTURE_VARIANT_ADD(convert, private)
{
	.page_size = SZ_4K,
	.flags = GUEST_MEMFD_FLAG_MMAP,
	.attributes = PRIVATE,
};

FIXTURE_VARIANT_ADD(convert, shared)
{
	.page_size = SZ_4K,
	.flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	.attributes = SHARED,
};

FIXTURE_VARIANT_ADD(convert, private_2m)
{
	.page_size = SZ_2M,
	.flags = GUEST_MEMFD_FLAG_MMAP,
	.attributes = PRIVATE,
};

FIXTURE_VARIANT_ADD(convert, shared_2m)
{
	.page_size = SZ_2M,
	.flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	.attributes = SHARED,
};

FIXTURE_VARIANT_ADD(convert, private_1g)
{
	.page_size = SZ_1G,
	.flags = GUEST_MEMFD_FLAG_MMAP,
	.attributes = PRIVATE,
};

FIXTURE_VARIANT_ADD(convert, shared_1g)
{
	.page_size = SZ_1G,
	.flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	.attributes = SHARED,
};

/* Check the ABI against literals, as the headers are the kernel's own. */
kvm_static_assert(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES == 252);
kvm_static_assert(KVM_SET_MEMORY_ATTRIBUTES2 == 0xc080aed2);
kvm_static_assert(KVM_MEMORY_ATTRIBUTE_PRIVATE == 1 << 3);
kvm_static_assert(sizeof(struct kvm_memory_attributes2) == 128);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, address) == 0);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, offset) == 0);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, size) == 8);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, attributes) == 16);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, flags) == 24);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, error_offset) == 32);
kvm_static_assert(offsetof(struct kvm_memory_attributes2, reserved) == 40);

static void convert(int fd, u64 offset, u64 size, u64 attributes)
{
	u64 error;
	int r = gmem_convert(fd, offset, size, attributes, &error);

	TEST_ASSERT(!r, "0x%lx bytes at 0x%lx to 0x%lx: errno %d (%s) at 0x%lx",
		    size, offset, attributes, errno, strerror(errno), error);
}

/* Check that huge pages are split as far as the attributes demand. */
static void check_folios(struct convert_test *self)
{
	gmem_check(self->check, self->fd, true);
}

static u64 page_offset(struct convert_test *self, int page)
{
	return self->first + page * SZ_4K;
}

static u64 *word(struct convert_test *self, int page)
{
	return (u64 *)(self->mem + page_offset(self, page));
}

static gpa_t page_gpa(struct convert_test *self, int page)
{
	return GMEM_GPA + page_offset(self, page);
}

static void convert_pages(struct convert_test *self, int page, int nr, u64 attributes)
{
	convert(self->fd, page_offset(self, page), nr * SZ_4K, attributes);
	check_folios(self);
}

/* Convert all of the mapped range.  With huge pages, this is more than NR_PAGES. */
static void convert_all(struct convert_test *self, u64 attributes)
{
	convert(self->fd, 0, self->size, attributes);
	check_folios(self);
}

/* The conversion must fail because of @page, and change nothing. */
static void expect_busy(struct convert_test *self, u64 offset, u64 size, int page)
{
	u64 error;

	TEST_ASSERT_EQ(gmem_convert(self->fd, offset, size, PRIVATE, &error), -1);
	TEST_ASSERT_EQ(errno, EAGAIN);
	TEST_ASSERT_EQ(error, page_offset(self, page));
	check_folios(self);
}

static void guest_write(struct convert_test *self, int page, u64 value)
{
	gmem_guest_do(self->vcpu, GMEM_WRITE, page_gpa(self, page), 8, 8, value);
}

static void guest_check(struct convert_test *self, int page, u64 value)
{
	gmem_guest_do(self->vcpu, GMEM_CHECK, page_gpa(self, page), 8, 8, value);
}

/* The VM, the sizes and the flags must be set up. */
static void open_file(struct convert_test *self)
{
	self->fd = vm_create_guest_memfd(self->vm, self->file_size, self->flags);
	if (self->flags & GUEST_MEMFD_FLAG_MMAP)
		self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED,
				     self->fd);
}

static void add_slot(struct convert_test *self, void *uaddr)
{
	vm_set_user_memory_region2(self->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   uaddr ? self->size : self->file_size, uaddr,
				   self->fd, 0);
}

static void set_sizes(struct convert_test *self, size_t page_size)
{
	self->page_size = page_size;
	if (page_size == SZ_4K) {
		self->size = NR_PAGES * SZ_4K;
		self->first = 0;
	} else {
		self->size = 2 * SZ_2M;
		self->first = HUGE_OFFSET;
	}
	self->file_size = max_t(u64, self->size, page_size);
}

FIXTURE_SETUP(convert)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct convert_test *t = &self->t;
	struct kvm_vcpu *vcpus[2];

	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");
	if (reason)
		SKIP(return, "%s", reason);

	set_sizes(t, variant->page_size);
	t->flags = variant->flags | gmem_flags(t->page_size);
	if (t->page_size != SZ_4K)
		hugetlb_get(t->page_size, &t->counters);
	t->vm = gmem_vm_create(2, vcpus);
	t->vcpu = vcpus[0];
	t->victim = vcpus[1];
	t->check = t->page_size == SZ_4K ? -1 : gmem_open_check(t->vm);
	open_file(t);
	add_slot(t, NULL);
}

FIXTURE_TEARDOWN(convert)
{
	struct convert_test *t = &self->t;

	gmem_close_check(t->check);
	kvm_munmap(t->mem, t->size);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	if (t->page_size != SZ_4K)
		hugetlb_expect_released(&t->counters, "after close");
}

/* Check that the host can access only the pages in @shared, and check all values. */
static void check_all(struct convert_test *self, unsigned long shared,
		      const u64 *values)
{
	int i;

	for (i = 0; i < NR_PAGES; i++) {
		if (shared & BIT(i))
			TEST_ASSERT_EQ(READ_ONCE(*word(self, i)), values[i]);
		else
			TEST_EXPECT_SIGBUS(READ_ONCE(*word(self, i)));
		guest_check(self, i, values[i]);
	}
}

TEST_F_TIMEOUT(convert, basic_flow, SLOW)
{
	u64 values[NR_PAGES];
	int i, gen;

	convert_all(&self->t, PRIVATE);
	for (i = 0; i < NR_PAGES; i++)
		guest_write(&self->t, i, values[i] = VALUE(0) + i);
	check_all(&self->t, 0, values);

	for (gen = 1; gen < 4; gen++) {
		convert_all(&self->t, SHARED);
		check_all(&self->t, -1ul, values);
		for (i = 0; i < NR_PAGES; i++)
			*word(&self->t, i) = values[i] = VALUE(gen) + i;
		check_all(&self->t, -1ul, values);

		convert_all(&self->t, PRIVATE);
		check_all(&self->t, 0, values);
		for (i = 0; i < NR_PAGES; i++)
			guest_write(&self->t, i, values[i] = VALUE(gen) + 0x100 + i);
	}
}

/* Go through all sets of shared pages, converting one page at a time. */
TEST_F_TIMEOUT(convert, any_page_and_its_neighbours, SLOW)
{
	unsigned long shared, state = variant->attributes == SHARED ? 15 : 0;
	u64 values[NR_PAGES] = {};
	int i;

	for (shared = 0; shared < BIT(NR_PAGES); shared++) {
		for (i = 0; i < NR_PAGES; i++) {
			if ((state ^ shared) & BIT(i))
				convert_pages(&self->t, i, 1, shared & BIT(i) ? SHARED : PRIVATE);
			state = (state & ~BIT(i)) | (shared & BIT(i));
			check_all(&self->t, state, values);
			guest_write(&self->t, i, values[i] = VALUE(shared) + i);
			check_all(&self->t, state, values);
		}
	}
}

TEST_F_TIMEOUT(convert, memory_that_is_not_allocated, SLOW)
{
	struct stat st;
	u64 values[NR_PAGES] = {};

	convert_all(&self->t, PRIVATE);
	convert_pages(&self->t, 1, 2, SHARED);
	ASSERT_EQ(0, fstat(self->t.fd, &st));
	EXPECT_EQ(0, st.st_blocks);

	/* Allocate one page of each kind. */
	*word(&self->t, 1) = values[1] = VALUE(1);
	guest_write(&self->t, 0, values[0] = VALUE(2));
	check_all(&self->t, BIT(1) | BIT(2), values);
	convert_all(&self->t, PRIVATE);
	check_all(&self->t, 0, values);
	convert_all(&self->t, SHARED);
	check_all(&self->t, -1ul, values);
}

TEST_F_TIMEOUT(convert, partly_allocated, SLOW)
{
	/* Allocate one huge page, or every second base page. */
	const int step = self->t.page_size == SZ_4K ? 2 : NR_PAGES;
	u64 values[NR_PAGES] = {};
	int i;

	for (i = 0; i < NR_PAGES; i += step)
		guest_write(&self->t, i, values[i] = VALUE(i));
	convert_all(&self->t, !variant->attributes ? PRIVATE : SHARED);
	convert_pages(&self->t, 1, 1, SHARED);
	convert_all(&self->t, PRIVATE);
	check_all(&self->t, 0, values);
}

/* Holes must be aligned to pages of the file, even if these are split. */
static void expect_no_other_holes(struct convert_test *self)
{
	const u64 page = self->page_size, ranges[][2] = {
		{ self->first, SZ_4K }, { 0, SZ_4K }, { 0, page - SZ_4K },
		{ SZ_4K, page - SZ_4K }, { SZ_4K, page }, { 0, SZ_2M - SZ_4K },
		{ self->first, self->file_size - self->first },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(ranges); i++) {
		TEST_ASSERT_EQ(fallocate(self->fd, PUNCH_HOLE, ranges[i][0], ranges[i][1]), -1);
		TEST_ASSERT_EQ(errno, EINVAL);
	}
	check_folios(self);
}

TEST_F_TIMEOUT(convert, punch_keeps_attributes, SLOW)
{
	const u64 hole = max_t(u64, 2 * SZ_4K, self->t.page_size);
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	int i;

	convert_all(&self->t, PRIVATE);
	convert_pages(&self->t, 1, 1, SHARED);
	for (i = 0; i < NR_PAGES; i++)
		guest_write(&self->t, i, values[i]);
	if (self->t.page_size != SZ_4K)
		expect_no_other_holes(&self->t);
	check_all(&self->t, BIT(1), values);

	kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, hole);
	for (i = 0; i < NR_PAGES && page_offset(&self->t, i) < hole; i++)
		values[i] = 0;
	EXPECT_NE(0, i);
	check_all(&self->t, BIT(1), values);
	kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, self->t.file_size);
	EXPECT_EQ(0, gmem_blocks(self->t.fd));
	memset(values, 0, sizeof(values));
	check_all(&self->t, BIT(1), values);
	check_folios(&self->t);
}

TEST_F_TIMEOUT(convert, same_again_touches_nothing, SLOW)
{
	long maps;

	convert_all(&self->t, PRIVATE);
	guest_write(&self->t, 0, VALUE(1));
	maps = vcpu_get_stat(self->t.vcpu, pf_taken);
	convert_all(&self->t, PRIVATE);
	guest_write(&self->t, 0, VALUE(2));
	EXPECT_EQ(maps, vcpu_get_stat(self->t.vcpu, pf_taken));

	convert_all(&self->t, SHARED);
	*word(&self->t, 0) = 1;
	EXPECT_NE(0, gmem_host_pfn(word(&self->t, 0)));
	convert_all(&self->t, SHARED);
	EXPECT_NE(0, gmem_host_pfn(word(&self->t, 0)));
	convert_pages(&self->t, 1, 1, PRIVATE);
	EXPECT_NE(0, gmem_host_pfn(word(&self->t, 0)));
	convert_pages(&self->t, 0, 1, PRIVATE);
	EXPECT_EQ(0, gmem_host_pfn(word(&self->t, 0)));
}

/* Prefault both kinds of memory, allocated or not, before the guest touches it. */
TEST_F_TIMEOUT(convert, pre_fault, SLOW)
{
	struct kvm_pre_fault_memory range = {
		.gpa = page_gpa(&self->t, 0), .size = NR_PAGES * SZ_4K,
	};
	const bool huge = self->t.page_size != SZ_4K;
	u64 values[NR_PAGES] = {}, mapped_4k, mapped_2m;
	struct stat st;
	long faults;
	int r;

	convert_all(&self->t, SHARED);
	*word(&self->t, 1) = values[1] = VALUE(1);
	convert_pages(&self->t, 2, 2, PRIVATE);
	mapped_4k = vm_get_stat(self->t.vm, pages_4k);
	mapped_2m = vm_get_stat(self->t.vm, pages_2m);
	do {
		r = __vcpu_ioctl(self->t.vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while ((!r && range.size) || (r && errno == EINTR));
	ASSERT_EQ(0, r);
	/* In huge pages, the first two pages end a 2 MiB block that is all shared. */
	EXPECT_EQ(mapped_4k + NR_PAGES - 2 * huge, vm_get_stat(self->t.vm, pages_4k));
	EXPECT_EQ(mapped_2m + huge, vm_get_stat(self->t.vm, pages_2m));
	ASSERT_EQ(0, fstat(self->t.fd, &st));
	EXPECT_EQ(self->t.file_size / 512, st.st_blocks);

	faults = vcpu_get_stat(self->t.vcpu, pf_taken);
	check_all(&self->t, BIT(0) | BIT(1), values);
	EXPECT_EQ(faults, vcpu_get_stat(self->t.vcpu, pf_taken));
}

/* The size of a file is fixed, whether its memory is private or shared. */
TEST_F_TIMEOUT(convert, truncation, SLOW)
{
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	int i;

	for (i = 0; i < NR_PAGES; i++)
		guest_write(&self->t, i, values[i]);
	convert_pages(&self->t, 0, 2, PRIVATE);
	convert_pages(&self->t, 2, 2, SHARED);
	for (i = 0; i <= 2 * NR_PAGES; i++) {
		if (i == NR_PAGES)
			continue;
		EXPECT_EQ(-1, ftruncate(self->t.fd, i * (self->t.file_size / NR_PAGES)));
		EXPECT_EQ(EINVAL, errno);
	}
	EXPECT_EQ(-1, ftruncate(self->t.fd, self->t.file_size - SZ_4K));
	EXPECT_EQ(EINVAL, errno);
	check_all(&self->t, BIT(2) | BIT(3), values);
}

/* Two files and three memslots: only the memory in the range may be converted. */
TEST_F_TIMEOUT(convert, several_files_and_slots, SLOW)
{
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	struct convert_test other = self->t;
	const u64 half = other.size / 2;
	gpa_t gpas[NR_PAGES];
	int i;

	/* Swap the halves of the second file in the guest. */
	open_file(&other);
	for (i = 0; i < 2; i++)
		vm_set_user_memory_region2(self->t.vm, GMEM_SLOT + 1 + i,
					   KVM_MEM_GUEST_MEMFD, OTHER_GPA + i * half,
					   half, NULL, other.fd, half - i * half);
	for (i = 0; i < NR_PAGES; i++) {
		gpas[i] = OTHER_GPA + (page_offset(&other, i) ^ half);
		guest_write(&self->t, i, values[i]);
		gmem_guest_do(self->t.vcpu, GMEM_WRITE, gpas[i], 8, 8, ~values[i]);
	}

	convert_all(&self->t, PRIVATE);
	convert_all(&other, SHARED);
	convert_pages(&other, 1, 2, PRIVATE);
	check_all(&self->t, 0, values);
	for (i = 0; i < NR_PAGES; i++) {
		if (i == 0 || i == 3)
			TEST_ASSERT_EQ(READ_ONCE(*word(&other, i)), ~values[i]);
		else
			TEST_EXPECT_SIGBUS(READ_ONCE(*word(&other, i)));
		gmem_guest_do(self->t.vcpu, GMEM_CHECK, gpas[i], 8, 8, ~values[i]);
	}

	kvm_munmap(other.mem, other.size);
	kvm_close(other.fd);
}

/* A conversion must not affect the same gfns of another VM. */
TEST_F_TIMEOUT(convert, another_vm, SLOW)
{
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	u64 others[NR_PAGES] = { VALUE(4), VALUE(5), VALUE(6), VALUE(7) };
	struct convert_test other = self->t;
	int i;

	other.vm = gmem_vm_create(1, &other.vcpu);
	open_file(&other);
	add_slot(&other, NULL);
	for (i = 0; i < NR_PAGES; i++) {
		guest_write(&self->t, i, values[i]);
		guest_write(&other, i, others[i]);
	}
	convert_all(&self->t, SHARED);
	convert_all(&other, PRIVATE);
	check_all(&self->t, -1ul, values);
	check_all(&other, 0, others);
	convert_pages(&self->t, 1, 1, PRIVATE);
	convert_pages(&other, 2, 1, SHARED);
	check_all(&self->t, ~BIT(1), values);
	check_all(&other, BIT(2), others);

	kvm_munmap(other.mem, other.size);
	kvm_vm_free(other.vm);
	kvm_close(other.fd);
}

/* The guest can use shared memory even if the host cannot map the file. */
TEST_F_TIMEOUT(convert, file_without_mmap, SLOW)
{
	struct convert_test other = self->t;
	const u64 size = other.size, stride = size / SZ_2K;
	struct kvm_vcpu *vcpu = self->t.vcpu;
	int i;

	other.flags &= ~GUEST_MEMFD_FLAG_MMAP;
	open_file(&other);
	vm_set_user_memory_region2(self->t.vm, GMEM_SLOT + 1, KVM_MEM_GUEST_MEMFD,
				   OTHER_GPA, other.file_size, NULL, other.fd, 0);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, size, PROT_READ, MAP_SHARED, other.fd, 0));
	gmem_guest_do(vcpu, GMEM_WRITE, OTHER_GPA, size, stride, VALUE(1));
	for (i = 0; i < 4; i++) {
		convert_pages(&other, 1, 2, i & 1 ? PRIVATE : SHARED);
		gmem_guest_do(vcpu, GMEM_CHECK, OTHER_GPA, size, stride, VALUE(1));
		convert_all(&other, i & 2 ? PRIVATE : SHARED);
		gmem_guest_do(vcpu, GMEM_CHECK, OTHER_GPA, size, stride, VALUE(1));
	}
	kvm_close(other.fd);
}

/* KVM caches that a gfn has no memslot.  Private memory must replace that. */
TEST_F_TIMEOUT(convert, private_memory_where_there_was_none, SLOW)
{
	const gpa_t gpa = OTHER_GPA;
	struct kvm_run *run = self->t.vcpu->run;
	int i, fd;

	for (i = 0; i < 3; i++) {
		gmem_guest_set(self->t.vcpu, GMEM_READ, gpa, 8, 8, 0);
		vcpu_run(self->t.vcpu);
		ASSERT_EQ(KVM_EXIT_MMIO, run->exit_reason);
		EXPECT_EQ(gpa, run->mmio.phys_addr);
		memset(run->mmio.data, 0, sizeof(run->mmio.data));
		EXPECT_EQ(0, gmem_guest_run(self->t.vcpu));
	}

	fd = vm_create_guest_memfd(self->t.vm, self->t.page_size, self->t.flags);
	vm_set_user_memory_region2(self->t.vm, GMEM_SLOT + 1, KVM_MEM_GUEST_MEMFD, gpa,
				   self->t.page_size, NULL, fd, 0);
	gmem_guest_do(self->t.vcpu, GMEM_WRITE, gpa, 8, 8, VALUE(1));
	gmem_guest_do(self->t.vcpu, GMEM_CHECK, gpa, 8, 8, VALUE(1));
	kvm_close(fd);
}

/* The number of ranges is not limited, but their memory is charged. */
TEST_F_TIMEOUT(convert, attributes_are_charged, SLOW)
{
	const size_t page_size = self->t.page_size;
	const u64 size = page_size == SZ_2M ? hugetlb_available(SZ_2M) * SZ_2M : SZ_1G;
	const long nr = min_t(long, 20000, size / SZ_8K - 1);
	/* A range takes 16 bytes of the tree if all leaves are full, and more otherwise. */
	const long want = 2 * nr * 16;
	long before, after;
	int fd, i;

	if (!hugetlb_cgroup_enter("gmem_attributes"))
		SKIP(return, HUGETLB_NO_CGROUP);

	fd = vm_create_guest_memfd(self->t.vm, size, self->t.flags);
	before = cg_read_long(hugetlb_cgroup_path(), "memory.current");
	for (i = 0; i < nr; i++)
		convert(fd, (2 * i + 1) * SZ_4K, SZ_4K, PRIVATE ^ variant->attributes);
	after = cg_read_long(hugetlb_cgroup_path(), "memory.current");
	EXPECT_LT(want, after - before);
	kvm_close(fd);
	hugetlb_cgroup_leave();
	EXPECT_EQ(0, hugetlb_cgroup_remove());
}

/*
 * A page with an error: inaccessible to all users, but no obstacle to anything else.
 */

static void stop_checking_folios(struct convert_test *self)
{
	gmem_close_check(self->check);
	self->check = -1;
}

TEST_F_TIMEOUT(convert, memory_error, SLOW)
{
	const bool huge = self->t.page_size != SZ_4K;
	const u64 hole = huge ? 0 : SZ_4K, size = self->t.page_size;
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) }, pfn;
	struct stat st;
	long mapped, lost;
	int i, j;

	if (!gmem_can_poison())
		SKIP(return, "needs CONFIG_HWPOISON_INJECT and debugfs");

	convert_all(&self->t, SHARED);
	for (i = 0; i < NR_PAGES; i++) {
		*word(&self->t, i) = values[i];
		guest_check(&self->t, i, values[i]);
	}
	pfn = gmem_host_pfn(word(&self->t, 1));
	ASSERT_NE(0, pfn);
	/* For a base page, memory_failure() fails because the page stays in the file. */
	ASSERT_EQ(huge ? 0 : EBUSY, gmem_poison(pfn));
	/* A huge page with an error is not merged. */
	stop_checking_folios(&self->t);

	EXPECT_EQ(-EHWPOISON, gmem_read_until_error(self->t.victim, page_gpa(&self->t, 1)));
	/* Neighbors must stay mapped, except in the 2 MiB block that has the page. */
	mapped = vcpu_get_stat(self->t.vcpu, pf_fixed);
	for (i = 0; i < NR_PAGES; i++) {
		if (i != 1)
			guest_check(&self->t, i, values[i]);
	}
	/* A 1 GiB page that is shared as a whole had a single mapping. */
	lost = huge + (variant->page_size == SZ_1G && !variant->attributes);
	EXPECT_EQ(mapped + lost, vcpu_get_stat(self->t.vcpu, pf_fixed));

	/* The page can be converted like any other, and a new one does not replace it. */
	for (j = 0; j < 4; j++) {
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(&self->t, 1)));
		/* The guest retries the same access. */
		EXPECT_EQ(-EHWPOISON, gmem_guest_run(self->t.victim));
		for (i = 0; i < NR_PAGES; i++) {
			if (i == 1)
				continue;
			if (j & 1)
				TEST_EXPECT_SIGBUS(READ_ONCE(*word(&self->t, i)));
			else
				TEST_ASSERT_EQ(READ_ONCE(*word(&self->t, i)), values[i]);
			guest_check(&self->t, i, values[i]);
		}
		/* A mapping of the neighbors must not give access to the page. */
		EXPECT_EQ(-EHWPOISON, gmem_guest_run(self->t.victim)) {
			TH_LOG("guest reads it while it is %s", j & 1 ? "private" : "shared");
		}
		ASSERT_EQ(0, fstat(self->t.fd, &st));
		EXPECT_EQ(self->t.file_size / 512, st.st_blocks);
		convert_all(&self->t, j & 1 ? SHARED : PRIVATE);
	}

	/* A hole removes the page from the file, so that the next access gets a new one. */
	kvm_fallocate(self->t.fd, PUNCH_HOLE, hole, size);
	EXPECT_EQ(0, gmem_guest_run(self->t.victim));
	/* For a base page, page tables of the host keep the error until they are zapped. */
	if (!huge)
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(&self->t, 1)));
	ASSERT_EQ(0, madvise(word(&self->t, 1), SZ_4K, MADV_DONTNEED));
	for (i = 0; i < NR_PAGES; i++) {
		if (page_offset(&self->t, i) - hole < size)
			values[i] = 0;
	}
	check_all(&self->t, -1ul, values);
	EXPECT_NE(pfn, gmem_host_pfn(word(&self->t, 1)));
	/* Unpoison the page as a whole: a huge page has been merged. */
	ASSERT_EQ(0, gmem_unpoison(pfn & ~(size / SZ_4K - 1)));
}

/* A conversion also unmaps memory from a child, which can fault it in again later. */
TEST_F_TIMEOUT(convert, fork, SLOW)
{
	int to_child[2], to_parent[2], status;
	pid_t pid;
	char c;

	convert_all(&self->t, SHARED);
	*word(&self->t, 0) = VALUE(1);
	TEST_ASSERT(!pipe(to_child) && !pipe(to_parent), "pipe() failed");
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed");
	if (!pid) {
		TEST_ASSERT_EQ(*word(&self->t, 0), VALUE(1));
		write(to_parent[1], "m", 1);
		read(to_child[0], &c, 1);
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(&self->t, 0)));
		write(to_parent[1], "p", 1);
		read(to_child[0], &c, 1);
		TEST_ASSERT_EQ(READ_ONCE(*word(&self->t, 0)), VALUE(1));
		_exit(0);
	}
	ASSERT_EQ(1, read(to_parent[0], &c, 1));
	convert_pages(&self->t, 0, 1, PRIVATE);
	write(to_child[1], "p", 1);
	ASSERT_EQ(1, read(to_parent[0], &c, 1));
	convert_pages(&self->t, 0, 1, SHARED);
	write(to_child[1], "s", 1);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
}

TEST_F_TIMEOUT(convert, pinned_page_cannot_become_private, SLOW)
{
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	int i, j, fds[2];

	convert_all(&self->t, SHARED);
	for (i = 0; i < NR_PAGES; i++)
		*word(&self->t, i) = values[i];

	for (i = 0; i < NR_PAGES; i++) {
		TEST_ASSERT(!pipe(fds), "pipe() failed");
		/* Pin all pages from this one on. */
		for (j = i; j < NR_PAGES; j++)
			gmem_pin(fds[1], word(&self->t, j));

		expect_busy(&self->t, 0, self->t.size, i);
		check_all(&self->t, -1ul, values);
		expect_busy(&self->t, page_offset(&self->t, 3), SZ_4K, 3);

		/* Pages before the pins can still be converted. */
		if (i) {
			convert_pages(&self->t, 0, i, PRIVATE);
			check_all(&self->t, 15 & ~(BIT(i) - 1), values);
			convert_pages(&self->t, 0, i, SHARED);
		}
		kvm_close(fds[0]);
		kvm_close(fds[1]);
		convert_all(&self->t, PRIVATE);
		check_all(&self->t, 0, values);
		convert_all(&self->t, SHARED);
	}
}

#define GUP_TEST	"/sys/kernel/debug/gup_test"

/* Pin memory as for a device, until PIN_LONGTERM_TEST_STOP. */
static void pin_longterm(int gup_test, void *p, u64 size, u32 flags)
{
	struct pin_longterm_test args = {
		.addr = (uintptr_t)p,
		.size = size,
		.flags = flags,
	};

	TEST_ASSERT(!ioctl(gup_test, PIN_LONGTERM_TEST_START, &args),
		    "Can't pin 0x%lx bytes, flags %u: errno %d (%s)", size, flags,
		    errno, strerror(errno));
}

TEST_F_TIMEOUT(convert, long_term_pins, SLOW)
{
	const u32 flags[] = {
		0, PIN_LONGTERM_TEST_FLAG_USE_FAST, PIN_LONGTERM_TEST_FLAG_USE_WRITE,
		PIN_LONGTERM_TEST_FLAG_USE_FAST | PIN_LONGTERM_TEST_FLAG_USE_WRITE,
	};
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	u64 buf[NR_PAGES * SZ_4K / sizeof(u64)], *p = buf;
	int gup_test, i, first, nr;

	gup_test = open(GUP_TEST, O_RDWR);
	if (gup_test < 0)
		SKIP(return, "needs CONFIG_GUP_TEST and debugfs");

	convert_all(&self->t, SHARED);
	for (i = 0; i < NR_PAGES; i++)
		*word(&self->t, i) = values[i];

	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		for (first = 0; first < NR_PAGES; first++) {
			for (nr = 1; first + nr <= NR_PAGES; nr++) {
				pin_longterm(gup_test, word(&self->t, first),
					     nr * SZ_4K, flags[i]);
				expect_busy(&self->t, 0, self->t.size, first);
				check_all(&self->t, -1ul, values);
				ASSERT_EQ(0, ioctl(gup_test, PIN_LONGTERM_TEST_READ, &p));
				EXPECT_EQ(values[first], *p);

				/* Pages after the pins can still be converted. */
				if (first + nr < NR_PAGES)
					convert_pages(&self->t, first + nr,
						      NR_PAGES - first - nr, PRIVATE);
				check_all(&self->t, BIT(first + nr) - 1, values);

				ASSERT_EQ(0, ioctl(gup_test, PIN_LONGTERM_TEST_STOP));
				convert_all(&self->t, PRIVATE);
				check_all(&self->t, 0, values);
				convert_all(&self->t, SHARED);
			}
		}
	}
	kvm_close(gup_test);
}

/* Buffers that are registered with io_uring stay pinned. */
TEST_F_TIMEOUT(convert, io_uring_buffers, SLOW)
{
	struct iovec iov = { .iov_base = word(&self->t, 1), .iov_len = 2 * SZ_4K };
	u64 values[NR_PAGES] = { VALUE(0), VALUE(1), VALUE(2), VALUE(3) };
	struct io_uring_params params = {};
	int ring, i, r;

	ring = syscall(__NR_io_uring_setup, 1, &params);
	if (ring < 0)
		SKIP(return, "needs CONFIG_IO_URING");

	convert_all(&self->t, SHARED);
	for (i = 0; i < NR_PAGES; i++)
		*word(&self->t, i) = values[i];

	ASSERT_EQ(0, syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS,
			     &iov, 1));
	expect_busy(&self->t, 0, self->t.size, 1);
	convert_pages(&self->t, 3, 1, PRIVATE);
	check_all(&self->t, GENMASK(2, 0), values);

	/* io_uring drops the references a little later. */
	ASSERT_EQ(0, syscall(__NR_io_uring_register, ring, IORING_UNREGISTER_BUFFERS,
			     NULL, 0));
	do {
		r = gmem_convert(self->t.fd, 0, self->t.size, PRIVATE, NULL);
	} while (r && errno == EAGAIN);
	EXPECT_EQ(0, r);
	check_all(&self->t, 0, values);
	EXPECT_EQ(-1, syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS,
			      &iov, 1));
	EXPECT_EQ(EFAULT, errno);
	kvm_close(ring);
}

/* Count how often @value is in a file, at multiples of its size. */
static long count_in_file(const char *path, u64 value)
{
	u64 buf[SZ_4K / sizeof(u64)];
	int fd = open_path_or_exit(path, O_RDONLY);
	long nr = 0;
	ssize_t len;
	int i;

	while ((len = read(fd, buf, sizeof(buf))) > 0)
		for (i = 0; i < len / sizeof(u64); i++)
			nr += buf[i] == value;
	TEST_ASSERT(!len, "Can't read %s", path);
	kvm_close(fd);
	return nr;
}

static void write_file(const char *path, const char *text)
{
	int fd = open_path_or_exit(path, O_WRONLY);

	TEST_ASSERT(write(fd, text, strlen(text)) == strlen(text),
		    "Can't write to %s", path);
	kvm_close(fd);
}

#define CORE_PATTERN	"/proc/sys/kernel/core_pattern"

TEST_F_TIMEOUT(convert, core_dump_holds_only_what_is_shared, SLOW)
{
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	char old[128] = {}, core[32];
	int fd, status, i;
	pid_t pid, r;
	u64 offset;

	fd = open(CORE_PATTERN, O_RDONLY);
	if (fd < 0)
		SKIP(return, "needs CONFIG_COREDUMP");
	ASSERT_LT(0, read(fd, old, sizeof(old) - 1));
	kvm_close(fd);

	convert_all(&self->t, SHARED);
	for (i = 0; i < NR_PAGES; i++) {
		gmem_guest_do(self->t.vcpu, GMEM_WRITE, page_gpa(&self->t, i), SZ_4K, 8,
			      VALUE(i));
		/* Map the page, so that the conversion has to unmap it. */
		READ_ONCE(*word(&self->t, i));
	}
	convert_pages(&self->t, 0, 2, PRIVATE);

	write_file(CORE_PATTERN, "gmem_core.%p");
	pid = fork();
	if (!pid) {
		write_file("/proc/self/coredump_filter", "0x7f");
		setrlimit(RLIMIT_CORE, &unlimited);
		signal(SIGABRT, SIG_DFL);
		abort();
	}
	r = pid > 0 ? waitpid(pid, &status, 0) : -1;
	write_file(CORE_PATTERN, old);
	ASSERT_EQ(pid, r);
	ASSERT_TRUE(WIFSIGNALED(status) && WCOREDUMP(status));

	/* The dump includes variables: search for values that the child never computed. */
	offset = SZ_2K + pid % 128 * sizeof(u64);
	snprintf(core, sizeof(core), "gmem_core.%d", pid);
	for (i = 0; i < NR_PAGES; i++)
		EXPECT_EQ(i < 2 ? 0 : 1, count_in_file(core, VALUE(i) + offset));
	unlink(core);
}

/*
 * Pins that are dropped one by one while a conversion waits.
 */
#define MAX_RELEASED	64

struct release {
	int nr;
	int usecs;		/* delay before each release */
	int fds[MAX_RELEASED][2];
	bool start;
	int released;
};

static void *release_one_by_one(void *data)
{
	struct release *r = data;

	while (!READ_ONCE(r->start))
		sched_yield();
	while (r->released < r->nr) {
		usleep(r->usecs);
		kvm_close(r->fds[r->released][0]);
		kvm_close(r->fds[r->released][1]);
		WRITE_ONCE(r->released, r->released + 1);
	}
	return NULL;
}

/*
 * Convert @nr pinned pages while their pins are dropped.  @released is set to the
 * number of pins that were dropped before the conversion returned.
 */
static int convert_while_released(int fd, char *mem, int nr, int usecs, int *released)
{
	struct release release = { .nr = nr, .usecs = usecs };
	int i, r, before;
	pthread_t thread;

	for (i = 0; i < nr; i++) {
		TEST_ASSERT(!pipe(release.fds[i]), "pipe() failed");
		gmem_pin(release.fds[i][1], mem + i * SZ_4K);
	}
	kvm_pthread_create(&thread, NULL, release_one_by_one, &release);
	WRITE_ONCE(release.start, true);
	before = READ_ONCE(release.released);
	r = gmem_convert(fd, 0, nr * SZ_4K, PRIVATE, NULL) ? -errno : 0;
	*released = READ_ONCE(release.released);
	kvm_pthread_join(thread, NULL);

	TEST_ASSERT(!r || r == -EAGAIN, "errno %d (%s)", -r, strerror(-r));
	convert(fd, 0, nr * SZ_4K, SHARED);
	/* A pin was dropped before the conversion began, so the result is meaningless. */
	return before ? 1 : r;
}

/*
 * Test the time limit, which is 10 ms for all pages together.  On a busy machine both
 * sides may take longer, so allow a number of attempts.
 */
TEST_F_TIMEOUT(convert, wait_for_pins, SLOW)
{
	const u64 size = MAX_RELEASED * SZ_4K;
	int fd, i, r, released, waited = 0, refused = 0;
	char *mem;

	fd = vm_create_guest_memfd(self->t.vm, max_t(u64, size, self->t.page_size),
				   self->t.flags | GUEST_MEMFD_FLAG_INIT_SHARED);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd);

	for (i = 0; i < 20 && !waited; i++)
		waited += !convert_while_released(fd, mem, 1, 2000, &released);
	EXPECT_NE(0, waited);

	/* A conversion must not fail just because it has to wait for many pages. */
	for (i = 0, waited = 0; i < 20 && !waited; i++)
		waited += !convert_while_released(fd, mem, 20, 100, &released);
	EXPECT_NE(0, waited);

	/* The limit is for all pages: fail even if no single page exceeds it. */
	for (i = 0; i < 20 && !refused; i++) {
		r = convert_while_released(fd, mem, MAX_RELEASED, 6000, &released);
		EXPECT_NE(0, r);
		refused += r == -EAGAIN && released < 5;
	}
	EXPECT_NE(0, refused);
	kvm_munmap(mem, size);
	kvm_close(fd);
}

struct allocation {
	int fd;
	u64 size;
};

static void *allocate(void *arg)
{
	struct allocation *a = arg;

	kvm_fallocate(a->fd, FALLOC_FL_KEEP_SIZE, 0, a->size);
	return NULL;
}

/* fallocate() lets other tasks take the lock between two pages of the file. */
TEST_F_TIMEOUT(convert, while_allocated, SLOW)
{
	struct allocation a = {
		.size = self->t.page_size == SZ_4K ? SZ_128M :
			max_t(u64, SZ_64M, 3 * self->t.page_size),
	};
	pthread_t thread;
	long blocks;

	if (self->t.page_size != SZ_4K &&
	    hugetlb_available(self->t.page_size) < a.size / self->t.page_size)
		SKIP(return, "needs more huge pages");

	a.fd = vm_create_guest_memfd(self->t.vm, a.size, self->t.flags);
	kvm_pthread_create(&thread, NULL, allocate, &a);
	while (!gmem_blocks(a.fd))
		sched_yield();
	convert(a.fd, 0, SZ_4K, SHARED);
	blocks = gmem_blocks(a.fd);
	kvm_pthread_join(thread, NULL);
	EXPECT_LT(blocks, gmem_blocks(a.fd));
	EXPECT_EQ(a.size / 512, gmem_blocks(a.fd));
	kvm_close(a.fd);
}

/* Try interfaces through which the kernel accesses memory for a process. */
static void expect_doors(struct convert_test *self, int page, bool shared)
{
	struct iovec remote = { .iov_base = word(self, page), .iov_len = 8 };
	u64 buf = 0;
	struct iovec local = { .iov_base = &buf, .iov_len = 8 };
	int mem, fds[2];
	ssize_t want = shared ? 8 : -1;

	TEST_ASSERT_EQ(process_vm_readv(getpid(), &local, 1, &remote, 1, 0), want);
	TEST_ASSERT_EQ(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), want);

	mem = open_path_or_exit("/proc/self/mem", O_RDWR);
	TEST_ASSERT_EQ(pread(mem, &buf, 8, (uintptr_t)word(self, page)), want);
	TEST_ASSERT_EQ(pwrite(mem, &buf, 8, (uintptr_t)word(self, page)), want);
	kvm_close(mem);

	TEST_ASSERT(!pipe(fds), "pipe() failed");
	TEST_ASSERT_EQ(write(fds[1], word(self, page), 8), want);
	TEST_ASSERT_EQ(vmsplice(fds[1], &remote, 1, 0), want);
	kvm_close(fds[0]);
	kvm_close(fds[1]);

	TEST_ASSERT_EQ(madvise(word(self, page), SZ_4K, MADV_POPULATE_WRITE),
		       shared ? 0 : -1);
	TEST_ASSERT_EQ(madvise(word(self, page), SZ_4K, MADV_POPULATE_READ),
		       shared ? 0 : -1);
}

TEST_F_TIMEOUT(convert, doors_are_shut_for_private_memory, SLOW)
{
	const u64 size = self->t.size;
	char *again, *to;
	int i;

	/* Private memory: not allocated, then used by the guest, then shared and back. */
	convert_all(&self->t, PRIVATE);
	for (i = 0; i < NR_PAGES; i++)
		expect_doors(&self->t, i, false);
	for (i = 0; i < NR_PAGES; i++)
		guest_write(&self->t, i, VALUE(i));
	for (i = 0; i < NR_PAGES; i++)
		expect_doors(&self->t, i, false);

	convert_all(&self->t, SHARED);
	for (i = 0; i < NR_PAGES; i++)
		expect_doors(&self->t, i, true);
	convert_all(&self->t, PRIVATE);
	for (i = 0; i < NR_PAGES; i++)
		expect_doors(&self->t, i, false);

	/* Use a second mapping, and move it with the page in it. */
	again = kvm_mmap(size, PROT_READ, MAP_SHARED, self->t.fd);
	TEST_EXPECT_SIGBUS(READ_ONCE(*again));
	convert_all(&self->t, SHARED);
	READ_ONCE(*again);
	to = kvm_mmap(size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	ASSERT_EQ(to, mremap(again, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to));
	EXPECT_NE(0, gmem_host_pfn(to));
	convert_all(&self->t, PRIVATE);
	EXPECT_EQ(0, gmem_host_pfn(to));
	TEST_EXPECT_SIGBUS(READ_ONCE(*to));
	kvm_munmap(to, size);
}

/* A conversion takes as long as the memory that is there. */
TEST_F_TIMEOUT(convert, sparse_file, SLOW)
{
	const u64 size = 1ull << 62, last = size - SZ_4K;
	struct convert_test *t = &self->t;
	u64 value, *p;
	int fd;

	if (t->page_size != SZ_4K)
		SKIP(return, "huge pages are reserved");

	fd = vm_create_guest_memfd(t->vm, size, t->flags);
	gmem_add_slot(t->vm, GMEM_SLOT + 1, OTHER_GPA, SZ_4K, fd, last);
	p = __kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_SHARED, fd, last);

	for (value = VALUE(1); value < VALUE(3); value += VALUE(1)) {
		convert(fd, 0, size, SHARED);
		WRITE_ONCE(*p, value);
		convert(fd, 0, size, PRIVATE);
		gmem_guest_do(t->vcpu, GMEM_CHECK, OTHER_GPA, 8, 8, value);
		TEST_EXPECT_SIGBUS(READ_ONCE(*p));
	}

	kvm_fallocate(fd, PUNCH_HOLE, 0, size);
	gmem_guest_do(t->vcpu, GMEM_CHECK_ZERO, OTHER_GPA, 8, 8, 0);
	kvm_munmap(p, SZ_4K);
	kvm_close(fd);
}

TEST_F(convert, nothing_is_beyond_the_file)
{
	gmem_expect_nothing_beyond(self->t.fd);
}

struct knocking {
	struct convert_test *t;
	bool stop;
	bool converting;
	long opened, shut, met;
};

static void count_door(struct knocking *k, bool opened)
{
	if (READ_ONCE(k->converting))
		k->met++;
	if (opened)
		WRITE_ONCE(k->opened, k->opened + 1);
	else
		WRITE_ONCE(k->shut, k->shut + 1);
}

static void *knock(void *data)
{
	struct knocking *k = data;
	u64 *p = word(k->t, 1), value = VALUE(-1), buf;
	struct iovec local = { .iov_base = &value, .iov_len = 8 };
	struct iovec remote = { .iov_base = p, .iov_len = 8 };
	int mem = open_path_or_exit("/proc/self/mem", O_RDWR), fds[2];

	TEST_ASSERT(!pipe(fds), "pipe() failed");
	while (!READ_ONCE(k->stop)) {
		count_door(k, process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == 8);
		count_door(k, pwrite(mem, &value, 8, (uintptr_t)p) == 8);
		count_door(k, !madvise(p, SZ_4K, MADV_POPULATE_WRITE));
		TEST_ASSERT(write(fds[1], &value, 8) == 8, "write() failed");
		count_door(k, read(fds[0], p, 8) == 8);
		/* A failed read() may have left data in the pipe: continue with a new one. */
		kvm_close(fds[0]);
		kvm_close(fds[1]);
		TEST_ASSERT(!pipe(fds), "pipe() failed");
		/* Pin the page for a moment. */
		if (vmsplice(fds[1], &remote, 1, 0) == 8)
			TEST_ASSERT(read(fds[0], &buf, 8) == 8, "read() failed");
	}
	kvm_close(fds[0]);
	kvm_close(fds[1]);
	kvm_close(mem);
	return NULL;
}

/* No write through these interfaces may arrive after the page has become private. */
TEST_F_TIMEOUT(convert, doors_while_memory_becomes_private, SLOW)
{
	/* In a 1 GiB page, a conversion checks every shared piece. */
	const int rounds = self->t.page_size == SZ_1G ? 25 : 100;
	struct knocking k = { .t = &self->t };
	long refused = 0, opened, shut;
	pthread_t thread;
	u64 error;
	int i;

	kvm_pthread_create(&thread, NULL, knock, &k);
	for (i = 0; i < rounds; i++) {
		convert_all(&self->t, SHARED);
		opened = READ_ONCE(k.opened);
		while (READ_ONCE(k.opened) == opened)
			sched_yield();

		WRITE_ONCE(k.converting, true);
		while (gmem_convert(self->t.fd, 0, self->t.size, PRIVATE, &error)) {
			TEST_ASSERT(errno == EAGAIN && error == page_offset(&self->t, 1),
				    "errno %d (%s) at 0x%lx", errno, strerror(errno), error);
			refused++;
		}
		WRITE_ONCE(k.converting, false);
		guest_write(&self->t, 1, VALUE(i));
		expect_doors(&self->t, 1, false);
		shut = READ_ONCE(k.shut);
		while (READ_ONCE(k.shut) < shut + 4)
			guest_check(&self->t, 1, VALUE(i));
	}
	WRITE_ONCE(k.stop, true);
	kvm_pthread_join(thread, NULL);
	EXPECT_LT(0, k.met);
	TH_LOG("doors: %ld open, %ld shut, %ld during conversions; refused: %ld",
	       k.opened, k.shut, k.met, refused);
}

/* Make KVM update the guest's clock.  @page must contain VALUE(@page). */
static void update_clock(struct convert_test *self, int page)
{
	vcpu_ioctl(self->vcpu, KVM_KVMCLOCK_CTRL, NULL);
	guest_check(self, page, VALUE(page));
}

/* KVM accesses the clock through the host's mapping, and caches the pfn. */
TEST_F_TIMEOUT(convert, kvm_keeps_out_of_private_memory, SLOW)
{
	struct pvclock_vcpu_time_info *clock = (void *)word(&self->t, 0);
	u32 version;

	gmem_delete_slot(self->t.vm, GMEM_SLOT);
	add_slot(&self->t, self->t.mem);
	convert_all(&self->t, SHARED);
	guest_write(&self->t, 1, VALUE(1));

	vcpu_set_msr(self->t.vcpu, MSR_KVM_SYSTEM_TIME_NEW,
		     page_gpa(&self->t, 0) | KVM_MSR_ENABLED);
	update_clock(&self->t, 1);
	version = READ_ONCE(clock->version);
	EXPECT_NE(0, version);
	update_clock(&self->t, 1);
	EXPECT_NE(version, READ_ONCE(clock->version));

	convert_pages(&self->t, 0, 1, PRIVATE);
	guest_write(&self->t, 0, VALUE(0));
	update_clock(&self->t, 1);
	update_clock(&self->t, 0);
	convert_pages(&self->t, 0, 1, SHARED);
	EXPECT_EQ(VALUE(0), *word(&self->t, 0));

	update_clock(&self->t, 1);
	EXPECT_NE(VALUE(0), *word(&self->t, 0));
}

TEST_F_TIMEOUT(convert, errors, SLOW)
{
	const u64 size = self->t.file_size;
	const struct {
		u64 offset, size, attributes, flags, reserved;
		int err;
	} cases[] = {
		{ 0, 0, PRIVATE, .err = EINVAL },
		{ 0, 1, PRIVATE, .err = EINVAL },
		{ 1, SZ_4K, PRIVATE, .err = EINVAL },
		{ 0, SZ_4K + 1, PRIVATE, .err = EINVAL },
		{ 0, size + SZ_4K, PRIVATE, .err = EINVAL },
		{ size, SZ_4K, PRIVATE, .err = EINVAL },
		{ size - SZ_4K, 2 * SZ_4K, PRIVATE, .err = EINVAL },
		{ -(u64)SZ_4K, SZ_4K, PRIVATE, .err = EINVAL },
		{ -(u64)SZ_4K, 2 * SZ_4K, PRIVATE, .err = EINVAL },
		{ SZ_4K, -(u64)SZ_4K, PRIVATE, .err = EINVAL },
		{ 0, SZ_4K, PRIVATE, .flags = 1, .err = EINVAL },
		{ 0, SZ_4K, PRIVATE, .flags = 1ull << 63, .err = EINVAL },
		{ 0, SZ_4K, PRIVATE, .reserved = 1, .err = EINVAL },
		{ 0, size, PRIVATE },
		{ 0, size, SHARED },
	};
	struct kvm_memory_attributes2 attrs;
	struct kvm_vm *vm;
	int i, j, bit, r, fd;

	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		for (j = 0; j < ARRAY_SIZE(attrs.reserved); j++) {
			memset(&attrs, 0, sizeof(attrs));
			attrs.offset = cases[i].offset;
			attrs.size = cases[i].size;
			attrs.attributes = cases[i].attributes;
			attrs.flags = cases[i].flags;
			attrs.reserved[j] = cases[i].reserved;
			r = ioctl(self->t.fd, KVM_SET_MEMORY_ATTRIBUTES2, &attrs);
			r = r ? errno : 0;
			TEST_ASSERT(r == cases[i].err, "Case %d: errno %d (%s)",
				    i, r, strerror(r));
		}
	}

	for (bit = 0; bit < 64; bit++) {
		if (BIT_ULL(bit) == PRIVATE)
			continue;
		EXPECT_EQ(-1, gmem_convert(self->t.fd, 0, SZ_4K, BIT_ULL(bit), NULL));
		EXPECT_EQ(EINVAL, errno);
	}

	EXPECT_EQ(-1, ioctl(self->t.fd, KVM_SET_MEMORY_ATTRIBUTES2, NULL));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(-1, ioctl(self->t.fd, KVM_SET_MEMORY_ATTRIBUTES, &attrs));
	EXPECT_EQ(ENOTTY, errno);
	EXPECT_EQ(-1, ioctl(self->t.fd, KVM_CHECK_EXTENSION, 0));
	EXPECT_EQ(ENOTTY, errno);

	/* A VM without private memory has no attributes, and its files cannot be converted. */
	vm = vm_create_barebones();
	EXPECT_EQ(0, vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));
	fd = vm_create_guest_memfd(vm, SZ_4K, variant->flags);
	EXPECT_EQ(-1, gmem_convert(fd, 0, SZ_4K, PRIVATE, NULL));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(-1, gmem_convert(fd, 0, SZ_4K, SHARED, NULL));
	EXPECT_EQ(EINVAL, errno);
	kvm_close(fd);
	kvm_vm_free(vm);
}

/* ENOTTY if the VM's own attributes are not built in. */
static bool v1_is_refused(struct kvm_vm *vm, u64 attributes)
{
	struct kvm_memory_attributes attrs = {
		.address = GMEM_GPA,
		.size = SZ_4K,
		.attributes = attributes,
	};

	return __vm_ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attrs) == -1 &&
	       (errno == EINVAL || errno == ENOTTY);
}

TEST_F_TIMEOUT(convert, capabilities, SLOW)
{
	EXPECT_TRUE(v1_is_refused(self->t.vm, PRIVATE));
	EXPECT_TRUE(v1_is_refused(self->t.vm, SHARED));
	EXPECT_EQ(PRIVATE, kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));
	EXPECT_EQ(PRIVATE, vm_check_cap(self->t.vm, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));
	EXPECT_EQ(0, kvm_check_cap(KVM_CAP_MEMORY_ATTRIBUTES));
	EXPECT_EQ(0, vm_check_cap(self->t.vm, KVM_CAP_MEMORY_ATTRIBUTES));
}

/*
 * Without kvm.gmem_in_place_conversion, no file can be converted.
 */
FIXTURE(off)
{
	struct kvm_vm *vm;
};

#define OFF_SIZE	(NR_PAGES * SZ_4K)

FIXTURE_SETUP(off)
{
	if (kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is on");

	self->vm = vm_create_barebones_type(KVM_X86_SW_PROTECTED_VM);
}

FIXTURE_TEARDOWN(off)
{
	kvm_vm_free(self->vm);
}

TEST_F(off, nothing_can_be_converted)
{
	int fd = vm_create_guest_memfd(self->vm, OFF_SIZE, 0);

	EXPECT_EQ(0, vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));
	EXPECT_EQ(-1, gmem_convert(fd, 0, OFF_SIZE, PRIVATE, NULL));
	EXPECT_EQ(ENOTTY, errno);
	EXPECT_EQ(-1, ioctl(fd, KVM_SET_MEMORY_ATTRIBUTES2, NULL));
	EXPECT_EQ(ENOTTY, errno);
	kvm_close(fd);
}

TEST_F(off, vm_has_the_attributes)
{
	EXPECT_EQ(PRIVATE, kvm_check_cap(KVM_CAP_MEMORY_ATTRIBUTES));
	EXPECT_EQ(PRIVATE, vm_check_cap(self->vm, KVM_CAP_MEMORY_ATTRIBUTES));
	EXPECT_EQ(-1, __vm_create_guest_memfd(self->vm, OFF_SIZE,
					      GUEST_MEMFD_FLAG_INIT_SHARED));
	EXPECT_EQ(EINVAL, errno);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_prepare_pools();
	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
