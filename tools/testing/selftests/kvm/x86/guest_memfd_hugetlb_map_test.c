// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM's mappings of guest_memfd files on HugeTLB pages.  KVM uses the largest
 * page that lies in one huge page and in one slot, whose gfn and file offset
 * are congruent, and whose attributes are uniform.  Unless conversion is in
 * place, the userspace address must be congruent with the gfn.  A larger
 * mapping would expose memory of other users: check contents through another
 * slot.
 */
#include <fcntl.h>

#include <linux/falloc.h>
#include <linux/kvm.h>
#include <linux/sizes.h>

#include "kvm_test_harness.h"
#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "processor.h"
#include "svm_util.h"
#include "test_util.h"
#include "vmx.h"

#define PUNCH_HOLE	(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

/* Clearing 1 GiB takes seconds on an emulated machine. */
#define SLOW		300

#define PATTERN		0x600d600d00000000ull

#define NX_PARAMETER	"/sys/module/kvm/parameters/nx_huge_pages"

enum { PAGES_4K, PAGES_2M, PAGES_1G, NR_LEVELS };

static const size_t level_sizes[NR_LEVELS] = { SZ_4K, SZ_2M, SZ_1G };

struct mappings {
	long nr[NR_LEVELS];
};

/* A slot: a range of the file, at offsets from GMEM_GPA and map_test.uaddr. */
struct layout {
	u64 gpa;
	u64 offset;
	u64 size;
	u64 uaddr;
};

struct map_test {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	size_t page_size;
	size_t size;
	int fd;
	/*
	 * Base of the slots' userspace addresses; shared memory unless
	 * converted in place
	 */
	char *uaddr;
	struct mappings before;
	struct hugetlb_counters counters;
};

FIXTURE(map)
{
	struct map_test t;
};

FIXTURE_VARIANT(map)
{
	size_t page_size;
	long nr;
};

FIXTURE_VARIANT_ADD(map, 4k) { .page_size = SZ_4K, .nr = 1024, };
FIXTURE_VARIANT_ADD(map, 2m) { .page_size = SZ_2M, .nr = 4, };
FIXTURE_VARIANT_ADD(map, 1g) { .page_size = SZ_1G, .nr = 2, };

static struct mappings get_mappings(struct kvm_vm *vm)
{
	struct mappings m;

	m.nr[PAGES_4K] = vm_get_stat(vm, pages_4k);
	m.nr[PAGES_2M] = vm_get_stat(vm, pages_2m);
	m.nr[PAGES_1G] = vm_get_stat(vm, pages_1g);
	return m;
}

static void create_vm(struct map_test *self)
{
	self->vm = gmem_vm_create(1, &self->vcpu);
	self->fd = vm_create_guest_memfd(self->vm, self->size,
					 gmem_flags(self->page_size));
	/* Cover all that the layouts below can reach. */
	gmem_vm_set_attributes(self->vm, GMEM_GPA, 2 * self->size,
			       KVM_MEMORY_ATTRIBUTE_PRIVATE);
}

FIXTURE_SETUP(map)
{
	const char *reason = gmem_unavailable(variant->page_size);

	if (reason)
		SKIP(return, "%s", reason);

	self->t.page_size = variant->page_size;
	self->t.size = variant->nr * self->t.page_size;
	self->t.uaddr = kvm_mmap(GMEM_WINDOW, PROT_READ | PROT_WRITE, MAP_PRIVATE |
			       MAP_ANONYMOUS | MAP_NORESERVE, -1);
	self->t.uaddr = align_ptr_up(self->t.uaddr, SZ_1G);
	hugetlb_get(self->t.page_size, &self->t.counters);
	create_vm(&self->t);
}

FIXTURE_TEARDOWN(map)
{
	kvm_close(self->t.fd);
	kvm_vm_free(self->t.vm);
	hugetlb_expect_released(&self->t.counters, "everything closed");
}

static int __add_slot(struct map_test *self, int i, const struct layout *l,
		      u32 flags)
{
	return __vm_set_user_memory_region2(self->vm, GMEM_SLOT + i, flags,
					    GMEM_GPA + l->gpa, l->size,
					    self->uaddr + l->uaddr, self->fd,
					    l->offset);
}

static void add_slot(struct map_test *self, int i, const struct layout *l)
{
	int r = __add_slot(self, i, l, KVM_MEM_GUEST_MEMFD);

	TEST_ASSERT(!r, "Slot at +0x%lx, size 0x%lx, of offset 0x%lx: errno %d (%s)",
		    l->gpa, l->size, l->offset, errno, strerror(errno));
}

/* Bind the whole file, with all addresses congruent. */
static void add_whole_file(struct map_test *self)
{
	const struct layout l = { .size = self->size };

	add_slot(self, 0, &l);
	self->before = get_mappings(self->vm);
}

static void expect_mappings(struct map_test *self, struct mappings want,
			    const char *what)
{
	struct mappings have = get_mappings(self->vm);
	bool equal = true;
	int i;

	for (i = 0; i < NR_LEVELS; i++) {
		have.nr[i] -= self->before.nr[i];
		equal &= have.nr[i] == want.nr[i];
	}
	TEST_ASSERT(equal,
		    "%s: %ld of 1 GiB, %ld of 2 MiB, %ld of 4 KiB expected, got %ld, %ld, %ld",
		    what, want.nr[PAGES_1G], want.nr[PAGES_2M], want.nr[PAGES_4K],
		    have.nr[PAGES_1G], have.nr[PAGES_2M], have.nr[PAGES_4K]);
}

/* Return @nr mappings of the file's own page size. */
static struct mappings largest(struct map_test *self, long nr)
{
	struct mappings m = {};
	int i;

	for (i = 0; i < NR_LEVELS; i++)
		if (level_sizes[i] == self->page_size)
			m.nr[i] = nr;
	return m;
}

/*
 * Compute the level that the page at @gpa of the slot should be mapped at,
 * independently of KVM.
 */
static int expected_level(size_t page_size, const struct layout *l, u64 gpa)
{
	int level;

	for (level = PAGES_1G; level > PAGES_4K; level--) {
		u64 size = level_sizes[level], start = gpa & ~(size - 1);

		if (size <= page_size &&
		    !((l->gpa ^ l->offset) & (size - 1)) &&
		    (kvm_converts_in_place() || !((l->gpa ^ l->uaddr) & (size - 1))) &&
		    start >= l->gpa && start + size <= l->gpa + l->size)
			break;
	}
	return level;
}

#define MAX_TOUCHES	64

struct touches {
	const struct layout *layout;
	u64 gpa[MAX_TOUCHES];
	int nr;
};

static void touch(struct touches *t, u64 offset)
{
	u64 gpa = t->layout->gpa + (offset & ~(SZ_4K - 1ull));

	if (offset < t->layout->size && t->nr < MAX_TOUCHES)
		t->gpa[t->nr++] = gpa;
}

/*
 * Touch both ends, both sides of the first and last boundary of each large page
 * size, and random pages.
 */
static void choose_touches(struct touches *t, const struct layout *l)
{
	int i;

	t->layout = l;
	t->nr = 0;
	touch(t, 0);
	touch(t, l->size - SZ_4K);
	for (i = PAGES_2M; i < NR_LEVELS; i++) {
		u64 size = level_sizes[i], first = -l->gpa & (size - 1);

		touch(t, first - SZ_4K);
		touch(t, first);
		touch(t, (l->gpa + l->size) % size ?
		      l->size - (l->gpa + l->size) % size : 0);
		touch(t, (l->gpa + l->size) % size ?
		      l->size - (l->gpa + l->size) % size - SZ_4K : 0);
	}
	for (i = 0; i < 16; i++)
		touch(t, kvm_random_u64(&kvm_rng) % l->size);
}

/* Count each mapping that the touches should create once. */
static void add_expected(size_t page_size, const struct touches *t,
			 struct mappings *m)
{
	int i, j, level;
	u64 size;

	for (i = 0; i < t->nr; i++) {
		level = expected_level(page_size, t->layout, t->gpa[i]);
		size = level_sizes[level];
		for (j = 0; j < i; j++)
			if (t->gpa[j] / size == t->gpa[i] / size &&
			    expected_level(page_size, t->layout, t->gpa[j]) == level)
				break;
		if (j == i)
			m->nr[level]++;
	}
}

static u64 value_at(u64 seed, const struct layout *l, u64 gpa)
{
	return PATTERN + (seed << 40) + gpa - l->gpa + l->offset;
}

/*
 * Bind the file to @nr slots, write to each from the guest, compare KVM's
 * mappings with the expected ones, and read back through one slot that has the
 * whole file.
 */
static void check_layouts(struct map_test *self, const struct layout *l,
			  int nr, const char *name)
{
	const struct layout whole = { .gpa = self->size, .size = self->size,
				      .uaddr = self->size };
	struct mappings want = {};
	struct touches t[2];
	static u64 seed;
	int i, j;

	TEST_ASSERT(nr <= ARRAY_SIZE(t), "Too many slots");
	seed = (seed + 1) & 0xff;

	for (i = 0; i < nr; i++) {
		add_slot(self, i, &l[i]);
		choose_touches(&t[i], &l[i]);
		add_expected(self->page_size, &t[i], &want);
	}
	self->before = get_mappings(self->vm);

	for (i = 0; i < nr; i++)
		for (j = 0; j < t[i].nr; j++)
			gmem_guest_do(self->vcpu, GMEM_WRITE, GMEM_GPA + t[i].gpa[j],
				      8, 8, value_at(seed, &l[i], t[i].gpa[j]));
	expect_mappings(self, want, name);

	for (i = 0; i < nr; i++)
		gmem_delete_slot(self->vm, GMEM_SLOT + i);
	expect_mappings(self, (struct mappings) {}, "slots deleted");

	add_slot(self, 0, &whole);
	for (i = 0; i < nr; i++)
		for (j = 0; j < t[i].nr; j++)
			gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA + whole.gpa +
				      l[i].offset + t[i].gpa[j] - l[i].gpa, 8, 8,
				      value_at(seed, &l[i], t[i].gpa[j]));
	gmem_delete_slot(self->vm, GMEM_SLOT);
}

TEST_F_TIMEOUT(map, aligned_file_is_mapped_by_its_pages, SLOW)
{
	long nr = self->t.size / self->t.page_size;

	add_whole_file(&self->t);
	gmem_guest_do(self->t.vcpu, GMEM_READ, GMEM_GPA, self->t.size,
		      self->t.page_size, 0);
	expect_mappings(&self->t, largest(&self->t, nr), "one access to each page");
	gmem_guest_do(self->t.vcpu, GMEM_WRITE, GMEM_GPA, self->t.size, SZ_4K, PATTERN);
	expect_mappings(&self->t, largest(&self->t, nr), "accesses everywhere");
	gmem_guest_do(self->t.vcpu, GMEM_CHECK, GMEM_GPA, self->t.size, SZ_4K, PATTERN);
}

TEST_F_TIMEOUT(map, gfn_and_file_offset_not_congruent, SLOW)
{
	const u64 page = self->t.page_size, half = page / 2;
	const struct layout layouts[] = {
		{ .gpa = SZ_4K, .size = page, .uaddr = SZ_4K },
		{ .gpa = 0, .offset = SZ_4K, .size = self->t.size - SZ_4K },
		{ .gpa = half, .size = page, .uaddr = half },
		{ .gpa = 0, .offset = half, .size = page },
		{ .gpa = page - SZ_4K, .size = page, .uaddr = page - SZ_4K },
		{ .gpa = SZ_2M, .size = page, .uaddr = SZ_2M },
		{ .gpa = SZ_2M + SZ_4K, .offset = SZ_4K, .size = page,
		  .uaddr = SZ_2M + SZ_4K },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(layouts); i++)
		if (!(layouts[i].gpa % SZ_4K) && !(layouts[i].offset % SZ_4K))
			check_layouts(&self->t, &layouts[i], 1, "file offset");
}

TEST_F_TIMEOUT(map, userspace_address_not_congruent, SLOW)
{
	const u64 page = self->t.page_size;
	const struct layout layouts[] = {
		{ .size = page, .uaddr = SZ_4K },
		{ .size = page, .uaddr = SZ_1M },
		{ .size = page, .uaddr = SZ_2M },
		{ .size = page, .uaddr = SZ_512M },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(layouts); i++)
		check_layouts(&self->t, &layouts[i], 1, "userspace address");
}

TEST_F_TIMEOUT(map, slot_that_ends_inside_a_page, SLOW)
{
	const u64 page = self->t.page_size;
	const struct layout layouts[] = {
		{ .size = page + SZ_4K },
		{ .size = 2 * page - SZ_4K },
		{ .size = page + SZ_2M },
		{ .size = 2 * page - SZ_2M },
		{ .size = page - SZ_4K },
		{ .size = SZ_4K },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(layouts); i++)
		if (layouts[i].size && layouts[i].size <= self->t.size)
			check_layouts(&self->t, &layouts[i], 1, "end");
}

TEST_F_TIMEOUT(map, slot_that_starts_inside_a_page, SLOW)
{
	const u64 page = self->t.page_size;
	const u64 starts[] = { SZ_4K, SZ_1M, SZ_2M, page / 2, page - SZ_4K, page };
	struct layout l;
	int i;

	for (i = 0; i < ARRAY_SIZE(starts); i++) {
		l = (struct layout) {
			.gpa = starts[i], .offset = starts[i], .uaddr = starts[i],
			.size = self->t.size - starts[i],
		};
		if (!(starts[i] % SZ_4K) && starts[i] < self->t.size)
			check_layouts(&self->t, &l, 1, "start");
	}
}

TEST_F_TIMEOUT(map, several_slots_of_one_file, SLOW)
{
	const u64 size = self->t.size, half = size / 2;
	const u64 splits[] = { half, half + SZ_4K, SZ_4K, SZ_2M, size - SZ_4K };
	struct layout l[2];
	u64 split;
	int i;

	for (i = 0; i < ARRAY_SIZE(splits); i++) {
		split = splits[i];
		/* Adjacent and in order, then exchanged. */
		l[0] = (struct layout) { 0, 0, split, 0 };
		l[1] = (struct layout) { split, split, size - split, split };
		check_layouts(&self->t, l, 2, "two slots");
		l[1] = (struct layout) { 0, split, size - split, 0 };
		l[0] = (struct layout) { size - split, 0, split, size - split };
		check_layouts(&self->t, l, 2, "two slots, exchanged");
	}
}

TEST_F_TIMEOUT(map, slots_at_random, SLOW)
{
	int i, rounds = self->t.page_size == SZ_1G ? 20 : 50;

	for (i = 0; i < rounds; i++) {
		/* Use units of 4 KiB or 2 MiB, so that some layouts are congruent. */
		u64 unit = level_sizes[kvm_random_u32(&kvm_rng) % 2];
		u64 units = self->t.size / unit;
		struct layout l;

		l.offset = kvm_random_u64(&kvm_rng) % units * unit;
		l.size = kvm_random_u64(&kvm_rng) % (units - l.offset / unit) * unit + unit;
		l.gpa = kvm_random_bool(&kvm_rng) ? l.offset :
			kvm_random_u64(&kvm_rng) % (units - l.size / unit + 1) * unit;
		l.uaddr = kvm_random_bool(&kvm_rng) ? l.gpa :
			  kvm_random_u64(&kvm_rng) % units * unit;
		check_layouts(&self->t, &l, 1, "random slot");
	}
	ksft_print_msg("%d slots with seed 0x%x\n", rounds, kvm_random_seed);
}

TEST_F_TIMEOUT(map, punch_reaches_every_mapping_of_the_page, SLOW)
{
	const u64 page = self->t.page_size;
	/* Shift the file in the guest, so that small pages map it. */
	const struct layout l = { .gpa = SZ_2M + SZ_4K, .size = 2 * page,
				  .uaddr = SZ_2M + SZ_4K };
	gpa_t gpa = GMEM_GPA + l.gpa;
	u64 stride = max(page / 64, (u64)SZ_4K);

	add_slot(&self->t, 0, &l);
	gmem_guest_do(self->t.vcpu, GMEM_WRITE, gpa, 2 * page, stride, PATTERN);
	kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, page);
	gmem_guest_do(self->t.vcpu, GMEM_CHECK_ZERO, gpa, page, stride, 0);
	gmem_guest_do(self->t.vcpu, GMEM_CHECK, gpa + page, page, stride, PATTERN + page);
}

TEST_F_TIMEOUT(map, punch_unmaps_the_page_alone, SLOW)
{
	long nr = self->t.size / self->t.page_size;

	add_whole_file(&self->t);
	gmem_guest_do(self->t.vcpu, GMEM_READ, GMEM_GPA, self->t.size, self->t.page_size, 0);
	kvm_fallocate(self->t.fd, PUNCH_HOLE, 0, self->t.page_size);
	expect_mappings(&self->t, largest(&self->t, nr - 1), "one page punched");
	gmem_guest_do(self->t.vcpu, GMEM_READ, GMEM_GPA, 8, 8, 0);
	expect_mappings(&self->t, largest(&self->t, nr), "and faulted again");
}

TEST_F_TIMEOUT(map, read_only_slots_are_refused, SLOW)
{
	const struct layout l = { .size = self->t.size };

	EXPECT_EQ(-1, __add_slot(&self->t, 0, &l, KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY));
	EXPECT_EQ(EINVAL, errno);
	add_slot(&self->t, 0, &l);
	EXPECT_EQ(-1, __add_slot(&self->t, 0, &l, KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY));
	EXPECT_EQ(EINVAL, errno);
}

TEST_F_TIMEOUT(map, dirty_logging_is_refused, SLOW)
{
	const u32 flags = KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES;
	const struct layout l = { .size = self->t.size };

	EXPECT_EQ(-1, __add_slot(&self->t, 0, &l, flags));
	EXPECT_EQ(EINVAL, errno);
	add_slot(&self->t, 0, &l);
	EXPECT_EQ(-1, __add_slot(&self->t, 0, &l, flags));
	EXPECT_EQ(EINVAL, errno);
}

TEST_F_TIMEOUT(map, slots_outside_the_file_are_refused, SLOW)
{
	const u64 size = self->t.size;
	const struct layout bad[] = {
		{ .size = size + SZ_4K },
		{ .offset = SZ_4K, .size = size },
		{ .offset = size, .size = SZ_4K },
		{ .offset = size - SZ_4K, .size = SZ_8K },
		{ .offset = 1, .size = SZ_4K },
		{ .offset = INT64_MAX & ~(SZ_4K - 1ull), .size = SZ_4K },
		{ .offset = -SZ_4K, .size = SZ_4K },
		{ .offset = -SZ_4K, .size = SZ_8K },
	};
	const struct layout whole = { .size = size };
	const struct layout again = { .gpa = size, .offset = size - SZ_4K,
				      .size = SZ_4K };
	int i;

	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		EXPECT_EQ(-1, __add_slot(&self->t, 0, &bad[i], KVM_MEM_GUEST_MEMFD));
		EXPECT_EQ(EINVAL, errno) {
			TH_LOG("offset 0x%lx, size 0x%lx", bad[i].offset, bad[i].size);
		}
	}
	add_slot(&self->t, 0, &whole);
	EXPECT_EQ(-1, __add_slot(&self->t, 1, &again, KVM_MEM_GUEST_MEMFD));
	EXPECT_EQ(EEXIST, errno);
}

/* Convert in the file or in the VM, depending on where KVM tracks attributes. */
static void set_shared(struct map_test *self, u64 offset, u64 size, bool shared)
{
	u64 attributes = shared ? 0 : KVM_MEMORY_ATTRIBUTE_PRIVATE;

	if (kvm_converts_in_place())
		TEST_ASSERT(!gmem_convert(self->fd, offset, size, attributes, NULL),
			    "Conversion of 0x%lx bytes at 0x%lx: errno %d (%s)", size,
			    offset, errno, strerror(errno));
	else
		vm_set_memory_attributes(self->vm, GMEM_GPA + offset, size, attributes);
}

/*
 * Expect a maximum level for the page, as KVM computes it outside of faults.
 * @level starts at 0, but PG_LEVEL_4K is 1.
 */
static void expect_level(struct map_test *self, u64 offset, int level)
{
	const u64 gfn = (GMEM_GPA + offset) / SZ_4K;
	char cmd[48];
	int fd, len;

	fd = gmem_open_optional(self->vm, "gmem_level",
				"the check of levels outside of faults");
	if (fd < 0)
		return;

	len = snprintf(cmd, sizeof(cmd), "%lu %u", gfn, level + 1);
	TEST_ASSERT(write(fd, cmd, len) == len, "0x%lx: not of level %d, errno %d (%s)",
		    offset, level, errno, strerror(errno));
	kvm_close(fd);
}

/* Check the levels while a range of the first page is shared. */
static void expect_levels(struct map_test *self, u64 shared, u64 size)
{
	u64 part, beside = shared ? shared - SZ_4K : shared + size;

	expect_level(self, shared, size == SZ_2M ? PAGES_2M : PAGES_4K);
	/* The next page is not allocated. */
	expect_level(self, self->page_size, PAGES_4K);
	expect_level(self, beside, beside / SZ_2M == shared / SZ_2M ||
		     beside / SZ_2M == (shared + size - 1) / SZ_2M ? PAGES_4K : PAGES_2M);
	for (part = 0; part < self->page_size; part += SZ_2M)
		if (part + SZ_2M <= shared || part >= shared + size)
			expect_level(self, part + SZ_8K, PAGES_2M);
}

/*
 * Convert a range of a private page to shared and back.
 */
static void mix_and_unmix(struct map_test *self, u64 shared, u64 size)
{
	const u64 page = self->page_size;
	struct mappings want = {};
	u64 gpa;

	gmem_guest_do(self->vcpu, GMEM_WRITE, GMEM_GPA, page, SZ_4K, PATTERN);
	expect_mappings(self, largest(self, 1), "all private");

	set_shared(self, shared, size, true);

	/* Touch the private parts beside it, then the private pages of its parts. */
	for (gpa = 0; gpa < page; gpa += SZ_2M) {
		if (gpa + SZ_2M <= shared || gpa >= shared + size) {
			gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA + gpa, 8, 8,
				      PATTERN + gpa);
			want.nr[PAGES_2M]++;
		}
	}
	for (gpa = shared & ~(SZ_2M - 1ull); gpa < align_up(shared + size, SZ_2M);
	     gpa += SZ_4K) {
		if (gpa >= page || (gpa >= shared && gpa < shared + size))
			continue;
		gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA + gpa, 8, 8, PATTERN + gpa);
		want.nr[PAGES_4K]++;
	}
	expect_mappings(self, want, "one part shared");

	if (kvm_converts_in_place()) {
		/* A shared part is mapped by 2 MiB, other shared pages by 4 KiB. */
		gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA + shared, size, SZ_4K,
			      PATTERN + shared);
		want.nr[size == SZ_2M ? PAGES_2M : PAGES_4K] += size == SZ_2M ? 1 :
								size / SZ_4K;
		expect_mappings(self, want, "shared part, too");
		expect_levels(self, shared, size);
	} else {
		/*
		 * Shared memory is at the userspace address: the private
		 * contents stay.
		 */
		gmem_guest_do(self->vcpu, GMEM_WRITE, GMEM_GPA + shared, 8, 8, ~PATTERN);
		TEST_ASSERT_EQ(*(u64 *)(self->uaddr + shared), ~PATTERN);
	}

	set_shared(self, shared, size, false);
	gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA + shared, 8, 8, PATTERN + shared);
	expect_mappings(self, largest(self, 1), "all private again");
	if (kvm_converts_in_place())
		expect_level(self, shared, self->page_size == SZ_1G ? PAGES_1G : PAGES_2M);
	gmem_guest_do(self->vcpu, GMEM_CHECK, GMEM_GPA, page, SZ_4K, PATTERN);
}

TEST_F_TIMEOUT(map, mixed_attributes_fall_back_and_recover, SLOW)
{
	const u64 page = self->t.page_size;
	const u64 shared[] = { 0, SZ_4K, page / 2, page - SZ_4K };
	int i;

	if (page == SZ_4K)
		SKIP(return, "there is nothing to mix in a page of 4 KiB");

	add_whole_file(&self->t);
	for (i = 0; i < ARRAY_SIZE(shared); i++)
		mix_and_unmix(&self->t, shared[i], SZ_4K);
	mix_and_unmix(&self->t, page / 2 - SZ_4K, SZ_8K);
	if (page > SZ_2M)
		mix_and_unmix(&self->t, page / 2, SZ_2M);
}

TEST_F_TIMEOUT(map, attributes_mixed_before_the_slot_exists, SLOW)
{
	const u64 page = self->t.page_size;
	struct mappings want = {};

	if (page == SZ_4K)
		SKIP(return, "there is nothing to mix in a page of 4 KiB");

	set_shared(&self->t, page - SZ_4K, SZ_4K, true);
	add_whole_file(&self->t);

	gmem_guest_do(self->t.vcpu, GMEM_READ, GMEM_GPA, 8, 8, 0);
	want.nr[page == SZ_1G ? PAGES_2M : PAGES_4K]++;
	gmem_guest_do(self->t.vcpu, GMEM_READ, GMEM_GPA + page - SZ_8K, 8, 8, 0);
	want.nr[PAGES_4K]++;
	/* The next page is uniform. */
	gmem_guest_do(self->t.vcpu, GMEM_READ, GMEM_GPA + page, 8, 8, 0);
	want.nr[page == SZ_1G ? PAGES_1G : PAGES_2M]++;
	expect_mappings(&self->t, want, "last 4 KiB of the first page shared");
}

/*
 * KVM_PRE_FAULT_MEMORY
 */
static u64 pre_fault(struct kvm_vcpu *vcpu, u64 offset, u64 size, int *err)
{
	struct kvm_pre_fault_memory range = {
		.gpa = GMEM_GPA + offset,
		.size = size,
	};
	int r;

	do {
		r = __vcpu_ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range);
	} while ((!r && range.size) || (r && errno == EINTR));

	*err = r ? errno : 0;
	return range.size;
}

TEST_F_TIMEOUT(map, pre_fault_maps_whole_pages, SLOW)
{
	const u64 page = self->t.page_size;
	const struct {
		u64 offset, size;
		long nr;
	} cases[] = {
		{ 0, page, 1 },
		{ page / 2, SZ_4K, 1 },
		{ page - SZ_4K, SZ_4K, 1 },
		{ page - SZ_4K, SZ_8K, 2 },
		{ 0, 2 * page, 2 },
	};
	int i, err;

	add_whole_file(&self->t);
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		u64 offset = cases[i].offset & ~(SZ_4K - 1ull);

		EXPECT_EQ(0, pre_fault(self->t.vcpu, offset, cases[i].size, &err));
		EXPECT_EQ(0, err);
		expect_mappings(&self->t, largest(&self->t, cases[i].nr), "pre-faulted");
		gmem_guest_do(self->t.vcpu, GMEM_CHECK_ZERO, GMEM_GPA + offset,
			      cases[i].size, SZ_4K, 0);
		expect_mappings(&self->t, largest(&self->t, cases[i].nr), "and used");

		/* Remove the mappings, but not the memory, for the next case. */
		gmem_delete_slot(self->t.vm, GMEM_SLOT);
		add_whole_file(&self->t);
	}
}

TEST_F_TIMEOUT(map, pre_fault_stops_at_the_end_of_the_slot, SLOW)
{
	const u64 page = self->t.page_size;
	const struct layout l = { .size = page + SZ_4K };
	struct mappings want = largest(&self->t, 1);
	int err;

	add_slot(&self->t, 0, &l);
	gmem_vm_set_attributes(self->t.vm, GMEM_GPA + l.size, SZ_4K, 0);
	self->t.before = get_mappings(self->t.vm);
	EXPECT_EQ(SZ_4K, pre_fault(self->t.vcpu, 0, l.size + SZ_4K, &err));
	EXPECT_EQ(ENOENT, err);
	want.nr[PAGES_4K]++;
	expect_mappings(&self->t, want, "a page and 4 KiB pre-faulted");
}

/*
 * kvm.nx_huge_pages: no large page is executable.
 */
FIXTURE(nx)
{
	struct map_test map;
	char old[16];
};

FIXTURE_VARIANT(nx)
{
	size_t page_size;
};

FIXTURE_VARIANT_ADD(nx, 2m) { .page_size = SZ_2M, };
FIXTURE_VARIANT_ADD(nx, 1g) { .page_size = SZ_1G, };

static bool set_nx(const char *val)
{
	int fd = open(NX_PARAMETER, O_WRONLY);
	bool ok = fd >= 0 && write(fd, val, strlen(val)) > 0;

	if (fd >= 0)
		close(fd);
	return ok;
}

FIXTURE_SETUP(nx)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct map_test *map = &self->map;
	int fd;

	if (reason)
		SKIP(return, "%s", reason);

	fd = open(NX_PARAMETER, O_RDONLY);
	if (fd < 0 || read(fd, self->old, sizeof(self->old) - 1) <= 0 ||
	    !set_nx("force"))
		SKIP(return, "can't set " NX_PARAMETER);
	close(fd);

	map->page_size = variant->page_size;
	map->size = 2 * variant->page_size;
	hugetlb_get(map->page_size, &map->counters);
}

FIXTURE_TEARDOWN_PARENT(nx)
{
	if (self->old[0])
		set_nx(self->old);
}

static void execute(struct map_test *map, u64 offset)
{
	/* Eight RET instructions */
	gmem_guest_do(map->vcpu, GMEM_WRITE, GMEM_GPA + offset, 8, 8,
		      0xc3c3c3c3c3c3c3c3ull);
	gmem_guest_do(map->vcpu, GMEM_EXEC, GMEM_GPA + offset, 8, 8, 0);
}

TEST_F_TIMEOUT(nx, executed_page_is_mapped_small, SLOW)
{
	struct map_test *map = &self->map;
	u64 offset = map->page_size / 2 + SZ_8K;
	struct mappings now;

	create_vm(map);
	add_whole_file(map);
	gmem_guest_do(map->vcpu, GMEM_WRITE, GMEM_GPA, map->page_size, SZ_4K, PATTERN);
	expect_mappings(map, largest(map, 1), "written");

	execute(map, offset);
	now = get_mappings(map->vm);
	EXPECT_EQ(0, now.nr[PAGES_1G] - map->before.nr[PAGES_1G]);
	EXPECT_LE(1, now.nr[PAGES_4K] - map->before.nr[PAGES_4K]);
	/* The other 511 parts of 1 GiB stay mapped by 2 MiB. */
	EXPECT_EQ(map->page_size == SZ_1G ? 511 : 0,
		  now.nr[PAGES_2M] - map->before.nr[PAGES_2M]);
	EXPECT_LE(1, vm_get_stat(map->vm, nx_lpage_splits));

	/* The other contents are unchanged. */
	gmem_guest_do(map->vcpu, GMEM_CHECK, GMEM_GPA, offset, SZ_4K, PATTERN);
	gmem_guest_do(map->vcpu, GMEM_CHECK, GMEM_GPA + offset + SZ_4K,
		      map->page_size - offset - SZ_4K, SZ_4K, PATTERN + offset + SZ_4K);

	kvm_close(map->fd);
	kvm_vm_free(map->vm);
	hugetlb_expect_released(&map->counters, "closed");
}

TEST_F_TIMEOUT(nx, large_pages_are_executed_without_it, SLOW)
{
	struct map_test *map = &self->map;

	ASSERT_TRUE(set_nx("off"));
	create_vm(map);
	add_whole_file(map);
	execute(map, map->page_size / 2);
	expect_mappings(map, largest(map, 1), "executed");
	kvm_close(map->fd);
	kvm_vm_free(map->vm);
}

/*
 * Nested guests: KVM maps the memory of L2 by pages no larger than those in the
 * page tables of L1, and no larger than the file allows.
 */
#define NESTED_WORDS	4

FIXTURE(nested)
{
	struct map_test map;
};

FIXTURE_VARIANT(nested)
{
	size_t page_size;
	long nr;
	int l1_level;		/* of L1's mappings for L2 */
	int level;		/* of KVM's mappings for L2 */
};

FIXTURE_VARIANT_ADD(nested, 4k_in_4k)
{
	.page_size = SZ_4K, .nr = 512, .l1_level = PAGES_4K, .level = PAGES_4K,
};

FIXTURE_VARIANT_ADD(nested, 1g_in_4k)
{
	.page_size = SZ_4K, .nr = 512, .l1_level = PAGES_1G, .level = PAGES_4K,
};

FIXTURE_VARIANT_ADD(nested, 4k_in_2m)
{
	.page_size = SZ_2M, .nr = 1, .l1_level = PAGES_4K, .level = PAGES_4K,
};

FIXTURE_VARIANT_ADD(nested, 1g_in_2m)
{
	.page_size = SZ_2M, .nr = 1, .l1_level = PAGES_1G, .level = PAGES_2M,
};

FIXTURE_VARIANT_ADD(nested, 4k_in_1g)
{
	.page_size = SZ_1G, .nr = 1, .l1_level = PAGES_4K, .level = PAGES_4K,
};

FIXTURE_VARIANT_ADD(nested, 1g_in_1g)
{
	.page_size = SZ_1G, .nr = 1, .l1_level = PAGES_1G, .level = PAGES_1G,
};

FIXTURE_SETUP(nested)
{
	const char *reason = gmem_unavailable(variant->page_size);
	struct map_test *map = &self->map;

	if (reason)
		SKIP(return, "%s", reason);
	if (!kvm_cpu_has_tdp())
		SKIP(return, "KVM does not offer nested paging");

	map->page_size = variant->page_size;
	map->size = variant->nr * variant->page_size;
	hugetlb_get(map->page_size, &map->counters);
	create_vm(map);
}

FIXTURE_TEARDOWN(nested)
{
	kvm_close(self->map.fd);
	kvm_vm_free(self->map.vm);
	hugetlb_expect_released(&self->map.counters, "everything closed");
}

static void check_nested_words(u64 value)
{
	u64 *p;
	int i;

	for (i = 0; i < NESTED_WORDS; i++) {
		p = (u64 *)(GMEM_GPA + i * SZ_4K);
		GUEST_ASSERT_EQ(READ_ONCE(p[0]), value ? value + i : 0);
		GUEST_ASSERT_EQ(READ_ONCE(p[1]), 0);
	}
}

static void l2_guest_code(void)
{
	int i;

	for (i = 0; i < NESTED_WORDS; i++)
		WRITE_ONCE(*(u64 *)(GMEM_GPA + i * SZ_4K), PATTERN + i);
	check_nested_words(PATTERN);
	vmcall();
}

static void l1_guest_code(void *data)
{
	if (this_cpu_has(X86_FEATURE_VMX)) {
		struct vmx_pages *vmx = data;

		GUEST_ASSERT(prepare_for_vmx_operation(vmx));
		GUEST_ASSERT(load_vmcs(vmx));
		prepare_vmcs(vmx, l2_guest_code);
		GUEST_ASSERT(!vmlaunch());
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
	} else {
		struct svm_test_data *svm = data;

		generic_svm_setup(svm, l2_guest_code);
		run_guest(svm->vmcb, svm->vmcb_gpa);
		GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
	}
	/* L1 must see the writes of L2. */
	GUEST_SYNC(0);
	check_nested_words(PATTERN);
}

TEST_F_TIMEOUT(nested, mapping_is_as_large_as_both_allow, SLOW)
{
	struct map_test *map = &self->map;
	struct mappings now, want;
	gva_t data;
	int r;

	vm_enable_tdp(map->vm);
	if (kvm_cpu_has(X86_FEATURE_VMX))
		vcpu_alloc_vmx(map->vm, &data);
	else
		vcpu_alloc_svm(map->vm, &data);
	add_whole_file(map);
	tdp_identity_map_default_memslots(map->vm);
	if (variant->l1_level == PAGES_1G)
		tdp_identity_map_1g(map->vm, GMEM_GPA, SZ_1G);
	else
		tdp_map(map->vm, GMEM_GPA, GMEM_GPA, NESTED_WORDS * SZ_4K);

	gmem_guest_set_call(map->vcpu, l1_guest_code, data, 0, 0, 0);
	r = gmem_guest_run(map->vcpu);
	ASSERT_EQ(0, r) TH_LOG("L2 could not run: %s", strerror(-r));

	/*
	 * Base pages map the code and data of L1 and L2: compare only the
	 * larger ones.
	 */
	want = map->before;
	if (variant->level != PAGES_4K)
		want.nr[variant->level]++;
	now = get_mappings(map->vm);
	EXPECT_EQ(want.nr[PAGES_1G], now.nr[PAGES_1G]);
	EXPECT_EQ(want.nr[PAGES_2M], now.nr[PAGES_2M]);

	/* Read the same memory through L1's own mapping. */
	r = gmem_guest_run(map->vcpu);
	ASSERT_EQ(0, r) TH_LOG("L1 could not run: %s", strerror(-r));
}

int main(int argc, char *argv[])
{
	TEST_REQUIRE(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM));
	TEST_REQUIRE(kvm_is_tdp_enabled());

	gmem_prepare_pools();
	return test_harness_run(argc, argv);
}
