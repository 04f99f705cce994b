// Vectors of the unit a kernel source is compiled for: LM_LANES floats, or half as many doubles.
//
// Included by sources under */cpu only. Everything is in an unnamed namespace: a function the linker could share
// between units would run AVX-512 code on a machine without it. For the same reason: no std:: templates in kernels.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kVectorBytes = LM_LANES * 4;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));

// How values of type IO travel in memory, and the vector they are computed in.
struct Float {
    using Memory = float;
    using Compute = float;
    using Vec = VecF;
};
struct Double {
    using Memory = double;
    using Compute = double;
    using Vec = VecD;
};
struct BFloat16 {
    using Memory = uint16_t;
    using Compute = float;
    using Vec = VecF;
};

template <typename IO>
constexpr int kLanes = sizeof(typename IO::Vec) / sizeof(typename IO::Compute);

// A scalar of the compute type in every lane.
template <typename Vec, typename Scalar>
inline Vec splat(Scalar value) {
    return value - Vec{};  // a broadcast; `value + Vec{}` is not, for it turns -0 into 0
}

// The first `count` lanes from `from`, the others zero; a full vector when count is kLanes.
template <typename Vec, typename Memory>
inline Vec copy_in(const Memory* from, int count) {
    Vec values = {};
    if (count * sizeof(Memory) == sizeof(Vec)) {
        std::memcpy(&values, from, sizeof(Vec));
    } else {
        std::memcpy(&values, from, count * sizeof(Memory));
    }
    return values;
}

template <typename Vec, typename Memory>
inline void copy_out(Memory* to, const Vec& values, int count) {
    if (count * sizeof(Memory) == sizeof(Vec)) {
        std::memcpy(to, &values, sizeof(Vec));
    } else {
        std::memcpy(to, &values, count * sizeof(Memory));
    }
}

template <typename IO>
inline typename IO::Vec load(const typename IO::Memory* from, int count) {
    if constexpr (sizeof(typename IO::Memory) == 2) {
        return (VecF)(__builtin_convertvector(copy_in<VecH>(from, count), VecU) << 16);
    } else {
        return copy_in<typename IO::Vec>(from, count);
    }
}

template <typename IO>
inline void store(typename IO::Memory* to, typename IO::Vec values, int count) {
    if constexpr (sizeof(typename IO::Memory) == 2) {
        const VecU bits = (VecU)values;
        const VecU nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const VecU quiet_nan = (bits >> 16) | 0x40u;
        const VecU rounded = values == values ? nearest_even : quiet_nan;
        copy_out(to, __builtin_convertvector(rounded, VecH), count);
    } else {
        copy_out(to, values, count);
    }
}

// exp to 1e-7 relative: Cephes' degree-5 polynomial; clamped to where both e^x and e^-x are normal numbers.
inline VecF vexp(VecF x) {
    x = x > 87.0f ? splat<VecF>(87.0f) : x;
    x = x < -87.0f ? splat<VecF>(-87.0f) : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = x * 1.44269504088896341f + magic;
    const VecF n = shifted - magic;
    const VecF r = x - n * 0.693359375f + n * 2.12194440e-4f;
    VecF p = splat<VecF>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const VecI exponent = (VecI)shifted - (VecI)splat<VecF>(magic);
    return p * (VecF)((exponent + 127) << 23);
}

inline VecD vexp(VecD x) {
    for (int i = 0; i < LM_LANES / 2; ++i) x[i] = __builtin_exp(x[i]);
    return x;
}

template <typename Vec>
inline Vec sigmoid(Vec x) {
    return 1 / (1 + vexp(-x));
}

}  // namespace
