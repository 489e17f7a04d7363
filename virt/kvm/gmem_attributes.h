/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_GMEM_ATTRIBUTES_H__
#define __KVM_GMEM_ATTRIBUTES_H__

#include <linux/maple_tree.h>
#include <linux/types.h>

struct mutex;

/**
 * struct gmem_attributes - attributes of all pages of a guest_memfd file
 * @tree: attributes by range of indices; the ranges cover the file, and
 *	  adjacent ranges differ
 * @nr_pages: size of the file
 */
struct gmem_attributes {
	struct maple_tree tree;
	pgoff_t nr_pages;
};

/**
 * struct gmem_attributes_range - consecutive pages with the same attributes
 * @first: index of the first page
 * @last: index of the last page
 * @attributes: KVM_MEMORY_ATTRIBUTE_*
 */
struct gmem_attributes_range {
	pgoff_t first;
	pgoff_t last;
	u64 attributes;
};

int kvm_gmem_attributes_init(struct gmem_attributes *ga, struct mutex *lock,
			     pgoff_t nr_pages, u64 attributes);
void kvm_gmem_attributes_destroy(struct gmem_attributes *ga);

struct gmem_attributes_range kvm_gmem_attributes_get(struct gmem_attributes *ga,
						     pgoff_t index);
bool kvm_gmem_attributes_are(struct gmem_attributes *ga, pgoff_t start, pgoff_t end,
			     u64 attributes);

int kvm_gmem_attributes_prepare(struct gmem_attributes *ga, struct ma_state *mas,
				pgoff_t start, pgoff_t end, u64 attributes, gfp_t gfp);
void kvm_gmem_attributes_commit(struct ma_state *mas, u64 attributes);
void kvm_gmem_attributes_abort(struct ma_state *mas);

#endif /* __KVM_GMEM_ATTRIBUTES_H__ */
