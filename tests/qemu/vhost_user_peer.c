// SPDX-License-Identifier: GPL-2.0
/*
 * A disk for a guest of QEMU, served by another process: a vhost-user backend
 * for one virtio block device with one virtqueue.
 *
 *	vhost_user_peer /tmp/disk &
 *	qemu-system-x86_64 -accel kvm -m 1G ... \
 *		-object memory-backend-memfd,id=m,size=1G,share=on,$KIND \
 *		-machine q35,smm=off,memory-backend=m \
 *		-chardev socket,id=disk,path=/tmp/disk \
 *		-device vhost-user-blk-pci,chardev=disk,num-queues=1
 *
 * With KIND=guest-memfd=on,hugetlb=on,hugetlbsize=2M the memory of the guest is a
 * guest_memfd file of HugeTLB pages.  It can be shared with any process, like that
 * of other files.  Such a process has to consider:
 *
 *  - The file belongs to a KVM VM of QEMU, but mmap() and the other operations
 *    here need neither that VM nor /dev/kvm.
 *  - st_blksize is the page size, and a mapping consists of whole pages.
 *  - Memory can be inaccessible, because it is private or has a memory error.
 *    Loads and stores get SIGBUS then, system calls fail with EFAULT.  The guest
 *    chooses the addresses, so neither may end the process.
 *  - The mapping keeps the huge pages in use after the VM is destroyed.
 *
 * The disk is initially zero and exists as long as the process runs.  The process
 * ends when QEMU ends, and prints statistics.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vhost_types.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#define GUEST_MEMFD_MAGIC	0x474d454d
#define SECTOR_SIZE		512
#define MAX_REGIONS		8
#define MAX_QUEUE_SIZE		1024	/* IOV_MAX */
#define MAX_SEGMENTS		126	/* in a queue of 128, as QEMU has it */

#define BIT(n)			(1ULL << (n))
#define READ_ONCE(x)		(*(const volatile __typeof__(x) *)&(x))

/* The protocol: docs/interop/vhost-user.rst of QEMU. */
enum {
	GET_FEATURES		= 1,
	SET_FEATURES		= 2,
	SET_OWNER		= 3,
	SET_MEM_TABLE		= 5,
	SET_VRING_NUM		= 8,
	SET_VRING_ADDR		= 9,
	SET_VRING_BASE		= 10,
	GET_VRING_BASE		= 11,
	SET_VRING_KICK		= 12,
	SET_VRING_CALL		= 13,
	SET_VRING_ERR		= 14,
	GET_PROTOCOL_FEATURES	= 15,
	SET_PROTOCOL_FEATURES	= 16,
	SET_VRING_ENABLE	= 18,
	SET_BACKEND_REQ_FD	= 21,
	GET_CONFIG		= 24,
};

#define VERSION			1
#define REPLY			BIT(2)
#define NEED_REPLY		BIT(3)

/* ACCESS_PLATFORM is for guests that have private memory. */
#define F_PROTOCOL_FEATURES	30
#define FEATURES							\
	(BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_F_ACCESS_PLATFORM) |	\
	 BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_FLUSH) |		\
	 BIT(F_PROTOCOL_FEATURES))

/* QEMU wants BACKEND_REQ for ACCESS_PLATFORM.  It is not used. */
#define PROTOCOL_F_REPLY_ACK	3
#define PROTOCOL_F_BACKEND_REQ	5
#define PROTOCOL_F_CONFIG	9
#define PROTOCOL_FEATURES						\
	(BIT(PROTOCOL_F_REPLY_ACK) | BIT(PROTOCOL_F_BACKEND_REQ) |	\
	 BIT(PROTOCOL_F_CONFIG))

/* A part of guest memory, and where it is in a file. */
struct region {
	__u64 guest_addr;
	__u64 size;
	__u64 qemu_addr;	/* in the address space of QEMU */
	__u64 offset;
};

struct message {
	__u32 unused;		/* aligns what follows the head */
	struct head {
		__u32 request;
		__u32 flags;
		__u32 size;	/* of what follows */
	} head;
	union payload {
		__u64 value;
		struct vhost_vring_state state;
		struct vhost_vring_addr addr;
		struct {
			__u32 nr;
			__u32 padding;
			struct region regions[MAX_REGIONS];
		} mem;
		struct {
			__u32 offset;
			__u32 size;
			__u32 flags;
			union {
				__u8 data[256];
				struct virtio_blk_config blk;
			};
		} config;
	} u;
	int fds[MAX_REGIONS];	/* -1: none, or taken over */
};

static struct mapping {
	struct region region;
	void *start;
	size_t size;
	void *region_start;
} mappings[MAX_REGIONS];
static unsigned int nr_mappings;

static struct {
	unsigned int size;
	struct vhost_vring_addr addr;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	__u16 next;		/* of both rings: requests are served in order */
	int kick, call, err;	/* eventfds, or -1 */
	bool enabled;
	const char *broken;	/* why it waits to be reset by its driver */
} queue = { .kick = -1, .call = -1, .err = -1 };

static int backend_req = -1;
static int disk;
static __u64 disk_size;

static struct {
	unsigned long starts, reads, writes, flushes, errors;
	__u64 bytes;
} served;

static sigjmp_buf no_access;
static volatile sig_atomic_t in_guest_memory;

/* Guest memory */

static void unmap_all(void)
{
	while (nr_mappings > 0) {
		nr_mappings--;
		munmap(mappings[nr_mappings].start, mappings[nr_mappings].size);
	}
}

static int map_region(const struct region *region, int fd)
{
	struct mapping *m = &mappings[nr_mappings];
	__u64 page_size, start, end;
	struct statfs statfs;
	struct stat stat;

	if (fstat(fd, &stat) || fstatfs(fd, &statfs))
		return -errno;
	page_size = stat.st_blksize;

	/* A region does not have to consist of whole pages of the file. */
	if (__builtin_add_overflow(region->offset, region->size, &end) ||
	    __builtin_add_overflow(end, page_size - 1, &end))
		return -EINVAL;
	end -= end % page_size;
	start = region->offset - region->offset % page_size;

	m->start = mmap(NULL, end - start, PROT_READ | PROT_WRITE, MAP_SHARED,
			fd, start);
	if (m->start == MAP_FAILED)
		return -errno;
	m->size = end - start;
	m->region = *region;
	m->region_start = m->start + (region->offset - start);
	nr_mappings++;

	printf("region: guest %#llx, %llu KiB, offset %#llx, pages of %llu KiB, %s\n",
	       region->guest_addr, region->size >> 10, region->offset, page_size >> 10,
	       statfs.f_type == GUEST_MEMFD_MAGIC ?
	       "guest_memfd" : "not guest_memfd");
	return 0;
}

/* Find the mapping of the bytes at an address, if they are all in one region. */
static void *memory_at(__u64 addr, __u64 size, bool qemu_addr)
{
	const struct region *r;
	unsigned int i;
	__u64 offset;

	for (i = 0; i < nr_mappings; i++) {
		r = &mappings[i].region;
		offset = addr - (qemu_addr ? r->qemu_addr : r->guest_addr);
		if (offset < r->size && size <= r->size - offset)
			return mappings[i].region_start + offset;
	}
	return NULL;
}

static void bus_error(int sig)
{
	if (in_guest_memory)
		siglongjmp(no_access, 1);
	signal(sig, SIG_DFL);	/* a bug: the next signal is fatal */
}

/* The virtqueue */

/* Move data by system calls, which fail if memory is inaccessible. */
static __u8 transfer(bool write, __u64 sector, const struct iovec *iov, int nr)
{
	__u64 bytes = 0;
	ssize_t done;
	int i;

	for (i = 0; i < nr; i++)
		bytes += iov[i].iov_len;
	if (bytes % SECTOR_SIZE || bytes > disk_size ||
	    sector > (disk_size - bytes) / SECTOR_SIZE)
		return VIRTIO_BLK_S_IOERR;

	if (write)
		done = pwritev(disk, iov, nr, sector * SECTOR_SIZE);
	else
		done = preadv(disk, iov, nr, sector * SECTOR_SIZE);
	if (done < 0 || (__u64)done != bytes)
		return VIRTIO_BLK_S_IOERR;

	*(write ? &served.writes : &served.reads) += 1;
	served.bytes += bytes;
	return VIRTIO_BLK_S_OK;
}

/*
 * Serve the request that starts with the descriptor @next: a header, data and a
 * status.  Header and status are in separate descriptors, as Linux and firmware
 * have them.  Return the number of bytes of guest memory that can have been
 * written, or 0 if it is not a valid request.
 */
static __u32 serve_request(unsigned int next)
{
	static struct iovec iov[MAX_QUEUE_SIZE];
	unsigned int nr = 0, nr_readable = 0;
	struct virtio_blk_outhdr header;
	__u8 status = VIRTIO_BLK_S_UNSUPP;
	struct vring_desc desc;
	__u64 writable = 0;

	do {
		if (nr == queue.size || next >= queue.size)
			return 0;
		/* Read it once: the guest may change it at any time. */
		desc = READ_ONCE(queue.desc[next]);
		iov[nr].iov_base = memory_at(desc.addr, desc.len, false);
		iov[nr].iov_len = desc.len;
		if (!iov[nr].iov_base || desc.flags & VRING_DESC_F_INDIRECT)
			return 0;
		if (desc.flags & VRING_DESC_F_WRITE)
			writable += desc.len;
		else if (nr_readable++ != nr)
			return 0;
		nr++;
		next = desc.next;
	} while (desc.flags & VRING_DESC_F_NEXT);

	if (!nr_readable || iov[0].iov_len != sizeof(header) ||
	    nr_readable == nr || iov[nr - 1].iov_len != 1)
		return 0;
	memcpy(&header, iov[0].iov_base, sizeof(header));

	if (header.type == VIRTIO_BLK_T_OUT && nr_readable == nr - 1) {
		status = transfer(true, header.sector, iov + 1, nr - 2);
	} else if (header.type == VIRTIO_BLK_T_IN && nr_readable == 1) {
		status = transfer(false, header.sector, iov + 1, nr - 2);
	} else if (header.type == VIRTIO_BLK_T_FLUSH) {
		served.flushes++;
		status = VIRTIO_BLK_S_OK;
	}
	if (status == VIRTIO_BLK_S_IOERR)
		served.errors++;
	*(__u8 *)iov[nr - 1].iov_base = status;
	return writable;
}

static void *ring_at(__u64 addr, __u64 size, __u64 align)
{
	return addr % align ? NULL : memory_at(addr, size, true);
}

/* Called for each kick, as the memory table may have changed. */
static bool find_rings(void)
{
	unsigned int n = queue.size;

	queue.desc = ring_at(queue.addr.desc_user_addr,
			     n * sizeof(struct vring_desc),
			     VRING_DESC_ALIGN_SIZE);
	queue.avail = ring_at(queue.addr.avail_user_addr,
			      offsetof(struct vring_avail, ring[n]),
			      VRING_AVAIL_ALIGN_SIZE);
	queue.used = ring_at(queue.addr.used_user_addr,
			     offsetof(struct vring_used, ring[n]),
			     VRING_USED_ALIGN_SIZE);
	return queue.desc && queue.avail && queue.used;
}

/*
 * Serve the requests that are available now.  Later requests cause another kick, and
 * messages are served before it.  Return false if a request is not valid.
 */
static bool serve_available(void)
{
	struct vring_used_elem *used;
	__u16 avail;

	avail = __atomic_load_n(&queue.avail->idx, __ATOMIC_ACQUIRE);
	if ((__u16)(avail - queue.next) > queue.size)
		return false;

	while (queue.next != avail) {
		unsigned int i = queue.next % queue.size;
		__u32 id = READ_ONCE(queue.avail->ring[i]);
		__u32 len = serve_request(id);

		if (!len)
			return false;
		used = &queue.used->ring[i];
		used->id = id;
		used->len = len;
		queue.next++;
		__atomic_store_n(&queue.used->idx, queue.next, __ATOMIC_RELEASE);
	}

	/* The driver clears the flag before it looks at the index. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!(READ_ONCE(queue.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT))
		eventfd_write(queue.call, 1);
	return true;
}

static void serve_queue(void)
{
	eventfd_t kicks;

	if (eventfd_read(queue.kick, &kicks))
		return;

	if (!find_rings()) {
		queue.broken = "its rings are not in guest memory";
	} else if (sigsetjmp(no_access, 1)) {
		queue.broken = "no access to guest memory";
	} else {
		in_guest_memory = 1;
		if (!serve_available())
			queue.broken = "not a request";
	}
	in_guest_memory = 0;
	if (queue.broken) {
		printf("the queue stops: %s\n", queue.broken);
		eventfd_write(queue.err, 1);
	}
}

static bool queue_runs(void)
{
	return queue.enabled && queue.size && !queue.broken;
}

/* Messages */

static int set_mem_table(const struct message *msg)
{
	unsigned int i;
	int ret = 0;

	unmap_all();
	if (msg->u.mem.nr > MAX_REGIONS)
		return -EINVAL;
	for (i = 0; i < msg->u.mem.nr && !ret; i++)
		ret = map_region(&msg->u.mem.regions[i], msg->fds[i]);
	if (ret)
		unmap_all();
	return ret;
}

static int replace_fd(int *fd, struct message *msg)
{
	if (*fd >= 0)
		close(*fd);
	*fd = msg->fds[0];
	msg->fds[0] = -1;
	return 0;
}

/*
 * Handle a message.  Return 0 or an error, or 1 if @u is the answer.  There is only
 * one queue, so ignore the queue index of messages.
 */
static int handle(struct message *msg)
{
	union payload *u = &msg->u;

	switch (msg->head.request) {
	case SET_OWNER:
		return 0;
	case GET_FEATURES:
		u->value = FEATURES;
		msg->head.size = sizeof(u->value);
		return 1;
	case SET_FEATURES:
		return u->value & ~FEATURES ? -EINVAL : 0;
	case GET_PROTOCOL_FEATURES:
		u->value = PROTOCOL_FEATURES;
		msg->head.size = sizeof(u->value);
		return 1;
	case SET_PROTOCOL_FEATURES:
		return u->value & ~PROTOCOL_FEATURES ? -EINVAL : 0;
	case GET_CONFIG:	/* from offset 0 on, and as large as the message */
		memset(u->config.data, 0, sizeof(u->config.data));
		u->config.blk.capacity = disk_size / SECTOR_SIZE;
		u->config.blk.seg_max = MAX_SEGMENTS;
		return 1;
	case SET_MEM_TABLE:
		return set_mem_table(msg);
	case SET_VRING_NUM:
		if (u->state.num > MAX_QUEUE_SIZE)
			return -EINVAL;
		queue.size = u->state.num;
		return 0;
	case SET_VRING_ADDR:
		queue.addr = u->addr;
		return 0;
	case SET_VRING_BASE:
		queue.next = u->state.num;
		return 0;
	case GET_VRING_BASE:	/* stops the queue */
		u->state.num = queue.next;
		queue.broken = NULL;
		replace_fd(&queue.kick, msg);
		return 1;
	case SET_VRING_KICK:	/* starts it */
		served.starts++;
		return replace_fd(&queue.kick, msg);
	case SET_VRING_CALL:
		return replace_fd(&queue.call, msg);
	case SET_VRING_ERR:
		return replace_fd(&queue.err, msg);
	case SET_BACKEND_REQ_FD:
		return replace_fd(&backend_req, msg);
	case SET_VRING_ENABLE:
		queue.enabled = u->state.num;
		return 0;
	default:
		return -EOPNOTSUPP;
	}
}

/* Return false if QEMU has ended. */
static bool receive(int conn, struct message *msg)
{
	union {
		char buf[CMSG_SPACE(sizeof(msg->fds))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { &msg->head, sizeof(msg->head) };
	struct msghdr hdr = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg;
	size_t size;

	memset(msg, 0, sizeof(*msg));
	memset(msg->fds, -1, sizeof(msg->fds));
	if (recvmsg(conn, &hdr, MSG_WAITALL) != sizeof(msg->head))
		return false;
	cmsg = CMSG_FIRSTHDR(&hdr);
	if (cmsg && cmsg->cmsg_type == SCM_RIGHTS)
		memcpy(msg->fds, CMSG_DATA(cmsg), cmsg->cmsg_len - CMSG_LEN(0));

	size = msg->head.size;
	if (size > sizeof(msg->u))
		errx(1, "request %u of %zu bytes", msg->head.request, size);
	return !size || recv(conn, &msg->u, size, MSG_WAITALL) == (ssize_t)size;
}

/* Return false if QEMU has ended. */
static bool serve_message(int conn)
{
	struct message msg;
	size_t size;
	int i, ret;

	if (!receive(conn, &msg))
		return false;
	ret = handle(&msg);
	if (ret < 0)
		printf("request %u: %s\n", msg.head.request, strerror(-ret));
	for (i = 0; i < MAX_REGIONS; i++)
		if (msg.fds[i] >= 0)
			close(msg.fds[i]);

	if (ret <= 0 && !(msg.head.flags & NEED_REPLY))
		return true;
	if (ret <= 0) {
		msg.u.value = ret ? 1 : 0;
		msg.head.size = sizeof(msg.u.value);
	}
	msg.head.flags = VERSION | REPLY;
	size = sizeof(msg.head) + msg.head.size;
	return send(conn, &msg.head, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static int wait_for_qemu(const char *path)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int s, conn;

	if (strlen(path) >= sizeof(addr.sun_path))
		errx(1, "%s: too long", path);
	strcpy(addr.sun_path, path);
	unlink(path);
	s = socket(AF_UNIX, SOCK_STREAM, 0);
	if (s < 0 || bind(s, (void *)&addr, sizeof(addr)) || listen(s, 1))
		err(1, "%s", path);
	conn = accept(s, NULL, NULL);
	if (conn < 0)
		err(1, "%s", path);
	close(s);
	unlink(path);
	return conn;
}

int main(int argc, char *argv[])
{
	struct sigaction action = { .sa_handler = bus_error };
	struct pollfd fds[2] = { { .events = POLLIN }, { .events = POLLIN } };

	disk_size = (argc > 2 ? strtoul(argv[2], NULL, 0) : 64) << 20;
	if (argc < 2 || argc > 3 || !disk_size || disk_size > 1 << 30)
		errx(2, "usage: vhost_user_peer SOCKET [MIB, up to 1024]");
	disk = memfd_create("disk", 0);
	if (disk < 0 || ftruncate(disk, disk_size))
		err(1, "no memory for the disk");
	setlinebuf(stdout);
	sigaction(SIGBUS, &action, NULL);

	fds[0].fd = wait_for_qemu(argv[1]);
	do {
		fds[1].fd = queue_runs() ? queue.kick : -1;
		if (poll(fds, 2, -1) < 0)
			err(1, "poll");
		if (fds[1].revents)
			serve_queue();
	} while (!fds[0].revents || serve_message(fds[0].fd));

	printf("served: %lu starts, %lu reads, %lu writes, %lu flushes, ",
	       served.starts, served.reads, served.writes, served.flushes);
	printf("%llu bytes, %lu errors\n", served.bytes, served.errors);
	return 0;
}
