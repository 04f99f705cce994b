// Exchanges of lanes between vectors: transposes, and sums of the lanes of many vectors at once.
#pragma once

#include "simd/vector.h"

namespace {

template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
    using Type = Indices<I...>;
};

#if defined(__clang__)
#define LM_SHUFFLE_LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LM_SHUFFLE_LANES(a, b, ...) __builtin_shuffle(a, b, decltype(a == b){__VA_ARGS__})
#endif

// Of lanes l and l ^ D of a where l & D is 0, of b elsewhere: the lower one, l & ~D, if `low`, else the upper, l | D.
template <int D, typename Vec, int... L>
inline void exchange(const Vec& a, const Vec& b, Vec& low, Vec& high, Indices<L...>) {
    constexpr int n = sizeof...(L);
    low = LM_SHUFFLE_LANES(a, b, ((L & D) ? (L ^ D) + n : L)...);
    high = LM_SHUFFLE_LANES(a, b, ((L & D) ? L + n : (L ^ D))...);
}

template <typename IO>
inline typename IO::Compute sum_lanes(const typename IO::Vec& values) {
    typename IO::Compute lane[kLanes<IO>];
    copy_out(lane, values, kLanes<IO>);
    for (int half = kLanes<IO> / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    return lane[0];
}

// A vector whose lane l sums the lanes of row l of kLanes rows.
template <typename IO, int D = kLanes<IO>>
inline typename IO::Vec sum_rows(const typename IO::Compute* rows) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>, half = D / 2;
    if constexpr (D == 1) {
        return copy_in<Vec>(rows, lanes);
    } else {
        Vec low, high;
        exchange<half>(sum_rows<IO, half>(rows), sum_rows<IO, half>(rows + half * lanes), low, high,
                       typename UpTo<lanes>::Type());
        return low + high;
    }
}

// to[r] = the sum of the lanes of row r, added to what is there if `add`. Rows are kLanes long, and there is memory, of
// any content, for a whole number of kLanes of them.
template <typename IO>
inline void write_row_sums(typename IO::Compute* to, const typename IO::Compute* rows, int64_t count, bool add) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    for (int64_t r = 0; r < count; r += lanes) {
        const int here = static_cast<int>(count - r < lanes ? count - r : lanes);
        Vec sums = sum_rows<IO>(rows + r * lanes);
        if (add) sums += copy_in<Vec>(to + r, here);
        copy_out(to + r, sums, here);
    }
}

// Transposes kLanes vectors in registers.
template <typename IO, int D = kLanes<IO> / 2>
inline void transpose_lanes(typename IO::Vec (&rows)[kLanes<IO>]) {
    constexpr int lanes = kLanes<IO>;
    if constexpr (D > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) {
            if (r & D) continue;
            const typename IO::Vec a = rows[r], b = rows[r | D];
            exchange<D>(a, b, rows[r], rows[r | D], typename UpTo<lanes>::Type());
        }
        transpose_lanes<IO, D / 2>(rows);
    }
}

}  // namespace
