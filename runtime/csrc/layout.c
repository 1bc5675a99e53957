/* A layout from the words that kernels.py packs, checked so that no later step can leave a block's bounds. */
#include "kernels.h"

#include <string.h>

typedef struct {
    const int32_t *next, *end;
    int failed;
} reader;

/* The next word, which must lie in [low, high]. */
static int32_t take(reader *words, int32_t low, int32_t high) {
    if (words->failed || words->next == words->end || *words->next < low || *words->next > high) {
        words->failed = 1;
        return low;
    }
    return *words->next++;
}

static int contiguous(const pe_map *map) {
    if (map->n_pieces != 1) return 0;
    for (uint32_t unit = 0; unit < map->units_per_block; unit++) {
        const pe_piece *piece = map->pieces + (size_t)unit * map->n_field_bytes;
        for (uint32_t b = 0; b < map->n_field_bytes; b++)
            if (piece[b].n_bits != 8 || piece[b].byte != piece[0].byte + b) return 0;
    }
    return 1;
}

static void parse_map(pe_map *map, reader *words) {
    size_t n;
    map->unit_shift = (uint32_t)take(words, 0, 8);
    map->units_per_block = 1u << map->unit_shift;
    map->block_bytes = (uint32_t)take(words, 1, 4096);
    map->n_field_bytes = (uint32_t)take(words, 1, PE_MAX_FIELD_BYTES);
    map->n_pieces = (uint32_t)take(words, 1, 4);
    n = (size_t)map->units_per_block * map->n_field_bytes * map->n_pieces;
    if (n > PE_MAX_PIECES) words->failed = 1;
    for (size_t i = 0; i < n && !words->failed; i++) {
        map->pieces[i].byte = (uint16_t)take(words, 0, (int32_t)map->block_bytes - 1);
        map->pieces[i].shift = (uint8_t)take(words, 0, 7);
        map->pieces[i].n_bits = (uint8_t)take(words, 1, 8 - map->pieces[i].shift);
    }
    map->is_contiguous = !words->failed && contiguous(map);
}

static void parse_numbers(pe_numbers *numbers, reader *words) {
    numbers->kind = (pe_kind)take(words, PE_INTEGER, PE_E8M0);
    numbers->flip = (uint8_t)take(words, 0, 255);
    numbers->zero = take(words, 0, 255);
    numbers->max = take(words, 0, 255);
}

static void parse_codes(pe_layout *layout, reader *words) {
    const int32_t last = (int32_t)layout->group.block_bytes - 2;
    parse_numbers(&layout->codes, words);
    layout->n_scales = (uint32_t)take(words, 0, 2);
    layout->min_sign = take(words, -1, 1);
    layout->super_scale = take(words, -1, last);
    layout->super_min = take(words, -1, last);
    layout->group_bits = (uint32_t)take(words, 0, 4);
    layout->n_codebook = (uint32_t)take(words, 0, PE_MAX_CODES);
    for (uint32_t code = 0; code < layout->n_codebook && !words->failed; code++)
        layout->codebook[code] = take(words, -128, 127);
}

/* Groups whose codes are rewritten: a power of two before them, or no scale; nothing else has no scale. */
static int codes_are_consistent(const pe_layout *layout) {
    const uint32_t bits = layout->group_bits;
    const int has_exponent = layout->numbers.kind == PE_E8M0;
    if (bits == 0) return layout->n_scales > 0 && !has_exponent;
    if ((bits != 2 && bits != 4) || layout->min_sign != 0) return 0;
    return layout->n_scales == (uint32_t)has_exponent && (has_exponent || layout->super_scale >= 0);
}

/* What the kernels rely on beyond each word's own range. */
static int is_consistent(const pe_layout *layout) {
    const uint32_t size = pe_size_of(layout->numbers.kind);
    const pe_map *group = &layout->group, *weight = &layout->weight;
    if (!layout->has_codes)
        return group->n_field_bytes % size == 0 && weight->n_field_bytes == size && layout->numbers.kind != PE_INTEGER &&
               layout->numbers.kind != PE_E8M0;
    return weight->block_bytes == group->block_bytes && weight->units_per_block == 32 * group->units_per_block &&
           weight->n_field_bytes == 1 && layout->codes.kind == PE_INTEGER && codes_are_consistent(layout) &&
           (layout->n_codebook == 0 || layout->n_codebook == PE_MAX_CODES) &&
           group->n_field_bytes == layout->n_scales * (layout->min_sign ? 2 : 1) * size + 4 * layout->group_bits;
}

int pe_layout_parse(pe_layout *layout, const int32_t *words, size_t n_words) {
    reader rest = {words, words + n_words, 0};
    memset(layout, 0, sizeof *layout);
    parse_map(&layout->group, &rest);
    parse_map(&layout->weight, &rest);
    parse_numbers(&layout->numbers, &rest);
    layout->has_codes = take(&rest, 0, 1);
    if (layout->has_codes) parse_codes(layout, &rest);
    return !rest.failed && rest.next == rest.end && is_consistent(layout) ? 0 : -1;
}

const pe_map *pe_map_of(const pe_layout *layout, int32_t granularity) {
    return granularity == 1 ? &layout->weight : granularity == 32 ? &layout->group : NULL;
}

uint64_t pe_n_units(const pe_map *map, size_t n_bytes) {
    return (uint64_t)(n_bytes / map->block_bytes) << map->unit_shift;
}
