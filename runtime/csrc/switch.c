/* The switch: merge the units of the old and the new plan, tensor by tensor, and write only where they differ.
 *
 * A switch is made of cache and TLB misses. Units are handled in batches, in ascending order of address, in loops so tight
 * that the misses of many units overlap. */
#include "kernels.h"

#include <string.h>

enum { BATCH = 128, AHEAD = 64 };

typedef struct {
    int32_t granularity;
    size_t n; /* units; of an old segment only the filled ones */
    const uint32_t *positions;
    const uint16_t *mixes;
    const float *gates;
    uint8_t *fields;
} segment;

/* Units waiting to be written; their cache lines have been asked for. `index` is their place in the new segment. */
typedef struct {
    size_t n;
    uint32_t positions[BATCH];
    size_t index[BATCH];
    float gates[BATCH];
    uint8_t fields[BATCH * PE_MAX_FIELD_BYTES];
} batch;

typedef struct {
    const pe_tensor *tensor;
    const pe_map *map;
    int64_t n_units;
    batch fresh;   /* to gather, log and change */
    batch changed; /* base field known from the old log: to change */
    batch undone;  /* back to base */
} job;

static void copy_field(uint8_t *to, const uint8_t *from, size_t k) {
    if (k == 2) memcpy(to, from, 2);
    else if (k == 4) memcpy(to, from, 4);
    else memcpy(to, from, k);
}

static void change(job *work, batch *units, int32_t granularity) {
    pe_scale(work->tensor->layout, granularity, work->tensor->data, units->positions, units->fields, units->gates,
             units->n, units->fields);
    pe_scatter(work->map, work->tensor->data, units->positions, units->n, 0, units->fields);
    work->n_units += (int64_t)units->n;
    units->n = 0;
}

static void flush_fresh(job *work, const segment *next) {
    const size_t k = work->map->n_field_bytes;
    batch *units = &work->fresh;
    pe_gather(work->map, work->tensor->data, units->positions, units->n, 0, units->fields);
    for (size_t i = 0; i < units->n; i++) copy_field(next->fields + units->index[i] * k, units->fields + i * k, k);
    change(work, units, next->granularity);
}

static void flush_undone(job *work) {
    batch *units = &work->undone;
    pe_scatter(work->map, work->tensor->data, units->positions, units->n, 0, units->fields);
    work->n_units += (int64_t)units->n;
    units->n = 0;
}

/* Nothing to undo: the log is filled in place, without a merge. */
static void change_all(job *work, const segment *next) {
    const size_t k = work->map->n_field_bytes;
    const pe_tensor *tensor = work->tensor;
    batch *units = &work->fresh;
    for (size_t start = 0; start < next->n; start += BATCH) {
        const size_t n = next->n - start < BATCH ? next->n - start : BATCH;
        const uint32_t *positions = next->positions + start;
        uint8_t *base = next->fields + start * k;
        for (size_t i = 0; i < n; i++) units->gates[i] = next->gates[next->mixes[start + i]];
        pe_gather(work->map, tensor->data, positions, n, next->n - start, base);
        pe_scale(tensor->layout, next->granularity, tensor->data, positions, base, units->gates, n, units->fields);
        pe_scatter(work->map, tensor->data, positions, n, 0, units->fields);
    }
    work->n_units += (int64_t)next->n;
}

/* Nothing to apply. */
static void undo_all(job *work, const segment *old) {
    for (size_t start = 0; start < old->n; start += BATCH) {
        const size_t n = old->n - start < BATCH ? old->n - start : BATCH;
        pe_scatter(work->map, work->tensor->data, old->positions + start, n, old->n - start,
                   old->fields + start * work->map->n_field_bytes);
    }
    work->n_units += (int64_t)old->n;
}

static void add_fresh(job *work, const segment *next, size_t j) {
    batch *units = &work->fresh;
    PE_PREFETCH(work->tensor->data + pe_field_start(work->map, next->positions[j]));
    units->positions[units->n] = next->positions[j];
    units->gates[units->n] = next->gates[next->mixes[j]];
    units->index[units->n++] = j;
    if (units->n == BATCH) flush_fresh(work, next);
}

static void add_undone(job *work, const segment *old, size_t i) {
    const size_t k = work->map->n_field_bytes;
    batch *units = &work->undone;
    PE_PREFETCH(work->tensor->data + pe_field_start(work->map, old->positions[i]));
    units->positions[units->n] = old->positions[i];
    copy_field(units->fields + units->n++ * k, old->fields + i * k, k);
    if (units->n == BATCH) flush_undone(work);
}

static void add_common(job *work, const segment *old, size_t i, const segment *next, size_t j) {
    const size_t k = work->map->n_field_bytes;
    const float gate = next->gates[next->mixes[j]];
    batch *units = &work->changed;
    copy_field(next->fields + j * k, old->fields + i * k, k);
    if (old->gates[old->mixes[i]] == gate) return;
    PE_PREFETCH(work->tensor->data + pe_field_start(work->map, next->positions[j]));
    units->positions[units->n] = next->positions[j];
    units->gates[units->n] = gate;
    copy_field(units->fields + units->n++ * k, old->fields + i * k, k);
    if (units->n == BATCH) change(work, units, next->granularity);
}

/* Both segments of one granularity, or one of them empty. Returns the units written. */
static int64_t merge(job *work, const pe_tensor *tensor, const segment *old, const segment *next) {
    size_t i = 0, j = 0;
    work->tensor = tensor;
    work->map = pe_map_of(tensor->layout, next->n ? next->granularity : old->granularity);
    work->n_units = 0;
    work->fresh.n = work->changed.n = work->undone.n = 0;
    if (old->n == 0) return change_all(work, next), work->n_units;
    if (next->n == 0) return undo_all(work, old), work->n_units;
    while (i < old->n || j < next->n) {
        if (j == next->n || (i < old->n && old->positions[i] < next->positions[j])) add_undone(work, old, i++);
        else if (i == old->n || next->positions[j] < old->positions[i]) add_fresh(work, next, j++);
        else add_common(work, old, i++, next, j++);
    }
    flush_undone(work);
    if (work->changed.n) change(work, &work->changed, next->granularity);
    if (work->fresh.n) flush_fresh(work, next);
    return work->n_units;
}

static segment segment_of(const pe_log *log, size_t s, size_t n) {
    const size_t start = (size_t)log->starts[s];
    segment units = {log->granularities[s], n,          log->positions + start,
                     log->mixes + start,    log->gates, log->fields + log->field_starts[s]};
    return units;
}

static const segment NOTHING = {32, 0, NULL, NULL, NULL, NULL};

/* Switch one tensor and add to the counts. */
static void switch_tensor(job *work, const pe_tensor *tensor, const segment *old, const segment *next,
                          pe_counts *counts) {
    int64_t n_units = 0, n_bytes = 0;
    if (old->n && next->n && old->granularity != next->granularity) {
        /* Codes are chosen against the base scales, so the old mask has to go before the new one comes. */
        n_units = merge(work, tensor, old, &NOTHING);
        n_bytes = n_units * work->map->n_field_bytes;
        old = &NOTHING;
    }
    if (old->n || next->n) {
        const int64_t n = merge(work, tensor, old, next);
        n_units += n;
        n_bytes += n * work->map->n_field_bytes;
    }
    counts->n_tensors += n_units > 0;
    counts->n_units += n_units;
    counts->n_bytes += n_bytes;
}

pe_counts pe_switch(const pe_tensor *tensors, const pe_log *old, const pe_log *next, int32_t first, int32_t end) {
    pe_counts counts = {0, 0, 0};
    job work;
    size_t a = 0, b = 0;
    while (a < old->n_segments && old->tensors[a] < first) a++;
    while (b < next->n_segments && next->tensors[b] < first) b++;
    for (;;) {
        const int32_t in_old = a < old->n_segments ? old->tensors[a] : INT32_MAX;
        const int32_t in_next = b < next->n_segments ? next->tensors[b] : INT32_MAX;
        const int32_t tensor = in_old < in_next ? in_old : in_next;
        segment before = NOTHING, after = NOTHING;
        if (tensor >= end) return counts;
        if (in_old == tensor) {
            before = segment_of(old, a, (size_t)old->filled[a]);
            a++;
        }
        if (in_next == tensor) after = segment_of(next, b, (size_t)(next->starts[b + 1] - next->starts[b]));
        switch_tensor(&work, tensors + tensor, &before, &after, &counts);
        if (in_next == tensor) {
            next->filled[b] = (int64_t)after.n;
            b++;
        }
    }
}

void pe_touch(const pe_tensor *tensors, const pe_log *plan, int32_t first, int32_t end) {
    for (size_t s = 0; s < plan->n_segments; s++) {
        const pe_tensor *tensor = tensors + plan->tensors[s];
        const pe_map *map = pe_map_of(tensor->layout, plan->granularities[s]);
        const size_t n = (size_t)(plan->starts[s + 1] - plan->starts[s]);
        const uint32_t *positions = plan->positions + plan->starts[s];
        if (plan->tensors[s] < first || plan->tensors[s] >= end) continue;
        for (size_t i = 0; i < n; i++) {
            volatile uint8_t *byte = tensor->data + pe_field_start(map, positions[i]);
            if (i + AHEAD < n) PE_PREFETCH(tensor->data + pe_field_start(map, positions[i + AHEAD]));
            *byte = *byte;
        }
    }
}

/* ---- checks ---- */

static int ascends_below(const uint32_t *positions, size_t n, uint64_t n_units) {
    uint32_t wrong = 0;
    for (size_t i = 1; i < n; i++) wrong |= positions[i - 1] >= positions[i];
    return !wrong && (n == 0 || positions[n - 1] < n_units);
}

static const char *segment_error(const pe_tensor *tensor, const pe_log *log, size_t s) {
    const pe_map *map = pe_map_of(tensor->layout, log->granularities[s]);
    const int64_t start = log->starts[s], end = log->starts[s + 1];
    const int64_t field_start = log->field_starts[s], field_end = log->field_starts[s + 1];
    if (map == NULL) return "a granularity is neither 1 nor 32";
    if (start < 0 || end < start || (uint64_t)end > log->n_units) return "segments do not fit the positions";
    if (field_start < 0 || field_end < field_start || (uint64_t)field_end > log->n_field_bytes)
        return "segments do not fit the fields";
    if ((field_end - field_start) != (end - start) * (int64_t)map->n_field_bytes) return "fields have the wrong size";
    if (!ascends_below(log->positions + start, (size_t)(end - start), pe_n_units(map, tensor->n_bytes)))
        return "positions are not ascending or exceed the tensor";
    return NULL;
}

const char *pe_plan_error(const pe_tensor *tensors, size_t n_tensors, const pe_log *log) {
    uint32_t wrong = 0;
    for (size_t s = 0; s < log->n_segments; s++) {
        const char *error;
        if (log->tensors[s] < 0 || (size_t)log->tensors[s] >= n_tensors) return "no such tensor";
        if (s > 0 && log->tensors[s - 1] >= log->tensors[s]) return "tensors are not ascending";
        error = segment_error(tensors + log->tensors[s], log, s);
        if (error != NULL) return error;
    }
    for (size_t i = 0; i < log->n_units; i++) wrong |= log->mixes[i] >= log->n_gates;
    for (size_t i = 0; i < log->n_gates; i++) wrong |= !pe_is_finite(log->gates[i]);
    return wrong ? "a unit has no gate, or a gate is not finite" : NULL;
}

const char *pe_filled_error(const pe_log *log) {
    for (size_t s = 0; s < log->n_segments; s++)
        if (log->filled[s] < 0 || log->filled[s] > log->starts[s + 1] - log->starts[s])
            return "more units filled than there are";
    return NULL;
}
