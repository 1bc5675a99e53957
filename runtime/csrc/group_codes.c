/* Gates on groups that have no scale to multiply: their codes are rewritten. See group_codes.py for the rule and the why. */
#include "kernels.h"

#include <string.h>

enum { N_TABLES = 8, LAST_EXPONENT = 254 };

/* What becomes of each code under a gate, kept for the gates met last. */
typedef struct {
    double gate;
    int is_set;
    uint8_t codes[1 << 4];
} code_table;

static uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* x * 2^power, exact: x is 0 or a float, and the power is at most that of two exponents apart. */
static double times_power(double x, int power) {
    const uint64_t bits = (uint64_t)(1023 + power) << 52;
    double factor;
    memcpy(&factor, &bits, sizeof factor);
    return x * factor;
}

/* Move as much of the gate into the exponent as it can take; returns what is left of the gate, in (0.625, 1.25] if all. */
static double move_exponent(uint8_t *exponent, double gate) {
    const uint64_t bits = bits_of(gate);
    const uint64_t largest_rest = (uint64_t)1 << 50; /* the fraction bits of 1.25 */
    const int power = (int)(bits >> 52 & 0x7ff) - 1023 + ((bits & (((uint64_t)1 << 52) - 1)) > largest_rest);
    const int before = *exponent, wanted = before + power;
    if (gate == 0) return 0;
    *exponent = (uint8_t)(wanted < 0 ? 0 : wanted > LAST_EXPONENT ? LAST_EXPONENT : wanted);
    return times_power(gate, before - *exponent);
}

static const code_table *table_of(const pe_layout *layout, code_table *tables, double gate) {
    const uint64_t bits = bits_of(gate);
    code_table *table = tables + ((bits >> 52 ^ bits >> 48 ^ bits >> 40) & (N_TABLES - 1));
    if (table->is_set && table->gate == gate) return table;
    table->gate = gate;
    table->is_set = 1;
    for (uint32_t code = 0; code < 1u << layout->group_bits; code++)
        table->codes[code] = pe_nearest_code(layout, gate * pe_code_value(layout, (uint8_t)code));
    return table;
}

static void rewrite(const code_table *table, uint32_t bits, const uint8_t *codes, size_t n, uint8_t *out) {
    const uint32_t mask = (1u << bits) - 1;
    for (size_t b = 0; b < n; b++) {
        uint32_t packed = 0;
        for (uint32_t shift = 0; shift < 8; shift += bits)
            packed |= (uint32_t)(table->codes[codes[b] >> shift & mask] & mask) << shift;
        out[b] = (uint8_t)packed;
    }
}

void pe_scale_group_codes(const pe_layout *layout, const uint8_t *fields, const float *gates, size_t n, uint8_t *out) {
    const size_t k = layout->group.n_field_bytes, n_scales = layout->n_scales;
    code_table tables[N_TABLES] = {{0, 0, {0}}};
    for (size_t i = 0; i < n; i++, fields += k, out += k) {
        double gate = gates[i];
        if (gate == 1) {
            memmove(out, fields, k);
            continue;
        }
        memmove(out, fields, n_scales);
        if (n_scales) gate = move_exponent(out, gate);
        rewrite(table_of(layout, tables, gate), layout->group_bits, fields + n_scales, k - n_scales, out + n_scales);
    }
}
