// The decay e^(dt rate) as a vector, cheap enough not to dominate the scan.
#pragma once

#include "simd/vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// Rates are multiplied by kRateScale beforehand. In fp32, e^(dt rate) = 2^(z / kSteps) = 2^(n / kSteps) 2^(r / kSteps)
// with z = dt rate, n an integer and |r| <= 1/2: the first factor comes from a table of one vector, which leaves so
// little to the polynomial that three terms give 1e-7. Without a shuffle of vectors there is one step and five terms.
constexpr int kSteps = LM_LANES > 4 ? LM_LANES : 1;
constexpr int kStepBits = kSteps == 16 ? 4 : kSteps == 8 ? 3 : 0;

template <typename T>
constexpr T kRateScale = 1;
template <>
constexpr float kRateScale<float> = kSteps * 1.44269504088896341f;

// Where |dt rate| is below, the decay is a normal number, so that neither 0 nor infinity needs care.
template <typename T>
constexpr T kNormal = 700;
template <>
constexpr float kNormal<float> = 125 * kSteps;

// 2^(step / kSteps) as bits, less what (n << exponent) adds for the step.
struct StepTable {
    alignas(64) uint32_t bits[LM_LANES] = {};

    constexpr StepTable() {
        constexpr float powers[16] = {1.0f,         1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                      1.29683955f,  1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                      1.68179283f,  1.75625216f, 1.83400809f, 1.91520656f};
        for (uint32_t i = 0; i < LM_LANES; ++i) {
            const uint32_t step = i % kSteps;
            bits[i] = __builtin_bit_cast(uint32_t, powers[step * (16 / kSteps)]) - (step << (23 - kStepBits));
        }
    }
};
constexpr StepTable kStepTable;

inline VecU step_power(VecU shifted) {
    // the low bits of `shifted` choose; the source may be compiled with more lanes than the CPU's vectors have
#if LM_LANES == 16 && defined(__AVX512F__)
    const VecU table = copy_in<VecU>(kStepTable.bits, LM_LANES);
    const VecU power = (VecU)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)shifted, (__m512i)table);
#elif LM_LANES == 8 && defined(__AVX2__)
    const VecU table = copy_in<VecU>(kStepTable.bits, LM_LANES);
    const VecU power = (VecU)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)shifted);
#else
    VecU power;
    for (int i = 0; i < LM_LANES; ++i) power[i] = kStepTable.bits[shifted[i] % kSteps];
#endif
    return power + (shifted << (23 - kStepBits));
}

// CHECKED: exponents may be any: below the normal numbers the decay is 0, above it stays at 2^126. Otherwise they are
// below kNormal. The bits are the same where both hold.
template <bool CHECKED>
inline VecF exp_decay(VecF dt, VecF rate) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = dt * rate + magic;
    const VecF r = dt * rate - (shifted - magic);
    VecF factor;
    if constexpr (kSteps == 16) {
        factor = 1.3550403002e-5f * r + 9.3841520532e-4f;
        factor = factor * r + 4.3321698898e-2f;
    } else if constexpr (kSteps == 8) {
        factor = 1.0839108497e-4f * r + 3.7540254688e-3f;
        factor = factor * r + 8.6643401776e-2f;
    } else {
        factor = 1.3264720366e-3f * r + 9.6715130223e-3f;
        factor = factor * r + 5.5507337777e-2f;
        factor = factor * r + 2.4022242077e-1f;
        factor = factor * r + 6.9314697756e-1f;
    }
    factor = factor * r + 1.0f;
    const VecF decay = (VecF)step_power((VecU)shifted) * factor;
    if constexpr (!CHECKED) return decay;
    const VecF limited = shifted > magic + 126.0f * kSteps ? splat<VecF>(0x1p126f) : decay;
    return shifted < magic - 126.0f * kSteps ? VecF{} : limited;
}

template <bool CHECKED>
inline VecD exp_decay(VecD dt, VecD rate) {
    return vexp(dt * rate);
}

template <bool LONGHORN, bool CHECKED, typename Vec, typename Scalar>
inline Vec decay_of(Vec dt, Vec rate, Scalar key) {
    if constexpr (LONGHORN) return 1 - dt * (key * key);
    else return exp_decay<CHECKED>(dt, rate);
}

// What a decay acts on: 0 where it is 0, so that not even infinity is left.
template <bool CHECKED, typename Vec>
inline Vec kept(Vec decay, Vec value) {
    if constexpr (CHECKED) return decay == 0 ? Vec{} : value;
    else return value;
}

}  // namespace
