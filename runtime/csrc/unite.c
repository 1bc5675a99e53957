/* The union of sorted sets of positions, each element with the sets that it is in. */
#include "kernels.h"

enum { MAX_RUNS = 64 };

static const uint64_t AT_END = UINT64_MAX; /* beyond every position */

/* The next position of a run, AT_END after the last, or the same again where the run does not ascend. */
static uint64_t following(const pe_sorted *run, size_t *at) {
    const uint32_t before = run->positions[(*at)++];
    if (*at == run->n) return AT_END;
    return run->positions[*at] > before ? run->positions[*at] : before;
}

int64_t pe_unite(const pe_sorted *runs, size_t n_runs, uint32_t *positions, uint64_t *sets) {
    uint64_t heads[MAX_RUNS], previous = AT_END;
    size_t at[MAX_RUNS] = {0};
    int64_t n = 0;
    if (n_runs > MAX_RUNS) return -1;
    for (size_t r = 0; r < n_runs; r++) heads[r] = runs[r].n ? runs[r].positions[0] : AT_END;
    for (;;) {
        uint64_t least = AT_END, set = 0;
        for (size_t r = 0; r < n_runs; r++) least = heads[r] < least ? heads[r] : least;
        if (least == AT_END) return n;
        if (least == previous) return -1;
        for (size_t r = 0; r < n_runs; r++) {
            if (heads[r] != least) continue;
            set |= runs[r].set;
            heads[r] = following(&runs[r], &at[r]);
        }
        previous = least;
        positions[n] = (uint32_t)least;
        sets[n++] = set;
    }
}
