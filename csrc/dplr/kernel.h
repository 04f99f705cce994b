// Diagonal plus low rank (dplr): what the bindings and the kernels share. The equation is in lmtrain/ops/dplr.py.
//
// Columns of a state do not act on one another. A head of a row is one task; it takes a block of columns, which then
// stay in the cache, through the tokens one after another. The forward keeps the state before every piece of kPiece
// tokens; the backward computes those within a piece again.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::dplr {

constexpr int64_t kPiece = 32;
constexpr int64_t kColumns = 64;  // of a block, at most, in any unit

// All arrays are contiguous and of one type, fp32, or fp64 if `f64`.
struct Params {
    bool f64;
    int64_t batch, length, heads, keys, width;
    const void* v;                           // [batch, length, heads, width]
    const void *r, *decay, *k, *a, *b;       // [batch, length, heads, keys]
    const bool* starts;                      // [batch, length] or null
    const void* initial_state;               // [batch, heads, keys, width] or null
    void* y;                                 // forward: as v
    void* final_state;                       // [batch, heads, keys, width]
    void* kept;                              // [batch, heads, pieces(p), keys, width], read by the backward

    const void* grad_y;                      // backward: as v
    const void* grad_final;                  // as final_state
    void *grad_v, *grad_r, *grad_decay, *grad_k, *grad_a, *grad_b;
    void* grad_initial;                      // as final_state, written even if there is none
};

namespace {  // not shared between units, see simd/vector.h

inline int64_t pieces(const Params& p) { return (p.length + kPiece - 1) / kPiece; }

// Elements of scratch, per thread.
inline int64_t forward_scratch(const Params& p) { return p.keys * kColumns; }
inline int64_t backward_scratch(const Params& p) {
    const int64_t states = (kPiece + 2) * p.keys * kColumns, reads = kPiece * kColumns;
    return states + reads + 5 * ((p.keys + 15) / 16 * 16) * 16;
}

}  // namespace
}  // namespace lm::dplr

// Tasks [from, to), a head of a row each; results do not depend on how they are split.
LM_CPU_DECLARE(void, dplr_forward, (const lm::dplr::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, dplr_backward, (const lm::dplr::Params&, int64_t from, int64_t to, void* scratch))
