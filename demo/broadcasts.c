// SPDX-License-Identifier: GPL-2.0
/*
 * Count what conversions do to all CPUs of the host: flushes of kernel TLBs, expedited RCU
 * grace periods, and function calls on other CPUs.  Print "name value" lines for
 * scripts/bench.
 *
 * It needs two CPUs, a page of 1 GiB and one of 2 MiB, and kprobe events.
 */
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include <sys/wait.h>

#include "common.h"

#define TRACING		"/sys/kernel/tracing/"
#define NR_TOGGLES	256
#define NR_RUNS		3

static const char * const probes[] = {
	"flush_range flush_tlb_kernel_range",
	"flush_all flush_tlb_all",
	"grace synchronize_rcu_expedited",
};

struct counts {
	long flushes, grace_periods, calls;
};

static void write_file(const char *path, int flags, const char *s)
{
	int fd = open(path, O_WRONLY | flags);

	TEST_ASSERT(fd >= 0, "Can't open %s: %s", path, strerror(errno));
	TEST_ASSERT(write(fd, s, strlen(s)) == (ssize_t)strlen(s), "Can't write '%s' to %s: %s",
		    s, path, strerror(errno));
	close(fd);
}

static void add_probes(void)
{
	char line[100];
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes); i++) {
		snprintf(line, sizeof(line), "p:bench/%s", probes[i]);
		write_file(TRACING "kprobe_events", O_APPEND, line);
	}
	write_file(TRACING "events/bench/enable", 0, "1");
}

/* Sum the numbers of a line "name: 1 2 ..." of /proc/interrupts. */
static long interrupts(const char *name)
{
	char line[1024], *p, *end;
	long sum = -1, n;
	FILE *f = fopen("/proc/interrupts", "r");

	TEST_ASSERT(f, "Can't open /proc/interrupts");
	while (fgets(line, sizeof(line), f)) {
		p = line + strspn(line, " ");
		if (strncmp(p, name, strlen(name)))
			continue;
		for (sum = 0, p += strlen(name); n = strtol(p, &end, 10), end != p; p = end)
			sum += n;
	}
	fclose(f);
	TEST_ASSERT(sum >= 0, "There is no %s in /proc/interrupts", name);
	return sum;
}

static struct counts get_counts(void)
{
	struct counts c = { .calls = interrupts("CAL:") + interrupts("TLB:") };
	char name[64];
	FILE *f = fopen(TRACING "kprobe_profile", "r");
	long hits, missed;

	TEST_ASSERT(f, "Can't open kprobe_profile");
	while (fscanf(f, "%63s %ld %ld", name, &hits, &missed) == 3) {
		if (!strncmp(name, "flush", 5))
			c.flushes += hits;
		else
			c.grace_periods += hits;
		TEST_ASSERT(!missed, "A probe was missed");
	}
	fclose(f);
	return c;
}

static void print_since(const char *name, const struct counts *before, double nr)
{
	struct counts c = get_counts();

	printf("%s_flushes %.2f\n%s_grace_periods %.2f\n%s_calls %.2f\n",
	       name, (c.flushes - before->flushes) / nr,
	       name, (c.grace_periods - before->grace_periods) / nr,
	       name, (c.calls - before->calls) / nr);
	fflush(stdout);
}

static void set_delay(const char *ms)
{
	write_file("/sys/module/kvm/parameters/gmem_merge_delay_ms", 0, ms);
}

static void convert(struct demo_vm *d, u64 offset, u64 size, u64 attributes)
{
	TEST_ASSERT(!gmem_convert(d->fd, offset, size, attributes, NULL),
		    "Can't convert: %s", strerror(errno));
}

/* Share memory and take it back, with a guest mapping to remove each time. */
static void toggle(struct demo_vm *d, u64 size)
{
	gmem_guest_do(d->vcpu, GMEM_READ, GMEM_GPA, 8, 8, 0);
	convert(d, 0, size, 0);
	gmem_guest_do(d->vcpu, GMEM_READ, GMEM_GPA, 8, 8, 0);
	convert(d, 0, size, KVM_MEMORY_ATTRIBUTE_PRIVATE);
}

static void count_conversions(const char *which, size_t page_size)
{
	struct counts before;
	struct demo_vm d;
	char name[32];
	int i;

	demo_vm_create(&d, page_size, page_size);
	gmem_guest_do(d.vcpu, GMEM_WRITE, GMEM_GPA, page_size, SZ_4K, 1);

	set_delay("1000000");
	before = get_counts();
	convert(&d, 0, SZ_4K, 0);
	snprintf(name, sizeof(name), "first_%s", which);
	print_since(name, &before, 1);
	convert(&d, 0, SZ_4K, KVM_MEMORY_ATTRIBUTE_PRIVATE);

	before = get_counts();
	for (i = 0; i < NR_TOGGLES; i++)
		toggle(&d, SZ_4K);
	snprintf(name, sizeof(name), "toggle_%s", which);
	print_since(name, &before, NR_TOGGLES);

	/* Begin with a whole huge page, and end with one. */
	set_delay("0");
	toggle(&d, SZ_4K);
	before = get_counts();
	toggle(&d, page_size);
	snprintf(name, sizeof(name), "all_%s", which);
	print_since(name, &before, 1);
	demo_vm_free(&d);
}

/* Keep the other CPU busy: an idle one is often left alone. */
static pid_t keep_busy(void)
{
	pid_t pid = fork();
	cpu_set_t cpus;

	TEST_ASSERT(pid >= 0, "fork(): %s", strerror(errno));
	CPU_ZERO(&cpus);
	CPU_SET(!pid, &cpus);
	TEST_ASSERT(!sched_setaffinity(0, sizeof(cpus), &cpus), "Two CPUs are needed");
	while (!pid)
		;
	return pid;
}

int main(void)
{
	pid_t pid = keep_busy();
	int i;

	add_probes();
	/* Other work of the kernel can add to a count: let the reader take the smallest. */
	for (i = 0; i < NR_RUNS; i++) {
		count_conversions("2m", SZ_2M);
		count_conversions("1g", SZ_1G);
	}
	TEST_ASSERT(!waitpid(pid, NULL, WNOHANG), "The other CPU was not busy");
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	write_file(TRACING "events/bench/enable", 0, "0");
	return 0;
}
