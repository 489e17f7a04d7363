/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _MM_GUESTMEM_PLACEHOLDER_H
#define _MM_GUESTMEM_PLACEHOLDER_H

#include <linux/fs.h>
#include <linux/types.h>
#include <linux/xarray.h>

bool guestmem_is_placeholder(struct address_space *mapping, pgoff_t index);
void guestmem_xas_store(struct xa_state *xas, void *entry);
void guestmem_store(struct address_space *mapping, pgoff_t index, unsigned int order,
		    void *entry);
void guestmem_insert(struct address_space *mapping, pgoff_t index, struct folio *folio);
int guestmem_prepare_store(struct address_space *mapping, pgoff_t index,
			   unsigned int order, struct xa_state *store);
int guestmem_add_placeholder(struct address_space *mapping, pgoff_t index,
			     unsigned int order);
void guestmem_del_entry(struct address_space *mapping, pgoff_t index, unsigned int order);
int guestmem_split_placeholder(struct address_space *mapping, pgoff_t index,
			       unsigned int order, unsigned int new_order);

#endif /* _MM_GUESTMEM_PLACEHOLDER_H */
