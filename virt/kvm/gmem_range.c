// SPDX-License-Identifier: GPL-2.0-only
/*
 * Ranges of guest_memfd files that change
 */

/**
 * DOC: changes of guest_memfd ranges
 *
 * Converting, freeing and populating memory is a change of a range.  A range
 * consists of whole pages of the file, i.e. of huge pages in a file of HugeTLB
 * pages.  Changes of one file take turns.  A change of much memory takes long,
 * and must disturb users of its own range only: faults of vCPUs and of the
 * host, and allocation by fallocate().
 *
 * A user of a page locks it shared and then checks whether it is in the range
 * that changes.  If it is, the user drops the lock, waits for the end of the
 * change, and starts over.  The wait ends early if there is a signal.
 *
 * A change marks its range, and then locks the pages exclusively, for a moment,
 * to wait for users that had the lock before.  From then on no user gets a page
 * of the range until the mark is gone.  A fault of the host keeps its folio
 * locked until it has mapped the page, see gmem_convert.c.
 *
 * The locks are hashed by index.  Pages in different locks share no cache line,
 * so that vCPUs do not contend for one.  A user of another page with the same
 * lock is delayed for the moment above, which is long only if a user is zeroing
 * a huge page.
 */
#include <linux/atomic.h>
#include <linux/cache.h>
#include <linux/delay.h>
#include <linux/hash.h>
#include <linux/lockdep.h>
#include <linux/sched/signal.h>
#include <linux/wait.h>

#include "gmem_range.h"

/* Consecutive base pages share a lock, so that a range has few locks. */
#define GMEM_RANGE_LOCK_ORDER	9

/* Time that users have between two changes. */
#define GMEM_RANGE_PAUSE_US	100

#define GMEM_WAITERS_BITS	6

/**
 * struct gmem_waiters - tasks that wait for the end of a change
 * @queue: the tasks
 * @seq: number of changes that have ended
 *
 * Files share them by hash.  A waiting vCPU thus needs no reference to the
 * file, which would delay a close().
 */
struct gmem_waiters {
	wait_queue_head_t queue;
	atomic_t seq;
} ____cacheline_aligned_in_smp;

static struct gmem_waiters kvm_gmem_waiters[1 << GMEM_WAITERS_BITS];

static struct gmem_waiters *kvm_gmem_range_waiters(struct gmem_ranges *gr)
{
	return &kvm_gmem_waiters[hash_ptr(gr, GMEM_WAITERS_BITS)];
}

void kvm_gmem_range_init_waiters(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(kvm_gmem_waiters); i++)
		init_waitqueue_head(&kvm_gmem_waiters[i].queue);
}

void kvm_gmem_range_init(struct gmem_ranges *gr, unsigned int order)
{
	int i;

	mutex_init(&gr->change_lock);
	gr->order = order;
	gr->start = 0;
	gr->end = 0;
	gr->awaited = false;
	for (i = 0; i < GMEM_NR_RANGE_LOCKS; i++)
		init_rwsem(&gr->locks[i].rwsem);
}

static unsigned int kvm_gmem_range_lock_order(struct gmem_ranges *gr)
{
	return max(gr->order, GMEM_RANGE_LOCK_ORDER);
}

static struct rw_semaphore *kvm_gmem_range_rwsem(struct gmem_ranges *gr, pgoff_t index)
{
	unsigned int i = (index >> kvm_gmem_range_lock_order(gr)) % GMEM_NR_RANGE_LOCKS;

	return &gr->locks[i].rwsem;
}

/* Wait for users that locked a page before the range was marked. */
static int kvm_gmem_range_drain(struct gmem_ranges *gr)
{
	pgoff_t index, size = 1UL << kvm_gmem_range_lock_order(gr);
	unsigned int i;

	index = round_down(gr->start, size);
	for (i = 0; i < GMEM_NR_RANGE_LOCKS && index < gr->end; i++, index += size) {
		if (down_write_killable(kvm_gmem_range_rwsem(gr, index)))
			return -EINTR;
		up_write(kvm_gmem_range_rwsem(gr, index));
	}

	return 0;
}

/*
 * Begin to change the pages of the file in [@start, @end).  On success no other
 * task can lock them until kvm_gmem_range_end_change().  Return -EINTR if the
 * task is being killed.
 */
int kvm_gmem_range_begin_change(struct gmem_ranges *gr, pgoff_t start, pgoff_t end)
{
	int r;

	lockdep_assert_held(&gr->change_lock);

	/* A task that makes many changes must not starve users. */
	if (READ_ONCE(gr->awaited)) {
		usleep_range(GMEM_RANGE_PAUSE_US / 2, GMEM_RANGE_PAUSE_US);
		WRITE_ONCE(gr->awaited, false);
	}

	/* A user that sees the start also sees what changed last. */
	smp_store_release(&gr->start, round_down(start, 1UL << gr->order));
	/* A user that sees the end also sees the start. */
	smp_store_release(&gr->end, round_up(end, 1UL << gr->order));

	r = kvm_gmem_range_drain(gr);
	if (r)
		kvm_gmem_range_end_change(gr);
	return r;
}

void kvm_gmem_range_end_change(struct gmem_ranges *gr)
{
	struct gmem_waiters *waiters = kvm_gmem_range_waiters(gr);

	lockdep_assert_held(&gr->change_lock);

	/* A user that sees the end of a change also sees its effects. */
	smp_store_release(&gr->end, 0);
	/*
	 * A user that sees the new number also sees that there is no change.
	 * One that does not see it before it sleeps has set @awaited: pairs
	 * with the barrier in prepare_to_wait().
	 */
	atomic_inc_return(&waiters->seq);
	if (READ_ONCE(gr->awaited))
		wake_up_all(&waiters->queue);
}

/*
 * Check for a change of the page at @index.  Without the lock the result can be
 * outdated.
 */
bool kvm_gmem_range_is_changing(struct gmem_ranges *gr, pgoff_t index)
{
	/*
	 * Pairs with the releases at the beginning and at the end of a change.
	 * A user can see the end of one change and the start of the next.
	 */
	return index < smp_load_acquire(&gr->end) && index >= smp_load_acquire(&gr->start);
}

/* Lock the page at @index shared unless that has to wait. */
bool kvm_gmem_range_trylock(struct gmem_ranges *gr, pgoff_t index)
{
	if (!down_read_trylock(kvm_gmem_range_rwsem(gr, index)))
		return false;

	if (!kvm_gmem_range_is_changing(gr, index))
		return true;

	up_read(kvm_gmem_range_rwsem(gr, index));
	return false;
}

/*
 * Lock the page at @index shared.  Return -EAGAIN if the page is changing, with
 * @wait set for kvm_gmem_range_wait(), or -EINTR if there is a signal that ends
 * a sleep in @state.
 */
int kvm_gmem_range_lock(struct gmem_ranges *gr, pgoff_t index, unsigned int state,
			struct gmem_wait *wait)
{
	struct rw_semaphore *rwsem = kvm_gmem_range_rwsem(gr, index);
	int r;

	wait->waiters = kvm_gmem_range_waiters(gr);
	wait->seq = atomic_read_acquire(&wait->waiters->seq);

	/* Do not wait for a lock that the change is waiting for. */
	if (kvm_gmem_range_is_changing(gr, index))
		goto changing;

	r = state == TASK_INTERRUPTIBLE ? down_read_interruptible(rwsem) :
					  down_read_killable(rwsem);
	if (r)
		return r;

	if (!kvm_gmem_range_is_changing(gr, index))
		return 0;

	up_read(rwsem);
changing:
	WRITE_ONCE(gr->awaited, true);
	return -EAGAIN;
}

/* Return the index after the last page with the same lock as @index. */
pgoff_t kvm_gmem_range_lock_end(struct gmem_ranges *gr, pgoff_t index)
{
	pgoff_t size = 1UL << kvm_gmem_range_lock_order(gr);

	return round_down(index, size) + size;
}

/* Check whether a change waits for the lock of the page at @index. */
bool kvm_gmem_range_is_contended(struct gmem_ranges *gr, pgoff_t index)
{
	return rwsem_is_contended(kvm_gmem_range_rwsem(gr, index));
}

void kvm_gmem_range_unlock(struct gmem_ranges *gr, pgoff_t index)
{
	up_read(kvm_gmem_range_rwsem(gr, index));
}

void kvm_gmem_range_assert_locked(struct gmem_ranges *gr, pgoff_t index)
{
	lockdep_assert_held_read(kvm_gmem_range_rwsem(gr, index));
}

/*
 * Wait until a change has ended: the one that kvm_gmem_range_lock() met, or one
 * of a file that shares the wait queue.  Return -EINTR if there is a signal
 * that ends a sleep in @state.
 */
int kvm_gmem_range_wait(const struct gmem_wait *wait, unsigned int state)
{
	struct gmem_waiters *waiters = wait->waiters;

	return wait_event_state(waiters->queue,
				atomic_read(&waiters->seq) != wait->seq, state) ? -EINTR : 0;
}
