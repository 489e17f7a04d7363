/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_GMEM_MERGE_H__
#define __KVM_GMEM_MERGE_H__

#include <linux/types.h>
#include <linux/workqueue.h>

struct gmem_inode;

/**
 * struct gmem_merge - huge pages of a file that may be merged
 * @work: merges them
 * @due: one bit per huge page that is to be merged by the next run of @work
 * @later: one bit per huge page that is to be merged by a run after that
 * @nr_pages: number of huge pages in the file; 0 if none is ever split
 * @retry_end: end of the huge pages that failed to merge together in this run
 *
 * The file's change_lock protects the bits.
 */
struct gmem_merge {
	struct delayed_work work;
	unsigned long *due;
	unsigned long *later;
	unsigned long nr_pages;
	unsigned long retry_end;
};

int kvm_gmem_merge_init(struct gmem_inode *gi);
void kvm_gmem_merge_stop(struct gmem_inode *gi);
void kvm_gmem_merge_destroy(struct gmem_inode *gi);
void kvm_gmem_merge_range(struct gmem_inode *gi, pgoff_t start, pgoff_t end);

#endif /* __KVM_GMEM_MERGE_H__ */
