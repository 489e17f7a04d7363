// SPDX-License-Identifier: GPL-2.0
/*
 * Show, on a patched kernel, a VM with private memory on HugeTLB pages: the counters of
 * the pool, and the cost of the guest memory compared with the same VM on base pages.
 * Check all results, and exit with 1 if one differs from the expected one.
 */
#include "common.h"

#define VM_SIZE		(2ull * SZ_1G)
#define CHUNK		(SZ_1G / 8)
#define STRUCT_PAGE	64
#define PATTERN		0x5eed000000000000ull

static int wrong;

static void check(bool ok, const char *what)
{
	if (!ok) {
		printf("  NOT AS IT SHOULD BE: %s\n", what);
		wrong = 1;
	}
}

/* Return the KiB of page tables of guests. */
static long guest_tables(void)
{
	FILE *f = fopen("/proc/sys/vm/stat_refresh", "r");

	/* Reading it flushes the per-CPU counters. */
	TEST_ASSERT(f, "Can't open /proc/sys/vm/stat_refresh");
	fgetc(f);
	fclose(f);
	return value_of("/proc/meminfo", "SecPageTables");
}

/*
 * Return the KiB of struct pages of a 1 GiB page in the pool: remove one page from the
 * pool, and measure the increase.
 */
static long pool_page_memmap(void)
{
	const long whole = SZ_1G / SZ_4K * STRUCT_PAGE / SZ_4K;
	long nr = hugetlb_read(SZ_1G, "nr_hugepages");
	long before = memmap();

	hugetlb_write(SZ_1G, "nr_hugepages", nr - 1);
	TEST_ASSERT(hugetlb_read(SZ_1G, "nr_hugepages") == nr - 1,
		    "Can't take a page out of the pool");
	return (whole - (memmap() - before)) * (SZ_4K / SZ_1K);
}

static void show_pool(const char *when, size_t size, long free, long resv)
{
	long f = hugetlb_read(size, "free_hugepages");
	long r = hugetlb_read(size, "resv_hugepages");

	printf("  %s pool %-21s %2ld pages, %2ld free, %ld of these reserved\n",
	       size == SZ_1G ? "1 GiB" : "2 MiB", when,
	       hugetlb_read(size, "nr_hugepages"), f, r);
	check(f == free && r == resv, "the pool");
}

struct cost {
	long faults, tables_kb, memmap_kb, seconds_10;
	u64 pages_4k, pages_2m, pages_1g;
};

/* Run @op in the guest on all of its memory, and print the progress. */
static void guest_does(struct demo_vm *d, enum gmem_op op, const char *what)
{
	u64 done;

	printf("%s ", what);
	fflush(stdout);
	for (done = 0; done < VM_SIZE; done += CHUNK) {
		gmem_guest_do(d->vcpu, op, GMEM_GPA + done, CHUNK,
			      GMEM_EVERY_4K, PATTERN + done);
		printf(".");
		fflush(stdout);
	}
}

/* Guest code writes a word to every 4 KiB page, then checks all of them. */
static void touch_all(struct demo_vm *d, struct cost *c)
{
	long before = vcpu_get_stat(d->vcpu, pf_fixed);
	u64 p4k = vm_get_stat(d->vm, pages_4k);
	long tables = guest_tables();
	long long start = now_ns();

	guest_does(d, GMEM_WRITE, "  the guest writes to every 4 KiB of its memory");
	c->seconds_10 = (now_ns() - start) / 100000000;
	c->faults = vcpu_get_stat(d->vcpu, pf_fixed) - before;
	guest_does(d, GMEM_CHECK, " and reads it back");
	printf(" all there\n");

	c->tables_kb = guest_tables() - tables;
	c->pages_4k = vm_get_stat(d->vm, pages_4k) - p4k;
	c->pages_2m = vm_get_stat(d->vm, pages_2m);
	c->pages_1g = vm_get_stat(d->vm, pages_1g);
}

static void show_mappings(const struct cost *c)
{
	printf("  mappings of the guest's memory: %llu of 1 GiB, %llu of 2 MiB, %llu of 4 KiB\n",
	       (unsigned long long)c->pages_1g, (unsigned long long)c->pages_2m,
	       (unsigned long long)c->pages_4k);
}

static void row(const char *what, double huge, double base, const char *source)
{
	printf("  %-34s %11.10g %11.10g   %s\n", what, huge, base, source);
}

int main(void)
{
	struct cost huge = {}, base = {};
	struct demo_vm h, b;
	long nr, nr_2m;

	if (!(kvm_check_cap(KVM_CAP_GUEST_MEMFD_HUGETLB) & (SZ_1G / SZ_4K))) {
		printf("This kernel has no guest_memfd on 1 GiB HugeTLB pages.\n");
		return 1;
	}
	nr = hugetlb_read(SZ_1G, "nr_hugepages");
	nr_2m = hugetlb_read(SZ_2M, "nr_hugepages");
	if (nr < 3) {
		printf("The pool has %ld pages of 1 GiB, three are needed.\n", nr);
		return 1;
	}

	/* The third page is only for this measurement. */
	huge.memmap_kb = VM_SIZE / SZ_1G * pool_page_memmap();
	base.memmap_kb = VM_SIZE / SZ_4K * STRUCT_PAGE / SZ_1K;
	nr--;

	printf("\nA confidential VM with 2 GiB of private memory on 1 GiB HugeTLB pages\n\n");
	show_pool("before:", SZ_2M, nr_2m, 0);
	show_pool("before:", SZ_1G, nr, 0);
	demo_vm_create(&h, SZ_1G, VM_SIZE);
	show_pool("after creation:", SZ_1G, nr, 2);
	printf("  (the first touch of a 1 GiB page clears all of it: some seconds under emulation)\n");
	touch_all(&h, &huge);
	show_pool("after the guest ran:", SZ_1G, nr - 2, 0);
	show_mappings(&huge);
	check(huge.pages_1g == 2 && !huge.pages_2m && !huge.pages_4k,
	      "two mappings of 1 GiB and no others");
	check(huge.faults == 2, "two guest faults");

	printf("\nThe same VM on base pages, as guest_memfd is today\n\n");
	demo_vm_create(&b, SZ_4K, VM_SIZE);
	touch_all(&b, &base);
	show_mappings(&base);
	check(base.pages_4k == VM_SIZE / SZ_4K, "a mapping for every base page");
	check(base.faults >= VM_SIZE / SZ_4K, "a fault for every base page");

	printf("\n  %-34s %11s %11s   %s\n", "What 2 GiB cost", "1 GiB pages", "base pages",
	       "where the figures are from");
	row("guest faults", huge.faults, base.faults, "vCPU statistics: pf_fixed");
	row("page tables for the guest, KiB", huge.tables_kb, base.tables_kb,
	    "/proc/meminfo: growth of SecPageTables");
	row("struct pages held, KiB", huge.memmap_kb, base.memmap_kb,
	    "/proc/vmstat: nr_memmap*; 64 bytes per base page");
	row("seconds to write to all of it", huge.seconds_10 / 10.0, base.seconds_10 / 10.0,
	    "emulated; in instructions: make bench");
	check(huge.tables_kb <= 8, "hardly any page tables for 1 GiB pages");
	check(base.tables_kb >= (long)(VM_SIZE / SZ_2M * 4), "a page table for each 2 MiB");
	check(huge.memmap_kb == 2 * 4, "4 KiB of struct pages for a 1 GiB page");

	printf("\nBoth VMs are closed\n\n");
	demo_vm_free(&b);
	demo_vm_free(&h);
	show_pool("after close:", SZ_1G, nr, 0);
	show_pool("after close:", SZ_2M, nr_2m, 0);
	printf("\n%s\n", wrong ? "Something is not as it should be, see above." :
				 "Every page is back where it came from.");
	return wrong;
}
