// Memory that is needed soon.
#pragma once

#include "simd/tile.h"

namespace {

// Rows of ARRAYS arrays, to be asked for one at a time amid other work: asked for all at once they would hold that up.
template <typename T, int ARRAYS>
struct Ahead {
    const T* arrays[ARRAYS] = {};  // at their first rows, in the order in which they are needed
    int64_t stride = 0, rows = 0;
    const T* at = nullptr;
    int64_t row = 0;
    int array = 0;

    void start(int64_t row_stride, int64_t count) {
        stride = row_stride, rows = count, at = arrays[0], row = 0, array = 0;
    }

    // What is asked for at each tile of a product; tiles of 16 lanes are a third as many.
    LM_INLINE void ask() {
        for (int r = 0; r < (LM_LANES == 16 ? 3 : 1); ++r) ask_row();
    }

private:
    // 4 lines of the next row, and what follows it where it is shorter, which is the next head's.
    LM_INLINE void ask_row() {
        constexpr int64_t line = 64 / sizeof(T);
        for (int l = 0; l < 4; ++l) __builtin_prefetch(at + l * line, 0, 2);
        at += stride;
        if (++row < rows) return;
        array += array + 1 < ARRAYS;  // the last one again and again
        row = 0, at = arrays[array];
    }
};

}  // namespace
