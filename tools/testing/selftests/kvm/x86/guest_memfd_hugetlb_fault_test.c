// SPDX-License-Identifier: GPL-2.0-only
/*
 * Faults of vCPUs on private guest_memfd memory on HugeTLB pages: contents,
 * charges, concurrent faults of two vCPUs, punches beside a running vCPU, lack
 * of memory, and a VMM that is killed at any moment.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <sys/stat.h>
#include <sys/wait.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "cgroup_util.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "numaif.h"
#include "processor.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ALLOCATE	FALLOC_FL_KEEP_SIZE

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PATTERN		0x600d600d00000000ull

/*
 * A file of @nr pages, bound to one slot at GMEM_GPA, and two idle vCPUs.
 */
struct fault_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[2];
	size_t page_size;
	long nr;
	size_t size;
	int fd;
	struct hugetlb_counters before;
};

FIXTURE(fault)
{
	struct fault_test t;
};

FIXTURE_VARIANT(fault)
{
	size_t page_size;
	long nr;
};

FIXTURE_VARIANT_ADD(fault, 4k) { .page_size = SZ_4K, .nr = 4, };
FIXTURE_VARIANT_ADD(fault, 2m) { .page_size = SZ_2M, .nr = 4, };
FIXTURE_VARIANT_ADD(fault, 1g) { .page_size = SZ_1G, .nr = 2, };

static void create_file(struct fault_test *self)
{
	hugetlb_get(self->page_size, &self->before);
	self->fd = vm_create_guest_memfd(self->vm, self->size,
					 gmem_flags(self->page_size));
	gmem_add_slot(self->vm, GMEM_SLOT, GMEM_GPA, self->size, self->fd, 0);
}

FIXTURE_SETUP(fault)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	self->t.vm = gmem_vm_create(2, self->t.vcpus);
	self->t.page_size = variant->page_size;
	self->t.nr = variant->nr;
	self->t.size = self->t.nr * self->t.page_size;
	create_file(&self->t);
}

FIXTURE_TEARDOWN(fault)
{
	kvm_close(self->t.fd);
	kvm_vm_free(self->t.vm);
	hugetlb_expect_released(&self->t.before, "everything closed");
}

static void start_over(struct fault_test *self)
{
	gmem_delete_slot(self->vm, GMEM_SLOT);
	kvm_close(self->fd);
	hugetlb_expect_released(&self->before, "first file closed");
}

/*
 * Start over with a file on pages that another user has filled with
 * HUGETLB_DIRT.  Return the size of the range that can be on such pages.
 */
static size_t create_file_on_dirty_pages(struct fault_test *self)
{
	long nr = 1;

	if (self->page_size == getpagesize())
		return self->size;

	start_over(self);
	/* Dirty all free pages, or the 1 GiB page that is reused first. */
	if (self->page_size < SZ_1G)
		nr = hugetlb_read(self->page_size, "free_hugepages");
	hugetlb_dirty_pool(self->page_size, nr);
	create_file(self);
	return min(self->size, nr * self->page_size);
}

TEST_F_TIMEOUT(fault, fault_takes_one_reserved_page, SLOW)
{
	gpa_t gpa = GMEM_GPA + self->t.page_size / 2;

	gmem_guest_do(self->t.vcpus[0], GMEM_WRITE, gpa, 8, 8, PATTERN);
	hugetlb_expect(&self->t.before, -1, self->t.nr - 1, "first fault");
	EXPECT_EQ(self->t.page_size / 512, gmem_blocks(self->t.fd));

	/* Accesses of the other vCPU and to all of the page allocate nothing. */
	gmem_guest_do(self->t.vcpus[1], GMEM_CHECK, gpa, 8, 8, PATTERN);
	gmem_guest_do(self->t.vcpus[1], GMEM_READ, GMEM_GPA, self->t.page_size,
		      GMEM_EVERY_4K, 0);
	hugetlb_expect(&self->t.before, -1, self->t.nr - 1, "the page used again");
	EXPECT_EQ(self->t.page_size / 512, gmem_blocks(self->t.fd));
}

TEST_F_TIMEOUT(fault, first_fault_sees_none_of_the_old_contents, SLOW)
{
	size_t size = create_file_on_dirty_pages(&self->t);

	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK_ZERO, GMEM_GPA, size,
		      HUGETLB_DIRT_STRIDE, 0);
}

TEST_F_TIMEOUT(fault, allocated_page_is_zeros, SLOW)
{
	size_t size = create_file_on_dirty_pages(&self->t);

	kvm_fallocate(self->t.fd, ALLOCATE, 0, size);
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK_ZERO, GMEM_GPA, size,
		      HUGETLB_DIRT_STRIDE, 0);
}

TEST_F_TIMEOUT(fault, punched_page_comes_back_as_zeros, SLOW)
{
	const size_t page_size = self->t.page_size;
	gpa_t gpa = GMEM_GPA;

	gmem_guest_do(self->t.vcpus[0], GMEM_WRITE, gpa, page_size, 512, PATTERN);
	gmem_guest_do(self->t.vcpus[1], GMEM_CHECK, gpa, page_size, 512, PATTERN);

	kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, page_size);
	hugetlb_expect(&self->t.before, 0, self->t.nr, "punched");

	/* Both vCPUs have accessed the old page: neither may still reach it. */
	gmem_guest_do(self->t.vcpus[1], GMEM_CHECK_ZERO, gpa, page_size, 512, 0);
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK_ZERO, gpa, page_size, 512, 0);
	hugetlb_expect(&self->t.before, -1, self->t.nr - 1, "faulted again");
}

TEST_F_TIMEOUT(fault, closed_file_is_unmapped_at_once, SLOW)
{
	int r;

	gmem_guest_do(self->t.vcpus[0], GMEM_WRITE, GMEM_GPA, 8, 8, PATTERN);
	kvm_close(self->t.fd);
	hugetlb_expect_released(&self->t.before, "closed while mapped");

	r = __gmem_guest_do(self->t.vcpus[0], GMEM_READ, GMEM_GPA, 8, 8, 0);
	EXPECT_EQ(-EFAULT, r);
	EXPECT_EQ(KVM_EXIT_MEMORY_FAULT, self->t.vcpus[0]->run->exit_reason);
	self->t.fd = kvm_dup(1);
}

TEST_F_TIMEOUT(fault, slot_can_be_removed_and_bound_again, SLOW)
{
	const size_t page_size = self->t.page_size;
	gpa_t gpa = GMEM_GPA + SZ_2G;

	gmem_guest_do(self->t.vcpus[0], GMEM_WRITE, GMEM_GPA, page_size, 512, PATTERN);
	gmem_delete_slot(self->t.vm, GMEM_SLOT);
	hugetlb_expect(&self->t.before, -1, self->t.nr - 1,
		       "the slot was deleted, not the memory");
	gmem_add_slot(self->t.vm, GMEM_SLOT, gpa, self->t.size, self->t.fd, 0);
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK, gpa, page_size, 512, PATTERN);
}

/*
 * Two vCPUs that repeatedly fault on one page at the same moment.
 */
static struct {
	u64 arrived;
	u64 left;
} meeting;

static void guest_meet(u64 *counter, u64 everybody)
{
	__sync_fetch_and_add(counter, 1);
	while (READ_ONCE(*counter) < everybody)
		cpu_relax();
}

#define STAMP(_meeting, _id)	(((_meeting) << 8) + (_id) + 1)

static void guest_race(u64 id, u64 nr_pages, u64 page_size)
{
	u64 nr = 0, page, i;

	for (;;) {
		for (page = 0; page < nr_pages; page++) {
			/* Use words far apart, like the memory of different vCPUs. */
			u64 *base = (u64 *)(GMEM_GPA + page * page_size);
			u64 *own = base + id * page_size / 16;

			nr++;
			guest_meet(&meeting.arrived, nr * 2);
			__GUEST_ASSERT(!READ_ONCE(*own),
				       "vCPU %lu, meeting %lu: a new page holds 0x%lx",
				       id, nr, READ_ONCE(*own));
			WRITE_ONCE(*own, STAMP(nr, id));
			guest_meet(&meeting.left, nr * 2);

			for (i = 0; i < 2; i++) {
				u64 seen = READ_ONCE(base[i * page_size / 16]);

				__GUEST_ASSERT(seen == STAMP(nr, i),
					       "vCPU %lu, meeting %lu: vCPU %lu's word is 0x%lx, not 0x%lx",
					       id, nr, i, seen, (u64)STAMP(nr, i));
			}
		}
		GUEST_SYNC(nr);
	}
}

struct race {
	pthread_barrier_t barrier;
	int rounds;
};

struct race_vcpu {
	struct race *race;
	struct kvm_vcpu *vcpu;
};

static void *race_vcpu(void *arg)
{
	struct race_vcpu *rv = arg;
	int i, r;

	for (i = 0; i < rv->race->rounds; i++) {
		pthread_barrier_wait(&rv->race->barrier);
		r = gmem_guest_run(rv->vcpu);
		TEST_ASSERT(!r, "vCPU %u, round %d of %d: a fault failed with %s",
			    rv->vcpu->id, i + 1, rv->race->rounds, strerror(-r));
		pthread_barrier_wait(&rv->race->barrier);
	}
	return NULL;
}

/*
 * Reserve all other pages of the pool: the fault that loses the race fails if
 * it needs a page of its own for a moment.
 */
TEST_F_TIMEOUT(fault, vcpus_faulting_one_page_get_one_page, SLOW)
{
	const size_t page_size = self->t.page_size;
	struct race race = {
		.rounds = page_size == SZ_1G ? 2 : 50,
	};
	struct race_vcpu rv[2];
	pthread_t threads[2];
	int i, rest = -1;
	long avail;

	if (page_size != getpagesize()) {
		avail = hugetlb_available(page_size);
		if (avail)
			rest = vm_create_guest_memfd(self->t.vm, avail * page_size,
						     gmem_flags(page_size));
		hugetlb_expect(&self->t.before, 0, self->t.nr + avail, "all reserved");
	}

	pthread_barrier_init(&race.barrier, NULL, 3);
	for (i = 0; i < 2; i++) {
		gmem_guest_set_call(self->t.vcpus[i], guest_race, i, self->t.nr,
				    page_size, 0);
		rv[i] = (struct race_vcpu) { &race, self->t.vcpus[i] };
		kvm_pthread_create(&threads[i], NULL, race_vcpu, &rv[i]);
	}
	for (i = 0; i < race.rounds; i++) {
		pthread_barrier_wait(&race.barrier);
		pthread_barrier_wait(&race.barrier);
		ASSERT_EQ(self->t.size / 512, gmem_blocks(self->t.fd));
		kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, self->t.size);
		ASSERT_EQ(0, gmem_blocks(self->t.fd));
	}
	for (i = 0; i < 2; i++)
		kvm_pthread_join(threads[i], NULL);

	ksft_print_msg("2 vCPUs met %ld times on a new page of %s\n",
		       race.rounds * self->t.nr, page_size == getpagesize() ? "4KB" :
		       hugetlb_size_name(page_size));
	if (rest >= 0)
		kvm_close(rest);
	hugetlb_expect(&self->t.before, 0, self->t.nr, "all punched, still open");
}

/*
 * Punch holes beside a running vCPU.
 */
static u64 guest_stop;
/* Number of rounds of each vCPU, which tells the host that the vCPU runs. */
static u64 guest_rounds[GMEM_MAX_VCPUS];

/* Increment several words of each page, and check that no increment is lost. */
static void guest_count(u64 nr_pages, u64 page_size, u64 first, u64 step)
{
	u64 count = 0, page, i;

	while (!READ_ONCE(guest_stop)) {
		for (page = first; page < nr_pages; page += step) {
			for (i = 0; i < 8; i++) {
				u64 *p = (u64 *)(GMEM_GPA + page * page_size +
						 i * page_size / 8 + i * 8);

				__GUEST_ASSERT(READ_ONCE(*p) == count,
					       "page %lu, word %lu: %lu, was counted to %lu",
					       page, i, READ_ONCE(*p), count);
				WRITE_ONCE(*p, count + 1);
			}
		}
		WRITE_ONCE(guest_rounds[0], ++count);
	}
}

static void *run_vcpu(void *vcpu)
{
	int r = gmem_guest_run(vcpu);

	TEST_ASSERT(!r, "A vCPU beside or below punches failed: %s", strerror(-r));
	return NULL;
}

static void start_vcpu(pthread_t *thread, struct kvm_vcpu *vcpu)
{
	write_guest_global(vcpu->vm, guest_stop, 0);
	write_guest_global(vcpu->vm, guest_rounds[vcpu->id], 0);
	kvm_pthread_create(thread, NULL, run_vcpu, vcpu);
}

static u64 rounds_of(struct kvm_vcpu *vcpu)
{
	u64 *p = addr_gva2hva(vcpu->vm, (gva_t)&guest_rounds[vcpu->id]);

	return READ_ONCE(*p);
}

static void stop_vcpus(pthread_t *threads, struct kvm_vcpu **vcpus, int nr)
{
	int i;

	/* Wait for the first round of each vCPU: before that it has checked nothing. */
	for (i = 0; i < nr; i++)
		while (!rounds_of(vcpus[i]))
			sched_yield();

	write_guest_global(vcpus[0]->vm, guest_stop, 1);
	for (i = 0; i < nr; i++)
		kvm_pthread_join(threads[i], NULL);
}

TEST_F_TIMEOUT(fault, neighbours_of_a_punched_page_lose_nothing, SLOW)
{
	const size_t page_size = self->t.page_size;
	bool slow = page_size == SZ_1G;
	int rounds = slow ? 500 : 200, i;
	struct kvm_vcpu *counter = self->t.vcpus[0];
	pthread_t thread;

	/* Punch page 1.  The vCPU uses page 0 and, if there is one, page 2. */
	gmem_guest_set_call(counter, guest_count, self->t.nr, page_size, 0, 2);
	start_vcpu(&thread, counter);
	while (!rounds_of(counter))
		sched_yield();

	for (i = 0; i < rounds; i++) {
		/* Allocate a page to punch each time, unless that takes seconds. */
		if (!slow || !i)
			gmem_guest_do(self->t.vcpus[1], GMEM_CHECK_ZERO,
				      GMEM_GPA + page_size, page_size,
				      GMEM_EVERY_4K, 0);
		if (!slow || !i)
			gmem_guest_do(self->t.vcpus[1], GMEM_WRITE,
				      GMEM_GPA + page_size, page_size,
				      GMEM_EVERY_4K, PATTERN);
		kvm_fallocate(self->t.fd, PUNCH_HOLE, page_size, page_size);
	}
	stop_vcpus(&thread, &counter, 1);
	ksft_print_msg("%d punches beside a vCPU that went round %lu times\n",
		       rounds, rounds_of(counter));
	hugetlb_expect(&self->t.before, slow ? -1 : -2, self->t.nr - (slow ? 1 : 2),
		       "the neighbours are still there");
}

/*
 * Write to every page.  Expect the last value or, after a punch, zeros.  Two
 * vCPUs run this, each with its own words.
 */
static void guest_rewrite(u64 id, u64 nr_pages, u64 page_size, u64 unused)
{
	u64 count = 0, page;

	while (!READ_ONCE(guest_stop)) {
		for (page = 0; page < nr_pages; page++) {
			u64 *p = (u64 *)(GMEM_GPA + page * page_size + id * 64);
			u64 seen = READ_ONCE(*p);

			__GUEST_ASSERT(!seen || seen == STAMP(count, id),
				       "vCPU %lu, page %lu: 0x%lx, neither zeros nor 0x%lx",
				       id, page, seen, (u64)STAMP(count, id));
			WRITE_ONCE(*p, STAMP(count + 1, id));
		}
		WRITE_ONCE(guest_rounds[id], ++count);
	}
}

/*
 * Reserve all other pages of the pool: a fault has to reuse the punched page,
 * and must not fail because the pool is empty.
 */
TEST_F_TIMEOUT(fault, vcpus_survive_punches_of_what_they_use, SLOW)
{
	const size_t page_size = self->t.page_size;
	int rounds = page_size == SZ_1G ? 2 : 300;
	struct kvm_vm *vm = self->t.vm;
	pthread_t threads[2];
	int i, rest = -1;

	if (page_size != getpagesize() && hugetlb_available(page_size))
		rest = vm_create_guest_memfd(vm, hugetlb_available(page_size) *
					     page_size, gmem_flags(page_size));

	for (i = 0; i < 2; i++) {
		gmem_guest_set_call(self->t.vcpus[i], guest_rewrite, i,
				    self->t.nr, page_size, 0);
		start_vcpu(&threads[i], self->t.vcpus[i]);
	}
	for (i = 0; i < 2; i++)
		while (!rounds_of(self->t.vcpus[i]))
			sched_yield();

	for (i = 0; i < rounds; i++) {
		kvm_fallocate(self->t.fd, PUNCH_HOLE, (i % self->t.nr) * page_size,
			      page_size);
		kvm_fallocate(self->t.fd, ALLOCATE, 0, self->t.size);
	}
	stop_vcpus(threads, self->t.vcpus, 2);
	ksft_print_msg("%d punches below vCPUs that went round %lu and %lu times\n",
		       rounds, rounds_of(self->t.vcpus[0]), rounds_of(self->t.vcpus[1]));
	if (rest >= 0)
		kvm_close(rest);
	hugetlb_expect(&self->t.before, -self->t.nr, 0, "all pages in use");
}

/* Fault in the even pages while the odd ones are punched. */
TEST_F_TIMEOUT(fault, faults_beside_punches_lose_nothing, SLOW)
{
	const size_t page_size = self->t.page_size;
	const long nr = page_size == SZ_1G ? HUGETLB_POOL_1G : 16;
	const int rounds = page_size == SZ_1G ? 1 : 10;
	pthread_t thread;
	int i, page;

	start_over(&self->t);
	self->t.nr = nr;
	self->t.size = nr * page_size;
	create_file(&self->t);

	for (i = 0; i < rounds; i++) {
		kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, self->t.size);
		kvm_fallocate(self->t.fd, ALLOCATE, 0, self->t.size);
		for (page = 0; page < nr; page += 2)
			kvm_fallocate(self->t.fd, PUNCH_HOLE, page * page_size, page_size);

		gmem_guest_set_call(self->t.vcpus[0], guest_count, nr, page_size, 0, 2);
		start_vcpu(&thread, self->t.vcpus[0]);
		for (page = 1; page < nr; page += 2)
			kvm_fallocate(self->t.fd, PUNCH_HOLE, page * page_size, page_size);
		stop_vcpus(&thread, self->t.vcpus, 1);
	}
}

/*
 * Lack of memory: the vCPU's fault fails, and the VM can continue.
 */
static void expect_fault_fails(struct kvm_vcpu *vcpu, gpa_t gpa, const char *why)
{
	int r = __gmem_guest_do(vcpu, GMEM_WRITE, gpa, 8, 8, PATTERN);

	TEST_ASSERT(gmem_is_full(-r), "%s: KVM_RUN should give ENOMEM or ENOSPC, got %d (%s)",
		    why, r, strerror(-r));
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_MEMORY_FAULT);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.flags, KVM_MEMORY_EXIT_FLAG_PRIVATE);
	TEST_ASSERT_EQ(vcpu->run->memory_fault.gpa, gpa & ~(SZ_4K - 1ull));
	TEST_ASSERT_EQ(vcpu->run->memory_fault.size, SZ_4K);
}

FIXTURE(full)
{
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct hugetlb_counters before;
	int fd;
};

FIXTURE_VARIANT(full)
{
	size_t page_size;
};

FIXTURE_VARIANT_ADD(full, 2m) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(full, 1g) { .page_size = SZ_1G, };

#define CGROUP	"gmem_fault_test"

FIXTURE_SETUP(full)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);
	if (!hugetlb_cgroup_enter(CGROUP))
		SKIP(return, HUGETLB_NO_CGROUP);

	self->vm = gmem_vm_create(1, &self->vcpu);
	hugetlb_get(variant->page_size, &self->before);
	self->fd = vm_create_guest_memfd(self->vm, 2 * variant->page_size,
					 gmem_flags(variant->page_size));
	gmem_add_slot(self->vm, GMEM_SLOT, GMEM_GPA, 2 * variant->page_size,
		      self->fd, 0);
}

/* Run in the parent, which outlives a failed test and is not in the cgroup. */
FIXTURE_TEARDOWN_PARENT(full)
{
	rmdir("/sys/fs/cgroup/" CGROUP);
}

TEST_F_TIMEOUT(full, fault_beyond_the_cgroup_limit_fails_alone, SLOW)
{
	gpa_t gpa = GMEM_GPA + variant->page_size + SZ_8K;
	struct kvm_pre_fault_memory range = { .gpa = gpa, .size = SZ_4K };

	hugetlb_cgroup_write(variant->page_size, "max", "0");
	expect_fault_fails(self->vcpu, gpa, "hugetlb limit");
	hugetlb_expect(&self->before, 0, 2, "fault failed");
	/* Repeat: a failed fault must not change any state. */
	expect_fault_fails(self->vcpu, gpa, "hugetlb limit");
	hugetlb_expect(&self->before, 0, 2, "fault failed again");

	EXPECT_EQ(-1, __vcpu_ioctl(self->vcpu, KVM_PRE_FAULT_MEMORY, &range));
	EXPECT_TRUE(gmem_is_full(errno));
	hugetlb_expect(&self->before, 0, 2, "pre-fault failed");

	if (variant->page_size == SZ_2M) {
		hugetlb_cgroup_write(variant->page_size, "max", "max");
		EXPECT_EQ(0, gmem_guest_run(self->vcpu));
		gmem_guest_do(self->vcpu, GMEM_CHECK, gpa, 8, 8, PATTERN);
		hugetlb_expect(&self->before, -1, 1, "the same fault, with memory");
	}
	kvm_close(self->fd);
	hugetlb_expect_released(&self->before, "closed");
}

TEST_F_TIMEOUT(full, fault_charges_the_cgroup, SLOW)
{
	gmem_guest_do(self->vcpu, GMEM_WRITE, GMEM_GPA, 8, 8, PATTERN);
	/* Includes hugetlb.current, rsvd.current and numa_stat. */
	hugetlb_expect(&self->before, -1, 1, "one page used");
	EXPECT_EQ(variant->page_size, hugetlb_cgroup_read(variant->page_size, "current"));
	kvm_close(self->fd);
	hugetlb_expect_released(&self->before, "closed");
}

/*
 * Two nodes: the policy of the vCPU's thread applies, and faults never allocate
 * surplus pages.
 */
FIXTURE(numa)
{
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
};

FIXTURE_SETUP(numa)
{
	const char *reason = gmem_two_nodes_unavailable(8);

	if (reason)
		SKIP(return, "%s", reason);

	self->vm = gmem_vm_create(1, &self->vcpu);
	self->fd = vm_create_guest_memfd(self->vm, 4 * SZ_2M, gmem_flags(SZ_2M));
	gmem_add_slot(self->vm, GMEM_SLOT, GMEM_GPA, 4 * SZ_2M, self->fd, 0);
}

FIXTURE_TEARDOWN(numa)
{
	kvm_set_mempolicy(MPOL_DEFAULT, NULL, 0);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

static void bind_to_node(int nid)
{
	unsigned long nodes = 1ul << nid;

	kvm_set_mempolicy(MPOL_BIND, &nodes, BITS_PER_TYPE(nodes));
}

TEST_F_TIMEOUT(numa, fault_follows_the_policy_of_the_task, SLOW)
{
	int nid;

	for (nid = 0; nid < 2; nid++) {
		bind_to_node(nid);
		gmem_guest_do(self->vcpu, GMEM_READ, GMEM_GPA + nid * SZ_4M,
			      SZ_4M, SZ_2M, 0);
		EXPECT_EQ(6, hugetlb_read_node(SZ_2M, nid, "free_hugepages"));
	}
}

TEST_F_TIMEOUT(numa, fault_on_an_empty_node_takes_no_surplus, SLOW)
{
	int nid;

	for (nid = 0; nid < 2; nid++) {
		gpa_t gpa = GMEM_GPA + nid * SZ_2M;

		hugetlb_write_node(SZ_2M, nid, "nr_hugepages", 0);
		hugetlb_write(SZ_2M, "nr_overcommit_hugepages", 1000);

		bind_to_node(nid);
		expect_fault_fails(self->vcpu, gpa, "bound to an empty node");
		EXPECT_EQ(0, hugetlb_read(SZ_2M, "surplus_hugepages"));
		EXPECT_EQ(4, hugetlb_read(SZ_2M, "resv_hugepages"));

		kvm_set_mempolicy(MPOL_DEFAULT, NULL, 0);
		EXPECT_EQ(0, gmem_guest_run(self->vcpu));
		gmem_guest_do(self->vcpu, GMEM_CHECK, gpa, 8, 8, PATTERN);

		/*
		 * Free the page: it would become surplus when the other node's
		 * pool shrinks.
		 */
		kvm_fallocate(self->fd, PUNCH_HOLE, nid * SZ_2M, SZ_2M);
		hugetlb_write(SZ_2M, "nr_overcommit_hugepages", 0);
		hugetlb_write_node(SZ_2M, nid, "nr_hugepages", 8);
	}
}

static u64 *populate_source(long nr)
{
	u64 *src = kvm_mmap(nr * SZ_4K, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1);
	long i;

	for (i = 0; i < nr * SZ_4K / 8; i++)
		src[i] = PATTERN + i * 8;
	return src;
}

TEST_F_TIMEOUT(fault, populate_exposes_none_of_the_old_contents, SLOW)
{
	const size_t page_size = self->t.page_size;
	gpa_t gpa = GMEM_GPA + (page_size > SZ_4K ? 3 * SZ_4K : 0);
	gpa_t end = GMEM_GPA + page_size;

	if (!gmem_can_populate(self->t.vm))
		SKIP(return, GMEM_NO_DEBUGFS);

	create_file_on_dirty_pages(&self->t);

	ASSERT_EQ(0, gmem_populate(self->t.vm, gpa, 1, populate_source(1)));
	hugetlb_expect(&self->t.before, -1, self->t.nr - 1, "one page populated");

	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK, gpa, SZ_4K, 8, PATTERN);
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK_ZERO, GMEM_GPA, gpa - GMEM_GPA, 8, 0);
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK_ZERO, gpa + SZ_4K,
		      end - gpa - SZ_4K, HUGETLB_DIRT_STRIDE, 0);
	hugetlb_expect(&self->t.before, -1, self->t.nr - 1, "and used");
}

TEST_F_TIMEOUT(fault, populate_without_a_source_leaves_zeros, SLOW)
{
	const size_t page_size = self->t.page_size;
	size_t size;

	if (!gmem_can_populate(self->t.vm))
		SKIP(return, GMEM_NO_DEBUGFS);

	size = create_file_on_dirty_pages(&self->t);

	/* The page allocator returns base pages that have just been freed. */
	if (page_size == SZ_4K) {
		gmem_guest_do(self->t.vcpus[0], GMEM_WRITE, GMEM_GPA, size, 8, PATTERN);
		kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, size);
	}

	ASSERT_EQ(0, gmem_populate(self->t.vm, GMEM_GPA,
				   page_size == SZ_4K ? size / SZ_4K : 2, NULL));
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK_ZERO, GMEM_GPA, size,
		      page_size == SZ_4K ? 8 : HUGETLB_DIRT_STRIDE, 0);
}

TEST_F_TIMEOUT(fault, populate_in_pieces_keeps_what_is_there, SLOW)
{
	const long nr = 4;
	u64 *src;
	int i;

	if (!gmem_can_populate(self->t.vm))
		SKIP(return, GMEM_NO_DEBUGFS);

	src = populate_source(nr);
	for (i = nr - 1; i >= 0; i--)
		ASSERT_EQ(0, gmem_populate(self->t.vm, GMEM_GPA + i * SZ_4K, 1,
					   src + i * SZ_4K / 8));
	gmem_guest_do(self->t.vcpus[0], GMEM_CHECK, GMEM_GPA, nr * SZ_4K, 8, PATTERN);
}

TEST_F_TIMEOUT(fault, populate_of_shared_memory_is_refused, SLOW)
{
	if (!gmem_can_populate(self->t.vm))
		SKIP(return, GMEM_NO_DEBUGFS);

	if (!kvm_converts_in_place())
		vm_mem_set_shared(self->t.vm, GMEM_GPA, SZ_4K);
	else
		ASSERT_EQ(0, gmem_convert(self->t.fd, 0, SZ_4K, 0, NULL));
	EXPECT_EQ(-EINVAL, gmem_populate(self->t.vm, GMEM_GPA, 1, populate_source(1)));
}

/*
 * Kill a VMM after a given number of steps.
 */
struct victim {
	size_t page_size;
	long nr;
	u64 *progress;
};

static void victim_step(struct victim *v)
{
	__atomic_fetch_add(v->progress, 1, __ATOMIC_SEQ_CST);
}

/* Any step can be the last.  Faults come from a separate thread. */
static void victim_main(struct victim *v)
{
	const size_t size = v->nr * v->page_size;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	pthread_t thread;
	int fd, i;

	vm = gmem_vm_create(1, &vcpu);
	victim_step(v);
	fd = vm_create_guest_memfd(vm, size, gmem_flags(v->page_size));
	victim_step(v);
	gmem_add_slot(vm, GMEM_SLOT, GMEM_GPA, size, fd, 0);
	victim_step(v);

	gmem_guest_set_call(vcpu, guest_count, v->nr, v->page_size, 0, 2);
	kvm_pthread_create(&thread, NULL, run_vcpu, vcpu);

	for (;;) {
		for (i = 1; i < v->nr; i += 2) {
			kvm_fallocate(fd, ALLOCATE, i * v->page_size, v->page_size);
			victim_step(v);
		}
		for (i = 1; i < v->nr; i += 2) {
			kvm_fallocate(fd, PUNCH_HOLE, i * v->page_size, v->page_size);
			victim_step(v);
		}
		if (v->page_size == SZ_1G)
			continue;
		kvm_close(vm_create_guest_memfd(vm, v->page_size,
						gmem_flags(v->page_size)));
		victim_step(v);
	}
}

static void kill_after(struct victim *v, u64 steps)
{
	struct hugetlb_counters before;
	int status;
	pid_t pid;

	hugetlb_get(v->page_size, &before);
	WRITE_ONCE(*v->progress, 0);

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed");
	if (!pid) {
		victim_main(v);
		_exit(0);
	}
	while (READ_ONCE(*v->progress) < steps) {
		TEST_ASSERT(!waitpid(pid, &status, WNOHANG),
			    "The VMM ended by itself after %lu steps, status 0x%x",
			    *v->progress, status);
		sched_yield();
	}
	kill(pid, SIGKILL);
	TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
		    "The VMM wasn't killed after %lu steps, status 0x%x", steps, status);
	hugetlb_expect_released(&before, "the VMM was killed after %lu steps", steps);
}

FIXTURE(killed)
{
	struct victim victim;
};

FIXTURE_VARIANT(killed)
{
	size_t page_size;
	long nr;
	int moments;
};

FIXTURE_VARIANT_ADD(killed, 4k) { .page_size = SZ_4K, .nr = 64, .moments = 40, };
FIXTURE_VARIANT_ADD(killed, 2m) { .page_size = SZ_2M, .nr = 16, .moments = 40, };
FIXTURE_VARIANT_ADD(killed, 1g) { .page_size = SZ_1G, .nr = 2, .moments = 3, };

FIXTURE_SETUP(killed)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	self->victim.page_size = variant->page_size;
	self->victim.nr = variant->nr;
	self->victim.progress = kvm_mmap(getpagesize(), PROT_READ | PROT_WRITE,
					 MAP_SHARED | MAP_ANONYMOUS, -1);
}

FIXTURE_TEARDOWN(killed)
{
}

TEST_F_TIMEOUT(killed, vmm_killed_at_any_moment_leaves_nothing, SLOW)
{
	int i;

	for (i = 1; i <= variant->moments; i++)
		kill_after(&self->victim, i);
	ksft_print_msg("killed %d times\n", variant->moments);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
