// SPDX-License-Identifier: GPL-2.0-only
/*
 * VMs whose private memory is a guest_memfd file, and guest code that accesses
 * it on command.
 */
#include <fcntl.h>

#include <sys/uio.h>

#include "gmem_guest.h"

static struct gmem_command commands[GMEM_MAX_VCPUS];
static u64 scratch;
/* Tests change the setting while they have a file open for checks. */
static bool pool_is_optimized;

static void guest_do_one(const struct gmem_command *c)
{
	u64 offset, want;

	for (offset = 0; offset < c->size; offset += c->stride) {
		u64 *p = (u64 *)(c->gpa + offset);

		want = c->op == GMEM_CHECK_ZERO ? 0 : c->value + offset;

		switch (c->op) {
		case GMEM_READ:
			READ_ONCE(*p);
			break;
		case GMEM_WRITE:
			WRITE_ONCE(*p, want);
			break;
		case GMEM_EXEC:
			((void (*)(void))p)();
			break;
		default:
			__GUEST_ASSERT(READ_ONCE(*p) == want,
				       "gpa 0x%lx holds 0x%lx, not 0x%lx",
				       c->gpa + offset, READ_ONCE(*p), want);
		}
	}
}

static void guest_code(u64 id)
{
	struct gmem_command c;

	for (;;) {
		memcpy(&c, &commands[id], sizeof(c));
		if (c.op == GMEM_CALL)
			c.fn(c.args[0], c.args[1], c.args[2], c.args[3]);
		else
			guest_do_one(&c);
		GUEST_SYNC(c.op);
	}
}

struct kvm_vm *gmem_vm_create_type(int type, int nr_vcpus, struct kvm_vcpu *vcpus[])
{
	const struct vm_shape shape = {
		.mode = VM_MODE_DEFAULT,
		.type = type,
	};
	struct kvm_vm *vm;
	enum gmem_op op;
	int i, level;

	TEST_ASSERT(nr_vcpus <= GMEM_MAX_VCPUS, "Too many vCPUs");
	vm = __vm_create_with_vcpus(shape, nr_vcpus, 0, guest_code, vcpus);

	level = kvm_cpu_has(X86_FEATURE_GBPAGES) ? PG_LEVEL_1G : PG_LEVEL_2M;
	virt_map_level(vm, GMEM_GPA, GMEM_GPA, GMEM_WINDOW, level);

	/* Fault in the guest's code and data before tests count mappings. */
	for (i = 0; i < nr_vcpus; i++) {
		vcpu_args_set(vcpus[i], 1, (u64)i);
		for (op = GMEM_READ; op <= GMEM_CHECK_ZERO; op++)
			gmem_guest_do(vcpus[i], op, (gva_t)&scratch, 8, 8, 0);
	}
	return vm;
}

struct kvm_vm *gmem_vm_create(int nr_vcpus, struct kvm_vcpu *vcpus[])
{
	return gmem_vm_create_type(KVM_X86_SW_PROTECTED_VM, nr_vcpus, vcpus);
}

void gmem_vm_set_attributes(struct kvm_vm *vm, gpa_t gpa, u64 size, u64 attributes)
{
	if (!kvm_converts_in_place())
		vm_set_memory_attributes(vm, gpa, size, attributes);
}

void gmem_add_slot(struct kvm_vm *vm, u32 slot, gpa_t gpa, u64 size, int fd,
		   u64 offset)
{
	vm_set_user_memory_region2(vm, slot, KVM_MEM_GUEST_MEMFD, gpa, size,
				   NULL, fd, offset);
	gmem_vm_set_attributes(vm, gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE);
}

void gmem_delete_slot(struct kvm_vm *vm, u32 slot)
{
	vm_set_user_memory_region2(vm, slot, KVM_MEM_GUEST_MEMFD, 0, 0, NULL,
				   -1, 0);
}

int gmem_guest_run(struct kvm_vcpu *vcpu)
{
	struct ucall uc;
	int r;

	do {
		r = __vcpu_run(vcpu);
	} while (r && errno == EINTR);
	if (r)
		return -errno;

	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		return 0;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
	default:
		TEST_FAIL("Unexpected exit %u (%s)", vcpu->run->exit_reason,
			  exit_reason_str(vcpu->run->exit_reason));
	}
}

static void set_command(struct kvm_vcpu *vcpu, const struct gmem_command *c)
{
	memcpy(addr_gva2hva(vcpu->vm, (gva_t)&commands[vcpu->id]), c, sizeof(*c));
}

void gmem_guest_set_call(struct kvm_vcpu *vcpu, void *fn, u64 a, u64 b, u64 c,
			 u64 d)
{
	const struct gmem_command cmd = {
		.op = GMEM_CALL, .fn = fn, .args = { a, b, c, d },
	};

	set_command(vcpu, &cmd);
}

void gmem_guest_set(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		    u64 stride, u64 value)
{
	const struct gmem_command cmd = {
		.op = op, .gpa = gpa, .size = size, .stride = stride,
		.value = value,
	};

	set_command(vcpu, &cmd);
}

int __gmem_guest_do(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		    u64 stride, u64 value)
{
	gmem_guest_set(vcpu, op, gpa, size, stride, value);
	return gmem_guest_run(vcpu);
}

void gmem_guest_do(struct kvm_vcpu *vcpu, enum gmem_op op, gpa_t gpa, u64 size,
		   u64 stride, u64 value)
{
	int r = __gmem_guest_do(vcpu, op, gpa, size, stride, value);

	TEST_ASSERT(!r, "KVM_RUN at gpa 0x%lx failed: %s, exit %u (%s), memory fault at 0x%llx",
		    gpa, strerror(-r), vcpu->run->exit_reason,
		    exit_reason_str(vcpu->run->exit_reason),
		    vcpu->run->memory_fault.gpa);
}

int gmem_open_debugfs(struct kvm_vm *vm, const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/kernel/debug/kvm/%d-%d/%s", getpid(), vm->fd,
		 name);
	return open(path, O_WRONLY);
}

int gmem_populate(struct kvm_vm *vm, gpa_t gpa, long nr, void *src)
{
	char cmd[128];
	int fd, len, r;

	fd = gmem_open_debugfs(vm, "gmem_populate");
	if (fd < 0)
		return -ENOENT;

	len = snprintf(cmd, sizeof(cmd), "0x%lx %ld 0x%lx\n", gpa >> 12, nr,
		       (unsigned long)src);
	r = write(fd, cmd, len) == len ? 0 : -errno;
	close(fd);
	return r;
}

bool gmem_can_populate(struct kvm_vm *vm)
{
	return gmem_populate(vm, 0, 0, NULL) != -ENOENT;
}

int gmem_open_optional(struct kvm_vm *vm, const char *name, const char *what)
{
	int fd = gmem_open_debugfs(vm, name);

	if (fd < 0) {
		TEST_ASSERT(errno == ENOENT, "Can't open %s in debugfs", name);
		gmem_left_out(what, "CONFIG_KVM_GMEM_TEST and debugfs");
	}
	return fd;
}

int gmem_open_check(struct kvm_vm *vm)
{
	pool_is_optimized = hugetlb_is_optimized();
	return gmem_open_optional(vm, "gmem_check", "the check of folios");
}

void gmem_check(int check, int fd, bool optimized)
{
	char cmd[32];
	int len;

	if (check < 0)
		return;

	len = snprintf(cmd, sizeof(cmd), "%d %d", fd, optimized && pool_is_optimized);
	TEST_ASSERT(write(check, cmd, len) == len,
		    "Folios are not what they have to be: errno %d (%s)", errno,
		    strerror(errno));
}

void gmem_close_check(int check)
{
	if (check >= 0)
		kvm_close(check);
}

void gmem_pin(int pipe_fd, void *p)
{
	struct iovec iov = { .iov_base = p, .iov_len = sizeof(u64) };

	TEST_ASSERT(vmsplice(pipe_fd, &iov, 1, 0) == sizeof(u64), "vmsplice() failed");
}

/* mmap() refuses such offsets, but mremap() can extend a mapping to them. */
void gmem_expect_nothing_beyond(int fd)
{
	const u64 offset = (1ull << 63) - 2 * SZ_4K, nr_pages = 4;
	char *p = mmap(NULL, SZ_4K, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
	int i;

	TEST_ASSERT(p != MAP_FAILED, "mmap() failed");
	p = mremap(p, SZ_4K, nr_pages * SZ_4K, MREMAP_MAYMOVE);
	TEST_ASSERT(p != MAP_FAILED, "mremap() failed");
	for (i = 0; i < nr_pages; i++)
		TEST_EXPECT_SIGBUS(READ_ONCE(p[i * SZ_4K]));
	kvm_munmap(p, nr_pages * SZ_4K);
}

int gmem_convert(int fd, u64 offset, u64 size, u64 attributes, u64 *error)
{
	struct kvm_memory_attributes2 attrs = {
		.offset = offset,
		.size = size,
		.attributes = attributes,
		.error_offset = -1ull,
	};
	int r = ioctl(fd, KVM_SET_MEMORY_ATTRIBUTES2, &attrs);

	if (error)
		*error = attrs.error_offset;
	return r;
}

const char *gmem_conversion_unavailable(void)
{
	if (!kvm_converts_in_place())
		return "kvm.gmem_in_place_conversion is off";

	/* The memory of other VMs is encrypted, or always shared. */
	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		return "needs CONFIG_KVM_SW_PROTECTED_VM";

	return NULL;
}

u64 gmem_host_pfn(const void *p)
{
	u64 entry;
	int fd;

	fd = open_path_or_exit("/proc/self/pagemap", O_RDONLY);
	TEST_ASSERT_EQ(pread(fd, &entry, 8, (uintptr_t)p / getpagesize() * 8), 8);
	kvm_close(fd);
	return entry >> 63 ? entry & GENMASK_ULL(54, 0) : 0;
}

#define HWPOISON	"/sys/kernel/debug/hwpoison"

static int write_pfn(const char *path, u64 pfn)
{
	char buf[32];
	int fd, r, len = snprintf(buf, sizeof(buf), "0x%lx", pfn);

	fd = open_path_or_exit(path, O_WRONLY);
	r = write(fd, buf, len) == len ? 0 : errno;
	kvm_close(fd);
	return r;
}

static long merge_delay;
static pid_t merge_delay_read_by;

static void restore_merge_delay(void)
{
	/* Children inherit the handler. */
	if (getpid() == merge_delay_read_by)
		write_number(GMEM_MERGE_DELAY, merge_delay);
}

void gmem_merge_at_once(void)
{
	/* There is no delay without huge pages that split. */
	if (!read_number(GMEM_MERGE_DELAY, NULL, &merge_delay))
		return;

	merge_delay_read_by = getpid();
	atexit(restore_merge_delay);
	write_number(GMEM_MERGE_DELAY, 0);
}

int gmem_traced(const char *event, const char *what)
{
	FILE *file = fopen(GMEM_TRACING "trace", "r");
	char line[512];
	int nr = 0;

	TEST_ASSERT(file, "Can't open the trace");
	while (fgets(line, sizeof(line), file))
		nr += strstr(line, event) && strstr(line, what);
	fclose(file);
	return nr;
}

bool gmem_can_poison(void)
{
	return !access(HWPOISON "/corrupt-pfn", W_OK) &&
	       !access(HWPOISON "/unpoison-pfn", W_OK);
}

int gmem_poison(u64 pfn)
{
	return write_pfn(HWPOISON "/corrupt-pfn", pfn);
}

int gmem_unpoison(u64 pfn)
{
	return write_pfn(HWPOISON "/unpoison-pfn", pfn);
}

int gmem_read_until_error(struct kvm_vcpu *vcpu, gpa_t gpa)
{
	int i, r;

	for (i = 0; i < 1000; i++) {
		r = __gmem_guest_do(vcpu, GMEM_READ, gpa, 8, 8, 0);
		if (r)
			return r;
		usleep(10 * 1000);
	}
	return 0;
}
