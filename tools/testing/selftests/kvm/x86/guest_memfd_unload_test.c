// SPDX-License-Identifier: GPL-2.0-only
/*
 * Unload KVM while pages that its files had are in use.  The pages must return to their
 * pool without KVM.  An inode in use must keep KVM loaded.
 */
#include <fcntl.h>
#include <unistd.h>

#include <sys/mman.h>
#include <sys/wait.h>

#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "test_util.h"

#define PATTERN		0x600d600d00000000ull

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		120

FIXTURE(unload)
{
	struct hugetlb_counters counters;
	const char *vendor;
	int pipe[2];
};

FIXTURE_VARIANT(unload)
{
	size_t page_size;
	bool converts;
};

FIXTURE_VARIANT_ADD(unload, 2m) { .page_size = SZ_2M, .converts = true, };
FIXTURE_VARIANT_ADD(unload, 2m_shared) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(unload, 1g) { .page_size = SZ_1G, .converts = true, };
FIXTURE_VARIANT_ADD(unload, 1g_shared) { .page_size = SZ_1G, };

static bool is_module(const char *name)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/module/%s/initstate", name);
	return !access(path, F_OK);
}

static bool probe(const char *options, const char *name)
{
	char cmd[64];

	snprintf(cmd, sizeof(cmd), "modprobe %s %s", options, name);
	return !system(cmd);
}

/* Retry: an inode keeps its module loaded until a moment after the file was closed. */
static bool unload(const char *name)
{
	int i;

	for (i = 0; i < 1000 && is_module(name); i++) {
		if (!probe("-r", name))
			usleep(10 * 1000);
	}
	return !is_module(name);
}

FIXTURE_SETUP(unload)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);
	reason = variant->converts ? gmem_conversion_unavailable() : NULL;
	if (reason)
		SKIP(return, "%s", reason);

	self->vendor = is_module("kvm_amd") ? "kvm_amd" : "kvm_intel";
	TEST_ASSERT(!pipe(self->pipe), "pipe() failed");
	hugetlb_get(variant->page_size, &self->counters);
}

FIXTURE_TEARDOWN(unload)
{
	TEST_ASSERT(probe("", self->vendor), "Can't load %s again", self->vendor);
	kvm_close(self->pipe[0]);
	kvm_close(self->pipe[1]);
}

/* Leave nothing but a page in the pipe when the process exits. */
static void use_page(int pipe_fd, size_t page_size, bool converts)
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	char *mem;
	int fd;

	vm = gmem_vm_create_type(converts ? KVM_X86_SW_PROTECTED_VM : KVM_X86_DEFAULT_VM, 1,
				 &vcpu);
	fd = vm_create_guest_memfd(vm, page_size, gmem_flags(page_size) |
				   GUEST_MEMFD_FLAG_MMAP |
				   (converts ? 0 : GUEST_MEMFD_FLAG_INIT_SHARED));
	vm_set_user_memory_region2(vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA, page_size,
				   NULL, fd, 0);
	if (converts)
		TEST_ASSERT(!gmem_convert(fd, SZ_4K, SZ_4K, 0, NULL), "no conversion: errno %d",
			    errno);
	gmem_guest_do(vcpu, GMEM_WRITE, GMEM_GPA + SZ_4K, 8, 8, PATTERN);
	mem = __kvm_mmap(SZ_4K, PROT_READ | PROT_WRITE, MAP_SHARED, fd, SZ_4K);
	gmem_pin(pipe_fd, mem);
}

TEST_F_TIMEOUT(unload, while_page_is_in_use, SLOW)
{
	u64 val = 0;
	int status;
	pid_t pid;

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork() failed");
	if (!pid) {
		use_page(self->pipe[1], variant->page_size, variant->converts);
		_exit(0);
	}
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status, "The process failed");
	EXPECT_EQ(1, hugetlb_read(variant->page_size, "waiting_hugepages"));

	ASSERT_TRUE(unload(self->vendor));
	ASSERT_TRUE(unload("kvm"));
	EXPECT_EQ(1, hugetlb_read(variant->page_size, "waiting_hugepages"));
	hugetlb_expect(&self->counters, -1, 0, "while the page is in use");
	EXPECT_EQ(sizeof(val), read(self->pipe[0], &val, sizeof(val)));
	EXPECT_EQ(PATTERN, val);
	hugetlb_expect_released(&self->counters, "after it is not in use any more");
	EXPECT_EQ(0, hugetlb_read(variant->page_size, "waiting_hugepages"));
}

/* An O_PATH descriptor keeps only the inode, which needs KVM when it is freed. */
TEST_F_TIMEOUT(unload, while_there_is_a_path, SLOW)
{
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm;
	char path[32];
	int fd, path_fd;

	vm = gmem_vm_create_type(KVM_X86_DEFAULT_VM, 1, &vcpu);
	fd = vm_create_guest_memfd(vm, variant->page_size, gmem_flags(variant->page_size) |
				   GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
	kvm_fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, variant->page_size);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	path_fd = open_path_or_exit(path, O_PATH);
	kvm_close(fd);
	kvm_vm_free(vm);

	hugetlb_expect(&self->counters, -1, 0, "while there is a path");
	EXPECT_FALSE(probe("-r", self->vendor));
	EXPECT_TRUE(is_module(self->vendor));
	kvm_close(path_fd);
	hugetlb_expect_released(&self->counters, "after there is none");
	EXPECT_TRUE(unload(self->vendor));
}

int main(int argc, char *argv[])
{
	__TEST_REQUIRE(is_module("kvm"), "needs CONFIG_KVM=m");

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
