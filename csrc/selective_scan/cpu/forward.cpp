#include "selective_scan/cpu/task.h"

namespace {

// Tokens by which x, dt and y are asked for early: they lie further apart than the hardware looks.
constexpr int64_t kAhead = 16;

// A token of a tile; FRESH: it sees no state.
template <typename IO, bool LONGHORN, bool CHECKED, bool FRESH, typename T = typename IO::Compute,
          typename Vec = typename IO::Vec>
inline Vec token(Vec x, Vec dt, const T* rate, const T* b, const T* c, T* state, int64_t d_state) {
    constexpr int lanes = kLanes<IO>;
    const Vec input = dt * x;
    Vec y = {};
#pragma GCC unroll 4
    for (int64_t n = 0; n < d_state; ++n) {
        Vec h = input * b[n];
        if constexpr (!FRESH) {
            const Vec decay = decay_of<LONGHORN, CHECKED>(dt, copy_in<Vec>(rate + n * lanes, lanes), b[n]);
            h += decay * kept<CHECKED>(decay, copy_in<Vec>(state + n * lanes, lanes));
        }
        copy_out(state + n * lanes, h, lanes);
        y += h * c[n];
    }
    return y;
}

template <typename IO, bool LONGHORN, typename T = typename IO::Compute>
struct Forward {
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    const Task<IO>& task;
    const Params& p;
    const int64_t stride;  // elements of a tile's vectors
    T *states, *rates;

    Forward(const Task<IO>& task_, T* scratch)
        : task(task_),
          p(task_.p),
          stride(task_.padded * lanes),
          states(scratch),
          rates(scratch + task_.padded * kPart) {}

    void run() const {
        task.gather(rates, static_cast<const T*>(p.a), kRateScale<T>);
        task.gather(states, task.of_row(static_cast<const T*>(p.initial_state)));
        T most[kPart];
        task.steepest(rates, most);
        for (int64_t chunk = 0; chunk < num_chunks(p); ++chunk) {
            const int64_t begin = chunk * kChunk, end = least(begin + kChunk, p.length);
            save(chunk);
            if (!LONGHORN && task.normal(begin, end, most)) tokens<false>(begin, end);
            else tokens<true>(begin, end);
        }
        task.scatter(task.of_row(static_cast<T*>(p.final_state)), states);
    }

    void save(int64_t chunk) const {
        for (int64_t tile = 0; tile < task.tiles; ++tile) {
            for (int64_t n = 0; n < p.d_state; ++n) {
                const Vec h = copy_in<Vec>(states + tile * stride + n * lanes, lanes);
                copy_out(static_cast<T*>(p.checkpoints) + task.checkpoint_at(chunk, n, tile), h, task.count(tile));
            }
        }
    }

    template <bool CHECKED>
    void tokens(int64_t begin, int64_t end) const {
        for (int64_t t = begin; t < end; ++t) {
            if (task.fresh(t)) all_tiles<CHECKED, true>(t);
            else all_tiles<CHECKED, false>(t);
        }
    }

    template <bool CHECKED, bool FRESH>
    void all_tiles(int64_t t) const {
        const T *b = static_cast<const T*>(p.b) + task.key_at(t), *c = static_cast<const T*>(p.c) + task.key_at(t);
        task.each_tile([&](int64_t tile, int count) {
            const int64_t at = task.at(t, tile);
            const Vec x = copy_in<Vec>(static_cast<const T*>(p.x) + at, count);
            const Vec dt = copy_in<Vec>(static_cast<const T*>(p.dt) + at, count);
            if (t + kAhead < p.length) {
                __builtin_prefetch(static_cast<const T*>(p.x) + at + kAhead * p.channels, 0, 2);
                __builtin_prefetch(static_cast<const T*>(p.dt) + at + kAhead * p.channels, 0, 2);
                __builtin_prefetch(static_cast<const T*>(p.y) + at + kAhead * p.channels, 1, 2);
            }
            T* state = states + tile * stride;
            const T* rate = rates + tile * stride;
            const Vec y = token<IO, LONGHORN, CHECKED, FRESH>(x, dt, rate, b, c, state, p.d_state);
            copy_out(static_cast<T*>(p.y) + at, y, count);
        });
    }
};

template <typename IO>
void forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    auto* memory = static_cast<typename IO::Compute*>(scratch);
    for (int64_t index = from; index < to; ++index) {
        const Task<IO> task(p, index);
        if (p.a) Forward<IO, false>(task, memory).run();
        else Forward<IO, true>(task, memory).run();
    }
}

}  // namespace

namespace lm::LM_UNIT {

void selective_scan_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) forward<Double>(p, from, to, scratch);
    else forward<Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
