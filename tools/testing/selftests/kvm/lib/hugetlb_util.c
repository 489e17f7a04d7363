// SPDX-License-Identifier: GPL-2.0-only
/*
 * HugeTLB pools and all of their counters.
 */
#include <sched.h>
#include <stdio.h>
#include <time.h>

#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <linux/memfd.h>

#include "cgroup_util.h"
#include "hugetlb_util.h"

#define HUGETLB_SETTLE_SECONDS	10

#define POOLS	"/sys/kernel/mm/hugepages"

const char * const hugetlb_counter_names[NR_HUGETLB_COUNTERS] = {
	[HUGETLB_TOTAL]			= "nr_hugepages",
	[HUGETLB_FREE]			= "free_hugepages",
	[HUGETLB_RESV]			= "resv_hugepages",
	[HUGETLB_SURPLUS]		= "surplus_hugepages",
	[HUGETLB_NODES_TOTAL]		= "nr_hugepages of all nodes",
	[HUGETLB_NODES_FREE]		= "free_hugepages of all nodes",
	[HUGETLB_NODES_SURPLUS]		= "surplus_hugepages of all nodes",
	[HUGETLB_MEMINFO_TOTAL]		= "/proc/meminfo HugePages_Total",
	[HUGETLB_MEMINFO_FREE]		= "/proc/meminfo HugePages_Free",
	[HUGETLB_MEMINFO_RSVD]		= "/proc/meminfo HugePages_Rsvd",
	[HUGETLB_MEMINFO_SURP]		= "/proc/meminfo HugePages_Surp",
	[HUGETLB_MEMINFO_HUGETLB]	= "/proc/meminfo Hugetlb (kB)",
	[HUGETLB_VMSTAT]		= "/proc/vmstat nr_hugetlb",
	[HUGETLB_CG_CURRENT]		= "cgroup hugetlb.current",
	[HUGETLB_CG_RSVD]		= "cgroup hugetlb.rsvd.current",
	[HUGETLB_CG_NUMA]		= "cgroup hugetlb.numa_stat total",
	[HUGETLB_CG_MEMORY]		= "cgroup memory.stat hugetlb",
};

static char *cgroup_root, *cgroup_path;

bool read_number(const char *path, const char *key, long *val)
{
	char line[256];
	bool found = false;
	FILE *f;

	f = fopen(path, "r");
	if (!f)
		return false;

	while (!found && fgets(line, sizeof(line), f)) {
		if (key && strncmp(line, key, strlen(key)))
			continue;
		found = sscanf(line + (key ? strlen(key) : 0), "%ld", val) == 1;
	}
	fclose(f);
	return found;
}

void write_number(const char *path, long val)
{
	FILE *f = fopen(path, "w");

	TEST_ASSERT(f, "Can't write to %s", path);
	fprintf(f, "%ld\n", val);
	TEST_ASSERT(!fclose(f), "Writing %ld to %s failed", val, path);
}

void gmem_left_out(const char *what, const char *needs)
{
	static const char *said = "";

	if (!strcmp(said, what))
		return;

	ksft_print_msg("left out: %s, needs %s\n", what, needs);
	said = what;
}

struct kvm_vm *gmem_vm_create_barebones(void)
{
#ifdef __x86_64__
	if (kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM))
		return vm_create_barebones_type(KVM_X86_SW_PROTECTED_VM);

	gmem_left_out("files of VMs with private memory",
		      "CONFIG_KVM_SW_PROTECTED_VM");
#endif
	return vm_create_barebones();
}

static const char *pool_path(size_t size, int nid, const char *file)
{
	static char path[PATH_MAX];

	if (nid < 0)
		snprintf(path, sizeof(path),
			 POOLS "/hugepages-%lukB/%s",
			 size >> 10, file);
	else
		snprintf(path, sizeof(path),
			 "/sys/devices/system/node/node%d/hugepages/hugepages-%lukB/%s",
			 nid, size >> 10, file);
	return path;
}

bool hugetlb_has_size(size_t size)
{
	return !access(pool_path(size, -1, ""), F_OK);
}

bool hugetlb_has_node(size_t size, int nid)
{
	return !access(pool_path(size, nid, ""), F_OK);
}

size_t hugetlb_default_size(void)
{
	long kb;

	TEST_ASSERT(read_number("/proc/meminfo", "Hugepagesize:", &kb),
		    "No Hugepagesize in /proc/meminfo, is CONFIG_HUGETLBFS=y?");
	return kb << 10;
}

const char *hugetlb_size_name(size_t size)
{
	static char name[16];

	if (size >= SZ_1G)
		snprintf(name, sizeof(name), "%luGB", size >> 30);
	else if (size >= SZ_1M)
		snprintf(name, sizeof(name), "%luMB", size >> 20);
	else
		snprintf(name, sizeof(name), "%luKB", size >> 10);
	return name;
}

static long pool_read(size_t size, int nid, const char *file)
{
	const char *path = pool_path(size, nid, file);
	long val;

	TEST_ASSERT(read_number(path, NULL, &val), "Can't read %s", path);
	return val;
}

long hugetlb_read(size_t size, const char *file)
{
	return pool_read(size, -1, file);
}

long hugetlb_read_node(size_t size, int nid, const char *file)
{
	return pool_read(size, nid, file);
}

void hugetlb_write(size_t size, const char *file, long val)
{
	write_number(pool_path(size, -1, file), val);
}

void hugetlb_write_node(size_t size, int nid, const char *file, long val)
{
	write_number(pool_path(size, nid, file), val);
}

bool hugetlb_is_optimized(void)
{
	long val;

	return read_number("/proc/sys/vm/hugetlb_optimize_vmemmap", NULL, &val) &&
	       val;
}

long hugetlb_available(size_t size)
{
	return hugetlb_read(size, "free_hugepages") -
	       hugetlb_read(size, "resv_hugepages");
}

static void get_meminfo(struct hugetlb_counters *c)
{
	const struct {
		enum hugetlb_counter counter;
		const char *key;
	} keys[] = {
		{ HUGETLB_MEMINFO_TOTAL, "HugePages_Total:" },
		{ HUGETLB_MEMINFO_FREE, "HugePages_Free:" },
		{ HUGETLB_MEMINFO_RSVD, "HugePages_Rsvd:" },
		{ HUGETLB_MEMINFO_SURP, "HugePages_Surp:" },
		{ HUGETLB_MEMINFO_HUGETLB, "Hugetlb:" },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(keys); i++)
		TEST_ASSERT(read_number("/proc/meminfo", keys[i].key,
					&c->val[keys[i].counter]),
			    "No %s in /proc/meminfo", keys[i].key);
}

static void get_cgroup(struct hugetlb_counters *c)
{
	char path[PATH_MAX];

	c->val[HUGETLB_CG_CURRENT] = hugetlb_cgroup_read(c->size, "current");
	c->val[HUGETLB_CG_RSVD] = hugetlb_cgroup_read(c->size, "rsvd.current");

	snprintf(path, sizeof(path), "%s/hugetlb.%s.numa_stat", cgroup_path,
		 hugetlb_size_name(c->size));
	TEST_ASSERT(read_number(path, "total=", &c->val[HUGETLB_CG_NUMA]),
		    "No total in %s", path);

	/* Present only with memory_hugetlb_accounting. */
	snprintf(path, sizeof(path), "%s/memory.stat", cgroup_path);
	if (!read_number(path, "hugetlb ", &c->val[HUGETLB_CG_MEMORY]))
		c->val[HUGETLB_CG_MEMORY] = -1;
}

void hugetlb_get(size_t size, struct hugetlb_counters *c)
{
	int nid;

	memset(c, 0, sizeof(*c));
	c->untouched = !hugetlb_has_size(size);
	/* Without CONFIG_HUGETLBFS there is nothing to count. */
	if (access(POOLS, F_OK))
		return;

	c->size = c->untouched ? hugetlb_default_size() : size;
	size = c->size;

	c->val[HUGETLB_TOTAL] = hugetlb_read(size, "nr_hugepages");
	c->val[HUGETLB_FREE] = hugetlb_read(size, "free_hugepages");
	c->val[HUGETLB_RESV] = hugetlb_read(size, "resv_hugepages");
	c->val[HUGETLB_SURPLUS] = hugetlb_read(size, "surplus_hugepages");

	for (nid = 0; nid < HUGETLB_MAX_NODES; nid++) {
		if (!hugetlb_has_node(size, nid))
			continue;

		c->has_nodes = true;
		c->val[HUGETLB_NODES_TOTAL] +=
			hugetlb_read_node(size, nid, "nr_hugepages");
		c->val[HUGETLB_NODES_FREE] +=
			hugetlb_read_node(size, nid, "free_hugepages");
		c->val[HUGETLB_NODES_SURPLUS] +=
			hugetlb_read_node(size, nid, "surplus_hugepages");
	}

	get_meminfo(c);
	TEST_ASSERT(read_number("/proc/vmstat", "nr_hugetlb ",
				&c->val[HUGETLB_VMSTAT]),
		    "No nr_hugetlb in /proc/vmstat");
	if (cgroup_path)
		get_cgroup(c);
}

/* Adjust the counters for a change by @free free and @resv reserved pages. */
static void add_pages(struct hugetlb_counters *c, long free, long resv)
{
	if (c->untouched)
		return;

	c->val[HUGETLB_FREE] += free;
	c->val[HUGETLB_RESV] += resv;
	if (c->has_nodes)
		c->val[HUGETLB_NODES_FREE] += free;
	if (c->size == hugetlb_default_size()) {
		c->val[HUGETLB_MEMINFO_FREE] += free;
		c->val[HUGETLB_MEMINFO_RSVD] += resv;
	}
	c->val[HUGETLB_VMSTAT] -= free * (long)(c->size / getpagesize());

	if (!cgroup_path)
		return;

	c->val[HUGETLB_CG_CURRENT] -= free * (long)c->size;
	c->val[HUGETLB_CG_NUMA] -= free * (long)c->size;
	/* A page stays charged to the reservation while it is in use. */
	c->val[HUGETLB_CG_RSVD] += (resv - free) * (long)c->size;
	if (c->val[HUGETLB_CG_MEMORY] >= 0)
		c->val[HUGETLB_CG_MEMORY] -= free * (long)c->size;
}

static bool counters_equal(const struct hugetlb_counters *a,
			   const struct hugetlb_counters *b)
{
	return !memcmp(a->val, b->val, sizeof(a->val));
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

void __hugetlb_expect(const struct hugetlb_counters *before, long free,
		      long resv, bool wait, const char *file, int line,
		      const char *fmt, ...)
{
	struct hugetlb_counters want = *before, have;
	double deadline = now() + HUGETLB_SETTLE_SECONDS;
	char what[256];
	va_list ap;
	int i;

	add_pages(&want, free, resv);

	hugetlb_get(before->size, &have);
	while (wait && !counters_equal(&want, &have) && now() < deadline) {
		sched_yield();
		hugetlb_get(before->size, &have);
	}
	if (counters_equal(&want, &have))
		return;

	va_start(ap, fmt);
	vsnprintf(what, sizeof(what), fmt, ap);
	va_end(ap);

	for (i = 0; i < NR_HUGETLB_COUNTERS; i++)
		if (want.val[i] != have.val[i])
			fprintf(stderr, "# %s: %ld, expected %ld (%ld before)\n",
				hugetlb_counter_names[i], have.val[i],
				want.val[i], before->val[i]);

	test_assert(false, "the pool's counters are as expected", file, line,
		    "%s pages, %s: %+ld free and %+ld reserved expected",
		    hugetlb_size_name(before->size), what, free, resv);
}

#define MAX_SAVED_POOLS 4

static struct {
	size_t size;
	long nr;
	long overcommit;
} saved_pools[MAX_SAVED_POOLS];
static pid_t saved_by;

static void save_pool(size_t size)
{
	int i;

	for (i = 0; i < MAX_SAVED_POOLS && saved_pools[i].size; i++)
		if (saved_pools[i].size == size)
			return;

	TEST_ASSERT(i < MAX_SAVED_POOLS, "Too many HugeTLB sizes");
	saved_pools[i].size = size;
	saved_pools[i].nr = hugetlb_read(size, "nr_hugepages");
	saved_pools[i].overcommit = hugetlb_read(size, "nr_overcommit_hugepages");
}

static void restore_pools(void)
{
	int i;

	/* Children inherit the handler, but must not restore the pools. */
	if (getpid() != saved_by)
		return;

	for (i = 0; i < MAX_SAVED_POOLS && saved_pools[i].size; i++)
		hugetlb_pool_set(saved_pools[i].size, saved_pools[i].nr);
	for (i = 0; i < MAX_SAVED_POOLS && saved_pools[i].size; i++)
		if (hugetlb_read(saved_pools[i].size, "nr_overcommit_hugepages") !=
		    saved_pools[i].overcommit)
			hugetlb_write(saved_pools[i].size,
				      "nr_overcommit_hugepages",
				      saved_pools[i].overcommit);
}

void hugetlb_pool_restore_at_exit(void)
{
	saved_by = getpid();
	atexit(restore_pools);
}

long hugetlb_pool_set(size_t size, long nr)
{
	save_pool(size);

	if (hugetlb_read(size, "nr_overcommit_hugepages"))
		hugetlb_write(size, "nr_overcommit_hugepages", 0);
	if (hugetlb_read(size, "nr_hugepages") != nr ||
	    hugetlb_read(size, "surplus_hugepages"))
		hugetlb_write(size, "nr_hugepages", nr);
	return hugetlb_read(size, "nr_hugepages");
}

void gmem_prepare_pools(void)
{
	hugetlb_pool_restore_at_exit();
	if (hugetlb_has_size(SZ_2M))
		hugetlb_pool_set(SZ_2M, HUGETLB_POOL_2M);
}

const char *gmem_unavailable(size_t page_size)
{
	long need = page_size == SZ_1G ? HUGETLB_POOL_1G : HUGETLB_POOL_2M;
	static char reason[128];
	u64 sizes;

	if (page_size == getpagesize())
		return NULL;

	if (!hugetlb_has_size(page_size))
		return "the host has no huge pages of this size";

	sizes = kvm_check_cap(KVM_CAP_GUEST_MEMFD_HUGETLB);
	if (!(sizes & (page_size / getpagesize())))
		return "KVM_CAP_GUEST_MEMFD_HUGETLB does not offer this size";

	if (page_size == SZ_2M)
		hugetlb_pool_set(page_size, need);

	if (hugetlb_available(page_size) >= need)
		return NULL;

	snprintf(reason, sizeof(reason),
		 "needs %ld free pages of %s, see hugepagesz= and hugepages=",
		 need, hugetlb_size_name(page_size));
	return reason;
}

const char *gmem_two_nodes_unavailable(long nr)
{
	const char *reason = gmem_unavailable(SZ_2M);

	if (reason)
		return reason;
	if (!hugetlb_has_node(SZ_2M, 1))
		return "needs two NUMA nodes";

	hugetlb_write_node(SZ_2M, 0, "nr_hugepages", nr);
	hugetlb_write_node(SZ_2M, 1, "nr_hugepages", nr);
	return NULL;
}

u64 gmem_blocks(int fd)
{
	struct stat st;

	TEST_ASSERT(!fstat(fd, &st), "fstat() failed");
	return st.st_blocks;
}

void gmem_expect_full(struct kvm_vm *vm, size_t page_size, long nr,
		      const char *why)
{
	struct hugetlb_counters before;
	int fd;

	hugetlb_get(page_size, &before);
	fd = __vm_create_guest_memfd(vm, nr * page_size, gmem_flags(page_size));
	TEST_ASSERT(fd < 0 && gmem_is_full(errno),
		    "%s: %ld pages should give ENOMEM or ENOSPC, got fd %d, errno %d (%s)",
		    why, nr, fd, errno, strerror(errno));
	hugetlb_expect(&before, 0, 0, "no room: %s", why);
}

void *hugetlb_memfd_map(size_t size, long nr, int *fd)
{
	*fd = syscall(__NR_memfd_create, "hugetlb", MFD_HUGETLB |
		      (__builtin_ctzl(size) << MFD_HUGE_SHIFT));
	TEST_ASSERT(*fd >= 0, "memfd_create() of %s pages failed",
		    hugetlb_size_name(size));
	kvm_ftruncate(*fd, size * nr);
	return mmap(NULL, size * nr, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
}

void hugetlb_dirty_pool(size_t size, long nr)
{
	size_t i;
	char *mem;
	int fd;

	mem = hugetlb_memfd_map(size, nr, &fd);
	TEST_ASSERT(mem != MAP_FAILED, "Can't get %ld pages of %s to fill them",
		    nr, hugetlb_size_name(size));
	for (i = 0; i < size * nr; i += HUGETLB_DIRT_STRIDE)
		WRITE_ONCE(*(u64 *)(mem + i), HUGETLB_DIRT);
	kvm_munmap(mem, size * nr);
	kvm_close(fd);
}

bool hugetlb_cgroup_enter(const char *name)
{
	char root[PATH_MAX], path[PATH_MAX];

	if (cg_find_unified_root(root, sizeof(root), NULL))
		return false;

	if (cg_write(root, "cgroup.subtree_control", "+hugetlb +memory"))
		return false;

	cgroup_root = strdup(root);
	cgroup_path = cg_name(root, name);
	if (cg_create(cgroup_path) && errno != EEXIST)
		goto err;

	snprintf(path, sizeof(path), "%d", getpid());
	TEST_ASSERT(!cg_write(cgroup_path, "cgroup.procs", path),
		    "Can't enter %s", cgroup_path);
	return true;
err:
	free(cgroup_path);
	cgroup_path = NULL;
	return false;
}

void hugetlb_cgroup_leave(void)
{
	char pid[16];

	snprintf(pid, sizeof(pid), "%d", getpid());
	TEST_ASSERT(!cg_write(cgroup_root, "cgroup.procs", pid),
		    "Can't move back to %s", cgroup_root);
}

int hugetlb_cgroup_remove(void)
{
	int r;

	if (!cgroup_path)
		return 0;

	r = cg_destroy(cgroup_path);
	free(cgroup_path);
	cgroup_path = NULL;
	return r;
}

const char *hugetlb_cgroup_path(void)
{
	return cgroup_path;
}

void hugetlb_cgroup_set_accounting(bool on)
{
	TEST_ASSERT(!mount(NULL, CGROUP_MOUNT, NULL, MS_REMOUNT,
			   on ? "memory_hugetlb_accounting" : NULL),
		    "Can't remount " CGROUP_MOUNT);
}

bool hugetlb_cgroup_get_accounting(void)
{
	char line[512];
	bool on = false;
	FILE *f;

	f = fopen("/proc/self/mounts", "r");
	TEST_ASSERT(f, "Can't read /proc/self/mounts");
	while (fgets(line, sizeof(line), f))
		if (strstr(line, " cgroup2 "))
			on |= !!strstr(line, "memory_hugetlb_accounting");
	fclose(f);
	return on;
}

long hugetlb_cgroup_wait_for_dying(long nr)
{
	return cg_read_key_long_poll(CGROUP_MOUNT, "cgroup.stat",
				     "nr_dying_subsys_hugetlb ", nr, 100,
				     DEFAULT_WAIT_INTERVAL_US);
}

static const char *cgroup_file(size_t size, const char *file)
{
	static char name[64];

	snprintf(name, sizeof(name), "hugetlb.%s.%s", hugetlb_size_name(size),
		 file);
	return name;
}

void hugetlb_cgroup_write(size_t size, const char *file, const char *val)
{
	TEST_ASSERT(!cg_write(cgroup_path, cgroup_file(size, file), (char *)val),
		    "Can't write %s to %s/%s", val, cgroup_path,
		    cgroup_file(size, file));
}

long hugetlb_cgroup_read(size_t size, const char *file)
{
	long val = cg_read_long(cgroup_path, cgroup_file(size, file));

	TEST_ASSERT(val >= 0, "Can't read %s/%s", cgroup_path,
		    cgroup_file(size, file));
	return val;
}
