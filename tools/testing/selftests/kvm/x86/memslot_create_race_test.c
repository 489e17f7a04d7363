// SPDX-License-Identifier: GPL-2.0-only
/*
 * Faults of vCPUs while a memslot is deleted and created again.
 *
 * A vCPU that faults while there is no memslot can come late: another vCPU has
 * mapped the page by then.  KVM must treat that as a race and not warn.
 */
#include <pthread.h>
#include <time.h>

#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define NR_VCPUS	2
#define SECONDS		15

#define SLOT		10
#define GPA		SZ_1G
#define SIZE		SZ_2M
#define NR_PAGES	(SIZE / PAGE_SIZE)

#define MEMORY_BYTE	0x5a
#define MEMORY_VALUE	0x5a5a5a5a5a5a5a5aull
#define MMIO_VALUE	0xbeefull

#define PORT		0x10

#define TAINT_WARN	9

static unsigned long nr_memory, nr_mmio;

/* Not a ucall, whose memory would leak: the next round starts from scratch. */
static void guest_code(u64 *p)
{
	u64 value = READ_ONCE(*p);
	u8 good = value == MEMORY_VALUE || value == MMIO_VALUE;

	asm volatile("outb %0, %1" : : "a"(good), "N"(PORT));
}

/*
 * Set all registers in each round: emulated SVM can lose a guest that another
 * CPU interrupts.  That ends in an exit of another kind, or in a failed run.
 */
static void *vcpu_worker(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	struct kvm_run *run = vcpu->run;
	unsigned int seed = vcpu->id;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	bool is_mmio;
	u64 page;
	int r;

	vcpu_sregs_get(vcpu, &sregs);
	vcpu_regs_get(vcpu, &regs);

	for (;;) {
		/* All vCPUs meet at the last page, most of the time. */
		page = NR_PAGES - 1;
		if (rand_r(&seed) % 4 == 0)
			page = rand_r(&seed) % NR_PAGES;
		regs.rdi = GPA + page * PAGE_SIZE;
		vcpu_sregs_set(vcpu, &sregs);
		vcpu_regs_set(vcpu, &regs);

		is_mmio = false;
		while (!(r = __vcpu_run(vcpu)) &&
		       run->exit_reason == KVM_EXIT_MMIO) {
			*(u64 *)run->mmio.data = MMIO_VALUE;
			is_mmio = true;
		}

		if (r || run->exit_reason != KVM_EXIT_IO || run->io.port != PORT)
			continue;

		TEST_ASSERT_EQ(*((u8 *)run + run->io.data_offset), 1);
		__atomic_fetch_add(is_mmio ? &nr_mmio : &nr_memory, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static bool kernel_has_warned(void)
{
	unsigned long taint;
	FILE *f;
	int r;

	f = fopen("/proc/sys/kernel/tainted", "r");
	TEST_ASSERT(f, "Cannot open /proc/sys/kernel/tainted");
	r = fscanf(f, "%lu", &taint);
	fclose(f);
	TEST_ASSERT_EQ(r, 1);

	return taint & BIT(TAINT_WARN);
}

int main(void)
{
	struct kvm_vcpu *vcpus[NR_VCPUS];
	pthread_t threads[NR_VCPUS];
	unsigned long rounds;
	struct kvm_vm *vm;
	time_t end;
	void *mem;
	int i;

	__TEST_REQUIRE(!kernel_has_warned(), "The kernel has warned before");

	vm = vm_create_with_vcpus(NR_VCPUS, guest_code, vcpus);
	virt_map(vm, GPA, GPA, NR_PAGES);

	mem = kvm_mmap(SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1);
	memset(mem, MEMORY_BYTE, SIZE);

	for (i = 0; i < NR_VCPUS; i++)
		kvm_pthread_create(&threads[i], NULL, vcpu_worker, vcpus[i]);

	end = time(NULL) + SECONDS;
	for (rounds = 0; time(NULL) < end; rounds++) {
		vm_set_user_memory_region(vm, SLOT, 0, GPA, SIZE, mem);
		vm_set_user_memory_region(vm, SLOT, 0, GPA, 0, NULL);
	}

	pr_info("Created the memslot %lu times, %lu accesses to it, %lu without it\n",
		rounds, nr_memory, nr_mmio);
	TEST_ASSERT(nr_memory && nr_mmio,
		    "No vCPU has met the memslot, or none its absence");
	TEST_ASSERT(!kernel_has_warned(), "The kernel warned, see its log");

	/* The threads end with the process. */
	return 0;
}
