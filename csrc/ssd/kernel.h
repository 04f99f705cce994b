// State-space duality (ssd): what the bindings and the kernels share. The equation is in lmtrain/ops/ssd.py.
//
// A row is cut into pieces: a piece starts at a document's start and then every `chunk` tokens, so it lies in one
// document and nothing has to be masked. Within a piece, with D_ij = e^{log_a summed over (j, i]}:
//
//   y_i = sum_{j <= i} D_ij (C_i . B_j) x_j + e^{log_a up to i} S^T C_i       S' = e^{log_a of the piece} S + ...
//
// S enters a piece and S' leaves it, through a slot if the next piece belongs to the same document.
#pragma once

#include <cstdint>

#include "common/cpu_unit.h"

namespace lm::ssd {

constexpr int64_t kChunk = 64;  // tokens of a piece, at most; the row length of matrices over a piece
constexpr int64_t kBlock = 16;  // rows of a triangular matrix that are computed to the same column
constexpr int64_t kNone = -1;

struct Piece {
    int64_t row, begin, count;
    int64_t in, out;  // the slots of the states before and after it; kNone: zero before, not needed after
};

// All arrays are contiguous and of one type, fp32, or fp64 if `f64`. Slot b is the state after row b.
struct Params {
    bool f64;
    int64_t batch, length, heads, head_dim, groups, d_state;
    const void* x;              // [batch, length, heads, head_dim]
    const void* log_a;          // [batch, length, heads]
    const void* b;              // [batch, length, groups, d_state]
    const void* c;              // [batch, length, groups, d_state]
    const void* initial_state;  // [batch, heads, d_state, head_dim] or null
    const Piece* pieces;        // in order of row and begin
    const int64_t* first;       // [batch + 1]: row b has pieces [first[b], first[b + 1])
    void* states;               // forward: [batch, heads, d_state, padded(head_dim)]; backward: [slots, heads, ...]
    void* y;                    // forward: as x
    void* final_state;          // as initial_state

    const void* grad_y;      // backward: as x
    const void* grad_final;  // as initial_state
    void* grad_states;       // as states
    void *grad_x, *grad_log_a, *grad_b, *grad_c;
    void* grad_initial;  // as initial_state, written even if that is null
};

namespace {  // not shared between units, see vector.h

// Rows of panels are whole vectors of every unit.
inline int64_t padded(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

// Elements of scratch, per thread.
inline int64_t forward_scratch(const Params& p) { return kChunk * (padded(p.head_dim) + p.d_state + 2 * kChunk); }
inline int64_t chain_scratch(const Params& p) { return kChunk * padded(p.head_dim); }
inline int64_t backward_scratch(const Params& p) {
    return kChunk * (padded(p.head_dim) + 2 * p.head_dim + 2 * padded(p.d_state) + 4 * p.d_state + 3 * kChunk);
}

}  // namespace
}  // namespace lm::ssd

// Tasks [from, to); results do not depend on how they are split. A task is a head of a row, or a group of a piece.
LM_CPU_DECLARE(void, ssd_forward, (const lm::ssd::Params&, int64_t from, int64_t to, void* scratch))
// The backward: first, by head, the states before pieces and their gradients; then all else, by group.
LM_CPU_DECLARE(void, ssd_chain, (const lm::ssd::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, ssd_backward, (const lm::ssd::Params&, int64_t from, int64_t to, void* scratch))
