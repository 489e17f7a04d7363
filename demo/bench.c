// SPDX-License-Identifier: GPL-2.0
/*
 * Measure the cost of guest_memfd under a clock that counts instructions, so that a
 * nanosecond is one instruction.  Print "name value" lines for scripts/bench.
 *
 * usage: bench base | huge | convert | convert-two-backings | split | small | toggle
 *
 * "base" and "convert-two-backings" run on any kernel, the others but "huge" where
 * conversion in place is on.
 */
#include <sys/mman.h>

#include "common.h"

#define BASE_FALLOCATE	(256ull * SZ_1M)
#define BASE_FAULT	(128ull * SZ_1M)

static void print(const char *name, double value)
{
	printf("%s %.1f\n", name, value);
	fflush(stdout);
}

static double timed_touch(struct demo_vm *d, u64 size, u64 stride)
{
	long long start;

	gmem_guest_set(d->vcpu, GMEM_WRITE, GMEM_GPA, size, stride, 1);
	start = now_ns();
	TEST_ASSERT(!gmem_guest_run(d->vcpu), "The guest can't touch its memory");
	return now_ns() - start;
}

static void bench_base(void)
{
	struct demo_vm d;
	long long start;

	demo_vm_create(&d, SZ_4K, BASE_FALLOCATE);
	start = now_ns();
	kvm_fallocate(d.fd, FALLOC_FL_KEEP_SIZE, 0, BASE_FALLOCATE);
	print("base_fallocate_per_page", (double)(now_ns() - start) / (BASE_FALLOCATE / SZ_4K));
	demo_vm_free(&d);

	demo_vm_create(&d, SZ_4K, BASE_FAULT);
	print("base_fault_per_page", timed_touch(&d, BASE_FAULT, SZ_4K) / (BASE_FAULT / SZ_4K));
	demo_vm_free(&d);
}

static void bench_huge(void)
{
	struct demo_vm d;
	long long start;
	long faults;
	int fd;

	fd = memfd_create("clear", MFD_HUGETLB | (30u << 26));
	TEST_ASSERT(fd >= 0 && !ftruncate(fd, SZ_1G), "Can't create a hugetlb memfd");
	start = now_ns();
	kvm_fallocate(fd, 0, 0, SZ_1G);
	print("clear_1g", now_ns() - start);
	close(fd);

	demo_vm_create(&d, SZ_1G, SZ_1G);
	faults = vcpu_get_stat(d.vcpu, pf_fixed);
	print("huge_first_touch", timed_touch(&d, 8, 8));
	print("huge_faults", vcpu_get_stat(d.vcpu, pf_fixed) - faults);
	print("huge_touch_all", timed_touch(&d, SZ_1G, SZ_4K));
	print("huge_faults_all", vcpu_get_stat(d.vcpu, pf_fixed) - faults);
	demo_vm_free(&d);

	demo_vm_create(&d, SZ_4K, SZ_1G);
	faults = vcpu_get_stat(d.vcpu, pf_fixed);
	print("base_touch_all", timed_touch(&d, SZ_1G, SZ_4K));
	print("base_faults_all", vcpu_get_stat(d.vcpu, pf_fixed) - faults);
	demo_vm_free(&d);
}

/*
 * Conversions of memory that the guest has written and mapped.  The figures do not
 * include the next access of the guest, which faults in either case.
 */
#define CONVERT_SIZE	((u64)SZ_1G)
#define NR_RUNS		4

struct backings {
	struct demo_vm d;
	char *mem;		/* mapping of shared memory on the host */
	int shmem_fd;		/* the second backing, or -1 for in-place conversion */
};

static void to_shared(struct backings *b, u64 offset, u64 size)
{
	if (b->shmem_fd < 0) {
		TEST_ASSERT(!gmem_convert(b->d.fd, offset, size, 0, NULL),
			    "Can't convert to shared: %s", strerror(errno));
		return;
	}
	/* Free the memory of the other kind, or the range has two backings. */
	vm_mem_set_shared(b->d.vm, GMEM_GPA + offset, size);
	kvm_fallocate(b->d.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
}

static void to_private(struct backings *b, u64 offset, u64 size)
{
	if (b->shmem_fd < 0) {
		TEST_ASSERT(!gmem_convert(b->d.fd, offset, size,
					  KVM_MEMORY_ATTRIBUTE_PRIVATE, NULL),
			    "Can't convert to private: %s", strerror(errno));
		return;
	}
	vm_mem_set_private(b->d.vm, GMEM_GPA + offset, size);
	kvm_fallocate(b->shmem_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
	kvm_fallocate(b->d.fd, FALLOC_FL_KEEP_SIZE, offset, size);
}

/* Allocate memory for a range that became shared; in place it exists already. */
static void get_shared(struct backings *b, u64 offset, u64 size)
{
	if (b->shmem_fd >= 0)
		kvm_fallocate(b->shmem_fd, FALLOC_FL_KEEP_SIZE, offset, size);
}

static void touch_shared(struct backings *b, u64 offset, u64 size)
{
	u64 end = offset + size;

	for (; offset < end; offset += SZ_4K)
		*(volatile char *)(b->mem + offset) = 1;
}

/* Convert @nr ranges, @stride apart, to shared and back; @use is called in between. */
static void bench_use(struct backings *b, const char *which, const char *what, u64 start,
		      u64 size, u64 stride, int nr,
		      void (*use)(struct backings *b, u64 offset, u64 size))
{
	long long shared = 0, private = 0, t[3];
	const double pages = (double)nr * size / SZ_4K;
	char name[64];
	u64 offset;
	int i;

	gmem_guest_set(b->d.vcpu, GMEM_WRITE, GMEM_GPA + start, stride * (nr - 1) + size,
		       SZ_4K, 1);
	TEST_ASSERT(!gmem_guest_run(b->d.vcpu), "The guest can't touch its memory");

	for (i = 0, offset = start; i < nr; i++, offset += stride) {
		t[0] = now_ns();
		to_shared(b, offset, size);
		use(b, offset, size);
		t[1] = now_ns();
		to_private(b, offset, size);
		t[2] = now_ns();
		shared += t[1] - t[0];
		private += t[2] - t[1];
	}

	snprintf(name, sizeof(name), "%s_to_shared%s", which, what);
	print(name, shared / pages);
	snprintf(name, sizeof(name), "%s_to_private%s", which, what);
	print(name, private / pages);
}

/* Convert memory that the host has not mapped, then memory that it has written. */
static void bench_range(struct backings *b, const char *which, u64 start, u64 size,
			u64 stride, int nr)
{
	bench_use(b, which, "", start, size, stride, nr, get_shared);
	bench_use(b, which, "_mapped", start, size, stride, nr, touch_shared);
}

static void free_backings(struct backings *b)
{
	kvm_munmap(b->mem, CONVERT_SIZE);
	demo_vm_free(&b->d);
	if (b->shmem_fd >= 0)
		close(b->shmem_fd);
}

static void bench_conversions(struct backings *b)
{
	/* Enough pages that page tables for the host do not count. */
	bench_range(b, "4k", SZ_2M, SZ_4K, 2 * SZ_4K, 4096);
	bench_range(b, "2m", 64 * SZ_1M, SZ_2M, SZ_2M, 1);
	bench_range(b, "1g", 0, CONVERT_SIZE, CONVERT_SIZE, 1);
	free_backings(b);
}

/* Convert an unallocated page of a file with @nr ranges: only the tree changes. */
static void bench_tree(struct kvm_vm *vm, const char *name, u64 size, long nr)
{
	struct backings b = { .shmem_fd = -1 };
	/* Enough rounds to average costs that occur once in a thousand rounds. */
	const long pairs = 4096;
	long long start;
	long i;

	b.d.fd = vm_create_guest_memfd(vm, size, 0);
	/* Each adds two ranges. */
	for (i = 0; i < nr / 2; i++)
		to_shared(&b, (2 * i + 1) * SZ_4K, SZ_4K);
	start = now_ns();
	for (i = 0; i < pairs; i++) {
		to_shared(&b, size / 2 + (i & 1) * SZ_4K, SZ_4K);
		to_private(&b, size / 2 + (i & 1) * SZ_4K, SZ_4K);
	}
	print(name, (now_ns() - start) / (2. * pairs));
	close(b.d.fd);
}

/* Create a VM with all of its memory in one file, private. */
static void create_in_place(struct backings *b, size_t page_size)
{
	b->shmem_fd = -1;
	b->d.vm = gmem_vm_create(1, &b->d.vcpu);
	b->d.fd = vm_create_guest_memfd(b->d.vm, CONVERT_SIZE, gmem_flags(page_size) |
					GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(b->d.vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   CONVERT_SIZE, NULL, b->d.fd, 0);
	b->mem = kvm_mmap(CONVERT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, b->d.fd);
}

static void bench_convert(void)
{
	struct backings b;

	create_in_place(&b, SZ_4K);
	bench_conversions(&b);

	/* Measure the largest tree last, as freeing it would affect later figures. */
	b.d.vm = gmem_vm_create(1, &b.d.vcpu);
	bench_tree(b.d.vm, "tree_1g_1", SZ_1G, 1);
	bench_tree(b.d.vm, "tree_64g_1", 64ull * SZ_1G, 1);
	bench_tree(b.d.vm, "tree_1t_1", 1024ull * SZ_1G, 1);
	bench_tree(b.d.vm, "tree_1t_1000", 1024ull * SZ_1G, 1000);
	bench_tree(b.d.vm, "tree_1t_100000", 1024ull * SZ_1G, 100000);
}

static void bench_convert_two_backings(void)
{
	struct backings b;

	b.shmem_fd = memfd_create("shared", 0);
	TEST_ASSERT(b.shmem_fd >= 0 && !ftruncate(b.shmem_fd, CONVERT_SIZE),
		    "Can't create a memfd");
	b.mem = kvm_mmap(CONVERT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, b.shmem_fd);
	b.d.vm = gmem_vm_create(1, &b.d.vcpu);
	b.d.fd = vm_create_guest_memfd(b.d.vm, CONVERT_SIZE, 0);
	vm_set_user_memory_region2(b.d.vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   CONVERT_SIZE, b.mem, b.d.fd, 0);
	vm_mem_set_private(b.d.vm, GMEM_GPA, CONVERT_SIZE);
	bench_conversions(&b);
}

/* Share the first 4 KiB of a 1 GiB page, and make the last shared 4 KiB private. */
static void bench_first(struct backings *b)
{
	const u64 offset = CONVERT_SIZE / 2;
	long before = memmap();
	long long start;

	gmem_guest_do(b->d.vcpu, GMEM_WRITE, GMEM_GPA, 8, 8, 1);
	start = now_ns();
	to_shared(b, offset, SZ_4K);
	print("split", now_ns() - start);
	print("split_memmap_kib", (memmap() - before) * (SZ_4K / SZ_1K));

	start = now_ns();
	to_private(b, offset, SZ_4K);
	print("merge", now_ns() - start);
	print("merge_memmap_kib", (memmap() - before) * (SZ_4K / SZ_1K));
}

/* Split all parts: share one page of each 2 MiB. */
static void bench_comb(struct backings *b)
{
	long long start = now_ns();
	u64 i;

	for (i = 0; i < CONVERT_SIZE; i += SZ_2M)
		to_shared(b, i, SZ_4K);
	print("comb", now_ns() - start);
	to_private(b, 0, CONVERT_SIZE);
}

/* Convert every other page of some parts that keep another shared page. */
static void bench_pages(struct backings *b, const char *which)
{
	const int nr = 16;
	int i;

	for (i = 1; i <= nr; i++)
		to_shared(b, i * SZ_2M + SZ_4K, SZ_4K);
	/* Other work of the kernel costs more than the difference: repeat it. */
	for (i = 0; i < NR_RUNS; i++)
		bench_range(b, which, SZ_2M, SZ_4K, 2 * SZ_4K, nr * 256);
}

/* Share a page and take it back in a loop, in a huge page that has been split once. */
static void bench_toggle(const char *name, size_t page_size)
{
	const u64 offset = CONVERT_SIZE / 2;
	const int nr = 256;
	struct backings b;
	long long start;
	int i;

	create_in_place(&b, page_size);
	gmem_guest_do(b.d.vcpu, GMEM_WRITE, GMEM_GPA + offset, 8, 8, 1);
	to_shared(&b, offset, SZ_4K);
	to_private(&b, offset, SZ_4K);
	start = now_ns();
	for (i = 0; i < nr; i++) {
		to_shared(&b, offset, SZ_4K);
		to_private(&b, offset, SZ_4K);
	}
	print(name, (now_ns() - start) / nr);
	free_backings(&b);
}

static void bench_toggles(void)
{
	bench_toggle("toggle_4k", SZ_4K);
	bench_toggle("toggle_2m", SZ_2M);
	bench_toggle("toggle_1g", SZ_1G);
}

static void bench_split(void)
{
	struct backings b;

	create_in_place(&b, SZ_1G);
	bench_first(&b);
	bench_comb(&b);
	free_backings(&b);
}

static void bench_small(void)
{
	struct backings b;

	create_in_place(&b, SZ_1G);
	bench_pages(&b, "split");
	free_backings(&b);

	create_in_place(&b, SZ_4K);
	bench_pages(&b, "unsplit");
	free_backings(&b);
}

int main(int argc, char *argv[])
{
	if (argc == 2 && !strcmp(argv[1], "base"))
		bench_base();
	else if (argc == 2 && !strcmp(argv[1], "convert"))
		bench_convert();
	else if (argc == 2 && !strcmp(argv[1], "convert-two-backings"))
		bench_convert_two_backings();
	else if (argc == 2 && !strcmp(argv[1], "huge"))
		bench_huge();
	else if (argc == 2 && !strcmp(argv[1], "split"))
		bench_split();
	else if (argc == 2 && !strcmp(argv[1], "small"))
		bench_small();
	else if (argc == 2 && !strcmp(argv[1], "toggle"))
		bench_toggles();
	else
		return 2;
	return 0;
}
