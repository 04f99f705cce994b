// The decays of one head over one piece of at most CHUNK tokens.
#pragma once

#include "simd/panel.h"

namespace {

// exp that reaches 0, which the clamped vexp does not.
inline VecF decay_exp(VecF x) { return x < -87.0f ? VecF{} : vexp(x); }
inline VecD decay_exp(VecD x) { return vexp(x); }

template <typename IO, int64_t CHUNK>
struct Decay {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    int64_t count;
    alignas(64) T step[CHUNK];   // e^{log_a_i}
    alignas(64) T enter[CHUNK];  // e^{log_a over the piece up to i}: of the entering state in token i
    alignas(64) T leave[CHUNK];  // e^{log_a after i}: of token i in the leaving state
    double sum[CHUNK];           // of log_a up to i; fp64, for differences of large sums

    // From log_a[token * stride]. `fresh`: a document starts here, and its first decay acts on nothing.
    Decay(const T* log_a, int64_t stride, int64_t tokens, bool fresh) : count(tokens) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) {
            step[i] = fresh && i == 0 ? 0 : log_a[i * stride];
            total += step[i] < -1000 ? -1000 : step[i];  // as good as -inf, whose differences would be NaN
            sum[i] = total;
            enter[i] = static_cast<T>(total);
        }
        for (int64_t i = 0; i < count; ++i) leave[i] = static_cast<T>(total - sum[i]);
        for (int64_t i = count; i < padded(count); ++i) step[i] = enter[i] = leave[i] = 0;
        exponentiate(step, count);
        exponentiate(enter, count);
        exponentiate(leave, count);
    }

    static void exponentiate(T* values, int64_t count) {
        for (int64_t i = 0; i < count; i += lanes) {
            copy_out(values + i, decay_exp(copy_in<Vec>(values + i, lanes)), lanes);
        }
    }

    T total() const { return enter[count - 1]; }
};

// Row i of the lower triangular D, made from row i - 1, and afresh at each block so that rounding does not pile up.
template <typename IO, int64_t CHUNK>
struct DecayRow {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    alignas(64) T at[CHUNK];
    Vec lane;

    DecayRow() {
        for (int l = 0; l < lanes; ++l) lane[l] = l;
    }

    // Where column `first` + lane is i.
    auto is(int64_t i, int64_t first) const { return lane == splat<Vec>(static_cast<T>(i - first)); }

    // Writes the columns of i's block and of those before; rows are visited in order.
    void move_to(int64_t i, const Decay<IO, CHUNK>& decay) {
        const int64_t block = i / kBlock * kBlock;
        if (i == block) {
            for (int64_t j = 0; j < block; ++j) at[j] = static_cast<T>(decay.sum[i] - decay.sum[j]);
            Decay<IO, CHUNK>::exponentiate(at, block);
            for (int64_t j = block; j < block + kBlock; j += lanes) {
                copy_out(at + j, is(i, j) ? splat<Vec>(T(1)) : Vec{}, lanes);
            }
            return;
        }
        for (int64_t j = 0; j < block + kBlock; j += lanes) {
            Vec value = copy_in<Vec>(at + j, lanes) * decay.step[i];
            value = value < T(1e-37) ? Vec{} : value;  // denormals are slow
            copy_out(at + j, is(i, j) ? splat<Vec>(T(1)) : value, lanes);
        }
    }
};

}  // namespace
