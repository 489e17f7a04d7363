/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A VM of the KVM selftest library with private memory in one guest_memfd file, and
 * counters of the kernel, for the demo and the benchmark.
 */
#ifndef DEMO_COMMON_H
#define DEMO_COMMON_H

#include <stdio.h>
#include <time.h>

#include <linux/falloc.h>
#include <linux/sizes.h>

#include "gmem_guest.h"
#include "hugetlb_util.h"
#include "kvm_util.h"
#include "test_util.h"

struct demo_vm {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int fd;
};

static inline long long now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* Create a VM with untouched memory at GMEM_GPA. */
static inline void demo_vm_create(struct demo_vm *d, size_t page_size, u64 size)
{
	d->vm = gmem_vm_create(1, &d->vcpu);
	d->fd = vm_create_guest_memfd(d->vm, size, gmem_flags(page_size));
	gmem_add_slot(d->vm, GMEM_SLOT, GMEM_GPA, size, d->fd, 0);
}

static inline void demo_vm_free(struct demo_vm *d)
{
	close(d->fd);
	kvm_vm_free(d->vm);
}

/* Read the value of a line "name value" or "name: value" of a file. */
static inline long value_of(const char *path, const char *key)
{
	size_t len = strlen(key);
	char line[256];
	long value = -1;
	FILE *f = fopen(path, "r");

	TEST_ASSERT(f, "Can't open %s", path);
	while (value < 0 && fgets(line, sizeof(line), f))
		if (!strncmp(line, key, len) && (line[len] == ' ' || line[len] == ':'))
			value = strtol(line + len + 1, NULL, 10);
	fclose(f);
	TEST_ASSERT(value >= 0, "There is no %s in %s", key, path);
	return value;
}

/* Return the number of 4 KiB pages that hold struct pages. */
static inline long memmap(void)
{
	return value_of("/proc/vmstat", "nr_memmap_pages") +
	       value_of("/proc/vmstat", "nr_memmap_boot_pages");
}

#endif /* DEMO_COMMON_H */
