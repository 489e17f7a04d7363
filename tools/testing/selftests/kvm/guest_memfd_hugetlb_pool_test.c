// SPDX-License-Identifier: GPL-2.0-only
/*
 * guest_memfd files on HugeTLB pages: charges to cgroups, changes of the pool
 * size and NUMA policies.
 */
#include <fcntl.h>
#include <sched.h>

#include <sys/mount.h>
#include <sys/uio.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "cgroup_util.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "numaif.h"
#include "test_util.h"

#define PUNCH_HOLE		(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ALLOCATE		FALLOC_FL_KEEP_SIZE

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW			300

/*
 * Run each test in a cgroup of its own, which is removed even if the test
 * fails.
 */
FIXTURE(cgroup)
{
	struct kvm_vm *vm;
	size_t page_size;
	bool accounting;
	struct hugetlb_counters before;
};

FIXTURE_VARIANT(cgroup)
{
	size_t page_size;
};

FIXTURE_VARIANT_ADD(cgroup, 2m) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(cgroup, 1g) { .page_size = SZ_1G, };

FIXTURE_SETUP(cgroup)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	if (access(CGROUP_MOUNT "/cgroup.controllers", R_OK))
		SKIP(return, "no cgroup2 at " CGROUP_MOUNT);

	self->accounting = hugetlb_cgroup_get_accounting();
	if (!hugetlb_cgroup_enter("gmem_test"))
		SKIP(return, HUGETLB_NO_CGROUP);

	self->vm = gmem_vm_create_barebones();
	self->page_size = variant->page_size;
	hugetlb_get(self->page_size, &self->before);
}

/* Run in the parent, which outlives a failed test and is not in the cgroup. */
FIXTURE_TEARDOWN_PARENT(cgroup)
{
	rmdir(CGROUP_MOUNT "/gmem_test");
	if (hugetlb_cgroup_get_accounting() != self->accounting)
		hugetlb_cgroup_set_accounting(self->accounting);
}

TEST_F_TIMEOUT(cgroup, reservation_is_charged, SLOW)
{
	long page = self->page_size;
	int fd;

	fd = vm_create_guest_memfd(self->vm, 2 * page, gmem_flags(page));
	EXPECT_EQ(2 * page, hugetlb_cgroup_read(page, "rsvd.current"));
	EXPECT_EQ(0, hugetlb_cgroup_read(page, "current"));
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed");
	EXPECT_EQ(0, hugetlb_cgroup_read(page, "rsvd.current"));
}

TEST_F_TIMEOUT(cgroup, reservation_limit_is_kept, SLOW)
{
	long page = self->page_size;
	char limit[24];
	int fd;

	snprintf(limit, sizeof(limit), "%ld", page);
	hugetlb_cgroup_write(page, "rsvd.max", limit);
	gmem_expect_full(self->vm, page, 2, "more than rsvd.max");
	fd = vm_create_guest_memfd(self->vm, page, gmem_flags(page));
	gmem_expect_full(self->vm, page, 1, "rsvd.max reached");
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed");
	fd = vm_create_guest_memfd(self->vm, page, gmem_flags(page));
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed again");
}

TEST_F_TIMEOUT(cgroup, pool_too_small_leaves_nothing_charged, SLOW)
{
	gmem_expect_full(self->vm, self->page_size,
			 hugetlb_available(self->page_size) + 1,
			 "one page too many, in a cgroup");
}

TEST_F_TIMEOUT(cgroup, use_limit_is_kept, SLOW)
{
	long page = self->page_size;
	int fd, r;

	hugetlb_cgroup_write(page, "max", "0");
	fd = vm_create_guest_memfd(self->vm, 2 * page, gmem_flags(page));
	r = fallocate(fd, ALLOCATE, 0, page);
	EXPECT_TRUE(r < 0 && gmem_is_full(errno)) {
		TH_LOG("fallocate() returned %d, errno %d (%s)", r, errno, strerror(errno));
	}
	hugetlb_expect(&self->before, 0, 2, "use refused by the cgroup");
	EXPECT_EQ(0, gmem_blocks(fd));

	if (page < SZ_1G) {
		hugetlb_cgroup_write(page, "max", "max");
		kvm_fallocate(fd, ALLOCATE, 0, page);
		hugetlb_expect(&self->before, -1, 1, "used after the limit was raised");
	}
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed");
}

/* A removed cgroup does not wait for pages: their charges move to the parent. */
TEST_F_TIMEOUT(cgroup, cgroup_can_go_before_its_pages, SLOW)
{
	long page = self->page_size;
	int fd;

	/* Wait until the cgroups of other tests are freed. */
	ASSERT_EQ(0, hugetlb_cgroup_wait_for_dying(0));

	fd = vm_create_guest_memfd(self->vm, 2 * page, gmem_flags(page));
	kvm_fallocate(fd, ALLOCATE, 0, page);

	/*
	 * A worker takes the cgroup offline, which must complete, and moves the
	 * charge for the page to the parent.  The charge for the reservation
	 * keeps the cgroup until the file is closed.
	 */
	hugetlb_cgroup_leave();
	ASSERT_EQ(0, hugetlb_cgroup_remove());
	ASSERT_EQ(1, hugetlb_cgroup_wait_for_dying(1));

	hugetlb_get(page, &self->before);
	kvm_fallocate(fd, PUNCH_HOLE, 0, page);
	hugetlb_expect(&self->before, 1, 1, "punched after the cgroup was removed");
	kvm_close(fd);
	hugetlb_expect(&self->before, 1, -1, "closed after the cgroup was removed");

	EXPECT_EQ(0, hugetlb_cgroup_wait_for_dying(0)) {
		TH_LOG("the removed cgroup is still held");
	}
}

/* Slab and per-CPU stock make memory.current fluctuate. */
#define MEMCG_SLACK	SZ_1M

TEST_F_TIMEOUT(cgroup, memory_is_charged_with_memory_hugetlb_accounting, SLOW)
{
	long page = self->page_size, charged;
	int fd;

	hugetlb_cgroup_set_accounting(true);
	hugetlb_get(page, &self->before);
	ASSERT_EQ(0, self->before.val[HUGETLB_CG_MEMORY]);

	charged = cg_read_long(hugetlb_cgroup_path(), "memory.current");
	fd = vm_create_guest_memfd(self->vm, 2 * page, gmem_flags(page));
	kvm_fallocate(fd, ALLOCATE, 0, page);
	charged = cg_read_long(hugetlb_cgroup_path(), "memory.current") - charged;
	EXPECT_LT(labs(charged - page), MEMCG_SLACK) {
		TH_LOG("memory.current grew by %ld, not by one page", charged);
	}
	hugetlb_expect(&self->before, -1, 1, "memory.stat tells of one page");

	charged = cg_read_long(hugetlb_cgroup_path(), "memory.current");
	kvm_fallocate(fd, PUNCH_HOLE, 0, page);
	charged -= cg_read_long(hugetlb_cgroup_path(), "memory.current");
	EXPECT_LT(labs(charged - page), MEMCG_SLACK) {
		TH_LOG("memory.current fell by %ld, not by one page", charged);
	}
	hugetlb_expect(&self->before, 0, 2, "memory.stat tells of the punch");
	kvm_close(fd);
	hugetlb_expect_released(&self->before, "closed");
}

TEST_F_TIMEOUT(cgroup, memory_limit_is_kept_with_memory_hugetlb_accounting, SLOW)
{
	long page = self->page_size, limit;
	int fd, r;

	hugetlb_cgroup_set_accounting(true);
	fd = vm_create_guest_memfd(self->vm, page, gmem_flags(page));
	hugetlb_get(page, &self->before);

	limit = cg_read_long(hugetlb_cgroup_path(), "memory.current") + page / 2;
	ASSERT_EQ(0, cg_write_numeric(hugetlb_cgroup_path(), "memory.max", limit));
	r = fallocate(fd, ALLOCATE, 0, page);
	EXPECT_TRUE(r < 0 && gmem_is_full(errno)) {
		TH_LOG("fallocate() returned %d, errno %d (%s)", r, errno, strerror(errno));
	}
	hugetlb_expect(&self->before, 0, 0, "refused by memory.max");
	EXPECT_EQ(0, gmem_blocks(fd));

	if (page < SZ_1G) {
		ASSERT_EQ(0, cg_write(hugetlb_cgroup_path(), "memory.max", "max"));
		kvm_fallocate(fd, ALLOCATE, 0, page);
		hugetlb_expect(&self->before, -1, -1, "allocated without a limit");
	}
	kvm_close(fd);
}

TEST_F_TIMEOUT(cgroup, memory_is_not_charged_otherwise, SLOW)
{
	long page = self->page_size, charged;
	int fd;

	if (page == SZ_1G)
		SKIP(return, "would clear 2 GiB, on the way that 4 MiB go as well");

	hugetlb_cgroup_set_accounting(false);
	charged = cg_read_long(hugetlb_cgroup_path(), "memory.current");
	fd = vm_create_guest_memfd(self->vm, 2 * page, gmem_flags(page));
	kvm_fallocate(fd, ALLOCATE, 0, 2 * page);
	charged = cg_read_long(hugetlb_cgroup_path(), "memory.current") - charged;
	EXPECT_LT(labs(charged), MEMCG_SLACK) {
		TH_LOG("memory.current changed by %ld", charged);
	}
	kvm_close(fd);
}

/*
 * Resize the pool under a file.  Use 2 MiB pages only: 1 GiB pages that have
 * left the pool may not be available again.
 */
FIXTURE(pool)
{
	struct kvm_vm *vm;
	struct hugetlb_counters before;
	int fd;
};

#define POOL_PAGES	8l

FIXTURE_SETUP(pool)
{
	const char *reason = gmem_unavailable(SZ_2M);

	if (reason)
		SKIP(return, "%s", reason);

	self->vm = gmem_vm_create_barebones();
	hugetlb_get(SZ_2M, &self->before);
	self->fd = vm_create_guest_memfd(self->vm, POOL_PAGES * SZ_2M,
					 gmem_flags(SZ_2M));

	/* Reserved pages cannot be removed from the pool: they become surplus. */
	hugetlb_write(SZ_2M, "nr_hugepages", 0);
	ASSERT_EQ(POOL_PAGES, hugetlb_read(SZ_2M, "nr_hugepages"));
	ASSERT_EQ(POOL_PAGES, hugetlb_read(SZ_2M, "resv_hugepages"));
}

FIXTURE_TEARDOWN(pool)
{
	kvm_vm_free(self->vm);
	EXPECT_EQ(HUGETLB_POOL_2M, hugetlb_pool_set(SZ_2M, HUGETLB_POOL_2M));
	hugetlb_expect_released(&self->before, "pool restored");
}

TEST_F_TIMEOUT(pool, reservation_survives_a_shrunk_pool, SLOW)
{
	kvm_fallocate(self->fd, ALLOCATE, 0, POOL_PAGES * SZ_2M);
	EXPECT_EQ(POOL_PAGES, hugetlb_read(SZ_2M, "nr_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "free_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "resv_hugepages"));

	kvm_close(self->fd);
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "nr_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "free_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "resv_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "surplus_hugepages"));
}

TEST_F_TIMEOUT(pool, shrunk_pool_can_grow_again, SLOW)
{
	kvm_fallocate(self->fd, ALLOCATE, 0, SZ_2M);
	hugetlb_pool_set(SZ_2M, HUGETLB_POOL_2M);
	hugetlb_expect(&self->before, -1, POOL_PAGES - 1, "pool grown again");
	kvm_close(self->fd);
}

TEST_F_TIMEOUT(pool, unused_reservation_of_a_shrunk_pool_goes_at_close, SLOW)
{
	kvm_close(self->fd);
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "nr_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "resv_hugepages"));
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "surplus_hugepages"));
}

/* A punch returns the page to the file's reservation, not to the system. */
TEST_F_TIMEOUT(pool, punch_keeps_the_reservation_of_a_shrunk_pool, SLOW)
{
	kvm_fallocate(self->fd, ALLOCATE, 0, POOL_PAGES * SZ_2M);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, POOL_PAGES * SZ_2M);
	EXPECT_EQ(POOL_PAGES, hugetlb_read(SZ_2M, "resv_hugepages"));
	EXPECT_EQ(POOL_PAGES, hugetlb_read(SZ_2M, "free_hugepages"));
	EXPECT_EQ(0, fallocate(self->fd, ALLOCATE, 0, POOL_PAGES * SZ_2M)) {
		TH_LOG("the reserved pages are gone: errno %d (%s)", errno, strerror(errno));
	}
	kvm_close(self->fd);
}

/*
 * Pin hugetlbfs pages by a pipe until their reservation is gone.  A restored
 * reservation must keep a page in the pool only if it still has an owner.
 */
static void pin(int pipe_fd, void *p)
{
	struct iovec iov = { .iov_base = p, .iov_len = 1 };

	TEST_ASSERT(vmsplice(pipe_fd, &iov, 1, 0) == 1, "vmsplice() failed");
}

static void expect_empty_pool(const char *when)
{
	static const char * const files[] = {
		"nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages",
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(files); i++) {
		long val = hugetlb_read(SZ_2M, files[i]);

		TEST_ASSERT(!val, "%s: %s is %ld, not 0", when, files[i], val);
	}
}

FIXTURE(pinned)
{
	struct hugetlb_counters before;
	int pipe[2];
};

FIXTURE_SETUP(pinned)
{
	if (!hugetlb_has_size(SZ_2M))
		SKIP(return, "no pages of 2 MiB");

	hugetlb_get(SZ_2M, &self->before);
	TEST_ASSERT(!pipe(self->pipe), "pipe() failed");
}

FIXTURE_TEARDOWN(pinned)
{
	hugetlb_write(SZ_2M, "nr_overcommit_hugepages", 0);
	EXPECT_EQ(HUGETLB_POOL_2M, hugetlb_pool_set(SZ_2M, HUGETLB_POOL_2M));
	hugetlb_expect_released(&self->before, "pool restored");
}

TEST_F(pinned, pages_of_a_private_mapping_leave_a_shrunk_pool)
{
	char *p;

	p = kvm_mmap(2 * SZ_2M, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB, -1);
	p[0] = 1;
	p[SZ_2M] = 1;
	pin(self->pipe[1], p);
	pin(self->pipe[1], p + SZ_2M);
	kvm_munmap(p, 2 * SZ_2M);
	hugetlb_write(SZ_2M, "nr_hugepages", 0);
	EXPECT_EQ(2, hugetlb_read(SZ_2M, "surplus_hugepages"));

	kvm_close(self->pipe[0]);
	kvm_close(self->pipe[1]);
	expect_empty_pool("pages of a private mapping unpinned");
}

TEST_F(pinned, page_of_a_mount_with_min_size_leaves_the_pool)
{
	char dir[] = "/tmp/hugetlbfs-XXXXXX", path[sizeof(dir) + 2];
	char *p;
	int fd;

	hugetlb_pool_set(SZ_2M, 0);
	hugetlb_write(SZ_2M, "nr_overcommit_hugepages", 1);
	TEST_ASSERT(mkdtemp(dir), "mkdtemp() failed");
	TEST_ASSERT(!mount("none", dir, "hugetlbfs", 0, "pagesize=2M,min_size=2M"),
		    "Can't mount hugetlbfs, errno %d (%s)", errno, strerror(errno));
	snprintf(path, sizeof(path), "%s/f", dir);
	fd = open(path, O_CREAT | O_RDWR, 0600);
	TEST_ASSERT(fd >= 0, "Can't create %s", path);
	p = kvm_mmap(SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	p[0] = 1;
	pin(self->pipe[1], p);
	kvm_munmap(p, SZ_2M);
	kvm_close(fd);
	TEST_ASSERT(!unlink(path) && !umount(dir) && !rmdir(dir), "Can't unmount");
	EXPECT_EQ(1, hugetlb_read(SZ_2M, "surplus_hugepages"));

	kvm_close(self->pipe[0]);
	kvm_close(self->pipe[1]);
	expect_empty_pool("page of a mount with min_size unpinned");
}

/*
 * Two nodes: allocate memory as the policy requires.
 */
#define NUMA_PAGES	8l

FIXTURE(numa)
{
	struct kvm_vm *vm;
	struct hugetlb_counters before;
	int fd;
};

FIXTURE_SETUP(numa)
{
	const char *reason = gmem_two_nodes_unavailable(NUMA_PAGES);

	if (reason)
		SKIP(return, "%s", reason);

	self->vm = gmem_vm_create_barebones();
	hugetlb_get(SZ_2M, &self->before);
	self->fd = vm_create_guest_memfd(self->vm, NUMA_PAGES * SZ_2M,
					 gmem_flags(SZ_2M));
}

FIXTURE_TEARDOWN(numa)
{
	kvm_set_mempolicy(MPOL_DEFAULT, NULL, 0);
	kvm_vm_free(self->vm);
	kvm_close(self->fd);
	hugetlb_expect_released(&self->before, "everything closed");
}

static void set_policy(int mode, unsigned long nodes)
{
	kvm_set_mempolicy(mode, &nodes, BITS_PER_TYPE(nodes));
}

static long node_free(int nid)
{
	return hugetlb_read_node(SZ_2M, nid, "free_hugepages");
}

TEST_F_TIMEOUT(numa, bound_to_each_node, SLOW)
{
	int nid;

	for (nid = 0; nid < 2; nid++) {
		set_policy(MPOL_BIND, 1 << nid);
		kvm_fallocate(self->fd, ALLOCATE, nid * SZ_4M, SZ_4M);
		EXPECT_EQ(NUMA_PAGES - 2, node_free(nid));
	}
	hugetlb_expect(&self->before, -4, NUMA_PAGES - 4, "two pages on each node");
}

/* Give each huge page more than one policy. */
TEST_F_TIMEOUT(numa, policy_of_the_first_index_decides, SLOW)
{
	struct kvm_vm *vm = vm_create_barebones();
	unsigned long nodes;
	char *mem;
	int nid;

	/* Close the fixture's file: @before does not include its reservation. */
	kvm_close(self->fd);
	self->fd = vm_create_guest_memfd(vm, SZ_4M, gmem_flags(SZ_2M) |
					 GUEST_MEMFD_FLAG_MMAP |
					 GUEST_MEMFD_FLAG_INIT_SHARED);
	mem = kvm_mmap(SZ_4M, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	for (nid = 0; nid < 2; nid++) {
		nodes = 1 << nid;
		kvm_mbind(mem + nid * SZ_2M, SZ_4K, MPOL_BIND, &nodes,
			  BITS_PER_TYPE(nodes), 0);
		nodes ^= 3;
		kvm_mbind(mem + nid * SZ_2M + SZ_4K, SZ_2M - SZ_4K, MPOL_BIND, &nodes,
			  BITS_PER_TYPE(nodes), 0);
	}

	for (nid = 0; nid < 2; nid++) {
		WRITE_ONCE(mem[nid * SZ_2M + SZ_1M], 1);
		EXPECT_EQ(NUMA_PAGES - 1, node_free(nid));
		EXPECT_EQ(NUMA_PAGES - nid, node_free(!nid));
	}
	kvm_munmap(mem, SZ_4M);
	kvm_vm_free(vm);
}

/* Steps after which each node's counters are recorded. */
enum { NODE_USE, NODE_PUNCH, NODE_CLOSE, NR_NODE_STEPS };
static const char * const node_files[] = {
	"nr_hugepages", "free_hugepages", "surplus_hugepages"
};

struct node_steps {
	long val[NR_NODE_STEPS][2][ARRAY_SIZE(node_files)];
};

static void note_nodes(struct node_steps *steps, int step)
{
	int nid, i;

	for (nid = 0; nid < 2; nid++)
		for (i = 0; i < ARRAY_SIZE(node_files); i++)
			steps->val[step][nid][i] =
				hugetlb_read_node(SZ_2M, nid, node_files[i]);
}

TEST_F_TIMEOUT(numa, nodes_tell_what_they_tell_for_a_memfd, SLOW)
{
	struct node_steps memfd, gmem;
	int nid, fd, i;
	char *mem;

	/* Close the fixture's file: @before does not include its reservation. */
	kvm_close(self->fd);
	for (nid = 0; nid < 2; nid++) {
		set_policy(MPOL_BIND, 1 << nid);

		mem = hugetlb_memfd_map(SZ_2M, 1, &fd);
		ASSERT_NE(MAP_FAILED, mem);
		WRITE_ONCE(mem[0], 1);
		note_nodes(&memfd, NODE_USE);
		kvm_fallocate(fd, PUNCH_HOLE, 0, SZ_2M);
		note_nodes(&memfd, NODE_PUNCH);
		kvm_munmap(mem, SZ_2M);
		kvm_close(fd);
		note_nodes(&memfd, NODE_CLOSE);

		fd = vm_create_guest_memfd(self->vm, SZ_2M, gmem_flags(SZ_2M));
		kvm_fallocate(fd, ALLOCATE, 0, SZ_2M);
		note_nodes(&gmem, NODE_USE);
		kvm_fallocate(fd, PUNCH_HOLE, 0, SZ_2M);
		note_nodes(&gmem, NODE_PUNCH);
		kvm_close(fd);
		hugetlb_expect_released(&self->before, "closed");
		note_nodes(&gmem, NODE_CLOSE);

		for (i = 0; i < sizeof(memfd) / sizeof(long); i++)
			EXPECT_EQ(((long *)&memfd)[i], ((long *)&gmem)[i]);
		EXPECT_EQ(memfd.val[NODE_CLOSE][nid][1] - 1,
			  memfd.val[NODE_USE][nid][1]);
	}

	set_policy(MPOL_DEFAULT, 0);
	self->fd = vm_create_guest_memfd(self->vm, SZ_2M, gmem_flags(SZ_2M));
}

TEST_F_TIMEOUT(numa, interleaved, SLOW)
{
	set_policy(MPOL_INTERLEAVE, 3);
	kvm_fallocate(self->fd, ALLOCATE, 0, 4 * SZ_2M);
	EXPECT_EQ(NUMA_PAGES - 2, node_free(0));
	EXPECT_EQ(NUMA_PAGES - 2, node_free(1));
}

TEST_F_TIMEOUT(numa, bound_to_both_takes_what_either_has, SLOW)
{
	/* The file's pages are reserved, but not on a node. */
	hugetlb_write_node(SZ_2M, 0, "nr_hugepages", 0);
	EXPECT_EQ(NUMA_PAGES, node_free(1));

	set_policy(MPOL_BIND, 3);
	kvm_fallocate(self->fd, ALLOCATE, 0, NUMA_PAGES * SZ_2M);
	EXPECT_EQ(0, node_free(1));
	hugetlb_write_node(SZ_2M, 0, "nr_hugepages", NUMA_PAGES);
}

TEST_F_TIMEOUT(numa, preferred_node_may_be_empty, SLOW)
{
	hugetlb_write_node(SZ_2M, 1, "nr_hugepages", 0);
	set_policy(MPOL_PREFERRED, 2);
	kvm_fallocate(self->fd, ALLOCATE, 0, SZ_2M);
	EXPECT_EQ(NUMA_PAGES - 1, node_free(0));
	hugetlb_write_node(SZ_2M, 1, "nr_hugepages", NUMA_PAGES);
}

TEST_F_TIMEOUT(numa, surplus_is_never_allocated, SLOW)
{
	int nid, fd, r;

	for (nid = 0; nid < 2; nid++) {
		hugetlb_write_node(SZ_2M, nid, "nr_hugepages", 0);
		hugetlb_write(SZ_2M, "nr_overcommit_hugepages", 1000);

		set_policy(MPOL_BIND, 1 << nid);
		r = fallocate(self->fd, ALLOCATE, 0, SZ_2M);
		EXPECT_TRUE(r < 0 && gmem_is_full(errno)) {
			TH_LOG("node %d is empty, but fallocate() returned %d, errno %d (%s)",
			       nid, r, errno, strerror(errno));
		}
		EXPECT_EQ(0, hugetlb_read(SZ_2M, "surplus_hugepages"));
		EXPECT_EQ(NUMA_PAGES, hugetlb_read(SZ_2M, "resv_hugepages"));
		EXPECT_EQ(NUMA_PAGES, hugetlb_read(SZ_2M, "free_hugepages"));
		EXPECT_EQ(0, gmem_blocks(self->fd));

		/* Without the policy, the allocation finds a reserved page. */
		set_policy(MPOL_DEFAULT, 0);
		kvm_fallocate(self->fd, ALLOCATE, 0, SZ_2M);
		kvm_fallocate(self->fd, PUNCH_HOLE, 0, SZ_2M);

		/* A new file cannot reserve surplus pages. */
		fd = __vm_create_guest_memfd(self->vm, SZ_2M, gmem_flags(SZ_2M));
		EXPECT_TRUE(fd < 0 && gmem_is_full(errno));
		EXPECT_EQ(0, hugetlb_read(SZ_2M, "surplus_hugepages"));

		hugetlb_write(SZ_2M, "nr_overcommit_hugepages", 0);
		hugetlb_write_node(SZ_2M, nid, "nr_hugepages", NUMA_PAGES);
	}
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_GUEST_MEMFD));

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
