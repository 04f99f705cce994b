// What forward and backward have in common: where a task's tensors lie, and the states as vectors.
#pragma once

#include "selective_scan/cpu/decay.h"
#include "selective_scan/kernel.h"

namespace {

using namespace lm::selective_scan;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels [c0, c0 + channels) of a group in a row, as tiles of one vector. States and rates of a task lie in scratch
// as [tile][padded] vectors.
template <typename IO>
struct Task {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    const Params& p;
    int64_t part, group, row, c0, channels, tiles;
    int64_t padded;  // states, rounded up to whole blocks

    Task(const Params& params, int64_t index) : p(params) {
        const int64_t width = p.channels / p.groups;
        part = index % num_parts(p);
        group = index / num_parts(p) % p.groups;
        row = index / num_parts(p) / p.groups;
        c0 = group * width + part * kPart;
        channels = least(kPart, width - part * kPart);
        tiles = (channels + lanes - 1) / lanes;
        padded = padded_states(p);
    }

    // The lanes of a tile that are channels.
    int count(int64_t tile) const { return static_cast<int>(least(lanes, channels - tile * lanes)); }

    // body(tile, count), for all tiles but the last with a constant count.
    template <typename Body>
    void each_tile(const Body& body) const {
        const int64_t full = channels / lanes;
        for (int64_t tile = 0; tile < full; ++tile) body(tile, lanes);
        if (full < tiles) body(full, count(full));
    }

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

    // The largest |rate| of every channel, from vectors [tile][padded].
    void steepest(const T* rates, T* most) const {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            Vec largest = {};
            for (int64_t n = 0; n < p.d_state; ++n) {
                const Vec rate = copy_in<Vec>(rates + (tile * padded + n) * lanes, lanes);
                const Vec size = rate < 0 ? -rate : rate;
                largest = size > largest ? size : largest;
            }
            copy_out(most + tile * lanes, largest, lanes);
        }
    }

    // Whether all decays of tokens [begin, end) are normal numbers.
    bool normal(int64_t begin, int64_t end, const T* most) const {
        auto inside = Vec{} == Vec{};
        for (int64_t t = begin; t < end; ++t) {
            each_tile([&](int64_t tile, int count) {
                const Vec dt = copy_in<Vec>(static_cast<const T*>(p.dt) + at(t, tile), count);
                const Vec z = dt * copy_in<Vec>(most + tile * lanes, lanes);
                inside &= (z < kNormal<T>) & (z > -kNormal<T>);
            });
        }
        for (int lane = 0; lane < lanes; ++lane) {
            if (!inside[lane]) return false;
        }
        return true;
    }

    // Vectors [tile][padded] of the task's part of values [channels, d_state], times a scale; zeros without them and
    // in spare lanes and states.
    void gather(T* to, const T* values, T scale = 1) const {
        std::memset(to, 0, tiles * padded * lanes * sizeof(T));
        if (values == nullptr) return;
        for (int64_t c = 0; c < channels; ++c) {
            T* lane = to + c / lanes * padded * lanes + c % lanes;
            for (int64_t n = 0; n < p.d_state; ++n) lane[n * lanes] = scale * values[(c0 + c) * p.d_state + n];
        }
    }

    void scatter(T* values, const T* from) const {
        for (int64_t c = 0; c < channels; ++c) {
            const T* lane = from + c / lanes * padded * lanes + c % lanes;
            for (int64_t n = 0; n < p.d_state; ++n) values[(c0 + c) * p.d_state + n] = lane[n * lanes];
        }
    }

    // Token t of an array [batch, length, groups, d_state], padded by zeros.
    void read_key(const T* values, int64_t t, T* to) const {
        std::memcpy(to, values + key_at(t), p.d_state * sizeof(T));
        std::memset(to + p.d_state, 0, (padded - p.d_state) * sizeof(T));
    }

    // The row's part of an array [batch, channels, d_state], null if that is.
    template <typename Base>
    Base* of_row(Base* values) const {
        return values == nullptr ? nullptr : values + row * p.channels * p.d_state;
    }
};

}  // namespace
