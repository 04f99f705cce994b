// What forward and backward have in common: the panels of a piece of one head, its scores, and the triangle they form.
#pragma once

#include "delta/kernel.h"
#include "simd/decay.h"
#include "simd/panel.h"
#include "simd/tile.h"

namespace {

using namespace lm::delta;
using lm::Piece;

template <typename IO>
struct Task {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    using PieceDecay = Decay<IO, kChunk>;
    static constexpr int lanes = kLanes<IO>;

    const Params& p;
    const int64_t key_width = spread(p.keys), width = spread(p.width), state_size = p.keys * width;
    T* next;  // of the scratch
    int64_t row = 0, head = 0;

    T *q, *k, *kt;          // [kChunk, key_width], and k transposed: [keys, kChunk]
    T *by_key, *by_query;   // [kChunk, kChunk]: -D_ij (k_i . k_j) for j < i, D_ij (q_i . k_j) for j <= i, else 0
    alignas(64) T rates[kChunk];

    Task(const Params& params, T* scratch) : p(params), next(scratch) {
        q = take(kChunk * key_width);
        k = take(kChunk * key_width);
        kt = take(kChunk * key_width);
        by_key = take(kChunk * kChunk);
        by_query = take(kChunk * kChunk);
        std::memset(by_key, 0, kChunk * kChunk * sizeof(T));
        std::memset(by_query, 0, kChunk * kChunk * sizeof(T));
    }

    T* take(int64_t elements) { return (next += elements) - elements; }

    void move_to(int64_t task) { row = task / p.heads, head = task % p.heads; }

    // A piece's part of [batch, length, heads, size]; a token's is stride(size) after that of the one before.
    template <typename Base>
    T* at(const Piece& piece, Base* array, int64_t size) const {
        return static_cast<T*>(const_cast<void*>(static_cast<const void*>(array))) +
               ((row * p.length + piece.begin) * p.heads + head) * size;
    }
    int64_t stride(int64_t size) const { return p.heads * size; }

    // State `index` of [batch, heads, count, keys, width].
    int64_t state_at(int64_t index, int64_t count) const {
        return ((row * p.heads + head) * count + index) * p.keys * p.width;
    }
    void read_state(T* to, const void* states, int64_t index = 0, int64_t count = 1) const {
        if (!states) std::memset(to, 0, state_size * sizeof(T));
        else pack<IO>(to, width, static_cast<const T*>(states) + state_at(index, count), p.width, p.keys, p.width);
    }
    void write_state(void* states, const T* from, int64_t index = 0, int64_t count = 1) const {
        T* to = static_cast<T*>(states) + state_at(index, count);
        for (int64_t i = 0; i < p.keys; ++i, to += p.width, from += width) std::memcpy(to, from, p.width * sizeof(T));
    }

    PieceDecay decay_of(const Piece& piece) const {
        const T none = 0;
        const bool gated = p.log_decay != nullptr;
        return PieceDecay(gated ? at(piece, p.log_decay, 1) : &none, gated ? p.heads : 0, piece.count,
                          piece.slot == Piece::kNone);
    }

    void load(const Piece& piece, const PieceDecay& decay) {
        pack<IO>(q, key_width, at(piece, p.q, p.keys), stride(p.keys), piece.count, p.keys);
        pack<IO>(k, key_width, at(piece, p.k, p.keys), stride(p.keys), piece.count, p.keys);
        transpose_padded<IO>(kt, kChunk, k, key_width, piece.count, p.keys);
        for (int64_t i = 0; i < piece.count; ++i) rates[i] = at(piece, p.beta, 1)[i * p.heads];
        DecayRow<IO, kChunk> d;
        for (int64_t block = 0; block < piece.count; block += kBlock) {
            const int64_t end = least(block + kBlock, piece.count), columns = block + kBlock;
            score(k, by_key, block, end);
            score(q, by_query, block, end);
            for (int64_t i = block; i < end; ++i) {
                d.move_to(i, decay);
                for (int64_t j = 0; j < columns; j += lanes) {
                    T *key = by_key + i * kChunk + j, *query = by_query + i * kChunk + j;
                    const Vec row = copy_in<Vec>(d.at + j, lanes), before = d.is(i, j) ? Vec{} : row;
                    copy_out(key, -before * copy_in<Vec>(key, lanes), lanes);
                    copy_out(query, row * copy_in<Vec>(query, lanes), lanes);
                }
            }
        }
    }

    // Rows [block, end) of left k^T, up to the block's last column.
    void score(const T* left, T* out, int64_t block, int64_t end) const {
        for_tiles<IO>(block, end, block + kBlock, [&](auto& tile, int64_t i, int64_t j) LM_INLINE {
            tile.add(left + i * key_width, key_width, 1, kt + j, kChunk, p.keys);
            tile.store(out + i * kChunk + j, kChunk);
        });
    }

    // solved = right + by_key written, written = rate solved, token after token from the first; or with by_key's
    // transpose, from the last. right(tile, r, i, column) adds the right side to a tile whose row r is token i, and
    // whose rows after that are those of the next tokens.
    template <bool BACK, typename Right>
    void solve(int64_t count, T* solved, T* written, const Right& right) const {
        const int64_t first = BACK ? count - 1 : 0, step = BACK ? -1 : 1;
        const int64_t row_stride = BACK ? -1 : kChunk, step_stride = BACK ? -kChunk : 1;
        for_tiles<IO>(0, count, p.width, [&](auto& tile, int64_t r, int64_t column) LM_INLINE {
            const int64_t i = first + step * r;
            right(tile, r, i, column);
            const T* triangle = BACK ? by_key + first * kChunk + i : by_key + i * kChunk;
            tile.add(triangle, row_stride, step_stride, written + first * width + column, step * width, r);
            substitute(tile, by_key + i * kChunk + i, row_stride, step_stride, rates + i, step);
            const auto write = [&](T* to, const T* factor) LM_INLINE {
                tile.each([&](Vec& value, int s, int c) LM_INLINE {
                    const Vec out = factor ? value * factor[step * s] : value;
                    copy_out(to + (i + step * s) * width + column + c, out, lanes);
                });
            };
            write(solved, nullptr);
            write(written, rates + i);
        });
    }

    // The tile's own triangle: each row, times its rate, acts on those below it.
    template <int ROWS, int VECS>
    static LM_INLINE void substitute(Tile<IO, ROWS, VECS>& tile, const T* triangle, int64_t row_stride,
                                     int64_t step_stride, const T* rate, int64_t step) {
#pragma GCC unroll 8
        for (int s = 0; s < ROWS; ++s) {
            Vec acts[VECS];
#pragma GCC unroll 2
            for (int v = 0; v < VECS; ++v) acts[v] = rate[step * s] * tile.at[s][v];
#pragma GCC unroll 8
            for (int r = s + 1; r < ROWS; ++r) {
#pragma GCC unroll 2
                for (int v = 0; v < VECS; ++v) tile.at[r][v] += triangle[r * row_stride + s * step_stride] * acts[v];
            }
        }
    }
};

template <template <typename> class Kernel, typename IO>
void run_tasks(const Params& p, int64_t from, int64_t to, void* scratch) {
    Kernel<IO> kernel(p, static_cast<typename IO::Compute*>(scratch));
    for (int64_t task = from; task < to; ++task) {
        kernel.move_to(task);
        kernel.run();
    }
}

}  // namespace
