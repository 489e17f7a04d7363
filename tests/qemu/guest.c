// SPDX-License-Identifier: GPL-2.0
/*
 * PID 1 of a guest of the emulated machine.
 *
 * Read commands from the serial line, one per line, or run the command after "--" on
 * the kernel command line and power off.  Each command runs in its own process, so
 * that several can run at a time:
 *
 *   memory MIB SECONDS	  write and check this much memory (0: all of it), repeatedly
 *			  for this long (0: once), on each CPU
 *   convert NAME=VALUE... load the module gmem_convert with these parameters; with
 *			  seconds= the command takes that long
 *   step COMMAND	  send a command to the module, see its source
 *   unload		  unload the module
 *   disk SECONDS	  write and check all of /dev/vda, likewise
 *   echo PORT		  echo the input of this port of virtio-serial
 *   net ADDRESS	  echo the input of TCP port 7 of this address
 *   vapic ADDRESS  run code at this address that tells QEMU's kvmvapic that it is
 *		  the ROM of the device
 *   free		  print the amount of free memory
 *   reboot
 *   poweroff
 *
 * The output on the console is "guest: ready", "guest: done: COMMAND",
 * "guest: failed: COMMAND: WHY", the results of commands, and the messages of the
 * module.  The kernel does not print the latter itself, as its console can delay a
 * line until the next one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

#define PAGE		4096UL
#define MIB		(1UL << 20)
#define DISK_BLOCK	(256UL << 10)
#define ECHO_PORT	7
#define MODULE		"gmem_convert"
/* Memory to leave free if a command uses all memory. */
#define SPARE_KIB	(48UL << 10)

/* Set in the process of a command. */
static const char *command;

/* Use one write() per line, so that lines of several processes do not mix. */
static void __attribute__((format(printf, 1, 2))) say(const char *fmt, ...)
{
	char line[512];
	va_list args;
	int n;

	n = snprintf(line, sizeof(line), "guest: ");
	va_start(args, fmt);
	n += vsnprintf(line + n, sizeof(line) - n, fmt, args);
	va_end(args);
	if (n > (int)sizeof(line) - 1)
		n = sizeof(line) - 1;
	line[n++] = '\n';
	if (write(STDOUT_FILENO, line, n) != n)
		_exit(1);
}

#define fail(fmt, ...)							\
	do {								\
		say("failed: %s: " fmt, command, ##__VA_ARGS__);	\
		_exit(1);						\
	} while (0)
#define fail_errno(what) fail("%s: %s", what, strerror(errno))

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static unsigned long meminfo(const char *key)
{
	FILE *f = fopen("/proc/meminfo", "re");
	unsigned long value, found = 0;
	char name[64], line[128];

	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63s %lu", name, &value) == 2 && !strcmp(name, key))
			found = value;
	}
	if (f)
		fclose(f);
	return found;
}

/* ---- memory */

/* No two pages and rounds have the same: the multiplier is odd. */
static uint64_t pattern(uint64_t place, unsigned int round)
{
	return (place << 12 | round) * 0x9e3779b97f4a7c15;
}

static void fill(uint64_t *words, size_t size, uint64_t value)
{
	size_t i;

	for (i = 0; i < size / sizeof(*words); i++)
		words[i] = value;
}

static void check(const uint64_t *words, size_t size, uint64_t value, unsigned long place)
{
	size_t i;

	for (i = 0; i < size / sizeof(*words); i++) {
		if (words[i] != value)
			fail("at %#lx is %#lx and not %#lx", place + i * sizeof(*words),
			     words[i], value);
	}
}

static void work_on_memory(char *mem, size_t size, unsigned int seconds, unsigned int id)
{
	double end = now() + seconds;
	unsigned int round = 0;
	size_t at;

	do {
		for (at = 0; at < size; at += PAGE)
			fill((uint64_t *)(mem + at), PAGE, pattern(at / PAGE << 4 | id, round));
		for (at = 0; at < size; at += PAGE)
			check((uint64_t *)(mem + at), PAGE, pattern(at / PAGE << 4 | id, round),
			      at);
		round++;
	} while (now() < end);
	say("%lu MiB written and checked, rounds: %u", size / MIB, round);
}

static void run_memory(char *args)
{
	unsigned long mib = 0, available = meminfo("MemAvailable:"), size;
	unsigned int seconds = 0, cpus = get_nprocs(), i;
	int status;
	bool ok = true;
	char *mem;

	sscanf(args, "%lu %u", &mib, &seconds);
	if (!mib && available > SPARE_KIB)
		mib = (available - SPARE_KIB) / 1024;
	size = mib * MIB / cpus / (2 * MIB) * (2 * MIB);
	if (!size)
		fail("there is no memory: %lu KiB", available);
	for (i = 0; i < cpus; i++) {
		if (fork())
			continue;
		mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (mem == MAP_FAILED)
			fail_errno("mmap");
		work_on_memory(mem, size, seconds, i);
		_exit(0);
	}
	while (wait(&status) > 0)
		ok = ok && !status;
	if (!ok)
		fail("a process has failed");
	say("memory %lu MiB checked", size * cpus / MIB);
}

/* ---- the module */

/* Start a process that prints the messages of the module. */
static void begin_log(void)
{
	struct pollfd log = { .fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC),
			      .events = POLLIN };
	char record[1024], *text;
	ssize_t n;

	if (fork())
		return;
	for (;;) {
		/* Each read() returns one record: numbers, a semicolon, and the text. */
		while ((n = read(log.fd, record, sizeof(record) - 1)) > 0) {
			record[n] = '\0';
			text = strchr(record, ';');
			if (!text++ || strncmp(text, MODULE ":", strlen(MODULE ":")))
				continue;
			n = strcspn(text, "\n") + 1;
			if (write(STDOUT_FILENO, text, n) != n)
				_exit(1);
		}
		/* The kernel wakes readers as late as it prints. */
		poll(&log, 1, 100);
	}
}

static void run_convert(char *args)
{
	int fd = open("/" MODULE ".ko", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail_errno(MODULE ".ko");
	if (syscall(SYS_finit_module, fd, args, 0))
		fail_errno("the module");
	if (strstr(args, "seconds=") && syscall(SYS_delete_module, MODULE, 0))
		fail_errno("to unload the module");
}

static void run_step(char *args)
{
	int fd = open("/sys/module/" MODULE "/parameters/command", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		fail_errno("the module's command");
	if (write(fd, args, strlen(args)) < 0)
		fail_errno(args);
}

static void run_unload(char *args)
{
	(void)args;
	if (syscall(SYS_delete_module, MODULE, 0))
		fail_errno("to unload the module");
}

/* ---- devices */

static void run_disk(char *args)
{
	int fd = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
	unsigned int seconds = atoi(args), round = 0;
	double end = now() + seconds;
	uint64_t size, at;
	void *buf;

	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
		fail_errno("/dev/vda");
	if (!size || size % DISK_BLOCK)
		fail("the size of /dev/vda is %lu", size);
	do {
		/* Vary the pages, so that some are next to memory that is converted. */
		buf = mmap(NULL, DISK_BLOCK, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (buf == MAP_FAILED)
			fail_errno("mmap");
		for (at = 0; at < size; at += DISK_BLOCK) {
			fill(buf, DISK_BLOCK, pattern(at, round));
			if (pwrite(fd, buf, DISK_BLOCK, at) != DISK_BLOCK)
				fail_errno("write to the disk");
		}
		for (at = 0; at < size; at += DISK_BLOCK) {
			fill(buf, DISK_BLOCK, 0);
			if (pread(fd, buf, DISK_BLOCK, at) != DISK_BLOCK)
				fail_errno("read from the disk");
			check(buf, DISK_BLOCK, pattern(at, round), at);
		}
		munmap(buf, DISK_BLOCK);
		round++;
	} while (now() < end);
	say("disk of %lu MiB written and checked, rounds: %u", size / MIB, round);
}

/* Echo the input of @fd until the other end closes it. */
static void echo(int fd)
{
	static char buf[64 << 10];
	ssize_t n, done, m;

	while ((n = read(fd, buf, sizeof(buf))) > 0) {
		for (done = 0; done < n; done += m) {
			m = write(fd, buf + done, n - done);
			if (m < 0)
				fail_errno("write");
		}
	}
	if (n < 0)
		fail_errno("read");
}

/* Find the device of a port by its name on the command line of QEMU. */
static bool find_port(const char *name, char *path, size_t size)
{
	DIR *dir = opendir("/sys/class/virtio-ports");
	struct dirent *d;
	char line[64];
	bool found = false;
	FILE *f;

	while (dir && !found && (d = readdir(dir))) {
		snprintf(path, size, "/sys/class/virtio-ports/%s/name", d->d_name);
		f = fopen(path, "re");
		if (!f)
			continue;
		found = fgets(line, sizeof(line), f) && !strncmp(line, name, strlen(name)) &&
			line[strlen(name)] == '\n';
		fclose(f);
		snprintf(path, size, "/dev/%s", d->d_name);
	}
	if (dir)
		closedir(dir);
	return found;
}

static void run_echo(char *args)
{
	char path[320];
	int fd;

	if (!find_port(args, path, sizeof(path)))
		fail("there is no port of this name");
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail_errno(path);
	say("echo ready");
	echo(fd);
}

static void run_net(char *args)
{
	struct ifreq ifr = { .ifr_name = "eth0" };
	struct sockaddr_in *addr = (struct sockaddr_in *)&ifr.ifr_addr;
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(ECHO_PORT) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	addr->sin_family = AF_INET;
	if (inet_pton(AF_INET, args, &addr->sin_addr) != 1)
		fail("this is no address");
	if (fd < 0 || ioctl(fd, SIOCSIFADDR, &ifr))
		fail_errno("eth0");
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(fd, SIOCSIFFLAGS, &ifr))
		fail_errno("eth0 up");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)) || listen(fd, 8))
		fail_errno("listen");
	say("net ready");
	for (;;) {
		int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);

		if (connection < 0)
			fail_errno("accept");
		if (!fork()) {
			echo(connection);
			_exit(0);
		}
		close(connection);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

/* ---- all commands */

/* The device uses the address of the instruction as a physical one. */
static void run_vapic(char *args)
{
	/* mov $0x7e, %dx; xor %eax, %eax; out %ax, (%dx); ret */
	static const unsigned char code[] = {
		0x66, 0xba, 0x7e, 0x00, 0x31, 0xc0, 0x66, 0xef, 0xc3
	};
	unsigned long address = strtoul(args, NULL, 0);
	void *mem = mmap((void *)address, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (mem == MAP_FAILED)
		fail("mmap at %#lx: %s", address, strerror(errno));
	memcpy(mem, code, sizeof(code));
	if (ioperm(0x7e, 2, 1))
		fail("ioperm: %s", strerror(errno));
	((void (*)(void))mem)();
}

static void run_free(char *args)
{
	(void)args;
	say("memory: %lu MiB, %lu MiB free, %lu MiB available", meminfo("MemTotal:") / 1024,
	    meminfo("MemFree:") / 1024, meminfo("MemAvailable:") / 1024);
}

static void run_reboot(char *args)
{
	(void)args;
	reboot(RB_AUTOBOOT);
	fail_errno("reboot");
}

static void run_poweroff(char *args)
{
	(void)args;
	reboot(RB_POWER_OFF);
	fail_errno("power off");
}

static const struct {
	const char *name;
	void (*run)(char *args);
} commands[] = {
	{ "memory", run_memory },
	{ "convert", run_convert },
	{ "step", run_step },
	{ "unload", run_unload },
	{ "disk", run_disk },
	{ "echo", run_echo },
	{ "net", run_net },
	{ "vapic", run_vapic },
	{ "free", run_free },
	{ "reboot", run_reboot },
	{ "poweroff", run_poweroff },
};

#define NR_COMMANDS (sizeof(commands) / sizeof(commands[0]))

/* Start a command in its own process. */
static pid_t begin(const char *line)
{
	char *args;
	size_t n, i;
	pid_t pid;

	pid = fork();
	if (pid < 0)
		say("failed: %s: fork: %s", line, strerror(errno));
	if (pid)
		return pid;
	command = line;
	n = strcspn(line, " ");
	args = strdup(line + n + (line[n] == ' '));
	for (i = 0; i < NR_COMMANDS; i++) {
		if (strlen(commands[i].name) == n && !strncmp(line, commands[i].name, n)) {
			commands[i].run(args);
			say("done: %s", line);
			_exit(0);
		}
	}
	fail("there is no such command");
}

static void __attribute__((noreturn)) serve(void)
{
	struct termios tio;
	char line[256];

	/* Disable the echo of the terminal. */
	tcgetattr(0, &tio);
	tio.c_lflag &= ~(ECHO | ECHOE | ECHOK | ECHONL | ISIG);
	tio.c_lflag |= ICANON;
	tcsetattr(0, TCSANOW, &tio);
	say("ready, %lu MiB, CPUs: %d", meminfo("MemTotal:") / 1024, get_nprocs());
	for (;;) {
		ssize_t n = read(0, line, sizeof(line) - 1);

		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (n < 0) {
			say("failed: read: %s", strerror(errno));
			pause();
		}
		if (!n)
			continue;
		line[n] = '\0';
		line[strcspn(line, "\r\n")] = '\0';
		if (line[0])
			begin(line);
	}
}

int main(int argc, char *argv[])
{
	char line[256] = "";
	int i, status;
	pid_t pid;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	begin_log();
	if (argc == 1)
		serve();
	for (i = 1; i < argc; i++) {
		strncat(line, i > 1 ? " " : "", sizeof(line) - strlen(line) - 1);
		strncat(line, argv[i], sizeof(line) - strlen(line) - 1);
	}
	pid = begin(line);
	while (pid > 0 && waitpid(pid, &status, 0) != pid)
		;
	reboot(RB_POWER_OFF);
	return 1;
}
