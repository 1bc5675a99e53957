/* The in-memory editing core: read, multiply and write the fields of masked units in quantized weights.
 *
 * Plain C11 without Python, so that it can be tested alone under sanitizers. Words are those of layouts.py and plans.py; a
 * layout arrives as the table of int32 words that kernels.py packs, and is checked before it is trusted. Memory is
 * handled as bytes throughout: no assumption about byte order or alignment of weights. Nothing here allocates.
 */
#ifndef PERSONA_EDGE_KERNELS_H
#define PERSONA_EDGE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* The NumPy twin rounds after every operation, so a product and a sum must not be fused. GCC and MSVC take this from the
 * command line (see pyproject.toml) and from their defaults. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

enum {
    PE_MAX_FIELD_BYTES = 128, /* 32 weights of F32 */
    PE_MAX_PIECES = 512,      /* pieces of one map */
    PE_MAX_CODES = 16         /* entries of a codebook */
};

/* Ask for a cache line early. A switch is made of cache and TLB misses, and this lets many of them overlap. */
#if defined(__GNUC__) || defined(__clang__)
#define PE_PREFETCH(address) __builtin_prefetch(address)
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#include <xmmintrin.h>
#define PE_PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
#else
#define PE_PREFETCH(address) ((void)(address))
#endif

typedef enum { PE_INTEGER = 0, PE_F16 = 1, PE_BF16 = 2, PE_F32 = 3, PE_UE4M3 = 4, PE_E8M0 = 5 } pe_kind;

/* Bytes of one number of that kind. */
static inline uint32_t pe_size_of(pe_kind kind) { return kind == PE_F32 ? 4 : kind == PE_F16 || kind == PE_BF16 ? 2 : 1; }

/* `n_bits` bits of byte `byte` of a block, from bit `shift` up. */
typedef struct {
    uint16_t byte;
    uint8_t shift;
    uint8_t n_bits;
} pe_piece;

/* Where the fields of a block's units lie: pieces[(unit * n_field_bytes + field byte) * n_pieces + piece]. */
typedef struct {
    uint32_t unit_shift; /* log2 of units_per_block */
    uint32_t units_per_block;
    uint32_t block_bytes;
    uint32_t n_field_bytes;
    uint32_t n_pieces;
    int is_contiguous; /* fields lie in memory as in canonical form */
    pe_piece pieces[PE_MAX_PIECES];
} pe_map;

/* A number format; an integer byte b stands for (b ^ flip) - zero, with b ^ flip in [0, max]. */
typedef struct {
    pe_kind kind;
    uint8_t flip;
    int32_t zero;
    int32_t max;
} pe_numbers;

typedef struct {
    pe_map group;
    pe_map weight;
    pe_numbers numbers; /* of a group's field */
    int has_codes;      /* 0: weights are floats themselves, and the rest is unused */
    pe_numbers codes;
    uint32_t n_scales;   /* per group; 0 where `super_scale` alone scales */
    int32_t min_sign;    /* 0: no minimum */
    int32_t super_scale; /* byte of the block, -1 for none */
    int32_t super_min;
    uint32_t group_bits; /* not 0: a group's field ends with its 32 codes of so many bits, and its gate rewrites them */
    uint32_t n_codebook; /* 0: codes are linear */
    int32_t codebook[PE_MAX_CODES];
} pe_layout;

typedef struct {
    const pe_layout *layout;
    uint8_t *data;
    size_t n_bytes;
} pe_tensor;

/* A plan with its undo log; see plans.py. The arrays' lengths are n_segments (+ 1 for starts), n_units, n_gates. */
typedef struct {
    size_t n_segments, n_units, n_gates, n_field_bytes;
    const int32_t *tensors;
    const int32_t *granularities;
    const int64_t *starts;
    const int64_t *field_starts;
    const uint32_t *positions;
    const uint16_t *mixes;
    const float *gates;
    uint8_t *fields;
    int64_t *filled;
} pe_log;

typedef struct {
    int64_t n_tensors, n_units, n_bytes;
} pe_counts;

/* 0, or -1 when the words do not describe a layout that the kernels can follow within a block's bounds. */
int pe_layout_parse(pe_layout *layout, const int32_t *words, size_t n_words);

/* The map of granularity 1 or 32, NULL for any other. */
const pe_map *pe_map_of(const pe_layout *layout, int32_t granularity);

/* How many units a tensor of `n_bytes` has. */
uint64_t pe_n_units(const pe_map *map, size_t n_bytes);

int pe_is_finite(float gate);

/* The start of the block that holds the unit at `position`. */
static inline size_t pe_block_start(const pe_map *map, uint32_t position) {
    return (size_t)(position >> map->unit_shift) * map->block_bytes;
}

/* The first byte of the block that the field of the unit at `position` uses. */
static inline size_t pe_field_start(const pe_map *map, uint32_t position) {
    const uint32_t unit = position & (map->units_per_block - 1);
    return pe_block_start(map, position) + map->pieces[unit * map->n_field_bytes * map->n_pieces].byte;
}

/* fields[i] = field of the unit at positions[i] < pe_n_units, i < n; any order. `n_known` of the positions are known, and
 * units a little ahead are prefetched, those after the n-th for a later call; 0 says that all are in the cache. */
void pe_gather(const pe_map *map, const uint8_t *data, const uint32_t *positions, size_t n, size_t n_known, uint8_t *fields);

/* Write fields[i] to the unit at positions[i]; positions all different, any order. `n_known` as above. */
void pe_scatter(const pe_map *map, uint8_t *data, const uint32_t *positions, size_t n, size_t n_known,
                const uint8_t *fields);

/* out[i] = fields[i] times gates[i], all finite; `data` must hold the base scales. `out` may be `fields`. */
void pe_scale(const pe_layout *layout, int32_t granularity, const uint8_t *data, const uint32_t *positions,
              const uint8_t *fields, const float *gates, size_t n, uint8_t *out);

/* The code of `layout` whose value is nearest to `value`, which is not NaN. */
uint8_t pe_nearest_code(const pe_layout *layout, double value);

/* What a linear code or a codebook's entry stands for. */
double pe_code_value(const pe_layout *layout, uint8_t code);

/* pe_scale for groups of a layout with group_bits; see group_codes.py. */
void pe_scale_group_codes(const pe_layout *layout, const uint8_t *fields, const float *gates, size_t n, uint8_t *out);

/* NULL when the plan of `log` fits the tensors in every index, position and length; otherwise what is wrong with it. */
const char *pe_plan_error(const pe_tensor *tensors, size_t n_tensors, const pe_log *log);

/* NULL when no more units are filled than there are; `log`'s plan is without error. */
const char *pe_filled_error(const pe_log *log);

/* From the state that `old` undoes to base plus the gates of `next`, whose log is filled; both without error. Only tensors
 * from `first` to before `end` are touched: calls for others may run at the same time. */
pe_counts pe_switch(const pe_tensor *tensors, const pe_log *old, const pe_log *next, int32_t first, int32_t end);

/* Strictly ascending positions, and the bits that stand for the set they make. */
typedef struct {
    const uint32_t *positions;
    size_t n;
    uint64_t set;
} pe_sorted;

/* The union of up to 64 runs: its positions, ascending, and for each the bits of all runs that it is in. Returns how many,
 * at most as many as the runs have together; -1 for a run that does not ascend, or too many. */
int64_t pe_unite(const pe_sorted *runs, size_t n_runs, uint32_t *positions, uint64_t *sets);

/* Read and write back one byte per unit of `plan`, in its order: what a switch cannot be faster than. For measurements. */
void pe_touch(const pe_tensor *tensors, const pe_log *plan, int32_t first, int32_t end);

#endif
