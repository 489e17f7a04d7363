// SPDX-License-Identifier: GPL-2.0
/*
 * Counts what guest_memfd costs: run under a clock that counts instructions, so
 * that a nanosecond is one.  Prints "name value" lines for scripts/bench.
 *
 * usage: bench base | huge | convert | convert-two-backings
 *
 * "base" and "convert-two-backings" run on any kernel, "convert" where conversion
 * in place is on.
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
 * Conversions, of allocated memory.  Single pages are every second one, so that each
 * of them is a range of its own.
 */
#define CONVERT_SIZE	((u64)SZ_1G)
#define NR_SINGLE	256
#define SINGLE(i)	(SZ_2M + (i) * 2ull * SZ_4K)
#define RANGE_2M	(16ull * SZ_1M)

struct backings {
	struct demo_vm d;
	char *mem;		/* what is shared, as the host sees it */
	int shmem_fd;		/* the other backing, or -1: conversion in place */
};

typedef void (*convert_fn)(struct backings *b, u64 offset, u64 size, bool private);

static void convert_in_place(struct backings *b, u64 offset, u64 size, bool private)
{
	TEST_ASSERT(!gmem_convert(b->d.fd, offset, size,
				  private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0, NULL),
		    "KVM_SET_MEMORY_ATTRIBUTES2: %s", strerror(errno));
}

/* Memory that is not what the range is now has to be given back, or there are two. */
static void convert_two_backings(struct backings *b, u64 offset, u64 size, bool private)
{
	const int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	if (private) {
		vm_mem_set_private(b->d.vm, GMEM_GPA + offset, size);
		kvm_fallocate(b->shmem_fd, punch, offset, size);
		kvm_fallocate(b->d.fd, FALLOC_FL_KEEP_SIZE, offset, size);
	} else {
		vm_mem_set_shared(b->d.vm, GMEM_GPA + offset, size);
		kvm_fallocate(b->d.fd, punch, offset, size);
	}
}

static void touch(struct backings *b, u64 offset, u64 size)
{
	u64 end = offset + size;

	for (; offset < end; offset += SZ_4K)
		*(volatile char *)(b->mem + offset) = 1;
}

static void print_convert(const char *what, const char *which, long long ns, u64 size)
{
	char name[64];

	snprintf(name, sizeof(name), "%s_%s", what, which);
	print(name, (double)ns / (size / SZ_4K));
}

/* There and back, with the host's access to what has become shared. */
static void bench_range(struct backings *b, convert_fn convert, const char *which,
			u64 offset, u64 size)
{
	long long start = now_ns();

	convert(b, offset, size, false);
	print_convert("to_shared", which, now_ns() - start, size);
	start = now_ns();
	touch(b, offset, size);
	print_convert("touch", which, now_ns() - start, size);
	start = now_ns();
	convert(b, offset, size, true);
	print_convert("to_private", which, now_ns() - start, size);
}

static void bench_single(struct backings *b, convert_fn convert)
{
	const u64 all = NR_SINGLE * SZ_4K;
	long long start;
	int i;

	start = now_ns();
	for (i = 0; i < NR_SINGLE; i++)
		convert(b, SINGLE(i), SZ_4K, false);
	print_convert("to_shared", "4k", now_ns() - start, all);
	start = now_ns();
	for (i = 0; i < NR_SINGLE; i++)
		convert(b, SINGLE(i), SZ_4K, true);
	print_convert("to_private", "4k_unmapped", now_ns() - start, all);

	for (i = 0; i < NR_SINGLE; i++)
		convert(b, SINGLE(i), SZ_4K, false);
	start = now_ns();
	for (i = 0; i < NR_SINGLE; i++)
		touch(b, SINGLE(i), SZ_4K);
	print_convert("touch", "4k", now_ns() - start, all);
	start = now_ns();
	for (i = 0; i < NR_SINGLE; i++)
		convert(b, SINGLE(i), SZ_4K, true);
	print_convert("to_private", "4k", now_ns() - start, all);
}

static void bench_conversions(struct backings *b, convert_fn convert)
{
	kvm_fallocate(b->d.fd, FALLOC_FL_KEEP_SIZE, 0, CONVERT_SIZE);
	bench_single(b, convert);
	bench_range(b, convert, "2m", RANGE_2M, SZ_2M);
	bench_range(b, convert, "1g", 0, CONVERT_SIZE);
	kvm_munmap(b->mem, CONVERT_SIZE);
	demo_vm_free(&b->d);
}

/* One page of a file of @size with @nr ranges, not allocated: the tree alone. */
static void bench_tree(struct kvm_vm *vm, const char *name, u64 size, long nr)
{
	struct backings b = { .shmem_fd = -1 };
	long long start;
	long i;

	b.d.fd = vm_create_guest_memfd(vm, size, 0);
	/* Two ranges more each time. */
	for (i = 0; i < nr / 2; i++)
		convert_in_place(&b, (2 * i + 1) * SZ_4K, SZ_4K, false);
	start = now_ns();
	for (i = 0; i < 64; i++) {
		convert_in_place(&b, size / 2 + (i & 1) * SZ_4K, SZ_4K, i & 2);
		convert_in_place(&b, size / 2 + (i & 1) * SZ_4K, SZ_4K, !(i & 2));
	}
	print(name, (now_ns() - start) / 128.);
	close(b.d.fd);
}

static void bench_convert(void)
{
	struct backings b = { .shmem_fd = -1 };

	b.d.vm = gmem_vm_create(1, &b.d.vcpu);
	bench_tree(b.d.vm, "tree_1g_1", SZ_1G, 1);
	bench_tree(b.d.vm, "tree_64g_1", 64ull * SZ_1G, 1);
	bench_tree(b.d.vm, "tree_1t_1", 1024ull * SZ_1G, 1);
	bench_tree(b.d.vm, "tree_1t_1000", 1024ull * SZ_1G, 1000);
	bench_tree(b.d.vm, "tree_1t_100000", 1024ull * SZ_1G, 100000);

	b.d.fd = vm_create_guest_memfd(b.d.vm, CONVERT_SIZE, GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(b.d.vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   CONVERT_SIZE, NULL, b.d.fd, 0);
	b.mem = kvm_mmap(CONVERT_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, b.d.fd);
	bench_conversions(&b, convert_in_place);
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
	bench_conversions(&b, convert_two_backings);
	close(b.shmem_fd);
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
	else
		return 2;
	return 0;
}
