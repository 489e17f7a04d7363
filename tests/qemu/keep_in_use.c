// SPDX-License-Identifier: GPL-2.0
/*
 * Keep a reference to a page of a guest in another process, like a device with slow
 * I/O: get the guest_memfd file of a QEMU process, and keep a page of it in a pipe
 * until the end of standard input.
 *
 *	keep_in_use PID OFFSET
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE	4096UL

/* Find the first file descriptor of the process for a guest_memfd file. */
static int find_file(int pid)
{
	char path[64], to[64];
	struct dirent *entry;
	int fd = -1;
	ssize_t len;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	dir = opendir(path);
	if (!dir)
		err(1, "%s", path);
	while (fd < 0 && (entry = readdir(dir))) {
		len = readlinkat(dirfd(dir), entry->d_name, to, sizeof(to) - 1);
		if (len < 0)
			continue;
		to[len] = '\0';
		if (strstr(to, "[kvm-gmem]"))
			fd = atoi(entry->d_name);
	}
	closedir(dir);
	if (fd < 0)
		errx(1, "process %d has no guest_memfd file", pid);
	return fd;
}

int main(int argc, char *argv[])
{
	int pid, pidfd, fd, pipes[2];
	unsigned long offset;
	struct iovec page;
	struct stat st;
	char *mem, c;

	if (argc != 3)
		errx(2, "usage: keep_in_use PID OFFSET");
	pid = atoi(argv[1]);
	offset = strtoul(argv[2], NULL, 0);

	pidfd = syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0)
		err(1, "pidfd_open %d", pid);
	fd = syscall(SYS_pidfd_getfd, pidfd, find_file(pid), 0);
	if (fd < 0 || fstat(fd, &st))
		err(1, "the file of process %d", pid);
	mem = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mem == MAP_FAILED)
		err(1, "mmap");
	if (pipe(pipes))
		err(1, "pipe");
	page = (struct iovec){ mem + offset, PAGE };
	if (vmsplice(pipes[1], &page, 1, 0) != (ssize_t)PAGE)
		err(1, "vmsplice at %#lx", offset);
	/* Keep the reference of the pipe only. */
	munmap(mem, st.st_size);
	close(fd);

	printf("in use\n");
	fflush(stdout);
	while (read(STDIN_FILENO, &c, 1) > 0)
		;
	return 0;
}
