#include "rmsnorm/kernel.h"

#include "simd/vector.h"

namespace {

using namespace lm::rmsnorm;

// Calls body(i, count) over full vectors, then once for the values that do not fill one.
template <typename IO, typename Body>
inline void for_lanes(int64_t width, Body body) {
    constexpr int lanes = kLanes<IO>;
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) body(i, lanes);
    if (i < width) body(i, static_cast<int>(width - i));
}

template <typename IO>
inline typename IO::Compute total(const typename IO::Vec& values) {
    typename IO::Compute sum = 0;
    for (int lane = 0; lane < kLanes<IO>; ++lane) sum += values[lane];
    return sum;
}

// Values at segment s of an array [rows, groups, width]; null of null.
template <typename Value, typename Base>
inline Value* segment(const Params& p, Base* array, int64_t s) {
    return array ? static_cast<Value*>(array) + s * p.width : nullptr;
}

// The segments of tasks [from, to).
inline int64_t first_segment(const Params& p, int64_t from) { return from * kRows * p.groups; }
inline int64_t last_segment(const Params& p, int64_t to) {
    return (to * kRows < p.rows ? to * kRows : p.rows) * p.groups;
}

template <typename IO, bool Gated>
void forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    using Memory = typename IO::Memory;
    using Compute = typename IO::Compute;
    using Vec = typename IO::Vec;
    auto* u = static_cast<Compute*>(scratch);
    for (int64_t s = first_segment(p, from); s < last_segment(p, to); ++s) {
        const auto* x = segment<const Memory>(p, p.x, s);
        const auto* gate = segment<const Memory>(p, p.gate, s);
        const auto* weight = segment<const Compute>(p, p.weight, s % p.groups);
        auto* y = segment<Memory>(p, p.y, s);
        Vec squares = {};
        for_lanes<IO>(p.width, [&](int64_t i, int count) {
            Vec value = load<IO>(x + i, count);
            if constexpr (Gated) {
                const Vec z = load<IO>(gate + i, count);
                value *= z * sigmoid(z);
            }
            copy_out(u + i, value, count);
            squares += value * value;
        });
        const Compute mean = total<IO>(squares) / static_cast<Compute>(p.width);
        const Compute rstd = 1 / __builtin_sqrt(mean + static_cast<Compute>(p.eps));
        static_cast<Compute*>(p.rstd)[s] = rstd;
        for_lanes<IO>(p.width, [&](int64_t i, int count) {
            store<IO>(y + i, copy_in<Vec>(u + i, count) * rstd * copy_in<Vec>(weight + i, count), count);
        });
    }
}

// With n = u * rstd and h = grad_y * weight:  grad_u = rstd * (h - n * mean_group(h * n)).
template <typename IO, bool Gated>
void backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    using Memory = typename IO::Memory;
    using Compute = typename IO::Compute;
    using Vec = typename IO::Vec;
    auto* normed = static_cast<Compute*>(scratch);
    auto* sigmoids = normed + p.width;
    for (int64_t s = first_segment(p, from); s < last_segment(p, to); ++s) {
        const int64_t group = s % p.groups, task = s / p.groups / kRows;
        const auto* x = segment<const Memory>(p, p.x, s);
        const auto* gate = segment<const Memory>(p, p.gate, s);
        const auto* weight = segment<const Compute>(p, p.weight, group);
        const auto* grad_y = segment<const Memory>(p, p.grad_y, s);
        auto* grad_x = segment<Memory>(p, p.grad_x, s);
        auto* grad_gate = segment<Memory>(p, p.grad_gate, s);
        auto* grad_weight = segment<Compute>(p, p.partial, task * p.groups + group);
        const Compute rstd = static_cast<const Compute*>(p.rstd)[s];
        Vec products = {};
        for_lanes<IO>(p.width, [&](int64_t i, int count) {
            Vec n = load<IO>(x + i, count) * rstd;
            if constexpr (Gated) {
                const Vec z = load<IO>(gate + i, count);
                const Vec sigma = sigmoid(z);
                copy_out(sigmoids + i, sigma, count);
                n *= z * sigma;
            }
            copy_out(normed + i, n, count);
            const Vec grad = load<IO>(grad_y + i, count) * n;
            copy_out(grad_weight + i, copy_in<Vec>(grad_weight + i, count) + grad, count);
            products += grad * copy_in<Vec>(weight + i, count);
        });
        const Compute mean = total<IO>(products) / static_cast<Compute>(p.width);
        for_lanes<IO>(p.width, [&](int64_t i, int count) {
            const Vec h = load<IO>(grad_y + i, count) * copy_in<Vec>(weight + i, count);
            const Vec grad_u = rstd * (h - copy_in<Vec>(normed + i, count) * mean);
            if constexpr (Gated) {
                const Vec z = load<IO>(gate + i, count);
                const Vec sigma = copy_in<Vec>(sigmoids + i, count);
                store<IO>(grad_gate + i, grad_u * load<IO>(x + i, count) * sigma * (1 + z * (1 - sigma)), count);
                store<IO>(grad_x + i, grad_u * (z * sigma), count);
            } else {
                store<IO>(grad_x + i, grad_u, count);
            }
        });
    }
}

template <typename IO>
void either_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.gate ? forward<IO, true>(p, from, to, scratch) : forward<IO, false>(p, from, to, scratch);
}

template <typename IO>
void either_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.gate ? backward<IO, true>(p, from, to, scratch) : backward<IO, false>(p, from, to, scratch);
}

}  // namespace

namespace lm::LM_UNIT {

void rmsnorm_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    switch (p.dtype) {
        case DType::f32: return either_forward<Float>(p, from, to, scratch);
        case DType::f64: return either_forward<Double>(p, from, to, scratch);
        case DType::bf16: return either_forward<BFloat16>(p, from, to, scratch);
    }
}

void rmsnorm_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    switch (p.dtype) {
        case DType::f32: return either_backward<Float>(p, from, to, scratch);
        case DType::f64: return either_backward<Double>(p, from, to, scratch);
        case DType::bf16: return either_backward<BFloat16>(p, from, to, scratch);
    }
}

}  // namespace lm::LM_UNIT
