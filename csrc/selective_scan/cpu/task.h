// What forward and backward have in common: where a task's tensors lie, the decay, and the states as vectors.
#pragma once

#include "simd/vector.h"
#include "selective_scan/kernel.h"

namespace {

using namespace lm::selective_scan;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels [c0, c0 + channels) of a group in a row, as tiles of one vector. States and rates of a task lie in scratch
// as [tile][d_state] vectors.
template <typename IO>
struct Task {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    const Params& p;
    int64_t part, group, row, c0, channels, tiles;

    Task(const Params& params, int64_t index) : p(params) {
        const int64_t width = p.channels / p.groups;
        part = index % num_parts(p);
        group = index / num_parts(p) % p.groups;
        row = index / num_parts(p) / p.groups;
        c0 = group * width + part * kPart;
        channels = least(kPart, width - part * kPart);
        tiles = (channels + lanes - 1) / lanes;
    }

    // The lanes of a tile that are channels.
    int count(int64_t tile) const { return static_cast<int>(least(lanes, channels - tile * lanes)); }

    // Element of an array [batch, length, channels] at token t, where a tile begins.
    int64_t at(int64_t t, int64_t tile) const { return (row * p.length + t) * p.channels + c0 + tile * lanes; }

    // Token t of an array [batch, length, groups, d_state].
    int64_t key_at(int64_t t) const { return ((row * p.length + t) * p.groups + group) * p.d_state; }

    // State n of a tile in the checkpoint before a chunk.
    int64_t checkpoint_at(int64_t chunk, int64_t n, int64_t tile) const {
        return ((row * num_chunks(p) + chunk) * p.d_state + n) * p.channels + c0 + tile * lanes;
    }

    bool fresh(int64_t t) const {
        return (p.starts && p.starts[row * p.length + t]) || (t == 0 && !p.initial_state);
    }

    // Vectors [tile][d_state] of the task's part of values [channels, d_state], times a scale; zeros without them and
    // in spare lanes.
    void gather(T* to, const T* values, T scale = 1) const {
        std::memset(to, 0, tiles * p.d_state * lanes * sizeof(T));
        if (values == nullptr) return;
        for (int64_t c = 0; c < channels; ++c) {
            T* lane = to + c / lanes * p.d_state * lanes + c % lanes;
            for (int64_t n = 0; n < p.d_state; ++n) lane[n * lanes] = scale * values[(c0 + c) * p.d_state + n];
        }
    }

    void scatter(T* values, const T* from) const {
        for (int64_t c = 0; c < channels; ++c) {
            const T* lane = from + c / lanes * p.d_state * lanes + c % lanes;
            for (int64_t n = 0; n < p.d_state; ++n) values[(c0 + c) * p.d_state + n] = lane[n * lanes];
        }
    }

    // The row's part of an array [batch, channels, d_state], null if that is.
    template <typename Base>
    Base* of_row(Base* values) const {
        return values == nullptr ? nullptr : values + row * p.channels * p.d_state;
    }
};

// e^(dt rate) for rates times kRateScale. In fp32 as a power of 2, to 1e-7 relative; below 2^-126 it is 0, above 2^126
// it stays there. vexp, which clamps and scales in more steps, would be half of the scan.
template <typename T>
constexpr T kRateScale = 1;
template <>
constexpr float kRateScale<float> = 1.44269504f;

inline VecF exp_decay(VecF exponent) {
    const VecF z = exponent > 126.0f ? splat<VecF>(126.0f) : exponent;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = z + magic;
    const VecF r = z - (shifted - magic);
    VecF power = splat<VecF>(1.545316295e-4f);
    power = power * r + 1.339086336e-3f;
    power = power * r + 9.618082557e-3f;
    power = power * r + 5.550357114e-2f;
    power = power * r + 2.402265076e-1f;
    power = power * r + 6.931471880e-1f;
    power = power * r + 1.0f;
    const VecF decay = (VecF)((VecU)power + ((VecU)shifted << 23));
    return z < -126.0f ? VecF{} : decay;
}
inline VecD exp_decay(VecD exponent) { return vexp(exponent); }

template <bool LONGHORN, typename Vec, typename Scalar>
inline Vec decay_of(Vec dt, Vec rate, Scalar key) {
    if constexpr (LONGHORN) return 1 - dt * (key * key);
    else return exp_decay(dt * rate);
}

// decay * value, 0 where the decay is 0, even of infinities.
template <typename Vec>
inline Vec scaled(Vec decay, Vec value) {
    const Vec product = decay * value;
    return decay == 0 ? Vec{} : product;
}

}  // namespace
