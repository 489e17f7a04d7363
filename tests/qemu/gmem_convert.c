// SPDX-License-Identifier: GPL-2.0
/*
 * Guest module that makes the VMM convert memory between private and shared.
 *
 * The module allocates memory in contiguous chunks, as large as possible, or uses
 * memory that the kernel was told not to use.  It makes all of it private, then
 *
 * - with seconds=N, threads convert random ranges for N seconds.  The module then
 *   shares and frees the memory and prints the result.  insmod returns after that,
 *   with an error if a check failed.
 * - without it, the module converts ranges that are written to its parameter
 *   "command".  Unloading it shares and frees the memory.
 *
 * Each page has a pattern of its own, which is checked after each conversion, in
 * both directions: in-place conversion preserves the contents.  With
 * check_contents=0, for a VMM with two backings, the pattern is checked before a
 * conversion and written again after it.
 *
 * A conversion must not change other pages, either.  Those that share a 2 MiB page with
 * the range are checked each time, and all pages of the thread now and then.
 *
 * Each thread has its own part of each chunk, so it does not depend on the state of
 * pages of other threads.  The parts meet within a page of the host, so that two
 * threads convert ranges of the same page.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/hash.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/kvm_para.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/prandom.h>
#include <linux/sched.h>
#include <linux/vmalloc.h>

#define MAX_CHUNKS	64
#define MAX_THREADS	8
#define LARGE_PAGE	(SZ_2M / PAGE_SIZE)
#define SMALLEST_CHUNK	LARGE_PAGE
/* Reading 512 MiB takes about as long as 20 conversions. */
#define CONVERSIONS_PER_CHECK	32
/* Fail if the host uses a page for longer than this. */
#define RETRY_SECONDS	20
#define ERRORS_TOLD	10

static unsigned int mib = 256;
module_param(mib, uint, 0444);
MODULE_PARM_DESC(mib, "how much memory to take, in MiB");

static unsigned int chunk_mib = 1024;
module_param(chunk_mib, uint, 0444);
MODULE_PARM_DESC(chunk_mib, "the largest chunk to try, in MiB");

static unsigned long gpa;
module_param(gpa, ulong, 0444);
MODULE_PARM_DESC(gpa, "the memory to use, which is kept free by memmap=SIZE$GPA; 0: allocate some");

static unsigned int seconds;
module_param(seconds, uint, 0444);
MODULE_PARM_DESC(seconds, "for how long to convert at random; 0: wait for commands");

static unsigned int threads = 2;
module_param(threads, uint, 0444);
MODULE_PARM_DESC(threads, "how many threads convert at random");

static unsigned int seed = 1;
module_param(seed, uint, 0444);
MODULE_PARM_DESC(seed, "what random sizes and places are made from");

static bool check_contents = true;
module_param(check_contents, bool, 0444);
MODULE_PARM_DESC(check_contents, "contents are kept by a conversion");

struct chunk {
	void *mem;
	phys_addr_t gpa;
	unsigned long nr;
	unsigned long first;	/* index of its first page among all pages */
};

struct worker {
	struct task_struct *task;
	struct rnd_state rnd;
	unsigned int nr;
	unsigned long conversions;
	unsigned long converted;	/* pages */
	unsigned long retries;
};

static struct chunk chunks[MAX_CHUNKS];
static unsigned int nr_chunks;
static unsigned long nr_pages;
static struct gmem_page {
	u16 generation;		/* of what it holds */
	bool private;
} *pages;			/* in the order that chunks have */
static struct worker workers[MAX_THREADS];
static atomic_t errors;

static u64 pattern(unsigned long index)
{
	/* No two pages and generations have the same: the multiplier is odd. */
	return ((u64)index << 16 | pages[index].generation) * GOLDEN_RATIO_64;
}

static void fill(const struct chunk *c, unsigned long start, unsigned long nr)
{
	unsigned long i;

	for (i = start; i < start + nr; i++) {
		pages[c->first + i].generation++;
		memset64(c->mem + i * PAGE_SIZE, pattern(c->first + i), PAGE_SIZE / sizeof(u64));
		cond_resched();
	}
}

static void check(const struct chunk *c, unsigned long start, unsigned long nr, const char *when)
{
	unsigned long i, w;

	for (i = start; i < start + nr; i++) {
		const u64 *words = c->mem + i * PAGE_SIZE;
		u64 want = pattern(c->first + i);

		for (w = 0; w < PAGE_SIZE / sizeof(u64); w++) {
			if (READ_ONCE(words[w]) != want)
				break;
		}
		if (w < PAGE_SIZE / sizeof(u64) && atomic_inc_return(&errors) <= ERRORS_TOLD)
			pr_notice("error: gpa %#llx, %s, has %#llx %s, and not %#llx\n",
				  c->gpa + i * PAGE_SIZE + w * sizeof(u64),
				  pages[c->first + i].private ? "private" : "shared",
				  words[w], when, want);
		cond_resched();
	}
}

/* Retry while the VMM reports that memory is in use. */
static int convert(struct worker *worker, const struct chunk *c, unsigned long start,
		   unsigned long nr, bool private)
{
	unsigned long end = jiffies + RETRY_SECONDS * HZ;
	unsigned long i;
	long ret;

	for (;;) {
		ret = kvm_sev_hypercall3(KVM_HC_MAP_GPA_RANGE, c->gpa + start * PAGE_SIZE, nr,
					 KVM_MAP_GPA_RANGE_ENC_STAT(private) |
					 KVM_MAP_GPA_RANGE_PAGE_SZ_4K);
		if (ret != -EAGAIN || time_after(jiffies, end))
			break;
		worker->retries++;
		cond_resched();
	}
	if (ret) {
		if (atomic_inc_return(&errors) <= ERRORS_TOLD)
			pr_notice("error: gpa %#llx, %lu pages, cannot become %s: %ld\n",
				  c->gpa + start * PAGE_SIZE, nr, private ? "private" : "shared",
				  ret);
		return ret;
	}
	worker->conversions++;
	worker->converted += nr;
	for (i = start; i < start + nr; i++)
		pages[c->first + i].private = private;
	return 0;
}

static int convert_and_check(struct worker *worker, const struct chunk *c, unsigned long start,
			     unsigned long nr, bool private)
{
	int ret;

	if (!check_contents)
		check(c, start, nr, "before it is converted");
	ret = convert(worker, c, start, nr, private);
	if (check_contents || ret)
		check(c, start, nr, "after it was converted");
	else
		fill(c, start, nr);
	return ret;
}

/*
 * Each order of magnitude is equally likely.  A quarter of the ranges are aligned to
 * their size, like the pages of the host and their parts.
 */
static void pick_range(struct worker *worker, unsigned long size, unsigned long *start,
		       unsigned long *nr)
{
	unsigned long power = 1UL << prandom_u32_state(&worker->rnd) % (ilog2(size) + 1);

	*nr = min(size, power + prandom_u32_state(&worker->rnd) % power);
	*start = prandom_u32_state(&worker->rnd) % (size - *nr + 1);
	if (prandom_u32_state(&worker->rnd) % 4 == 0) {
		*nr = power;
		*start = round_down(*start, power);
	}
}

/* The thread owns the pages of @c from @begin to @end, and has just converted @nr of them. */
static void check_others(struct worker *worker, const struct chunk *c, unsigned long begin,
			 unsigned long end, unsigned long start, unsigned long nr)
{
	if (worker->conversions % CONVERSIONS_PER_CHECK) {
		begin = max(begin, round_down(start, LARGE_PAGE));
		end = min(end, round_up(start + nr, LARGE_PAGE));
	}
	check(c, begin, start - begin, "after a conversion behind it");
	check(c, start + nr, end - start - nr, "after a conversion before it");
}

static int work(void *data)
{
	struct worker *worker = data;
	unsigned long begin, end, start, nr;
	struct chunk *c;

	while (!kthread_should_stop()) {
		c = &chunks[prandom_u32_state(&worker->rnd) % nr_chunks];
		begin = c->nr * worker->nr / threads;
		end = c->nr * (worker->nr + 1) / threads;
		pick_range(worker, end - begin, &start, &nr);
		start += begin;
		if (!convert_and_check(worker, c, start, nr,
				       !pages[c->first + start].private) &&
		    prandom_u32_state(&worker->rnd) % 4 == 0)
			fill(c, start, nr);
		check_others(worker, c, begin, end, start, nr);
		cond_resched();
	}
	return 0;
}

static int convert_all(bool private)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; i < nr_chunks; i++)
		ret = convert_and_check(&workers[0], &chunks[i], 0, chunks[i].nr, private) ?: ret;
	return ret;
}

/* Leak memory that is still private: the VMM could not access it. */
static void free_memory(void)
{
	unsigned long i;

	while (nr_chunks) {
		struct chunk *c = &chunks[--nr_chunks];

		for (i = 0; i < c->nr && !pages[c->first + i].private; i++)
			;
		if (gpa)
			memunmap(c->mem);
		else if (i == c->nr)
			free_contig_range(PHYS_PFN(c->gpa), c->nr);
	}
	kvfree(pages);
}

static void add_chunk(void *mem, phys_addr_t at, unsigned long nr)
{
	chunks[nr_chunks++] = (struct chunk) {
		.mem = mem, .gpa = at, .nr = nr, .first = nr_pages,
	};
	nr_pages += nr;
}

static int take_memory(void)
{
	unsigned long left = (unsigned long)mib * (SZ_1M / PAGE_SIZE);
	unsigned long nr = rounddown_pow_of_two((unsigned long)chunk_mib * (SZ_1M / PAGE_SIZE));
	struct page *page;
	void *mem;

	pages = kvcalloc(left, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return -ENOMEM;
	if (gpa) {
		mem = memremap(gpa, left * PAGE_SIZE, MEMREMAP_WB);
		if (!mem)
			goto no_memory;
		add_chunk(mem, gpa, left);
		return 0;
	}
	while (left) {
		if (nr < SMALLEST_CHUNK || nr_chunks == MAX_CHUNKS)
			goto no_memory;
		page = nr > left ? NULL :
		       alloc_contig_pages(nr, GFP_KERNEL | __GFP_HIGHMEM | __GFP_MOVABLE |
					  __GFP_NOWARN, first_online_node, NULL);
		if (!page) {
			nr /= 2;
			continue;
		}
		add_chunk(page_address(page), page_to_phys(page), nr);
		left -= nr;
	}
	return 0;

no_memory:
	pr_notice("error: no more memory after %lu pages in %u chunks\n", nr_pages, nr_chunks);
	free_memory();
	return -ENOMEM;
}

static void run_threads(void)
{
	unsigned int i;

	for (i = 0; i < threads; i++) {
		workers[i].nr = i;
		prandom_seed_state(&workers[i].rnd, seed + i);
		workers[i].task = kthread_run(work, &workers[i], "gmem_convert/%u", i);
		if (IS_ERR(workers[i].task)) {
			atomic_inc(&errors);
			break;
		}
	}
	msleep_interruptible(seconds * 1000);
	while (i--)
		kthread_stop(workers[i].task);
}

/* Share and free all memory, and print the result. */
static int finish(void)
{
	unsigned long conversions = 0, converted = 0, retries = 0;
	unsigned int i;

	for (i = 0; i < threads; i++) {
		conversions += workers[i].conversions;
		converted += workers[i].converted;
		retries += workers[i].retries;
	}
	convert_all(false);
	free_memory();
	pr_notice("%lu conversions of %lu MiB by %u threads in %u s, %lu retries, %d errors\n",
		  conversions, converted / (SZ_1M / PAGE_SIZE), threads, seconds, retries,
		  atomic_read(&errors));
	return atomic_read(&errors) ? -EIO : 0;
}

/*
 * "private FIRST NR EVERY": convert NR of each EVERY pages to private, starting at
 * page FIRST in the order of the chunks; "shared" likewise.  EVERY=0: only once.
 */
static int set_command(const char *text, const struct kernel_param *param)
{
	unsigned long first, nr, every, start, end, before = atomic_read(&errors);
	char verb[16];
	bool private;
	unsigned int i;

	if (seconds || !nr_chunks)
		return -EINVAL;
	if (sscanf(text, "%15s %lu %lu %lu", verb, &first, &nr, &every) != 4)
		return -EINVAL;
	private = !strcmp(verb, "private");
	if ((!private && strcmp(verb, "shared")) || !nr || first >= nr_pages)
		return -EINVAL;
	do {
		for (i = 0; i < nr_chunks; i++) {
			start = max(first, chunks[i].first);
			end = min(first + nr, chunks[i].first + chunks[i].nr);
			if (start < end)
				convert_and_check(&workers[0], &chunks[i], start - chunks[i].first,
						  end - start, private);
		}
		first += every;
		cond_resched();
	} while (every && first < nr_pages && !signal_pending(current));
	return atomic_read(&errors) == before ? 0 : -EIO;
}

static const struct kernel_param_ops command_ops = { .set = set_command };
module_param_cb(command, &command_ops, NULL, 0200);
MODULE_PARM_DESC(command, "private|shared FIRST NR EVERY");

static int __init gmem_convert_init(void)
{
	unsigned int i;
	int ret;

	if (!mib || mib % 2 || chunk_mib < 2 || !threads || threads > MAX_THREADS)
		return -EINVAL;
	ret = take_memory();
	if (ret)
		return ret;
	for (i = 0; i < nr_chunks; i++) {
		pr_notice("%lu MiB at gpa %#llx, address %#lx\n",
			  chunks[i].nr / (SZ_1M / PAGE_SIZE), chunks[i].gpa,
			  (unsigned long)chunks[i].mem);
		fill(&chunks[i], 0, chunks[i].nr);
	}
	ret = convert_all(true);
	pr_notice("%u MiB private, seed %u\n", mib, seed);
	if (!ret && !seconds)
		return 0;
	if (!ret)
		run_threads();
	return finish();
}

static void __exit gmem_convert_exit(void)
{
	if (nr_chunks)
		finish();
}

module_init(gmem_convert_init);
module_exit(gmem_convert_exit);
MODULE_DESCRIPTION("Memory that is converted between private and shared");
MODULE_LICENSE("GPL");
