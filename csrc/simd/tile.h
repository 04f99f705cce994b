// Matrix products in registers: a tile of the result is accumulated over all steps, then handed to its user.
#pragma once

#include "simd/vector.h"

#define LM_INLINE __attribute__((always_inline))

namespace {

// 2 vectors wide: 16 accumulators of 32 registers, or 12 of 16; at least 8 are in flight on two FMA units.
constexpr int kTileRows = LM_LANES == 16 ? 8 : 6;

template <typename IO, int ROWS, int VECS>
struct Tile {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>, vectors = VECS, rows = ROWS;
    Vec at[ROWS][VECS] = {};

    // += A B. A's element (row, step) is a[row * row_stride + step * step_stride]; B's rows are `ldb` apart.
    LM_INLINE void add(const T* a, int64_t row_stride, int64_t step_stride, const T* b, int64_t ldb, int64_t steps) {
        for (int64_t step = 0; step < steps; ++step, a += step_stride, b += ldb) {
            Vec right[VECS];
#pragma GCC unroll 2
            for (int v = 0; v < VECS; ++v) right[v] = copy_in<Vec>(b + v * lanes, lanes);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Vec left = splat<Vec>(a[r * row_stride]);
#pragma GCC unroll 2
                for (int v = 0; v < VECS; ++v) at[r][v] += left * right[v];
            }
        }
    }

    // f(vector, row, column) for every vector; columns count from the tile's first.
    template <typename F>
    LM_INLINE void each(F f) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < VECS; ++v) f(at[r][v], r, v * lanes);
        }
    }

    // Asks for what lies where the tile would be stored, to be read or, if `write`, written later.
    template <bool WRITE>
    LM_INLINE void prefetch(const T* at, int64_t ld) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < VECS; v += 64 / static_cast<int>(sizeof(Vec))) {
                __builtin_prefetch(at + r * ld + v * lanes, WRITE, 3);
            }
        }
    }

    LM_INLINE void scale_rows(const T* factor) {
        each([&](Vec& value, int r, int) LM_INLINE { value *= factor[r]; });
    }

    LM_INLINE void store(T* to, int64_t ld) {
        each([&](Vec& value, int r, int column) LM_INLINE { copy_out(to + r * ld + column, value, lanes); });
    }

    // The first `columns` of each row. Through memory only where a row is cut: the tile itself stays in registers.
    LM_INLINE void store(T* to, int64_t ld, int64_t columns) {
        if (columns >= VECS * lanes) return store(to, ld);
        T row[ROWS][VECS * lanes];
        store(row[0], VECS * lanes);
        for (int r = 0; r < ROWS; ++r) std::memcpy(to + r * ld, row[r], columns * sizeof(T));
    }

    // The first `columns` of each row, added to what is there.
    LM_INLINE void add_to(T* to, int64_t ld, int64_t columns) {
        if (columns >= VECS * lanes) {
            add_rows(to, ld);
            return store(to, ld);
        }
        T row[ROWS][VECS * lanes] = {};
        for (int r = 0; r < ROWS; ++r) std::memcpy(row[r], to + r * ld, columns * sizeof(T));
        add_rows(row[0], VECS * lanes);
        store(to, ld, columns);
    }

private:
    LM_INLINE void add_rows(const T* from, int64_t ld) {
        each([&](Vec& value, int r, int column) LM_INLINE { value += copy_in<Vec>(from + r * ld + column, lanes); });
    }
};

template <typename IO, int VECS, typename Body>
inline void column_of_tiles(int64_t row, int64_t end, int64_t column, const Body& body) {
    for (; row + kTileRows <= end; row += kTileRows) {
        Tile<IO, kTileRows, VECS> tile;
        body(tile, row, column);
    }
    for (; row + 4 <= end; row += 4) {
        Tile<IO, 4, VECS> tile;
        body(tile, row, column);
    }
    for (; row < end; ++row) {
        Tile<IO, 1, VECS> tile;
        body(tile, row, column);
    }
}

// body(tile, row, column) for tiles, zero at first, that cover rows [row, end) and the vectors of columns [0, columns).
template <typename IO, typename Body>
inline void for_tiles(int64_t row, int64_t end, int64_t columns, const Body& body) {
    constexpr int lanes = kLanes<IO>;
    int64_t column = 0;
    for (; column + lanes < columns; column += 2 * lanes) column_of_tiles<IO, 2>(row, end, column, body);
    if (column < columns) column_of_tiles<IO, 1>(row, end, column, body);
}

}  // namespace
