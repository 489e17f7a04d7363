// SPDX-License-Identifier: GPL-2.0-only
/*
 * Test the use of pieces of huge pages by a file system.  The test is the server of a
 * FUSE file system, and so determines when requests complete.
 *
 * A pipe buffer can be a gift: its consumer may steal the page if it has the only
 * reference.  FUSE thus moves a page of the server's reply into the page cache.  A
 * piece of a huge page must not be stolen, as it has to return to its pool.
 *
 * Direct I/O pins pages until it completes.
 */
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>

#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <linux/falloc.h>
#include <linux/fuse.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0
#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

#define PATTERN		0x600d600d00000000ull

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

/* Size of the shared range, and the buffer in it for direct I/O. */
#define SHARED_SIZE	SZ_64K
#define BUFFER		SZ_16K
#define IO_SIZE		SZ_8K

#define REQUEST_SIZE	(FUSE_MIN_READ_BUFFER + IO_SIZE)

struct server {
	int dev;
	int pipe[2];		/* has the page to reply to reads with */
	bool holds;		/* reply with data instead, after go is posted */
	sem_t arrived, go;
	u64 data[IO_SIZE / sizeof(u64)];
	u32 size;		/* of the file */
	long replies;		/* with data */
	char dir[32];
	pthread_t thread;
};

struct fuse_test {
	struct server s;
	size_t page_size;
	bool converts;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
	int check;
	char *mem;
	char path[48];
	struct hugetlb_counters counters;
};

FIXTURE(fuse)
{
	struct fuse_test t;
};

FIXTURE_VARIANT(fuse)
{
	size_t page_size;
	bool converts;
};

FIXTURE_VARIANT_ADD(fuse, 2m) { .page_size = SZ_2M, .converts = true, };
FIXTURE_VARIANT_ADD(fuse, 2m_shared) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(fuse, 1g) { .page_size = SZ_1G, .converts = true, };
FIXTURE_VARIANT_ADD(fuse, 1g_shared) { .page_size = SZ_1G, };

static void reply(struct server *s, const struct fuse_in_header *in, int error,
		  void *data, size_t size)
{
	struct fuse_out_header out = {
		.len = sizeof(out) + size, .error = error, .unique = in->unique,
	};
	struct iovec iov[] = {
		{ .iov_base = &out, .iov_len = sizeof(out) },
		{ .iov_base = data, .iov_len = size },
	};
	ssize_t r = writev(s->dev, iov, size ? 2 : 1);

	/* RELEASE is asynchronous: umount() can abort the request before the reply. */
	if (r < 0 && errno == ENOENT && in->opcode == FUSE_RELEASE)
		return;

	TEST_ASSERT(r == out.len, "Reply to %d failed: errno %d (%s)",
		    in->opcode, errno, strerror(errno));
}

/* Move the page in the pipe to the page cache, if FUSE can steal it. */
static void reply_with_page(struct server *s, const struct fuse_in_header *in)
{
	struct fuse_out_header out = {
		.len = sizeof(out) + SZ_4K, .unique = in->unique,
	};
	struct iovec iov = { .iov_base = &out, .iov_len = sizeof(out) };
	int fds[2];

	s->replies++;
	TEST_ASSERT(!pipe(fds), "pipe() failed");
	TEST_ASSERT(vmsplice(fds[1], &iov, 1, 0) == sizeof(out), "vmsplice() failed");
	TEST_ASSERT(splice(s->pipe[0], NULL, fds[1], NULL, SZ_4K, 0) == SZ_4K,
		    "splice() to a pipe failed: errno %d (%s)", errno, strerror(errno));
	TEST_ASSERT(splice(fds[0], NULL, s->dev, NULL, out.len, SPLICE_F_MOVE) == out.len,
		    "splice() to FUSE failed: errno %d (%s)", errno, strerror(errno));
	kvm_close(fds[0]);
	kvm_close(fds[1]);
}

/* Let the test run while the kernel has pages pinned for this request. */
static void hold(struct server *s)
{
	TEST_ASSERT(!sem_post(&s->arrived) && !sem_wait(&s->go), "semaphores failed");
}

static void serve_read(struct server *s, const struct fuse_in_header *in)
{
	const struct fuse_read_in *arg = (void *)(in + 1);

	if (!s->holds)
		return reply_with_page(s, in);

	TEST_ASSERT(arg->offset + arg->size <= sizeof(s->data), "Asked for too much");
	hold(s);
	s->replies++;
	reply(s, in, 0, (void *)s->data + arg->offset, arg->size);
}

static void serve_write(struct server *s, const struct fuse_in_header *in)
{
	const struct fuse_write_in *arg = (void *)(in + 1);
	struct fuse_write_out out = { .size = arg->size };

	TEST_ASSERT(arg->offset + arg->size <= sizeof(s->data), "Got too much");
	memcpy((void *)s->data + arg->offset, arg + 1, arg->size);
	hold(s);
	reply(s, in, 0, &out, sizeof(out));
}

static void fill_attr(struct server *s, struct fuse_attr *attr, u64 nodeid)
{
	attr->ino = nodeid;
	attr->nlink = 1;
	attr->mode = nodeid == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0644;
	attr->size = nodeid == FUSE_ROOT_ID ? 0 : s->size;
}

static void serve_one(struct server *s, const struct fuse_in_header *in)
{
	struct fuse_init_out init = {
		.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION,
		.max_write = IO_SIZE,
	};
	struct fuse_entry_out entry = { .nodeid = 2, .entry_valid = 60, .attr_valid = 60 };
	struct fuse_attr_out attr = { .attr_valid = 60 };
	struct fuse_open_out open = {};

	switch (in->opcode) {
	case FUSE_INIT:
		reply(s, in, 0, &init, sizeof(init));
		break;
	case FUSE_LOOKUP:
		fill_attr(s, &entry.attr, entry.nodeid);
		reply(s, in, 0, &entry, sizeof(entry));
		break;
	case FUSE_GETATTR:
		fill_attr(s, &attr.attr, in->nodeid);
		reply(s, in, 0, &attr, sizeof(attr));
		break;
	case FUSE_OPEN:
		reply(s, in, 0, &open, sizeof(open));
		break;
	case FUSE_READ:
		serve_read(s, in);
		break;
	case FUSE_WRITE:
		serve_write(s, in);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		break;
	case FUSE_RELEASE:
	case FUSE_FLUSH:
		reply(s, in, 0, NULL, 0);
		break;
	default:
		reply(s, in, -EOPNOTSUPP, NULL, 0);
	}
}

/* Serve requests until the file system is unmounted. */
static void *serve(void *arg)
{
	struct server *s = arg;
	union {
		struct fuse_in_header in;
		char buf[REQUEST_SIZE];
	} request;

	while (read(s->dev, &request, sizeof(request)) > 0)
		serve_one(s, &request.in);
	return NULL;
}

static void convert(struct fuse_test *t, u64 offset, u64 size, u64 attributes)
{
	TEST_ASSERT(!gmem_convert(t->fd, offset, size, attributes, NULL),
		    "0x%lx bytes at 0x%lx cannot be 0x%lx: errno %d", size, offset,
		    attributes, errno);
}

FIXTURE_SETUP(fuse)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct fuse_test *t = &self->t;
	struct server *s = &t->s;
	char options[64];

	if (reason)
		SKIP(return, "%s", reason);
	reason = variant->converts ? gmem_conversion_unavailable() : NULL;
	if (reason)
		SKIP(return, "%s", reason);

	t->page_size = variant->page_size;
	t->converts = variant->converts;
	*s = (struct server) { .dir = "/tmp/fuse-XXXXXX", .size = SZ_4K };
	s->dev = open("/dev/fuse", O_RDWR);
	if (s->dev < 0)
		SKIP(return, "needs CONFIG_FUSE_FS");

	TEST_ASSERT(!sem_init(&s->arrived, 0, 0) && !sem_init(&s->go, 0, 0), "no semaphores");
	TEST_ASSERT(!pipe(s->pipe), "pipe() failed");
	TEST_ASSERT(mkdtemp(s->dir), "mkdtemp() failed: errno %d", errno);
	snprintf(t->path, sizeof(t->path), "%s/file", s->dir);
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0",
		 s->dev);
	TEST_ASSERT(!mount("test", s->dir, "fuse", 0, options), "mount() failed: errno %d",
		    errno);
	kvm_pthread_create(&s->thread, NULL, serve, s);

	hugetlb_get(t->page_size, &t->counters);
	t->vm = gmem_vm_create_type(t->converts ? KVM_X86_SW_PROTECTED_VM :
				    KVM_X86_DEFAULT_VM, 1, &t->vcpu);
	t->check = gmem_open_check(t->vm);
	t->fd = vm_create_guest_memfd(t->vm, t->page_size, gmem_flags(t->page_size) |
				      GUEST_MEMFD_FLAG_MMAP |
				      (t->converts ? 0 : GUEST_MEMFD_FLAG_INIT_SHARED));
	if (t->converts)
		convert(t, 0, SHARED_SIZE, SHARED);
	t->mem = kvm_mmap(SHARED_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd);
	vm_set_user_memory_region2(t->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   t->page_size, NULL, t->fd, 0);
}

/*
 * Free the file and its VM.  Only a pipe or direct I/O still has references to pages.
 */
static void lose_file(struct fuse_test *t)
{
	if (!t->vm)
		return;

	kvm_munmap(t->mem, SHARED_SIZE);
	gmem_close_check(t->check);
	kvm_vm_free(t->vm);
	kvm_close(t->fd);
	t->vm = NULL;
}

FIXTURE_TEARDOWN(fuse)
{
	struct fuse_test *t = &self->t;
	struct server *s = &t->s;

	lose_file(t);
	TEST_ASSERT(!umount(s->dir), "umount() failed: errno %d", errno);
	kvm_pthread_join(s->thread, NULL);
	kvm_close(s->dev);
	kvm_close(s->pipe[0]);
	kvm_close(s->pipe[1]);
	TEST_ASSERT(!rmdir(s->dir), "rmdir() failed: errno %d", errno);
	hugetlb_expect_released(&t->counters, "after the test");
}

TEST_F_TIMEOUT(fuse, page_cache_keeps_no_piece_of_a_huge_page, SLOW)
{
	struct fuse_test *t = &self->t;
	struct iovec iov = { .iov_base = t->mem + SZ_4K, .iov_len = SZ_4K };
	struct server *s = &t->s;
	u64 word = 0;
	int fd;

	/*
	 * Write from the guest: FUSE refuses a page that a write of the host made
	 * dirty.  After the punch, the pipe has the only reference.
	 */
	gmem_guest_do(t->vcpu, GMEM_WRITE, GMEM_GPA + SZ_4K, 8, 8, PATTERN);
	TEST_ASSERT(vmsplice(s->pipe[1], &iov, 1, SPLICE_F_GIFT) == SZ_4K,
		    "vmsplice() failed: errno %d", errno);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->page_size);
	EXPECT_EQ(1, hugetlb_read(t->page_size, "waiting_hugepages"));

	fd = open_path_or_exit(t->path, O_RDONLY);
	EXPECT_EQ(sizeof(word), read(fd, &word, sizeof(word)));
	EXPECT_EQ(PATTERN, word);
	EXPECT_EQ(1, READ_ONCE(s->replies));

	/* The page cache has a copy of the data, and not the page. */
	lose_file(t);
	hugetlb_expect_released(&t->counters, "file system has read the page");
	EXPECT_EQ(0, hugetlb_read(t->page_size, "waiting_hugepages"));
	EXPECT_EQ(sizeof(word), pread(fd, &word, sizeof(word), 0));
	EXPECT_EQ(PATTERN, word);
	EXPECT_EQ(1, READ_ONCE(s->replies));
	kvm_close(fd);
}

/*
 * Direct I/O to or from the buffer.
 */

struct io {
	struct fuse_test *t;
	bool write;
	pthread_t thread;
};

static void *do_io(void *arg)
{
	struct io *io = arg;
	void *buf = io->t->mem + BUFFER;
	ssize_t r;
	int fd;

	fd = open_path_or_exit(io->t->path, O_RDWR | O_DIRECT);
	r = io->write ? pwrite(fd, buf, IO_SIZE, 0) : pread(fd, buf, IO_SIZE, 0);
	TEST_ASSERT(r == IO_SIZE, "I/O failed: %ld, errno %d (%s)", r, errno,
		    strerror(errno));
	kvm_close(fd);
	return NULL;
}

/* Start direct I/O.  Return when the kernel has pinned the pages. */
static void begin_io(struct fuse_test *t, struct io *io, bool write)
{
	u64 i;

	for (i = 0; i < IO_SIZE; i += 8) {
		*(u64 *)(t->mem + BUFFER + i) = write ? PATTERN + i : 0;
		t->s.data[i / 8] = write ? 0 : PATTERN + i;
	}
	t->s.holds = true;
	t->s.size = IO_SIZE;
	io->t = t;
	io->write = write;
	kvm_pthread_create(&io->thread, NULL, do_io, io);
	TEST_ASSERT(!sem_wait(&t->s.arrived), "sem_wait() failed");
}

static void end_io(struct fuse_test *t, struct io *io)
{
	TEST_ASSERT(!sem_post(&t->s.go), "sem_post() failed");
	kvm_pthread_join(io->thread, NULL);
}

/* Pages under I/O cannot be converted, but all others can. */
static void expect_pinned(struct fuse_test *t)
{
	u64 error;

	TEST_ASSERT(gmem_convert(t->fd, 0, SHARED_SIZE, PRIVATE, &error) && errno == EAGAIN,
		    "Could convert pinned pages, or errno %d", errno);
	TEST_ASSERT_EQ(error, BUFFER);
	gmem_check(t->check, t->fd, true);
	convert(t, 0, BUFFER, PRIVATE);
	convert(t, BUFFER + IO_SIZE, SHARED_SIZE - BUFFER - IO_SIZE, PRIVATE);
	gmem_check(t->check, t->fd, true);
}

static void do_direct_io(struct fuse_test *t, bool write)
{
	void *result = write ? (void *)t->s.data : t->mem + BUFFER;
	struct io io;
	u64 i;

	begin_io(t, &io, write);
	if (t->converts)
		expect_pinned(t);
	end_io(t, &io);

	for (i = 0; i < IO_SIZE; i += 8)
		TEST_ASSERT_EQ(*(u64 *)(result + i), PATTERN + i);
	gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA + BUFFER, IO_SIZE, 8, PATTERN);
	if (t->converts) {
		convert(t, BUFFER, IO_SIZE, PRIVATE);
		gmem_guest_do(t->vcpu, GMEM_CHECK, GMEM_GPA + BUFFER, IO_SIZE, 8, PATTERN);
	}
	gmem_check(t->check, t->fd, true);
}

TEST_F_TIMEOUT(fuse, direct_read, SLOW)
{
	do_direct_io(&self->t, false);
}

TEST_F_TIMEOUT(fuse, direct_write, SLOW)
{
	do_direct_io(&self->t, true);
}

/* Direct I/O into a page that has left the file does not change the file. */
TEST_F_TIMEOUT(fuse, direct_read_while_punched, SLOW)
{
	struct fuse_test *t = &self->t;
	struct hugetlb_counters before;
	struct io io;

	hugetlb_get(t->page_size, &before);
	begin_io(t, &io, false);
	kvm_fallocate(t->fd, PUNCH_HOLE, 0, t->page_size);
	EXPECT_EQ(1, hugetlb_read(t->page_size, "waiting_hugepages"));
	hugetlb_expect(&before, -1, -1, "while it is read into");
	end_io(t, &io);
	hugetlb_expect_released(&before, "after it has been read into");
	EXPECT_EQ(0, hugetlb_read(t->page_size, "waiting_hugepages"));
	EXPECT_EQ(0, READ_ONCE(*(u64 *)(t->mem + BUFFER)));
	gmem_check(t->check, t->fd, true);
}

TEST_F_TIMEOUT(fuse, direct_write_while_closed, SLOW)
{
	struct fuse_test *t = &self->t;
	struct io io;
	u64 i;

	begin_io(t, &io, true);
	lose_file(t);
	EXPECT_EQ(1, hugetlb_read(t->page_size, "waiting_hugepages"));
	end_io(t, &io);
	hugetlb_expect_released(&t->counters, "after it has been written");
	EXPECT_EQ(0, hugetlb_read(t->page_size, "waiting_hugepages"));
	for (i = 0; i < IO_SIZE; i += 8)
		TEST_ASSERT_EQ(t->s.data[i / 8], PATTERN + i);
}

int main(int argc, char *argv[])
{
	gmem_prepare_pools();
	gmem_merge_at_once();
	return test_harness_run(argc, argv);
}
