/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _MM_GUESTMEM_FOLIOS_H
#define _MM_GUESTMEM_FOLIOS_H

#include <linux/guestmem.h>
#include <linux/mm_types.h>
#include <linux/swap.h>

int guestmem_folios_add(struct guestmem_allocator *gm, struct folio *folio,
			pgoff_t index);
void guestmem_folios_remove(struct guestmem_allocator *gm, pgoff_t index,
			    enum lru_cache_drained *drained, struct list_head *list);
bool guestmem_folios_is_whole(struct guestmem_allocator *gm, pgoff_t index);
unsigned int guestmem_folios_max_order(struct guestmem_allocator *gm,
				       struct folio *folio);
int guestmem_folios_prepare(struct guestmem_allocator *gm, struct guestmem_change *c);
void guestmem_folios_commit(struct guestmem_allocator *gm, struct guestmem_change *c);
void guestmem_folios_abort(struct guestmem_allocator *gm, struct guestmem_change *c);

#endif /* _MM_GUESTMEM_FOLIOS_H */
