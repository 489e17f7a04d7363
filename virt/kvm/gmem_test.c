// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hooks by which selftests reach what userspace cannot
 *
 * kvm_gmem_populate() is called for VMs that need hardware support only.  Offer
 * it to tests of other VMs through a file in the VM's debugfs directory.
 */
#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/kvm_host.h>
#include <linux/sprintf.h>
#include <linux/uaccess.h>

#include "guest_memfd.h"

static int kvm_gmem_test_open(struct inode *inode, struct file *file)
{
	struct kvm *kvm = inode->i_private;

	/* As other files there, this one may be open longer than the VM lives. */
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

/* As firmware does it: write the page if there is a source, or leave it. */
static int kvm_gmem_test_post_populate(struct kvm *kvm, gfn_t gfn, kvm_pfn_t pfn,
				       struct page *src_page, void *opaque)
{
	if (src_page)
		copy_highpage(pfn_to_page(pfn), src_page);

	return 0;
}

/* Takes "<gfn> <number of pages> <address of the source or 0>". */
static ssize_t kvm_gmem_test_populate(struct file *file, const char __user *buf,
				      size_t count, loff_t *ppos)
{
	struct kvm *kvm = file->private_data;
	unsigned long long gfn;
	unsigned long src;
	char cmd[64] = {};
	long npages, r;

	/* Others have hardware that must know which memory is private. */
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

void kvm_gmem_test_create_debugfs(struct kvm *kvm)
{
	debugfs_create_file("gmem_populate", 0200, kvm->debugfs_dentry, kvm,
			    &kvm_gmem_test_populate_fops);
}
