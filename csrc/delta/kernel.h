// The delta rule (delta): what the bindings and the kernels share. The equation is in lmtrain/ops/delta.py.
//
// A head of a row is one task that takes its tokens one after another: R = decay S, wrong = v - R^T k,
// S' = R + beta k wrong^T, y = S'^T q. The backward keeps the state before every piece of kPiece tokens, and the states
// within one piece.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::delta {

constexpr int64_t kPiece = 32;

// All arrays are contiguous and of one type, fp32, or fp64 if `f64`.
struct Params {
    bool f64;
    int64_t batch, length, heads, keys, width;
    int64_t decays;             // per token and head: 0, 1 or keys
    const void* v;              // [batch, length, heads, width]
    const void *q, *k;          // [batch, length, heads, keys]
    const void* beta;           // [batch, length, heads]
    const void* decay;          // [batch, length, heads, decays], null if that is 0
    const bool* starts;         // [batch, length] or null
    const void* initial_state;  // [batch, heads, keys, width] or null
    void* y;                    // forward: as v
    void* final_state;          // [batch, heads, keys, width]

    const void* grad_y;      // backward: as v
    const void* grad_final;  // as final_state
    void *grad_v, *grad_q, *grad_k, *grad_beta, *grad_decay;
    void* grad_initial;  // as final_state, written even if there is none
};

namespace {  // not shared between units, see simd/vector.h

// Rows of states are whole vectors of every unit.
inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// Elements of scratch, per thread.
inline int64_t forward_scratch(const Params& p) { return (p.keys + 1) * padded(p.width) + p.keys; }
inline int64_t backward_scratch(const Params& p) {
    const int64_t pieces = (p.length + kPiece - 1) / kPiece;
    const int64_t lines = 2 * padded(p.width) + 3 * 16 * p.keys;
    return ((pieces + kPiece + 2) * p.keys + kPiece) * padded(p.width) + lines;
}

}  // namespace
}  // namespace lm::delta

// Tasks [from, to), a head of a row each; results do not depend on how they are split.
LM_CPU_DECLARE(void, delta_forward, (const lm::delta::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, delta_backward, (const lm::delta::Params&, int64_t from, int64_t to, void* scratch))
