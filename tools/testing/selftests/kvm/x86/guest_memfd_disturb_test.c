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

#define SLOW		600

/* The pages of the range that are accessed, at its start */
#define WINDOW		SZ_4M

/* Where files are bound besides GMEM_GPA: never accessed by the guest */
#define OTHER_GPA	(GMEM_GPA + 16ull * SZ_1G)
#define UNUSED_GPA	(GMEM_GPA + 32ull * SZ_1G)

/* Changes during a measurement, of which half count, and operations at least. */
#define NR_CHANGES	16
#define NR_OPS		50

/* Time that a change takes, if that much memory can change */
#define LONG_NS		60000000

/* Times that a signal has to end a wait, and attempts for that. */
#define NR_SIGNALS	10
#define NR_ATTEMPTS	100

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
	u64 page_size;
	u64 range;		/* the start of the file, which can change */
	u64 size;		/* the part of it that changes */
	u64 rest;		/* what follows in the file, and does not change */
	int fd, other;		/* the file, and another one that has only the range */
	char *mem;		/* mapping of the file */
	char *unused;		/* memory for a memslot without guest_memfd */

	/* the thread that makes the changes */
	pthread_t thread;
	int change_fd;
	bool (*change)(struct _test_data_disturb *self, long round);
	bool stop, tight;

	/* what another thread does in the range during a measurement, if anything */
	int (*beside)(struct _test_data_disturb *self);

	long begun, ended;
	u64 begun_ns, ended_ns;		/* times of the last change that counts */
	u64 change_ns;

	u64 seed;
	u64 next;		/* for guest_fault() */
};

FIXTURE_VARIANT(disturb)
{
	u64 page_size;
	u64 range;
	u64 rest;
	bool vcpu;
};

FIXTURE_VARIANT_ADD(disturb, base) { SZ_4K, SZ_512M, SZ_32M, false };
FIXTURE_VARIANT_ADD(disturb, base_8g) { SZ_4K, 8ull * SZ_1G, SZ_4M, false };
FIXTURE_VARIANT_ADD(disturb, base_vcpu) { SZ_4K, SZ_512M, SZ_32M, true };
FIXTURE_VARIANT_ADD(disturb, huge_2m) { SZ_2M, SZ_512M, SZ_128M, false };
FIXTURE_VARIANT_ADD(disturb, huge_2m_vcpu) { SZ_2M, SZ_512M, SZ_128M, true };
FIXTURE_VARIANT_ADD(disturb, huge_1g) { SZ_1G, SZ_1G, SZ_1G, false };
FIXTURE_VARIANT_ADD(disturb, huge_1g_vcpu) { SZ_1G, SZ_1G, SZ_1G, true };

static u64 now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * NSEC_PER_SEC + t.tv_nsec;
}

static u64 signal_ns;

static void on_signal(int sig)
{
	WRITE_ONCE(signal_ns, now_ns());
}

/* Never wait for the CPU that a change uses, only for the change itself. */
static void run_before_changes(void)
{
	TEST_ASSERT(!sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK,
					&(struct sched_param) { .sched_priority = 1 }),
		    "Can't set SCHED_FIFO: %s", strerror(errno));
}

static int create_file(struct kvm_vm *vm, u64 page_size, u64 size)
{
	return vm_create_guest_memfd(vm, size, gmem_flags(page_size) |
				     GUEST_MEMFD_FLAG_MMAP |
				     GUEST_MEMFD_FLAG_INIT_SHARED);
}

static u64 available_memory(void)
{
	return (u64)sysconf(_SC_AVPHYS_PAGES) * getpagesize();
}

FIXTURE_SETUP(disturb)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct sigaction sa = { .sa_handler = on_signal };
	u64 i;

	if (reason)
		SKIP(return, "%s", reason);
	if (variant->page_size == SZ_1G && hugetlb_read(SZ_1G, "free_hugepages") < 3)
		SKIP(return, "needs 3 pages of 1 GiB");
	if (variant->page_size == SZ_4K && available_memory() < variant->range + SZ_1G)
		SKIP(return, "needs %lu GiB of memory", variant->range / SZ_1G + 1);

	sigaction(SIGUSR1, &sa, NULL);
	sigaction(SIGALRM, &sa, NULL);
	run_before_changes();
	self->page_size = variant->page_size;
	self->range = variant->range;
	/* A variant for one long change */
	if (self->range > SZ_1G)
		self->size = self->range;
	self->rest = variant->rest;
	if (variant->page_size == SZ_2M) {
		long nr = (2 * self->range + self->rest) / SZ_2M;

		if (hugetlb_pool_set(SZ_2M, nr) < nr)
			SKIP(return, "needs %ld pages of 2 MiB", nr);
	}
	self->vm = gmem_vm_create(1, self->vcpu);
	self->fd = create_file(self->vm, variant->page_size, self->range + self->rest);
	self->other = create_file(self->vm, variant->page_size, self->range);
	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, self->range, self->rest);

	/* With its mapping as userspace_addr, unmapping from the host does so from guests. */
	self->mem = kvm_mmap(self->range + self->rest, PROT_READ | PROT_WRITE, MAP_SHARED,
			     self->fd);
	vm_set_user_memory_region2(self->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   self->range + self->rest - SZ_4K, self->mem, self->fd, 0);
	vm_set_user_memory_region2(self->vm, GMEM_SLOT + 1, KVM_MEM_GUEST_MEMFD, OTHER_GPA,
				   self->range, NULL, self->other, 0);
	/* The emulator can take milliseconds to zero a page.  Let no other access do it. */
	for (i = 0; i < WINDOW; i += SZ_4K)
		READ_ONCE(self->mem[i]);
	for (i = 0; i < self->rest; i += SZ_4K)
		READ_ONCE(self->mem[self->range + i]);
	self->unused = kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
				-1);
}

FIXTURE_TEARDOWN(disturb)
{
	kvm_munmap(self->unused, SZ_4K);
	kvm_munmap(self->mem, self->range + self->rest);
	kvm_close(self->other);
	kvm_close(self->fd);
	kvm_vm_free(self->vm);
}

/*
 * Changes: every other one undoes the one before, and is not measured.
 */
static bool change_attributes(struct _test_data_disturb *self, long round)
{
	return !gmem_convert(self->change_fd, 0, self->size, round & 1 ? SHARED : PRIVATE,
			     NULL);
}

static bool change_contents(struct _test_data_disturb *self, long round)
{
	return !fallocate(self->change_fd, round & 1 ? FALLOC_FL_KEEP_SIZE : PUNCH_HOLE, 0,
			  self->size);
}

/* Write contents to private memory, as firmware does when a VM is launched. */
static bool change_by_populating(struct _test_data_disturb *self, long round)
{
	gpa_t gpa = self->change_fd == self->fd ? GMEM_GPA : OTHER_GPA;

	return round & 1 || !gmem_populate(self->vm, gpa, self->size / SZ_4K, NULL);
}

static void *make_changes(void *arg)
{
	struct _test_data_disturb *self = arg;
	long round = 0;
	u64 start;

	while (!READ_ONCE(self->stop) || round & 1) {
		start = now_ns();
		if (!(round & 1))
			self->begun_ns = start;
		WRITE_ONCE(self->begun, round + 1);
		TEST_ASSERT(self->change(self, round),
			    "Change %ld: errno %d (%s)", round, errno, strerror(errno));
		if (!(round & 1)) {
			self->ended_ns = now_ns();
			self->change_ns += self->ended_ns - start;
		}
		WRITE_ONCE(self->ended, ++round);
		/* Let others go on between two changes. */
		if (!self->tight)
			usleep(1000);
	}
	return NULL;
}

/* Let a change take so long that other delays of the machine differ from it. */
static void choose_size(struct _test_data_disturb *self,
			bool (*change)(struct _test_data_disturb *self, long round))
{
	u64 start, ns = 0;

	self->change_fd = self->other;
	self->size = max_t(u64, WINDOW, self->page_size) / 2;
	while (ns < LONG_NS && self->size < self->range) {
		self->size *= 2;
		kvm_fallocate(self->other, FALLOC_FL_KEEP_SIZE, 0, self->size);
		start = now_ns();
		TEST_ASSERT(change(self, 0), "errno %d (%s)", errno, strerror(errno));
		ns = now_ns() - start;
		TEST_ASSERT(change(self, 1), "errno %d (%s)", errno, strerror(errno));
	}
}

static void start_changes(struct _test_data_disturb *self, int fd,
			  bool (*change)(struct _test_data_disturb *self, long round))
{
	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, self->size);
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
 * Operations on the rest of the file
 */
static u64 random_page(struct _test_data_disturb *self, u64 size)
{
	self->seed = self->seed * 6364136223846793005ull + 1442695040888963407ull;
	return (self->seed >> 33) % (size / SZ_4K) * SZ_4K;
}

/* The last page is left to host_memslots(). */
static u64 random_offset(struct _test_data_disturb *self)
{
	return self->range + random_page(self, self->rest - SZ_4K);
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
	char *p = self->mem + random_offset(self);
	unsigned char vec;

	/* Without a page table entry, mincore() looks at the page cache. */
	madvise(p, SZ_4K, MADV_DONTNEED);
	TEST_ASSERT(!mincore(p, SZ_4K, &vec), "mincore(): %s", strerror(errno));
}

/* Bind and unbind a page of the file, and change a memslot that has nothing to do with it. */
static void host_memslots(struct _test_data_disturb *self)
{
	u64 last = self->range + self->rest - SZ_4K;

	vm_set_user_memory_region2(self->vm, GMEM_SLOT + 2, KVM_MEM_GUEST_MEMFD, UNUSED_GPA,
				   SZ_4K, NULL, self->fd, last);
	vm_set_user_memory_region(self->vm, GMEM_SLOT + 2, 0, UNUSED_GPA, 0, NULL);
	vm_set_user_memory_region(self->vm, GMEM_SLOT + 2, 0, UNUSED_GPA, SZ_4K, self->unused);
	vm_set_user_memory_region(self->vm, GMEM_SLOT + 2, 0, UNUSED_GPA, 0, NULL);
}

/* Lock all of the address space of the process. */
static void host_mmap(struct _test_data_disturb *self)
{
	kvm_munmap(kvm_mmap(SZ_4K, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1), SZ_4K);
}

/*
 * Access memory that KVM has not mapped yet, a page of the file at a time.  Unmapping from
 * the host also unmaps from the guest, but is only done when all is mapped: KVM regards MMU
 * notifiers that run at the same time as one range, in which no guest can fault.
 */
static void guest_fault(struct _test_data_disturb *self)
{
	u64 nr_faults = vcpu_get_stat(self->vcpu[0], pf_fixed);

	if (self->next + self->page_size > self->rest - SZ_4K) {
		madvise(self->mem + self->range, self->rest, MADV_DONTNEED);
		self->next = 0;
	}
	gmem_guest_do(self->vcpu[0], GMEM_READ, GMEM_GPA + self->range + self->next, SZ_4K,
		      SZ_4K, 0);
	self->next += self->page_size;
	TEST_ASSERT(vcpu_get_stat(self->vcpu[0], pf_fixed) > nr_faults,
		    "The guest did not fault");
}

/*
 * Waits in the range that changes
 */
struct waiter {
	struct _test_data_disturb *self;
	int (*op)(struct _test_data_disturb *self);
	pid_t tid;
	long seq;		/* odd during an operation */
	long nr_interrupted;
};

static int guest_access(struct _test_data_disturb *self)
{
	struct kvm_vcpu *vcpu = self->vcpu[0];
	struct ucall uc;
	int r;

	gmem_guest_set(vcpu, GMEM_READ, GMEM_GPA + random_page(self, WINDOW), SZ_4K, SZ_4K, 0);
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
		.gpa = GMEM_GPA + random_page(self, WINDOW),
		.size = SZ_4K,
	};

	return __vcpu_ioctl(self->vcpu[0], KVM_PRE_FAULT_MEMORY, &range) ? -errno : 0;
}

/*
 * A fault of the host is not interrupted but starts over after the handler.  So the
 * handler must run before the end of the change.
 */
static int host_access(struct _test_data_disturb *self)
{
	u64 start = now_ns();

	READ_ONCE(self->mem[random_page(self, WINDOW)]);
	return READ_ONCE(signal_ns) > start ? -EINTR : 0;
}

static int host_allocate(struct _test_data_disturb *self)
{
	return fallocate(self->fd, FALLOC_FL_KEEP_SIZE, random_page(self, WINDOW), SZ_4K) ?
	       -errno : 0;
}

static void *run_waiter(void *arg)
{
	struct waiter *w = arg;
	int r;

	run_before_changes();
	WRITE_ONCE(w->tid, gettid());
	while (!READ_ONCE(w->self->stop)) {
		WRITE_ONCE(w->seq, w->seq + 1);
		r = w->op(w->self);
		WRITE_ONCE(w->seq, w->seq + 1);
		TEST_ASSERT(!r || r == -EINTR || r == -EAGAIN, "%s", strerror(-r));
		w->nr_interrupted += r == -EINTR;
		usleep(200);
	}
	return NULL;
}

/*
 * Measurements
 */
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

/* Measure operations while changes are made in @fd. */
static void measure(struct _test_data_disturb *self, struct latencies *l, int fd,
		    bool (*change)(struct _test_data_disturb *self, long round),
		    void (*op)(struct _test_data_disturb *self))
{
	struct waiter w = { .self = self, .op = self->beside };
	pthread_t thread;
	u64 start;

	memset(l, 0, sizeof(*l));
	start_changes(self, fd, change);
	if (self->beside)
		kvm_pthread_create(&thread, NULL, run_waiter, &w);
	while (READ_ONCE(self->ended) < NR_CHANGES || l->nr < NR_OPS) {
		start = now_ns();
		op(self);
		add(l, now_ns() - start);
		usleep(200);
	}
	stop_changes(self);
	if (self->beside)
		kvm_pthread_join(thread, NULL);
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
			       bool (*change)(struct _test_data_disturb *self, long round),
			       void (*op)(struct _test_data_disturb *self))
{
	struct latencies other, same;
	long stalls, limit;

	if (!self->size)
		choose_size(self, change);
	measure(self, &other, self->other, change, op);
	/* There may not be memory enough for both files. */
	kvm_fallocate(self->other, PUNCH_HOLE, 0, self->range);
	measure(self, &same, self->fd, change, op);

	limit = nr_stalls(&other, same.change_ns);
	TEST_ASSERT(limit < NR_LONGEST / 2 && limit < other.nr / 2,
		    "The change is too short to be noticed");
	limit += min_t(long, same.nr_changes, NR_LONGEST) / 2;
	stalls = nr_stalls(&same, same.change_ns);
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

TEST_F_TIMEOUT(disturb, host_fault_and_populate, SLOW)
{
	if (!gmem_can_populate(self->vm))
		SKIP(return, GMEM_NO_DEBUGFS);

	TEST_ASSERT(!gmem_convert(self->fd, 0, self->range, PRIVATE, NULL) &&
		    !gmem_convert(self->other, 0, self->range, PRIVATE, NULL), "convert");
	expect_undisturbed(self, change_by_populating, host_fault);
}

TEST_F_TIMEOUT(disturb, fallocate, SLOW)
{
	expect_undisturbed(self, change_attributes, host_fallocate);
}

TEST_F_TIMEOUT(disturb, mincore, SLOW)
{
	expect_undisturbed(self, change_attributes, host_mincore);
}

/* A fault of the host that waits for the change does not hold mmap_lock. */
TEST_F_TIMEOUT(disturb, mmap_lock, SLOW)
{
	if (variant->page_size == SZ_1G)
		SKIP(return, "an access zeroes the page");

	self->beside = host_access;
	expect_undisturbed(self, change_contents, host_mmap);
}

/* An update of memslots waits for vCPUs, one of which waits for the change. */
TEST_F_TIMEOUT(disturb, memslots, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	self->beside = guest_access;
	expect_undisturbed(self, change_attributes, host_memslots);
}

TEST_F_TIMEOUT(disturb, guest_fault, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	/* Each access unmaps a huge page before, and could have preempted another notifier. */
	if (self->page_size == SZ_1G)
		sched_setscheduler(0, SCHED_OTHER, &(struct sched_param) { });
	expect_undisturbed(self, change_attributes, guest_fault);
}

/* Return whether an operation sleeps, whatever a signal can do about it. */
static bool is_waiting(struct waiter *w)
{
	long seq = READ_ONCE(w->seq);
	char path[64], state = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", w->tid);
	f = fopen(path, "r");
	TEST_ASSERT(f && fscanf(f, "%*d (%*[^)]) %c", &state) == 1, "Can't read %s", path);
	fclose(f);
	return (state == 'S' || state == 'D') && seq & 1 && READ_ONCE(w->seq) == seq;
}

/* Send a signal during a wait.  Return whether its handler ran long before the change ended. */
static bool send_signal(struct waiter *w)
{
	struct _test_data_disturb *self = w->self;
	long begun = READ_ONCE(self->begun);
	u64 sent_ns, begun_ns, ended_ns;

	/* To allocate memory is no change that others wait for. */
	while (READ_ONCE(self->begun) == begun || !(READ_ONCE(self->begun) & 1))
		usleep(100);
	begun = READ_ONCE(self->begun);
	while (READ_ONCE(self->ended) < begun && !is_waiting(w))
		usleep(100);
	if (READ_ONCE(self->ended) >= begun)
		return false;

	sent_ns = now_ns();
	WRITE_ONCE(signal_ns, 0);
	syscall(SYS_tgkill, getpid(), w->tid, SIGUSR1);
	while (READ_ONCE(self->ended) < begun || !READ_ONCE(signal_ns))
		usleep(100);

	begun_ns = READ_ONCE(self->begun_ns);
	ended_ns = READ_ONCE(self->ended_ns);
	return sent_ns > begun_ns && signal_ns + (ended_ns - begun_ns) / 4 < ended_ns;
}

static void expect_interruptible(struct _test_data_disturb *self,
				 bool (*change)(struct _test_data_disturb *self, long round),
				 int (*op)(struct _test_data_disturb *self))
{
	struct waiter w = { .self = self, .op = op };
	pthread_t thread;
	int i, nr = 0;

	choose_size(self, change);
	start_changes(self, self->fd, change);
	kvm_pthread_create(&thread, NULL, run_waiter, &w);
	while (!READ_ONCE(w.tid))
		usleep(100);

	for (i = 0; i < NR_ATTEMPTS && nr < NR_SIGNALS; i++)
		nr += send_signal(&w);
	stop_changes(self);
	kvm_pthread_join(thread, NULL);
	ksft_print_msg("%d of %d signals handled long before the change ended\n", nr, i);
	TEST_ASSERT(nr >= NR_SIGNALS, "Signals do not end a wait");
	/* One access of the host can meet two signals. */
	TEST_ASSERT(w.nr_interrupted >= NR_SIGNALS / 2,
		    "%ld operations were interrupted", w.nr_interrupted);
}

TEST_F_TIMEOUT(disturb, signal_in_kvm_run, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	expect_interruptible(self, change_attributes, guest_access);
}

TEST_F_TIMEOUT(disturb, signal_in_pre_fault, SLOW)
{
	if (!variant->vcpu)
		SKIP(return, "for variants with a vCPU");

	expect_interruptible(self, change_attributes, pre_fault);
}

TEST_F_TIMEOUT(disturb, signal_in_fallocate, SLOW)
{
	expect_interruptible(self, change_attributes, host_allocate);
}

TEST_F_TIMEOUT(disturb, signal_in_host_fault, SLOW)
{
	if (variant->page_size == SZ_1G)
		SKIP(return, "an access zeroes the page");

	expect_interruptible(self, change_contents, host_access);
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

	kvm_fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, self->range);
	set_timer(5000);
	do {
		r = fallocate(self->fd, FALLOC_FL_KEEP_SIZE, 0, self->range + self->rest);
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
	memset(self->mem, 0xff, self->range);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, self->range);

	set_timer(5000);
	gmem_guest_set(vcpu, GMEM_CHECK_ZERO, GMEM_GPA, self->range, SZ_4K, 0);
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
	self->size = max_t(u64, SZ_128M, self->page_size);
	start_changes(self, self->fd, change_contents);
	while (!READ_ONCE(self->ended))
		usleep(100);
	while (READ_ONCE(self->ended) <= 2 * MOST_CHANGES) {
		before = READ_ONCE(self->ended);
		READ_ONCE(self->mem[random_page(self, WINDOW)]);
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
