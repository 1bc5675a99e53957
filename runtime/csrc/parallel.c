#define Py_LIMITED_API 0x030B0000
/* A switch in several threads, each with tensors of its own. Python's thread functions serve because they are the same on
 * every system; none of the threads touches a Python object. */
#include <Python.h>

#include "parallel.h"

enum { MAX_THREADS = 64 };

/* What PyThread_start_new_thread returns when it fails; the name for it is not in the limited API. */
static const unsigned long NO_THREAD = (unsigned long)-1;

/* What one thread switches, or touches when there is no `old`. */
typedef struct {
    const pe_tensor *tensors;
    const pe_log *old, *next;
    int32_t first, end;
    pe_counts counts;
    PyThread_type_lock running; /* held until the thread is done; NULL where no thread was started */
} part;

static void work_on(part *share) {
    if (share->old == NULL) pe_touch(share->tensors, share->next, share->first, share->end);
    else share->counts = pe_switch(share->tensors, share->old, share->next, share->first, share->end);
}

static void run_thread(void *share) {
    work_on(share);
    PyThread_release_lock(((part *)share)->running);
}

static int start_thread(part *share) {
    share->running = PyThread_allocate_lock();
    if (share->running == NULL) return -1;
    PyThread_acquire_lock(share->running, WAIT_LOCK);
    if (PyThread_start_new_thread(run_thread, share) != NO_THREAD) return 0;
    PyThread_release_lock(share->running);
    PyThread_free_lock(share->running);
    share->running = NULL;
    return -1;
}

/* How many units `log` has in tensors before `tensor`. */
static int64_t n_units_before(const pe_log *log, int32_t tensor) {
    size_t low = 0, high = log == NULL ? 0 : log->n_segments;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (log->tensors[middle] < tensor) low = middle + 1;
        else high = middle;
    }
    return low == 0 ? 0 : log->starts[low];
}

/* Parts of about as many units each; a tensor is never cut. */
static void divide(part *parts, size_t n, int32_t n_tensors) {
    const pe_log *old = parts[0].old, *next = parts[0].next;
    const int64_t total = n_units_before(old, n_tensors) + n_units_before(next, n_tensors);
    int32_t tensor = 0;
    for (size_t p = 0; p < n; p++) {
        parts[p].first = tensor;
        while (tensor < n_tensors &&
               (p + 1 == n || n_units_before(old, tensor) + n_units_before(next, tensor) < total * (int64_t)(p + 1) / (int64_t)n))
            tensor++;
        parts[p].end = tensor;
    }
}

pe_counts pe_run(const pe_tensor *tensors, int32_t n_tensors, const pe_log *old, const pe_log *next, int n_threads) {
    part parts[MAX_THREADS];
    pe_counts counts = {0, 0, 0};
    const size_t n = n_threads < 1 ? 1 : n_threads > MAX_THREADS ? MAX_THREADS : (size_t)n_threads;
    for (size_t p = 0; p < n; p++) parts[p] = (part){tensors, old, next, 0, 0, {0, 0, 0}, NULL};
    divide(parts, n, n_tensors);
    for (size_t p = 1; p < n; p++)
        if (start_thread(&parts[p]) < 0) work_on(&parts[p]);
    work_on(&parts[0]);
    for (size_t p = 0; p < n; p++) {
        if (parts[p].running != NULL) {
            PyThread_acquire_lock(parts[p].running, WAIT_LOCK);
            PyThread_release_lock(parts[p].running);
            PyThread_free_lock(parts[p].running);
        }
        counts.n_tensors += parts[p].counts.n_tensors;
        counts.n_units += parts[p].counts.n_units;
        counts.n_bytes += parts[p].counts.n_bytes;
    }
    return counts;
}
