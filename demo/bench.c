// SPDX-License-Identifier: GPL-2.0
/*
 * Counts what guest_memfd costs: run under a clock that counts instructions, so
 * that a nanosecond is one.  Prints "name value" lines for scripts/bench.
 *
 * usage: bench base | huge
 *
 * "base" uses files of base pages only and runs on any kernel.
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

int main(int argc, char *argv[])
{
	if (argc == 2 && !strcmp(argv[1], "base"))
		bench_base();
	else if (argc == 2 && !strcmp(argv[1], "huge"))
		bench_huge();
	else
		return 2;
	return 0;
}
