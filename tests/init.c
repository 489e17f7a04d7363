// SPDX-License-Identifier: GPL-2.0
/*
 * PID 1 of a virtual machine that runs one command.
 *
 * scripts/run boots an initramfs with this program, the command and a job
 * description (/job).  The output of the command goes to the host through one
 * virtio port, and its result, the verdict, through a second one.  Only the
 * kernel log uses the serial line.  Each line of the verdict starts with a
 * secret of this boot that the command cannot know, and the verdict is complete
 * only with its last line, "end".  If any program dies before, the host has no
 * complete verdict.
 *
 * With "check" in the job, also compare the state of the machine before and
 * after the command: huge page pools, cgroup charges, memory that cannot be
 * reclaimed, remaining processes and cgroups, and, if the kernel has kmemleak,
 * leaked memory.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <glob.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ARRAY_SIZE(x)	(sizeof(x) / sizeof((x)[0]))

#define OUTPUT_PORT	"/dev/vport0p1"
#define VERDICT_PORT	"/dev/vport0p2"
#define CGROUP		"/sys/fs/cgroup"
#define TEST_CGROUP	CGROUP "/test"
#define PAGE_OWNER	"/sys/kernel/debug/page_owner"
#define KMEMLEAK	"/sys/kernel/debug/kmemleak"

/* mm/kmemleak.c does not report objects younger than this */
#define KMEMLEAK_AGE_MS	5000

static struct {
	char nonce[64];
	char cwd[256];
	char *argv[256];
	int argc;
	bool check;		/* compare the machine before and after */
	bool shell;		/* interactive, on /dev/hvc0 */
	unsigned int timeout;	/* seconds; 0: none */
	unsigned int settle;	/* seconds that deferred frees may take */
} job = { .cwd = "/", .settle = 10 };

static int verdict_fd = -1;

static void __attribute__((noreturn)) power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	pause();
	_exit(1);	/* panics, which also ends the machine */
}

static void __attribute__((format(printf, 1, 2))) verdict(const char *fmt, ...)
{
	char line[1024];
	va_list args;
	int n;

	n = snprintf(line, sizeof(line), "%s ", job.nonce);
	va_start(args, fmt);
	vsnprintf(line + n, sizeof(line) - n - 1, fmt, args);
	va_end(args);
	strcat(line, "\n");
	if (verdict_fd < 0 || write(verdict_fd, line, strlen(line)) < 0)
		fprintf(stderr, "init: %s", line + n);
}

static void __attribute__((noreturn)) die(const char *what)
{
	verdict("init: %s: %s", what, strerror(errno));
	power_off();
}

static long long now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000LL + ts.tv_nsec / 1000000;
}

static void sleep_ms(unsigned int ms)
{
	usleep(ms * 1000);
}

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

static void write_file(const char *path, const char *text)
{
	FILE *f = fopen(path, "we");

	if (f && fputs(text, f) >= 0)
		fclose(f);
}

static void read_job(void)
{
	FILE *f = fopen("/job", "re");
	char line[8192];
	char *value;

	if (!f)
		die("/job");
	while (fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\n")] = '\0';
		value = strchrnul(line, ' ');
		if (*value)
			*value++ = '\0';
		if (!strcmp(line, "nonce"))
			snprintf(job.nonce, sizeof(job.nonce), "%s", value);
		else if (!strcmp(line, "cwd"))
			snprintf(job.cwd, sizeof(job.cwd), "%s", value);
		else if (!strcmp(line, "timeout"))
			job.timeout = atoi(value);
		else if (!strcmp(line, "settle"))
			job.settle = atoi(value);
		else if (!strcmp(line, "check"))
			job.check = true;
		else if (!strcmp(line, "shell"))
			job.shell = true;
		else if (!strcmp(line, "env"))
			putenv(strdup(value));
		else if (!strcmp(line, "arg") &&
			 job.argc < (int)ARRAY_SIZE(job.argv) - 1)
			job.argv[job.argc++] = strdup(value);
	}
	fclose(f);
	unlink("/job");
}

static void mount_all(void)
{
	static const struct {
		const char *dir, *type, *options;
	} mounts[] = {
		{ "/proc", "proc" },
		{ "/sys", "sysfs" },
		{ "/dev", "devtmpfs" },
		{ "/dev/pts", "devpts", "ptmxmode=0666" },
		{ "/dev/shm", "tmpfs" },
		{ "/tmp", "tmpfs" },
		{ "/run", "tmpfs" },
		{ "/mnt", "tmpfs" },
		{ "/sys/kernel/debug", "debugfs" },
		{ "/sys/kernel/tracing", "tracefs" },
		{ CGROUP, "cgroup2" },
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(mounts); i++) {
		mkdir(mounts[i].dir, 0755);
		/* Ignore a missing file system: a test that needs it fails. */
		if (mount(mounts[i].type, mounts[i].dir, mounts[i].type, 0,
			  mounts[i].options) && errno != ENODEV && errno != EBUSY)
			fprintf(stderr, "init: %s: %s\n", mounts[i].dir,
				strerror(errno));
	}
	symlink("/proc/self/fd", "/dev/fd");
	symlink("/proc/mounts", "/etc/mtab");
	write_file("/etc/passwd", "root:x:0:0:root:/tmp:/bin/sh\n");
	sethostname("vm", 2);
	put(CGROUP "/cgroup.subtree_control", "+cpuset");
	put(CGROUP "/cgroup.subtree_control", "+memory");
	put(CGROUP "/cgroup.subtree_control", "+hugetlb");
	mkdir(TEST_CGROUP, 0755);
}

/* The counters to compare.  A difference is a leak. */

struct counter {
	char *name;
	long long value;
	long long slack;
};

struct snapshot {
	struct counter *counters;
	size_t nr;
};

static const struct {
	const char *pattern;
	long long slack;
} counter_files[] = {
	{ "/sys/kernel/mm/hugepages/hugepages-*/*_hugepages" },
	{ "/sys/devices/system/node/node*/hugepages/hugepages-*/*_hugepages" },
	{ TEST_CGROUP "/hugetlb.*.current" },
	/* Slab objects and per-CPU charges stay for a while. */
	{ TEST_CGROUP "/memory.current", 2 << 20 },
};

static const struct {
	const char *file, *key;
} counter_fields[] = {
	{ "/proc/meminfo", "HugePages_Total:" },
	{ "/proc/meminfo", "HugePages_Free:" },
	{ "/proc/meminfo", "HugePages_Rsvd:" },
	{ "/proc/meminfo", "HugePages_Surp:" },
	{ "/proc/meminfo", "Hugetlb:" },
	{ "/proc/meminfo", "Unevictable:" },
	{ "/proc/meminfo", "Mlocked:" },
	{ "/proc/meminfo", "SecPageTables:" },
	{ "/proc/meminfo", "HardwareCorrupted:" },
};

static struct snapshot *filling;

static void add_counter(const char *name, long long value, long long slack)
{
	struct snapshot *s = filling;

	s->counters = realloc(s->counters, (s->nr + 1) * sizeof(*s->counters));
	if (!s->counters)
		die("counters");
	s->counters[s->nr++] = (struct counter){ strdup(name), value, slack };
}

static int add_cgroup(const char *path, const struct stat *st, int type,
		      struct FTW *ftw)
{
	if (type == FTW_D)
		add_counter(path, 1, 0);
	return 0;
}

static void add_files(const char *pattern, long long slack)
{
	long long value;
	glob_t paths;
	size_t i;
	FILE *f;

	if (glob(pattern, 0, NULL, &paths))
		return;
	for (i = 0; i < paths.gl_pathc; i++) {
		f = fopen(paths.gl_pathv[i], "re");
		if (f && fscanf(f, "%lld", &value) == 1)
			add_counter(paths.gl_pathv[i], value, slack);
		if (f)
			fclose(f);
	}
	globfree(&paths);
}

static void add_field(const char *file, const char *key)
{
	FILE *f = fopen(file, "re");
	char name[64], line[256];
	long long value;

	while (f && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63s %lld", name, &value) == 2 &&
		    !strcmp(name, key)) {
			snprintf(line, sizeof(line), "%s:%s", file, key);
			add_counter(line, value, 0);
		}
	}
	if (f)
		fclose(f);
}

static void take_snapshot(struct snapshot *s)
{
	unsigned int i;

	filling = s;
	put("/proc/sys/vm/stat_refresh", "1");
	for (i = 0; i < ARRAY_SIZE(counter_files); i++)
		add_files(counter_files[i].pattern, counter_files[i].slack);
	for (i = 0; i < ARRAY_SIZE(counter_fields); i++)
		add_field(counter_fields[i].file, counter_fields[i].key);
	nftw(CGROUP, add_cgroup, 16, FTW_PHYS);
}

static void free_snapshot(struct snapshot *s)
{
	while (s->nr)
		free(s->counters[--s->nr].name);
	free(s->counters);
	s->counters = NULL;
}

static const struct counter *find(const struct snapshot *s, const char *name)
{
	size_t i;

	for (i = 0; i < s->nr; i++) {
		if (!strcmp(s->counters[i].name, name))
			return &s->counters[i];
	}
	return NULL;
}

static unsigned int compare(const struct snapshot *before,
			    const struct snapshot *after, bool tell)
{
	const struct counter *c, *d;
	unsigned int differ = 0;

	for (c = before->counters; c < before->counters + before->nr; c++) {
		d = find(after, c->name);
		if (d && llabs(d->value - c->value) <= c->slack)
			continue;
		differ++;
		if (tell && d)
			verdict("counter %s %lld -> %lld", c->name, c->value,
				d->value);
		else if (tell)
			verdict("counter %s %lld -> gone", c->name, c->value);
	}
	for (d = after->counters; d < after->counters + after->nr; d++) {
		if (find(before, d->name))
			continue;
		differ++;
		if (tell)
			verdict("counter %s none -> %lld", d->name, d->value);
	}
	return differ;
}

/*
 * Slab objects that are freed from an interrupt can stay charged as bytes in
 * the cgroup's account (nr_charged_bytes in mm/memcontrol.c), megabytes after a
 * large file is freed.  They are uncharged when a CPU refills its stock: drain
 * the stocks, and make each CPU refill its own.
 */
static void give_back_charges(void)
{
	cpu_set_t cpu;
	pid_t pid;
	int i;

	put(TEST_CGROUP "/memory.high", "0");
	put(TEST_CGROUP "/memory.high", "max");
	pid = fork();
	if (!pid) {
		put(TEST_CGROUP "/cgroup.procs", "0");
		for (i = 0; i < get_nprocs(); i++) {
			CPU_ZERO(&cpu);
			CPU_SET(i, &cpu);
			if (!sched_setaffinity(0, sizeof(cpu), &cpu))
				close(open("/dev/null", O_RDWR | O_CLOEXEC));
		}
		_exit(0);
	}
	if (pid > 0)
		waitpid(pid, NULL, 0);
}

/* Report the remaining charges by type. */
static void report_charges(void)
{
	FILE *f = fopen(TEST_CGROUP "/memory.stat", "re");
	char name[64];
	long long value;

	while (f && fscanf(f, "%63s %lld", name, &value) == 2) {
		if (value)
			verdict("stat %s %lld", name, value);
	}
	if (f)
		fclose(f);
}

/*
 * Report the stacks that allocated the charged pages.  Each read() of the file
 * returns one page; pages with the same stack are one entry of the report.
 */
static void report_owners(void)
{
	static struct owner {
		char *record, *stack;
		unsigned int pages;
	} owners[32];
	unsigned int nr = 0, i;
	char buf[4096], *stack, *line;
	ssize_t n;
	int fd;

	fd = open(PAGE_OWNER, O_RDONLY | O_CLOEXEC);
	while (fd >= 0 && (n = read(fd, buf, sizeof(buf) - 1)) > 0) {
		buf[n] = '\0';
		if (!strstr(buf, "memcg test\n"))
			continue;
		stack = strstr(buf, "\n ");
		for (i = 0; i < nr && stack; i++) {
			if (owners[i].stack && !strcmp(owners[i].stack, stack))
				break;
		}
		if (i == nr && nr < ARRAY_SIZE(owners)) {
			owners[nr].record = strdup(buf);
			owners[nr].stack = stack ? strstr(owners[nr].record, "\n ") : NULL;
			nr++;
		}
		if (i < nr)
			owners[i].pages++;
	}
	close(fd);
	for (i = 0; i < nr; i++) {
		verdict("owner of %u allocations, the first:", owners[i].pages);
		for (line = strtok(owners[i].record, "\n"); line;
		     line = strtok(NULL, "\n"))
			verdict("owner  %s", line);
	}
}

/* Frees can be deferred (RCU, workers, per-CPU lists): wait for them. */
static void check_counters(const struct snapshot *before)
{
	long long end = now_ms() + job.settle * 1000;
	struct snapshot after = { 0 };
	bool last;

	put("/proc/sys/vm/drop_caches", "3");
	for (;;) {
		last = now_ms() >= end;
		take_snapshot(&after);
		if (!compare(before, &after, last))
			break;
		if (last) {
			report_charges();
			report_owners();
			break;
		}
		free_snapshot(&after);
		sleep_ms(50);
		put("/proc/sys/vm/drop_caches", "3");
		give_back_charges();
	}
	free_snapshot(&after);
}

static void name_of(pid_t pid, char *name, size_t size)
{
	char path[64];
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/comm", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		n = read(fd, name, size - 1);
	close(fd);
	name[n > 0 ? n - 1 : 0] = '\0';
}

/* Kernel threads are children of kthreadd, PID 2, and have no executable. */
static void report_left_behind(void)
{
	char path[64], exe[8], name[64];
	struct dirent *d;
	DIR *proc;
	pid_t pid;

	proc = opendir("/proc");
	while (proc && (d = readdir(proc))) {
		pid = atoi(d->d_name);
		snprintf(path, sizeof(path), "/proc/%d/exe", pid);
		if (pid <= 2 || readlink(path, exe, sizeof(exe)) < 0)
			continue;
		name_of(pid, name, sizeof(name));
		verdict("left behind: process %d (%s)", pid, name);
	}
	if (proc)
		closedir(proc);
}

/* Wait for the processes that the command started, or report them. */
static void check_descendants(void)
{
	long long end = now_ms() + job.settle * 1000;

	while (waitpid(-1, NULL, WNOHANG) >= 0 && now_ms() < end)
		sleep_ms(10);
	if (waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD)
		return;
	report_left_behind();
	kill(-1, SIGKILL);
	while (waitpid(-1, NULL, 0) > 0)
		;
}

static void check_kmemleak(long long ended)
{
	unsigned int lines = 0;
	long long wait;
	char line[512];
	FILE *f;

	if (access(KMEMLEAK, W_OK))
		return;
	/*
	 * The first scan of an object treats it as modified and does not report
	 * it.  Only the second scan can report leaks of the command.
	 */
	if (!put(KMEMLEAK, "scan"))
		die(KMEMLEAK);
	wait = ended + KMEMLEAK_AGE_MS + 100 - now_ms();
	if (wait > 0)
		sleep_ms(wait);
	if (!put(KMEMLEAK, "scan"))
		die(KMEMLEAK);
	f = fopen(KMEMLEAK, "re");
	while (f && fgets(line, sizeof(line), f) && lines++ < 200) {
		line[strcspn(line, "\n")] = '\0';
		verdict("kmemleak %s", line);
	}
	if (!f)
		die(KMEMLEAK);
	fclose(f);
	verdict("scanned");
}

static void __attribute__((noreturn)) exec_command(void)
{
	const char *output = job.shell ? "/dev/hvc0" : OUTPUT_PORT;
	int fd;

	setsid();
	put(TEST_CGROUP "/cgroup.procs", "0");
	fd = open(output, job.shell ? O_RDWR : O_WRONLY);
	if (fd < 0)
		die(output);
	if (job.shell)
		ioctl(fd, TIOCSCTTY, 0);
	dup2(job.shell ? fd : open("/dev/null", O_RDONLY), 0);
	dup2(fd, 1);
	dup2(fd, 2);
	if (chdir(job.cwd))
		die(job.cwd);
	execvp(job.argv[0], job.argv);
	verdict("exec: %s: %s", job.argv[0], strerror(errno));
	_exit(127);
}

/* Write blocked tasks, backtraces and memory to the kernel log. */
static void report_timeout(void)
{
	put("/proc/sysrq-trigger", "w");
	put("/proc/sysrq-trigger", "l");
	put("/proc/sysrq-trigger", "m");
	verdict("timeout %u", job.timeout);
}

/* Module parameters are on the kernel command line. */
static void load_modules(void)
{
	if (!access("/lib/modules", F_OK) && system("modprobe kvm_amd"))
		die("modprobe kvm_amd");
}

static void run_command(void)
{
	long long end = now_ms() + job.timeout * 1000LL;
	sigset_t set;
	int status;
	pid_t pid;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		sigprocmask(SIG_UNBLOCK, &set, NULL);
		exec_command();
	}
	while (waitpid(pid, &status, WNOHANG) != pid) {
		long long left = job.timeout ? end - now_ms() : 1000;
		struct timespec ts = { left / 1000, left % 1000 * 1000000 };

		if (left <= 0) {
			report_timeout();
			power_off();
		}
		if (sigtimedwait(&set, NULL, &ts) == SIGCHLD) {
			/* Reap orphans, but not the command itself. */
			siginfo_t info;

			while (info.si_pid = 0,
			       !waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) &&
			       info.si_pid && info.si_pid != pid)
				waitpid(info.si_pid, NULL, 0);
		}
	}
	if (WIFEXITED(status))
		verdict("exit %d", WEXITSTATUS(status));
	else
		verdict("signal %d", WTERMSIG(status));
}

int main(void)
{
	struct snapshot before = { 0 };
	struct utsname uts;
	long long ended;

	setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin", 1);
	setenv("HOME", "/tmp", 1);
	read_job();
	mount_all();
	verdict_fd = open(VERDICT_PORT, O_WRONLY | O_CLOEXEC);
	if (verdict_fd < 0)
		die(VERDICT_PORT);
	uname(&uts);
	verdict("begin %s %s", uts.release, uts.version);

	load_modules();
	if (job.check)
		take_snapshot(&before);
	run_command();
	ended = now_ms();
	if (job.check) {
		check_descendants();
		check_counters(&before);
		check_kmemleak(ended);
	}
	verdict("end");
	power_off();
}
