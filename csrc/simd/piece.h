#pragma once

#include <cstdint>

namespace lm {

// Consecutive tokens of one document, which a kernel takes at once.
struct Piece {
    static constexpr int64_t kNone = -1;

    int64_t row, begin, count;
    int64_t slot;  // which of the states that enter a piece of the row enters this one; kNone: zero
    bool leaves;   // whether the state after it is needed
};

}  // namespace lm
