#include "selective_scan/cpu/task.h"

namespace {

// Tokens by which x and dt are asked for early: they lie further apart than the hardware looks.
constexpr int64_t kAhead = 12;

// A token of a tile; FRESH: it sees no state.
template <typename IO, bool LONGHORN, bool FRESH, typename T = typename IO::Compute, typename Vec = typename IO::Vec>
inline Vec token(Vec x, Vec dt, const T* rate, const T* b, const T* c, T* state, int64_t d_state) {
    constexpr int lanes = kLanes<IO>;
    const Vec input = dt * x;
    Vec y = {};
#pragma GCC unroll 4
    for (int64_t n = 0; n < d_state; ++n) {
        Vec h = input * b[n];
        if constexpr (!FRESH) {
            const Vec decay = decay_of<LONGHORN>(dt, copy_in<Vec>(rate + n * lanes, lanes), b[n]);
            h += scaled(decay, copy_in<Vec>(state + n * lanes, lanes));
        }
        copy_out(state + n * lanes, h, lanes);
        y += h * c[n];
    }
    return y;
}

template <typename IO, bool LONGHORN, typename T = typename IO::Compute>
void run(const Task<IO>& task, T* scratch) {
    using Vec = typename IO::Vec;
    constexpr int lanes = kLanes<IO>;
    const Params& p = task.p;
    const int64_t stride = p.d_state * lanes;
    const T *x = static_cast<const T*>(p.x), *dt = static_cast<const T*>(p.dt);
    const T *b = static_cast<const T*>(p.b), *c = static_cast<const T*>(p.c);
    T *y = static_cast<T*>(p.y), *checkpoints = static_cast<T*>(p.checkpoints);
    T *states = scratch, *rates = scratch + p.d_state * kPart;
    task.gather(rates, static_cast<const T*>(p.a), kRateScale<T>);
    task.gather(states, task.of_row(static_cast<const T*>(p.initial_state)));
    // a chunk at a time, so that its B and C stay in the cache for all tiles
    for (int64_t chunk = 0; chunk < num_chunks(p); ++chunk) {
        const int64_t end = least((chunk + 1) * kChunk, p.length);
        for (int64_t tile = 0; tile < task.tiles; ++tile) {
            T *state = states + tile * stride, *rate = rates + tile * stride;
            const int count = task.count(tile);
            for (int64_t n = 0; n < p.d_state; ++n) {
                const Vec h = copy_in<Vec>(state + n * lanes, lanes);
                copy_out(checkpoints + task.checkpoint_at(chunk, n, tile), h, count);
            }
            for (int64_t t = chunk * kChunk; t < end; ++t) {
                const int64_t at = task.at(t, tile);
                const T *key = b + task.key_at(t), *query = c + task.key_at(t);
                if (t + kAhead < end) {
                    __builtin_prefetch(x + at + kAhead * p.channels, 0, 2);
                    __builtin_prefetch(dt + at + kAhead * p.channels, 0, 2);
                }
                const Vec value = copy_in<Vec>(x + at, count), delta = copy_in<Vec>(dt + at, count);
                const Vec out = task.fresh(t)
                                    ? token<IO, LONGHORN, true>(value, delta, rate, key, query, state, p.d_state)
                                    : token<IO, LONGHORN, false>(value, delta, rate, key, query, state, p.d_state);
                copy_out(y + at, out, count);
            }
        }
    }
    task.scatter(task.of_row(static_cast<T*>(p.final_state)), states);
}

template <typename IO>
void forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    auto* memory = static_cast<typename IO::Compute*>(scratch);
    for (int64_t index = from; index < to; ++index) {
        const Task<IO> task(p, index);
        if (p.a) run<IO, false>(task, memory);
        else run<IO, true>(task, memory);
    }
}

}  // namespace

namespace lm::LM_UNIT {

void selective_scan_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) forward<Double>(p, from, to, scratch);
    else forward<Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
