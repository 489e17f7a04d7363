// SPDX-License-Identifier: GPL-2.0-only
/*
 * A change of guest_memfd memory disturbs only users of its own range.
 *
 * One thread converts, allocates or frees much memory, over and over, while others use
 * the rest of the file.  Their latencies are compared with those while the same change is
 * made in another file, so that the limits do not depend on the machine.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

#define SLOW		300

/* Changes that one measurement takes, and operations that it needs at least. */
#define NR_CHANGES	16
#define NR_OPS		50

/* Times that a signal has to end a wait, and attempts for that. */
#define NR_SIGNALS	10
#define NR_ATTEMPTS	500

#define NR_BUCKETS	24
#define NR_LONGEST	64

struct latencies {
	long nr;
	u64 longest_ns[NR_LONGEST];	/* in descending order */
	long bucket[NR_BUCKETS];	/* powers of 2 of 1 us */
	long nr_changes;
	u64 change_ns;			/* average */
};

FIXTURE(disturb)
{
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[GMEM_MAX_VCPUS];
	u64 half;		/* the file has two halves; the first one changes */
	int fd, other;		/* the file, and another one of the same size */
	char *mem;		/* mapping of the file */
	char *unused;		/* memory for a memslot without guest_memfd */

	/* the thread that makes the changes */
	pthread_t thread;
	int change_fd;
	bool (*change)(int fd, u64 size, long round);
	bool stop, tight;
	long begun, ended;
	u64 change_ns;

	u64 seed;
};

FIXTURE_VARIANT(disturb)
{
	u64 page_size;
	u64 half;
	bool vcpu;
};

FIXTURE_VARIANT_ADD(disturb, base) { SZ_4K, SZ_128M, false };
FIXTURE_VARIANT_ADD(disturb, base_vcpu) { SZ_4K, SZ_128M, true };
FIXTURE_VARIANT_ADD(disturb, huge_2m) { SZ_2M, 64 * SZ_2M, false };
FIXTURE_VARIANT_ADD(disturb, huge_2m_vcpu) { SZ_2M, 64 * SZ_2M, true };
FIXTURE_VARIANT_ADD(disturb, huge_1g) { SZ_1G, SZ_1G, false };
FIXTURE_VARIANT_ADD(disturb, huge_1g_vcpu) { SZ_1G, SZ_1G, true };

static u64 now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

static void on_signal(int sig)
{
}

static int create_file(struct kvm_vm *vm, u64 page_size, u64 size)
{
	int fd = vm_create_guest_memfd(vm, size, gmem_flags(page_size) |
				       GUEST_MEMFD_FLAG_MMAP |
				       GUEST_MEMFD_FLAG_INIT_SHARED);

	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size);
	return fd;
}

FIXTURE_SETUP(disturb)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct sigaction sa = { .sa_handler = on_signal };

	if (reason)
		SKIP(return, "%s", reason);

	sigaction(SIGUSR1, &sa, NULL);
	sigaction(SIGALRM, &sa, NULL);
	sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK,
			   &(struct sched_param) { .sched_priority = 1 });
	self->half = variant->half;
	if (variant->page_size == SZ_2M)
		hugetlb_pool_set(SZ_2M, 3 * self->half / SZ_2M);
	self->vm = gmem_vm_create(1, self->vcpu);
	self->fd = create_file(self->vm, variant->page_size, 2 * self->half);
	/* Only the range that changes is needed in the other file. */
	self->other = create_file(self->vm, variant->page_size, self->half);
	vm_set_user_memory_region2(self->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   2 * self->half, NULL, self->fd, 0);
	self->mem = kvm_mmap(2 * self->half, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	self->unused = kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
				-1);
}

FIXTURE_TEARDOWN(disturb)
{
	kvm_munmap(self->unused, SZ_4K);
	kvm_munmap(self->mem, 2 * self->half);
	kvm_close(self->other);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

/*
 * Changes: every other one undoes the one before, and is not measured.
 */
static bool change_attributes(int fd, u64 size, long round)
{
	return !gmem_convert(fd, 0, size, round & 1 ? SHARED : PRIVATE, NULL);
}

static bool change_contents(int fd, u64 size, long round)
{
	return !fallocate(fd, round & 1 ? FALLOC_FL_KEEP_SIZE : PUNCH_HOLE, 0, size);
}

static void *make_changes(void *arg)
{
	struct _test_data_disturb *self = arg;
	long round = 0;
	u64 start;

	while (!READ_ONCE(self->stop) || round & 1) {
		start = now_ns();
		WRITE_ONCE(self->begun, round + 1);
		TEST_ASSERT(self->change(self->change_fd, self->half, round),
			    "Change %ld: errno %d (%s)", round, errno, strerror(errno));
		if (!(round & 1))
			self->change_ns += now_ns() - start;
		WRITE_ONCE(self->ended, ++round);
		/* Let others go on between two changes. */
		if (!self->tight)
			usleep(1000);
	}
	return NULL;
}

static void start_changes(struct _test_data_disturb *self, int fd,
			  bool (*change)(int fd, u64 size, long round))
{
	self->change_fd = fd;
	self->change = change;
	self->stop = false;
	self->begun = 0;
	self->ended = 0;
	self->change_ns = 0;
	kvm_pthread_create(&self->thread, NULL, make_changes, self);
}

static void stop_changes(struct _test_data_disturb *self)
{
	WRITE_ONCE(self->stop, true);
	kvm_pthread_join(self->thread, NULL);
}

/*
 * Operations on the second half of the file
 */
static u64 random_offset(struct _test_data_disturb *self)
{
	self->seed = self->seed * 6364136223846793005ull + 1442695040888963407ull;
	return self->half + (self->seed >> 33) % (self->half / SZ_4K) * SZ_4K;
}

static void host_fault(struct _test_data_disturb *self)
{
	char *p = self->mem + random_offset(self);

	madvise(p, SZ_4K, MADV_DONTNEED);
	READ_ONCE(*p);
}

static void host_fallocate(struct _test_data_disturb *self)
{
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, random_offset(self), SZ_4K);
}

static void host_mincore(struct _test_data_disturb *self)
{
	unsigned char vec;

	TEST_ASSERT(!mincore(self->mem + random_offset(self), SZ_4K, &vec), "mincore()");
}

/* Bind and unbind the file, too: any change of memslots waits for all vCPUs. */
static void host_memslots(struct _test_data_disturb *self)
{
	gpa_t gpa = GMEM_GPA + 3 * self->half;

	vm_set_user_memory_region(self->vm, GMEM_SLOT + 1, 0, gpa, SZ_4K, self->unused);
	vm_set_user_memory_region(self->vm, GMEM_SLOT + 1, 0, gpa, 0, NULL);
}

/* A conversion of one page unmaps it, so that the guest faults. */
static void guest_fault(struct _test_data_disturb *self)
{
	u64 offset = random_offset(self);

	madvise(self->mem + offset, SZ_4K, MADV_DONTNEED);
	gmem_guest_do(self->vcpu[0], GMEM_READ, GMEM_GPA + offset, SZ_4K, SZ_4K, 0);
}

static void add(struct latencies *l, u64 ns)
{
	int i;

	for (i = 0; i < NR_BUCKETS - 1 && ns >= 1000ull << i; i++)
		;
	l->bucket[i]++;
	l->nr++;

	for (i = NR_LONGEST - 1; i >= 0 && l->longest_ns[i] < ns; i--)
		if (i < NR_LONGEST - 1)
			l->longest_ns[i + 1] = l->longest_ns[i];
	if (i < NR_LONGEST - 1)
		l->longest_ns[i + 1] = ns;
}

static void print(const char *where, struct latencies *l)
{
	char line[400] = "";
	int i, n = 0;

	for (i = 0; i < NR_BUCKETS; i++)
		if (l->bucket[i])
			n += snprintf(line + n, sizeof(line) - n, " <%llu:%ld",
				      1ull << i, l->bucket[i]);
	ksft_print_msg("%s: %ld changes of %lu us, %ld operations of at most %lu us\n", where,
		       l->nr_changes, l->change_ns / 1000, l->nr, l->longest_ns[0] / 1000);
	ksft_print_msg("%s: us:operations%s\n", where, line);
}

/*
 * Measure operations while changes are made in @fd.  They are made by a thread of lower
 * priority, so that this one does not wait for a CPU.
 */
static void measure(struct _test_data_disturb *self, struct latencies *l, int fd,
		    bool (*change)(int fd, u64 size, long round),
		    void (*op)(struct _test_data_disturb *self))
{
	u64 start;

	memset(l, 0, sizeof(*l));
	start_changes(self, fd, change);
	while (READ_ONCE(self->ended) < NR_CHANGES || l->nr < NR_OPS) {
		start = now_ns();
		op(self);
		add(l, now_ns() - start);
		usleep(200);
	}
	stop_changes(self);
	l->nr_changes = self->ended / 2;
	l->change_ns = self->change_ns / l->nr_changes;
	print(fd == self->fd ? "same file " : "other file", l);
}

/* The number of operations that took more than half of a change. */
static long nr_stalls(const struct latencies *l, u64 change_ns)
{
	long i;

	for (i = 0; i < NR_LONGEST && l->longest_ns[i] > change_ns / 2; i++)
		;
	return i;
}

/*
 * Operations elsewhere in the file do not wait for a change.  If they did, one operation
 * per change would take most of it.  Some take long for other reasons, but as many with
 * the change in another file.
 */
static void expect_undisturbed(struct _test_data_disturb *self,
			       bool (*change)(int fd, u64 size, long round),
			       void (*op)(struct _test_data_disturb *self))
{
	struct latencies other, same;
	long stalls, limit;

	measure(self, &other, self->other, change, op);
	measure(self, &same, self->fd, change, op);

	stalls = nr_stalls(&same, same.change_ns);
	limit = nr_stalls(&other, same.change_ns) + min_t(long, same.nr_changes, NR_LONGEST) / 2;
	TEST_ASSERT(stalls < limit, "%ld operations took more than half of a change", stalls);
}

TEST_F_TIMEOUT(disturb, host_fault, SLOW)
{
	expect_undisturbed(self, change_attributes, host_fault);
}

TEST_F_TIMEOUT(disturb, host_fault_and_punch, SLOW)
{
	expect_undisturbed(self, change_contents, host_fault);
}

TEST_F_TIMEOUT(disturb, fallocate, SLOW)
{
	expect_undisturbed(self, change_attributes, host_fallocate);
}

TEST_F_TIMEOUT(disturb, mincore, SLOW)
{
	expect_undisturbed(self, change_attributes, host_mincore);
}

TEST_F_TIMEOUT(disturb, memslots, SLOW)
{
	expect_undisturbed(self, change_attributes, host_memslots);
}

TEST_F_TIMEOUT(disturb, guest_fault, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	expect_undisturbed(self, change_attributes, guest_fault);
}

/*
 * Waits in the range that changes
 */
struct waiter {
	struct _test_data_disturb *self;
	int (*op)(struct _test_data_disturb *self);
	pid_t tid;
	long begun;		/* change during which the signal was sent, or 0 */
	long nr_signals;	/* that ended a wait before the change ended */
};

/* Each access is to a page that the change has unmapped, or is about to. */
static u64 offset_in_change(struct _test_data_disturb *self)
{
	return random_offset(self) - self->half;
}

static int guest_access(struct _test_data_disturb *self)
{
	struct kvm_vcpu *vcpu = self->vcpu[0];
	struct ucall uc;
	int r;

	gmem_guest_set(vcpu, GMEM_READ, GMEM_GPA + offset_in_change(self), SZ_4K, SZ_4K, 0);
	r = __vcpu_run(vcpu) ? -errno : 0;
	TEST_ASSERT(!r || r == -EINTR, "KVM_RUN: %s", strerror(-r));
	if (r)
		TEST_ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_INTR);
	else
		TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	return r;
}

static int pre_fault(struct _test_data_disturb *self)
{
	struct kvm_pre_fault_memory range = {
		.gpa = GMEM_GPA + offset_in_change(self),
		.size = SZ_4K,
	};

	return __vcpu_ioctl(self->vcpu[0], KVM_PRE_FAULT_MEMORY, &range) ? -errno : 0;
}

static int host_allocate(struct _test_data_disturb *self)
{
	return fallocate(self->fd, FALLOC_FL_KEEP_SIZE, offset_in_change(self), SZ_4K) ?
	       -errno : 0;
}

static void *run_waiter(void *arg)
{
	struct waiter *w = arg;
	struct _test_data_disturb *self = w->self;
	long begun;
	int r;

	WRITE_ONCE(w->tid, gettid());
	while (READ_ONCE(w->nr_signals) < NR_SIGNALS && !READ_ONCE(self->stop)) {
		r = w->op(self);
		begun = READ_ONCE(w->begun);
		TEST_ASSERT(!r || r == -EINTR || r == -EAGAIN, "%s", strerror(-r));
		if (r == -EINTR && begun && READ_ONCE(self->ended) < begun)
			WRITE_ONCE(w->nr_signals, w->nr_signals + 1);
		WRITE_ONCE(w->begun, 0);
	}
	return NULL;
}

/* A signal ends a wait long before the change ends. */
static void expect_interruptible(struct _test_data_disturb *self,
				 int (*op)(struct _test_data_disturb *self))
{
	struct waiter w = { .self = self, .op = op };
	pthread_t thread;
	long begun;
	int i;

	start_changes(self, self->fd, change_attributes);
	kvm_pthread_create(&thread, NULL, run_waiter, &w);
	while (!READ_ONCE(w.tid))
		usleep(100);

	for (i = 0; i < NR_ATTEMPTS && READ_ONCE(w.nr_signals) < NR_SIGNALS; i++) {
		/* Let the change and the waiter go on before the signal. */
		begun = READ_ONCE(self->begun);
		while (READ_ONCE(self->begun) == begun || READ_ONCE(w.begun))
			usleep(100);
		usleep(1000);
		WRITE_ONCE(w.begun, READ_ONCE(self->begun));
		syscall(SYS_tgkill, getpid(), w.tid, SIGUSR1);
	}
	stop_changes(self);
	kvm_pthread_join(thread, NULL);
	ksft_print_msg("%ld waits ended by %d signals\n", w.nr_signals, i);
	TEST_ASSERT(w.nr_signals >= NR_SIGNALS, "Signals do not end a wait");
}

TEST_F_TIMEOUT(disturb, signal_in_kvm_run, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	expect_interruptible(self, guest_access);
}

TEST_F_TIMEOUT(disturb, signal_in_pre_fault, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	expect_interruptible(self, pre_fault);
}

TEST_F_TIMEOUT(disturb, signal_in_fallocate, SLOW)
{
	expect_interruptible(self, host_allocate);
}

/*
 * Progress in spite of signals
 */
static void set_timer(long us)
{
	struct itimerval it = { .it_interval.tv_usec = us, .it_value.tv_usec = us };

	TEST_ASSERT(!setitimer(ITIMER_REAL, &it, NULL), "setitimer()");
}

/* Nothing is to be done for a page that is there, however many pieces it is in. */
TEST_F_TIMEOUT(disturb, fallocate_with_timer, SLOW)
{
	int r, tries = 0;

	if (variant->page_size == SZ_4K)
		SKIP(return, "for huge pages");

	set_timer(5000);
	do {
		r = fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, 2 * self->half);
	} while (r && errno == EINTR && ++tries < 1000);
	set_timer(0);
	ksft_print_msg("%d times interrupted\n", tries);
	TEST_ASSERT(!r, "errno %d (%s)", errno, strerror(errno));
}

/* Signals end KVM_RUN while it zeroes a huge page, and the page is zero in the end. */
TEST_F_TIMEOUT(disturb, first_access_with_timer, SLOW)
{
	struct kvm_vcpu *vcpu = self->vcpu[0];
	struct ucall uc;
	int nr = 0;

	if (!variant->vcpu || variant->page_size != SZ_1G)
		SKIP(return, "for 1 GiB pages and a vCPU");

	/* Leave something in the page that the next user must not see. */
	memset(self->mem, 0xff, self->half);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->half);

	set_timer(50000);
	gmem_guest_set(vcpu, GMEM_CHECK_ZERO, GMEM_GPA, self->half, SZ_4K, 0);
	while (__vcpu_run(vcpu)) {
		TEST_ASSERT(errno == EINTR && vcpu->run->exit_reason == KVM_EXIT_INTR,
			    "errno %d, exit reason %u", errno, vcpu->run->exit_reason);
		nr++;
	}
	set_timer(0);
	TEST_ASSERT_EQ(get_ucall(vcpu, &uc), UCALL_SYNC);
	ksft_print_msg("%d times interrupted\n", nr);
	TEST_ASSERT(nr > 3, "%d times interrupted", nr);
}

/*
 * Users of the range have their turn between changes, even if one follows the other
 * without a pause.
 */
#define MOST_CHANGES	10

TEST_F_TIMEOUT(disturb, turns, SLOW)
{
	long before, nr, most = 0;

	/* An access zeroes a huge page, which takes longer than SCHED_FIFO allows. */
	sched_setscheduler(0, SCHED_OTHER, &(struct sched_param) { });
	self->tight = true;
	start_changes(self, self->fd, change_contents);
	while (!READ_ONCE(self->ended))
		usleep(100);
	while (READ_ONCE(self->ended) <= 2 * MOST_CHANGES) {
		before = READ_ONCE(self->ended);
		READ_ONCE(self->mem[offset_in_change(self)]);
		nr = READ_ONCE(self->ended) - before;
		most = max(most, nr);
		usleep(200);
	}
	stop_changes(self);
	ksft_print_msg("%ld changes, at most %ld during an access\n", self->ended, most);
	TEST_ASSERT(most <= MOST_CHANGES, "An access took %ld changes", most);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
