#include "diag_scan/kernel.h"

#include "simd/vector.h"

namespace {

using namespace lm::diag_scan;

// e^log * value, 0 where the decay is 0: below -87 in fp32, whose exp ends there.
inline VecF decayed(VecF log, VecF value) {
    const VecF product = vexp(log) * value;
    return log < -87.0f ? VecF{} : product;
}

inline VecD decayed(VecD log, VecD value) {
    const VecD decay = vexp(log);
    return decay == 0 ? decay : decay * value;
}

// One task: a row's channels [c0, c0 + channels), and the state that is carried through it.
template <typename IO>
struct Task {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;

    const Params& p;
    int64_t row, c0;
    int channels;
    alignas(64) T state[kTileBytes / sizeof(T)];

    Task(const Params& params, int64_t index) : p(params) {
        row = index / num_tiles(p);
        c0 = index % num_tiles(p) * tile_channels(p);
        const int64_t left = p.channels - c0;
        channels = static_cast<int>(left < tile_channels(p) ? left : tile_channels(p));
    }

    // Column t of an array [batch, length, channels].
    template <typename Pointer>
    Pointer column(Pointer values, int64_t t) const {
        return values + (row * p.length + t) * p.channels + c0;
    }
    int64_t state_offset() const { return row * p.channels + c0; }

    bool fresh(int64_t t) const {
        return (p.starts && p.starts[row * p.length + t]) || (t == 0 && !p.initial_state);
    }

    // body(channel, count) over full vectors, then once for the channels that do not fill one.
    template <typename Body>
    void each(const Body& body) const {
        constexpr int lanes = kLanes<IO>;
        int c = 0;
        for (; c + lanes <= channels; c += lanes) body(c, lanes);
        if (c < channels) body(c, channels - c);
    }

    void run_forward() {
        const T* x = static_cast<const T*>(p.x);
        const T* log_a = static_cast<const T*>(p.log_a);
        T* y = static_cast<T*>(p.y);
        const T* initial = static_cast<const T*>(p.initial_state);
        if (initial) std::memcpy(state, initial + state_offset(), channels * sizeof(T));
        else std::memset(state, 0, sizeof(state));
        for (int64_t t = 0; t < p.length; ++t) {
            const bool drop = fresh(t);
            const T *in = column(x, t), *log = column(log_a, t);
            T* out = column(y, t);
            each([&](int c, int count) {
                Vec h = copy_in<Vec>(in + c, count);
                if (!drop) h += decayed(copy_in<Vec>(log + c, count), copy_in<Vec>(state + c, count));
                copy_out(out + c, h, count);
                copy_out(state + c, h, count);
            });
        }
        std::memcpy(static_cast<T*>(p.final_state) + state_offset(), state, channels * sizeof(T));
    }

    // `state` holds the gradient of h_t that comes from the right.
    void run_backward() {
        const T* log_a = static_cast<const T*>(p.log_a);
        const T* states = static_cast<const T*>(p.states);
        const T* grad_y = static_cast<const T*>(p.grad_y);
        const T* initial = static_cast<const T*>(p.initial_state);
        std::memcpy(state, static_cast<const T*>(p.grad_final) + state_offset(), channels * sizeof(T));
        for (int64_t t = p.length - 1; t >= 0; --t) {
            const bool drop = fresh(t);
            const T *log = column(log_a, t), *grad_out = column(grad_y, t);
            const T* before = drop ? nullptr : t > 0 ? column(states, t - 1) : initial + state_offset();
            T* grad_x = column(static_cast<T*>(p.grad_x), t);
            T* grad_log = column(static_cast<T*>(p.grad_log_a), t);
            each([&](int c, int count) {
                const Vec grad = copy_in<Vec>(grad_out + c, count) + copy_in<Vec>(state + c, count);
                Vec by_log = {}, left = {};
                if (!drop) {
                    left = decayed(copy_in<Vec>(log + c, count), grad);
                    by_log = left == 0 ? left : left * copy_in<Vec>(before + c, count);
                }
                copy_out(grad_x + c, grad, count);
                copy_out(grad_log + c, by_log, count);
                copy_out(state + c, left, count);
            });
        }
        std::memcpy(static_cast<T*>(p.grad_initial) + state_offset(), state, channels * sizeof(T));
    }
};

}  // namespace

namespace lm::LM_UNIT {

void diag_scan_forward(const Params& p, int64_t from, int64_t to) {
    for (int64_t index = from; index < to; ++index) {
        if (p.f64) Task<Double>(p, index).run_forward();
        else Task<Float>(p, index).run_forward();
    }
}

void diag_scan_backward(const Params& p, int64_t from, int64_t to) {
    for (int64_t index = from; index < to; ++index) {
        if (p.f64) Task<Double>(p, index).run_backward();
        else Task<Float>(p, index).run_backward();
    }
}

}  // namespace lm::LM_UNIT
