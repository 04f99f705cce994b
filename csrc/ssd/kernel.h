// State-space duality (ssd): what the bindings and the kernels share. The equation is in lmtrain/ops/ssd.py.
//
// A row is cut into pieces: a piece starts at a document's start and then every `chunk` tokens, so it lies in one
// document and nothing has to be masked. Within a piece, with D_ij = e^{log_a summed over (j, i]}:
//
//   y_i = sum_{j <= i} D_ij (C_i . B_j) x_j + e^{log_a up to i} S^T C_i       S' = e^{log_a of the piece} S + ...
//
// S enters a piece and S' leaves it, if the piece before, or the next, belongs to the same document.
#pragma once

#include <cstdint>

#include "simd/block.h"
#include "simd/piece.h"
#include "simd/unit.h"

namespace lm::ssd {

constexpr int64_t kChunk = 64;  // tokens of a piece, at most; the row length of matrices over a piece
// Heads of a group that the backward takes together: the gradients of B and C are summed once for all. The larger
// number where it leaves a row kTasks tasks; never by batch or threads, for it is an order of summation.
constexpr int64_t kHeads = 8, kFewHeads = 4, kTasks = 8;
// Heads that a thread takes together, at most: B and C are read once for all. With more their states would fall out of
// the cache.
constexpr int64_t kMostHeads = 16;

// All arrays are contiguous and of one type, fp32, or fp64 if `f64`.
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
    int64_t slots;              // at most so many states enter pieces of a row
    void* states;               // [batch, slots, heads, d_state, padded(head_dim)]: those; others are zero
    void* y;                    // as x
    void* final_state;          // as initial_state

    const void* grad_y;         // backward: as x
    const void* grad_final;     // as initial_state
    void *grad_x, *grad_log_a;  // as x, as log_a
    void *grad_b, *grad_c;      // [blocks(p), batch, length, groups, d_state]: to be summed over blocks of heads
    void* grad_initial;         // as initial_state, written even if that is null
};

namespace {  // not shared between units, see simd/vector.h

// Heads of a block, and blocks in a group.
inline int64_t block_heads(const Params& p) {
    const int64_t tasks = p.groups * ((p.heads / p.groups + kHeads - 1) / kHeads);
    return tasks >= kTasks ? kHeads : kFewHeads;
}
inline int64_t blocks(const Params& p) { return (p.heads / p.groups + block_heads(p) - 1) / block_heads(p); }

// Elements of scratch, per thread.
inline int64_t forward_scratch(const Params& p) {
    return p.d_state * padded(p.head_dim) + kChunk * (padded(p.head_dim) + 2 * p.d_state + 2 * kChunk);
}
inline int64_t backward_scratch(const Params& p) {
    const int64_t all = blocks(p) * block_heads(p), heads = all < kMostHeads ? all : kMostHeads;
    const int64_t grad_states = heads * p.d_state * padded(p.head_dim);
    const int64_t values = padded(p.head_dim) + 2 * p.head_dim, keys = 2 * padded(p.d_state) + 4 * p.d_state;
    return grad_states + kChunk * (values + keys + 3 * kChunk + kBlock);
}

}  // namespace
}  // namespace lm::ssd

// Tasks [from, to); results do not depend on how they are split. Forward: one per row and head. Backward: one per row,
// group and block of heads, the blocks fastest.
LM_CPU_DECLARE(void, ssd_forward, (const lm::ssd::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, ssd_backward, (const lm::ssd::Params&, int64_t from, int64_t to, void* scratch))
