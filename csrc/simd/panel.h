// Panels: copies of a piece's tensors whose rows are dense and whole vectors long.
#pragma once

#include "simd/block.h"
#include "simd/lanes.h"

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// An odd number of cache lines for a row of fp32: steps over rows then do not meet in the same lines of the cache.
inline int64_t spread(int64_t columns) { return padded(columns) | kBlock; }

// Rows of padded(columns), `ld` apart, from rows of columns, `stride` apart, times factor[row] if given.
template <typename IO>
void pack(typename IO::Compute* to, int64_t ld, const typename IO::Compute* from, int64_t stride, int64_t rows,
          int64_t columns, const typename IO::Compute* factor = nullptr) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    for (int64_t r = 0; r < rows; ++r, to += ld, from += stride) {
        const Vec scale = splat<Vec>(factor ? factor[r] : 1);
        for (int64_t c = 0; c < padded(columns); c += lanes) {
            const int count = static_cast<int>(c >= columns ? 0 : least(lanes, columns - c));
            copy_out(to + c, scale * copy_in<Vec>(from + c, count), lanes);
        }
    }
}

// Each of `rows` rows of padded(columns), `ld` apart, times its factor.
template <typename IO>
void scale_rows(typename IO::Compute* panel, int64_t ld, int64_t rows, int64_t columns,
                const typename IO::Compute* factor) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    for (int64_t r = 0; r < rows; ++r, panel += ld) {
        for (int64_t c = 0; c < padded(columns); c += lanes) {
            copy_out(panel + c, factor[r] * copy_in<Vec>(panel + c, lanes), lanes);
        }
    }
}

// to [columns, rows] = from [rows, columns], each with its row stride.
template <typename IO, typename T = typename IO::Compute>
void transpose(T* to, int64_t ld_to, const T* from, int64_t ld_from, int64_t rows, int64_t columns) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    const int64_t whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
    for (int64_t c = 0; c < whole_columns; c += lanes) {
        for (int64_t r = 0; r < whole_rows; r += lanes) {
            Vec block[lanes];
            for (int l = 0; l < lanes; ++l) block[l] = copy_in<Vec>(from + (r + l) * ld_from + c, lanes);
            transpose_lanes<IO>(block);
            for (int l = 0; l < lanes; ++l) copy_out(to + (c + l) * ld_to + r, block[l], lanes);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t rest = r < whole_rows ? whole_columns : 0;
        for (int64_t c = rest; c < columns; ++c) to[c * ld_to + r] = from[r * ld_from + c];
    }
}

// The same, with zeros after the rows of `to` up to a whole block.
template <typename IO, typename T = typename IO::Compute>
void transpose_padded(T* to, int64_t ld_to, const T* from, int64_t ld_from, int64_t rows, int64_t columns) {
    transpose<IO>(to, ld_to, from, ld_from, rows, columns);
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = rows; r < padded(rows); ++r) to[c * ld_to + r] = 0;
    }
}

}  // namespace
