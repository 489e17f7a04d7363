/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM guestmem

#if !defined(_TRACE_GUESTMEM_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_GUESTMEM_H

#include <linux/fs.h>
#include <linux/tracepoint.h>

/* Folios of @old_order become folios of @new_order.  @index counts base pages. */
DECLARE_EVENT_CLASS(guestmem_folios,
		    TP_PROTO(struct inode *inode, pgoff_t index, unsigned int old_order,
			     unsigned int new_order),
		    TP_ARGS(inode, index, old_order, new_order),
		    TP_STRUCT__entry(__field(u64, ino)
				     __field(unsigned long, index)
				     __field(unsigned int, old_order)
				     __field(unsigned int, new_order)),
		    TP_fast_assign(__entry->ino = inode->i_ino;
				   __entry->index = index;
				   __entry->old_order = old_order;
				   __entry->new_order = new_order;),
		    TP_printk("ino %llu index 0x%lx nr 0x%lx order %u to %u",
			      __entry->ino, __entry->index,
			      1UL << max(__entry->old_order, __entry->new_order),
			      __entry->old_order, __entry->new_order)
);

DEFINE_EVENT(guestmem_folios, guestmem_split,
	     TP_PROTO(struct inode *inode, pgoff_t index, unsigned int old_order,
		      unsigned int new_order),
	     TP_ARGS(inode, index, old_order, new_order)
);

/* The old order of a merged folio is that of the largest folios it can consist of. */
DEFINE_EVENT(guestmem_folios, guestmem_merge,
	     TP_PROTO(struct inode *inode, pgoff_t index, unsigned int old_order,
		      unsigned int new_order),
	     TP_ARGS(inode, index, old_order, new_order)
);

#endif /* _TRACE_GUESTMEM_H */

#include <trace/define_trace.h>
