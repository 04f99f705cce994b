// The delta rule (delta) with a scalar decay or none: what the bindings and the kernels share. The equation is in
// lmtrain/ops/delta.py.
//
// A row is cut into pieces, each in one document. With S the state that enters a piece and S' the one that leaves it,
// D_ij = e^{log decay summed over (j, i]} and enter, leave those from and to the piece's borders:
//
//   wrong_i = v_i - enter_i S^T k_i - sum_{j < i} D_ij (k_i . k_j) u_j            u_i = beta_i wrong_i
//   y_i     = enter_i S^T q_i + sum_{j <= i} D_ij (q_i . k_j) u_j
//   S'      = e^{all} S + sum_j leave_j k_j u_j^T
//
// The first is a unit lower triangle, solved by substitution (arXiv 2406.06484, 2412.06464). The forward keeps `wrong`
// and the states that enter pieces.
#pragma once

#include <cstdint>

#include "simd/piece.h"
#include "simd/unit.h"

namespace lm::delta {

constexpr int64_t kChunk = 32;  // tokens of a piece, at most; the row length of matrices over a piece

// All arrays are contiguous and of one type, fp32, or fp64 if `f64`.
struct Params {
    bool f64;
    int64_t batch, length, heads, keys, width;
    const void* v;              // [batch, length, heads, width]
    const void *q, *k;          // [batch, length, heads, keys]
    const void* beta;           // [batch, length, heads]
    const void* log_decay;      // as beta, or null
    const void* initial_state;  // [batch, heads, keys, width] or null
    const Piece* pieces;        // in order of row and begin
    const int64_t* first;       // [batch + 1]: row b has pieces [first[b], first[b + 1])
    void* y;                    // forward: as v
    void* final_state;          // [batch, heads, keys, width]
    void* wrong;                // as v; read by the backward
    void* entering;             // [batch, heads, slots(length), keys, width]; read by the backward

    const void* grad_y;         // backward: as v
    const void* grad_final;     // as final_state
    void *grad_v, *grad_q, *grad_k, *grad_beta, *grad_log_decay;
    void* grad_initial;         // as final_state, written even if there is none
};

namespace {  // not shared between units, see simd/vector.h

// States that can enter pieces of a row: documents' first pieces but the row's have none.
inline int64_t slots(int64_t length) { return length / kChunk + 1; }

// Elements of scratch, per thread: panels of up to kChunk tokens or a state, with rows of whole vectors.
inline int64_t row_length(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }
inline int64_t forward_scratch(const Params& p) {
    const int64_t keys = row_length(p.keys), values = row_length(p.width);
    return kChunk * (3 * keys + 2 * values + 2 * kChunk) + p.keys * values;
}
inline int64_t backward_scratch(const Params& p) {
    const int64_t keys = row_length(p.keys), values = row_length(p.width), state = keys * values;
    return kChunk * (3 * keys + 5 * values + 4 * kChunk + 2 * 16) + 4 * state;
}

}  // namespace
}  // namespace lm::delta

// Tasks [from, to), a head of a row each; results do not depend on how they are split.
LM_CPU_DECLARE(void, delta_forward, (const lm::delta::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, delta_backward, (const lm::delta::Params&, int64_t from, int64_t to, void* scratch))
