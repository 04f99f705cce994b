// Token after token, the channels side by side in the lanes. Nothing but p, a and b depends on the token before, so the
// exponentials of several tokens are in flight at once.
#include "simd/vector.h"
#include "wkv4/kernel.h"

namespace {

using namespace lm::wkv4;

// exp that reaches 0, which the clamped vexp does not.
inline VecF share(VecF x) { return x < -87.0f ? VecF{} : vexp(x); }
inline VecD share(VecD x) { return vexp(x); }

template <typename Vec>
inline Vec larger(Vec a, Vec b) {
    return a < b ? b : a;
}

// One vector of channels of a row.
template <typename IO>
struct Channels {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    struct State {
        Vec a = {}, b = {}, p = splat<Vec>(T(-1e38));
    };

    const Params& p;
    const int64_t row, channel;
    const int count = static_cast<int>(p.width - channel < lanes ? p.width - channel : lanes);
    const Vec w = in(p.w, 0), u = in(p.u, 0);

    // `index` counts vectors of `width` elements.
    Vec in(const void* tensor, int64_t index) const {
        return copy_in<Vec>(static_cast<const T*>(tensor) + index * p.width + channel, count);
    }
    void out(void* tensor, int64_t index, Vec values) const {
        copy_out(static_cast<T*>(tensor) + index * p.width + channel, values, count);
    }

    bool starts(int64_t t) const { return p.starts && p.starts[row * p.length + t]; }

    State initial() const {
        State s;
        if (!p.initial_state) return s;
        const Vec b = in(p.initial_state, row * 3 + 1);
        const auto empty = b == Vec{};
        s.a = empty ? s.a : in(p.initial_state, row * 3);
        s.p = empty ? s.p : in(p.initial_state, row * 3 + 2);
        s.b = b;
        return s;
    }

    void step(State& s, Vec v, Vec k) const {
        const Vec top = larger(s.p + w, k), past = share(s.p + w - top), now = share(k - top);
        s = {past * s.a + now * v, past * s.b + now, top};
    }

    void forward() const {
        State s = initial();
        for (int64_t t = 0; t < p.length; ++t) {
            if (starts(t)) s = State();
            const int64_t at = row * p.length + t;
            const Vec v = in(p.v, at), k = in(p.k, at);
            const Vec top = larger(s.p, u + k), past = share(s.p - top), now = share(u + k - top);
            out(p.y, at, (past * s.a + now * v) / (past * s.b + now));
            step(s, v, k);
        }
        const Vec state[] = {s.a, s.b, s.p};
        for (int n = 0; n < 3; ++n) out(p.final_state, row * 3 + n, state[n]);
    }

    // `before`: memory for the states before every token.
    void backward(State* before) const {
        State s = initial();
        for (int64_t t = 0; t < p.length; ++t) {
            if (starts(t)) s = State();
            before[t] = s;
            step(s, in(p.v, row * p.length + t), in(p.k, row * p.length + t));
        }
        Vec grad_a = in(p.grad_final, row * 3), grad_b = in(p.grad_final, row * 3 + 1);
        Vec grad_p = in(p.grad_final, row * 3 + 2), grad_w = {}, grad_u = {};
        for (int64_t t = p.length - 1; t >= 0; --t) {
            const int64_t at = row * p.length + t;
            const State& s = before[t];
            const Vec v = in(p.v, at), k = in(p.k, at);
            // the step of the state; what the choice of `top` contributes goes to the larger, or half to each
            const Vec next = s.p + w, top = larger(next, k), past = share(next - top), now = share(k - top);
            const Vec through_past = past * (s.a * grad_a + s.b * grad_b), through_now = now * (v * grad_a + grad_b);
            const Vec choice = grad_p - (through_past + through_now);
            const Vec part = next > k ? splat<Vec>(T(1)) : next < k ? Vec{} : splat<Vec>(T(0.5));
            Vec grad_v = now * grad_a, grad_k = through_now + (1 - part) * choice;
            grad_p = through_past + part * choice;
            grad_w += grad_p;
            grad_a *= past, grad_b *= past;
            // the output
            const Vec high = larger(s.p, u + k), old = share(s.p - high), own = share(u + k - high);
            const Vec below = old * s.b + own, y = (old * s.a + own * v) / below, grad = in(p.grad_y, at) / below;
            const Vec through_own = own * grad * (v - y);
            grad_v += own * grad;
            grad_k += through_own;
            grad_u += through_own;
            grad_a += old * grad;
            grad_b -= old * grad * y;
            grad_p += old * grad * (s.a - s.b * y);
            out(p.grad_v, at, grad_v);
            out(p.grad_k, at, grad_k);
            if (starts(t) || (t == 0 && !p.initial_state)) grad_a = grad_b = grad_p = Vec{};
        }
        const Vec grads[] = {grad_a, grad_b, grad_p};
        for (int n = 0; n < 3; ++n) out(p.grad_initial, row * 3 + n, grads[n]);
        out(p.grad_w, row, grad_w);
        out(p.grad_u, row, grad_u);
    }
};

template <typename IO, typename Body>
void for_channels(const Params& p, int64_t from, int64_t to, const Body& body) {
    const int64_t blocks = (p.width + kChannels - 1) / kChannels;
    for (int64_t task = from; task < to; ++task) {
        const int64_t first = task % blocks * kChannels;
        for (int64_t c = first; c < p.width && c < first + kChannels; c += kLanes<IO>) {
            body(Channels<IO>{.p = p, .row = task / blocks, .channel = c});
        }
    }
}

template <typename IO>
void forward(const Params& p, int64_t from, int64_t to) {
    for_channels<IO>(p, from, to, [](const auto& channels) { channels.forward(); });
}

template <typename IO>
void backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    auto* states = static_cast<typename Channels<IO>::State*>(scratch);
    for_channels<IO>(p, from, to, [&](const auto& channels) { channels.backward(states); });
}

}  // namespace

namespace lm::LM_UNIT {

void wkv4_forward(const Params& p, int64_t from, int64_t to) {
    p.f64 ? forward<Double>(p, from, to) : forward<Float>(p, from, to);
}

void wkv4_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? backward<Double>(p, from, to, scratch) : backward<Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
