#define Py_LIMITED_API 0x030B0000
/* Python's door to the editing core: buffers in, checks, the GIL released while memory is edited. See _kernels.pyi. */
#include <Python.h>

#include <stdlib.h>

#include "kernels.h"
#include "parallel.h"

#define LAYOUT_NAME "persona_edge.layout"
#define TENSORS_NAME "persona_edge.tensors"
#define PLAN_NAME "persona_edge.plan"

/* Borrow `object`'s contiguous memory as items of `itemsize`; 0, or -1 with an exception set. */
static int borrow(PyObject *object, Py_buffer *view, int writable, Py_ssize_t itemsize, const char *what) {
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_CONTIG : PyBUF_CONTIG_RO) < 0) return -1;
    if (view->itemsize == itemsize && (uintptr_t)view->buf % (size_t)itemsize == 0) return 0;
    PyBuffer_Release(view);
    PyErr_Format(PyExc_ValueError, "%s: expected aligned items of %zd bytes", what, itemsize);
    return -1;
}

static size_t n_items(const Py_buffer *view) { return (size_t)(view->len / view->itemsize); }

static void release(Py_buffer *views, size_t n) {
    for (size_t i = 0; i < n; i++) PyBuffer_Release(&views[i]);
}

/* ---- layouts ---- */

static void free_layout(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, LAYOUT_NAME)); }

static PyObject *layout(PyObject *module, PyObject *words) {
    Py_buffer view;
    pe_layout *parsed;
    PyObject *capsule;
    int failed;
    (void)module;
    if (borrow(words, &view, 0, sizeof(int32_t), "words") < 0) return NULL;
    parsed = malloc(sizeof *parsed);
    failed = parsed != NULL && pe_layout_parse(parsed, view.buf, n_items(&view)) < 0;
    PyBuffer_Release(&view);
    if (parsed == NULL) return PyErr_NoMemory();
    if (failed) return free(parsed), PyErr_SetString(PyExc_ValueError, "not a valid layout"), NULL;
    capsule = PyCapsule_New(parsed, LAYOUT_NAME, free_layout);
    if (capsule == NULL) free(parsed);
    return capsule;
}

/* ---- gather, scatter, scale ---- */

enum { DATA, POSITIONS, FIELDS, GATES, OUT, N_VIEWS };

/* What the three primitives share: the layout's map and views that have been checked against each other. */
typedef struct {
    const pe_layout *layout;
    const pe_map *map;
    int granularity;
    Py_buffer views[N_VIEWS];
    size_t n_views, n;
} units;

static int check_units(const units *call) {
    const uint32_t *positions = call->views[POSITIONS].buf;
    const uint64_t limit = pe_n_units(call->map, (size_t)call->views[DATA].len);
    const size_t n_fields = call->n * call->map->n_field_bytes;
    uint32_t outside = 0;
    for (size_t i = 0; i < call->n; i++) outside |= positions[i] >= limit;
    if (outside) return PyErr_SetString(PyExc_ValueError, "positions exceed the tensor"), -1;
    if ((size_t)call->views[FIELDS].len != n_fields) return PyErr_SetString(PyExc_ValueError, "fields have the wrong size"), -1;
    if (call->n_views <= GATES) return 0;
    if (n_items(&call->views[GATES]) != call->n || (size_t)call->views[OUT].len != n_fields)
        return PyErr_SetString(PyExc_ValueError, "gates or output have the wrong size"), -1;
    for (size_t i = 0; i < call->n; i++)
        if (!pe_is_finite(((const float *)call->views[GATES].buf)[i]))
            return PyErr_SetString(PyExc_ValueError, "a gate is not finite"), -1;
    return 0;
}

/* Arguments: layout, granularity, data, positions, fields[, gates, out]. `writable` is a set of views. */
static int open_units(units *call, PyObject *args, size_t n_views, unsigned writable) {
    static const Py_ssize_t sizes[N_VIEWS] = {1, sizeof(uint32_t), 1, sizeof(float), 1};
    static const char *const names[N_VIEWS] = {"data", "positions", "fields", "gates", "out"};
    PyObject *capsule, *objects[N_VIEWS] = {NULL};
    if (!PyArg_ParseTuple(args, n_views == N_VIEWS ? "OiOOOOO" : "OiOOO", &capsule, &call->granularity, &objects[DATA],
                          &objects[POSITIONS], &objects[FIELDS], &objects[GATES], &objects[OUT]))
        return -1;
    call->layout = PyCapsule_GetPointer(capsule, LAYOUT_NAME);
    if (call->layout == NULL) return -1;
    call->map = pe_map_of(call->layout, call->granularity);
    if (call->map == NULL) return PyErr_SetString(PyExc_ValueError, "granularity must be 1 or 32"), -1;
    for (call->n_views = 0; call->n_views < n_views; call->n_views++) {
        const size_t v = call->n_views;
        if (borrow(objects[v], &call->views[v], (int)(writable >> v & 1), sizes[v], names[v]) < 0) break;
    }
    if (call->n_views == n_views) {
        call->n = n_items(&call->views[POSITIONS]);
        if (check_units(call) == 0) return 0;
    }
    release(call->views, call->n_views);
    return -1;
}

static PyObject *gather(PyObject *module, PyObject *args) {
    units call;
    (void)module;
    if (open_units(&call, args, GATES, 1u << FIELDS) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    pe_gather(call.map, call.views[DATA].buf, call.views[POSITIONS].buf, call.n, call.n, call.views[FIELDS].buf);
    Py_END_ALLOW_THREADS
    release(call.views, call.n_views);
    Py_RETURN_NONE;
}

static PyObject *scatter(PyObject *module, PyObject *args) {
    units call;
    (void)module;
    if (open_units(&call, args, GATES, 1u << DATA) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    pe_scatter(call.map, call.views[DATA].buf, call.views[POSITIONS].buf, call.n, call.n, call.views[FIELDS].buf);
    Py_END_ALLOW_THREADS
    release(call.views, call.n_views);
    Py_RETURN_NONE;
}

static PyObject *scale(PyObject *module, PyObject *args) {
    units call;
    (void)module;
    if (open_units(&call, args, N_VIEWS, 1u << OUT) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    pe_scale(call.layout, call.granularity, call.views[DATA].buf, call.views[POSITIONS].buf, call.views[FIELDS].buf,
             call.views[GATES].buf, call.n, call.views[OUT].buf);
    Py_END_ALLOW_THREADS
    release(call.views, call.n_views);
    Py_RETURN_NONE;
}

/* ---- tensors ---- */

/* Holds on to the memory of a model's tensors, so that it can neither move nor go while the capsule lives. */
typedef struct {
    size_t n;
    pe_tensor *tensors;
    Py_buffer *views;
    PyObject *layouts; /* the tuple that keeps them alive */
} tensor_set;

static void close_tensors(tensor_set *set) {
    release(set->views, set->n);
    free(set->tensors);
    free(set->views);
    Py_DecRef(set->layouts);
    free(set);
}

static void free_tensors(PyObject *capsule) { close_tensors(PyCapsule_GetPointer(capsule, TENSORS_NAME)); }

static int add_tensor(tensor_set *set, PyObject *capsule, PyObject *data) {
    pe_tensor *tensor = &set->tensors[set->n];
    Py_buffer *view = &set->views[set->n];
    tensor->layout = capsule == NULL ? NULL : PyCapsule_GetPointer(capsule, LAYOUT_NAME);
    if (tensor->layout == NULL || data == NULL || borrow(data, view, 1, 1, "tensor") < 0) return -1;
    tensor->data = view->buf;
    tensor->n_bytes = (size_t)view->len;
    set->n++;
    return 0;
}

/* tensors(layouts: tuple, data: tuple) -> capsule */
static PyObject *tensors(PyObject *module, PyObject *args) {
    PyObject *layouts, *data, *capsule;
    tensor_set *set;
    Py_ssize_t n;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O!", &PyTuple_Type, &layouts, &PyTuple_Type, &data)) return NULL;
    n = PyTuple_Size(layouts);
    if (PyTuple_Size(data) != n) return PyErr_SetString(PyExc_ValueError, "as many layouts as tensors, please"), NULL;
    set = calloc(1, sizeof *set);
    if (set == NULL) return PyErr_NoMemory();
    set->tensors = calloc((size_t)n + 1, sizeof *set->tensors);
    set->views = calloc((size_t)n + 1, sizeof *set->views);
    Py_IncRef(layouts);
    set->layouts = layouts;
    if (set->tensors == NULL || set->views == NULL) return close_tensors(set), PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n; i++)
        if (add_tensor(set, PyTuple_GetItem(layouts, i), PyTuple_GetItem(data, i)) < 0) return close_tensors(set), NULL;
    capsule = PyCapsule_New(set, TENSORS_NAME, free_tensors);
    if (capsule == NULL) close_tensors(set);
    return capsule;
}

/* ---- plans ---- */

enum { TENSORS, GRANULARITIES, STARTS, FIELD_STARTS, UNIT_POSITIONS, MIXES, UNIT_GATES, N_ARRAYS };

/* A plan that fits its tensors. Holds on to both; the arrays must not change any more. */
typedef struct {
    PyObject *tensors; /* the capsule */
    const tensor_set *set;
    Py_buffer views[N_ARRAYS];
    pe_log log; /* without fields and filled, but with n_field_bytes as many as a log needs */
} bound_plan;

static void free_plan(PyObject *capsule) {
    bound_plan *plan = PyCapsule_GetPointer(capsule, PLAN_NAME);
    release(plan->views, N_ARRAYS);
    Py_DecRef(plan->tensors);
    free(plan);
}

static int borrow_plan(bound_plan *plan, PyObject *arrays) {
    static const Py_ssize_t sizes[N_ARRAYS] = {4, 4, 8, 8, 4, 2, 4};
    Py_buffer *views = plan->views;
    size_t n;
    if (!PyTuple_Check(arrays) || PyTuple_Size(arrays) != N_ARRAYS)
        return PyErr_Format(PyExc_TypeError, "a plan is a tuple of %d arrays", (int)N_ARRAYS), -1;
    for (n = 0; n < N_ARRAYS; n++)
        if (borrow(PyTuple_GetItem(arrays, (Py_ssize_t)n), &views[n], 0, sizes[n], "plan") < 0) break;
    if (n < N_ARRAYS) return release(views, n), -1;
    plan->log = (pe_log){n_items(&views[TENSORS]), n_items(&views[UNIT_POSITIONS]), n_items(&views[UNIT_GATES]), 0,
                         views[TENSORS].buf, views[GRANULARITIES].buf, views[STARTS].buf, views[FIELD_STARTS].buf,
                         views[UNIT_POSITIONS].buf, views[MIXES].buf, views[UNIT_GATES].buf, NULL, NULL};
    if (n_items(&views[GRANULARITIES]) == plan->log.n_segments && n_items(&views[MIXES]) == plan->log.n_units &&
        n_items(&views[STARTS]) == plan->log.n_segments + 1 && n_items(&views[FIELD_STARTS]) == plan->log.n_segments + 1) {
        const int64_t n_field_bytes = plan->log.field_starts[plan->log.n_segments];
        plan->log.n_field_bytes = n_field_bytes < 0 ? 0 : (size_t)n_field_bytes;
        return 0;
    }
    release(views, N_ARRAYS);
    return PyErr_SetString(PyExc_ValueError, "a plan's arrays differ in length"), -1;
}

/* plan(tensors, arrays: tuple) -> capsule */
static PyObject *plan(PyObject *module, PyObject *args) {
    PyObject *tensors_capsule, *arrays, *capsule;
    const char *error;
    bound_plan *bound;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO", &tensors_capsule, &arrays)) return NULL;
    bound = calloc(1, sizeof *bound);
    if (bound == NULL) return PyErr_NoMemory();
    bound->set = PyCapsule_GetPointer(tensors_capsule, TENSORS_NAME);
    if (bound->set == NULL || borrow_plan(bound, arrays) < 0) return free(bound), NULL;
    Py_BEGIN_ALLOW_THREADS
    error = pe_plan_error(bound->set->tensors, bound->set->n, &bound->log);
    Py_END_ALLOW_THREADS
    capsule = error == NULL ? PyCapsule_New(bound, PLAN_NAME, free_plan) : NULL;
    if (capsule == NULL) {
        if (error != NULL) PyErr_SetString(PyExc_ValueError, error);
        release(bound->views, N_ARRAYS);
        return free(bound), NULL;
    }
    Py_IncRef(tensors_capsule);
    bound->tensors = tensors_capsule;
    return capsule;
}

/* ---- switch ---- */

enum { FIELDS_OF_LOG, FILLED_OF_LOG, N_LOG_VIEWS };

/* A plan with its log's buffers. On success the views are to be released. */
static int open_log(pe_log *log, Py_buffer *views, const bound_plan *bound, PyObject *fields, PyObject *filled) {
    if (borrow(fields, &views[FIELDS_OF_LOG], 1, 1, "fields") < 0) return -1;
    if (borrow(filled, &views[FILLED_OF_LOG], 1, 8, "filled") < 0) return release(views, 1), -1;
    *log = bound->log;
    log->fields = views[FIELDS_OF_LOG].buf;
    log->filled = views[FILLED_OF_LOG].buf;
    if (n_items(&views[FIELDS_OF_LOG]) < log->n_field_bytes || n_items(&views[FILLED_OF_LOG]) != log->n_segments)
        PyErr_SetString(PyExc_ValueError, "a log does not fit its plan");
    else if (pe_filled_error(log) != NULL) PyErr_SetString(PyExc_ValueError, pe_filled_error(log));
    else return 0;
    release(views, N_LOG_VIEWS);
    return -1;
}

/* switch(old plan, its fields, its filled, new plan, its fields, its filled, threads) -> (n_tensors, n_units, n_bytes) */
static PyObject *switch_(PyObject *module, PyObject *args) {
    PyObject *old_capsule, *old_fields, *old_filled, *new_capsule, *new_fields, *new_filled;
    Py_buffer old_views[N_LOG_VIEWS], new_views[N_LOG_VIEWS];
    const bound_plan *old_plan, *new_plan;
    int n_threads;
    pe_counts counts;
    pe_log old, next;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOOOi", &old_capsule, &old_fields, &old_filled, &new_capsule, &new_fields, &new_filled,
                          &n_threads))
        return NULL;
    old_plan = PyCapsule_GetPointer(old_capsule, PLAN_NAME);
    new_plan = old_plan == NULL ? NULL : PyCapsule_GetPointer(new_capsule, PLAN_NAME);
    if (new_plan == NULL) return NULL;
    if (old_plan->set != new_plan->set) return PyErr_SetString(PyExc_ValueError, "plans of different tensors"), NULL;
    if (open_log(&old, old_views, old_plan, old_fields, old_filled) < 0) return NULL;
    if (open_log(&next, new_views, new_plan, new_fields, new_filled) < 0) return release(old_views, N_LOG_VIEWS), NULL;
    Py_BEGIN_ALLOW_THREADS
    counts = pe_run(new_plan->set->tensors, (int32_t)new_plan->set->n, &old, &next, n_threads);
    Py_END_ALLOW_THREADS
    release(old_views, N_LOG_VIEWS);
    release(new_views, N_LOG_VIEWS);
    return Py_BuildValue("(LLL)", (long long)counts.n_tensors, (long long)counts.n_units, (long long)counts.n_bytes);
}

/* touch(plan, threads) */
static PyObject *touch(PyObject *module, PyObject *args) {
    PyObject *capsule;
    const bound_plan *bound;
    int n_threads;
    (void)module;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &n_threads)) return NULL;
    bound = PyCapsule_GetPointer(capsule, PLAN_NAME);
    if (bound == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    pe_run(bound->set->tensors, (int32_t)bound->set->n, NULL, &bound->log, n_threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* ---- compositions ---- */

enum { UNITED, SETS, N_OUTPUTS, MAX_RUNS = 64 };

/* The runs' positions; returns how many views were borrowed, all but for an error. */
static size_t borrow_runs(pe_sorted *runs, Py_buffer *views, PyObject *arrays, const Py_buffer *bits, size_t n) {
    for (size_t r = 0; r < n; r++) {
        if (borrow(PyTuple_GetItem(arrays, (Py_ssize_t)r), &views[r], 0, sizeof(uint32_t), "positions") < 0) return r;
        runs[r] = (pe_sorted){views[r].buf, n_items(&views[r]), ((const uint64_t *)bits->buf)[r]};
    }
    return n;
}

/* The union, into outputs that are known to be writable; -1 with an exception set. */
static int64_t unite_into(PyObject *arrays, const Py_buffer *bits, const Py_buffer *outputs) {
    pe_sorted runs[MAX_RUNS];
    Py_buffer views[MAX_RUNS];
    const size_t n_runs = (size_t)PyTuple_Size(arrays);
    size_t n_borrowed, room = 0;
    int64_t n = -1;
    if (n_runs > MAX_RUNS || n_items(bits) != n_runs) return PyErr_SetString(PyExc_ValueError, "too many runs"), -1;
    n_borrowed = borrow_runs(runs, views, arrays, bits, n_runs);
    for (size_t r = 0; r < n_borrowed; r++) room += runs[r].n;
    if (n_borrowed == n_runs) {
        if (n_items(&outputs[UNITED]) >= room && n_items(&outputs[SETS]) >= room)
            n = pe_unite(runs, n_runs, outputs[UNITED].buf, outputs[SETS].buf);
        if (n < 0) PyErr_SetString(PyExc_ValueError, "positions are not ascending, or have no room");
    }
    release(views, n_borrowed);
    return n;
}

/* unite(runs: tuple, bits, positions, sets) -> how many */
static PyObject *unite(PyObject *module, PyObject *args) {
    PyObject *arrays, *bits_array, *objects[N_OUTPUTS];
    Py_buffer bits, outputs[N_OUTPUTS];
    int64_t n = -1;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!OOO", &PyTuple_Type, &arrays, &bits_array, &objects[UNITED], &objects[SETS])) return NULL;
    if (borrow(bits_array, &bits, 0, sizeof(uint64_t), "bits") < 0) return NULL;
    if (borrow(objects[UNITED], &outputs[UNITED], 1, sizeof(uint32_t), "positions") == 0) {
        if (borrow(objects[SETS], &outputs[SETS], 1, sizeof(uint64_t), "sets") == 0) {
            n = unite_into(arrays, &bits, outputs);
            release(&outputs[SETS], 1);
        }
        release(&outputs[UNITED], 1);
    }
    release(&bits, 1);
    return n < 0 ? NULL : PyLong_FromLongLong(n);
}

static PyMethodDef METHODS[] = {
    {"layout", layout, METH_O, "layout(words) -> capsule"},
    {"tensors", tensors, METH_VARARGS, "tensors(layouts, data) -> capsule"},
    {"gather", gather, METH_VARARGS, "gather(layout, granularity, data, positions, fields)"},
    {"scatter", scatter, METH_VARARGS, "scatter(layout, granularity, data, positions, fields)"},
    {"scale", scale, METH_VARARGS, "scale(layout, granularity, data, positions, fields, gates, out)"},
    {"plan", plan, METH_VARARGS, "plan(tensors, arrays) -> capsule"},
    {"switch", switch_, METH_VARARGS,
     "switch(old plan, fields, filled, new plan, fields, filled, threads) -> (n_tensors, n_units, n_bytes)"},
    {"unite", unite, METH_VARARGS, "unite(runs, bits, positions, sets) -> how many"},
    {"touch", touch, METH_VARARGS, "touch(plan, threads)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_kernels", "The editing kernels in C; use persona_edge.runtime.kernels.", -1, METHODS,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&MODULE); }
