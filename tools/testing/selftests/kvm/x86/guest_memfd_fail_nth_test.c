// SPDX-License-Identifier: GPL-2.0-only
/*
 * Fail every allocation in the life of a guest_memfd file once: creation, binding, a
 * vCPU's fault, fallocate(), conversion and release.  After each failure nothing may
 * have leaked, and a second attempt must succeed.
 *
 * Best run with panic_on_warn=1, and on a kernel with kmemleak.
 */
#include <dirent.h>
#include <fcntl.h>

#include <sys/mman.h>
#include <sys/stat.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "test_util.h"

#define ALLOCATE	FALLOC_FL_KEEP_SIZE
#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

#define SLOW		300
#define PATTERN		0x600d600d00000000ull

/* More allocations in one call are probably a bug of the test. */
#define MAX_NTH		1000

#define TOO_LONG	"each try would clear 1 GiB, on the way that 2 MiB go as well"

#define NO_INJECTION	"needs CONFIG_FAILSLAB, CONFIG_FAIL_PAGE_ALLOC and " \
			"CONFIG_FAULT_INJECTION_DEBUG_FS"

#define DEBUGFS		"/sys/kernel/debug"
#define NODE_CACHE	"/sys/kernel/slab/radix_tree_node/failslab"

static bool write_setting(const char *file, const char *val)
{
	char path[128];
	bool ok;
	int fd;

	snprintf(path, sizeof(path), DEBUGFS "/%s", file);
	fd = open(path, O_WRONLY);
	if (fd < 0)
		return false;
	ok = write(fd, val, strlen(val)) == strlen(val);
	close(fd);
	return ok;
}

/* fail-nth needs neither a probability nor an interval. */
static bool set_up_fault_injection(void)
{
	/* Include allocations that may sleep, and allocations of single pages. */
	return write_setting("failslab/ignore-gfp-wait", "N") &&
	       write_setting("failslab/verbose", "0") &&
	       write_setting("fail_page_alloc/ignore-gfp-wait", "N") &&
	       write_setting("fail_page_alloc/ignore-gfp-highmem", "N") &&
	       write_setting("fail_page_alloc/min-order", "0") &&
	       write_setting("fail_page_alloc/verbose", "0") &&
	       (write_setting("fail_usercopy/verbose", "0") || errno == ENOENT);
}

static int open_fail_nth(void)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/task/%d/fail-nth", kvm_gettid());
	return open(path, O_RDWR);
}

struct nth_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	size_t page_size;
	int fd;
	int nth_fd;
	long injected, failed;
	struct hugetlb_counters before;
};

FIXTURE(fail_nth)
{
	struct nth_test t;
};

FIXTURE_VARIANT(fail_nth)
{
	size_t page_size;
};

FIXTURE_VARIANT_ADD(fail_nth, 4k) { .page_size = SZ_4K, };
FIXTURE_VARIANT_ADD(fail_nth, 2m) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(fail_nth, 1g) { .page_size = SZ_1G, };

FIXTURE_SETUP(fail_nth)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);
	if (kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is on");

	self->t.nth_fd = open_fail_nth();
	if (self->t.nth_fd < 0 || !set_up_fault_injection())
		SKIP(return, NO_INJECTION);

	self->t.page_size = variant->page_size;
	self->t.fd = -1;
	hugetlb_get(self->t.page_size, &self->t.before);
}

FIXTURE_TEARDOWN(fail_nth)
{
	close(self->t.nth_fd);
}

static void start_nth(struct nth_test *self, int nth)
{
	char buf[16];
	int len = snprintf(buf, sizeof(buf), "%d", nth);

	TEST_ASSERT_EQ(pwrite(self->nth_fd, buf, len, 0), len);
}

/*
 * Returns whether the failure was injected.  Reading and writing the fail-nth file
 * copies from and to user space, and that copy may be the one that fails.  The call
 * under test was already complete then.
 */
static bool stop_nth(struct nth_test *self)
{
	char buf[16] = {};
	bool injected;

	injected = pread(self->nth_fd, buf, sizeof(buf) - 1, 0) > 0 &&
		   atoi(buf) == 0;
	if (pwrite(self->nth_fd, "0", 1, 0) != 1) {
		injected = false;
		TEST_ASSERT_EQ(pwrite(self->nth_fd, "0", 1, 0), 1);
	}
	return injected;
}

/* The steps of a file's life. */

static long file_pages(size_t page_size)
{
	return page_size == SZ_1G ? 1 : 2;
}

static int create(struct nth_test *self)
{
	self->fd = __vm_create_guest_memfd(self->vm, file_pages(self->page_size) *
					   self->page_size,
					   gmem_flags(self->page_size));
	return self->fd < 0 ? -1 : 0;
}

/* Use the ioctl directly: the library's function also checks a capability. */
static int bind_slot(struct nth_test *self)
{
	const struct kvm_userspace_memory_region2 region = {
		.slot = GMEM_SLOT,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = GMEM_GPA,
		.memory_size = file_pages(self->page_size) * self->page_size,
		.guest_memfd = self->fd,
	};

	return ioctl(self->vm->fd, KVM_SET_USER_MEMORY_REGION2, &region);
}

/* Only run the vCPU: set_stage() has set its command. */
static int fault(struct nth_test *self)
{
	return ioctl(self->vcpu->fd, KVM_RUN, NULL);
}

/* Use the last page: unless it is the only one, the page cache needs nodes for it. */
static u64 last_page(struct nth_test *self)
{
	return (file_pages(self->page_size) - 1) * self->page_size;
}

static int allocate(struct nth_test *self)
{
	return fallocate(self->fd, ALLOCATE, last_page(self), self->page_size);
}

static int punch(struct nth_test *self)
{
	return fallocate(self->fd, PUNCH_HOLE, last_page(self), self->page_size);
}

static int release(struct nth_test *self)
{
	int fd = self->fd;

	self->fd = -1;
	return close(fd);
}

struct sweep {
	const char *name;
	int (*step)(struct nth_test *self);
	/* A file, a slot and memory that exist before the step. */
	bool file, slot, memory;
	/* Change of the counters by the step, in pages. */
	int free, resv;
};

static void check_counters(struct nth_test *self, const struct sweep *s,
			   bool done, const char *what, int nth)
{
	long nr = file_pages(self->page_size);
	long free = 0, resv = 0;

	if (s->file)
		resv += nr;
	if (s->memory) {
		resv--;
		free--;
	}
	if (done) {
		resv += s->resv;
		free += s->free;
	}
	hugetlb_expect(&self->before, free, resv, "%s, %s %d", s->name, what, nth);
}

static void set_stage(struct nth_test *self, const struct sweep *s)
{
	hugetlb_get(self->page_size, &self->before);
	self->vm = gmem_vm_create(1, &self->vcpu);
	gmem_vm_set_attributes(self->vm, GMEM_GPA, SZ_4M, KVM_MEMORY_ATTRIBUTE_PRIVATE);
	if (s->file)
		TEST_ASSERT(!create(self), "Can't create a file");
	if (s->slot)
		TEST_ASSERT(!bind_slot(self), "Can't bind the file");
	if (s->memory)
		TEST_ASSERT(!allocate(self), "Can't allocate");
	gmem_guest_set(self->vcpu, GMEM_WRITE, GMEM_GPA + last_page(self), 8, 8, PATTERN);
}

/*
 * Fail the first allocation, then the second, and so on, until the step needs fewer.  A
 * step may succeed despite the failed allocation.
 */
static void sweep(struct nth_test *self, const struct sweep *s)
{
	bool injected;
	int nth, r, err;

	for (nth = 1; nth < MAX_NTH; nth++) {
		set_stage(self, s);
		check_counters(self, s, false, "before failure", nth);

		start_nth(self, nth);
		r = s->step(self);
		err = errno;
		injected = stop_nth(self);

		self->injected += injected;
		if (r) {
			self->failed++;
			TEST_ASSERT(injected, "%s failed without a reason: errno %d (%s)",
				    s->name, err, strerror(err));
			/* EFAULT: the copy from or to user space, or of guest memory */
			TEST_ASSERT(err == ENOMEM || err == EFAULT || err == ENOSPC,
				    "%s, failure %d: unexpected errno %d (%s)",
				    s->name, nth, err, strerror(err));
			check_counters(self, s, false, "after failure", nth);

			TEST_ASSERT(!s->step(self),
				    "%s, second try after failure %d: errno %d (%s)",
				    s->name, nth, errno, strerror(errno));
		}
		check_counters(self, s, true, "done after failure", nth);

		if (self->fd >= 0)
			release(self);
		kvm_vm_free(self->vm);
		hugetlb_expect_released(&self->before, "%s, closed after failure %d",
					s->name, nth);
		if (!injected) {
			ksft_print_msg("%s: %ld failures injected, %ld reached the caller\n",
				       s->name, self->injected, self->failed);
			return;
		}
	}
	TEST_FAIL("%s has no end of allocations", s->name);
}

TEST_F_TIMEOUT(fail_nth, create, SLOW)
{
	const struct sweep s = {
		.name = "create", .step = create,
		.resv = file_pages(self->t.page_size),
	};

	sweep(&self->t, &s);
	/* Without an injected failure nothing was tested. */
	EXPECT_LT(0, self->t.injected);
}

TEST_F_TIMEOUT(fail_nth, bind, SLOW)
{
	const struct sweep s = {
		.name = "bind", .step = bind_slot, .file = true,
	};

	sweep(&self->t, &s);
	EXPECT_LT(0, self->t.injected);
}

TEST_F_TIMEOUT(fail_nth, fault, SLOW)
{
	const struct sweep s = {
		.name = "fault", .step = fault, .file = true, .slot = true,
		.free = -1, .resv = -1,
	};

	if (self->t.page_size == SZ_1G)
		SKIP(return, TOO_LONG);

	sweep(&self->t, &s);
	EXPECT_LT(0, self->t.injected);
}

TEST_F_TIMEOUT(fail_nth, fallocate, SLOW)
{
	const struct sweep s = {
		.name = "fallocate", .step = allocate, .file = true,
		.free = -1, .resv = -1,
	};

	if (self->t.page_size == SZ_1G)
		SKIP(return, TOO_LONG);

	sweep(&self->t, &s);
	EXPECT_LT(0, self->t.injected);
}

/* These steps use or free memory that exists, and may need no allocation. */
TEST_F_TIMEOUT(fail_nth, fault_in_what_is_there, SLOW)
{
	const struct sweep s = {
		.name = "fault on allocated memory", .step = fault,
		.file = true, .slot = true, .memory = true,
	};

	if (self->t.page_size == SZ_1G)
		SKIP(return, TOO_LONG);

	sweep(&self->t, &s);
}

TEST_F_TIMEOUT(fail_nth, punch, SLOW)
{
	const struct sweep s = {
		.name = "punch", .step = punch, .file = true, .memory = true,
		.free = 1, .resv = 1,
	};

	if (self->t.page_size == SZ_1G)
		SKIP(return, TOO_LONG);

	sweep(&self->t, &s);
}

TEST_F_TIMEOUT(fail_nth, release, SLOW)
{
	const struct sweep s = {
		.name = "release", .step = release,
		.file = true, .slot = true, .memory = true,
		.free = 1, .resv = 1 - file_pages(self->t.page_size),
	};

	if (self->t.page_size == SZ_1G)
		SKIP(return, TOO_LONG);

	sweep(&self->t, &s);
	/* close() cannot report a failure. */
	EXPECT_EQ(0, self->t.failed);
}

/*
 * Fail all allocations of page cache nodes, and no others, until switched off.  Adding
 * a page tries twice, so a single failure would not be seen.
 */
static bool set_page_cache_failures(bool on)
{
	int fd = open(NODE_CACHE, O_WRONLY);
	bool ok;

	/* Set the probability first to 0, so that other allocations do not fail in between. */
	if (fd < 0 || !write_setting("failslab/probability", "0"))
		return false;
	ok = write(fd, on ? "1" : "0", 1) == 1;
	close(fd);

	fd = open("/proc/self/make-it-fail", O_WRONLY);
	ok &= fd >= 0 && write(fd, on ? "1" : "0", 1) == 1;
	close(fd);

	return ok && write_setting("failslab/cache-filter", on ? "Y" : "N") &&
	       write_setting("failslab/task-filter", on ? "Y" : "N") &&
	       write_setting("failslab/interval", "1") &&
	       write_setting("failslab/times", "-1") &&
	       (!on || write_setting("failslab/probability", "100"));
}

/* The page is allocated, zeroed and charged, but cannot be added to the page cache. */
TEST_F_TIMEOUT(fail_nth, page_cache_cannot_grow, SLOW)
{
	const size_t page_size = self->t.page_size;
	/* A base page at offset 0 needs no node. */
	const size_t offset = page_size == SZ_1G ? 0 : page_size;
	struct nth_test *t = &self->t;
	int i, r, err;

	if (access(NODE_CACHE, W_OK))
		SKIP(return, "needs CONFIG_SLUB_TINY=n");

	t->vm = gmem_vm_create(1, &t->vcpu);
	ASSERT_EQ(0, create(t));

	for (i = 0; i < 3; i++) {
		ASSERT_TRUE(set_page_cache_failures(true));
		r = fallocate(t->fd, ALLOCATE, offset, page_size);
		err = errno;
		ASSERT_TRUE(set_page_cache_failures(false));

		ASSERT_EQ(-1, r);
		ASSERT_EQ(ENOMEM, err);
		hugetlb_expect(&t->before, 0, file_pages(page_size),
			       "after failure %d", i);
		if (page_size == SZ_1G)
			break;
	}

	ASSERT_EQ(0, fallocate(t->fd, ALLOCATE, offset, page_size));
	hugetlb_expect(&t->before, -1, file_pages(page_size) - 1, "second try");

	release(t);
	kvm_vm_free(t->vm);
	hugetlb_expect_released(&t->before, "closed");
}

/*
 * Conversion in place, in the middle of a file with attributes that are mixed enough
 * for a tree of several nodes.  The range is a single page, which takes one new node,
 * or several pages.
 */
#define CONVERT_PAGES	64

FIXTURE(convert_nth)
{
	struct nth_test t;
	char *mem;
};

FIXTURE_VARIANT(convert_nth)
{
	bool private;		/* new state of the range */
	int every;		/* allocate every n-th page; 0: none */
	int first, last;	/* page numbers of the range */
};

FIXTURE_VARIANT_ADD(convert_nth, private_none_page)
{
	.private = true, .every = 0, .first = 20, .last = 20,
};

FIXTURE_VARIANT_ADD(convert_nth, private_none_range)
{
	.private = true, .every = 0, .first = 17, .last = 29,
};

FIXTURE_VARIANT_ADD(convert_nth, private_some_page)
{
	.private = true, .every = 3, .first = 20, .last = 20,
};

FIXTURE_VARIANT_ADD(convert_nth, private_some_range)
{
	.private = true, .every = 3, .first = 17, .last = 29,
};

FIXTURE_VARIANT_ADD(convert_nth, private_all_page)
{
	.private = true, .every = 1, .first = 20, .last = 20,
};

FIXTURE_VARIANT_ADD(convert_nth, private_all_range)
{
	.private = true, .every = 1, .first = 17, .last = 29,
};

FIXTURE_VARIANT_ADD(convert_nth, shared_none_page)
{
	.private = false, .every = 0, .first = 21, .last = 21,
};

FIXTURE_VARIANT_ADD(convert_nth, shared_none_range)
{
	.private = false, .every = 0, .first = 17, .last = 29,
};

FIXTURE_VARIANT_ADD(convert_nth, shared_some_page)
{
	.private = false, .every = 3, .first = 21, .last = 21,
};

FIXTURE_VARIANT_ADD(convert_nth, shared_some_range)
{
	.private = false, .every = 3, .first = 17, .last = 29,
};

FIXTURE_VARIANT_ADD(convert_nth, shared_all_page)
{
	.private = false, .every = 1, .first = 21, .last = 21,
};

FIXTURE_VARIANT_ADD(convert_nth, shared_all_range)
{
	.private = false, .every = 1, .first = 17, .last = 29,
};

FIXTURE_SETUP(convert_nth)
{
	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");

	self->t.nth_fd = open_fail_nth();
	if (self->t.nth_fd < 0 || !set_up_fault_injection())
		SKIP(return, NO_INJECTION);
}

FIXTURE_TEARDOWN(convert_nth)
{
	close(self->t.nth_fd);
}

static int convert_pages(struct nth_test *t, int first, int last, bool private)
{
	u64 error;
	int r = gmem_convert(t->fd, first * SZ_4K, (last - first + 1) * SZ_4K,
			     private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0, &error);

	if (r && errno == ENOMEM)
		TEST_ASSERT_EQ(error, first * SZ_4K);
	return r;
}

static int convert_range(struct nth_test *t,
			 const struct _fixture_variant_convert_nth *v)
{
	return convert_pages(t, v->first, v->last, v->private);
}

static bool convert_is_allocated(int page, int every)
{
	return every && !(page % every);
}

/* Create a file of alternating shared and private pages, mapped by guest and host. */
static char *convert_create(struct nth_test *t, int every)
{
	const size_t size = CONVERT_PAGES * SZ_4K;
	char *mem;
	int i;

	t->vm = gmem_vm_create(1, &t->vcpu);
	t->fd = vm_create_guest_memfd(t->vm, size, GUEST_MEMFD_FLAG_MMAP |
				      GUEST_MEMFD_FLAG_INIT_SHARED);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD,
				   GMEM_GPA, size, NULL, t->fd, 0);
	mem = kvm_mmap(size, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	for (i = 0; i < CONVERT_PAGES; i++) {
		if (convert_is_allocated(i, every)) {
			*(u64 *)(mem + i * SZ_4K) = PATTERN + i;
			gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA + i * SZ_4K,
				      8, 8, PATTERN + i);
		}
		TEST_ASSERT(!(i & 1) || !convert_pages(t, i, i, true),
			    "Page %d, errno %d (%s)", i, errno, strerror(errno));
	}
	return mem;
}

/* Check that no page was allocated or lost, and the contents and access of each. */
static void convert_check(struct nth_test *t, char *mem, bool done,
			  const struct _fixture_variant_convert_nth *v)
{
	struct stat st;
	int i, nr = 0;

	for (i = 0; i < CONVERT_PAGES; i++)
		nr += convert_is_allocated(i, v->every);
	TEST_ASSERT(!fstat(t->fd, &st), "fstat() failed");
	TEST_ASSERT_EQ(st.st_blocks, nr * SZ_4K / 512);

	for (i = 0; i < CONVERT_PAGES; i++) {
		bool in_range = i >= v->first && i <= v->last;
		u64 *word = (u64 *)(mem + i * SZ_4K);

		if (done && in_range ? v->private : i & 1)
			TEST_EXPECT_SIGBUS(READ_ONCE(*word));
		else if (convert_is_allocated(i, v->every))
			TEST_ASSERT_EQ(READ_ONCE(*word), PATTERN + i);
		if (convert_is_allocated(i, v->every))
			gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA + i * SZ_4K,
				      8, 8, PATTERN + i);
	}
}

TEST_F_TIMEOUT(convert_nth, convert, SLOW)
{
	struct nth_test *t = &self->t;
	bool injected = true;
	int nth, r, err;
	char *mem;

	for (nth = 1; injected; nth++) {
		TEST_ASSERT(nth < MAX_NTH, "There is no end of allocations");
		mem = convert_create(t, variant->every);

		start_nth(t, nth);
		r = convert_range(t, variant);
		err = errno;
		injected = stop_nth(t);

		t->injected += injected;
		if (r) {
			t->failed++;
			/* EFAULT: the copy from or to user space */
			TEST_ASSERT(injected && (err == ENOMEM || err == EFAULT),
				    "Failure %d: unexpected errno %d (%s)", nth,
				    err, strerror(err));
			convert_check(t, mem, false, variant);
			r = convert_range(t, variant);
			TEST_ASSERT(!r, "Second try after failure %d: errno %d (%s)",
				    nth, errno, strerror(errno));
		}
		convert_check(t, mem, true, variant);

		kvm_munmap(mem, CONVERT_PAGES * SZ_4K);
		kvm_close(t->fd);
		kvm_vm_free(t->vm);
	}
	ksft_print_msg("%ld failures injected, %ld reached the caller\n",
		       t->injected, t->failed);
	EXPECT_LT(0, t->failed);
}

/*
 * Splits of huge pages, by conversion and by allocation.  Undo each by converting back,
 * or by punching a hole.  Only the attributes need memory for that.
 */
FIXTURE(split_nth)
{
	struct nth_test t;
	int check;
};

FIXTURE_VARIANT(split_nth)
{
	size_t page_size;
	long nr;
	/* Offset of a page that stays shared, so that its huge page stays split; or -1. */
	u64 shared;
	u64 offset, size;
	bool allocate;
	/* Split with other huge pages in the file, merge without them. */
	bool alone;
};

FIXTURE_VARIANT_ADD(split_nth, 2m_page)
{
	.page_size = SZ_2M, .nr = 1, .shared = -1, .offset = SZ_4K, .size = SZ_4K,
};

FIXTURE_VARIANT_ADD(split_nth, 2m_three_huge_pages)
{
	.page_size = SZ_2M, .nr = 3, .shared = -1, .offset = SZ_2M - SZ_4K,
	.size = SZ_2M + SZ_8K,
};

FIXTURE_VARIANT_ADD(split_nth, 2m_allocate)
{
	.page_size = SZ_2M, .nr = 1, .shared = SZ_4K, .offset = 0, .size = SZ_2M,
	.allocate = true,
};

FIXTURE_VARIANT_ADD(split_nth, 1g_page)
{
	.page_size = SZ_1G, .nr = 2, .shared = -1, .offset = SZ_2M + SZ_4K,
	.size = SZ_4K, .alone = true,
};

FIXTURE_VARIANT_ADD(split_nth, 1g_part)
{
	.page_size = SZ_1G, .nr = 1, .shared = 0, .offset = SZ_2M - SZ_4K,
	.size = SZ_2M + SZ_8K,
};

FIXTURE_SETUP(split_nth)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct nth_test *t = &self->t;
	u64 size = variant->nr * variant->page_size;

	if (!kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))
		SKIP(return, "kvm.gmem_in_place_conversion is off");
	if (reason)
		SKIP(return, "%s", reason);

	t->nth_fd = open_fail_nth();
	if (t->nth_fd < 0 || !set_up_fault_injection())
		SKIP(return, NO_INJECTION);

	hugetlb_get(variant->page_size, &t->before);
	t->vm = gmem_vm_create(1, &t->vcpu);
	t->fd = vm_create_guest_memfd(t->vm, size, gmem_flags(variant->page_size) |
				      GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA, size,
				   NULL, t->fd, 0);
	self->check = gmem_open_check(t->vm);
}

FIXTURE_TEARDOWN(split_nth)
{
	struct nth_test *t = &self->t;

	gmem_close_check(self->check);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	kvm_close(t->nth_fd);
	hugetlb_expect_released(&t->before, "after close");
}

static int convert_step(struct nth_test *t, const struct _fixture_variant_split_nth *v,
			u64 attributes)
{
	u64 error;
	int r = gmem_convert(t->fd, v->offset, v->size, attributes, &error);

	if (r && errno == ENOMEM)
		TEST_ASSERT_EQ(error, v->offset);
	return r;
}

static int split_step(struct nth_test *t, const struct _fixture_variant_split_nth *v)
{
	if (v->allocate)
		return fallocate(t->fd, FALLOC_FL_KEEP_SIZE, v->offset, v->size);
	return convert_step(t, v, 0);
}

static int merge_step(struct nth_test *t, const struct _fixture_variant_split_nth *v)
{
	if (v->allocate)
		return fallocate(t->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, v->offset,
				 v->size);
	return convert_step(t, v, KVM_MEMORY_ATTRIBUTE_PRIVATE);
}

/* Split for a later merge.  Other huge pages exist only during the split. */
static int split_before_merge(struct nth_test *t, const struct _fixture_variant_split_nth *v)
{
	const u64 others = v->alone ? (v->nr - 1) * v->page_size : 0;
	int r;

	if (others)
		kvm_fallocate(t->fd, FALLOC_FL_KEEP_SIZE, v->page_size, others);
	r = split_step(t, v);
	if (others)
		kvm_fallocate(t->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      v->page_size, others);
	return r;
}

typedef int (*step_fn)(struct nth_test *t, const struct _fixture_variant_split_nth *v);

/* Fail each allocation of @step once.  A second attempt and @undo must succeed. */
static void sweep_steps(struct nth_test *t, int check,
			const struct _fixture_variant_split_nth *v, step_fn step,
			step_fn undo)
{
	bool injected = true;
	int nth, r, err;

	for (nth = 1; injected; nth++) {
		TEST_ASSERT(nth < 10 * MAX_NTH, "There is no end of allocations");
		start_nth(t, nth);
		r = step(t, v);
		err = errno;
		injected = stop_nth(t);

		t->injected += injected;
		if (r) {
			gmem_check(check, t->fd, true);
			t->failed++;
			TEST_ASSERT(injected && (err == ENOMEM || err == EFAULT),
				    "Failure %d: unexpected errno %d (%s)", nth, err,
				    strerror(err));
			TEST_ASSERT(!step(t, v), "Second try after failure %d: errno %d (%s)",
				    nth, errno, strerror(errno));
		} else if (injected && step == merge_step) {
			/* A merge that fails is put off: make up for it. */
			TEST_ASSERT(!undo(t, v) && !step(t, v), "Again: errno %d (%s)",
				    errno, strerror(errno));
		}
		gmem_check(check, t->fd, true);
		TEST_ASSERT(!undo(t, v), "Can't undo: errno %d (%s)", errno, strerror(errno));
		gmem_check(check, t->fd, true);
	}
	ksft_print_msg("%ld failures injected, %ld reached the caller\n", t->injected,
		       t->failed);
}

/* Fill the memory unless the step allocates it, and share the page at v->shared. */
static void prepare_split(struct nth_test *t, const struct _fixture_variant_split_nth *v)
{
	if (!v->allocate)
		gmem_guest_do(t->vcpu, GMEM_WRITE, GMEM_GPA, v->nr * v->page_size, SZ_4K,
			      PATTERN);
	if (v->shared != -1)
		TEST_ASSERT(!gmem_convert(t->fd, v->shared, SZ_4K, 0, NULL),
			    "Can't convert: errno %d", errno);
}

static void check_memory(struct nth_test *t, const struct _fixture_variant_split_nth *v)
{
	if (!v->allocate)
		gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA, v->nr * v->page_size, SZ_4K,
			      PATTERN);
}

TEST_F_TIMEOUT(split_nth, split, SLOW)
{
	prepare_split(&self->t, variant);
	sweep_steps(&self->t, self->check, variant, split_step, merge_step);
	check_memory(&self->t, variant);
	EXPECT_LT(0, self->t.failed);
}

/*
 * How many allocations are essential for a step.  Allocators sometimes allocate memory
 * for themselves, often on debug kernels, so one sweep may count too many or miss one.
 */
struct needed {
	long min, max;
};

static struct needed count_needed(struct nth_test *t, int check,
				  const struct _fixture_variant_split_nth *v, step_fn step,
				  step_fn undo)
{
	struct needed n = { .min = LONG_MAX };
	int i;

	for (i = 0; i < 3; i++) {
		t->injected = 0;
		t->failed = 0;
		sweep_steps(t, check, v, step, undo);
		n.min = min(n.min, t->failed);
		n.max = max(n.max, t->failed);
	}
	return n;
}

/*
 * A merge needs memory for the attributes at most, and none for the folios.  Compare
 * with a file of base pages.  Allow one more allocation, a node of the page cache, if
 * that has become lower.
 */
TEST_F_TIMEOUT(split_nth, merge, SLOW)
{
	struct _fixture_variant_split_nth v = *variant;
	struct nth_test base = self->t;
	struct needed huge, small;

	prepare_split(&self->t, &v);
	TEST_ASSERT(!split_before_merge(&self->t, &v), "Can't split: errno %d", errno);
	huge = count_needed(&self->t, self->check, &v, merge_step, split_before_merge);
	TEST_ASSERT(!merge_step(&self->t, &v), "Can't merge: errno %d", errno);
	if (v.alone)
		v.nr = 1;
	check_memory(&self->t, &v);

	v.alone = false;
	base.fd = vm_create_guest_memfd(base.vm, v.nr * v.page_size, GUEST_MEMFD_FLAG_MMAP);
	if (!v.allocate)
		kvm_fallocate(base.fd, FALLOC_FL_KEEP_SIZE, v.offset, v.size);
	if (v.shared != -1)
		TEST_ASSERT(!gmem_convert(base.fd, v.shared, SZ_4K, 0, NULL),
			    "Can't convert: errno %d", errno);
	TEST_ASSERT(!split_step(&base, &v), "Can't share: errno %d", errno);
	small = count_needed(&base, self->check, &v, merge_step, split_step);
	EXPECT_LE(huge.min, small.max + variant->alone);
	kvm_close(base.fd);
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));

	gmem_prepare_pools();
	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
