/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Draw a map of a 1 GiB page of a guest_memfd file, one character for each 2 MiB, from
 * the list of folios that the test hooks of the patched kernel provide in debugfs.
 */
#ifndef DEMO_FOLIOS_H
#define DEMO_FOLIOS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NR_PARTS	512		/* of 2 MiB */
#define PART_PAGES	512
#define MAP_COLUMNS	64

#define WHOLE		'#'
#define PART		'o'
#define PIECES		':'
#define MISSING		'?'

static inline void print_legend(void)
{
	printf("  Each sign is 2 MiB of the page, as the kernel has it:\n");
	printf("    %c  part of one page of 1 GiB\n", WHOLE);
	printf("    %c  a page of 2 MiB of its own\n", PART);
	printf("    %c  512 pages of 4 KiB\n", PIECES);
}

/* Add a folio of @order at @index of the page to the map. */
static inline void draw_folio(char *map, long index, long order)
{
	if (order == 18)
		memset(map, WHOLE, NR_PARTS);
	else
		map[index / PART_PAGES] = order == 9 ? PART : order ? MISSING : PIECES;
}

/*
 * Read the folios of the 1 GiB page number @page of the file.  Return their number, or
 * -1 if there is no list.  The list has the whole file for each memslot; use the first
 * memslot only.
 */
static inline long read_folios(const char *path, long page, char *map)
{
	long first = page * NR_PARTS * PART_PAGES, index, order, nr, i, total = 0;
	int slot, first_slot = -1;
	FILE *f = fopen(path, "r");

	if (!f)
		return -1;
	memset(map, MISSING, NR_PARTS);
	while (fscanf(f, "%d %ld %ld %ld", &slot, &index, &order, &nr) == 4) {
		if (first_slot < 0)
			first_slot = slot;
		if (slot != first_slot)
			continue;
		for (i = 0; i < nr; i++, index += 1L << order) {
			if (index < first || index >= first + NR_PARTS * PART_PAGES)
				continue;
			draw_folio(map, index - first, order);
			total++;
		}
	}
	fclose(f);
	return total;
}

static inline long count(const char *map, char what)
{
	long i, nr = 0;

	for (i = 0; i < NR_PARTS; i++)
		nr += map[i] == what;
	return nr;
}

static inline void print_map(const char *map)
{
	long i;

	for (i = 0; i < NR_PARTS; i += MAP_COLUMNS)
		printf("    %.*s\n", MAP_COLUMNS, map + i);
}

#endif /* DEMO_FOLIOS_H */
