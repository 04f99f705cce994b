// A block of columns of one head: where its numbers lie, and its step over a token.
#pragma once

#include "dplr/kernel.h"
#include "simd/vector.h"

namespace {

using namespace lm::dplr;

// Vectors of columns side by side: their sums over keys fit in the registers, and hide the latency of one another.
constexpr int kBlock = LM_LANES == 16 ? 4 : 2;

template <typename T>
struct Token {
    const T *r, *decay, *k, *a, *b;
};

// N vectors of columns of a head of a row, the first `count` of them real. States have rows of `columns` elements.
template <typename IO, int N>
struct Columns {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>, columns = N * lanes;

    const Params& p;
    const int64_t row, head, first, count;

    Columns(const Params& params, int64_t task, int64_t column)
        : p(params), row(task / params.heads), head(task % params.heads), first(column),
          count(params.width - column < columns ? params.width - column : columns) {}

    bool opens(int64_t t) const { return p.starts && p.starts[row * p.length + t]; }

    // Token t of an array [batch, length, heads, size].
    int64_t at(int64_t t, int64_t size) const { return ((row * p.length + t) * p.heads + head) * size; }
    const T* keys_at(const void* array, int64_t t) const { return static_cast<const T*>(array) + at(t, p.keys); }
    Token<T> token(int64_t t) const {
        return {keys_at(p.r, t), keys_at(p.decay, t), keys_at(p.k, t), keys_at(p.a, t), keys_at(p.b, t)};
    }

    void read(Vec (&to)[N], const T* from) const {
        for (int n = 0; n < N; ++n) to[n] = copy_in<Vec>(from + n * lanes, N == 1 ? count : lanes);
    }
    void write(T* to, const Vec (&from)[N]) const {
        for (int n = 0; n < N; ++n) copy_out(to + n * lanes, from[n], N == 1 ? count : lanes);
    }
    void read_values(Vec (&to)[N], const void* values, int64_t t) const {
        read(to, static_cast<const T*>(values) + at(t, p.width) + first);
    }
    void write_values(void* values, int64_t t, const Vec (&from)[N]) const {
        write(static_cast<T*>(values) + at(t, p.width) + first, from);
    }

    // A state of [batch, heads, all, keys, width], zero if there is none.
    int64_t state_at(int64_t index, int64_t all) const {
        return ((row * p.heads + head) * all + index) * p.keys * p.width + first;
    }
    void read_state(T* to, const void* states, int64_t index = 0, int64_t all = 1) const {
        const T* from = static_cast<const T*>(states) + state_at(index, all);
        for (int64_t i = 0; i < p.keys; ++i) {
            Vec values[N] = {};
            if (states) read(values, from + i * p.width);
            std::memcpy(to + i * columns, values, sizeof(values));
        }
    }
    void write_state(void* states, const T* from, int64_t index = 0, int64_t all = 1) const {
        T* to = static_cast<T*>(states) + state_at(index, all);
        for (int64_t i = 0; i < p.keys; ++i) {
            Vec values[N];
            std::memcpy(values, from + i * columns, sizeof(values));
            write(to + i * p.width, values);
        }
    }

    // sums = state^T a: what a token reads of the state before it.
    void read_first(Vec (&sums)[N], const T* state, const T* a) const {
        for (int n = 0; n < N; ++n) sums[n] = Vec{};
        for (int64_t i = 0; i < p.keys; ++i) {
            for (int n = 0; n < N; ++n) sums[n] += a[i] * copy_in<Vec>(state + i * columns + n * lanes, lanes);
        }
    }

    // The state after a token from that before it (the same memory, or not). `read` is what the token reads of the one
    // before, and becomes what the next, of the given a, reads of the one after. `y` is what it reads of the one after.
    void step(const Token<T>& token, bool open, const T* next_a, const T* before, T* after, const Vec (&v)[N],
              Vec (&read)[N], Vec (&y)[N]) const {
        if (open) step_from<true>(token, next_a, before, after, v, read, y);
        else step_from<false>(token, next_a, before, after, v, read, y);
    }

    template <bool OPEN>
    void step_from(const Token<T>& token, const T* next_a, const T* before, T* after, const Vec (&v)[N],
                   Vec (&read)[N], Vec (&y)[N]) const {
        Vec sums[N] = {}, next[N] = {};
        for (int64_t i = 0; i < p.keys; ++i, before += columns, after += columns) {
            for (int n = 0; n < N; ++n) {
                Vec state = token.k[i] * v[n];
                if (!OPEN) {
                    state += token.b[i] * read[n];
                    state += token.decay[i] * copy_in<Vec>(before + n * lanes, lanes);
                }
                copy_out(after + n * lanes, state, lanes);
                sums[n] += token.r[i] * state;
                next[n] += next_a[i] * state;
            }
        }
        for (int n = 0; n < N; ++n) read[n] = next[n], y[n] = sums[n];
    }
};

// Kernel<IO, N>(p, task, first column).run(scratch) for tasks [from, to), over blocks of columns.
template <template <typename, int> class Kernel, typename IO>
void run_blocks(const Params& p, int64_t from, int64_t to, void* scratch) {
    using T = typename IO::Compute;
    constexpr int lanes = kLanes<IO>;
    auto* memory = static_cast<T*>(scratch);
    for (int64_t task = from; task < to; ++task) {
        int64_t c = 0;
        for (; c + kBlock * lanes <= p.width; c += kBlock * lanes) Kernel<IO, kBlock>(p, task, c).run(memory);
        for (; c + 2 * lanes <= p.width; c += 2 * lanes) Kernel<IO, 2>(p, task, c).run(memory);
        for (; c < p.width; c += lanes) Kernel<IO, 1>(p, task, c).run(memory);
    }
}

}  // namespace
