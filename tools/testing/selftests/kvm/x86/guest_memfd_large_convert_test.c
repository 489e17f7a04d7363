// SPDX-License-Identifier: GPL-2.0-only
/*
 * Conversion of a large guest_memfd file in one call, while other tasks need the CPU.
 *
 * The file takes all free 1 GiB pages of the pool.  Run this on a machine with one CPU,
 * so that a task on the CPU delays all others.  Each result is a line "# name value".
 * Times are in nanoseconds, or in instructions if the clock of the machine counts
 * these.
 */
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <sys/mman.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
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
#define SLOW		900

#define PATTERN		0x600d600d00000000ull

/* Sleep time of the real-time thread, and the limit for its delay. */
#define NAP_NS		100000
#define MAX_DELAY_NS	NSEC_PER_SEC

struct large_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct hugetlb_counters counters;
	u64 size;
	int fd;
	char *mem;
	bool stop;
	u64 max_mincore;
	u64 nr_mincore;
	u64 max_delay;
	u64 nr_naps;
	u64 max_mmap;
	u64 nr_mmap;
	u64 nr_faults;
};

FIXTURE(large)
{
	struct large_test t;
};

static u64 now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * NSEC_PER_SEC + ts.tv_nsec;
}

static void print_value(const char *name, u64 value)
{
	ksft_print_msg("%s %lu\n", name, value);
}

static void create(struct large_test *t, u64 size)
{
	t->size = size;
	t->vm = gmem_vm_create(1, &t->vcpu);
	t->fd = vm_create_guest_memfd(t->vm, size, gmem_flags(SZ_1G) |
				      GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA, size,
				   NULL, t->fd, 0);
	t->mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	kvm_fallocate(t->fd, FALLOC_FL_KEEP_SIZE, 0, size);
}

static void destroy(struct large_test *t)
{
	kvm_munmap(t->mem, t->size);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
}

/* Access one word of each 1 GiB page that the guest can address. */
static void guest_does(struct large_test *t, enum gmem_op op)
{
	gmem_guest_do(t->vcpu, op, GMEM_GPA, min_t(u64, t->size, GMEM_WINDOW), SZ_1G, PATTERN);
}

static u64 convert(struct large_test *t, u64 offset, u64 size, u64 attributes)
{
	u64 error, start = now();
	int r = gmem_convert(t->fd, offset, size, attributes, &error);

	start = now() - start;
	TEST_ASSERT(!r, "0x%lx bytes at 0x%lx to 0x%lx: errno %d (%s) at 0x%lx",
		    size, offset, attributes, errno, strerror(errno), error);
	return start;
}

/* Convert 4 KiB of a 1 GiB page that is not split before and after. */
static void convert_one(struct large_test *t, const char *which)
{
	const u64 offset = t->size / SZ_1G / 2 * SZ_1G + SZ_1G / 2;
	char name[64];

	guest_does(t, GMEM_WRITE);
	snprintf(name, sizeof(name), "%s_4k_to_shared", which);
	print_value(name, convert(t, offset, SZ_4K, SHARED));
	snprintf(name, sizeof(name), "%s_4k_to_private", which);
	print_value(name, convert(t, offset, SZ_4K, PRIVATE));
	guest_does(t, GMEM_CHECK);
}

static u64 do_mincore(struct large_test *t, unsigned char *vec)
{
	u64 start = now();

	TEST_ASSERT(!mincore(t->mem, SZ_1G, vec), "mincore() failed");
	return now() - start;
}

/* Look up all pages of 1 GiB.  A lookup has a reference for a moment. */
static void *look(void *arg)
{
	unsigned char *vec = malloc(SZ_1G / SZ_4K);
	struct large_test *t = arg;

	while (!READ_ONCE(t->stop)) {
		t->max_mincore = max(t->max_mincore, do_mincore(t, vec));
		t->nr_mincore++;
	}
	free(vec);
	return NULL;
}

/*
 * The thread preempts all others when it wakes up.  If that is late, preemption or
 * interrupts were off, e.g. under a spinlock.  They may have been off since right after
 * the previous wakeup.
 */
static void *nap(void *arg)
{
	const struct sched_param param = { .sched_priority = 1 };
	struct large_test *t = arg;
	struct timespec ts;
	u64 due;

	TEST_ASSERT(!pthread_setschedparam(pthread_self(), SCHED_FIFO, &param),
		    "Can't become a real-time thread");
	while (!READ_ONCE(t->stop)) {
		due = now() + NAP_NS;
		ts.tv_sec = due / NSEC_PER_SEC;
		ts.tv_nsec = due % NSEC_PER_SEC;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
		t->max_delay = max(t->max_delay, now() - due);
		t->nr_naps++;
	}
	return NULL;
}

/* Convert all memory to shared and back.  In between, map a page of each 2 MiB. */
static void convert_all(struct large_test *t, const char *which)
{
	u64 per_gib = t->size / SZ_1G, i;
	char name[64];

	guest_does(t, GMEM_CHECK);
	snprintf(name, sizeof(name), "%s_all_to_shared_per_gib", which);
	print_value(name, convert(t, 0, t->size, SHARED) / per_gib);

	for (i = 0; i < t->size; i += SZ_2M)
		WRITE_ONCE(t->mem[i + SZ_4K], 1);

	guest_does(t, GMEM_CHECK);
	snprintf(name, sizeof(name), "%s_all_to_private_per_gib", which);
	print_value(name, convert(t, 0, t->size, PRIVATE) / per_gib);
	guest_does(t, GMEM_CHECK);
}

static void convert_all_beside_others(struct large_test *t)
{
	pthread_t lookup, napper;

	pthread_create(&napper, NULL, nap, t);
	pthread_create(&lookup, NULL, look, t);
	convert_all(t, "beside_others");
	WRITE_ONCE(t->stop, true);
	pthread_join(lookup, NULL);
	pthread_join(napper, NULL);
	print_value("longest_mincore", t->max_mincore);
	print_value("nr_mincore", t->nr_mincore);
	print_value("nr_naps", t->nr_naps);
	print_value("not_preemptible_at_most", t->max_delay + NAP_NS);
}

/* Fault in pages.  A fault waits for the conversion. */
static void *fault(void *arg)
{
	struct large_test *t = arg;
	u64 i;

	for (i = 0; !READ_ONCE(t->stop); i = (i + SZ_4K) % t->size) {
		madvise(t->mem + i, SZ_4K, MADV_POPULATE_READ);
		WRITE_ONCE(t->nr_faults, t->nr_faults + 1);
	}
	return NULL;
}

static void *map(void *arg)
{
	struct large_test *t = arg;
	u64 start;
	void *p;

	while (!READ_ONCE(t->stop)) {
		start = now();
		p = mmap(NULL, SZ_4K, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		TEST_ASSERT(p != MAP_FAILED, "mmap() failed");
		munmap(p, SZ_4K);
		t->max_mmap = max(t->max_mmap, now() - start);
		WRITE_ONCE(t->nr_mmap, t->nr_mmap + 1);
	}
	return NULL;
}

/* Return how long the conversion took. */
static u64 share_all_beside_faults(struct large_test *t)
{
	pthread_t faulter, mapper;
	u64 took;

	WRITE_ONCE(t->stop, false);
	pthread_create(&faulter, NULL, fault, t);
	pthread_create(&mapper, NULL, map, t);
	while (!READ_ONCE(t->nr_faults) || !READ_ONCE(t->nr_mmap))
		sched_yield();
	took = convert(t, 0, t->size, SHARED);
	WRITE_ONCE(t->stop, true);
	pthread_join(faulter, NULL);
	pthread_join(mapper, NULL);
	convert(t, 0, t->size, PRIVATE);

	print_value("beside_faults_all_to_shared_per_gib", took / (t->size / SZ_1G));
	print_value("longest_mmap", t->max_mmap);
	print_value("nr_mmap", t->nr_mmap);
	return took;
}

FIXTURE_SETUP(large)
{
	const char *reason = gmem_unavailable(SZ_1G);

	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");
	if (reason)
		SKIP(return, "%s", reason);

	hugetlb_get(SZ_1G, &self->t.counters);
}

FIXTURE_TEARDOWN(large)
{
	hugetlb_expect_released(&self->t.counters, "after close");
}

/* The cost for 4 KiB should not depend on the size of the file. */
TEST_F_TIMEOUT(large, all_in_one_call, SLOW)
{
	struct large_test *t = &self->t;
	unsigned char *vec = malloc(SZ_1G / SZ_4K);
	u64 took;

	create(t, SZ_1G);
	convert_one(t, "small_file");
	destroy(t);

	create(t, hugetlb_available(SZ_1G) * SZ_1G);
	print_value("nr_huge_pages", t->size / SZ_1G);
	convert_one(t, "large_file");
	print_value("mincore_alone", do_mincore(t, vec));
	free(vec);

	convert_all(t, "alone");
	convert_all_beside_others(t);
	EXPECT_LT(0, t->nr_mincore);
	EXPECT_LT(0, t->nr_naps);
	EXPECT_LT(t->max_delay, MAX_DELAY_NS);

	/* A fault that waits for a conversion must not block mmap(). */
	took = share_all_beside_faults(t);
	EXPECT_LT(t->max_mmap, took / 4);
	destroy(t);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
