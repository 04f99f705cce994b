#include "selective_scan/cpu/task.h"

namespace {

// A thread's scratch. [tile][d_state] vectors: rates, the gradient of the state from the right, the gradient of A.
// [kChunk][d_state] vectors: decays, states (one more: before the chunk), and the gradients of B and C, whose lanes are
// summed when all tiles have added theirs.
template <typename IO>
struct Memory {
    using T = typename IO::Compute;
    T *rates, *grads, *grad_a, *decays, *states, *grad_b, *grad_c;

    Memory(const Params& p, T* scratch) {
        const int64_t part = p.d_state * kPart, token = p.d_state * kLanes<IO>;
        rates = scratch, grads = rates + part, grad_a = grads + part;
        decays = grad_a + part, states = decays + kChunk * token;
        grad_b = states + (kChunk + 1) * token, grad_c = grad_b + kChunk * token;
    }
};

template <typename IO, bool LONGHORN>
struct Backward {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    const Task<IO>& task;
    const Params& p;
    const Memory<IO> m;
    const int64_t token;  // elements of a token's vectors, or a tile's

    Backward(const Task<IO>& task_, T* scratch)
        : task(task_), p(task_.p), m(task_.p, scratch), token(task_.p.d_state * lanes) {}

    static Vec in(const T* from) { return copy_in<Vec>(from, lanes); }
    const T* b(int64_t t) const { return static_cast<const T*>(p.b) + task.key_at(t); }
    const T* c(int64_t t) const { return static_cast<const T*>(p.c) + task.key_at(t); }
    Vec channels(const void* values, int64_t t, int64_t tile) const {
        return copy_in<Vec>(static_cast<const T*>(values) + task.at(t, tile), task.count(tile));
    }

    void run() const {
        task.gather(m.rates, static_cast<const T*>(p.a), kRateScale<T>);
        task.gather(m.grads, task.of_row(static_cast<const T*>(p.grad_final)));
        task.gather(m.grad_a, nullptr);
        for (int64_t chunk = num_chunks(p) - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * kChunk, end = least(begin + kChunk, p.length);
            std::memset(m.grad_b, 0, 2 * kChunk * token * sizeof(T));
            for (int64_t tile = 0; tile < task.tiles; ++tile) {
                recompute(chunk, begin, end, tile);
                for (int64_t t = end - 1; t >= begin; --t) {
                    if (task.fresh(t)) step<true>(t, t - begin, tile);
                    else step<false>(t, t - begin, tile);
                }
            }
            for (int64_t t = begin; t < end; ++t) {
                sum_lanes(static_cast<T*>(p.partial_b), t, m.grad_b + (t - begin) * token);
                sum_lanes(static_cast<T*>(p.partial_c), t, m.grad_c + (t - begin) * token);
            }
        }
        task.scatter(task.of_row(static_cast<T*>(p.grad_initial)), m.grads);
        if (!LONGHORN) task.scatter(task.of_row(static_cast<T*>(p.partial_a)), m.grad_a);
    }

    // Decays and states of a chunk, from the state before it.
    void recompute(int64_t chunk, int64_t begin, int64_t end, int64_t tile) const {
        const T* rate = m.rates + tile * token;
        for (int64_t n = 0; n < p.d_state; ++n) {
            const T* saved = static_cast<const T*>(p.checkpoints) + task.checkpoint_at(chunk, n, tile);
            copy_out(m.states + n * lanes, copy_in<Vec>(saved, task.count(tile)), lanes);
        }
        for (int64_t t = begin; t < end; ++t) {
            const Vec dt = channels(p.dt, t, tile), input = dt * channels(p.x, t, tile);
            const bool fresh = task.fresh(t);
            const T *key = b(t), *before = m.states + (t - begin) * token;
            T *after = m.states + (t - begin + 1) * token, *decays = m.decays + (t - begin) * token;
#pragma GCC unroll 4
            for (int64_t n = 0; n < p.d_state; ++n) {
                Vec h = input * key[n];
                if (!fresh) {
                    const Vec decay = decay_of<LONGHORN>(dt, in(rate + n * lanes), key[n]);
                    copy_out(decays + n * lanes, decay, lanes);
                    h += scaled(decay, in(before + n * lanes));
                }
                copy_out(after + n * lanes, h, lanes);
            }
        }
    }

    // Token t of a tile, the i-th of its chunk. dt enters through the decay and the input, Longhorn's B too.
    template <bool FRESH>
    void step(int64_t t, int64_t i, int64_t tile) const {
        const Vec x = channels(p.x, t, tile), dt = channels(p.dt, t, tile), grad_y = channels(p.grad_y, t, tile);
        const Vec input = dt * x;
        const T *key = b(t), *query = c(t), *rate = m.rates + tile * token, *decays = m.decays + i * token;
        const T *before = m.states + i * token, *after = before + token;
        T *grads = m.grads + tile * token, *grad_a = m.grad_a + tile * token;
        T *grad_b = m.grad_b + i * token, *grad_c = m.grad_c + i * token;
        Vec grad_input = {}, grad_dt = {};
#pragma GCC unroll 4
        for (int64_t n = 0; n < p.d_state; ++n) {
            const int64_t v = n * lanes;
            const Vec grad = in(grads + v) + grad_y * query[n];
            copy_out(grad_c + v, in(grad_c + v) + grad_y * in(after + v), lanes);
            grad_input += grad * key[n];
            Vec by_key = grad * input, left = {};
            if constexpr (!FRESH) {
                const Vec decay = in(decays + v);
                left = scaled(decay, grad);
                if constexpr (LONGHORN) {
                    const Vec by_square = grad * in(before + v) * key[n];  // of -dt key^2, over key
                    grad_dt -= by_square * key[n];
                    by_key -= 2 * by_square * dt;
                } else {
                    const Vec product = left * in(before + v);
                    const Vec by_exponent = decay == 0 ? Vec{} : product;
                    grad_dt += by_exponent * in(rate + v);
                    copy_out(grad_a + v, in(grad_a + v) + by_exponent * dt, lanes);
                }
            }
            copy_out(grad_b + v, in(grad_b + v) + by_key, lanes);
            copy_out(grads + v, left, lanes);
        }
        const int64_t at = task.at(t, tile);
        copy_out(static_cast<T*>(p.grad_x) + at, grad_input * dt, task.count(tile));
        if constexpr (!LONGHORN) grad_dt /= kRateScale<T>;
        copy_out(static_cast<T*>(p.grad_dt) + at, grad_dt + grad_input * x, task.count(tile));
    }

    // The sum over lanes of a token's vectors, to its place in the part's partial gradient.
    void sum_lanes(T* partial, int64_t t, const T* vectors) const {
        T* to = partial + task.part * p.batch * p.length * p.groups * p.d_state + task.key_at(t);
        for (int64_t n = 0; n < p.d_state; ++n) {
            T sums[lanes];
            std::memcpy(sums, vectors + n * lanes, sizeof(sums));
#pragma GCC unroll 4
            for (int half = lanes / 2; half > 0; half /= 2) {
                for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
            }
            to[n] = sums[0];
        }
    }
};

template <typename IO>
void backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    auto* memory = static_cast<typename IO::Compute*>(scratch);
    for (int64_t index = from; index < to; ++index) {
        const Task<IO> task(p, index);
        if (p.a) Backward<IO, false>(task, memory).run();
        else Backward<IO, true>(task, memory).run();
    }
}

}  // namespace

namespace lm::LM_UNIT {

void selective_scan_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) backward<Double>(p, from, to, scratch);
    else backward<Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
