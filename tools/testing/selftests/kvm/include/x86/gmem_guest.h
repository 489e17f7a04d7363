/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * VMs whose private memory is a guest_memfd file, and guest code that accesses
 * it on command.
 */
#ifndef SELFTEST_KVM_GMEM_GUEST_H
#define SELFTEST_KVM_GMEM_GUEST_H

#include <linux/sizes.h>

#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "ucall_common.h"

/* Memory that the guest can access, besides its code, data and page tables. */
#define GMEM_GPA		SZ_4G
#define GMEM_WINDOW		(8ull * SZ_1G)
#define GMEM_SLOT		10
#define GMEM_MAX_VCPUS		4

enum gmem_op {
	GMEM_READ,		/* one word every stride bytes */
	GMEM_WRITE,		/* value + offset in the range */
	GMEM_CHECK,		/* expect that value */
	GMEM_CHECK_ZERO,
	GMEM_EXEC,		/* call gpa, after GMEM_WRITE of a RET */
	GMEM_CALL,		/* call a function of the test */
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

/* Stride to access every 4 KiB page of the range. */
#define GMEM_EVERY_4K		SZ_4K

/*
 * Create a VM with private memory and @nr_vcpus vCPUs that wait for commands.
 * The guest maps the window 1:1 by its largest pages, so that its page tables
 * do not limit KVM's mappings.
 */
struct kvm_vm *gmem_vm_create(int nr_vcpus, struct kvm_vcpu *vcpus[]);

/* Create a VM of any type, whose memory does not have to be private. */
struct kvm_vm *gmem_vm_create_type(int type, int nr_vcpus, struct kvm_vcpu *vcpus[]);

/*
 * Set the VM's attributes to 0 or KVM_MEMORY_ATTRIBUTE_PRIVATE.  Do nothing if
 * guest_memfd files track the attributes: files start as private then.
 */
void gmem_vm_set_attributes(struct kvm_vm *vm, gpa_t gpa, u64 size, u64 attributes);

/* Bind [offset, offset + size) of the file at @gpa, as private memory. */
void gmem_add_slot(struct kvm_vm *vm, u32 slot, gpa_t gpa, u64 size, int fd,
		   u64 offset);
void gmem_delete_slot(struct kvm_vm *vm, u32 slot);

/* Run a command.  The second form returns the error of KVM_RUN. */
void gmem_guest_do(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		   u64 stride, u64 value);
int __gmem_guest_do(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		    u64 stride, u64 value);

/* Set a command, or a function of the test, for the next gmem_guest_run(). */
void gmem_guest_set(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		    u64 stride, u64 value);
void gmem_guest_set_call(struct kvm_vcpu *vcpu, void *fn, u64 a, u64 b, u64 c,
			 u64 d);

/*
 * Run until the command is done or the function calls GUEST_SYNC().  Return the
 * error of KVM_RUN, after which another call retries.
 */
int gmem_guest_run(struct kvm_vcpu *vcpu);

/*
 * Open a file in the VM's debugfs directory for writing.  Return -1 if there is
 * none: the files need CONFIG_KVM_GMEM_TEST.
 */
int gmem_open_debugfs(struct kvm_vm *vm, const char *name);

/*
 * Call kvm_gmem_populate() for @nr pages by such a file, with a callback that copies @src
 * if it is not NULL.  Otherwise only TDX and SNP call it.
 */
int gmem_populate(struct kvm_vm *vm, gpa_t gpa, long nr, void *src);
bool gmem_can_populate(struct kvm_vm *vm);

/* The reason to skip a test if it consists of nothing but such a file. */
#define GMEM_NO_DEBUGFS	"needs CONFIG_KVM_GMEM_TEST and debugfs"

/* Open such a file for a check.  Without it, print that @what is left out. */
int gmem_open_optional(struct kvm_vm *vm, const char *name, const char *what);

/*
 * With CONFIG_KVM_GMEM_TEST=y, KVM compares the folios of a file with those
 * that its attributes require.  @optimized tells whether large folios must have
 * an optimized vmemmap, if the pool's pages have.  Otherwise, @check is -1, and
 * the functions do nothing.
 */
int gmem_open_check(struct kvm_vm *vm);
void gmem_check(int check, int fd, bool optimized);
void gmem_close_check(int check);

/* Pin the page of the word at @p, until the pipe is read or closed. */
void gmem_pin(int pipe_fd, void *p);

/* Expect SIGBUS where a mapping of @fd approaches and exceeds the largest offset. */
void gmem_expect_nothing_beyond(int fd);

/* KVM_SET_MEMORY_ATTRIBUTES2.  Store its error_offset in @error, unless NULL. */
int gmem_convert(int fd, u64 offset, u64 size, u64 attributes, u64 *error);

/* Return why files cannot be converted here, or NULL. */
const char *gmem_conversion_unavailable(void);

/* Return the pfn of the page that this process has mapped at @p, or 0. */
u64 gmem_host_pfn(const void *p);

/* Merge huge pages in the conversion that allows it, until the test ends. */
#define GMEM_MERGE_DELAY	"/sys/module/kvm/parameters/gmem_merge_delay_ms"
void gmem_merge_at_once(void);

/* Return the number of lines in the trace that contain both strings. */
#define GMEM_TRACING	"/sys/kernel/tracing/"
int gmem_traced(const char *event, const char *what);

/*
 * Inject a memory error into a page, and remove it after the page has left its
 * file.  gmem_poison() and gmem_unpoison() return 0 or an errno.
 */
bool gmem_can_poison(void);
int gmem_poison(u64 pfn);
int gmem_unpoison(u64 pfn);

/*
 * Read a word from the guest until KVM_RUN fails.  Return its error, or 0 after
 * a timeout: memory_failure() can return before the guest's mapping is gone.
 */
int gmem_read_until_error(struct kvm_vcpu *vcpu, gpa_t gpa);

#endif /* SELFTEST_KVM_GMEM_GUEST_H */
