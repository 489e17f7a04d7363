// SPDX-License-Identifier: GPL-2.0-only
/*
 * A page in a pipe can be a gift, and whoever gets it and is the only one to use it may
 * keep it.  A FUSE server's reply goes into the page cache in that way.  A piece of a
 * huge page must not be kept: its pool wants it back.
 */
#include <fcntl.h>
#include <pthread.h>

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
#include "test_util.h"

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

#define PATTERN		0x600d600d00000000ull

#define REQUEST_SIZE	(FUSE_MIN_READ_BUFFER + SZ_4K)

struct server {
	int dev;
	int pipe[2];		/* has the page that the file consists of */
	long replies;		/* with that page */
	char dir[32];
};

FIXTURE(steal)
{
	struct server s;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
	char *mem;
	struct hugetlb_counters counters;
};

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

	TEST_ASSERT(writev(s->dev, iov, size ? 2 : 1) == out.len,
		    "Reply to %d failed: errno %d (%s)", in->opcode, errno, strerror(errno));
}

/* Give away the page in the pipe, behind a header. */
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

static void fill_attr(struct fuse_attr *attr, u64 nodeid)
{
	attr->ino = nodeid;
	attr->nlink = 1;
	attr->mode = nodeid == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0444;
	attr->size = nodeid == FUSE_ROOT_ID ? 0 : SZ_4K;
}

static void serve_one(struct server *s, const struct fuse_in_header *in)
{
	struct fuse_init_out init = {
		.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION,
		.max_write = SZ_4K,
	};
	struct fuse_entry_out entry = { .nodeid = 2, .entry_valid = 60, .attr_valid = 60 };
	struct fuse_attr_out attr = { .attr_valid = 60 };
	struct fuse_open_out open = {};

	switch (in->opcode) {
	case FUSE_INIT:
		reply(s, in, 0, &init, sizeof(init));
		break;
	case FUSE_LOOKUP:
		fill_attr(&entry.attr, entry.nodeid);
		reply(s, in, 0, &entry, sizeof(entry));
		break;
	case FUSE_GETATTR:
		fill_attr(&attr.attr, in->nodeid);
		reply(s, in, 0, &attr, sizeof(attr));
		break;
	case FUSE_OPEN:
		reply(s, in, 0, &open, sizeof(open));
		break;
	case FUSE_READ:
		reply_with_page(s, in);
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

/* Until the file system is unmounted. */
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

FIXTURE_SETUP(steal)
{
	const char *reason = gmem_unavailable(SZ_2M);

	if (reason)
		SKIP(return, "%s", reason);

	self->s = (struct server) { .dir = "/tmp/fuse-XXXXXX" };
	self->s.dev = open("/dev/fuse", O_RDWR);
	if (self->s.dev < 0)
		SKIP(return, "needs CONFIG_FUSE_FS");

	TEST_ASSERT(mkdtemp(self->s.dir), "mkdtemp() failed: errno %d", errno);
	TEST_ASSERT(!pipe(self->s.pipe), "pipe() failed");
	hugetlb_get(SZ_2M, &self->counters);
	self->vm = gmem_vm_create(1, &self->vcpu);
	self->fd = vm_create_guest_memfd(self->vm, SZ_2M, gmem_flags(SZ_2M) |
					 GUEST_MEMFD_FLAG_MMAP |
					 GUEST_MEMFD_FLAG_INIT_SHARED);
	self->mem = kvm_mmap(SZ_2M, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	vm_set_user_memory_region2(self->vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   SZ_2M, NULL, self->fd, 0);
}

FIXTURE_TEARDOWN(steal)
{
	kvm_munmap(self->mem, SZ_2M);
	kvm_vm_free(self->vm);
	kvm_close(self->fd);
	kvm_close(self->s.dev);
	kvm_close(self->s.pipe[0]);
	kvm_close(self->s.pipe[1]);
	rmdir(self->s.dir);
}

TEST_F(steal, page_cache_keeps_no_piece_of_a_huge_page)
{
	struct iovec iov = { .iov_base = self->mem + SZ_4K, .iov_len = SZ_4K };
	struct server *s = &self->s;
	pthread_t thread;
	char options[64];
	char path[48];
	u64 word = 0;
	int fd;

	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0",
		 s->dev);
	TEST_ASSERT(!mount("test", s->dir, "fuse", 0, options), "mount() failed: errno %d",
		    errno);
	kvm_pthread_create(&thread, NULL, serve, s);

	/* The last to use the page is the pipe.  A dirty page would be refused for that. */
	gmem_guest_do(self->vcpu, GMEM_WRITE, GMEM_GPA + SZ_4K, 8, 8, PATTERN);
	TEST_ASSERT(vmsplice(s->pipe[1], &iov, 1, SPLICE_F_GIFT) == SZ_4K,
		    "vmsplice() failed: errno %d", errno);
	kvm_fallocate(self->fd, PUNCH_HOLE, 0, SZ_2M);
	EXPECT_EQ(1, hugetlb_read(SZ_2M, "guestmem_waiting_hugepages"));

	snprintf(path, sizeof(path), "%s/file", s->dir);
	fd = open_path_or_exit(path, O_RDONLY);
	EXPECT_EQ(sizeof(word), read(fd, &word, sizeof(word)));
	EXPECT_EQ(PATTERN, word);
	EXPECT_EQ(1, READ_ONCE(s->replies));

	/* The file system has what was in it, and not the page. */
	kvm_munmap(self->mem, SZ_2M);
	kvm_close(self->fd);
	hugetlb_expect_released(&self->counters, "file system has read the page");
	EXPECT_EQ(0, hugetlb_read(SZ_2M, "guestmem_waiting_hugepages"));
	EXPECT_EQ(sizeof(word), pread(fd, &word, sizeof(word), 0));
	EXPECT_EQ(PATTERN, word);
	EXPECT_EQ(1, READ_ONCE(s->replies));

	kvm_close(fd);
	TEST_ASSERT(!umount(s->dir), "umount() failed: errno %d", errno);
	kvm_pthread_join(thread, NULL);
	self->mem = kvm_mmap(SZ_2M, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	self->fd = open_path_or_exit("/dev/null", O_RDONLY);
}

int main(int argc, char *argv[])
{
	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
