/* One unit's field: where it lies, what multiplying it by a gate gives. See number_formats.py and numpy_kernels.py,
 * whose results these must equal bit for bit: products are exact in double and rounded once. */
#include "kernels.h"

#include <string.h>

enum { AHEAD = 24 }; /* units whose cache lines are asked for in advance */

/* ---- numbers ---- */

static uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double from_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static int is_finite(double x) { return (bits_of(x) >> 52 & 0x7ff) != 0x7ff; }

int pe_is_finite(float gate) { return is_finite((double)gate); }

static double magnitude(double x) { return x < 0 ? -x : x; }

/* Bits of the exponent and of the fraction of a float format. */
static const struct {
    int n_exponent, n_fraction, n_bytes;
} FLOATS[] = {{0, 0, 1}, {5, 10, 2}, {8, 7, 2}, {8, 23, 4}};

static inline uint32_t load(const uint8_t *raw, int n_bytes) {
    uint32_t bits = 0;
    for (int i = 0; i < n_bytes; i++) bits |= (uint32_t)raw[i] << 8 * i;
    return bits;
}

static inline void store(uint8_t *raw, int n_bytes, uint32_t bits) {
    for (int i = 0; i < n_bytes; i++) raw[i] = (uint8_t)(bits >> 8 * i);
}

/* The value of a float's bits, exactly; the caller has set NaN and infinities apart or wants them as such. */
static inline double decode_float(uint32_t bits, int n_exponent, int n_fraction) {
    const int bias = (1 << (n_exponent - 1)) - 1;
    const uint64_t sign = (uint64_t)(bits >> (n_exponent + n_fraction)) << 63;
    const uint32_t exponent = bits >> n_fraction & ((1u << n_exponent) - 1);
    const uint64_t fraction = bits & ((1u << n_fraction) - 1);
    if (exponent == 0) { /* denormal: fraction * 2^(1 - bias - n_fraction) */
        const double unit = from_bits((uint64_t)(1023 + 1 - bias - n_fraction) << 52);
        const double x = (double)fraction * unit;
        return sign ? -x : x;
    }
    if (exponent == (1u << n_exponent) - 1) return from_bits(sign | 0x7ffull << 52 | fraction << (52 - n_fraction));
    return from_bits(sign | (uint64_t)((int)exponent - bias + 1023) << 52 | fraction << (52 - n_fraction));
}

/* A finite x rounded to nearest, ties to even; what would overflow becomes the largest finite number. */
static inline uint32_t encode_float(double x, int n_exponent, int n_fraction) {
    const uint64_t bits = bits_of(x);
    const uint32_t sign = (uint32_t)(bits >> 63) << (n_exponent + n_fraction);
    const uint32_t largest = (((1u << n_exponent) - 1) << n_fraction) - 1;
    const int raised = (int)(bits >> 52 & 0x7ff);
    int exponent = raised - 1023 + (1 << (n_exponent - 1)) - 1;
    int drop = 52 - n_fraction;
    const uint64_t mantissa = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    uint64_t kept;
    if (raised == 0) return sign; /* zero, or far below any denormal of the formats here */
    if (exponent <= 0) {
        drop += 1 - exponent;
        exponent = 1;
        if (drop > 63) return sign;
    }
    /* Adding half of the last kept bit, less a hair if that bit is even, rounds without a branch. */
    kept = (mantissa + (1ull << (drop - 1)) - 1 + (mantissa >> drop & 1)) >> drop;
    /* `kept` carries the leading one of a normal number into the exponent, and so does a rounding carry. */
    kept += (uint64_t)(exponent - 1) << n_fraction;
    return sign | (kept > largest ? largest : (uint32_t)kept);
}

static inline uint32_t scale_float(uint32_t bits, int n_exponent, int n_fraction, double gate) {
    const uint32_t top = ((1u << n_exponent) - 1) << n_fraction;
    const uint32_t sign = 1u << (n_exponent + n_fraction);
    if (gate == 1) return bits;
    if (gate == 0) return 0;
    if ((bits & top) == top) return (bits & (sign - 1)) == top && gate < 0 ? bits ^ sign : bits;
    return encode_float(decode_float(bits, n_exponent, n_fraction) * gate, n_exponent, n_fraction);
}

static inline double integer_value(const pe_numbers *numbers, uint8_t raw) {
    return (double)((int32_t)(raw ^ numbers->flip) - numbers->zero);
}

/* Far beyond any code, and small enough that a distance to a code is exact. */
static inline double clipped(double x) {
    const double limit = 1024.0 * 1024.0;
    return x > limit ? limit : x < -limit ? -limit : x;
}

/* The raw integer nearest to a value that is not NaN; ties to even, saturated. */
static inline uint8_t nearest_integer(const pe_numbers *numbers, double value) {
    const double x = clipped(value);
    int32_t n = (int32_t)x;
    const double rest = x - n;
    const int odd = n & 1; /* & and | instead of && and ||: no branches to mispredict */
    n += (rest > 0.5) | ((rest == 0.5) & odd);
    n -= (rest < -0.5) | ((rest == -0.5) & odd);
    n += numbers->zero;
    n = n < 0 ? 0 : n > numbers->max ? numbers->max : n;
    return (uint8_t)(n ^ numbers->flip);
}

static double number_value(const pe_numbers *numbers, const uint8_t *raw) {
    const int n_bytes = FLOATS[numbers->kind].n_bytes;
    if (numbers->kind == PE_INTEGER) return integer_value(numbers, *raw);
    return decode_float(load(raw, n_bytes), FLOATS[numbers->kind].n_exponent, FLOATS[numbers->kind].n_fraction);
}

/* ---- where fields lie ---- */

static const pe_piece *pieces_of(const pe_map *map, uint32_t position) {
    const uint32_t unit = position & (map->units_per_block - 1);
    return map->pieces + (size_t)unit * map->n_field_bytes * map->n_pieces;
}

static void read_pieces(const pe_map *map, const uint8_t *block, const pe_piece *piece, uint8_t *field) {
    for (uint32_t b = 0; b < map->n_field_bytes; b++) {
        uint32_t value = 0, done = 0;
        for (uint32_t p = 0; p < map->n_pieces; p++, piece++) {
            value |= (uint32_t)((block[piece->byte] >> piece->shift) & ((1u << piece->n_bits) - 1)) << done;
            done += piece->n_bits;
        }
        field[b] = (uint8_t)value;
    }
}

static void write_pieces(const pe_map *map, uint8_t *block, const pe_piece *piece, const uint8_t *field) {
    for (uint32_t b = 0; b < map->n_field_bytes; b++) {
        uint32_t value = field[b];
        for (uint32_t p = 0; p < map->n_pieces; p++, piece++) {
            const uint32_t mask = (1u << piece->n_bits) - 1;
            uint8_t *byte = block + piece->byte;
            *byte = (uint8_t)((*byte & ~(mask << piece->shift)) | (value & mask) << piece->shift);
            value >>= piece->n_bits;
        }
    }
}

void pe_gather(const pe_map *map, const uint8_t *data, const uint32_t *positions, size_t n, uint8_t *fields) {
    const size_t k = map->n_field_bytes;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *block = data + pe_block_start(map, positions[i]);
        const pe_piece *piece = pieces_of(map, positions[i]);
        if (i + AHEAD < n) PE_PREFETCH(data + pe_field_start(map, positions[i + AHEAD]));
        if (!map->is_contiguous) read_pieces(map, block, piece, fields + i * k);
        else if (k == 2) memcpy(fields + i * 2, block + piece->byte, 2); /* constant sizes become single moves */
        else if (k == 4) memcpy(fields + i * 4, block + piece->byte, 4);
        else memcpy(fields + i * k, block + piece->byte, k);
    }
}

void pe_scatter(const pe_map *map, uint8_t *data, const uint32_t *positions, size_t n, const uint8_t *fields) {
    const size_t k = map->n_field_bytes;
    for (size_t i = 0; i < n; i++) {
        uint8_t *block = data + pe_block_start(map, positions[i]);
        const pe_piece *piece = pieces_of(map, positions[i]);
        if (i + AHEAD < n) PE_PREFETCH(data + pe_field_start(map, positions[i + AHEAD]));
        if (!map->is_contiguous) write_pieces(map, block, piece, fields + i * k);
        else if (k == 2) memcpy(block + piece->byte, fields + i * 2, 2);
        else if (k == 4) memcpy(block + piece->byte, fields + i * 4, 4);
        else memcpy(block + piece->byte, fields + i * k, k);
    }
}

/* ---- multiplying ---- */

/* Inlined with constant formats below, so that each gets its own loop. */
static inline void scale_floats(pe_kind kind, const uint8_t *fields, const float *gates, size_t n, size_t k, uint8_t *out) {
    const int n_exponent = FLOATS[kind].n_exponent, n_fraction = FLOATS[kind].n_fraction, size = FLOATS[kind].n_bytes;
    for (size_t i = 0; i < n; i++)
        for (size_t b = i * k; b < (i + 1) * k; b += (size_t)size)
            store(out + b, size, scale_float(load(fields + b, size), n_exponent, n_fraction, gates[i]));
}

static void scale_integers(const pe_numbers *numbers, const uint8_t *fields, const float *gates, size_t n, size_t k,
                           uint8_t *out) {
    for (size_t i = 0; i < n; i++)
        for (size_t b = i * k; b < (i + 1) * k; b++)
            out[b] = gates[i] == 1 ? fields[b] : nearest_integer(numbers, integer_value(numbers, fields[b]) * gates[i]);
}

static double super_factor(const uint8_t *block, int32_t byte) {
    return byte < 0 ? 1 : decode_float(load(block + byte, 2), 5, 10);
}

static uint8_t nearest_in_book(const pe_layout *layout, double value) {
    const double x = clipped(value);
    uint8_t best = 0;
    for (uint32_t code = 1; code < layout->n_codebook; code++)
        if (magnitude(layout->codebook[code] - x) < magnitude(layout->codebook[best] - x)) best = (uint8_t)code;
    return best;
}

/* The code whose value in its block's scales is nearest to gate * weight; the code itself if the block has no usable scale. */
static uint8_t scale_code(const pe_layout *layout, const uint8_t *data, uint32_t position, uint8_t code, double gate) {
    uint8_t group[PE_MAX_FIELD_BYTES];
    const size_t size = (size_t)FLOATS[layout->numbers.kind].n_bytes;
    const uint32_t sub = position % 32 * layout->n_scales / 32;
    const uint8_t *block = data + pe_block_start(&layout->group, position / 32);
    double scale, minimum = 0, value, wanted;
    if (gate == 1) return code;
    pe_gather(&layout->group, block, &(uint32_t){position / 32 & (layout->group.units_per_block - 1)}, 1, group);
    scale = super_factor(block, layout->super_scale) * number_value(&layout->numbers, group + sub * size);
    if (layout->min_sign != 0)
        minimum = layout->min_sign * super_factor(block, layout->super_min) *
                  number_value(&layout->numbers, group + (layout->n_scales + sub) * size);
    if (scale == 0 || !is_finite(scale) || !is_finite(minimum)) return code;
    value = layout->n_codebook ? layout->codebook[code % PE_MAX_CODES] : integer_value(&layout->codes, code);
    wanted = gate * (scale * value + minimum);
    wanted -= minimum;
    wanted /= scale;
    return layout->n_codebook ? nearest_in_book(layout, wanted) : nearest_integer(&layout->codes, wanted);
}

void pe_scale(const pe_layout *layout, int32_t granularity, const uint8_t *data, const uint32_t *positions,
              const uint8_t *fields, const float *gates, size_t n, uint8_t *out) {
    const size_t k = pe_map_of(layout, granularity)->n_field_bytes;
    if (granularity == 1 && layout->has_codes) {
        for (size_t i = 0; i < n; i++) out[i] = scale_code(layout, data, positions[i], fields[i], gates[i]);
        return;
    }
    switch (layout->numbers.kind) {
    case PE_INTEGER: scale_integers(&layout->numbers, fields, gates, n, k, out); break;
    case PE_F16: scale_floats(PE_F16, fields, gates, n, k, out); break;
    case PE_BF16: scale_floats(PE_BF16, fields, gates, n, k, out); break;
    case PE_F32: scale_floats(PE_F32, fields, gates, n, k, out); break;
    }
}
