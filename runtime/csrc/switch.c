/* The switch: merge the units of the old and the new plan, tensor by tensor, and write only where they differ.
 *
 * A switch is made of cache and TLB misses. Units are handled in batches, in ascending order of address, in loops so tight
 * that the misses of many units overlap. */
#include "kernels.h"

#include <string.h>

enum { BATCH = 128, SORTED = 1024, AHEAD = 64 };

typedef struct {
    int32_t granularity;
    size_t n; /* units; of an old segment only the filled ones */
    const uint32_t *positions;
    const uint16_t *mixes;
    const float *gates;
    uint8_t *fields;
} segment;

/* Units of one kind, ascending, that wait to be written. `index` is their place in the old or new segment. More of them than
 * one batch, so that those of the next batch are known and can be prefetched. */
typedef struct {
    size_t n;
    uint32_t index[SORTED];
    uint32_t positions[SORTED];
} sorted;

typedef struct {
    const pe_tensor *tensor;
    const pe_map *map;
    int64_t n_units;
    sorted fresh;   /* to gather, log and change */
    sorted changed; /* base field known from the old log, and in the new one already: to change */
    sorted undone;  /* back to base */
    float gates[BATCH];
    uint8_t fields[BATCH * PE_MAX_FIELD_BYTES];
} job;

static void copy_field(uint8_t *to, const uint8_t *from, size_t k) {
    if (k == 2) memcpy(to, from, 2);
    else if (k == 4) memcpy(to, from, 4);
    else memcpy(to, from, k);
}

/* Write `n` units at `positions` with base fields and gates as in the job. */
static void change(job *work, int32_t granularity, const uint32_t *positions, size_t n, size_t n_known) {
    pe_scale(work->tensor->layout, granularity, work->tensor->data, positions, work->fields, work->gates, n, work->fields);
    pe_scatter(work->map, work->tensor->data, positions, n, n_known, work->fields);
}

/* Write fresh units, filling the log, or changed ones, whose base fields it has. */
static void flush_new(job *work, sorted *units, const segment *next, int is_fresh) {
    const size_t k = work->map->n_field_bytes;
    for (size_t start = 0; start < units->n; start += BATCH) {
        const size_t known = units->n - start, n = known < BATCH ? known : BATCH;
        const uint32_t *index = units->index + start, *positions = units->positions + start;
        if (is_fresh) pe_gather(work->map, work->tensor->data, positions, n, known, work->fields);
        for (size_t i = 0; i < n; i++) {
            uint8_t *logged = next->fields + index[i] * k, *field = work->fields + i * k;
            copy_field(is_fresh ? logged : field, is_fresh ? field : logged, k);
            work->gates[i] = next->gates[next->mixes[index[i]]];
        }
        change(work, next->granularity, positions, n, is_fresh ? 0 : known);
    }
    work->n_units += (int64_t)units->n;
    units->n = 0;
}

static void flush_undone(job *work, const segment *old) {
    const size_t k = work->map->n_field_bytes;
    sorted *units = &work->undone;
    for (size_t start = 0; start < units->n; start += BATCH) {
        const size_t known = units->n - start, n = known < BATCH ? known : BATCH;
        for (size_t i = 0; i < n; i++) copy_field(work->fields + i * k, old->fields + units->index[start + i] * k, k);
        pe_scatter(work->map, work->tensor->data, units->positions + start, n, known, work->fields);
    }
    work->n_units += (int64_t)units->n;
    units->n = 0;
}

/* Nothing to undo: the log is filled in place, without a merge. */
static void change_all(job *work, const segment *next) {
    const size_t k = work->map->n_field_bytes;
    const pe_tensor *tensor = work->tensor;
    for (size_t start = 0; start < next->n; start += BATCH) {
        const size_t n = next->n - start < BATCH ? next->n - start : BATCH;
        const uint32_t *positions = next->positions + start;
        uint8_t *base = next->fields + start * k;
        for (size_t i = 0; i < n; i++) work->gates[i] = next->gates[next->mixes[start + i]];
        pe_gather(work->map, tensor->data, positions, n, next->n - start, base);
        pe_scale(tensor->layout, next->granularity, tensor->data, positions, base, work->gates, n, work->fields);
        pe_scatter(work->map, tensor->data, positions, n, 0, work->fields);
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

/* A unit of both: its base field is known from the old log. */
static void add_common(job *work, const segment *old, size_t i, const segment *next, size_t j) {
    const size_t k = work->map->n_field_bytes;
    sorted *units = &work->changed;
    copy_field(next->fields + j * k, old->fields + i * k, k);
    units->index[units->n] = (uint32_t)j;
    units->positions[units->n] = next->positions[j];
    units->n += old->gates[old->mixes[i]] != next->gates[next->mixes[j]];
}

/* Sort units into old, new and common ones until one kind has no more room. Which comes next is anyone's guess, so it is
 * counted and not branched upon, but for common ones. */
static void sort_some(job *work, const segment *old, size_t *old_at, const segment *next, size_t *next_at) {
    sorted *undone = &work->undone, *fresh = &work->fresh;
    size_t i = *old_at, j = *next_at;
    undone->n = fresh->n = work->changed.n = 0;
    for (size_t step = 0; step < SORTED && i < old->n && j < next->n; step++) {
        const uint32_t in_old = old->positions[i], in_next = next->positions[j];
        undone->index[undone->n] = (uint32_t)i;
        undone->positions[undone->n] = in_old;
        fresh->index[fresh->n] = (uint32_t)j;
        fresh->positions[fresh->n] = in_next;
        undone->n += in_old < in_next;
        fresh->n += in_next < in_old;
        if (in_old == in_next) add_common(work, old, i, next, j);
        i += in_old <= in_next;
        j += in_next <= in_old;
    }
    *old_at = i;
    *next_at = j;
}

/* What comes after the first `start` units. */
static segment rest_of(const segment *units, size_t start, size_t n_field_bytes) {
    segment rest = *units;
    rest.n -= start;
    if (start == 0) return rest;
    rest.positions += start;
    rest.mixes += start;
    rest.fields += start * n_field_bytes;
    return rest;
}

/* Both segments of one granularity, or one of them empty. Returns the units written. */
static int64_t merge(job *work, const pe_tensor *tensor, const segment *old, const segment *next) {
    size_t i = 0, j = 0;
    segment old_rest, next_rest;
    work->tensor = tensor;
    work->map = pe_map_of(tensor->layout, next->n ? next->granularity : old->granularity);
    work->n_units = 0;
    while (i < old->n && j < next->n) {
        sort_some(work, old, &i, next, &j);
        flush_undone(work, old);
        flush_new(work, &work->changed, next, 0);
        flush_new(work, &work->fresh, next, 1);
    }
    old_rest = rest_of(old, i, work->map->n_field_bytes);
    next_rest = rest_of(next, j, work->map->n_field_bytes);
    undo_all(work, &old_rest);
    change_all(work, &next_rest);
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
