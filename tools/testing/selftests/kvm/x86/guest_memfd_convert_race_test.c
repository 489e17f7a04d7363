// SPDX-License-Identifier: GPL-2.0-only
/*
 * Conversion of guest_memfd memory while the guest and the host use it.
 *
 * Guests check their own data all the time.  Faults of the host or of a guest must not
 * make a conversion fail.  The tests count and print how often both sides met.  A race
 * fails if one side does not take part in it.
 */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>

#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define NR_PAGES	16
#define FILE_SIZE	(NR_PAGES * SZ_4K)
#define MAX_VCPUS	4
#define NR_HOST_THREADS	4

/* End a race after this many conversions, and this many rounds of each other side. */
#define NR_CONVERSIONS	400
#define NR_ROUNDS	20
#define SLOW		300

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

/* Each vCPU has one word of each page, and is the only writer of that word. */
#define TAG		0x600d600d00000000ull
#define TAG_MASK	0xffffffff00000000ull

/*
 * Page size of the file, and offset of the pages that the race is about.  In huge
 * pages, these are on both sides of a boundary between parts, which are split and
 * merged all the time.
 */
static u64 page_size = SZ_4K, base;

/* Fewer for a 1 GiB page, as each round may check or clear all of it. */
static int nr_conversions = NR_CONVERSIONS;

struct race {
	struct kvm_vm *vm;
	gpa_t gpa;		/* guest address of the pages of the race */
	int nr_vcpus;
	struct kvm_vcpu *vcpus[MAX_VCPUS];
	char *mem;
	int fd;
	bool punched;		/* words may have become 0 */
	bool poisoned;		/* pages may have errors */
	bool zap;		/* the host unmaps pages that it has read */
	bool stop;
	long conversions;
	long refused;
	long guest_rounds[MAX_VCPUS];
	long guest_retries[MAX_VCPUS];
	long host_reads[NR_HOST_THREADS];
	long host_sigbus[NR_HOST_THREADS];
	long other_rounds;
};

FIXTURE(race)
{
	struct race r;
};

/*
 * Emulated SVM breaks guests that other CPUs interrupt all the time: they end in a
 * triple fault, or hang, and run with registers of the host.  There, use a machine with
 * one CPU for all variants but no_vcpu.  Preemption still hits every place in the code.
 * vCPUs are pinned, as migration between CPUs is not tested here.
 */
FIXTURE_VARIANT(race)
{
	int nr_vcpus;
	u64 page_size;
	u64 base;
};

FIXTURE_VARIANT_ADD(race, no_vcpu) { .nr_vcpus = 0, .page_size = SZ_4K, };
FIXTURE_VARIANT_ADD(race, one_vcpu) { .nr_vcpus = 1, .page_size = SZ_4K, };
FIXTURE_VARIANT_ADD(race, four_vcpus) { .nr_vcpus = MAX_VCPUS, .page_size = SZ_4K, };
FIXTURE_VARIANT_ADD(race, no_vcpu_2m) {
	.nr_vcpus = 0, .page_size = SZ_2M, .base = SZ_2M - FILE_SIZE / 2,
};

FIXTURE_VARIANT_ADD(race, one_vcpu_2m) {
	.nr_vcpus = 1, .page_size = SZ_2M, .base = SZ_2M - FILE_SIZE / 2,
};

FIXTURE_VARIANT_ADD(race, four_vcpus_2m) {
	.nr_vcpus = MAX_VCPUS, .page_size = SZ_2M, .base = SZ_2M - FILE_SIZE / 2,
};

FIXTURE_VARIANT_ADD(race, four_vcpus_1g) {
	.nr_vcpus = MAX_VCPUS, .page_size = SZ_1G, .base = SZ_512M - FILE_SIZE / 2,
};

/* Twice the pages of the race, or the huge pages that contain them. */
static u64 file_size(void)
{
	return page_size == SZ_4K ? 2 * FILE_SIZE :
	       page_size == SZ_2M ? 2 * page_size : page_size;
}

/* Bind the whole file, so that KVM can use mappings of its page size. */
static void add_slot(struct race *r)
{
	vm_set_user_memory_region2(r->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD,
				   GMEM_GPA, file_size(), NULL, r->fd, 0);
}

static int convert(int fd, u64 offset, u64 size, u64 attributes)
{
	return gmem_convert(fd, base + offset, size, attributes, NULL);
}

static int create_file(struct kvm_vm *vm, u64 flags)
{
	int fd;

	flags |= gmem_flags(page_size) | GUEST_MEMFD_FLAG_MMAP;
	if (page_size == SZ_4K)
		return vm_create_guest_memfd(vm, file_size(), flags);

	/* Keep all pages private that are not part of the race. */
	fd = vm_create_guest_memfd(vm, file_size(), flags & ~GUEST_MEMFD_FLAG_INIT_SHARED);
	if (flags & GUEST_MEMFD_FLAG_INIT_SHARED)
		TEST_ASSERT(!convert(fd, 0, FILE_SIZE, SHARED), "errno %d", errno);
	return fd;
}

static void create(struct race *r, int nr_vcpus)
{
	r->nr_vcpus = nr_vcpus;
	r->gpa = GMEM_GPA + base;
	/* Create at least one vCPU, even if the test does not run it. */
	r->vm = gmem_vm_create(max(nr_vcpus, 1), r->vcpus);
	r->fd = create_file(r->vm, GUEST_MEMFD_FLAG_INIT_SHARED);
	add_slot(r);
	r->mem = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, base);
	TEST_ASSERT(r->mem != MAP_FAILED, "mmap() failed");
}

FIXTURE_SETUP(race)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	page_size = variant->page_size;
	base = variant->base;
	if (page_size == SZ_1G)
		nr_conversions = NR_CONVERSIONS / 8;
	create(&self->r, variant->nr_vcpus);
}

FIXTURE_TEARDOWN(race)
{
	kvm_munmap(self->r.mem, FILE_SIZE);
	kvm_vm_free(self->r.vm);
	kvm_close(self->r.fd);
}

/*
 * Guests: every word must have the value that was written in the previous round.
 */
static bool guest_stop;

static void guest_rounds(u64 vcpu, u64 punched, u64 gpa)
{
	u64 round, want, old, *word;
	int i;

	for (round = 1; !READ_ONCE(guest_stop); round++) {
		for (i = 0; i < NR_PAGES; i++) {
			word = (u64 *)(gpa + i * SZ_4K + vcpu * 8);
			want = round > 1 ? TAG | (vcpu << 24) | (round - 1) : 0;
			old = READ_ONCE(*word);
			__GUEST_ASSERT(old == want || (punched && !old),
				       "page %d, round %lu: 0x%lx, not 0x%lx",
				       i, round, old, want);
			WRITE_ONCE(*word, TAG | (vcpu << 24) | round);
		}
		GUEST_SYNC(round);
	}
}

struct vcpu_thread {
	pthread_t thread;
	struct race *r;
	int id;
};

static void pin_vcpu(int id)
{
	pin_self_to_cpu(id % get_nprocs());
}

static void *run_vcpu(void *arg)
{
	struct vcpu_thread *t = arg;
	struct race *r = t->r;
	struct kvm_vcpu *vcpu = r->vcpus[t->id];
	int ret;

	pin_vcpu(t->id);
	gmem_guest_set_call(vcpu, guest_rounds, t->id, r->punched, r->gpa, 0);
	while (!READ_ONCE(r->stop)) {
		ret = gmem_guest_run(vcpu);
		if (!ret) {
			r->guest_rounds[t->id]++;
			continue;
		}
		/* The page was converted while KVM handled the fault. */
		TEST_ASSERT((ret == -EFAULT || (r->poisoned && ret == -EHWPOISON)) &&
			    vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT,
			    "KVM_RUN: %s, exit %u", strerror(-ret),
			    vcpu->run->exit_reason);
		r->guest_retries[t->id]++;
	}
	return NULL;
}

/*
 * The host: reads words of guests if it has access.  Without guests, it writes words of
 * its own and checks them as guests do.
 */
static __thread sigjmp_buf host_jmpbuf;
static __thread u64 written[NR_PAGES];

static void host_sigbus(int sig)
{
	siglongjmp(host_jmpbuf, 1);
}

static void *run_host(void *arg)
{
	struct vcpu_thread *t = arg;
	struct race *r = t->r;
	unsigned int seed = t->id;
	u64 val, *word;
	int i;

	while (!READ_ONCE(r->stop)) {
		i = rand_r(&seed) % NR_PAGES;
		word = (u64 *)(r->mem + i * SZ_4K + t->id * 8);
		if (sigsetjmp(host_jmpbuf, 1)) {
			r->host_sigbus[t->id]++;
			continue;
		}
		val = READ_ONCE(*word);
		TEST_ASSERT(!val || ((val & TAG_MASK) == TAG &&
				     ((val >> 24) & 0xff) == t->id),
			    "page %d: foreign value 0x%lx", i, val);
		if (!r->nr_vcpus) {
			TEST_ASSERT(val == written[i] || (r->punched && !val),
				    "page %d: 0x%lx, not 0x%lx", i, val, written[i]);
			val = TAG | ((u64)t->id << 24) | (r->host_reads[t->id] & 0xffffff);
			WRITE_ONCE(*word, val);
			written[i] = val;
		}
		r->host_reads[t->id]++;
		/* Zap the page, so that the next access is a fault. */
		if (r->zap)
			madvise(r->mem + i * SZ_4K, SZ_4K, MADV_DONTNEED);
	}
	return NULL;
}

static long least(const long *val, int nr)
{
	long min = val[0];
	int i;

	for (i = 1; i < nr; i++)
		min = min(min, READ_ONCE(val[i]));
	return min;
}

static long sum(const long *val, int nr)
{
	return nr ? val[0] + sum(val + 1, nr - 1) : 0;
}

/* Convert random ranges until all sides have done their rounds. */
static void convert_until(struct race *r, bool guests, bool host, bool other)
{
	unsigned int seed = 1, start, nr;
	int ret, refused;
	u64 attributes;

	while (r->conversions < nr_conversions ||
	       (guests && least(r->guest_rounds, r->nr_vcpus) < NR_ROUNDS) ||
	       (host && least(r->host_reads, NR_HOST_THREADS) < NR_ROUNDS) ||
	       (other && READ_ONCE(r->other_rounds) < NR_ROUNDS)) {
		start = rand_r(&seed) % NR_PAGES;
		nr = 1 + rand_r(&seed) % (NR_PAGES - start);
		attributes = rand_r(&seed) & 1 ? PRIVATE : SHARED;
		refused = 0;
		ret = convert(r->fd, start * SZ_4K, nr * SZ_4K, attributes);
		/*
		 * A thread that zaps pages has references until the scheduler lets it
		 * run again, however late that is.
		 */
		for (; ret && r->zap && errno == EAGAIN && refused < 100; refused++) {
			sched_yield();
			ret = convert(r->fd, start * SZ_4K, nr * SZ_4K, attributes);
		}
		TEST_ASSERT(!ret, "Conversion %ld: errno %d (%s), %d times refused",
			    r->conversions, errno, strerror(errno), refused);
		r->refused += refused;
		/* Enough conversions: leave the CPU to the other threads. */
		if (++r->conversions >= nr_conversions)
			usleep(1000);
	}
}

static void run_race(struct race *r, bool guests, bool host, void *(*other)(void *))
{
	struct vcpu_thread vcpus[MAX_VCPUS], hosts[NR_HOST_THREADS];
	struct sigaction sa = { .sa_handler = host_sigbus }, old;
	pthread_t other_thread;
	int i;

	guests = guests && r->nr_vcpus;
	TEST_ASSERT(guests || host || other, "No task takes part in this race");
	sigaction(SIGBUS, &sa, &old);
	for (i = 0; guests && i < r->nr_vcpus; i++) {
		vcpus[i] = (struct vcpu_thread) { .r = r, .id = i };
		kvm_pthread_create(&vcpus[i].thread, NULL, run_vcpu, &vcpus[i]);
	}
	for (i = 0; host && i < NR_HOST_THREADS; i++) {
		hosts[i] = (struct vcpu_thread) { .r = r, .id = i };
		kvm_pthread_create(&hosts[i].thread, NULL, run_host, &hosts[i]);
	}
	if (other)
		kvm_pthread_create(&other_thread, NULL, other, r);

	convert_until(r, guests, host, other);

	WRITE_ONCE(r->stop, true);
	for (i = 0; guests && i < r->nr_vcpus; i++)
		kvm_pthread_join(vcpus[i].thread, NULL);
	for (i = 0; host && i < NR_HOST_THREADS; i++)
		kvm_pthread_join(hosts[i].thread, NULL);
	if (other)
		kvm_pthread_join(other_thread, NULL);
	sigaction(SIGBUS, &old, NULL);

	ksft_print_msg("%ld conversions (%ld refused), %ld others\n",
		       r->conversions, r->refused, r->other_rounds);
	ksft_print_msg("%ld guest rounds (%ld retries), %ld host reads (%ld SIGBUS)\n",
		       sum(r->guest_rounds, r->nr_vcpus),
		       sum(r->guest_retries, r->nr_vcpus),
		       sum(r->host_reads, NR_HOST_THREADS),
		       sum(r->host_sigbus, NR_HOST_THREADS));
	if (host)
		TEST_ASSERT(sum(r->host_sigbus, NR_HOST_THREADS), "No SIGBUS at all");
}

TEST_F_TIMEOUT(race, guests_write, SLOW)
{
	if (!variant->nr_vcpus)
		SKIP(return, "needs a vCPU");

	run_race(&self->r, true, false, NULL);
}

TEST_F_TIMEOUT(race, guests_write_and_host_reads, SLOW)
{
	run_race(&self->r, true, true, NULL);
}

TEST_F_TIMEOUT(race, host_zaps, SLOW)
{
	self->r.zap = true;
	run_race(&self->r, true, true, NULL);
}

/* A fault mlocks the page that it maps, and leaves it in a batch for a while. */
TEST_F_TIMEOUT(race, host_reads_what_is_mlocked, SLOW)
{
	ASSERT_EQ(0, mlock(self->r.mem, FILE_SIZE));
	run_race(&self->r, true, true, NULL);
	ASSERT_EQ(0, munlock(self->r.mem, FILE_SIZE));
}

/* Extend the range to whole pages of the file, as a hole must be aligned to them. */
static void punch_pages(struct race *r, u64 start, u64 nr)
{
	u64 first = base + start * SZ_4K, end = first + nr * SZ_4K;

	first -= first % page_size;
	end += -end % page_size;
	kvm_fallocate(r->fd, PUNCH_HOLE, first, end - first);
}

static void *punch(void *arg)
{
	struct race *r = arg;
	unsigned int seed = 2, start, nr;

	while (!READ_ONCE(r->stop)) {
		start = rand_r(&seed) % NR_PAGES;
		nr = 1 + rand_r(&seed) % (NR_PAGES - start);
		punch_pages(r, start, nr);
		r->other_rounds++;
	}
	return NULL;
}

TEST_F_TIMEOUT(race, punch, SLOW)
{
	self->r.punched = true;
	run_race(&self->r, true, true, punch);
}

/* Convert the pages that follow those of the race. */
static void *convert_neighbour(void *arg)
{
	struct race *r = arg;
	unsigned int seed = 4, start, nr;
	int ret;

	while (!READ_ONCE(r->stop)) {
		start = rand_r(&seed) % NR_PAGES;
		nr = 1 + rand_r(&seed) % (NR_PAGES - start);
		ret = convert(r->fd, FILE_SIZE + start * SZ_4K, nr * SZ_4K,
			      rand_r(&seed) & 1 ? PRIVATE : SHARED);
		TEST_ASSERT(!ret, "Conversion of a neighbour: errno %d (%s)", errno,
			    strerror(errno));
		r->other_rounds++;
	}
	return NULL;
}

/* Both threads may split and merge the same huge page. */
TEST_F_TIMEOUT(race, neighbours_are_converted, SLOW)
{
	run_race(&self->r, true, true, convert_neighbour);
}

/* Return how much of the VM's memory has large mappings, in units of 2 MiB. */
static long large_mappings(struct race *r)
{
	return vm_get_stat(r->vm, pages_2m) + 512 * vm_get_stat(r->vm, pages_1g);
}

/* Conversions must not affect contents and access of private memory beside them. */
static void write_beside(struct race *r, u64 offset)
{
	long before = large_mappings(r);

	r->gpa = GMEM_GPA + offset;
	if (page_size == SZ_4K)
		TEST_ASSERT(!gmem_convert(r->fd, offset, FILE_SIZE, PRIVATE, NULL),
			    "errno %d", errno);
	run_race(r, true, true, NULL);
	TEST_ASSERT_EQ(sum(r->guest_retries, r->nr_vcpus), 0);

	if (page_size == SZ_4K)
		return;

	/* Let vCPU 0 leave guest_rounds(), so that it takes commands again. */
	guest_stop = true;
	sync_global_to_guest(r->vm, guest_stop);
	TEST_ASSERT(!gmem_guest_run(r->vcpus[0]), "errno %d", errno);
	TEST_ASSERT(!convert(r->fd, 0, FILE_SIZE, PRIVATE), "errno %d", errno);
	gmem_guest_do(r->vcpus[0], GMEM_READ, GMEM_GPA, file_size(), SZ_2M, 0);
	TEST_ASSERT_EQ(large_mappings(r) - before, (long)(file_size() / SZ_2M));
}

/* Write to the same part of a huge page, which is in pieces most of the time. */
TEST_F_TIMEOUT(race, neighbours_are_written_to, SLOW)
{
	if (!variant->nr_vcpus)
		SKIP(return, "needs a vCPU");

	write_beside(&self->r, base + FILE_SIZE);
}

/*
 * Write to a part of a 1 GiB page that stays mapped as a whole.  For other page sizes
 * this is the same as the previous test.
 */
TEST_F_TIMEOUT(race, other_parts_are_written_to, SLOW)
{
	if (!variant->nr_vcpus)
		SKIP(return, "needs a vCPU");

	write_beside(&self->r, page_size == SZ_1G ? base + SZ_4M : base + FILE_SIZE);
}

/* Lookups take references for a moment. */
static void *look(void *arg)
{
	unsigned char vec[NR_PAGES];
	u64 flags[NR_PAGES], pfns[NR_PAGES];
	struct race *r = arg;
	int pagemap, kpageflags, i;

	pagemap = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	kpageflags = open_path_or_exit("/proc/kpageflags", O_RDONLY);
	while (!READ_ONCE(r->stop)) {
		TEST_ASSERT(!mincore(r->mem, FILE_SIZE, vec), "mincore() failed");
		TEST_ASSERT_EQ(pread(pagemap, pfns, sizeof(pfns),
				     (uintptr_t)r->mem / SZ_4K * 8), sizeof(pfns));
		for (i = 0; i < NR_PAGES; i++) {
			if (!(pfns[i] >> 63))
				continue;
			TEST_ASSERT_EQ(pread(kpageflags, flags, 8,
					     (pfns[i] & GENMASK_ULL(54, 0)) * 8), 8);
		}
		r->other_rounds++;
	}
	kvm_close(pagemap);
	kvm_close(kpageflags);
	return NULL;
}

TEST_F_TIMEOUT(race, lookups_by_others, SLOW)
{
	run_race(&self->r, true, true, look);
}

/*
 * A conversion of a large range runs for longer than it may wait for references, and
 * meets many of these.  None of them is a reason to fail.  Use a single lookup thread,
 * so that a thread with a reference gets the CPU while the conversion waits.
 */
static u64 large_size(void)
{
	return page_size == SZ_1G ? SZ_1G : page_size == SZ_2M ? SZ_64M : SZ_512M;
}

static void *look_at_large(void *arg)
{
	static unsigned char vec[SZ_1G / SZ_4K];
	struct race *r = arg;

	while (!READ_ONCE(r->stop)) {
		TEST_ASSERT(!mincore(r->mem, large_size(), vec), "mincore() failed");
		r->other_rounds++;
	}
	return NULL;
}

TEST_F_TIMEOUT(race, large_range_and_lookups, SLOW)
{
	struct race r = { .vm = self->r.vm };
	pthread_t thread;
	u64 error;
	int ret;

	r.fd = vm_create_guest_memfd(r.vm, large_size(), gmem_flags(page_size) |
				     GUEST_MEMFD_FLAG_MMAP);
	r.mem = kvm_mmap(large_size(), PROT_READ | PROT_WRITE, MAP_SHARED, r.fd);
	kvm_fallocate(r.fd, FALLOC_FL_KEEP_SIZE, 0, large_size());
	kvm_pthread_create(&thread, NULL, look_at_large, &r);
	while (r.conversions < nr_conversions / 2 || READ_ONCE(r.other_rounds) < NR_ROUNDS) {
		ret = gmem_convert(r.fd, 0, large_size(),
				   r.conversions & 1 ? PRIVATE : SHARED, &error);
		if (ret) {
			ksft_print_msg("conversion %ld: errno %d (%s) at 0x%lx\n",
				       r.conversions, errno, strerror(errno), error);
			r.refused++;
		}
		r.conversions++;
	}
	WRITE_ONCE(r.stop, true);
	kvm_pthread_join(thread, NULL);
	ksft_print_msg("%ld conversions (%ld refused), %ld others\n", r.conversions,
		       r.refused, r.other_rounds);
	EXPECT_EQ(0, r.refused);
	kvm_munmap(r.mem, large_size());
	kvm_close(r.fd);
}

/*
 * A guest that reads memory which may be missing.  Each access may get memory, MMIO (no
 * memory), or an error.
 */
static void guest_reads(u64 gpa)
{
	int i;

	for (;;) {
		for (i = 0; i < NR_PAGES; i++)
			READ_ONCE(*(u64 *)(gpa + i * SZ_4K));
		GUEST_SYNC(0);
	}
}

struct reader {
	pthread_t thread;
	struct race *r;
	gpa_t gpa;
	long rounds, mmio, faults;
};

static void *run_reader(void *arg)
{
	struct reader *t = arg;
	struct kvm_vcpu *vcpu = t->r->vcpus[0];

	pin_vcpu(0);
	gmem_guest_set_call(vcpu, guest_reads, t->gpa, 0, 0, 0);
	while (!READ_ONCE(t->r->stop)) {
		if (!__vcpu_run(vcpu)) {
			if (vcpu->run->exit_reason == KVM_EXIT_MMIO) {
				t->mmio++;
				continue;
			}
			TEST_ASSERT(get_ucall(vcpu, NULL) == UCALL_SYNC,
				    "Unexpected exit %u (%s), suberror %u",
				    vcpu->run->exit_reason,
				    exit_reason_str(vcpu->run->exit_reason),
				    vcpu->run->internal.suberror);
			t->rounds++;
			continue;
		}
		TEST_ASSERT(errno == EFAULT &&
			    vcpu->run->exit_reason == KVM_EXIT_MEMORY_FAULT,
			    "KVM_RUN: %s, exit %u", strerror(errno),
			    vcpu->run->exit_reason);
		t->faults++;
	}
	return NULL;
}

static void *delete_slot(void *arg)
{
	struct race *r = arg;

	while (!READ_ONCE(r->stop)) {
		gmem_delete_slot(r->vm, GMEM_SLOT);
		add_slot(r);
		r->other_rounds++;
	}
	return NULL;
}

TEST_F_TIMEOUT(race, slot_deletion, SLOW)
{
	struct reader t = { .r = &self->r, .gpa = GMEM_GPA + base };

	if (!variant->nr_vcpus)
		SKIP(return, "needs a vCPU");

	kvm_pthread_create(&t.thread, NULL, run_reader, &t);
	run_race(&self->r, false, true, delete_slot);
	kvm_pthread_join(t.thread, NULL);
	ksft_print_msg("%ld guest rounds (%ld times nothing there, %ld errors)\n",
		       t.rounds, t.mmio, t.faults);
	EXPECT_LT(0, t.rounds);
	EXPECT_LT(0, t.mmio);
}

/* Convert a file that the guest reads, until it is closed and leaves its memslot. */
static void *convert_closed(void *arg)
{
	struct race *r = arg;

	while (!convert(r->fd, 0, FILE_SIZE, ++r->conversions & 1 ? PRIVATE : SHARED))
		;
	TEST_ASSERT_EQ(errno, ENOTTY);
	return NULL;
}

TEST_F_TIMEOUT(race, close, SLOW)
{
	struct race r = self->r;
	const gpa_t slot = GMEM_GPA + SZ_4G;
	struct reader t = { .r = &r, .gpa = slot + base };
	pthread_t thread;
	long met = 0;
	int i, null;

	if (!variant->nr_vcpus)
		SKIP(return, "needs a vCPU");

	null = open_path_or_exit("/dev/null", O_RDONLY);
	kvm_pthread_create(&t.thread, NULL, run_reader, &t);
	for (i = 0; i < NR_ROUNDS; i++) {
		r.conversions = 0;
		r.fd = create_file(r.vm, 0);
		vm_set_user_memory_region2(r.vm, GMEM_SLOT + 1, KVM_MEM_GUEST_MEMFD,
					   slot, file_size(), NULL, r.fd, 0);
		kvm_fallocate(r.fd, FALLOC_FL_KEEP_SIZE, base, FILE_SIZE);
		kvm_pthread_create(&thread, NULL, convert_closed, &r);
		while (READ_ONCE(r.conversions) < i)
			sched_yield();
		/* Replace the descriptor, so that libc cannot open another file with its number. */
		TEST_ASSERT_EQ(dup2(null, r.fd), r.fd);
		kvm_pthread_join(thread, NULL);
		kvm_close(r.fd);
		met += r.conversions;
		gmem_delete_slot(r.vm, GMEM_SLOT + 1);
	}
	WRITE_ONCE(r.stop, true);
	kvm_pthread_join(t.thread, NULL);
	kvm_close(null);
	ksft_print_msg("%ld conversions, %d files closed\n", met, i);
	ksft_print_msg("%ld guest rounds (%ld times nothing there, %ld errors)\n",
		       t.rounds, t.mmio, t.faults);
	EXPECT_LT(0, t.rounds);
}

/* Poison pages, and punch them out so that new ones replace them. */
static void *poison(void *arg)
{
	struct race *r = arg;
	unsigned int seed = 3, page;
	int i, err;
	u64 pfn;

	while (!READ_ONCE(r->stop)) {
		/* No other thread punches holes, so the page stays in the file. */
		page = rand_r(&seed) % NR_PAGES;
		pfn = gmem_host_pfn(r->mem + page * SZ_4K);
		if (!pfn)
			continue;
		err = gmem_poison(pfn);
		TEST_ASSERT(err == EBUSY || (page_size != SZ_4K && !err), "errno %d", err);
		punch_pages(r, page, 1);
		madvise(r->mem + page * SZ_4K, SZ_4K, MADV_DONTNEED);
		/* A task may still have a reference: retry.  A huge page has been merged. */
		pfn -= pfn % (page_size / SZ_4K);
		for (i = 0; i < 1000 && gmem_unpoison(pfn); i++)
			usleep(1000);
		TEST_ASSERT(i < 1000, "Page 0x%lx is used after its end", pfn);
		r->other_rounds++;
	}
	return NULL;
}

TEST_F_TIMEOUT(race, memory_errors, SLOW)
{
	if (!gmem_can_poison())
		SKIP(return, "needs CONFIG_HWPOISON_INJECT and debugfs");
	self->r.punched = true;
	self->r.poisoned = true;
	run_race(&self->r, true, true, poison);
}

TEST_F_TIMEOUT(race, kill, SLOW)
{
	int i, status;
	long *conversions;
	pid_t pid;

	conversions = kvm_mmap(getpagesize(), PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1);
	for (i = 0; i < NR_ROUNDS; i++) {
		*conversions = 0;
		pid = fork();
		TEST_ASSERT(pid >= 0, "fork() failed");
		if (!pid) {
			struct vcpu_thread t = { };
			struct race r = {};
			bool private = false;

			create(&r, variant->nr_vcpus);
			t.r = &r;
			signal(SIGBUS, host_sigbus);
			kvm_pthread_create(&t.thread, NULL,
					   r.nr_vcpus ? run_vcpu : run_host, &t);
			for (;;) {
				private = !private;
				TEST_ASSERT(!convert(r.fd, 0, FILE_SIZE, private ?
						     PRIVATE : SHARED),
					    "errno %d (%s)", errno, strerror(errno));
				(*conversions)++;
			}
		}
		while (READ_ONCE(*conversions) < 1 + i)
			sched_yield();
		kill(pid, SIGKILL);
		TEST_ASSERT_EQ(waitpid(pid, &status, 0), pid);
		TEST_ASSERT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
			    "The child failed, status 0x%x", status);
	}
	ksft_print_msg("%d processes killed\n", i);
	kvm_munmap(conversions, getpagesize());
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
