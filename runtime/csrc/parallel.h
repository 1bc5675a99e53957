/* Switching in several threads; see parallel.c. */
#ifndef PERSONA_EDGE_PARALLEL_H
#define PERSONA_EDGE_PARALLEL_H

#include "kernels.h"

/* pe_switch over all tensors, or pe_touch of `next` where `old` is NULL, in up to `n_threads` threads. Returns when all are
 * done. Needs no GIL. */
pe_counts pe_run(const pe_tensor *tensors, int32_t n_tensors, const pe_log *old, const pe_log *next, int n_threads);

#endif
