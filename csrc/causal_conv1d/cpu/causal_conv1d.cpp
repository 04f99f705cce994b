#include "causal_conv1d/kernel.h"

#include "simd/vector.h"

namespace {

using namespace lm::causal_conv1d;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One task: columns [t0, t1) of row b, channels [c0, c0 + channels). Pointers below start at channel c0.
template <typename IO>
struct Task {
    using Memory = typename IO::Memory;
    using Compute = typename IO::Compute;

    const Params& p;
    int64_t b, chunk, t0, t1, c0;
    int channels;

    Task(const Params& params, int64_t index) : p(params) {
        const int64_t tiles = num_tiles(p), tile = tile_channels(p);
        c0 = index % tiles * tile;
        chunk = index / tiles % num_chunks(p);
        b = index / tiles / num_chunks(p);
        t0 = chunk * kChunk;
        t1 = least(t0 + kChunk, p.length);
        channels = static_cast<int>(least(tile, p.channels - c0));
    }

    // Column t of an array [batch, length, channels]; a negative t is a column of its tail.
    template <typename Pointer, typename Base>
    Pointer column(Base* values, Base* tail, int64_t t) const {
        const int64_t w = p.width - 1;
        return t >= 0 ? static_cast<Pointer>(values) + (b * p.length + t) * p.channels + c0
                      : static_cast<Pointer>(tail) + (b * w + w + t) * p.channels + c0;
    }
    const Memory* in(int64_t t) const { return column<const Memory*>(p.x, p.tail, t); }

    const Compute* weight(int64_t distance) const {
        return static_cast<const Compute*>(p.weight) + (p.width - 1 - distance) * p.channels + c0;
    }
    const Compute* bias() const { return p.bias ? static_cast<const Compute*>(p.bias) + c0 : nullptr; }

    // How many taps column t sees, its own included; what they miss contributes nothing, whatever it holds.
    int64_t visible(int64_t t) const {
        int64_t distance = p.width - 1;
        if (p.positions) distance = least(distance, p.positions[b * p.length + t]);
        if (!p.tail) distance = least(distance, t);
        return distance + 1;
    }
};

// bias + sum of the taps, for lanes [c, c + count); TAPS is their number, or 0 if known at run time only.
template <typename IO, int TAPS>
inline typename IO::Vec convolve(const typename IO::Memory* const* in, const typename IO::Compute* const* weight,
                                 const typename IO::Compute* bias, int64_t taps, int c, int count) {
    using Vec = typename IO::Vec;
    Vec sum = bias ? copy_in<Vec>(bias + c, count) : Vec{};
    for (int64_t d = 0; d < (TAPS ? TAPS : taps); ++d) {
        sum += copy_in<Vec>(weight[d] + c, count) * load<IO>(in[d] + c, count);
    }
    return sum;
}

// Calls body(c, count) over full vectors, then once for the channels that do not fill one.
template <typename IO, typename Body>
inline void for_lanes(int channels, Body body) {
    constexpr int lanes = kLanes<IO>;
    int c = 0;
    for (; c + lanes <= channels; c += lanes) body(c, lanes);
    if (c < channels) body(c, channels - c);
}

template <typename IO, int TAPS>
void forward_column(const Task<IO>& task, int64_t t, int64_t taps) {
    const typename IO::Memory* in[kMaxWidth];
    const typename IO::Compute* weight[kMaxWidth];
    for (int64_t d = 0; d < taps; ++d) {
        in[d] = task.in(t - d);
        weight[d] = task.weight(d);
    }
    const auto* bias = task.bias();
    auto* y = task.template column<typename IO::Memory*>(task.p.y, (void*)nullptr, t);
    for_lanes<IO>(task.channels, [&](int c, int count) {
        const auto z = convolve<IO, TAPS>(in, weight, bias, taps, c, count);
        store<IO>(y + c, task.p.silu ? z * sigmoid(z) : z, count);
    });
}

template <typename IO>
void forward(const Params& p, int64_t from, int64_t to) {
    for (int64_t index = from; index < to; ++index) {
        const Task<IO> task(p, index);
        for (int64_t t = task.t0; t < task.t1; ++t) {
            switch (const int64_t taps = task.visible(t)) {
                case 2: forward_column<IO, 2>(task, t, taps); break;
                case 3: forward_column<IO, 3>(task, t, taps); break;
                case 4: forward_column<IO, 4>(task, t, taps); break;
                default: forward_column<IO, 0>(task, t, taps);
            }
        }
    }
}

// The gradient of x is gathered in a ring of the last `width` columns: column s is complete after column s + width - 1.
template <typename IO>
struct Ring {
    using Compute = typename IO::Compute;
    alignas(64) Compute values[kMaxWidth][kTileBytes / sizeof(Compute)];
    int64_t width;

    Compute* at(int64_t s) { return values[(s + width) % width]; }
};

// Column t: its taps [0, taps) add to the parameters' gradient if `own`, its taps [first, last) to the ring.
template <typename IO, int TAPS>
void backward_column(const Task<IO>& task, Ring<IO>& ring, int64_t t, int64_t taps, bool own, int64_t first,
                     int64_t last) {
    using Compute = typename IO::Compute;
    using Vec = typename IO::Vec;
    const Params& p = task.p;
    const typename IO::Memory* in[kMaxWidth];
    const Compute* weight[kMaxWidth];
    Compute* grad_weight[kMaxWidth];
    Compute* grad_in[kMaxWidth];
    auto* partial = static_cast<Compute*>(p.partial) +
                    (task.b * num_chunks(p) + task.chunk) * (p.width + 1) * p.channels + task.c0;
    for (int64_t d = 0; d < taps; ++d) {
        in[d] = task.in(t - d);
        weight[d] = task.weight(d);
        grad_weight[d] = partial + (p.width - 1 - d) * p.channels;
        grad_in[d] = ring.at(t - d);
    }
    const auto* bias = task.bias();
    auto* grad_bias = partial + p.width * p.channels;
    const auto* grad_y = task.template column<const typename IO::Memory*>(p.grad_y, (const void*)nullptr, t);
    const auto add = [](Compute* to, Vec value, int count) { copy_out(to, copy_in<Vec>(to, count) + value, count); };

    for_lanes<IO>(task.channels, [&](int c, int count) {
        Vec grad = load<IO>(grad_y + c, count);
        if (p.silu) {
            const Vec z = convolve<IO, TAPS>(in, weight, bias, taps, c, count);
            const Vec s = sigmoid(z);
            grad = grad * s * (1 + z * (1 - s));
        }
        if (own) {
            for (int64_t d = 0; d < (TAPS ? TAPS : taps); ++d) {
                add(grad_weight[d] + c, grad * load<IO>(in[d] + c, count), count);
            }
            add(grad_bias + c, grad, count);
        }
        for (int64_t d = TAPS ? 0 : first; d < (TAPS ? TAPS : last); ++d) {
            add(grad_in[d] + c, grad * copy_in<Vec>(weight[d] + c, count), count);
        }
    });
}

// Column s of the gradient: what the ring gathered, plus the gradient of the returned tail where s is part of it.
template <typename IO>
void write_grad_in(const Task<IO>& task, Ring<IO>& ring, int64_t s) {
    using Memory = typename IO::Memory;
    const Params& p = task.p;
    auto* to = task.template column<Memory*>(p.grad_x, p.grad_tail, s);
    const Memory* grad_final = nullptr;
    if (s >= p.length - (p.width - 1)) {
        grad_final = task.template column<const Memory*>((const void*)nullptr, p.grad_final, s - p.length);
    }
    const auto* gathered = ring.at(s);
    for_lanes<IO>(task.channels, [&](int c, int count) {
        auto grad = copy_in<typename IO::Vec>(gathered + c, count);
        if (grad_final) grad += load<IO>(grad_final + c, count);
        store<IO>(to + c, grad, count);
    });
}

template <typename IO>
void backward(const Params& p, int64_t from, int64_t to) {
    Ring<IO> ring;
    ring.width = p.width;
    for (int64_t index = from; index < to; ++index) {
        const Task<IO> task(p, index);
        const int64_t reach = p.width - 1;
        const int64_t begin = task.t0 - (task.t0 == 0 ? reach : 0);  // the first chunk owns the tail's columns too
        const int64_t end = least(task.t1 + reach, p.length);
        for (int64_t s = begin; s < task.t0; ++s) std::memset(ring.at(s), 0, kTileBytes);
        for (int64_t t = task.t0; t < end; ++t) {
            const bool own = t < task.t1;
            if (own) std::memset(ring.at(t), 0, kTileBytes);
            const int64_t taps = task.visible(t);
            const int64_t first = own ? 0 : t - task.t1 + 1;
            const int64_t last = least(taps, t - begin + 1);
            const bool whole = own && last == taps;
            switch (whole ? taps : 0) {
                case 2: backward_column<IO, 2>(task, ring, t, taps, own, first, last); break;
                case 3: backward_column<IO, 3>(task, ring, t, taps, own, first, last); break;
                case 4: backward_column<IO, 4>(task, ring, t, taps, own, first, last); break;
                default: backward_column<IO, 0>(task, ring, t, taps, own, first, last);
            }
            if (t - reach >= begin) write_grad_in(task, ring, t - reach);
        }
        // the columns whose last reader lies right of the row
        for (int64_t s = most(begin, end - reach); s < task.t1; ++s) write_grad_in(task, ring, s);
    }
}

}  // namespace

namespace lm::LM_UNIT {

void causal_conv1d_forward(const Params& p, int64_t from, int64_t to) {
    switch (p.dtype) {
        case DType::f32: return forward<Float>(p, from, to);
        case DType::f64: return forward<Double>(p, from, to);
        case DType::bf16: return forward<BFloat16>(p, from, to);
    }
}

void causal_conv1d_backward(const Params& p, int64_t from, int64_t to) {
    switch (p.dtype) {
        case DType::f32: return backward<Float>(p, from, to);
        case DType::f64: return backward<Double>(p, from, to);
        case DType::bf16: return backward<BFloat16>(p, from, to);
    }
}

}  // namespace lm::LM_UNIT
