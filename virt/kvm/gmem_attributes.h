/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_GMEM_ATTRIBUTES_H__
#define __KVM_GMEM_ATTRIBUTES_H__

#include <linux/maple_tree.h>
#include <linux/types.h>

struct rw_semaphore;

/**
 * struct gmem_attributes - the attributes of every page of a guest_memfd file
 * @tree: ranges of indices to attributes; no two neighbors have the same, and
 *	  together they cover the file
 * @nr_pages: size of the file
 */
struct gmem_attributes {
	struct maple_tree tree;
	pgoff_t nr_pages;
};

/**
 * struct gmem_attributes_range - pages in a row that have the same attributes
 * @first: index of the first page
 * @last: index of the last page
 * @attributes: KVM_MEMORY_ATTRIBUTE_*
 */
struct gmem_attributes_range {
	pgoff_t first;
	pgoff_t last;
	u64 attributes;
};

/**
 * struct gmem_attributes_change - a change that cannot fail any more
 * @mas: where it goes, and the memory for it
 * @attributes: what is stored
 */
struct gmem_attributes_change {
	struct ma_state mas;
	u64 attributes;
};

int gmem_attributes_init(struct gmem_attributes *ga, struct rw_semaphore *lock,
			 pgoff_t nr_pages, u64 attributes);
void gmem_attributes_destroy(struct gmem_attributes *ga);

struct gmem_attributes_range gmem_attributes_get(struct gmem_attributes *ga,
						 pgoff_t index);
bool gmem_attributes_are(struct gmem_attributes *ga, pgoff_t start, pgoff_t end,
			 u64 attributes);

int gmem_attributes_prepare(struct gmem_attributes *ga,
			    struct gmem_attributes_change *change,
			    pgoff_t start, pgoff_t end, u64 attributes, gfp_t gfp);
void gmem_attributes_commit(struct gmem_attributes_change *change);
void gmem_attributes_abort(struct gmem_attributes_change *change);

#endif /* __KVM_GMEM_ATTRIBUTES_H__ */
