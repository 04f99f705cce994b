#include "delta/kernel.h"

#include "simd/vector.h"

namespace {

using namespace lm::delta;

// Sum of the lanes, in pairs.
template <typename IO>
inline typename IO::Compute total(const typename IO::Vec& lanes) {
    typename IO::Compute values[kLanes<IO>];
    std::memcpy(values, &lanes, sizeof(lanes));
    for (int half = kLanes<IO> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) values[i] += values[i + half];
    }
    return values[0];
}

// One head of a row: where its tokens lie, and the steps over them. Rows of states have `columns` elements.
template <typename IO>
struct Head {
    using Real = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int kWide = kLanes<IO>;

    const Params& p;
    int64_t row, head, columns;

    Head(const Params& params, int64_t task)
        : p(params), row(task / params.heads), head(task % params.heads), columns(padded(params.width)) {}

    // Token t of an array [batch, length, heads, size].
    template <typename Pointer, typename Base>
    Pointer token(Base* array, int64_t t, int64_t size) const {
        return static_cast<Pointer>(array) + ((row * p.length + t) * p.heads + head) * size;
    }
    const Real* in(const void* array, int64_t t, int64_t size) const { return token<const Real*>(array, t, size); }
    Real* out(void* array, int64_t t, int64_t size) const { return token<Real*>(array, t, size); }

    bool opens(int64_t t) const { return p.starts && p.starts[row * p.length + t]; }
    Real decay(int64_t t, int64_t i) const {
        return p.decays == 0 ? Real(1) : in(p.decay, t, p.decays)[p.decays == 1 ? 0 : i];
    }
    int64_t state_elements() const { return p.keys * columns; }

    void read_row(Real* to, const Real* from) const {
        for (int64_t c = 0; c < columns; ++c) to[c] = c < p.width ? from[c] : Real(0);
    }
    void write_row(Real* to, const Real* from) const {
        std::memcpy(to, from, static_cast<size_t>(p.width) * sizeof(Real));
    }
    // A state of [batch, heads, keys, width], zero if there is none.
    void read_state(Real* to, const void* states) const {
        const Real* from = static_cast<const Real*>(states) + (row * p.heads + head) * p.keys * p.width;
        for (int64_t i = 0; i < p.keys; ++i) {
            for (int64_t c = 0; c < columns; ++c) {
                to[i * columns + c] = states && c < p.width ? from[i * p.width + c] : Real(0);
            }
        }
    }
    void write_state(void* states, const Real* from) const {
        Real* to = static_cast<Real*>(states) + (row * p.heads + head) * p.keys * p.width;
        for (int64_t i = 0; i < p.keys; ++i) write_row(to + i * p.width, from + i * columns);
    }

    // The state after token t from that before it (the same memory, or not); `wrong` [columns] is v - R^T k, and y
    // [columns], if asked for, the read. `line` is scratch of `keys`.
    void step(int64_t t, const Real* before, Real* after, Real* wrong, Real* y, Real* line) const {
        const bool open = opens(t);
        for (int64_t i = 0; i < p.keys; ++i) line[i] = open ? Real(0) : decay(t, i) * in(p.k, t, p.keys)[i];
        read_row(wrong, in(p.v, t, p.width));
        const auto part = [&](int64_t c, auto wide) {
            block<decltype(wide)::value>(t, before + c, after + c, wrong + c, y ? y + c : nullptr, line, open);
        };
        by_blocks(part);
    }

    template <int N>
    struct Wide {
        static constexpr int value = N;
    };

    // Calls part(column, Wide<n>) for blocks of n vectors side by side, whose sums over keys stay in registers.
    template <typename Part>
    void by_blocks(const Part& part) const {
        constexpr int kBlock = 4;
        int64_t c = 0;
        for (; c + kBlock * kWide <= columns; c += kBlock * kWide) part(c, Wide<kBlock>());
        for (; c < columns; c += kWide) part(c, Wide<1>());
    }

    template <int N>
    void block(int64_t t, const Real* before, Real* after, Real* wrong, Real* y, const Real* kept_k,
               bool open) const {
        const Real *k = in(p.k, t, p.keys), *q = in(p.q, t, p.keys), beta = *in(p.beta, t, 1);
        const Real one = 1, *kept = p.decays ? in(p.decay, t, p.decays) : &one;
        const int64_t keys = p.keys, stride = columns, next = p.decays > 1;
        Vec sums[N] = {}, delta[N];
        for (int64_t i = 0; !open && i < keys; ++i) {
            for (int n = 0; n < N; ++n) sums[n] += kept_k[i] * copy_in<Vec>(before + i * stride + n * kWide, kWide);
        }
        for (int n = 0; n < N; ++n) {
            const Vec error = copy_in<Vec>(wrong + n * kWide, kWide) - sums[n];
            copy_out(wrong + n * kWide, error, kWide);
            delta[n] = beta * error;
            sums[n] = Vec{};
        }
        for (int64_t i = 0; i < keys; ++i) {
            for (int n = 0; n < N; ++n) {
                Vec state = k[i] * delta[n];
                if (!open) state += kept[i * next] * copy_in<Vec>(before + i * stride + n * kWide, kWide);
                copy_out(after + i * stride + n * kWide, state, kWide);
                sums[n] += q[i] * state;
            }
        }
        for (int n = 0; y && n < N; ++n) copy_out(y + n * kWide, sums[n], kWide);
    }

    void forward(Real* scratch) const {
        Real *state = scratch, *line = state + state_elements(), *kept_k = line + columns;
        read_state(state, p.initial_state);
        for (int64_t t = 0; t < p.length; ++t) {
            step(t, state, state, line, line, kept_k);
            write_row(out(p.y, t, p.width), line);
        }
        write_state(p.final_state, state);
    }

    void backward(Real* scratch) const {
        const int64_t size = state_elements(), pieces = (p.length + kPiece - 1) / kPiece;
        Real *entering = scratch, *states = entering + pieces * size, *grad = states + (kPiece + 1) * size;
        Real *wrongs = grad + size, *lines = wrongs + kPiece * columns;
        read_state(states, p.initial_state);
        for (int64_t t = 0; t < p.length; ++t) {
            if (t % kPiece == 0) std::memcpy(entering + t / kPiece * size, states, size * sizeof(Real));
            step(t, states, states, lines, nullptr, lines + columns);
        }
        read_state(grad, p.grad_final);
        for (int64_t piece = pieces - 1; piece >= 0; --piece) {
            const int64_t begin = piece * kPiece, end = begin + kPiece < p.length ? begin + kPiece : p.length;
            std::memcpy(states, entering + piece * size, size * sizeof(Real));
            for (int64_t t = begin; t < end; ++t) {
                Real* before = states + (t - begin) * size;
                step(t, before, before + size, wrongs + (t - begin) * columns, nullptr, lines);
            }
            for (int64_t t = end - 1; t >= begin; --t) {
                step_back(t, states + (t - begin) * size, grad, wrongs + (t - begin) * columns, lines);
            }
        }
        write_state(p.grad_initial, grad);
    }

    // From the gradient of the state after token t to that before it, in place. `lines` is scratch: two rows and
    // three vectors per key, whose lanes are summed last.
    void step_back(int64_t t, const Real* before, Real* grad, const Real* wrong, Real* lines) const {
        const int64_t keys = p.keys;
        const bool open = opens(t);
        Real *grad_y = lines, *grad_wrong = grad_y + columns, *sums = grad_wrong + columns;
        read_row(grad_y, in(p.grad_y, t, p.width));
        for (int64_t i = 0; i < 3 * keys * kWide; ++i) sums[i] = 0;
        Vec by_beta = {};
        by_blocks([&](int64_t c, auto wide) {
            back<decltype(wide)::value>(t, before + c, grad + c, wrong + c, grad_y + c, grad_wrong + c, sums, by_beta,
                                        open);
        });
        *out(p.grad_beta, t, 1) = total<IO>(by_beta);
        write_row(out(p.grad_v, t, p.width), grad_wrong);
        Real *grad_q = out(p.grad_q, t, keys), *grad_k = out(p.grad_k, t, keys);
        Vec by_decay = {};
        for (int64_t i = 0; i < keys; ++i) {
            const Real* at = sums + 3 * i * kWide;
            grad_q[i] = total<IO>(copy_in<Vec>(at, kWide));
            grad_k[i] = total<IO>(copy_in<Vec>(at + kWide, kWide));
            const Vec by_kept = copy_in<Vec>(at + 2 * kWide, kWide);
            if (p.decays > 1) out(p.grad_decay, t, keys)[i] = total<IO>(by_kept);
            by_decay += by_kept;
        }
        if (p.decays == 1) *out(p.grad_decay, t, 1) = total<IO>(by_decay);
    }

    template <int N>
    void back(int64_t t, const Real* before, Real* grad, const Real* wrong, const Real* grad_y, Real* grad_wrong,
              Real* sums, Vec& by_beta, bool open) const {
        const Real *k = in(p.k, t, p.keys), *q = in(p.q, t, p.keys), beta = *in(p.beta, t, 1);
        const Real one = 1, *kept = p.decays ? in(p.decay, t, p.decays) : &one;
        const int64_t keys = p.keys, stride = columns, next = p.decays > 1;
        const Real* after = before + state_elements();
        Vec read[N], delta[N], error[N] = {};
        for (int n = 0; n < N; ++n) {
            read[n] = copy_in<Vec>(grad_y + n * kWide, kWide);
            delta[n] = beta * copy_in<Vec>(wrong + n * kWide, kWide);
        }
        for (int64_t i = 0; i < keys; ++i) {
            Real* at = sums + 3 * i * kWide;
            Vec by_q = copy_in<Vec>(at, kWide), by_k = copy_in<Vec>(at + kWide, kWide);
            for (int n = 0; n < N; ++n) {
                Real* to = grad + i * stride + n * kWide;
                const Vec g = copy_in<Vec>(to, kWide) + q[i] * read[n];
                copy_out(to, g, kWide);
                by_q += copy_in<Vec>(after + i * stride + n * kWide, kWide) * read[n];
                by_k += g * delta[n];
                error[n] += k[i] * g;
            }
            copy_out(at, by_q, kWide);
            copy_out(at + kWide, by_k, kWide);
        }
        for (int n = 0; n < N; ++n) {
            by_beta += error[n] * copy_in<Vec>(wrong + n * kWide, kWide);
            error[n] *= beta;
            copy_out(grad_wrong + n * kWide, error[n], kWide);
        }
        if (open) {  // nothing of this token's document lies before it
            for (int64_t i = 0; i < keys; ++i) {
                for (int n = 0; n < N; ++n) copy_out(grad + i * stride + n * kWide, Vec{}, kWide);
            }
            return;
        }
        for (int64_t i = 0; i < keys; ++i) {
            Real* at = sums + 3 * i * kWide;
            const Real factor = kept[i * next];
            Vec by_k = {}, by_kept = copy_in<Vec>(at + 2 * kWide, kWide);
            for (int n = 0; n < N; ++n) {
                Real* to = grad + i * stride + n * kWide;
                const Vec state = copy_in<Vec>(before + i * stride + n * kWide, kWide);
                const Vec g = copy_in<Vec>(to, kWide) - k[i] * error[n];
                by_k += state * error[n];
                by_kept += g * state;
                copy_out(to, factor * g, kWide);
            }
            copy_out(at + kWide, copy_in<Vec>(at + kWide, kWide) - factor * by_k, kWide);
            copy_out(at + 2 * kWide, by_kept, kWide);
        }
    }
};

template <typename IO>
void all(const Params& p, int64_t from, int64_t to, void* scratch, bool backward) {
    auto* memory = static_cast<typename IO::Compute*>(scratch);
    for (int64_t task = from; task < to; ++task) {
        const Head<IO> head(p, task);
        backward ? head.backward(memory) : head.forward(memory);
    }
}

}  // namespace

namespace lm::LM_UNIT {

void delta_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? all<Double>(p, from, to, scratch, false) : all<Float>(p, from, to, scratch, false);
}

void delta_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? all<Double>(p, from, to, scratch, true) : all<Float>(p, from, to, scratch, true);
}

}  // namespace lm::LM_UNIT
