#include "selective_scan/cpu/task.h"

namespace {

// A thread's scratch, in vectors of channels but for keys and queries.
template <typename IO>
struct Memory {
    using T = typename IO::Compute;
    T *rates, *grads, *grad_a;                        // [tile][padded]: grads is of the state, from the right
    T *inputs, *dt, *grad_y, *grad_inputs, *grad_dt;  // [tile][kChunk]
    T *decays, *states, *grad_b, *grad_c;             // [kChunk][kBlock], states one more: before the chunk
    T *keys, *queries;                                // [kChunk][padded] scalars: B and C

    Memory(const Task<IO>& task, T* scratch) {
        const int64_t part = task.padded * kPart, row = kChunk * kPart, block = kChunk * kBlock * kLanes<IO>;
        rates = scratch, grads = rates + part, grad_a = grads + part;
        inputs = grad_a + part, dt = inputs + row, grad_y = dt + row, grad_inputs = grad_y + row;
        grad_dt = grad_inputs + row, decays = grad_dt + row, states = decays + block;
        grad_b = states + block + kBlock * kLanes<IO>, grad_c = grad_b + block;
        keys = grad_c + block, queries = keys + kChunk * task.padded;
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

    Backward(const Task<IO>& task_, T* scratch) : task(task_), p(task_.p), m(task_, scratch) {}

    static Vec in(const T* from) { return copy_in<Vec>(from, lanes); }
    static void out(T* to, const Vec& values) { copy_out(to, values, lanes); }

    void run() const {
        task.gather(m.rates, static_cast<const T*>(p.a), kRateScale<T>);
        task.gather(m.grads, task.of_row(static_cast<const T*>(p.grad_final)));
        task.gather(m.grad_a, nullptr);
        T most[kPart];
        task.steepest(m.rates, most);
        for (int64_t chunk = num_chunks(p) - 1; chunk >= 0; --chunk) {
            const int64_t begin = chunk * kChunk, end = least(begin + kChunk, p.length);
            read(begin, end);
            if (!LONGHORN && task.normal(begin, end, most)) blocks<false>(chunk, begin, end);
            else blocks<true>(chunk, begin, end);
            write(begin, end);
        }
        task.scatter(task.of_row(static_cast<T*>(p.grad_initial)), m.grads);
        if (!LONGHORN) task.scatter(task.of_row(static_cast<T*>(p.partial_a)), m.grad_a);
    }

    // Where a token of the chunk lies in arrays [tile][kChunk].
    static int64_t row(int64_t tile, int64_t i) { return (tile * kChunk + i) * lanes; }

    static Vec load(const void* values, int64_t at, int count) {
        return copy_in<Vec>(static_cast<const T*>(values) + at, count);
    }

    void read(int64_t begin, int64_t end) const {
        std::memset(m.grad_inputs, 0, 2 * kChunk * kPart * sizeof(T));
        for (int64_t t = begin; t < end; ++t) {
            task.each_tile([&](int64_t tile, int count) {
                const int64_t at = task.at(t, tile), to = row(tile, t - begin);
                const Vec dt = load(p.dt, at, count);
                out(m.inputs + to, dt * load(p.x, at, count));
                out(m.dt + to, dt);
                out(m.grad_y + to, load(p.grad_y, at, count));
            });
            task.read_key(static_cast<const T*>(p.b), t, m.keys + (t - begin) * task.padded);
            task.read_key(static_cast<const T*>(p.c), t, m.queries + (t - begin) * task.padded);
        }
    }

    // The gradients of x and dt, from those of the input dt x and of the exponent.
    void write(int64_t begin, int64_t end) const {
        const T scale = LONGHORN ? 1 : 1 / kRateScale<T>;
        for (int64_t t = begin; t < end; ++t) {
            task.each_tile([&](int64_t tile, int count) {
                const int64_t at = task.at(t, tile), from = row(tile, t - begin);
                const Vec grad = in(m.grad_inputs + from);
                const Vec grad_dt = scale * in(m.grad_dt + from) + grad * load(p.x, at, count);
                copy_out(static_cast<T*>(p.grad_x) + at, grad * in(m.dt + from), count);
                copy_out(static_cast<T*>(p.grad_dt) + at, grad_dt, count);
            });
        }
    }

    template <bool CHECKED>
    void blocks(int64_t chunk, int64_t begin, int64_t end) const {
        for (int64_t n = 0; n < p.d_state; n += kBlock) {
            std::memset(m.grad_b, 0, 2 * kChunk * kBlock * lanes * sizeof(T));
            for (int64_t tile = 0; tile < task.tiles; ++tile) {
                recompute<CHECKED>(chunk, begin, end, tile, n);
                steps<CHECKED>(begin, end, tile, n);
            }
            for (int64_t t = begin; t < end; ++t) {
                sum_lanes(static_cast<T*>(p.partial_b), t, n, m.grad_b + (t - begin) * kBlock * lanes);
                sum_lanes(static_cast<T*>(p.partial_c), t, n, m.grad_c + (t - begin) * kBlock * lanes);
            }
        }
    }

    // Decays and states of a chunk, from the state before it.
    template <bool CHECKED>
    void recompute(int64_t chunk, int64_t begin, int64_t end, int64_t tile, int64_t first) const {
        Vec h[kBlock], rate[kBlock];
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) {
            rate[j] = in(m.rates + (tile * task.padded + first + j) * lanes);
            h[j] = Vec{};
            if (first + j < p.d_state) {
                const T* saved = static_cast<const T*>(p.checkpoints) + task.checkpoint_at(chunk, first + j, tile);
                h[j] = copy_in<Vec>(saved, task.count(tile));
            }
            out(m.states + j * lanes, h[j]);
        }
        const T *dts = m.dt + row(tile, 0), *inputs = m.inputs + row(tile, 0), *key = m.keys + first;
        T *after = m.states + kBlock * lanes, *decays = m.decays;
        for (int64_t t = begin; t < end; ++t) {
            const Vec dt = in(dts), input = in(inputs);
            if (task.fresh(t)) {
#pragma GCC unroll 8
                for (int j = 0; j < kBlock; ++j) h[j] = input * key[j];
            } else {
#pragma GCC unroll 8
                for (int j = 0; j < kBlock; ++j) {
                    const Vec decay = decay_of<LONGHORN, CHECKED>(dt, rate[j], key[j]);
                    h[j] = input * key[j] + decay * kept<CHECKED>(decay, h[j]);
                    out(decays + j * lanes, decay);
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < kBlock; ++j) out(after + j * lanes, h[j]);
            dts += lanes, inputs += lanes, key += task.padded, after += kBlock * lanes, decays += kBlock * lanes;
        }
    }

    // What is carried from token to token, to the left.
    struct Carried {
        Vec grads[kBlock], grad_a[kBlock], rates[kBlock], after[kBlock];
    };

    // dt enters through the decay and the input, Longhorn's B too.
    template <bool CHECKED>
    void steps(int64_t begin, int64_t end, int64_t tile, int64_t first) const {
        Carried carried;
        const int64_t of_tile = (tile * task.padded + first) * lanes;
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) {
            carried.grads[j] = in(m.grads + of_tile + j * lanes);
            carried.grad_a[j] = in(m.grad_a + of_tile + j * lanes);
            carried.rates[j] = in(m.rates + of_tile + j * lanes);
            carried.after[j] = in(m.states + ((end - begin) * kBlock + j) * lanes);
        }
        for (int64_t t = end - 1; t >= begin; --t) {
            if (task.fresh(t)) step<CHECKED, true>(carried, t - begin, tile, first);
            else step<CHECKED, false>(carried, t - begin, tile, first);
        }
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) {
            out(m.grads + of_tile + j * lanes, carried.grads[j]);
            out(m.grad_a + of_tile + j * lanes, carried.grad_a[j]);
        }
    }

    template <bool CHECKED, bool FRESH>
    __attribute__((always_inline)) void step(Carried& carried, int64_t i, int64_t tile, int64_t first) const {
        const int64_t at = row(tile, i);
        const Vec dt = in(m.dt + at), input = in(m.inputs + at), grad_y = in(m.grad_y + at);
        const T *key = m.keys + i * task.padded + first, *query = m.queries + i * task.padded + first;
        const T *before = m.states + i * kBlock * lanes, *decays = m.decays + i * kBlock * lanes;
        T *grad_b = m.grad_b + i * kBlock * lanes, *grad_c = m.grad_c + i * kBlock * lanes;
        Vec grad_input = in(m.grad_inputs + at), grad_dt = in(m.grad_dt + at);
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) {
            const int64_t v = j * lanes;
            const Vec grad = carried.grads[j] + grad_y * query[j];
            out(grad_c + v, in(grad_c + v) + grad_y * carried.after[j]);
            grad_input += grad * key[j];
            Vec by_key = in(grad_b + v) + grad * input, left = {};
            const Vec state = in(before + v);
            if constexpr (!FRESH) {
                const Vec decay = in(decays + v);
                left = decay * kept<CHECKED>(decay, grad);
                if constexpr (LONGHORN) {
                    const Vec by_square = grad * state * key[j];  // of -dt key^2, over key
                    grad_dt -= by_square * key[j];
                    by_key -= 2 * by_square * dt;
                } else {
                    const Vec by_exponent = left * kept<CHECKED>(decay, state);
                    grad_dt += by_exponent * carried.rates[j];
                    carried.grad_a[j] += by_exponent * dt;
                }
            }
            out(grad_b + v, by_key);
            carried.after[j] = state;
            carried.grads[j] = left;
        }
        out(m.grad_inputs + at, grad_input);
        out(m.grad_dt + at, grad_dt);
    }

    // The sums over lanes of a token's block of vectors, to their place in the part's partial gradient.
    void sum_lanes(T* partial, int64_t t, int64_t first, const T* vectors) const {
        T* to = partial + task.part * p.batch * p.length * p.groups * p.d_state + task.key_at(t) + first;
        for (int64_t j = 0; j < least(kBlock, p.d_state - first); ++j) {
            T sums[lanes];
            std::memcpy(sums, vectors + j * lanes, sizeof(sums));
#pragma GCC unroll 4
            for (int half = lanes / 2; half > 0; half /= 2) {
                for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
            }
            to[j] = sums[0];
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
