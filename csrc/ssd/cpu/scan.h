// What forward and backward have in common: where a piece's tensors lie, its scores, and a step of the state.
#pragma once

#include "simd/panel.h"
#include "simd/tile.h"
#include "ssd/cpu/ahead.h"
#include "ssd/cpu/between.h"
#include "ssd/kernel.h"

namespace {

using namespace lm::ssd;
using lm::Piece;

// Hands out consecutive parts of a thread's scratch.
template <typename T>
struct Scratch {
    T* next;
    T* take(int64_t elements) { return (next += elements) - elements; }
};

// A tensor [batch, length, count, width] at the first token of a piece.
template <typename T, typename Base>
T* at_piece(const Params& p, const Piece& piece, Base* values, int64_t count, int64_t index, int64_t width) {
    return static_cast<T*>(values) + ((piece.row * p.length + piece.begin) * count + index) * width;
}

// The state that enters a piece, or null.
template <typename T>
T* entering(const Params& p, const Piece& piece, int64_t head) {
    if (piece.slot == Piece::kNone) return nullptr;
    const int64_t index = (piece.row * p.slots + piece.slot) * p.heads + head;
    return static_cast<T*>(p.states) + index * p.d_state * padded(p.head_dim);
}

// A state [d_state, padded(head_dim)] from and to a tensor [batch, heads, d_state, head_dim].
template <typename IO, typename T = typename IO::Compute>
void read_state(const Params& p, T* state, const void* from, int64_t row, int64_t head) {
    const int64_t offset = (row * p.heads + head) * p.d_state * p.head_dim;
    pack<IO>(state, padded(p.head_dim), static_cast<const T*>(from) + offset, p.head_dim, p.d_state, p.head_dim);
}

template <typename T>
void write_state(const Params& p, void* to, int64_t row, int64_t head, const T* state) {
    T* out = static_cast<T*>(to) + (row * p.heads + head) * p.d_state * p.head_dim;
    for (int64_t n = 0; n < p.d_state; ++n, out += p.head_dim, state += padded(p.head_dim)) {
        std::memcpy(out, state, p.head_dim * sizeof(T));
    }
}

// out[i, j] = C_i . B_j for j <= i, and for what else lies in the block of j's last column. B and C transposed.
template <typename IO, typename T = typename IO::Compute>
void piece_scores(const Params& p, const Piece& piece, const T* bt, const T* ct, T* out) {
    for (int64_t block = 0; block < piece.count; block += kBlock) {
        const int64_t end = least(block + kBlock, piece.count);
        for_tiles<IO>(block, end, block + kBlock, [&](auto& tile, int64_t i, int64_t j) LM_INLINE {
            tile.add(ct + i, 1, kChunk, bt + j, kChunk, p.d_state);
            tile.store(out + i * kChunk + j, kChunk);
        });
    }
}

// after = decay * before + left^T right, for left [tokens, d_state] and right [tokens, padded(head_dim)]. `before` may
// be null for zero, or `after`. Where the decay is 0 it drops even what is not finite.
template <typename IO, typename Soon, typename T = typename IO::Compute>
void step_state(const Params& p, T* after, const T* before, T decay, const T* left, int64_t left_stride,
                const T* right, int64_t tokens, Soon& ahead) {
    const int64_t width = padded(p.head_dim);
    const bool carry = before != nullptr && decay != 0;
    for_tiles<IO>(0, p.d_state, width, [&](auto& tile, int64_t n, int64_t column) LM_INLINE {
        using Vec = typename IO::Vec;
        ahead.ask();
        tile.add(left + n, 1, left_stride, right + column, width, tokens);
        if (carry) {
            const T* old = before + n * width + column;
            tile.each([&](Vec& value, int r, int c) LM_INLINE {
                value += decay * copy_in<Vec>(old + r * width + c, kLanes<IO>);
            });
        }
        tile.store(after + n * width + column, width);
    });
}

}  // namespace
