// How matrices over tokens are laid out, for the bindings as well as for kernels.
#pragma once

#include <cstdint>

namespace {  // not shared between units, see simd/vector.h

constexpr int64_t kBlock = 16;  // whole vectors of every unit, and the rows of a triangle computed to the same column

inline int64_t padded(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

}  // namespace
