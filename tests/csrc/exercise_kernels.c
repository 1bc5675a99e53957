/* Drives the editing core without Python, for sanitizers: every layout, random and extreme units, switches there and back.
 *
 *   exercise_kernels FILE SEED [PLANT]   FILE: int32 words: how many layouts, then for each its number of words and the words
 *
 * Tensors are allocated to the byte, so that one step outside is seen. Exit code 0: every byte came back.
 * PLANT makes an error on purpose, to show that it is found: "address" edits one unit past a tensor, "undefined" follows
 * a layout with an impossible shift. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_BLOCKS = 7, N_ROUNDS = 40, N_MUTATIONS = 3000, MAX_FILE = 1 << 18 };

static uint64_t state;

static uint32_t random_below(uint32_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % n;
}

static void fail(const char *what) {
    fprintf(stderr, "failed: %s\n", what);
    exit(1);
}

static void *allocate(size_t n) {
    void *memory = malloc(n ? n : 1);
    if (memory == NULL) fail("out of memory");
    return memory;
}

static float random_gate(void) {
    static const float gates[] = {0.0f, 1.0f, -1.0f, 0.5f, 2.0f, 1e-30f, 3e38f, -3e38f, 0.3333333f, -0.0f};
    return gates[random_below(sizeof gates / sizeof *gates)];
}

/* Random bytes; now and then runs of 0x00, 0xff, 0x7c, which make zero, NaN and infinite scales. */
static void fill(uint8_t *data, size_t n) {
    static const uint8_t runs[] = {0x00, 0xff, 0x7c, 0x80};
    for (size_t i = 0; i < n; i++) data[i] = (uint8_t)random_below(256);
    for (int r = 0; r < 8; r++) {
        const size_t start = random_below((uint32_t)n), length = random_below(16);
        memset(data + start, runs[random_below(4)], start + length < n ? length : n - start);
    }
}

/* Everything a log needs, allocated to the byte. */
typedef struct {
    pe_log log;
    int32_t tensor, granularity;
    int64_t starts[2], field_starts[2], filled;
    uint32_t *positions;
    uint16_t *mixes;
    float gates[4];
    uint8_t *fields;
} owned_log;

/* A plan over about one unit in `sparsity`, always with the first and the last one. */
static owned_log *make_log(const pe_tensor *tensor, int32_t granularity, uint32_t sparsity) {
    const pe_map *map = pe_map_of(tensor->layout, granularity);
    const uint32_t n_units = (uint32_t)pe_n_units(map, tensor->n_bytes);
    owned_log *plan = allocate(sizeof *plan);
    size_t n = 0;
    uint32_t *chosen = allocate(n_units * sizeof *chosen);
    for (uint32_t u = 0; u < n_units; u++)
        if (u == 0 || u + 1 == n_units || random_below(sparsity) == 0) chosen[n++] = u;
    memset(plan, 0, sizeof *plan);
    plan->positions = allocate(n * sizeof *plan->positions);
    plan->mixes = allocate(n * sizeof *plan->mixes);
    plan->fields = allocate(n * map->n_field_bytes);
    memcpy(plan->positions, chosen, n * sizeof *chosen);
    free(chosen);
    for (size_t i = 0; i < n; i++) plan->mixes[i] = (uint16_t)random_below(4);
    for (int g = 0; g < 4; g++) plan->gates[g] = random_gate();
    plan->granularity = granularity;
    plan->starts[1] = (int64_t)n;
    plan->field_starts[1] = (int64_t)(n * map->n_field_bytes);
    plan->log = (pe_log){1, n, 4, n * map->n_field_bytes, &plan->tensor, &plan->granularity, plan->starts,
                         plan->field_starts, plan->positions, plan->mixes, plan->gates, plan->fields, &plan->filled};
    return plan;
}

static void free_log(owned_log *plan) {
    free(plan->positions);
    free(plan->mixes);
    free(plan->fields);
    free(plan);
}

static const char *log_error(const pe_tensor *tensor, const pe_log *log) {
    const char *error = pe_plan_error(tensor, 1, log);
    return error == NULL ? pe_filled_error(log) : error;
}

static void checked_switch(const pe_tensor *tensor, const pe_log *old, const pe_log *next) {
    if (log_error(tensor, old) != NULL || log_error(tensor, next) != NULL) fail("a good log was refused");
    pe_switch(tensor, old, next, 0, 1);
    if (next->n_segments && next->filled[0] != next->starts[1]) fail("a log was not filled");
}

/* base -> A -> B -> base must bring back every byte, whatever the granularities. */
static void there_and_back(const pe_tensor *tensor, int32_t first, int32_t second) {
    static const int64_t zero[1] = {0};
    const pe_log nothing = {0, 0, 0, 0, NULL, NULL, zero, zero, NULL, NULL, NULL, NULL, NULL};
    uint8_t *base = allocate(tensor->n_bytes);
    owned_log *a = make_log(tensor, first, 1 + random_below(6));
    owned_log *b = make_log(tensor, second, 1 + random_below(6));
    memcpy(base, tensor->data, tensor->n_bytes);
    checked_switch(tensor, &nothing, &a->log);
    checked_switch(tensor, &a->log, &b->log);
    pe_touch(tensor, &b->log, 0, 1);
    checked_switch(tensor, &b->log, &nothing);
    if (memcmp(base, tensor->data, tensor->n_bytes) != 0) fail("a byte did not come back");
    a->positions[a->log.n_units - 1] = UINT32_MAX;
    if (log_error(tensor, &a->log) == NULL) fail("a position outside the tensor was accepted");
    b->mixes[0] = 4;
    if (log_error(tensor, &b->log) == NULL) fail("a unit without a gate was accepted");
    free_log(a);
    free_log(b);
    free(base);
}

static void exercise(const pe_layout *layout) {
    pe_tensor tensor = {layout, NULL, (size_t)N_BLOCKS * layout->group.block_bytes};
    for (int round = 0; round < N_ROUNDS; round++) {
        tensor.data = allocate(tensor.n_bytes);
        fill(tensor.data, tensor.n_bytes);
        there_and_back(&tensor, round & 1 ? 32 : 1, round & 2 ? 32 : 1);
        free(tensor.data);
    }
}

/* Words with a few changed at random either are refused or describe something the kernels can follow. */
static void mutate(const int32_t *words, size_t n) {
    static pe_layout layout;
    int32_t *changed = allocate(n * sizeof *changed);
    for (int m = 0; m < N_MUTATIONS; m++) {
        const size_t length = random_below(8) ? n : random_below((uint32_t)n);
        memcpy(changed, words, length * sizeof *changed);
        for (uint32_t c = random_below(3); length && c-- > 0;)
            changed[random_below((uint32_t)length)] = random_below(2) ? (int32_t)random_below(600) - 8 : (int32_t)state;
        if (pe_layout_parse(&layout, changed, length) != 0) continue;
        pe_tensor tensor = {&layout, NULL, (size_t)2 * layout.group.block_bytes};
        /* Whole blocks of both maps, else a plain float's two maps disagree on the size of a tensor. */
        tensor.n_bytes = tensor.n_bytes / layout.weight.block_bytes * layout.weight.block_bytes;
        if (tensor.n_bytes < layout.group.block_bytes || m % 16 != 0) continue;
        owned_log *plan = NULL;
        tensor.data = allocate(tensor.n_bytes);
        fill(tensor.data, tensor.n_bytes);
        plan = make_log(&tensor, random_below(2) ? 32 : 1, 2);
        if (log_error(&tensor, &plan->log) == NULL) {
            static const int64_t zero[1] = {0};
            const pe_log nothing = {0, 0, 0, 0, NULL, NULL, zero, zero, NULL, NULL, NULL, NULL, NULL};
            pe_switch(&tensor, &nothing, &plan->log, 0, 1);
        }
        free_log(plan);
        free(tensor.data);
    }
    free(changed);
}

/* Unions of up to four runs against counting; a run that does not ascend is refused. */
static void exercise_unite(void) {
    enum { N_RUNS = 4, LIMIT = 100 };
    uint64_t expected[LIMIT] = {0};
    pe_sorted runs[N_RUNS];
    size_t n_distinct = 0, room = 0;
    for (size_t r = 0; r < N_RUNS; r++) {
        const uint32_t sparsity = 1 + random_below(9);
        uint32_t *positions = allocate(LIMIT * sizeof *positions);
        runs[r] = (pe_sorted){positions, 0, (uint64_t)1 << (16 * r)};
        for (uint32_t p = 0; p < LIMIT; p++)
            if (random_below(sparsity) == 0) positions[runs[r].n++] = p, expected[p] |= runs[r].set;
        room += runs[r].n;
    }
    for (uint32_t p = 0; p < LIMIT; p++) n_distinct += expected[p] != 0;
    uint32_t *positions = allocate(room * sizeof *positions);
    uint64_t *sets = allocate(room * sizeof *sets);
    if (pe_unite(runs, N_RUNS, positions, sets) != (int64_t)n_distinct) fail("a union has another size");
    for (size_t i = 0; i < n_distinct; i++)
        if (sets[i] != expected[positions[i]] || (i && positions[i] <= positions[i - 1])) fail("a union is wrong");
    if (runs[0].n > 1) {
        ((uint32_t *)runs[0].positions)[1] = 0;
        if (pe_unite(runs, N_RUNS, positions, sets) != -1) fail("a run that does not ascend was accepted");
    }
    for (size_t r = 0; r < N_RUNS; r++) free((void *)runs[r].positions);
    free(positions);
    free(sets);
}

static void plant(pe_layout *layout, const char *kind) {
    static const int64_t zero[1] = {0};
    const pe_log nothing = {0, 0, 0, 0, NULL, NULL, zero, zero, NULL, NULL, NULL, NULL, NULL};
    pe_tensor tensor = {layout, NULL, layout->group.block_bytes};
    owned_log *plan;
    tensor.data = allocate(tensor.n_bytes);
    memset(tensor.data, 1, tensor.n_bytes);
    plan = make_log(&tensor, 32, 1);
    if (strcmp(kind, "address") == 0) plan->positions[plan->log.n_units - 1]++;
    else layout->group.is_contiguous = 0, layout->group.pieces[0].n_bits = 40;
    pe_switch(&tensor, &nothing, &plan->log, 0, 1);
}

int main(int argc, char **argv) {
    static int32_t words[MAX_FILE];
    static pe_layout layout;
    FILE *file = argc == 3 || argc == 4 ? fopen(argv[1], "rb") : NULL;
    size_t n_words, at = 1;
    if (file == NULL) fail("usage: exercise_kernels FILE SEED");
    state = strtoull(argv[2], NULL, 10) * 2 + 1;
    n_words = fread(words, sizeof *words, MAX_FILE, file);
    fclose(file);
    if (n_words == 0) fail("no layouts");
    for (int32_t l = 0; l < words[0]; l++) {
        const size_t n = (size_t)words[at++];
        int32_t *exact = allocate(n * sizeof *exact); /* so that reading past the words is seen */
        memcpy(exact, words + at, n * sizeof *exact);
        if (pe_layout_parse(&layout, exact, n) != 0) fail("a good layout was refused");
        if (argc == 4) plant(&layout, argv[3]);
        exercise(&layout);
        mutate(exact, n);
        free(exact);
        at += n;
    }
    for (int round = 0; round < N_ROUNDS; round++) exercise_unite();
    printf("%d layouts\n", (int)words[0]);
    return 0;
}
