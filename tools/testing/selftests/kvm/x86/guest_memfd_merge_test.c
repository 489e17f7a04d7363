// SPDX-License-Identifier: GPL-2.0-only
/*
 * Huge pages of guest_memfd files that have become private are merged by a worker.
 *
 * The number of vmemmap pages tells whether a huge page is split, so the pool's pages
 * must have an optimized vmemmap.
 */
#include <dirent.h>
#include <time.h>
#include <unistd.h>

#include <sys/mman.h>
#include <sys/mount.h>

#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

#define FAULT_INJECTION	"/sys/kernel/debug/"

/* Long enough to see that a huge page is still split, and too long to wait for. */
#define DELAY_MS	1000
#define NEVER_MS	1000000
#define SHORT_MS	20

#define MAX_NTH		10
#define MAX_WORKERS	64

#define PATTERN		0x600d600d00000000ull
#define SLOW		300

FIXTURE(merge)
{
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct hugetlb_counters counters;
	long delay;		/* the parameter before the test */
	u64 size;
	int fd;
	char *mem;
};

FIXTURE_VARIANT(merge)
{
	size_t page_size;
	long nr;
};

FIXTURE_VARIANT_ADD(merge, 2m) { .page_size = SZ_2M, .nr = 8, };
FIXTURE_VARIANT_ADD(merge, 1g) { .page_size = SZ_1G, .nr = 1, };

static u64 now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Other parts of the kernel do not allocate or free vmemmap pages meanwhile. */
static long vmemmap_pages(void)
{
	long val;

	write_number("/proc/sys/vm/stat_refresh", 1);
	TEST_ASSERT(read_number("/proc/vmstat", "nr_memmap_pages", &val), "nr_memmap_pages");
	return val;
}

static void set_delay(long ms)
{
	write_number(GMEM_MERGE_DELAY, ms);
}

static void create_file(struct _test_data_merge *self, size_t page_size)
{
	self->fd = vm_create_guest_memfd(self->vm, self->size, gmem_flags(page_size) |
					 GUEST_MEMFD_FLAG_MMAP);
	gmem_add_slot(self->vm, GMEM_SLOT, GMEM_GPA, self->size, self->fd, 0);
	self->mem = kvm_mmap(self->size, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	gmem_guest_do(self->vcpu, GMEM_WRITE, GMEM_GPA, self->size, SZ_4K, PATTERN);
}

FIXTURE_SETUP(merge)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct kvm_vcpu *vcpus[GMEM_MAX_VCPUS];

	if (reason)
		SKIP(return, "%s", reason);
	if (!hugetlb_is_optimized())
		SKIP(return, "the vmemmap of huge pages is not optimized");

	TEST_ASSERT(read_number(GMEM_MERGE_DELAY, NULL, &self->delay), GMEM_MERGE_DELAY);
	hugetlb_get(variant->page_size, &self->counters);
	self->size = variant->nr * variant->page_size;
	self->vm = gmem_vm_create(1, vcpus);
	self->vcpu = vcpus[0];
	create_file(self, variant->page_size);
}

FIXTURE_TEARDOWN(merge)
{
	kvm_munmap(self->mem, self->size);
	kvm_vm_free(self->vm);
	kvm_close(self->fd);
	hugetlb_expect_released(&self->counters, "after the test");
	set_delay(self->delay);
}

static void convert(struct _test_data_merge *self, u64 offset, u64 size, u64 attributes)
{
	TEST_ASSERT(!gmem_convert(self->fd, offset, size, attributes, NULL),
		    "0x%lx bytes at 0x%lx: errno %d", size, offset, errno);
}

/* Share a page of each huge page, and take it back. */
static void split_all(struct _test_data_merge *self, size_t page_size)
{
	u64 offset;

	for (offset = 0; offset < self->size; offset += page_size)
		convert(self, offset, SZ_4K, SHARED);
	for (offset = 0; offset < self->size; offset += page_size)
		convert(self, offset, SZ_4K, PRIVATE);
}

static void wait_for_merge(long whole)
{
	u64 start = now_ms();

	while (vmemmap_pages() != whole) {
		TEST_ASSERT(now_ms() - start < SLOW / 2 * 1000,
			    "not merged: %ld vmemmap pages more", vmemmap_pages() - whole);
		usleep(10000);
	}
}

static void guest_check(struct _test_data_merge *self)
{
	gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA, self->size, SZ_4K, PATTERN);
}

TEST_F_TIMEOUT(merge, after_the_delay, SLOW)
{
	long whole = vmemmap_pages(), pages_4k;
	u64 start;

	set_delay(DELAY_MS);
	start = now_ms();
	split_all(self, variant->page_size);
	wait_for_merge(whole);
	TEST_ASSERT(now_ms() - start >= DELAY_MS, "merged after %lu ms", now_ms() - start);

	/* The guest has all of it by large mappings, and in its old state. */
	guest_check(self);
	pages_4k = vm_get_stat(self->vm, pages_4k);
	set_delay(NEVER_MS);
	split_all(self, variant->page_size);
	guest_check(self);
	TEST_ASSERT_EQ(vm_get_stat(self->vm, pages_4k), pages_4k);
}

TEST_F_TIMEOUT(merge, at_once, SLOW)
{
	long whole = vmemmap_pages();

	set_delay(0);
	split_all(self, variant->page_size);
	TEST_ASSERT_EQ(vmemmap_pages(), whole);
	guest_check(self);
}

/* Without a merge, a huge page that is converted again stays as it is. */
TEST_F_TIMEOUT(merge, not_while_converted, SLOW)
{
	long split;
	int i;

	set_delay(NEVER_MS);
	split_all(self, variant->page_size);
	split = vmemmap_pages();
	for (i = 0; i < 100; i++) {
		convert(self, 0, SZ_4K, SHARED);
		TEST_ASSERT_EQ(vmemmap_pages(), split);
		convert(self, 0, SZ_4K, PRIVATE);
		TEST_ASSERT_EQ(vmemmap_pages(), split);
	}
	guest_check(self);
}

/*
 * Convert a page for longer than the delay, and expect that its huge page is never
 * merged.  Return false if this task has been stopped between two conversions for so
 * long that it may be.
 */
static bool stays_split(struct _test_data_merge *self, long split)
{
	u64 start = now_ms(), last = start, now;
	long pages;

	while (last - start < 4 * DELAY_MS) {
		convert(self, 0, SZ_4K, PRIVATE);
		usleep(1000);
		pages = vmemmap_pages();
		convert(self, 0, SZ_4K, SHARED);
		now = now_ms();
		if (now - last >= DELAY_MS / 2)
			return false;
		TEST_ASSERT_EQ(pages, split);
		last = now;
	}
	return true;
}

TEST_F_TIMEOUT(merge, postponed, SLOW)
{
	long split;
	int i;

	set_delay(DELAY_MS);
	convert(self, 0, SZ_4K, SHARED);
	split = vmemmap_pages();
	for (i = 0; !stays_split(self, split); i++)
		TEST_ASSERT(i < 10, "this machine is too slow");
}

/* A huge page is merged on the way to the pool, and the worker of the file is stopped. */
TEST_F_TIMEOUT(merge, close, SLOW)
{
	long whole = vmemmap_pages();

	set_delay(NEVER_MS);
	split_all(self, variant->page_size);
	TEST_ASSERT(vmemmap_pages() > whole, "no huge page is split");

	kvm_munmap(self->mem, self->size);
	gmem_delete_slot(self->vm, GMEM_SLOT);
	kvm_close(self->fd);
	hugetlb_expect_released(&self->counters, "with a merge pending");
	TEST_ASSERT_EQ(vmemmap_pages(), whole);

	create_file(self, variant->page_size);
}

/* Keep a huge page split that is shared again, and merge the others. */
TEST_F_TIMEOUT(merge, not_what_is_shared, SLOW)
{
	long whole = vmemmap_pages(), one;

	set_delay(DELAY_MS);
	convert(self, 0, SZ_4K, SHARED);
	one = vmemmap_pages();
	TEST_ASSERT(one > whole, "the huge page is not split");

	split_all(self, variant->page_size);
	convert(self, 0, SZ_4K, SHARED);
	wait_for_merge(one);
	TEST_ASSERT_EQ(*(u64 *)self->mem, PATTERN);
	guest_check(self);
	convert(self, 0, SZ_4K, PRIVATE);
	wait_for_merge(whole);
}

/* Let allocations fail that may sleep, and allocations of single pages. */
static void set_up_fault_injection(void)
{
	write_number(FAULT_INJECTION "failslab/ignore-gfp-wait", 0);
	write_number(FAULT_INJECTION "failslab/verbose", 0);
	write_number(FAULT_INJECTION "fail_page_alloc/ignore-gfp-wait", 0);
	write_number(FAULT_INJECTION "fail_page_alloc/ignore-gfp-highmem", 0);
	write_number(FAULT_INJECTION "fail_page_alloc/min-order", 0);
	write_number(FAULT_INJECTION "fail_page_alloc/verbose", 0);
}

static FILE *open_fail_nth(long pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%ld/fail-nth", pid);
	return fopen(path, "r+");
}

static bool runs_work(long pid)
{
	char path[64], comm[16] = "";
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%ld/comm", pid);
	f = fopen(path, "r");
	if (f) {
		fgets(comm, sizeof(comm), f);
		fclose(f);
	}
	return !strncmp(comm, "kworker/u", 9);
}

/* Let the nth allocation from now on fail in each task that runs work.  Return their number. */
static int fail_in_workers(int nth, long pids[MAX_WORKERS])
{
	DIR *proc = opendir("/proc");
	struct dirent *d;
	int nr = 0;
	FILE *f;

	TEST_ASSERT(proc, "Can't read /proc");
	while ((d = readdir(proc)) && nr < MAX_WORKERS) {
		pids[nr] = atol(d->d_name);
		if (!pids[nr] || !runs_work(pids[nr]))
			continue;
		f = open_fail_nth(pids[nr]);
		if (!f)
			continue;
		fprintf(f, "%d", nth);
		fclose(f);
		nr++;
	}
	closedir(proc);
	return nr;
}

/* End that.  Return in how many of the tasks an allocation has failed. */
static int stop_failures(int nr, const long pids[])
{
	int i, failed = 0;
	FILE *f;

	for (i = 0; i < nr; i++) {
		f = open_fail_nth(pids[i]);
		if (!f)
			continue;
		failed += fgetc(f) == '0';
		rewind(f);
		fputc('0', f);
		fclose(f);
	}
	return failed;
}

/* A merge that fails is repeated after the delay. */
TEST_F_TIMEOUT(merge, allocation_fails, SLOW)
{
	long whole = vmemmap_pages(), pids[MAX_WORKERS];
	int nth, nr, failed = 0;

	if (access("/proc/self/fail-nth", W_OK))
		SKIP(return, "needs CONFIG_FAILSLAB and CONFIG_FAIL_PAGE_ALLOC");
	if (mount("none", GMEM_TRACING, "tracefs", 0, NULL) && errno != EBUSY)
		SKIP(return, "needs CONFIG_FTRACE");

	write_number(GMEM_TRACING "trace", 0);
	write_number(GMEM_TRACING "events/kvm/kvm_gmem_merge/enable", 1);
	set_up_fault_injection();
	set_delay(SHORT_MS);
	for (nth = 1; nth <= MAX_NTH; nth++) {
		nr = fail_in_workers(nth, pids);
		split_all(self, variant->page_size);
		wait_for_merge(whole);
		failed += stop_failures(nr, pids);
		guest_check(self);
	}
	write_number(GMEM_TRACING "events/kvm/kvm_gmem_merge/enable", 0);
	nr = gmem_traced("kvm_gmem_merge:", "result -12");
	ksft_print_msg("%d allocations and %d merges failed\n", failed, nr);
	TEST_ASSERT(nr, "No merge has failed");
	/* The huge pages of a merge that failed are merged one by one. */
	if (variant->nr > 1)
		TEST_ASSERT(gmem_traced("kvm_gmem_merge:", "index 0x200 -- 0x400 result 0"),
			    "The second huge page was not merged alone");
	write_number(GMEM_TRACING "trace", 0);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
