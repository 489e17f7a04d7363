// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files on HugeTLB pages: creation, reservation, allocation and the
 * counters that the kernel reports.  Other tests cover cgroups, changes of the
 * pool and NUMA policies (guest_memfd_hugetlb_pool_test.c), faults of vCPUs
 * (x86/guest_memfd_hugetlb_fault_test.c), and KVM's mappings
 * (x86/guest_memfd_hugetlb_map_test.c).
 */
#include <fcntl.h>
#include <pthread.h>

#include <sys/stat.h>
#include <sys/vfs.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/magic.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "test_util.h"

#ifndef GUEST_MEMFD_MAGIC
#define GUEST_MEMFD_MAGIC	0x474d454d
#endif

#define PUNCH_HOLE		(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ALLOCATE		FALLOC_FL_KEEP_SIZE

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW			300

/* Expect that creating the file fails and leaves the counters unchanged. */
static void expect_refused(struct kvm_vm *vm, size_t page_size, u64 size,
			   u64 flags, const char *why)
{
	struct hugetlb_counters before;
	int fd;

	hugetlb_get(page_size, &before);
	fd = __vm_create_guest_memfd(vm, size, flags);
	TEST_ASSERT(fd < 0 && errno == EINVAL,
		    "%s: size 0x%lx, flags 0x%lx should give EINVAL, got fd %d, errno %d (%s)",
		    why, size, flags, fd, errno, strerror(errno));
	hugetlb_expect(&before, 0, 0, "refused: %s", why);
}

/*
 * Capability and flags, independent of a page size.
 */
FIXTURE(flags)
{
	struct kvm_vm *vm;
	u64 sizes;
};

FIXTURE_SETUP(flags)
{
	self->sizes = kvm_check_cap(KVM_CAP_GUEST_MEMFD_HUGETLB);
	if (!self->sizes)
		SKIP(return, "no KVM_CAP_GUEST_MEMFD_HUGETLB, needs CONFIG_HUGETLBFS");

	self->vm = gmem_vm_create_barebones();
}

FIXTURE_TEARDOWN(flags)
{
	kvm_vm_free(self->vm);
}

TEST_F_TIMEOUT(flags, capability_names_the_sizes_of_the_host, SLOW)
{
	u64 sizes = 0, size;

	for (size = getpagesize(); size < SZ_4G; size <<= 1)
		if (hugetlb_has_size(size))
			sizes |= size / getpagesize();

	EXPECT_EQ(sizes, self->sizes);
	EXPECT_EQ(sizes, vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_HUGETLB));
}

TEST_F_TIMEOUT(flags, capability_does_not_ask_for_private_memory, SLOW)
{
	struct kvm_vm *vm = vm_create_barebones();

	EXPECT_EQ(self->sizes, vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_HUGETLB));
	kvm_vm_free(vm);
}

TEST_F_TIMEOUT(flags, not_among_the_flags_to_be_tried_alone, SLOW)
{
	u64 mask = GUEST_MEMFD_FLAG_HUGETLB | GMEM_SIZE_MASK;

	EXPECT_EQ(0, kvm_check_cap(KVM_CAP_GUEST_MEMFD_FLAGS) & mask);
	EXPECT_EQ(0, vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_FLAGS) & mask);
}

TEST_F_TIMEOUT(flags, every_unknown_bit_is_refused, SLOW)
{
	u64 known = GUEST_MEMFD_FLAG_HUGETLB | GMEM_SIZE_MASK |
		    vm_check_cap(self->vm, KVM_CAP_GUEST_MEMFD_FLAGS);
	size_t size = hugetlb_default_size();
	u64 bit;

	for (bit = 1; bit; bit <<= 1) {
		if (bit & known)
			continue;

		expect_refused(self->vm, size, size, bit, "unknown flag");
		expect_refused(self->vm, size, size,
			       bit | GUEST_MEMFD_FLAG_HUGETLB,
			       "unknown flag with HUGETLB");
		expect_refused(self->vm, size, size, bit | gmem_flags(size),
			       "unknown flag with HUGETLB and a size");
	}
}

TEST_F_TIMEOUT(flags, size_without_hugetlb_is_refused, SLOW)
{
	size_t size = hugetlb_default_size();
	u64 field;

	for (field = 1; field < 64; field++)
		expect_refused(self->vm, size, SZ_1G, field << GMEM_SIZE_SHIFT,
			       "page size without HUGETLB");
}

TEST_F_TIMEOUT(flags, every_page_size, SLOW)
{
	u64 field, flags, size;
	int fd;

	for (field = 1; field < 64; field++) {
		flags = GUEST_MEMFD_FLAG_HUGETLB | field << GMEM_SIZE_SHIFT;
		size = 1ull << field;

		if (field >= 32 || !(self->sizes & (size / getpagesize()))) {
			/* Fail even if the file size is a multiple of the page size. */
			expect_refused(self->vm, SZ_2M, size, flags,
				       "page size that isn't there");
			expect_refused(self->vm, SZ_2M, 1ull << 40, flags,
				       "page size that isn't there");
			continue;
		}

		if (hugetlb_available(size) < 1)
			continue;

		fd = __vm_create_guest_memfd(self->vm, size, flags);
		TEST_ASSERT(fd >= 0, "One page of %s should be possible, got errno %d (%s)",
			    hugetlb_size_name(size), errno, strerror(errno));
		kvm_close(fd);
	}
}

TEST_F_TIMEOUT(flags, no_page_size_is_the_default_size, SLOW)
{
	size_t size = hugetlb_default_size();
	struct hugetlb_counters before;
	struct stat st;
	int fd;

	hugetlb_get(size, &before);
	fd = vm_create_guest_memfd(self->vm, size, GUEST_MEMFD_FLAG_HUGETLB);
	hugetlb_expect(&before, 0, 1, "file of one page of the default size");
	ASSERT_EQ(0, fstat(fd, &st));
	EXPECT_EQ(size, st.st_blksize);
	kvm_close(fd);
	hugetlb_expect_released(&before, "closed");
}

/*
 * Files of base and huge pages must behave the same.
 */
FIXTURE(gmem)
{
	struct kvm_vm *vm;
	size_t page_size;
	/* Size of most test files, in pages and in bytes. */
	long nr;
	size_t size;
	struct hugetlb_counters before;
};

FIXTURE_VARIANT(gmem)
{
	size_t page_size;
	long nr;
};

FIXTURE_VARIANT_ADD(gmem, 4k) { .page_size = SZ_4K, .nr = 4, };
FIXTURE_VARIANT_ADD(gmem, 2m) { .page_size = SZ_2M, .nr = 4, };
FIXTURE_VARIANT_ADD(gmem, 1g) { .page_size = SZ_1G, .nr = 2, };

FIXTURE_SETUP(gmem)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	self->vm = gmem_vm_create_barebones();
	self->page_size = variant->page_size;
	self->nr = variant->nr;
	self->size = self->nr * self->page_size;
	hugetlb_get(self->page_size, &self->before);
}

FIXTURE_TEARDOWN(gmem)
{
	if (self->vm)
		kvm_vm_free(self->vm);
	hugetlb_expect_released(&self->before, "everything closed");
}

static int create(struct kvm_vm *vm, size_t page_size, long nr)
{
	return vm_create_guest_memfd(vm, nr * page_size, gmem_flags(page_size));
}

TEST_F_TIMEOUT(gmem, whole_file_is_reserved_until_close, SLOW)
{
	int fd = create(self->vm, self->page_size, self->nr);

	hugetlb_expect(&self->before, 0, self->nr, "file of %ld pages", self->nr);
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed");
}

TEST_F_TIMEOUT(gmem, stat_tells_page_size_and_memory, SLOW)
{
	int fd = create(self->vm, self->page_size, self->nr);
	struct statfs fs;
	struct stat st;

	ASSERT_EQ(0, fstat(fd, &st));
	EXPECT_EQ(self->size, st.st_size);
	EXPECT_EQ(self->page_size, st.st_blksize);
	EXPECT_EQ(0, st.st_blocks);

	ASSERT_EQ(0, fstatfs(fd, &fs));
	EXPECT_EQ(self->page_size, fs.f_bsize);
	EXPECT_EQ(GUEST_MEMFD_MAGIC, fs.f_type);

	kvm_fallocate(fd, ALLOCATE, self->page_size, self->page_size);
	EXPECT_EQ(self->page_size / 512, gmem_blocks(fd));
	kvm_fallocate(fd, PUNCH_HOLE, self->page_size, self->page_size);
	EXPECT_EQ(0, gmem_blocks(fd));
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, fallocate_and_punch, SLOW)
{
	int fd = create(self->vm, self->page_size, self->nr);

	kvm_fallocate(fd, ALLOCATE, 0, self->page_size);
	hugetlb_expect(&self->before, -1, self->nr - 1, "first page allocated");

	kvm_fallocate(fd, ALLOCATE, 0, self->page_size);
	hugetlb_expect(&self->before, -1, self->nr - 1, "allocated twice");

	kvm_fallocate(fd, PUNCH_HOLE, self->page_size, self->page_size);
	hugetlb_expect(&self->before, -1, self->nr - 1, "a hole punched again");

	kvm_fallocate(fd, PUNCH_HOLE, 0, self->page_size);
	hugetlb_expect(&self->before, 0, self->nr, "first page punched");

	kvm_fallocate(fd, PUNCH_HOLE, 0, self->size);
	hugetlb_expect(&self->before, 0, self->nr, "an empty file punched");

	kvm_fallocate(fd, ALLOCATE, 0, self->page_size);
	hugetlb_expect(&self->before, -1, self->nr - 1, "allocated after punch");

	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed with a page in use");
}

TEST_F_TIMEOUT(gmem, fallocate_takes_every_page_it_touches, SLOW)
{
	/* Touch a single page of 1 GiB, as clearing it is slow. */
	bool one = self->page_size == SZ_1G;
	size_t offset = self->page_size - (one ? 0 : SZ_4K);
	long nr = one ? 1 : 2;
	int fd = create(self->vm, self->page_size, self->nr);

	kvm_fallocate(fd, ALLOCATE, offset, one ? SZ_4K : SZ_8K);
	hugetlb_expect(&self->before, -nr, self->nr - nr,
		       "parts of %ld pages allocated", nr);
	EXPECT_EQ(nr * self->page_size / 512, gmem_blocks(fd));
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, fallocate_refuses_what_is_beyond_the_file, SLOW)
{
	const size_t size = self->size, page_size = self->page_size;
	const struct {
		loff_t offset, len;
	} bad[] = {
		{ 0, size + SZ_4K },
		{ 0, size + page_size },
		{ size - SZ_4K, SZ_8K },
		{ size, SZ_4K },
		{ size, page_size },
		{ size + page_size, page_size },
		{ INT64_MAX & ~(page_size * 2 - 1), page_size },
		{ 0, 1 },
		{ 1, page_size },
		{ 0, page_size - 1 },
		{ SZ_4K - 1, SZ_4K },
	};
	int fd = create(self->vm, self->page_size, self->nr), i;

	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_EQ(-1, fallocate(fd, ALLOCATE, bad[i].offset, bad[i].len)) {
			TH_LOG("offset 0x%lx, length 0x%lx", bad[i].offset, bad[i].len);
		}
		EXPECT_EQ(EINVAL, errno) {
			TH_LOG("offset 0x%lx, length 0x%lx", bad[i].offset, bad[i].len);
		}
		hugetlb_expect(&self->before, 0, self->nr, "refused fallocate()");
	}
	EXPECT_EQ(0, gmem_blocks(fd));
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, fallocate_refuses_other_modes, SLOW)
{
	const int bad[] = {
		0,
		FALLOC_FL_ZERO_RANGE,
		FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
		FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_KEEP_SIZE,
		FALLOC_FL_COLLAPSE_RANGE,
		FALLOC_FL_INSERT_RANGE,
		FALLOC_FL_PUNCH_HOLE,
	};
	int fd = create(self->vm, self->page_size, self->nr), i;

	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_EQ(-1, fallocate(fd, bad[i], 0, self->page_size));
		EXPECT_EQ(EOPNOTSUPP, errno) {
			TH_LOG("mode 0x%x", bad[i]);
		}
	}
	hugetlb_expect(&self->before, 0, self->nr, "refused modes");
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, punch_refuses_parts_of_pages, SLOW)
{
	const loff_t page_size = self->page_size;
	const loff_t offsets[] = { 0, 1, SZ_4K, page_size / 2,
				   page_size - SZ_4K, page_size - 1, page_size };
	const loff_t lens[] = { 1, SZ_4K, page_size / 2, page_size - SZ_4K,
				page_size - 1, page_size, page_size + 1,
				page_size + SZ_4K };
	int fd = create(self->vm, self->page_size, self->nr), i, j;
	long used = 0;

	/* Allocate pages to punch, unless that takes seconds. */
	if (page_size < SZ_1G) {
		kvm_fallocate(fd, ALLOCATE, 0, self->size);
		used = self->nr;
	}

	for (i = 0; i < ARRAY_SIZE(offsets); i++) {
		for (j = 0; j < ARRAY_SIZE(lens); j++) {
			if (!lens[j] || !((offsets[i] | lens[j]) % page_size))
				continue;

			EXPECT_EQ(-1, fallocate(fd, PUNCH_HOLE, offsets[i], lens[j])) {
				TH_LOG("offset 0x%lx, length 0x%lx", offsets[i], lens[j]);
			}
			EXPECT_EQ(EINVAL, errno) {
				TH_LOG("offset 0x%lx, length 0x%lx", offsets[i], lens[j]);
			}
		}
	}
	hugetlb_expect(&self->before, -used, self->nr - used, "refused punches");
	EXPECT_EQ(used * page_size / 512, gmem_blocks(fd));
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, punch_beyond_the_end_does_nothing, SLOW)
{
	int fd = create(self->vm, self->page_size, self->nr);

	EXPECT_EQ(0, fallocate(fd, PUNCH_HOLE, self->size, self->page_size));
	EXPECT_EQ(0, fallocate(fd, PUNCH_HOLE, self->size + self->page_size,
			       self->page_size));
	EXPECT_EQ(0, fallocate(fd, PUNCH_HOLE, 0, self->size + self->page_size));
	EXPECT_EQ(0, fallocate(fd, PUNCH_HOLE, 0, round_down(LONG_MAX, self->page_size)));
	hugetlb_expect(&self->before, 0, self->nr, "nothing to punch");
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, host_has_no_access, SLOW)
{
	int fd = create(self->vm, self->page_size, self->nr);
	char buf[64] = {};

	EXPECT_GT(0, read(fd, buf, sizeof(buf)));
	EXPECT_GT(0, write(fd, buf, sizeof(buf)));
	EXPECT_GT(0, pread(fd, buf, sizeof(buf), 0));
	EXPECT_GT(0, pwrite(fd, buf, sizeof(buf), 0));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, self->size, PROT_READ, MAP_SHARED, fd, 0));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, self->size, PROT_READ, MAP_PRIVATE, fd, 0));
	EXPECT_EQ(-1, ftruncate(fd, 2 * self->size));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(-1, ftruncate(fd, self->page_size));
	EXPECT_EQ(EINVAL, errno);
	hugetlb_expect(&self->before, 0, self->nr, "refused accesses");
	kvm_close(fd);
}

TEST_F_TIMEOUT(gmem, file_outlives_the_vm_fd, SLOW)
{
	int fd = create(self->vm, self->page_size, self->nr), fd2 = kvm_dup(fd);
	long used = self->page_size < SZ_1G ? 1 : 0;

	kvm_vm_free(self->vm);
	self->vm = NULL;
	kvm_close(fd);
	hugetlb_expect(&self->before, 0, self->nr, "a duplicate still open");
	if (used)
		kvm_fallocate(fd2, ALLOCATE, 0, self->page_size);
	hugetlb_expect(&self->before, -used, self->nr - used,
		       "allocated after the VM was closed");
	kvm_close(fd2);
	hugetlb_expect_released(&self->before, "last duplicate closed");
}

TEST_F_TIMEOUT(gmem, files_do_not_share_reservations, SLOW)
{
	u64 flags = gmem_flags(self->page_size);
	long half = self->nr / 2;
	int a, b;

	a = vm_create_guest_memfd(self->vm, half * self->page_size, flags);
	b = vm_create_guest_memfd(self->vm, half * self->page_size, flags);
	hugetlb_expect(&self->before, 0, 2 * half, "two files");

	if (self->page_size < SZ_1G) {
		kvm_fallocate(a, ALLOCATE, 0, half * self->page_size);
		hugetlb_expect(&self->before, -half, half, "one file allocated");
	}
	kvm_close(a);
	hugetlb_expect(&self->before, 0, half, "one file closed");
	kvm_close(b);
}

struct racer {
	pthread_barrier_t *barrier;
	size_t size;
	int fd, rounds, failed, err;
};

static void *race_to_allocate(void *arg)
{
	struct racer *r = arg;
	int i;

	for (i = 0; i < r->rounds; i++) {
		pthread_barrier_wait(r->barrier);
		if (fallocate(r->fd, ALLOCATE, 0, r->size)) {
			r->failed++;
			r->err = errno;
		}
		pthread_barrier_wait(r->barrier);
	}
	return NULL;
}

/* Race for the last pages of the pool: the loser must not find it empty. */
TEST_F_TIMEOUT(gmem, racing_allocations_do_not_fail_each_other, SLOW)
{
	const int rounds = self->page_size == SZ_1G ? 1 : 50;
	struct racer racers[2];
	pthread_barrier_t barrier;
	pthread_t threads[2];
	int fd, rest = -1, i;

	fd = create(self->vm, self->page_size, self->nr);
	if (self->page_size != getpagesize() && hugetlb_available(self->page_size))
		rest = vm_create_guest_memfd(self->vm, hugetlb_available(self->page_size) *
					     self->page_size,
					     gmem_flags(self->page_size));

	pthread_barrier_init(&barrier, NULL, ARRAY_SIZE(racers) + 1);
	for (i = 0; i < ARRAY_SIZE(racers); i++) {
		racers[i] = (struct racer) {
			.barrier = &barrier, .fd = fd, .rounds = rounds,
			/* Allocate a single page of 1 GiB, as clearing it is slow. */
			.size = min(self->size, (size_t)SZ_1G),
		};
		kvm_pthread_create(&threads[i], NULL, race_to_allocate, &racers[i]);
	}
	for (i = 0; i < rounds; i++) {
		pthread_barrier_wait(&barrier);
		pthread_barrier_wait(&barrier);
		ASSERT_EQ(racers[0].size / 512, gmem_blocks(fd));
		kvm_fallocate(fd, PUNCH_HOLE, 0, self->size);
		ASSERT_EQ(0, gmem_blocks(fd));
	}
	for (i = 0; i < ARRAY_SIZE(racers); i++) {
		kvm_pthread_join(threads[i], NULL);
		EXPECT_EQ(0, racers[i].failed) {
			TH_LOG("thread %d, last with errno %d (%s), in %d rounds",
			       i, racers[i].err, strerror(racers[i].err), rounds);
		}
	}
	if (rest >= 0)
		kvm_close(rest);
	kvm_close(fd);
}

/*
 * Files of huge pages: tests that do not apply to base pages.
 */
FIXTURE(hugetlb)
{
	struct kvm_vm *vm;
	size_t page_size;
	struct hugetlb_counters before;
};

FIXTURE_VARIANT(hugetlb)
{
	size_t page_size;
};

FIXTURE_VARIANT_ADD(hugetlb, 2m) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(hugetlb, 1g) { .page_size = SZ_1G, };

FIXTURE_SETUP(hugetlb)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	self->vm = gmem_vm_create_barebones();
	self->page_size = variant->page_size;
	hugetlb_get(self->page_size, &self->before);
}

FIXTURE_TEARDOWN(hugetlb)
{
	kvm_vm_free(self->vm);
	hugetlb_expect_released(&self->before, "everything closed");
}

TEST_F_TIMEOUT(hugetlb, bad_file_sizes_are_refused, SLOW)
{
	const u64 size = self->page_size;
	const u64 bad[] = {
		0, 1, SZ_4K, size / 2, size - SZ_4K, size - 1, size + 1,
		size + SZ_4K, 2 * size - SZ_4K, size + size / 2,
		INT64_MAX, (u64)INT64_MAX + 1, -size, -2 * size, -1, -SZ_4K,
		1ull << 63 | size,
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(bad); i++)
		expect_refused(self->vm, size, bad[i], gmem_flags(size), "file size");
}

TEST_F_TIMEOUT(hugetlb, sizes_beyond_the_pool_are_refused, SLOW)
{
	long max = INT64_MAX / self->page_size;
	long avail = hugetlb_available(self->page_size);
	long nr;

	gmem_expect_full(self->vm, self->page_size, avail + 1, "one page too many");
	gmem_expect_full(self->vm, self->page_size, 2 * avail + 1, "twice the pool");
	for (nr = 1l << 31; nr <= max; nr <<= 1)
		gmem_expect_full(self->vm, self->page_size, nr, "far too many pages");
	gmem_expect_full(self->vm, self->page_size, max, "the largest file there is");
	gmem_expect_full(self->vm, self->page_size, max - 1, "nearly the largest file");
}

TEST_F_TIMEOUT(hugetlb, whole_pool_can_be_one_file, SLOW)
{
	long avail = hugetlb_available(self->page_size);
	int fd;

	fd = vm_create_guest_memfd(self->vm, avail * self->page_size,
				   gmem_flags(self->page_size));
	hugetlb_expect(&self->before, 0, avail, "the whole pool reserved");
	gmem_expect_full(self->vm, self->page_size, 1, "a page of a pool all reserved");
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed");
}

TEST_F_TIMEOUT(hugetlb, surplus_is_never_reserved, SLOW)
{
	long avail = hugetlb_available(self->page_size);
	char *mem;
	int fd;

	hugetlb_write(self->page_size, "nr_overcommit_hugepages", 1000);

	/* A memfd can use surplus pages.  One of 1 GiB may not be available. */
	mem = hugetlb_memfd_map(self->page_size, avail + 1, &fd);
	ASSERT_TRUE(mem != MAP_FAILED || self->page_size != SZ_2M);
	if (mem != MAP_FAILED) {
		EXPECT_EQ(1, hugetlb_read(self->page_size, "surplus_hugepages"));
		kvm_munmap(mem, (avail + 1) * self->page_size);
	}
	kvm_close(fd);

	gmem_expect_full(self->vm, self->page_size, avail + 1, "more than the pool");
	hugetlb_write(self->page_size, "nr_overcommit_hugepages", 0);
}

/* Steps for which the changes of all counters are recorded. */
enum { STEP_CREATE, STEP_USE, STEP_PUNCH, STEP_REUSE, STEP_CLOSE, NR_STEPS };

static void note_step(const struct hugetlb_counters *before,
		      struct hugetlb_counters *step)
{
	int i;

	hugetlb_get(before->size, step);
	for (i = 0; i < NR_HUGETLB_COUNTERS; i++)
		step->val[i] -= before->val[i];
}

/*
 * The pool's state is visible in many places.  In all of them, the same steps
 * must have the same effect for guest_memfd as for a memfd.
 */
TEST_F_TIMEOUT(hugetlb, counters_tell_what_they_tell_for_a_memfd, SLOW)
{
	static const char * const names[] = {
		"create", "use one page", "punch it", "use it again", "close"
	};
	struct hugetlb_counters memfd[NR_STEPS], gmem[NR_STEPS], before;
	const long nr = 2;
	int fd, step, i;
	char *mem;

	if (!hugetlb_cgroup_enter("gmem_truth"))
		SKIP(return, HUGETLB_NO_CGROUP);

	hugetlb_get(self->page_size, &before);

	mem = hugetlb_memfd_map(self->page_size, nr, &fd);
	ASSERT_NE(MAP_FAILED, mem);
	note_step(&before, &memfd[STEP_CREATE]);
	WRITE_ONCE(mem[0], 1);
	note_step(&before, &memfd[STEP_USE]);
	kvm_fallocate(fd, PUNCH_HOLE, 0, self->page_size);
	note_step(&before, &memfd[STEP_PUNCH]);
	WRITE_ONCE(mem[0], 1);
	note_step(&before, &memfd[STEP_REUSE]);
	kvm_munmap(mem, nr * self->page_size);
	kvm_close(fd);
	note_step(&before, &memfd[STEP_CLOSE]);

	fd = vm_create_guest_memfd(self->vm, nr * self->page_size,
				   gmem_flags(self->page_size));
	note_step(&before, &gmem[STEP_CREATE]);
	kvm_fallocate(fd, ALLOCATE, 0, self->page_size);
	note_step(&before, &gmem[STEP_USE]);
	kvm_fallocate(fd, PUNCH_HOLE, 0, self->page_size);
	note_step(&before, &gmem[STEP_PUNCH]);
	kvm_fallocate(fd, ALLOCATE, 0, self->page_size);
	note_step(&before, &gmem[STEP_REUSE]);
	kvm_close(fd);
	hugetlb_expect_released(&before, "closed");
	note_step(&before, &gmem[STEP_CLOSE]);

	/* guest_memfd keeps the reservation of a punched page for the VM. */
	memfd[STEP_PUNCH].val[HUGETLB_RESV]++;
	if (self->page_size == hugetlb_default_size())
		memfd[STEP_PUNCH].val[HUGETLB_MEMINFO_RSVD]++;
	memfd[STEP_PUNCH].val[HUGETLB_CG_RSVD] += self->page_size;

	for (step = 0; step < NR_STEPS; step++) {
		for (i = 0; i < NR_HUGETLB_COUNTERS; i++) {
			EXPECT_EQ(memfd[step].val[i], gmem[step].val[i]) {
				TH_LOG("%s: %s differs from a memfd's",
				       names[step], hugetlb_counter_names[i]);
			}
		}
	}

	/* Check that the counters do change. */
	EXPECT_EQ(nr, memfd[STEP_CREATE].val[HUGETLB_RESV]);
	EXPECT_EQ(nr * self->page_size, memfd[STEP_CREATE].val[HUGETLB_CG_RSVD]);
	EXPECT_EQ(self->page_size, memfd[STEP_USE].val[HUGETLB_CG_CURRENT]);

	hugetlb_cgroup_leave();
	EXPECT_EQ(0, hugetlb_cgroup_remove());
	hugetlb_get(self->page_size, &self->before);
}

/* The VM determines the other flags, as for files of base pages. */
static void check_flags(struct kvm_vm *vm, size_t page_size, const char *name)
{
	const u64 flags[] = {
		0, GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED,
		GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	};
	u64 known = vm_check_cap(vm, KVM_CAP_GUEST_MEMFD_FLAGS);
	int i;

	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		if (flags[i] & ~known)
			expect_refused(vm, page_size, page_size,
				       gmem_flags(page_size) | flags[i], name);
		else
			kvm_close(vm_create_guest_memfd(vm, page_size,
							gmem_flags(page_size) | flags[i]));
	}
}

TEST_F_TIMEOUT(hugetlb, flags_are_those_of_the_vm, SLOW)
{
	struct kvm_vm *vm = vm_create_barebones();

	check_flags(self->vm, self->page_size, "the test's VM");
	check_flags(vm, self->page_size, "default VM");
	kvm_vm_free(vm);
}

/*
 * Check the ABI by number, as the headers are the kernel's own.
 */
kvm_static_assert(GUEST_MEMFD_FLAG_HUGETLB == 1ull << 25);
kvm_static_assert(GUEST_MEMFD_FLAG_HUGETLB_2MB == 21ull << 26);
kvm_static_assert(GUEST_MEMFD_FLAG_HUGETLB_1GB == 30ull << 26);
kvm_static_assert(KVM_CAP_GUEST_MEMFD_HUGETLB == 253);

TEST(bad_pointer)
{
	struct kvm_vm *vm = gmem_vm_create_barebones();

	EXPECT_EQ(-1, ioctl(vm->fd, KVM_CREATE_GUEST_MEMFD, NULL));
	EXPECT_EQ(EFAULT, errno);
	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
