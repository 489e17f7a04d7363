// SPDX-License-Identifier: GPL-2.0
/*
 * Measure what threads that use one guest_memfd file cost each other, by the clock.
 * Print "name value" lines for scripts/bench and scripts/chart.
 *
 * usage: parallel scale | stall
 *
 * "scale" compares the time of many threads with the time of one for the same work.  It
 * needs two CPUs, two pages of 1 GiB and 64 of 2 MiB.  Without in-place conversion it
 * measures what there is instead: attributes of the VM, and base pages.
 *
 * "stall" makes conversions of various sizes, and measures accesses to the rest of the file
 * meanwhile.  It needs two pages of 1 GiB, and one CPU is enough.
 */
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <sys/mman.h>

#include "common.h"

#define NR_THREADS	64
#define NR_RUNS		5
#define NR_PAGES	1024	/* that are accessed beside a change */
#define FAULT_SIZE	(256ull * SZ_1M)
#define NR_CONVERSIONS	4096

struct job {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpus[NR_THREADS];
	int fd;
	int nr_threads;
	void (*work)(struct job *j, int nr);
};

struct worker {
	pthread_t thread;
	struct job *job;
	int nr;
};

static void *run_worker(void *arg)
{
	struct worker *w = arg;

	w->job->work(w->job, w->nr);
	return NULL;
}

static double run_threads(struct job *j, int nr_threads, void (*work)(struct job *j, int nr))
{
	struct worker w[NR_THREADS];
	long long start = now_ns();
	int i;

	j->nr_threads = nr_threads;
	j->work = work;
	for (i = 0; i < nr_threads; i++) {
		w[i] = (struct worker) { .job = j, .nr = i };
		kvm_pthread_create(&w[i].thread, NULL, run_worker, &w[i]);
	}
	for (i = 0; i < nr_threads; i++)
		kvm_pthread_join(w[i].thread, NULL);
	return now_ns() - start;
}

static void pre_fault(struct kvm_vcpu *vcpu, u64 offset, u64 size)
{
	struct kvm_pre_fault_memory range = { .gpa = GMEM_GPA + offset, .size = size };

	while (range.size)
		vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range);
}

static void fault_part(struct job *j, int nr)
{
	const u64 size = FAULT_SIZE / j->nr_threads;

	pre_fault(j->vcpus[nr], nr * size, size);
}

static void convert(struct job *j, u64 offset, u64 attributes)
{
	if (!kvm_converts_in_place())
		vm_set_memory_attributes(j->vm, GMEM_GPA + offset, SZ_4K, attributes);
	else
		TEST_ASSERT(!gmem_convert(j->fd, offset, SZ_4K, attributes, NULL),
			    "Can't convert: %s", strerror(errno));
}

/* Each thread has 2 MiB, of which it shares a page and takes it back. */
static void convert_own(struct job *j, int nr)
{
	int i;

	for (i = 0; i < NR_CONVERSIONS / j->nr_threads; i++) {
		convert(j, nr * SZ_2M, 0);
		convert(j, nr * SZ_2M, KVM_MEMORY_ATTRIBUTE_PRIVATE);
	}
}

static void allocate(struct job *j, u64 size)
{
	kvm_fallocate(j->fd, FALLOC_FL_KEEP_SIZE, 0, size);
}

/* Split the huge pages, too: one thread splits one of them, while many split them all. */
static void allocate_and_split(struct job *j, u64 size)
{
	u64 offset;

	allocate(j, size);
	for (offset = 0; offset < size; offset += SZ_2M) {
		convert(j, offset, 0);
		convert(j, offset, KVM_MEMORY_ATTRIBUTE_PRIVATE);
	}
}

static void touch_own(struct job *j, int nr)
{
	pre_fault(j->vcpus[nr], (u64)nr * SZ_1G, SZ_4K);
}

static void open_file(struct job *j, size_t page_size, u64 size)
{
	j->fd = vm_create_guest_memfd(j->vm, size, gmem_flags(page_size));
	gmem_add_slot(j->vm, GMEM_SLOT, GMEM_GPA, size, j->fd, 0);
}

static void close_file(struct job *j)
{
	gmem_delete_slot(j->vm, GMEM_SLOT);
	kvm_close(j->fd);
}

/* Print the shortest time of one thread, and that of @nr_threads for the same work. */
static void scale(struct job *j, const char *name, size_t page_size, u64 size,
		  int nr_threads, void (*work)(struct job *j, int nr),
		  void (*prepare)(struct job *j, u64 size))
{
	const int nr[] = { 1, nr_threads };
	double t, best[2] = { 1e30, 1e30 };
	int i, run;

	for (run = 0; run < NR_RUNS; run++) {
		for (i = 0; i < 2; i++) {
			open_file(j, page_size, size);
			if (prepare)
				prepare(j, size);
			t = run_threads(j, nr[i], work);
			if (t < best[i])
				best[i] = t;
			close_file(j);
		}
	}
	printf("%s_1 %.0f\n%s_many %.0f\n", name, best[0], name, best[1]);
	fflush(stdout);
}

static void bench_scale(void)
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = KVM_X86_SW_PROTECTED_VM,
	};
	struct job j = {};

	j.vm = __vm_create_with_vcpus(shape, NR_THREADS, 0, NULL, j.vcpus);
	scale(&j, "fault", SZ_4K, FAULT_SIZE, NR_THREADS, fault_part, allocate);
	scale(&j, "convert", kvm_converts_in_place() ? SZ_2M : SZ_4K, NR_THREADS * SZ_2M,
	      NR_THREADS, convert_own, allocate_and_split);
	/* One thread touches one huge page, and two threads touch two. */
	if (kvm_converts_in_place())
		scale(&j, "touch", SZ_1G, 2ull * SZ_1G, 2, touch_own, NULL);
	kvm_vm_free(j.vm);
}

/*
 * A thread makes changes while this one, which has priority, accesses other memory.
 */
struct change {
	int fd;
	u64 size;
	long long ns;
	bool ended;
};

static void *run_change(void *arg)
{
	struct change *c = arg;
	long long start = now_ns();

	TEST_ASSERT(!gmem_convert(c->fd, 0, c->size, KVM_MEMORY_ATTRIBUTE_PRIVATE, NULL),
		    "Can't convert: %s", strerror(errno));
	c->ns = now_ns() - start;
	__atomic_store_n(&c->ended, true, __ATOMIC_RELEASE);
	return NULL;
}

static long long access_page(char *p)
{
	long long start = now_ns();

	madvise(p, SZ_4K, MADV_DONTNEED);
	*(volatile char *)p;
	return now_ns() - start;
}

static void undo_change(struct change *c)
{
	TEST_ASSERT(!gmem_convert(c->fd, 0, c->size, 0, NULL), "Can't convert: %s",
		    strerror(errno));
}

/* Return the longest access beside one change, or before it if the change is too short. */
static long long stall(struct change *c, char *other)
{
	long long ns, longest = 0;
	pthread_t thread;
	u64 i = 0;

	c->ended = false;
	kvm_pthread_create(&thread, NULL, run_change, c);
	do {
		ns = access_page(other + i++ % NR_PAGES * SZ_4K);
		longest = ns > longest ? ns : longest;
		usleep(50);
	} while (!__atomic_load_n(&c->ended, __ATOMIC_ACQUIRE));
	kvm_pthread_join(thread, NULL);
	undo_change(c);
	return longest;
}

static int compare(const void *a, const void *b)
{
	const long long x = *(const long long *)a, y = *(const long long *)b;

	return (x > y) - (x < y);
}

static void bench_stall(size_t page_size)
{
	long long ns[NR_RUNS], stalls[NR_RUNS];
	struct kvm_vm *vm = vm_create_barebones_type(KVM_X86_SW_PROTECTED_VM);
	struct change c = {};
	char *mem;
	int i;

	c.fd = vm_create_guest_memfd(vm, 2ull * SZ_1G, gmem_flags(page_size) |
				     GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
	kvm_fallocate(c.fd, FALLOC_FL_KEEP_SIZE, 0, 2ull * SZ_1G);
	mem = kvm_mmap(2ull * SZ_1G, PROT_READ | PROT_WRITE, MAP_SHARED, c.fd);
	/* No other access has to zero a page. */
	for (i = 0; i < NR_PAGES; i++)
		access_page(mem + SZ_1G + i * SZ_4K);

	for (c.size = SZ_4K; c.size <= SZ_1G; c.size *= 4) {
		for (i = 0; i < NR_RUNS; i++) {
			stalls[i] = stall(&c, mem + SZ_1G);
			/* Accesses preempt a change on the same CPU: time one without. */
			run_change(&c);
			ns[i] = c.ns;
			undo_change(&c);
		}
		qsort(ns, NR_RUNS, sizeof(ns[0]), compare);
		qsort(stalls, NR_RUNS, sizeof(stalls[0]), compare);
		/* bytes, median of the conversions and of the longest accesses in us */
		printf("%s %lu %.1f %.1f\n", page_size == SZ_4K ? "4k" : "1g", (long)c.size,
		       ns[NR_RUNS / 2] / 1000., stalls[NR_RUNS / 2] / 1000.);
		fflush(stdout);
	}
	kvm_munmap(mem, 2ull * SZ_1G);
	kvm_close(c.fd);
	kvm_vm_free(vm);
}

int main(int argc, char *argv[])
{
	if (argc == 2 && !strcmp(argv[1], "scale")) {
		bench_scale();
	} else if (argc == 2 && !strcmp(argv[1], "stall")) {
		TEST_ASSERT(!sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK,
						&(struct sched_param) { .sched_priority = 1 }),
			    "Can't set SCHED_FIFO: %s", strerror(errno));
		bench_stall(SZ_4K);
		bench_stall(SZ_1G);
	} else {
		return 2;
	}
	return 0;
}
