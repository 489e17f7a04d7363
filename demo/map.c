// SPDX-License-Identifier: GPL-2.0
/*
 * usage: map PAGE [WANTED] | map legend
 *
 * Draw the 1 GiB page number PAGE of the only guest_memfd file.  Exit with 1 if it is
 * not WANTED: "whole", or the number of parts of 2 MiB that are split.
 */
#include <glob.h>

#include "folios.h"

static int find(char *path, size_t size)
{
	glob_t found;
	int ret = glob("/sys/kernel/debug/kvm/*/gmem_folios", 0, NULL, &found);

	if (!ret)
		snprintf(path, size, "%s", found.gl_pathv[0]);
	globfree(&found);
	return ret;
}

int main(int argc, char *argv[])
{
	char map[NR_PARTS], path[256];
	long nr;

	if (argc < 2 || argc > 3) {
		fprintf(stderr, "usage: map PAGE [WANTED] | map legend\n");
		return 2;
	}
	if (!strcmp(argv[1], "legend")) {
		print_legend();
		return 0;
	}
	if (find(path, sizeof(path))) {
		fprintf(stderr, "map: there is no guest_memfd file, or the kernel has no test hooks\n");
		return 1;
	}
	nr = read_folios(path, atol(argv[1]), map);
	if (nr < 0) {
		perror(path);
		return 1;
	}
	print_map(map);
	printf("    %ld pages: %ld parts are in pieces of 4 KiB, %ld in one\n", nr,
	       count(map, PIECES), NR_PARTS - count(map, PIECES) - count(map, MISSING));
	if (argc < 3)
		return 0;
	if (!strcmp(argv[2], "whole"))
		return nr != 1 || count(map, WHOLE) != NR_PARTS;
	return count(map, PIECES) != atol(argv[2]);
}
