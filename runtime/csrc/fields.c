/* One unit's field: where it lies, what multiplying it by a gate gives. See number_formats.py and numpy_kernels.py,
 * whose results these must equal bit for bit: products are exact in double and rounded once. */
#include "kernels.h"

#include <string.h>

enum { AHEAD = 64 }; /* units that are prefetched in advance */

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
static inline uint32_t encode_float(double x, int n_exponent, int n_fraction, uint32_t largest) {
    const uint64_t bits = bits_of(x);
    const uint32_t sign = (uint32_t)(bits >> 63) << (n_exponent + n_fraction);
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
    return encode_float(decode_float(bits, n_exponent, n_fraction) * gate, n_exponent, n_fraction, top - 1);
}

/* UE4M3: unsigned, without infinities, halved; the last byte is no number and reads as 0. */
enum { LAST_UE4M3 = 0x7e };

static double decode_ue4m3(uint8_t raw) {
    const uint32_t exponent = raw >> 3 & 15, fraction = raw & 7;
    if (raw == LAST_UE4M3 + 1) return 0;
    if (exponent == 0) return fraction / 1024.0;
    return (8 + fraction) * from_bits((uint64_t)(1023 + exponent - 11) << 52);
}

static uint8_t scale_ue4m3(uint8_t raw, double gate) {
    const double wanted = 2 * decode_ue4m3(raw) * gate;
    if (gate == 1) return raw;
    return wanted > 0 ? (uint8_t)encode_float(wanted, 4, 3, LAST_UE4M3) : 0;
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
    switch (numbers->kind) {
    case PE_F16: return decode_float(load(raw, 2), 5, 10);
    case PE_BF16: return decode_float(load(raw, 2), 8, 7);
    case PE_F32: return decode_float(load(raw, 4), 8, 23);
    case PE_UE4M3: return decode_ue4m3(*raw);
    case PE_E8M0: return from_bits((uint64_t)(1023 - 128 + *raw) << 52);
    case PE_INTEGER: break;
    }
    return integer_value(numbers, *raw);
}

/* ---- where fields lie ---- */

static const pe_piece *pieces_of(const pe_map *map, uint32_t position) {
    const uint32_t unit = position & (map->units_per_block - 1);
    return map->pieces + (size_t)unit * map->n_field_bytes * map->n_pieces;
}

/* Shapes of fields get loops of their own: called with constants for `k` (bytes) and `n_pieces` (0: contiguous), the
 * functions below unroll. */
static inline void read_field(const uint8_t *block, const pe_piece *piece, uint32_t k, uint32_t n_pieces, uint8_t *field) {
    if (n_pieces == 0) {
        memcpy(field, block + piece->byte, k);
        return;
    }
    for (uint32_t b = 0; b < k; b++) {
        uint32_t value = 0, done = 0;
        for (uint32_t p = 0; p < n_pieces; p++, piece++) {
            value |= (uint32_t)((block[piece->byte] >> piece->shift) & ((1u << piece->n_bits) - 1)) << done;
            done += piece->n_bits;
        }
        field[b] = (uint8_t)value;
    }
}

static inline void write_field(uint8_t *block, const pe_piece *piece, uint32_t k, uint32_t n_pieces, const uint8_t *field) {
    if (n_pieces == 0) {
        memcpy(block + piece->byte, field, k);
        return;
    }
    for (uint32_t b = 0; b < k; b++) {
        uint32_t value = field[b];
        for (uint32_t p = 0; p < n_pieces; p++, piece++) {
            const uint32_t mask = (1u << piece->n_bits) - 1;
            uint8_t *byte = block + piece->byte;
            *byte = (uint8_t)((*byte & ~(mask << piece->shift)) | (value & mask) << piece->shift);
            value >>= piece->n_bits;
        }
    }
}

/* One prefetch per unit: a burst of them would exceed what the processor keeps track of, and be dropped. */
static inline void prefetch_ahead(const pe_map *map, const uint8_t *data, const uint32_t *positions, size_t i, size_t n_known) {
    if (i + AHEAD < n_known) PE_PREFETCH(data + pe_field_start(map, positions[i + AHEAD]));
}

static inline void gather(const pe_map *map, const uint8_t *data, const uint32_t *positions, size_t n, size_t n_known,
                          uint8_t *fields, uint32_t k, uint32_t n_pieces) {
    for (size_t i = 0; i < n; i++) {
        prefetch_ahead(map, data, positions, i, n_known);
        read_field(data + pe_block_start(map, positions[i]), pieces_of(map, positions[i]), k, n_pieces, fields + i * k);
    }
}

static inline void scatter(const pe_map *map, uint8_t *data, const uint32_t *positions, size_t n, size_t n_known,
                           const uint8_t *fields, uint32_t k, uint32_t n_pieces) {
    for (size_t i = 0; i < n; i++) {
        prefetch_ahead(map, data, positions, i, n_known);
        write_field(data + pe_block_start(map, positions[i]), pieces_of(map, positions[i]), k, n_pieces, fields + i * k);
    }
}

/* Which types these are: Q8_0 Q4_0 Q5_0 IQ4_NL Q6_K NVFP4; Q4_1 Q5_1; Q4_K Q5_K Q3_K; IQ4_XS; nibbles; the rest. */
#define PE_BY_SHAPE(call, ...)                                                      \
    do {                                                                            \
        const uint32_t k_ = map->n_field_bytes;                                     \
        const uint32_t p_ = map->is_contiguous ? 0 : map->n_pieces;                 \
        if (k_ == 2 && p_ == 0) call(__VA_ARGS__, 2, 0);                            \
        else if (k_ == 4 && p_ == 0) call(__VA_ARGS__, 4, 0);                       \
        else if (k_ == 2 && p_ == 2) call(__VA_ARGS__, 2, 2);                       \
        else if (k_ == 1 && p_ == 2) call(__VA_ARGS__, 1, 2);                       \
        else if (k_ == 1 && p_ == 1) call(__VA_ARGS__, 1, 1);                       \
        else call(__VA_ARGS__, k_, p_);                                             \
    } while (0)

void pe_gather(const pe_map *map, const uint8_t *data, const uint32_t *positions, size_t n, size_t n_known, uint8_t *fields) {
    PE_BY_SHAPE(gather, map, data, positions, n, n_known, fields);
}

void pe_scatter(const pe_map *map, uint8_t *data, const uint32_t *positions, size_t n, size_t n_known,
                const uint8_t *fields) {
    PE_BY_SHAPE(scatter, map, data, positions, n, n_known, fields);
}

/* ---- multiplying ---- */

/* Inlined with constant formats below, so that each gets its own loop. */
static inline void scale_floats(int n_exponent, int n_fraction, const uint8_t *fields, const float *gates, size_t n, size_t k,
                                uint8_t *out) {
    const int size = (1 + n_exponent + n_fraction) / 8;
    for (size_t i = 0; i < n; i++)
        for (size_t b = i * k; b < (i + 1) * k; b += (size_t)size)
            store(out + b, size, scale_float(load(fields + b, size), n_exponent, n_fraction, gates[i]));
}

/* Gate 0 is the usual one, and needs no arithmetic. Inlined with constant `k`. */
static inline void scale_integers(const pe_numbers *numbers, const uint8_t *fields, const float *gates, size_t n, size_t k,
                                  uint8_t *out) {
    const uint8_t zero = nearest_integer(numbers, 0);
    for (size_t i = 0; i < n; i++) {
        const double gate = gates[i];
        for (size_t b = i * k; b < (i + 1) * k; b++)
            out[b] = gate == 0   ? zero
                     : gate == 1 ? fields[b]
                                 : nearest_integer(numbers, integer_value(numbers, fields[b]) * gate);
    }
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

uint8_t pe_nearest_code(const pe_layout *layout, double value) {
    return layout->n_codebook ? nearest_in_book(layout, value) : nearest_integer(&layout->codes, value);
}

double pe_code_value(const pe_layout *layout, uint8_t code) {
    return layout->n_codebook ? layout->codebook[code % PE_MAX_CODES] : integer_value(&layout->codes, code);
}

/* The code whose value in its block's scales is nearest to gate * weight; the code itself if the block has no usable scale. */
static uint8_t scale_code(const pe_layout *layout, const uint8_t *data, uint32_t position, uint8_t code, double gate) {
    uint8_t group[PE_MAX_FIELD_BYTES];
    const size_t size = pe_size_of(layout->numbers.kind);
    const uint32_t sub = position % 32 * layout->n_scales / 32;
    const uint8_t *block = data + pe_block_start(&layout->group, position / 32);
    double scale, minimum = 0, wanted;
    if (gate == 1) return code;
    pe_gather(&layout->group, block, &(uint32_t){position / 32 & (layout->group.units_per_block - 1)}, 1, 0, group);
    scale = super_factor(block, layout->super_scale);
    if (layout->n_scales) scale *= number_value(&layout->numbers, group + sub * size);
    if (layout->min_sign != 0)
        minimum = layout->min_sign * super_factor(block, layout->super_min) *
                  number_value(&layout->numbers, group + (layout->n_scales + sub) * size);
    if (scale == 0 || !is_finite(scale) || !is_finite(minimum)) return code;
    wanted = gate * (scale * pe_code_value(layout, code) + minimum);
    wanted -= minimum;
    wanted /= scale;
    return pe_nearest_code(layout, wanted);
}

void pe_scale(const pe_layout *layout, int32_t granularity, const uint8_t *data, const uint32_t *positions,
              const uint8_t *fields, const float *gates, size_t n, uint8_t *out) {
    const size_t k = pe_map_of(layout, granularity)->n_field_bytes;
    if (granularity == 1 && layout->has_codes) {
        for (size_t i = 0; i < n; i++) out[i] = scale_code(layout, data, positions[i], fields[i], gates[i]);
        return;
    }
    if (granularity == 32 && layout->has_codes && layout->group_bits) {
        pe_scale_group_codes(layout, fields, gates, n, out);
        return;
    }
    switch (layout->numbers.kind) {
    case PE_INTEGER:
        if (k == 2) scale_integers(&layout->numbers, fields, gates, n, 2, out);
        else scale_integers(&layout->numbers, fields, gates, n, k, out);
        break;
    case PE_F16: scale_floats(5, 10, fields, gates, n, k, out); break;
    case PE_BF16: scale_floats(8, 7, fields, gates, n, k, out); break;
    case PE_F32: scale_floats(8, 23, fields, gates, n, k, out); break;
    case PE_UE4M3:
        for (size_t i = 0; i < n; i++)
            for (size_t b = i * k; b < (i + 1) * k; b++) out[b] = scale_ue4m3(fields[b], gates[i]);
        break;
    case PE_E8M0: break; /* powers of two come with group codes alone */
    }
}
