// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hooks for selftests, to reach code that userspace cannot
 *
 * Only VMs that need hardware support use kvm_gmem_populate().  Make it
 * available to tests of other VMs, through a file in the VM's debugfs
 * directory.
 *
 * Other files in the directory compare the folios of a guest_memfd file with
 * its attributes, list the folios, and check the mapping level outside of
 * faults.
 */
#include <linux/debugfs.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/kvm_host.h>
#include <linux/magic.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/sprintf.h>
#include <linux/uaccess.h>

#include "guest_memfd.h"
#include "mmu/mmu_internal.h"
#include "x86.h"

static int kvm_gmem_test_open(struct inode *inode, struct file *file)
{
	struct kvm *kvm = inode->i_private;

	/* Keep the VM until the file is closed, as other files of the VM do. */
	if (!kvm_get_kvm_safe(kvm))
		return -ENOENT;

	file->private_data = kvm;
	return 0;
}

static int kvm_gmem_test_release(struct inode *inode, struct file *file)
{
	kvm_put_kvm(file->private_data);
	return 0;
}

/* Like firmware, write the page if there is a source, else keep it. */
static int kvm_gmem_test_post_populate(struct kvm *kvm, gfn_t gfn, kvm_pfn_t pfn,
				       struct page *src_page, void *opaque)
{
	if (src_page)
		copy_highpage(pfn_to_page(pfn), src_page);

	return 0;
}

/* Input: "<gfn> <number of pages> <address of the source or 0>". */
static ssize_t kvm_gmem_test_populate(struct file *file, const char __user *buf,
				      size_t count, loff_t *ppos)
{
	struct kvm *kvm = file->private_data;
	unsigned long long gfn;
	unsigned long src;
	char cmd[64] = {};
	long npages, r;

	/* For other VM types, hardware has to know which memory is private. */
	if (kvm->arch.vm_type != KVM_X86_SW_PROTECTED_VM)
		return -EOPNOTSUPP;

	if (count >= sizeof(cmd))
		return -EINVAL;
	if (copy_from_user(cmd, buf, count))
		return -EFAULT;
	if (sscanf(cmd, "%lli %li %li", &gfn, &npages, &src) != 3)
		return -EINVAL;
	if (npages <= 0 || !PAGE_ALIGNED(src))
		return -EINVAL;

	guard(mutex)(&kvm->slots_lock);

	r = kvm_gmem_populate(kvm, gfn, (void __user *)src, npages, false,
			      kvm_gmem_test_post_populate, NULL);
	if (r < 0)
		return r;

	return r == npages ? count : -EIO;
}

static const struct file_operations kvm_gmem_test_populate_fops = {
	.owner		= THIS_MODULE,
	.open		= kvm_gmem_test_open,
	.release	= kvm_gmem_test_release,
	.write		= kvm_gmem_test_populate,
};

/* @range is the range of attributes that includes @index. */
static bool kvm_gmem_test_is_private(const struct gmem_attributes_range *range,
				     pgoff_t index, unsigned int order)
{
	pgoff_t first = round_down(index, 1UL << order);

	return range->attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE &&
	       range->first <= first && range->last >= first + (1UL << order) - 1;
}

/* Return the expected order of the folio at @index in a file of @order. */
static unsigned int kvm_gmem_test_order(struct inode *inode, pgoff_t index,
					unsigned int order,
					struct gmem_attributes_range *range)
{
	/* Most ranges cover many pages: look up each range once. */
	if (index < range->first || index > range->last)
		*range = kvm_gmem_attributes_get(&GMEM_I(inode)->attributes, index);

	if (!GMEM_I(inode)->allocator.may_be_large)
		return GMEM_I(inode)->allocator.is_mappable ?
		       min_t(unsigned int, order, PMD_ORDER) : order;

	if (kvm_gmem_test_is_private(range, index, order))
		return order;

	if (order > PMD_ORDER && kvm_gmem_test_is_private(range, index, PMD_ORDER))
		return PMD_ORDER;

	return 0;
}

#ifdef CONFIG_HUGETLB_PAGE_OPTIMIZE_VMEMMAP
/* Check that the vmemmap of a folio has the shared tail pages of its order. */
static bool kvm_gmem_test_is_optimized(struct page *page, unsigned int order)
{
	struct page *tail = page_zone(page)->vmemmap_tails[order - VMEMMAP_TAIL_MIN_ORDER];
	unsigned long addr = (unsigned long)page + PAGE_SIZE;
	unsigned int level;
	pte_t *pte;

	for (; addr < (unsigned long)(page + (1UL << order)); addr += PAGE_SIZE) {
		pte = lookup_address(addr, &level);
		if (!pte || level != PG_LEVEL_4K || pte_write(*pte) ||
		    pte_page(*pte) != tail)
			return false;
	}

	return true;
}

/*
 * Check that the vmemmap of a folio is writable, so not shared.  If its struct
 * page is not the first in a vmemmap page, an earlier check covers that page.
 */
static bool kvm_gmem_test_is_writable(struct page *page, unsigned int order)
{
	unsigned long addr = (unsigned long)page;
	unsigned int level;
	pte_t *pte;

	if (!order && !PAGE_ALIGNED(addr))
		return true;

	for (; addr < (unsigned long)(page + (1UL << order)); addr += PAGE_SIZE) {
		pte = lookup_address(addr, &level);
		if (!pte || !pte_write(*pte))
			return false;
	}

	return true;
}
#else
static bool kvm_gmem_test_is_optimized(struct page *page, unsigned int order)
{
	return false;
}

static bool kvm_gmem_test_is_writable(struct page *page, unsigned int order)
{
	return true;
}
#endif

static const char *kvm_gmem_test_folio(struct inode *inode, struct folio *folio,
				       pgoff_t index, unsigned int order, bool optimized)
{
	unsigned int file_order = GMEM_I(inode)->allocator.order;
	bool is_mappable = GMEM_I(inode)->allocator.is_mappable;

	if (folio_order(folio) != order)
		return "wrong order";
	if (folio->index != index)
		return "wrong index";
	if (folio->mapping != inode->i_mapping)
		return "wrong mapping";
	if (folio_ref_count(folio) < folio_nr_pages(folio))
		return "references missing";
	if (!folio_test_uptodate(folio) && file_order)
		return "not up to date";
	if (folio_test_hugetlb(folio) != (order && order == file_order && !is_mappable))
		return "wrong type";
	if (folio_test_hugetlb_piece(folio) != (order && order != file_order && !is_mappable))
		return order ? "wrong type of a part" : "type of one that has left the file";
	if (folio_test_lru(folio) && file_order)
		return "on the LRU";
	if ((!order || is_mappable) && !kvm_gmem_test_is_writable(&folio->page, order))
		return "no struct pages of its own";
	if (order && !is_mappable &&
	    optimized != kvm_gmem_test_is_optimized(&folio->page, order))
		return optimized ? "not optimized" : "optimized";
	return NULL;
}

/* Check the folios of the page of the file that begins at @first. */
static int kvm_gmem_test_check_page(struct inode *inode, pgoff_t first, bool optimized)
{
	unsigned int file_order = GMEM_I(inode)->allocator.order;
	pgoff_t index, end = first + (1UL << file_order);
	struct gmem_attributes_range range = { .first = 1, .last = 0 };
	struct folio *folio, *head = NULL;
	unsigned int order;
	const char *what;

	for (index = first; index < end; index += 1UL << order) {
		order = kvm_gmem_test_order(inode, index, file_order, &range);
		folio = xa_load(&inode->i_mapping->i_pages, index);
		if (index == first)
			head = folio;
		if (!head)
			return xa_find(&inode->i_mapping->i_pages, &index, end - 1,
				       XA_PRESENT) ? -EUCLEAN : 0;

		if (!folio || xa_is_value(folio))
			what = "missing";
		else if (folio_pfn(folio) != folio_pfn(head) + index - first)
			what = "not contiguous";
		else
			what = kvm_gmem_test_folio(inode, folio, index, order, optimized);
		if (what) {
			pr_err("gmem_check: folio at index 0x%lx, order %u of %u: %s\n",
			       index, order, file_order, what);
			return -EUCLEAN;
		}
	}

	return 0;
}

/* Input: "<fd> <1 if huge pages are optimized, else 0>". */
static ssize_t kvm_gmem_test_check(struct file *file, const char __user *buf,
				   size_t count, loff_t *ppos)
{
	struct gmem_ranges *gr;
	struct inode *inode;
	unsigned int fd, hvo;
	char cmd[64] = {};
	pgoff_t index, nr_pages;
	ssize_t r = count;

	if (count >= sizeof(cmd))
		return -EINVAL;
	if (copy_from_user(cmd, buf, count))
		return -EFAULT;
	if (sscanf(cmd, "%u %u", &fd, &hvo) != 2)
		return -EINVAL;

	CLASS(fd, f)(fd);
	if (fd_empty(f))
		return -EBADF;

	inode = file_inode(fd_file(f));
	if (inode->i_sb->s_magic != GUEST_MEMFD_MAGIC)
		return -EINVAL;

	gr = &GMEM_I(inode)->ranges;
	guard(mutex)(&gr->change_lock);

	nr_pages = i_size_read(inode) >> PAGE_SHIFT;
	if (kvm_gmem_range_begin_change(gr, 0, nr_pages))
		return -EINTR;
	for (index = 0; index < nr_pages && r > 0;
	     index += 1UL << GMEM_I(inode)->allocator.order) {
		if (kvm_gmem_test_check_page(inode, index, hvo))
			r = -EUCLEAN;
		cond_resched();
	}
	kvm_gmem_range_end_change(gr);

	return r;
}

static const struct file_operations kvm_gmem_test_check_fops = {
	.owner		= THIS_MODULE,
	.open		= kvm_gmem_test_open,
	.release	= kvm_gmem_test_release,
	.write		= kvm_gmem_test_check,
};

/* Input: "<gfn> <expected maximum mapping level outside of faults>". */
static ssize_t kvm_gmem_test_level(struct file *file, const char __user *buf,
				   size_t count, loff_t *ppos)
{
	struct kvm *kvm = file->private_data;
	struct kvm_memory_slot *slot;
	unsigned int level;
	char cmd[64] = {};
	u64 gfn;

	if (count >= sizeof(cmd))
		return -EINVAL;
	if (copy_from_user(cmd, buf, count))
		return -EFAULT;
	if (sscanf(cmd, "%llu %u", &gfn, &level) != 2)
		return -EINVAL;

	guard(mutex)(&kvm->slots_lock);

	slot = gfn_to_memslot(kvm, gfn);
	if (!slot)
		return -ENOENT;

	scoped_guard(write_lock, &kvm->mmu_lock)
		return kvm_mmu_max_mapping_level(kvm, NULL, slot, gfn) == level ?
		       count : -EUCLEAN;
}

static const struct file_operations kvm_gmem_test_level_fops = {
	.owner		= THIS_MODULE,
	.open		= kvm_gmem_test_open,
	.release	= kvm_gmem_test_release,
	.write		= kvm_gmem_test_level,
};

static void kvm_gmem_test_print_run(struct seq_file *m, int id, pgoff_t first,
				    pgoff_t end, unsigned int order)
{
	if (end > first)
		seq_printf(m, "%d %lu %u %lu\n", id, first, order, (end - first) >> order);
}

/*
 * Print runs of folios of one order.  Folios allocated meanwhile may be
 * missing.
 */
static void kvm_gmem_test_print_file(struct seq_file *m, int id,
				     struct address_space *mapping)
{
	unsigned int order, run_order = 0;
	pgoff_t first = 0, end = 0, index;
	struct folio *folio;

	mutex_lock(&GMEM_I(mapping->host)->ranges.change_lock);
	xa_for_each(&mapping->i_pages, index, folio) {
		if (xa_is_value(folio))
			continue;
		order = folio_order(folio);
		if (index != end || order != run_order) {
			kvm_gmem_test_print_run(m, id, first, end, run_order);
			first = index;
			run_order = order;
		}
		end = index + (1UL << order);
		cond_resched();
	}
	kvm_gmem_test_print_run(m, id, first, end, run_order);
	mutex_unlock(&GMEM_I(mapping->host)->ranges.change_lock);
}

/* Output: "<slot> <index of the first folio> <order> <number of folios>". */
static int kvm_gmem_test_folios_show(struct seq_file *m, void *v)
{
	struct kvm *kvm = m->private;
	struct kvm_memory_slot *slot;
	struct file *file;
	int bkt;

	guard(mutex)(&kvm->slots_lock);

	kvm_for_each_memslot(slot, bkt, kvm_memslots(kvm)) {
		file = kvm_slot_has_gmem(slot) ? get_file_active(&slot->gmem.file) : NULL;
		if (!file)
			continue;
		kvm_gmem_test_print_file(m, slot->id, file->f_mapping);
		fput(file);
	}

	return 0;
}

static int kvm_gmem_test_folios_open(struct inode *inode, struct file *file)
{
	struct kvm *kvm = inode->i_private;
	int r;

	if (!kvm_get_kvm_safe(kvm))
		return -ENOENT;

	r = single_open(file, kvm_gmem_test_folios_show, kvm);
	if (r)
		kvm_put_kvm(kvm);

	return r;
}

static int kvm_gmem_test_folios_release(struct inode *inode, struct file *file)
{
	kvm_put_kvm(inode->i_private);
	return single_release(inode, file);
}

static const struct file_operations kvm_gmem_test_folios_fops = {
	.owner		= THIS_MODULE,
	.open		= kvm_gmem_test_folios_open,
	.read		= seq_read,
	.llseek		= seq_lseek,
	.release	= kvm_gmem_test_folios_release,
};

/* Fail when fault injection says so, as a hook that needs memory does. */
int kvm_gmem_test_prepare_split(void)
{
	void *p = kmalloc(SZ_64, GFP_KERNEL_ACCOUNT);

	if (!p)
		return -ENOMEM;

	kfree(p);
	return 0;
}

void kvm_gmem_test_create_debugfs(struct kvm *kvm)
{
	debugfs_create_file("gmem_populate", 0200, kvm->debugfs_dentry, kvm,
			    &kvm_gmem_test_populate_fops);
	debugfs_create_file("gmem_check", 0200, kvm->debugfs_dentry, kvm,
			    &kvm_gmem_test_check_fops);
	debugfs_create_file("gmem_level", 0200, kvm->debugfs_dentry, kvm,
			    &kvm_gmem_test_level_fops);
	debugfs_create_file("gmem_folios", 0400, kvm->debugfs_dentry, kvm,
			    &kvm_gmem_test_folios_fops);
}
