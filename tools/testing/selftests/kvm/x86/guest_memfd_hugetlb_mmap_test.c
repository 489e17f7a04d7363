// SPDX-License-Identifier: GPL-2.0-only
/*
 * Files on HugeTLB pages whose memory is always shared, for VMs without private memory.
 * The host maps it by 2 MiB where addresses allow it, and the guest by up to the size
 * of the huge page.
 */
#include <fcntl.h>
#include <sched.h>

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "../../../../../mm/gup_test.h"
#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define FLAGS		(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PATTERN		0x600d600d00000000ull

struct mmap_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	struct kvm_vcpu *victim;	/* for accesses that fail */
	size_t page_size;
	size_t size;
	int fd;
	int check;
	char *mem;
	long memmap;
	struct hugetlb_counters counters;
};

FIXTURE(mmap)
{
	struct mmap_test t;
};

FIXTURE_VARIANT(mmap)
{
	size_t page_size;
	long nr;
};

FIXTURE_VARIANT_ADD(mmap, 2m) { .page_size = SZ_2M, .nr = 4, };
FIXTURE_VARIANT_ADD(mmap, 1g) { .page_size = SZ_1G, .nr = 1, };

/* Sum up the counters in /proc/vmstat whose names begin with @name. */
static long read_vmstat(const char *name)
{
	FILE *file = fopen("/proc/vmstat", "r");
	char key[64];
	long val, sum = 0;

	TEST_ASSERT(file, "Can't open /proc/vmstat");
	while (fscanf(file, "%63s %ld", key, &val) == 2)
		if (!strncmp(key, name, strlen(name)))
			sum += val;
	fclose(file);
	return sum;
}

/* Return how many bytes of the mapping at @p are mapped by PMDs. */
static u64 pmd_mapped(const void *p)
{
	FILE *file = fopen("/proc/self/smaps", "r");
	unsigned long start, end, kb, sum = 0;
	bool found = false;
	char line[512];

	TEST_ASSERT(file, "Can't open smaps");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			found = (unsigned long)p >= start && (unsigned long)p < end;
		else if (found && (sscanf(line, "FilePmdMapped: %lu", &kb) == 1 ||
				   sscanf(line, "ShmemPmdMapped: %lu", &kb) == 1))
			sum += kb * SZ_1K;
	}
	fclose(file);
	return sum;
}

static void check(struct mmap_test *t)
{
	gmem_check(t->check, t->fd, true);
}

static u64 *word(struct mmap_test *t, u64 offset)
{
	return (u64 *)(t->mem + offset);
}

static void host_write_all(struct mmap_test *t)
{
	u64 i;

	for (i = 0; i < t->size; i += SZ_4K)
		WRITE_ONCE(*word(t, i), PATTERN + i);
}

static void host_check(void *p, u64 size, u64 value)
{
	u64 i;

	for (i = 0; i < size; i += SZ_4K)
		TEST_ASSERT_EQ(READ_ONCE(*(u64 *)(p + i)), value + i);
}

FIXTURE_SETUP(mmap)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct mmap_test *t = &self->t;
	struct kvm_vcpu *vcpus[2];

	if (reason)
		SKIP(return, "%s", reason);

	t->page_size = variant->page_size;
	t->size = variant->nr * variant->page_size;
	t->memmap = read_vmstat("nr_memmap");
	hugetlb_get(t->page_size, &t->counters);
	t->vm = gmem_vm_create_type(KVM_X86_DEFAULT_VM, 2, vcpus);
	t->vcpu = vcpus[0];
	t->victim = vcpus[1];
	t->fd = vm_create_guest_memfd(t->vm, t->size, gmem_flags(t->page_size) | FLAGS);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   t->size, NULL, t->fd, 0);
	t->mem = kvm_mmap(t->size, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	t->check = gmem_open_check(t->vm);
}

FIXTURE_TEARDOWN(mmap)
{
	struct mmap_test *t = &self->t;

	gmem_close_check(t->check);
	kvm_munmap(t->mem, t->size);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	hugetlb_expect_released(&t->counters, "after close");
	/* The pages' vmemmap is optimized again. */
	EXPECT_EQ(t->memmap, read_vmstat("nr_memmap"));
}

TEST_F_TIMEOUT(mmap, host_maps_by_2m, SLOW)
{
	struct mmap_test *t = &self->t;
	long faults = read_vmstat("thp_file_mapped");

	EXPECT_EQ(0, (unsigned long)t->mem % SZ_2M);
	host_write_all(t);
	check(t);
	EXPECT_EQ(t->size, pmd_mapped(t->mem));
	EXPECT_EQ(t->size / SZ_2M, read_vmstat("thp_file_mapped") - faults);
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, t->size, SZ_4K, PATTERN);
	gmem_guest_do(t->vcpu, GMEM_WRITE, GMEM_GPA, t->size, SZ_4K, ~PATTERN);
	host_check(t->mem, t->size, ~PATTERN);
}

TEST_F_TIMEOUT(mmap, guest_maps_by_what_is_contiguous, SLOW)
{
	struct mmap_test *t = &self->t;
	long nr = t->size / t->page_size, before_2m, before_1g;

	before_2m = vm_get_stat(t->vm, pages_2m);
	before_1g = vm_get_stat(t->vm, pages_1g);
	gmem_guest_do(t->vcpu, GMEM_CHECK_ZERO, GMEM_GPA, t->size, SZ_4K, 0);
	EXPECT_EQ(t->page_size == SZ_2M ? nr : 0, vm_get_stat(t->vm, pages_2m) - before_2m);
	EXPECT_EQ(t->page_size == SZ_1G ? nr : 0, vm_get_stat(t->vm, pages_1g) - before_1g);
	gmem_guest_do(t->vcpu, GMEM_WRITE, GMEM_GPA, t->size, SZ_4K, PATTERN);
	host_check(t->mem, t->size, PATTERN);
	check(t);
}

/* Map at addresses that allow no PMD mappings, or only some. */
TEST_F_TIMEOUT(mmap, host_maps_by_4k_elsewhere, SLOW)
{
	struct mmap_test *t = &self->t;
	char *area, *p;

	host_write_all(t);
	area = kvm_mmap(SZ_8M, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	p = align_ptr_up(area, SZ_2M) + SZ_4K;
	TEST_ASSERT(mmap(p, SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, t->fd,
			 0) == p, "mmap() failed: errno %d", errno);
	host_check(p, SZ_2M, PATTERN);
	EXPECT_EQ(0, pmd_mapped(p));
	kvm_munmap(area, SZ_8M);

	/* Map from the middle of one part to the middle of another. */
	area = __kvm_mmap(SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd, SZ_1M);
	host_check(area, SZ_2M, PATTERN + SZ_1M);
	EXPECT_EQ(0, pmd_mapped(area));
	kvm_munmap(area, SZ_2M);

	/* These 4 MiB contain one whole part. */
	area = __kvm_mmap(SZ_4M, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd, SZ_1M);
	host_check(area, SZ_4M, PATTERN + SZ_1M);
	EXPECT_EQ(SZ_2M, pmd_mapped(area));
	kvm_munmap(area, SZ_4M);
	check(t);
}

TEST_F_TIMEOUT(mmap, parts_of_mappings_change, SLOW)
{
	struct mmap_test *t = &self->t;
	char *area, *p;

	host_write_all(t);

	/* Each of these splits a PMD mapping. */
	area = kvm_mmap(SZ_4M, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	host_check(area, SZ_4M, PATTERN);
	EXPECT_EQ(SZ_4M, pmd_mapped(area));
	TEST_ASSERT(!munmap(area + SZ_4K, SZ_4K), "munmap() failed");
	TEST_ASSERT(!mprotect(area + SZ_8K, SZ_4K, PROT_READ), "mprotect() failed");
	TEST_ASSERT(!mprotect(area + SZ_2M + SZ_4K, SZ_4K, PROT_NONE), "mprotect() failed");
	host_check(area, SZ_4K, PATTERN);
	host_check(area + SZ_8K, SZ_2M - SZ_8K, PATTERN + SZ_8K);
	host_check(area + SZ_2M, SZ_4K, PATTERN + SZ_2M);
	host_check(area + SZ_2M + SZ_8K, SZ_2M - SZ_8K, PATTERN + SZ_2M + SZ_8K);
	TEST_ASSERT(!mprotect(area + SZ_2M + SZ_4K, SZ_4K, PROT_READ), "mprotect() failed");
	host_check(area + SZ_2M, SZ_2M, PATTERN + SZ_2M);

	p = kvm_mmap(SZ_512K, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	TEST_ASSERT(mremap(area + SZ_1M, SZ_512K, SZ_512K, MREMAP_MAYMOVE | MREMAP_FIXED,
			   p) == p, "mremap() failed: errno %d", errno);
	host_check(p, SZ_512K, PATTERN + SZ_1M);
	host_check(area + SZ_1M + SZ_512K, SZ_512K, PATTERN + SZ_1M + SZ_512K);
	kvm_munmap(p, SZ_512K);
	kvm_munmap(area, SZ_4M);
	host_check(t->mem, t->size, PATTERN);
	check(t);
}

TEST_F_TIMEOUT(mmap, fork, SLOW)
{
	struct mmap_test *t = &self->t;
	int status;
	pid_t pid;

	host_write_all(t);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed");
	if (!pid) {
		/* The child shares the memory and has no copy. */
		host_check(t->mem, t->size, PATTERN);
		WRITE_ONCE(*word(t, SZ_4K), 1);
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The child failed");
	EXPECT_EQ(1, READ_ONCE(*word(t, SZ_4K)));
	check(t);
}

/* A punched range reads as zeros in all mappings. */
TEST_F_TIMEOUT(mmap, punch, SLOW)
{
	struct mmap_test *t = &self->t;
	struct hugetlb_counters before;

	hugetlb_get(t->page_size, &before);
	host_write_all(t);
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, t->size, SZ_4K, PATTERN);
	hugetlb_expect(&before, -(t->size / t->page_size), -(t->size / t->page_size),
		       "all of the file is there");
	EXPECT_EQ(-1, fallocate(t->fd, PUNCH_HOLE, 0, SZ_4K));
	EXPECT_EQ(EINVAL, errno);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	EXPECT_EQ(0, gmem_blocks(t->fd));
	hugetlb_expect_released(&before, "after punching");
	EXPECT_EQ(0, READ_ONCE(*word(t, SZ_2M - SZ_4K)));
	gmem_guest_do(t->vcpu, GMEM_CHECK_ZERO, GMEM_GPA, t->size, SZ_4K, 0);
	check(t);
}

TEST_F_TIMEOUT(mmap, punched_while_pinned, SLOW)
{
	struct mmap_test *t = &self->t;
	struct hugetlb_counters before;
	int fds[2];
	u64 val;

	hugetlb_get(t->page_size, &before);
	TEST_ASSERT(!pipe(fds), "pipe() failed");
	host_write_all(t);
	EXPECT_EQ(0, hugetlb_read(t->page_size, "waiting_hugepages"));
	gmem_pin(fds[1], word(t, SZ_1M));
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	hugetlb_expect(&before, -1, -1, "while one page is in use");
	EXPECT_EQ(1, hugetlb_read(t->page_size, "waiting_hugepages"));
	TEST_ASSERT_EQ(read(fds[0], &val, sizeof(val)), sizeof(val));
	EXPECT_EQ(PATTERN + SZ_1M, val);
	hugetlb_expect_released(&before, "after it is not in use any more");
	EXPECT_EQ(0, hugetlb_read(t->page_size, "waiting_hugepages"));
	kvm_close(fds[0]);
	kvm_close(fds[1]);
}

/* GUP can pin any page of a large folio. */
TEST_F_TIMEOUT(mmap, kernel_gets_pages, SLOW)
{
	struct pin_longterm_test args = { .flags = PIN_LONGTERM_TEST_FLAG_USE_WRITE };
	struct mmap_test *t = &self->t;
	u64 buf[3] = {};
	struct iovec local = { buf, sizeof(buf) };
	struct iovec remote = { word(t, SZ_1M), sizeof(buf) };
	int fd;

	host_write_all(t);
	TEST_ASSERT_EQ(process_vm_readv(getpid(), &local, 1, &remote, 1, 0), sizeof(buf));
	EXPECT_EQ(PATTERN + SZ_1M, buf[0]);
	buf[0] = 1;
	TEST_ASSERT_EQ(process_vm_writev(getpid(), &local, 1, &remote, 1, 0), sizeof(buf));
	EXPECT_EQ(1, READ_ONCE(*word(t, SZ_1M)));
	check(t);

	fd = open("/sys/kernel/debug/gup_test", O_RDWR);
	if (fd < 0) {
		gmem_left_out("long-term pins", "CONFIG_GUP_TEST and debugfs");
		return;
	}
	args.addr = (u64)t->mem;
	args.size = t->size;
	TEST_ASSERT(!ioctl(fd, PIN_LONGTERM_TEST_START, &args), "Can't pin: errno %d", errno);
	EXPECT_EQ(1, READ_ONCE(*word(t, SZ_1M)));
	TEST_ASSERT(!ioctl(fd, PIN_LONGTERM_TEST_STOP), "Can't unpin");
	kvm_close(fd);
	check(t);
}

/* An error makes exactly one part inaccessible. */
TEST_F_TIMEOUT(mmap, memory_error, SLOW)
{
	struct mmap_test *t = &self->t;
	u64 pfn;

	if (!gmem_can_poison())
		SKIP(return, "needs CONFIG_HWPOISON_INJECT and debugfs");

	host_write_all(t);
	pfn = gmem_host_pfn(word(t, SZ_2M + SZ_8K));
	ASSERT_NE(0, pfn);
	ASSERT_EQ(0, gmem_poison(pfn));
	EXPECT_EQ(-EHWPOISON, gmem_read_until_error(t->victim, GMEM_GPA + SZ_2M + SZ_8K));
	TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, SZ_2M + SZ_8K)));
	TEST_EXPECT_SIGBUS(READ_ONCE(*word(t, SZ_2M)));
	host_check(t->mem, SZ_2M, PATTERN);
	host_check(t->mem + SZ_4M, t->size - SZ_4M, PATTERN + SZ_4M);
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, SZ_2M, SZ_4K, PATTERN);
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA + SZ_4M, t->size - SZ_4M, SZ_4K,
		      PATTERN + SZ_4M);
	/*
	 * Unpoison only after the page has left the file, and by the head page's pfn.
	 */
	EXPECT_EQ(EBUSY, gmem_unpoison(pfn));
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	ASSERT_EQ(0, gmem_unpoison(pfn & ~(t->page_size / SZ_4K - 1)));
}

TEST_F_TIMEOUT(mmap, nothing_is_beyond_the_file, SLOW)
{
	gmem_expect_nothing_beyond(self->t.fd);
}

/* The guest accesses the file, whatever is mapped at the slot's userspace address. */
TEST_F_TIMEOUT(mmap, neighbors_are_the_files, SLOW)
{
	struct mmap_test *t = &self->t;
	const gpa_t gpa = GMEM_GPA + GMEM_WINDOW - SZ_1G;
	const u64 size = 64 * SZ_4K;
	char *elsewhere = kvm_mmap(size, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1);
	int fd = vm_create_guest_memfd(t->vm, size, FLAGS), i;

	memset(elsewhere, 0xee, size);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT + 1, KVM_MEM_GUEST_MEMFD, gpa, size,
				   elsewhere, fd, 0);
	gmem_guest_do(t->vcpu, GMEM_WRITE, gpa, size, SZ_4K, PATTERN);

	/* The pages are allocated now, but no longer mapped in the guest. */
	gmem_delete_slot(t->vm, GMEM_SLOT + 1);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT + 1, KVM_MEM_GUEST_MEMFD, gpa, size,
				   elsewhere, fd, 0);
	gmem_guest_do(t->vcpu, GMEM_CHECK, gpa, size, SZ_4K, PATTERN);
	for (i = 0; i < size; i++)
		TEST_ASSERT_EQ((u8)elsewhere[i], 0xee);
	kvm_munmap(elsewhere, size);
	kvm_close(fd);
}

/* A file that the host cannot map keeps its huge pages whole. */
TEST_F_TIMEOUT(mmap, file_without_mmap, SLOW)
{
	struct mmap_test *t = &self->t;
	int fd;

	if (hugetlb_available(t->page_size) < 1)
		SKIP(return, "needs one more page");

	fd = vm_create_guest_memfd(t->vm, t->page_size, gmem_flags(t->page_size));
	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, t->page_size);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, SZ_4K, PROT_READ, MAP_SHARED, fd, 0));
	EXPECT_EQ(ENODEV, errno);
	EXPECT_EQ(t->memmap, read_vmstat("nr_memmap"));
	gmem_check(t->check, fd, true);
	kvm_close(fd);
}

int main(int argc, char *argv[])
{
	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
