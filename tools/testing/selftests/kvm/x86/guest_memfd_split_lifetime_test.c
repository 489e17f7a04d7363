// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lifetime of split huge pages of guest_memfd, with other users of their memory, and
 * the counters and charges for them.  However a huge page leaves its file, it returns
 * to the pool whole, and the counters do not depend on whether it was split.
 */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include <uapi/linux/stddef.h>	/* for io_uring.h */
#include <linux/falloc.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "cgroup_util.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PATTERN		0x600d600d00000000ull

/* Timeout for asynchronous updates. */
#define SETTLE_SECONDS	10

/* Use a parent other than the root: it takes over charges, and has files for them. */
#define PARENT_PATH	CGROUP_MOUNT "/gmem_life"
#define CHILD		"gmem_life/vmm"

#define OPTIMIZE	"/proc/sys/vm/hugetlb_optimize_vmemmap"

struct life_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	size_t page_size;
	long nr;		/* huge pages of the file */
	u64 size;
	int fd;
	int check;
	bool plain;		/* the vmemmap of the pool's pages is not optimized */
	char *mem;
	struct hugetlb_counters before;
};

static void get_life_sizes(struct life_test *t, size_t page_size)
{
	t->page_size = page_size;
	t->nr = page_size == SZ_1G ? 1 : 2;
	t->size = t->nr * page_size;
}

static void open_file(struct life_test *t)
{
	t->vm = gmem_vm_create(1, &t->vcpu);
	t->fd = vm_create_guest_memfd(t->vm, t->size, gmem_flags(t->page_size) |
				      GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   t->size, NULL, t->fd, 0);
	t->mem = kvm_mmap(t->size, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	t->check = gmem_open_check(t->vm);
}

static void close_file(struct life_test *t)
{
	gmem_close_check(t->check);
	kvm_munmap(t->mem, t->size);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
}

static u64 *word(struct life_test *t, u64 offset)
{
	return (u64 *)(t->mem + offset);
}

static void check(struct life_test *t)
{
	gmem_check(t->check, t->fd, !t->plain);
}

static void convert(struct life_test *t, u64 offset, u64 size, u64 attributes)
{
	u64 error;
	int r = gmem_convert(t->fd, offset, size, attributes, &error);

	TEST_ASSERT(!r, "0x%lx bytes at 0x%lx to 0x%lx: errno %d (%s) at 0x%lx",
		    size, offset, attributes, errno, strerror(errno), error);
	check(t);
}

/* Write to each part, and so to each huge page, from the guest. */
static void guest_write_parts(struct life_test *t)
{
	gmem_guest_do(t->vcpu, GMEM_WRITE, GMEM_GPA, t->size, SZ_2M, PATTERN);
}

static void guest_check_parts(struct life_test *t)
{
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, t->size, SZ_2M, PATTERN);
}

/* Split all huge pages, and the first part of each and the last part into pieces. */
static void split_all(struct life_test *t)
{
	long i;

	for (i = 0; i < t->nr; i++)
		convert(t, i * t->page_size, SZ_8K, SHARED);
	convert(t, t->size - SZ_4K, SZ_4K, SHARED);
}

/* Poll the counters, as another context can free the pages. */
#define expect_pages(t, free, resv, fmt, ...)						\
	__hugetlb_expect(&(t)->before, free, resv, true, __FILE__, __LINE__, fmt,	\
			 ##__VA_ARGS__)

static bool cgroups_available(void)
{
	if (access(CGROUP_MOUNT "/cgroup.controllers", R_OK))
		return false;

	if (cg_write(CGROUP_MOUNT, "cgroup.subtree_control", "+hugetlb +memory"))
		return false;

	return !cg_create(PARENT_PATH) &&
	       !cg_write(PARENT_PATH, "cgroup.subtree_control", "+hugetlb +memory");
}

/* Run in the parent, which outlives a failed test and is not in the cgroup. */
static void remove_cgroups(bool accounting)
{
	rmdir(CGROUP_MOUNT "/" CHILD);
	rmdir(PARENT_PATH);
	if (hugetlb_cgroup_get_accounting() != accounting)
		hugetlb_cgroup_set_accounting(accounting);
}

static const char *life_unavailable(size_t page_size)
{
	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		return "kvm.gmem_in_place_conversion is off";
	return gmem_unavailable(page_size);
}

FIXTURE(life)
{
	struct life_test t;
	bool accounting;
};

FIXTURE_VARIANT(life)
{
	size_t page_size;
};

FIXTURE_VARIANT_ADD(life, 2m) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(life, 1g) { .page_size = SZ_1G, };

FIXTURE_SETUP(life)
{
	const char *reason = life_unavailable(variant->page_size);

	self->accounting = hugetlb_cgroup_get_accounting();
	if (reason)
		SKIP(return, "%s", reason);
	if (!cgroups_available())
		SKIP(return, HUGETLB_NO_CGROUP);

	hugetlb_cgroup_set_accounting(true);
	get_life_sizes(&self->t, variant->page_size);
}

FIXTURE_TEARDOWN_PARENT(life)
{
	remove_cgroups(self->accounting);
}

/*
 * Kernel counters of memory that is in the page cache, mapped or locked.
 */
enum { MAPPED, MLOCK, FILE_PAGES, FILE_HUGE, FILE_PMD, UNEVICTABLE, NODE_FILE, NR_STATS };

static const struct {
	const char *path;
	const char *key;
	long slack;
} stats[NR_STATS] = {
	/* The test itself may map more of its text at any time. */
	[MAPPED]	= { "/proc/vmstat", "nr_mapped ", 128 },
	[MLOCK]		= { "/proc/vmstat", "nr_mlock " },
	[FILE_PAGES]	= { "/proc/vmstat", "nr_file_pages " },
	[FILE_HUGE]	= { "/proc/vmstat", "nr_file_hugepages " },
	[FILE_PMD]	= { "/proc/vmstat", "nr_file_pmdmapped " },
	[UNEVICTABLE]	= { "/proc/vmstat", "nr_unevictable " },
	[NODE_FILE]	= { "/sys/devices/system/node/node0/meminfo", "Node 0 FilePages:" },
};

struct vm_stats {
	long val[NR_STATS];
};

static struct vm_stats get_vm_stats(void)
{
	int i, fd = open_path_or_exit("/proc/sys/vm/stat_refresh", O_WRONLY);
	struct vm_stats s = {};

	/* Fold the per-CPU counters. */
	TEST_ASSERT(write(fd, "1", 1) == 1, "Can't refresh /proc/vmstat");
	kvm_close(fd);
	for (i = 0; i < NR_STATS; i++) {
		/* Without CONFIG_NUMA there are no counters of nodes. */
		if (i == NODE_FILE && access(stats[i].path, F_OK))
			continue;
		TEST_ASSERT(read_number(stats[i].path, stats[i].key, &s.val[i]),
			    "No %s in %s", stats[i].key, stats[i].path);
	}
	return s;
}

/* Find a counter that is not @before plus @nr mapped or @nr_locked locked pages. */
static int find_changed_stat(const struct vm_stats *before, const struct vm_stats *now,
			     long nr, long nr_locked)
{
	long want;
	int i;

	for (i = 0; i < NR_STATS; i++) {
		want = before->val[i] + (i == MAPPED ? nr : i == MLOCK ? nr_locked : 0);
		if (labs(now->val[i] - want) > stats[i].slack)
			return i;
	}
	return -1;
}

static void expect_vm_stats(const struct vm_stats *before, long nr, long nr_locked,
			    const char *what)
{
	struct timespec start = {}, elapsed;
	struct vm_stats now;
	int i;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		now = get_vm_stats();
		i = find_changed_stat(before, &now, nr, nr_locked);
		elapsed = timespec_elapsed(start);
	} while (i >= 0 && elapsed.tv_sec < SETTLE_SECONDS);

	TEST_ASSERT(i < 0, "%s: %s is %ld, was %ld, with %ld pages mapped and %ld locked",
		    what, stats[i].key, now.val[i], before->val[i], nr, nr_locked);
}

static void touch(struct life_test *t, u64 offset, u64 size)
{
	u64 i;

	for (i = offset; i < offset + size; i += SZ_4K)
		READ_ONCE(*word(t, i));
}

#define PART_PAGES	(SZ_2M / SZ_4K)

TEST_F_TIMEOUT(life, counters, SLOW)
{
	struct life_test *t = &self->t;
	struct vm_stats before;

	ASSERT_TRUE(hugetlb_cgroup_enter(CHILD));
	hugetlb_get(t->page_size, &t->before);
	before = get_vm_stats();
	open_file(t);
	guest_write_parts(t);
	EXPECT_EQ(t->size / 512, gmem_blocks(t->fd));
	expect_vm_stats(&before, 0, 0, "allocated");
	hugetlb_expect(&t->before, -t->nr, 0, "allocated");

	split_all(t);
	convert(t, 0, SZ_2M, SHARED);
	touch(t, 0, SZ_2M);
	EXPECT_EQ(t->size / 512, gmem_blocks(t->fd));
	expect_vm_stats(&before, PART_PAGES, 0, "split");
	hugetlb_expect(&t->before, -t->nr, 0, "split");

	convert(t, 0, t->size, PRIVATE);
	guest_check_parts(t);
	EXPECT_EQ(t->size / 512, gmem_blocks(t->fd));
	expect_vm_stats(&before, 0, 0, "merged");
	hugetlb_expect(&t->before, -t->nr, 0, "merged");

	convert(t, 0, SZ_2M, SHARED);
	touch(t, 0, SZ_2M);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	EXPECT_EQ(0, gmem_blocks(t->fd));
	expect_vm_stats(&before, 0, 0, "punched");
	hugetlb_expect(&t->before, 0, t->nr, "punched");

	/* Allocate a huge page that is split from the beginning. */
	touch(t, 0, SZ_2M);
	split_all(t);
	EXPECT_EQ(t->page_size / 512, gmem_blocks(t->fd));
	expect_vm_stats(&before, PART_PAGES, 0, "allocated in parts");
	hugetlb_expect(&t->before, -1, t->nr - 1, "allocated in parts");
	close_file(t);
	expect_vm_stats(&before, 0, 0, "closed");
	hugetlb_expect_released(&t->before, "closed");
	hugetlb_cgroup_leave();
	EXPECT_EQ(0, hugetlb_cgroup_remove());
}

/* mlock() applies to addresses, but NR_MLOCK counts pages. */
static void share_locked_part(struct life_test *t, const struct vm_stats *before)
{
	hugetlb_get(t->page_size, &t->before);
	open_file(t);
	guest_write_parts(t);
	convert(t, 0, SZ_2M, SHARED);
	TEST_ASSERT(!mlock(t->mem, SZ_2M), "mlock() failed: errno %d (%s)", errno,
		    strerror(errno));
	expect_vm_stats(before, PART_PAGES, PART_PAGES, "locked");
}

TEST_F_TIMEOUT(life, locked_memory_becomes_private, SLOW)
{
	struct vm_stats before = get_vm_stats();
	struct life_test *t = &self->t;

	share_locked_part(t, &before);
	convert(t, SZ_4K, SZ_4K, PRIVATE);
	expect_vm_stats(&before, PART_PAGES - 1, PART_PAGES - 1, "one page private");
	convert(t, 0, SZ_2M, PRIVATE);
	expect_vm_stats(&before, 0, 0, "private");
	guest_check_parts(t);

	convert(t, 0, SZ_2M, SHARED);
	touch(t, 0, SZ_2M);
	expect_vm_stats(&before, PART_PAGES, PART_PAGES, "shared again");
	convert(t, 0, SZ_2M, PRIVATE);
	expect_vm_stats(&before, 0, 0, "private again");
	close_file(t);
	expect_vm_stats(&before, 0, 0, "closed");
	hugetlb_expect_released(&t->before, "closed");
}

TEST_F_TIMEOUT(life, locked_memory_is_punched, SLOW)
{
	struct vm_stats before = get_vm_stats();
	struct life_test *t = &self->t;

	share_locked_part(t, &before);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	EXPECT_EQ(0, gmem_blocks(t->fd));
	expect_pages(t, 0, t->nr, "punched");
	expect_vm_stats(&before, 0, 0, "punched");

	touch(t, 0, SZ_2M);
	expect_vm_stats(&before, PART_PAGES, PART_PAGES, "allocated again");
	convert(t, 0, t->size, PRIVATE);
	close_file(t);
	expect_vm_stats(&before, 0, 0, "closed");
	hugetlb_expect_released(&t->before, "closed");
}

TEST_F_TIMEOUT(life, locked_memory_is_closed, SLOW)
{
	struct vm_stats before = get_vm_stats();
	struct life_test *t = &self->t;

	share_locked_part(t, &before);
	close_file(t);
	hugetlb_expect_released(&t->before, "closed");
	expect_vm_stats(&before, 0, 0, "closed");
}

/*
 * A removed cgroup moves its charges to the parent, and does not wait for pages.
 */

/*
 * Open the file before entering the cgroup: the charge for its reservation would keep
 * the cgroup.
 */
static void open_file_and_enter_cgroup(struct life_test *t)
{
	/* Wait until the cgroups of other tests are freed. */
	TEST_ASSERT(!hugetlb_cgroup_wait_for_dying(0), "A cgroup does not want to die");
	open_file(t);
	TEST_ASSERT(hugetlb_cgroup_enter(CHILD), "Can't enter a cgroup");
	guest_write_parts(t);
	split_all(t);
	TEST_ASSERT_EQ(hugetlb_cgroup_read(t->page_size, "current"), t->size);
	TEST_ASSERT_EQ(hugetlb_cgroup_read(t->page_size, "rsvd.current"), 0);
}

/* The removed cgroup is freed as soon as nothing is charged to it. */
static void leave_cgroup_and_remove_it(void)
{
	hugetlb_cgroup_leave();
	TEST_ASSERT(!hugetlb_cgroup_remove(), "Can't remove the cgroup");
	TEST_ASSERT(!hugetlb_cgroup_wait_for_dying(0),
		    "The cgroup waits for something that is charged to it");
}

static long parent_charge(struct life_test *t)
{
	char file[64];

	snprintf(file, sizeof(file), "hugetlb.%s.current", hugetlb_size_name(t->page_size));
	return cg_read_long(PARENT_PATH, file);
}

static void expect_parent_charge(struct life_test *t, long charge)
{
	struct timespec start = {};
	long now, memory;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		now = parent_charge(t);
		memory = cg_read_key_long(PARENT_PATH, "memory.stat", "hugetlb ");
	} while ((now != charge || memory != charge) &&
		 timespec_elapsed(start).tv_sec < SETTLE_SECONDS);
	TEST_ASSERT(now == charge && memory == charge,
		    "%ld bytes are charged, %ld to memory.stat, not %ld", now, memory, charge);
}

TEST_F_TIMEOUT(life, cgroup_of_parts_is_removed, SLOW)
{
	struct life_test *t = &self->t;

	hugetlb_get(t->page_size, &t->before);
	open_file_and_enter_cgroup(t);
	leave_cgroup_and_remove_it();
	expect_parent_charge(t, t->size);

	/* Splits and merges after the removal keep the charge to the parent. */
	convert(t, t->page_size / 2, SZ_4K, SHARED);
	expect_parent_charge(t, t->size);
	convert(t, 0, t->size, PRIVATE);
	guest_check_parts(t);
	expect_parent_charge(t, t->size);
	split_all(t);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->page_size);
	expect_parent_charge(t, t->size - t->page_size);
	close_file(t);
	expect_parent_charge(t, 0);
	hugetlb_expect_released(&t->before, "closed");
}

/* Dropping the last reference to a piece merges and uncharges the huge page. */
TEST_F_TIMEOUT(life, cgroup_of_a_waiting_page_is_removed, SLOW)
{
	struct life_test *t = &self->t;
	int i, fds[2];

	hugetlb_get(t->page_size, &t->before);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, pipe(fds));
		open_file_and_enter_cgroup(t);
		gmem_pin(fds[1], word(t, SZ_4K));
		kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
		/*
		 * Drop the last reference while the file is open, then after it is
		 * closed.
		 */
		if (i)
			close_file(t);
		leave_cgroup_and_remove_it();
		expect_parent_charge(t, t->page_size);
		kvm_close(fds[0]);
		kvm_close(fds[1]);
		expect_parent_charge(t, 0);
		if (!i)
			close_file(t);
		hugetlb_expect_released(&t->before, "closed");
	}
}

/*
 * Pin a page by a pipe or an io_uring, and remove it from the file in several ways.
 */
struct user {
	bool ring;
	int fds[2];
};

static bool user_open(struct user *u, bool ring)
{
	struct io_uring_params params = {};

	u->ring = ring;
	if (!ring)
		return !pipe(u->fds);

	u->fds[0] = syscall(__NR_io_uring_setup, 1, &params);
	return u->fds[0] >= 0;
}

static void user_pin(struct user *u, u64 *p)
{
	struct iovec iov = { .iov_base = p, .iov_len = SZ_4K };

	if (u->ring)
		TEST_ASSERT(!syscall(__NR_io_uring_register, u->fds[0],
				     IORING_REGISTER_BUFFERS, &iov, 1),
			    "Can't register a buffer: errno %d (%s)", errno, strerror(errno));
	else
		gmem_pin(u->fds[1], p);
}

/* Drop the reference.  A pipe also shows that the contents have not changed. */
static void user_unpin(struct user *u, u64 want)
{
	u64 value;

	if (!u->ring) {
		TEST_ASSERT_EQ(read(u->fds[0], &value, sizeof(value)), sizeof(value));
		TEST_ASSERT_EQ(value, want);
		kvm_close(u->fds[1]);
	}
	kvm_close(u->fds[0]);
}

FIXTURE(pinned)
{
	struct life_test t;
	struct user user;
	bool accounting;
	long memory;		/* memory.current before the file was created */
};

FIXTURE_VARIANT(pinned)
{
	size_t page_size;
	bool ring;
};

FIXTURE_VARIANT_ADD(pinned, 2m_pipe) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(pinned, 2m_ring) { .page_size = SZ_2M, .ring = true, };
FIXTURE_VARIANT_ADD(pinned, 1g_pipe) { .page_size = SZ_1G, };
FIXTURE_VARIANT_ADD(pinned, 1g_ring) { .page_size = SZ_1G, .ring = true, };

FIXTURE_SETUP(pinned)
{
	const char *reason = life_unavailable(variant->page_size);

	self->accounting = hugetlb_cgroup_get_accounting();
	if (reason)
		SKIP(return, "%s", reason);
	if (!cgroups_available())
		SKIP(return, HUGETLB_NO_CGROUP);
	if (!user_open(&self->user, variant->ring))
		SKIP(return, "needs CONFIG_IO_URING");

	hugetlb_cgroup_set_accounting(true);
	ASSERT_TRUE(hugetlb_cgroup_enter(CHILD));
	get_life_sizes(&self->t, variant->page_size);
	hugetlb_get(self->t.page_size, &self->t.before);
	self->memory = cg_read_long(hugetlb_cgroup_path(), "memory.current");
}

FIXTURE_TEARDOWN_PARENT(pinned)
{
	remove_cgroups(self->accounting);
}

/* Split all huge pages, and pin one page. */
static void open_pinned_file(struct life_test *t, struct user *u)
{
	open_file(t);
	guest_write_parts(t);
	split_all(t);
	*word(t, SZ_4K) = PATTERN + SZ_4K;
	user_pin(u, word(t, SZ_4K));
}

static bool one_page_waits(struct life_test *t, long resv)
{
	struct hugetlb_counters now;

	hugetlb_get(t->page_size, &now);
	return now.val[HUGETLB_FREE] == t->before.val[HUGETLB_FREE] - 1 &&
	       now.val[HUGETLB_RESV] == t->before.val[HUGETLB_RESV] + resv &&
	       now.val[HUGETLB_CG_CURRENT] == t->page_size &&
	       now.val[HUGETLB_CG_MEMORY] == t->page_size;
}

/*
 * Expect one huge page that waits for its last reference.  It is neither free nor
 * reserved, and still charged.
 */
static void expect_one_page_waits(struct life_test *t, long resv)
{
	struct timespec start = {};
	bool waits;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		waits = one_page_waits(t, resv);
	} while (!waits && timespec_elapsed(start).tv_sec < SETTLE_SECONDS);
	if (!waits)
		expect_pages(t, -1, resv, "while one page is in use");
	TEST_ASSERT(waits, "%ld bytes are charged, %ld to memory.stat",
		    hugetlb_cgroup_read(t->page_size, "current"),
		    cg_read_key_long(hugetlb_cgroup_path(), "memory.stat", "hugetlb "));
}

/* Slab and per-CPU stock make memory.current fluctuate. */
#define MEMCG_SLACK	SZ_1M

/* Expect that all pages are free and uncharged. */
static void expect_all_is_free(struct life_test *t, long memory)
{
	struct timespec start = {};
	long now;

	hugetlb_expect_released(&t->before, "nothing is in use any more");
	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		now = cg_read_long(hugetlb_cgroup_path(), "memory.current");
	} while (now > memory + MEMCG_SLACK &&
		 timespec_elapsed(start).tv_sec < SETTLE_SECONDS);
	TEST_ASSERT(now <= memory + MEMCG_SLACK, "memory.current was %ld, and is %ld",
		    memory, now);
	hugetlb_cgroup_leave();
	TEST_ASSERT(!hugetlb_cgroup_remove(), "Can't remove the cgroup");
}

TEST_F_TIMEOUT(pinned, punched, SLOW)
{
	struct life_test *t = &self->t;

	open_pinned_file(t, &self->user);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
	EXPECT_EQ(0, gmem_blocks(t->fd));
	expect_one_page_waits(t, t->nr - 1);
	user_unpin(&self->user, PATTERN + SZ_4K);
	expect_pages(t, 0, t->nr, "unpinned");

	/* The huge page can be allocated again. */
	gmem_guest_do(t->vcpu, GMEM_CHECK_ZERO, GMEM_GPA, t->size, SZ_2M, 0);
	check(t);
	close_file(t);
	expect_all_is_free(t, self->memory);
}

TEST_F_TIMEOUT(pinned, closed, SLOW)
{
	struct life_test *t = &self->t;

	open_pinned_file(t, &self->user);
	close_file(t);
	expect_one_page_waits(t, 0);
	user_unpin(&self->user, PATTERN + SZ_4K);
	expect_all_is_free(t, self->memory);
}

/* Pin two pages of one huge page, in different parts if it has several. */
TEST_F_TIMEOUT(pinned, closed_with_two_users, SLOW)
{
	struct life_test *t = &self->t;
	struct user other;

	ASSERT_TRUE(user_open(&other, !variant->ring));
	open_pinned_file(t, &self->user);
	convert(t, t->page_size - SZ_4K, SZ_4K, SHARED);
	*word(t, t->page_size - SZ_4K) = ~PATTERN;
	user_pin(&other, word(t, t->page_size - SZ_4K));
	close_file(t);
	expect_one_page_waits(t, 0);
	user_unpin(&self->user, PATTERN + SZ_4K);
	expect_one_page_waits(t, 0);
	user_unpin(&other, ~PATTERN);
	expect_all_is_free(t, self->memory);
}

/* Kill a VMM whose pipe or ring is still open in another process. */
TEST_F_TIMEOUT(pinned, killed, SLOW)
{
	struct life_test *t = &self->t;
	int ready[2], status;
	pid_t pid;
	char c;

	ASSERT_EQ(0, pipe(ready));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		open_pinned_file(t, &self->user);
		TEST_ASSERT_EQ(write(ready[1], "r", 1), 1);
		for (;;)
			pause();
	}
	kvm_close(ready[1]);
	ASSERT_EQ(1, read(ready[0], &c, 1));
	hugetlb_expect(&t->before, -t->nr, 0, "before the VMM is killed");
	ASSERT_EQ(0, kill(pid, SIGKILL));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	expect_one_page_waits(t, 0);
	user_unpin(&self->user, PATTERN + SZ_4K);
	expect_all_is_free(t, self->memory);
}

/*
 * Toggle the optimization of the vmemmap while huge pages are split: a merge restores
 * the vmemmap as it was.
 */
FIXTURE(vmemmap)
{
	struct life_test t;
	long optimize;
	bool rebuilt;		/* the pool was rebuilt */
};

FIXTURE_VARIANT(vmemmap)
{
	size_t page_size;
	bool plain;
};

FIXTURE_VARIANT_ADD(vmemmap, 2m_optimized) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(vmemmap, 1g_optimized) { .page_size = SZ_1G, };
/* A 1 GiB page that has left the pool may not be available again. */
FIXTURE_VARIANT_ADD(vmemmap, 2m_plain) { .page_size = SZ_2M, .plain = true, };

static void rebuild_pool(void)
{
	TEST_ASSERT(!hugetlb_pool_set(SZ_2M, 0), "Can't empty the pool");
	TEST_ASSERT_EQ(hugetlb_pool_set(SZ_2M, HUGETLB_POOL_2M), HUGETLB_POOL_2M);
}

FIXTURE_SETUP(vmemmap)
{
	const char *reason = life_unavailable(variant->page_size);
	struct life_test *t = &self->t;

	self->optimize = -1;
	if (reason)
		SKIP(return, "%s", reason);
	if (!read_number(OPTIMIZE, NULL, &self->optimize) || !self->optimize)
		SKIP(return, "the vmemmap of huge pages is not optimized");

	get_life_sizes(t, variant->page_size);
	t->plain = variant->plain;
	if (t->plain) {
		write_number(OPTIMIZE, 0);
		self->rebuilt = true;
		rebuild_pool();
	}
	hugetlb_get(t->page_size, &t->before);
	open_file(t);
}

FIXTURE_TEARDOWN_PARENT(vmemmap)
{
	if (self->optimize < 0)
		return;
	write_number(OPTIMIZE, self->optimize);
	if (self->rebuilt)
		rebuild_pool();
}

/* Toggle between the steps, each of which splits or merges other folios. */
static void split_and_merge_between(struct life_test *t, long first, long second)
{
	write_number(OPTIMIZE, first);
	split_all(t);
	write_number(OPTIMIZE, second);
	convert(t, t->page_size / 2 - SZ_4K, SZ_8K, SHARED);
	write_number(OPTIMIZE, first);
	convert(t, t->size - SZ_4K, SZ_4K, PRIVATE);
	write_number(OPTIMIZE, second);
	convert(t, 0, t->size, PRIVATE);
	guest_check_parts(t);
}

TEST_F_TIMEOUT(vmemmap, toggled_while_in_parts, SLOW)
{
	struct life_test *t = &self->t;

	guest_write_parts(t);
	check(t);
	split_and_merge_between(t, 1, 0);
	split_and_merge_between(t, 0, 1);
	convert(t, 0, t->page_size, SHARED);
	write_number(OPTIMIZE, 0);
	convert(t, 0, t->page_size, PRIVATE);
	guest_check_parts(t);
	close_file(t);
	hugetlb_expect_released(&t->before, "closed");
}

/* Return split huge pages to the pool, toggle, and allocate them again. */
TEST_F_TIMEOUT(vmemmap, toggled_before_the_pages_are_used_again, SLOW)
{
	struct life_test *t = &self->t;
	int i;

	for (i = 0; i < 4; i++) {
		write_number(OPTIMIZE, i & 1);
		guest_write_parts(t);
		check(t);
		split_all(t);
		write_number(OPTIMIZE, !(i & 1));
		kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->size);
		expect_pages(t, 0, t->nr, "punched");
		/*
		 * Allocate whole pages in the next round.  The attributes stay mixed
		 * otherwise.
		 */
		if (i == 1)
			convert(t, 0, t->size, PRIVATE);
	}
	close_file(t);
	hugetlb_expect_released(&t->before, "closed");
}

/* Later users of the pool must be able to write to the pages and to free them. */
TEST_F_TIMEOUT(vmemmap, pages_that_were_in_parts_are_good, SLOW)
{
	struct life_test *t = &self->t;

	guest_write_parts(t);
	split_all(t);
	write_number(OPTIMIZE, t->plain);
	close_file(t);
	hugetlb_expect_released(&t->before, "closed");
	hugetlb_dirty_pool(t->page_size, hugetlb_available(t->page_size));
	hugetlb_expect_released(&t->before, "used by another task");
	if (t->page_size == SZ_2M) {
		self->rebuilt = true;
		rebuild_pool();
	}
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_prepare_pools();
	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
