// SPDX-License-Identifier: GPL-2.0
/*
 * Show, on a patched kernel with kvm.gmem_in_place_conversion=1, the folios of a 1 GiB
 * page while the guest shares 4 KiB of it with the host and makes them private again.
 * Check all results, and exit with 1 if one differs from the expected one.
 */
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

#include "common.h"
#include "folios.h"

#define VM_SIZE		((u64)SZ_1G)
#define SHARED_PAGE	((u64)SZ_1G / 3 / SZ_4K * SZ_4K)	/* an arbitrary page */
#define PATTERN		0x5eed000000000000ull
#define ANSWER		0x33ull		/* written by the host */

static struct demo_vm vm;
static char *mem;
static long pages_4k_before;		/* mappings of other memory */
static long memmap_before;
static int wrong;

static sigjmp_buf no_access;

static void sigbus(int sig)
{
	siglongjmp(no_access, 1);
}

static void check(bool ok, const char *what)
{
	if (!ok) {
		printf("  NOT AS IT SHOULD BE: %s\n", what);
		wrong = 1;
	}
}

/* Expect one page if @whole, else that the part with the shared page is split. */
static void show_map(bool whole)
{
	char map[NR_PARTS], path[128];
	long nr;

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/gmem_folios", getpid(),
		 vm.vm->fd);
	nr = read_folios(path, 0, map);
	TEST_ASSERT(nr >= 0, "Can't read %s", path);
	print_map(map);
	if (whole) {
		check(nr == 1 && count(map, WHOLE) == NR_PARTS, "one page of 1 GiB");
		return;
	}
	check(nr == NR_PARTS - 1 + PART_PAGES && count(map, PART) == NR_PARTS - 1 &&
	      map[SHARED_PAGE / SZ_2M] == PIECES, "511 parts, and one in 512 pieces");
}

/* Whole, a page has its struct pages in 4 KiB, as long as it is in the pool. */
static void show_memmap(long least, long most)
{
	long kb = (memmap() - memmap_before) * (SZ_4K / SZ_1K);

	printf("  struct pages, more than at first: %ld KiB\n", kb);
	check(kb >= least && kb <= most, "struct pages");
}

/* After the guest has used all of its memory. */
static void show_mappings(long p1g, long p2m, long p4k)
{
	long n1g = vm_get_stat(vm.vm, pages_1g), n2m = vm_get_stat(vm.vm, pages_2m);
	long n4k = vm_get_stat(vm.vm, pages_4k) - pages_4k_before;

	printf("  mappings of the guest's memory: %ld of 1 GiB, %ld of 2 MiB, %ld of 4 KiB\n",
	       n1g, n2m, n4k);
	check(n1g == p1g && n2m == p2m && n4k == p4k, "the guest's mappings");
}

/* The first word of a page.  The host shall find @value, or nothing: 0. */
static void host_reads(const char *what, u64 offset, u64 value)
{
	volatile u64 *word = (u64 *)(mem + offset);
	u64 found = 0;

	if (!sigsetjmp(no_access, 1))
		found = *word;
	if (found)
		printf("  the host reads %-20s 0x%lx\n", what, found);
	else
		printf("  the host reads %-20s SIGBUS, no access\n", what);
	check(found == value, "what the host reads");
}

/* The second word: the first one is the guest's pattern, and remains that. */
static void guest_reads_answer(void)
{
	gmem_guest_do(vm.vcpu, GMEM_CHECK, GMEM_GPA + SHARED_PAGE + 8, 8, 8, ANSWER);
	printf("  the guest reads %-19s 0x%llx\n", "that page:", ANSWER);
}

static void guest_reads_all(void)
{
	gmem_guest_do(vm.vcpu, GMEM_CHECK, GMEM_GPA, VM_SIZE, GMEM_EVERY_4K, PATTERN);
	printf("  the guest reads every 4 KiB of its memory: all there\n");
}

static void convert(u64 attributes)
{
	long long start = now_ns();

	TEST_ASSERT(!gmem_convert(vm.fd, SHARED_PAGE, SZ_4K, attributes, NULL),
		    "KVM_SET_MEMORY_ATTRIBUTES2: %s", strerror(errno));
	printf("\n  4 KiB of it become %s (%.0f ms, emulated)\n",
	       attributes ? "private again" : "shared", (now_ns() - start) / 1e6);
}

/* KVM merges the page when it has not been converted for a while. */
static void wait_for_merge(void)
{
	long long start = now_ns();

	while (memmap() != memmap_before && now_ns() - start < 30000000000ll)
		usleep(100000);
	printf("  later, as nothing of it is converted again (%.0f s, emulated)\n",
	       (now_ns() - start) / 1e9);
}

static void create(void)
{
	vm.vm = gmem_vm_create(1, &vm.vcpu);
	vm.fd = vm_create_guest_memfd(vm.vm, VM_SIZE, gmem_flags(SZ_1G) |
				      GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(vm.vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   VM_SIZE, NULL, vm.fd, 0);
	mem = kvm_mmap(VM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vm.fd);
	pages_4k_before = vm_get_stat(vm.vm, pages_4k);
	memmap_before = memmap();
}

int main(void)
{
	long free_before = hugetlb_read(SZ_1G, "free_hugepages");

	signal(SIGBUS, sigbus);
	printf("\nA guest on a 1 GiB page shares 4 KiB of it with the host\n\n");
	print_legend();
	printf("\n");

	create();
	printf("  the guest writes to every 4 KiB of its memory\n");
	gmem_guest_do(vm.vcpu, GMEM_WRITE, GMEM_GPA, VM_SIZE, GMEM_EVERY_4K, PATTERN);
	show_map(true);
	show_mappings(1, 0, 0);

	convert(0);
	show_map(false);
	/* A page for every part of 2 MiB, eight for one of them: 2.2 MiB at most. */
	show_memmap(NR_PARTS * 4, 2252);
	host_reads("that page:", SHARED_PAGE, PATTERN + SHARED_PAGE);
	printf("  the host writes 0x%llx to that page\n", ANSWER);
	*(volatile u64 *)(mem + SHARED_PAGE + 8) = ANSWER;
	guest_reads_answer();
	host_reads("the page beside it:", SHARED_PAGE + SZ_4K, 0);
	guest_reads_all();
	show_mappings(0, NR_PARTS - 1, PART_PAGES);

	convert(KVM_MEMORY_ATTRIBUTE_PRIVATE);
	wait_for_merge();
	show_map(true);
	show_memmap(0, 0);
	host_reads("that page:", SHARED_PAGE, 0);
	guest_reads_answer();
	guest_reads_all();
	show_mappings(1, 0, 0);

	kvm_munmap(mem, VM_SIZE);
	demo_vm_free(&vm);
	check(hugetlb_read(SZ_1G, "free_hugepages") == free_before, "the pool");
	printf("\n%s\n", wrong ? "Something is not as it should be, see above." :
	       "Only what was shared came in small pages, and it is one page again.");
	return wrong;
}
