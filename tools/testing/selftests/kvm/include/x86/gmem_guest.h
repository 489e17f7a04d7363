/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * VMs whose private memory is a guest_memfd file, and guest code that touches
 * it on command.
 */
#ifndef SELFTEST_KVM_GMEM_GUEST_H
#define SELFTEST_KVM_GMEM_GUEST_H

#include <linux/sizes.h>

#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "ucall_common.h"

/* What the guest can address beside its own code, data and page tables. */
#define GMEM_GPA		SZ_4G
#define GMEM_WINDOW		(8ull * SZ_1G)
#define GMEM_SLOT		10
#define GMEM_MAX_VCPUS		4

enum gmem_op {
	GMEM_READ,		/* one word every stride bytes */
	GMEM_WRITE,		/* value + offset in the range */
	GMEM_CHECK,		/* ... is still there */
	GMEM_CHECK_ZERO,
	GMEM_EXEC,		/* call gpa, where GMEM_WRITE put a RET */
	GMEM_CALL,		/* a function of the test */
};

struct gmem_command {
	u64 op;
	gpa_t gpa;
	u64 size;
	u64 stride;
	u64 value;
	void (*fn)(u64 a, u64 b, u64 c, u64 d);
	u64 args[4];
};

/* Every 4 KiB page of the range, for strides that needn't be finer. */
#define GMEM_EVERY_4K		SZ_4K

/*
 * A VM with private memory and @nr_vcpus vCPUs that wait for commands.  The
 * window is mapped 1:1 by the largest guest pages there are, so that the
 * guest's own page tables set no limit.
 */
struct kvm_vm *gmem_vm_create(int nr_vcpus, struct kvm_vcpu *vcpus[]);

/* The same of any type, whose memory need not be private. */
struct kvm_vm *gmem_vm_create_type(int type, int nr_vcpus, struct kvm_vcpu *vcpus[]);

/*
 * What the VM is to know of its memory: 0 or KVM_MEMORY_ATTRIBUTE_PRIVATE.  Nothing, if
 * guest_memfd files know: these are created private.
 */
void gmem_vm_set_attributes(struct kvm_vm *vm, gpa_t gpa, u64 size, u64 attributes);

/* Bind [offset, offset + size) of the file at @gpa, private. */
void gmem_add_slot(struct kvm_vm *vm, u32 slot, gpa_t gpa, u64 size, int fd,
		   u64 offset);
void gmem_delete_slot(struct kvm_vm *vm, u32 slot);

/* Let the guest do it; the second form returns KVM_RUN's error instead. */
void gmem_guest_do(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		   u64 stride, u64 value);
int __gmem_guest_do(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		    u64 stride, u64 value);

/* The same and any function of the test, at the next gmem_guest_run(). */
void gmem_guest_set(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		    u64 stride, u64 value);
void gmem_guest_set_call(struct kvm_vcpu *vcpu, void *fn, u64 a, u64 b, u64 c,
			 u64 d);

/*
 * Run until the command is done or the function says GUEST_SYNC().  Returns
 * KVM_RUN's error, after which it can be tried again.
 */
int gmem_guest_run(struct kvm_vcpu *vcpu);

/* A mapping of @fd shows nothing where an index of the file is negative in bytes. */
void gmem_expect_nothing_beyond(int fd);

/* KVM_SET_MEMORY_ATTRIBUTES2; @error is set to its error_offset, unless NULL. */
int gmem_convert(int fd, u64 offset, u64 size, u64 attributes, u64 *error);

/* A file of the VM's in debugfs, to write to, or -1. */
int gmem_open_debugfs(struct kvm_vm *vm, const char *name);

/*
 * With CONFIG_KVM_GMEM_TEST=y KVM compares what folios a file has with what its attributes
 * demand.  Of huge pages it is told whether their vmemmap has to be @optimized.
 */
int gmem_open_check(struct kvm_vm *vm);
void gmem_check(int check, int fd, bool optimized);

/* Use the page of the word at @p until this is read from the pipe, or the pipe closed. */
void gmem_pin(int pipe_fd, void *p);

/* The page that this process has mapped at @p, or 0. */
u64 gmem_host_pfn(const void *p);

/*
 * Give a page a memory error, and repair it once it is in no file any more.  Both
 * return an errno.
 */
bool gmem_can_poison(void);
int gmem_poison(u64 pfn);
int gmem_unpoison(u64 pfn);

/*
 * Let the guest read a word until it can't.  Returns KVM_RUN's error, or 0 if that never
 * comes: the guest's mapping goes a moment later than memory_failure() returns.
 */
int gmem_read_until_error(struct kvm_vcpu *vcpu, gpa_t gpa);

#endif /* SELFTEST_KVM_GMEM_GUEST_H */
