// SPDX-License-Identifier: GPL-2.0
/*
 * Show, on a patched kernel with kvm.gmem_in_place_conversion=1, a guest that shares
 * one page of its private memory with the host and makes it private again.  Check all
 * results, and exit with 1 if one differs from the expected one.
 */
#include <setjmp.h>
#include <signal.h>
#include <sys/stat.h>

#include "common.h"

#define VM_SIZE		SZ_16M
#define NEIGHBOUR	0x11ull		/* written by the guest */
#define QUESTION	0x22ull
#define ANSWER		0x33ull		/* written by the host */

static struct demo_vm vm;
static char *mem;
static int wrong;

static sigjmp_buf no_access;

static void sigbus(int sig)
{
	siglongjmp(no_access, 1);
}

/* Read a page of the guest on the host.  Expect @value, or no access if it is 0. */
static void host_reads(int page, u64 value)
{
	volatile u64 *word = (u64 *)(mem + page * SZ_4K);
	u64 found = 0;

	if (!sigsetjmp(no_access, 1))
		found = *word;
	if (found)
		printf("  the host reads page %d:            0x%lx\n", page, found);
	else
		printf("  the host reads page %d:            SIGBUS, no access\n", page);
	if (found != value) {
		printf("  NOT AS IT SHOULD BE: 0x%lx was due\n", value);
		wrong = 1;
	}
}

static void guest_writes(int page, u64 value)
{
	printf("  the guest writes 0x%lx to page %d\n", value, page);
	gmem_guest_do(vm.vcpu, GMEM_WRITE, GMEM_GPA + page * SZ_4K, 8, 8, value);
}

static void guest_reads(int page, u64 value)
{
	gmem_guest_do(vm.vcpu, GMEM_CHECK, GMEM_GPA + page * SZ_4K, 8, 8, value);
	printf("  the guest reads page %d:           0x%lx\n", page, value);
}

static void convert(int page, u64 attributes)
{
	printf("\n  page %d becomes %s\n", page, attributes ? "private" : "shared");
	TEST_ASSERT(!gmem_convert(vm.fd, page * SZ_4K, SZ_4K, attributes, NULL),
		    "KVM_SET_MEMORY_ATTRIBUTES2: %s", strerror(errno));
}

static void show_memory(long pages)
{
	struct stat st;

	TEST_ASSERT(!fstat(vm.fd, &st), "fstat() failed");
	printf("  memory of the VM, all in one file: %ld KiB\n", (long)st.st_blocks / 2);
	if (st.st_blocks != pages * SZ_4K / 512) {
		printf("  NOT AS IT SHOULD BE: %ld KiB were due\n", pages * 4);
		wrong = 1;
	}
}

int main(void)
{
	signal(SIGBUS, sigbus);
	vm.vm = gmem_vm_create(1, &vm.vcpu);
	vm.fd = vm_create_guest_memfd(vm.vm, VM_SIZE, GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(vm.vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   VM_SIZE, NULL, vm.fd, 0);
	mem = kvm_mmap(VM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vm.fd);

	printf("\nA guest shares a page of 4 KiB with the host, in place\n\n");
	guest_writes(1, NEIGHBOUR);
	guest_writes(2, QUESTION);
	host_reads(1, 0);
	host_reads(2, 0);
	show_memory(2);

	convert(2, 0);
	host_reads(2, QUESTION);
	printf("  the host writes 0x%llx to page 2\n", ANSWER);
	*(volatile u64 *)(mem + 2 * SZ_4K) = ANSWER;
	guest_reads(2, ANSWER);
	host_reads(1, 0);
	show_memory(2);

	convert(2, KVM_MEMORY_ATTRIBUTE_PRIVATE);
	host_reads(2, 0);
	guest_reads(2, ANSWER);
	guest_reads(1, NEIGHBOUR);
	show_memory(2);

	kvm_munmap(mem, VM_SIZE);
	demo_vm_free(&vm);
	printf("\n%s\n", wrong ? "Something is not as it should be, see above." :
				 "It is the same page of memory all the time, and there is no copy of it.");
	return wrong;
}
