// SPDX-License-Identifier: GPL-2.0-only
/*
 * Random operations on a guest_memfd file of huge pages, compared with a model.
 *
 * The model is an array with one entry per page.  After each operation the kernel
 * checks that the folios of the file are those that its attributes demand.
 */
#include <fcntl.h>
#include <getopt.h>
#include <time.h>

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kselftest.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

#define PRIVATE		KVM_MEMORY_ATTRIBUTE_PRIVATE
#define SHARED		0

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

#define MAX_PINS	8

struct page {
	bool private;
	u64 value;
};

/* A page in a pipe.  Its contents must not change after it has left the file. */
struct pin {
	int fds[2];
	bool used;
	bool gone;
	u64 page;
	u64 value;
};

static struct model {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
	int check;
	char *mem;
	size_t page_size;
	u64 nr_pages;
	u64 per_huge;
	struct page *pages;
	struct pin pins[MAX_PINS];
	struct hugetlb_counters counters;
	u64 stored;
} m;

static u64 state;

/* The upper bits of the state are random enough. */
static u64 rnd(u64 below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (state >> 33) % below;
}

static u64 *word(u64 page)
{
	return (u64 *)(m.mem + page * SZ_4K);
}

static bool chance(int percent)
{
	return rnd(100) < percent;
}

/* Most ranges are small, and some are the whole file. */
static void pick_range(u64 *first, u64 *nr)
{
	switch (rnd(10)) {
	case 0:
		*nr = m.nr_pages;
		break;
	case 1:
		*nr = m.per_huge;
		break;
	case 2:
		*nr = 1 + rnd(m.nr_pages);
		break;
	case 3:
		*nr = 512;
		break;
	default:
		*nr = 1 + rnd(8);
	}
	*nr = min(*nr, m.nr_pages);
	*first = rnd(m.nr_pages - *nr + 1);
	if (chance(40))
		*first -= *first % min(*nr, 512ul);
}

static struct pin *find_pin(u64 first, u64 nr)
{
	struct pin *found = NULL;
	int i;

	for (i = 0; i < MAX_PINS; i++) {
		struct pin *p = &m.pins[i];

		if (p->used && !p->gone && p->page >= first && p->page < first + nr &&
		    (!found || p->page < found->page))
			found = p;
	}
	return found;
}

static void do_convert(void)
{
	u64 first, nr, attributes = chance(60) ? PRIVATE : SHARED, error, i;
	struct pin *pin;
	int r;

	pick_range(&first, &nr);
	pin = attributes == PRIVATE ? find_pin(first, nr) : NULL;
	r = gmem_convert(m.fd, first * SZ_4K, nr * SZ_4K, attributes, &error);
	if (pin) {
		TEST_ASSERT(r && errno == EAGAIN, "page %lu is in use, but %d", pin->page, r);
		TEST_ASSERT_EQ(error, pin->page * SZ_4K);
		return;
	}
	TEST_ASSERT(!r, "%lu pages at %lu to 0x%lx: errno %d (%s) at %lu", nr, first,
		    attributes, errno, strerror(errno), error / SZ_4K);
	for (i = first; i < first + nr; i++)
		m.pages[i].private = attributes == PRIVATE;
}

static void check_page(u64 page)
{
	if (m.pages[page].private)
		TEST_EXPECT_SIGBUS(READ_ONCE(*word(page)));
	else
		TEST_ASSERT_EQ(READ_ONCE(*word(page)), m.pages[page].value);
}

static void do_host(void)
{
	u64 page = rnd(m.nr_pages);

	check_page(page);
	if (!m.pages[page].private)
		*word(page) = m.pages[page].value = ++m.stored << 32 | page;
}

static void do_guest(void)
{
	u64 page = rnd(m.nr_pages), gpa = GMEM_GPA + page * SZ_4K;

	gmem_guest_do(m.vcpu, GMEM_CHECK, gpa, 8, 8, m.pages[page].value);
	m.pages[page].value = ++m.stored << 32 | page;
	gmem_guest_do(m.vcpu, GMEM_WRITE, gpa, 8, 8, m.pages[page].value);
}

static void do_pin(void)
{
	u64 page = rnd(m.nr_pages), i;
	struct iovec iov;
	struct pin *p;

	for (p = m.pins; p->used; p++)
		if (p == &m.pins[MAX_PINS - 1])
			return;

	for (i = 0; i < m.nr_pages && m.pages[page].private; i++)
		page = (page + 1) % m.nr_pages;
	if (m.pages[page].private)
		return;

	iov = (struct iovec) { .iov_base = word(page), .iov_len = 8 };
	TEST_ASSERT(!pipe(p->fds), "pipe() failed");
	TEST_ASSERT(vmsplice(p->fds[1], &iov, 1, 0) == 8, "vmsplice() failed");
	p->used = true;
	p->gone = false;
	p->page = page;
}

static void unpin(struct pin *p)
{
	u64 value;

	TEST_ASSERT_EQ(read(p->fds[0], &value, 8), 8);
	TEST_ASSERT_EQ(value, p->gone ? p->value : m.pages[p->page].value);
	kvm_close(p->fds[0]);
	kvm_close(p->fds[1]);
	p->used = false;
}

static void do_unpin(void)
{
	struct pin *p = &m.pins[rnd(MAX_PINS)];

	if (p->used)
		unpin(p);
}

/* A page is reserved again after its last reference is dropped. */
static void wait_for_reservation(void)
{
	long want, has, i;

	for (i = 0; i < 1000; i++) {
		want = m.counters.val[HUGETLB_RESV] +
		       (m.nr_pages * SZ_4K - gmem_blocks(m.fd) * 512) / m.page_size;
		has = hugetlb_read(m.page_size, "resv_hugepages");
		if (has == want)
			return;
		usleep(10 * 1000);
	}
	TEST_FAIL("%ld pages are reserved, not %ld", has, want);
}

static void do_punch(void)
{
	u64 nr_huge = m.nr_pages / m.per_huge, first = rnd(nr_huge), nr, i;

	nr = (1 + rnd(nr_huge - first)) * m.per_huge;
	first *= m.per_huge;
	kvm_fallocate(m.fd, PUNCH_HOLE, first * SZ_4K, nr * SZ_4K);
	for (i = 0; i < MAX_PINS; i++) {
		struct pin *p = &m.pins[i];

		if (p->used && !p->gone && p->page >= first && p->page < first + nr) {
			p->gone = true;
			p->value = m.pages[p->page].value;
		}
	}
	for (i = first; i < first + nr; i++)
		m.pages[i].value = 0;
	for (i = 0; i < MAX_PINS; i++)
		if (m.pins[i].used && m.pins[i].gone)
			unpin(&m.pins[i]);
	wait_for_reservation();
}

static void do_check_range(void)
{
	u64 first, nr, i;

	pick_range(&first, &nr);
	for (i = first; i < first + min(nr, 64ul); i++)
		check_page(i);
}

static const struct {
	const char *name;
	int weight;
	void (*fn)(void);
} operations[] = {
	{ "convert",	50, do_convert },
	{ "host",	15, do_host },
	{ "guest",	15, do_guest },
	{ "pin",	6, do_pin },
	{ "unpin",	6, do_unpin },
	{ "check",	6, do_check_range },
	{ "punch",	2, do_punch },
};

static void create(size_t page_size, long nr)
{
	u64 i;

	m.page_size = page_size;
	m.per_huge = page_size / SZ_4K;
	m.nr_pages = nr * m.per_huge;
	hugetlb_get(page_size, &m.counters);
	m.vm = gmem_vm_create(1, &m.vcpu);
	m.fd = vm_create_guest_memfd(m.vm, nr * page_size, gmem_flags(page_size) |
				     GUEST_MEMFD_FLAG_MMAP);
	vm_set_user_memory_region2(m.vm, GMEM_SLOT, KVM_MEM_GUEST_MEMFD, GMEM_GPA,
				   nr * page_size, NULL, m.fd, 0);
	m.mem = kvm_mmap(nr * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd);
	m.check = gmem_open_check(m.vm);
	m.pages = calloc(m.nr_pages, sizeof(*m.pages));
	for (i = 0; i < m.nr_pages; i++)
		m.pages[i].private = true;
}

static void destroy(void)
{
	u64 i;

	for (i = 0; i < MAX_PINS; i++)
		if (m.pins[i].used)
			unpin(&m.pins[i]);
	gmem_close_check(m.check);
	kvm_munmap(m.mem, m.nr_pages * SZ_4K);
	kvm_vm_free(m.vm);
	kvm_close(m.fd);
	free(m.pages);
	hugetlb_expect_released(&m.counters, "after close");
}

static void run(size_t page_size, long nr_huge, u64 seed, long nr)
{
	int total = 0, pick, i;
	long n;

	for (i = 0; i < ARRAY_SIZE(operations); i++)
		total += operations[i].weight;

	ksft_print_msg("seed %lu, %ld operations, %ld pages of %s\n", seed, nr, nr_huge,
		       hugetlb_size_name(page_size));
	state = seed;
	create(page_size, nr_huge);
	for (n = 0; n < nr; n++) {
		pick = rnd(total);
		for (i = 0; pick >= operations[i].weight; i++)
			pick -= operations[i].weight;
		operations[i].fn();
		gmem_check(m.check, m.fd, true);
		if ((n + 1) % 500 == 0)
			ksft_print_msg("%ld operations done\n", n + 1);
	}
	destroy();
	ksft_test_result_pass("model.%s\n", hugetlb_size_name(page_size));
}

static void help(const char *name)
{
	printf("usage: %s [-s SEED] [-n OPERATIONS] [-g]\n"
	       "  -s  what to start from, to see the same again (default: the time)\n"
	       "  -n  how many operations (default: 20000)\n"
	       "  -g  on a page of 1 GiB, instead of three of 2 MiB\n", name);
	exit(1);
}

int main(int argc, char *argv[])
{
	size_t page_size = SZ_2M;
	u64 seed = time(NULL);
	long nr = 20000;
	int opt;

	while ((opt = getopt(argc, argv, "s:n:g")) != -1) {
		switch (opt) {
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 'n':
			nr = strtol(optarg, NULL, 0);
			break;
		case 'g':
			page_size = SZ_1G;
			break;
		default:
			help(argv[0]);
		}
	}

	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES));
	gmem_prepare_pools();
	gmem_merge_at_once();
	ksft_print_header();
	ksft_set_plan(1);
	if (gmem_unavailable(page_size))
		ksft_test_result_skip("model # SKIP %s\n", gmem_unavailable(page_size));
	else
		run(page_size, page_size == SZ_1G ? 1 : 3, seed, nr);
	ksft_finished();
}
