/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _MM_GUESTMEM_SPLIT_H
#define _MM_GUESTMEM_SPLIT_H

#include <linux/guestmem.h>
#include <linux/mm_types.h>
#include <linux/swap.h>

bool guestmem_split_is_whole(struct guestmem_allocator *gm, pgoff_t index);
int guestmem_split_add(struct guestmem_allocator *gm, struct folio *folio, pgoff_t index);
void guestmem_split_remove(struct guestmem_allocator *gm, pgoff_t index,
			   enum lru_cache_drained *drained, struct list_head *list);
unsigned int guestmem_split_max_order(struct guestmem_allocator *gm, struct folio *folio);
int guestmem_split_prepare_split(struct guestmem_allocator *gm, struct guestmem_change *c,
				 pgoff_t start, pgoff_t end);
int guestmem_split_prepare_merge(struct guestmem_allocator *gm, struct guestmem_change *c,
				 pgoff_t start, pgoff_t end);
void guestmem_split_commit(struct guestmem_allocator *gm, struct guestmem_change *c);

#endif /* _MM_GUESTMEM_SPLIT_H */
