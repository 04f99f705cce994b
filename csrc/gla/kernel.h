// Gated linear attention (gla): what the bindings and the kernels share. The equation is in lmtrain/ops/gla.py.
//
// A row is cut into pieces: a piece starts at a document's start and then every 16 tokens, so it lies in one document
// and nothing has to be masked. Within a piece the keys are decayed one token after another, side by side for all of
// the piece: products of factors <= 1 in order, so no decay is too strong and none is a difference of large sums.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::gla {

constexpr int64_t kPiece = 16;  // tokens of a piece, at most; the row length of matrices over a piece
constexpr int64_t kKept = 4;    // pieces between the states that the backward keeps

struct Piece {
    int64_t begin, count;
    bool fresh;  // zero state before it
};

// All arrays are contiguous and of one type, fp32, or fp64 if `f64`.
struct Params {
    bool f64;
    int64_t batch, length, heads, key_dim, value_dim;
    const void* v;              // [batch, length, heads, value_dim]
    const void *q, *k, *g;      // [batch, length, heads, key_dim]
    const void* u;              // [heads, key_dim], or null: the read is inclusive
    const void* initial_state;  // [batch, heads, key_dim, value_dim] or null
    const Piece* pieces;
    const int64_t* first;  // [batch + 1]: row b has pieces [first[b], first[b + 1])
    int64_t most_pieces;   // of a row
    void* y;               // forward: as v
    void* final_state;     // as initial_state

    const void* grad_y;      // backward: as v
    const void* grad_final;  // as initial_state
    void *grad_v, *grad_q, *grad_k, *grad_g;
    void* grad_u;        // [batch, heads, key_dim], zero if u is null
    void* grad_initial;  // as initial_state, written even if that is null
};

namespace {  // not shared between units, see vector.h

// Rows of panels are whole vectors of every unit.
inline int64_t whole(int64_t columns) { return (columns + kPiece - 1) / kPiece * kPiece; }

// Elements of scratch, per thread.
inline int64_t window_scratch(const Params& p) {
    return whole(p.key_dim) * (6 * kPiece + 1) + whole(p.value_dim) * kPiece + kPiece * kPiece;
}
inline int64_t forward_scratch(const Params& p) { return window_scratch(p) + p.key_dim * whole(p.value_dim); }
inline int64_t backward_scratch(const Params& p) {
    const int64_t states = p.most_pieces / kKept + 1 + kKept + 1;
    return window_scratch(p) + whole(p.key_dim) * (4 * kPiece + 2) + whole(p.value_dim) * 3 * kPiece +
           kPiece * kPiece + states * p.key_dim * whole(p.value_dim);
}

}  // namespace
}  // namespace lm::gla

// Tasks [from, to), a task being a head of a row; results do not depend on how they are split.
LM_CPU_DECLARE(void, gla_forward, (const lm::gla::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, gla_backward, (const lm::gla::Params&, int64_t from, int64_t to, void* scratch))
