// Panels: copies of a piece's tensors whose rows are dense and whole vectors long.
#pragma once

#include "simd/vector.h"
#include "ssd/kernel.h"

namespace {

using lm::ssd::kBlock;
using lm::ssd::kChunk;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// to [rows, padded(columns)] = from [rows, columns], whose rows are `stride` apart, times factor[row] if given.
template <typename IO>
void pack(typename IO::Compute* to, const typename IO::Compute* from, int64_t stride, int64_t rows, int64_t columns,
          const typename IO::Compute* factor = nullptr) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    const int64_t width = lm::ssd::padded(columns);
    for (int64_t r = 0; r < rows; ++r, to += width, from += stride) {
        const Vec scale = splat<Vec>(factor ? factor[r] : 1);
        for (int64_t c = 0; c < width; c += lanes) {
            const int count = static_cast<int>(c >= columns ? 0 : least(lanes, columns - c));
            copy_out(to + c, scale * copy_in<Vec>(from + c, count), lanes);
        }
    }
}

// Each row of panel [rows, width] times its factor.
template <typename IO>
void scale_rows(typename IO::Compute* panel, int64_t rows, int64_t width, const typename IO::Compute* factor) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    for (int64_t r = 0; r < rows; ++r, panel += width) {
        for (int64_t c = 0; c < width; c += lanes) {
            copy_out(panel + c, factor[r] * copy_in<Vec>(panel + c, lanes), lanes);
        }
    }
}

typedef float Vec4 __attribute__((vector_size(16)));
typedef int32_t Vec4I __attribute__((vector_size(16)));
#if defined(__clang__)
#define LM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Vec4I{__VA_ARGS__})
#endif

inline void transpose_4x4(float* to, int64_t ld_to, const float* from, int64_t ld_from) {
    const auto row = [&](int r) { return copy_in<Vec4>(from + r * ld_from, 4); };
    const Vec4 low02 = LM_SHUFFLE(row(0), row(2), 0, 4, 1, 5), high02 = LM_SHUFFLE(row(0), row(2), 2, 6, 3, 7);
    const Vec4 low13 = LM_SHUFFLE(row(1), row(3), 0, 4, 1, 5), high13 = LM_SHUFFLE(row(1), row(3), 2, 6, 3, 7);
    copy_out(to, LM_SHUFFLE(low02, low13, 0, 4, 1, 5), 4);
    copy_out(to + ld_to, LM_SHUFFLE(low02, low13, 2, 6, 3, 7), 4);
    copy_out(to + 2 * ld_to, LM_SHUFFLE(high02, high13, 0, 4, 1, 5), 4);
    copy_out(to + 3 * ld_to, LM_SHUFFLE(high02, high13, 2, 6, 3, 7), 4);
}

inline void transpose_4x4(double* to, int64_t ld_to, const double* from, int64_t ld_from) {
    for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 4; ++c) to[c * ld_to + r] = from[r * ld_from + c];
    }
}

// to [columns, rows] = from [rows, columns], each with its row stride.
template <typename T>
void transpose(T* to, int64_t ld_to, const T* from, int64_t ld_from, int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
    for (int64_t r = 0; r < whole_rows; r += 4) {
        for (int64_t c = 0; c < whole_columns; c += 4) {
            transpose_4x4(to + c * ld_to + r, ld_to, from + r * ld_from + c, ld_from);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t rest = r < whole_rows ? whole_columns : 0;
        for (int64_t c = rest; c < columns; ++c) to[c * ld_to + r] = from[r * ld_from + c];
    }
}

// to [columns, kChunk] = the transpose of a piece's tensor [rows, columns]; to's columns end with zeros, a whole block.
template <typename T>
void transpose_piece(T* to, const T* from, int64_t stride, int64_t rows, int64_t columns) {
    transpose(to, kChunk, from, stride, rows, columns);
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = rows; r < lm::ssd::padded(rows); ++r) to[c * kChunk + r] = 0;
    }
}

}  // namespace
