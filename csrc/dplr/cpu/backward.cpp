// The backward of a block of columns. With G the gradient of the state S' after a token, S that before it, and
// read = S^T a:
//
//   G += r grad_y^T        grad_r = S' grad_y     grad_k = G v     grad_b = G read     grad_v = G^T k
//   grad_read = G^T b      grad_decay = rows of G S summed         grad_a = S grad_read
//   G of the state before = Diag(decay) G + a grad_read^T
#include "dplr/cpu/columns.h"
#include "simd/lanes.h"

namespace {

template <typename IO, int N>
struct Backward : Columns<IO, N> {
    using Base = Columns<IO, N>;
    using typename Base::T;
    using typename Base::Vec;
    using Base::Base, Base::p, Base::columns, Base::lanes;

    T *states, *grad, *reads;  // [kPiece + 1, keys, columns], [keys, columns], [kPiece, columns]
    T *by_decay, *by_a, *by_r, *by_k, *by_b;  // [keys, lanes], of columns not yet summed
    Vec grad_read[N];

    void run(T* scratch) {
        const int64_t size = p.keys * columns, sums = (p.keys + lanes - 1) / lanes * lanes * lanes;
        states = scratch, grad = states + (kPiece + 1) * size, reads = grad + size;
        by_decay = reads + kPiece * columns;
        by_a = by_decay + sums, by_r = by_a + sums, by_k = by_r + sums, by_b = by_k + sums;
        this->read_state(grad, p.grad_final);
        for (int64_t piece = pieces(p) - 1; piece >= 0; --piece) {
            const int64_t begin = piece * kPiece, end = begin + kPiece < p.length ? begin + kPiece : p.length;
            this->read_state(states, p.kept, piece, pieces(p));
            replay(begin, end);
            pass<false, true>(end, states + (end - begin) * size, reads + (end - begin) * columns);
            for (int64_t t = end - 1; t >= begin; --t) {
                const T *state = states + (t - begin) * size, *read = reads + (t - begin) * columns;
                const bool open = this->opens(t);
                if (open) forget(t);
                if (open && t > begin) pass<false, true>(t, state, read);
                if (!open && t > begin) pass<true, true>(t, state, read);
                if (!open && t == begin) pass<true, false>(t, state, read);
            }
        }
        this->write_state(p.grad_initial, grad);
    }

    // The states before and after every token of a piece, and what the tokens read.
    void replay(int64_t begin, int64_t end) {
        Vec read[N], v[N], y[N];
        this->read_first(read, states, this->token(begin).a);
        for (int64_t t = begin; t < end; ++t) {
            T *before = states + (t - begin) * p.keys * columns, *after = before + p.keys * columns;
            const bool open = this->opens(t);
            for (int n = 0; n < N; ++n) {
                copy_out(reads + (t - begin) * columns + n * lanes, open ? Vec{} : read[n], lanes);
            }
            this->read_values(v, p.v, t);
            this->step(this->token(t), open, this->token(t + 1 < end ? t + 1 : t).a, before, after, v, read, y);
        }
    }

    // Nothing of token t's document lies before it.
    void forget(int64_t t) {
        std::memset(grad, 0, p.keys * columns * sizeof(T));
        if (this->first) return;
        std::memset(static_cast<T*>(p.grad_decay) + this->at(t, p.keys), 0, p.keys * sizeof(T));
        std::memset(static_cast<T*>(p.grad_a) + this->at(t, p.keys), 0, p.keys * sizeof(T));
    }

    // Over the state between tokens t - 1 and t. LEAVE: from after token t to before it. ENTER: token t - 1 reads and
    // has written the state. `read`: the row of t.
    template <bool LEAVE, bool ENTER>
    void pass(int64_t t, const T* state, const T* read) {
        const Token<T> left = LEAVE ? this->token(t) : Token<T>{}, entered = ENTER ? this->token(t - 1) : Token<T>{};
        Vec grad_y[N], v[N], its_read[N], grad_v[N] = {}, next[N] = {}, through[N];
        if (ENTER) {
            this->read_values(grad_y, p.grad_y, t - 1);
            this->read_values(v, p.v, t - 1);
            for (int n = 0; n < N; ++n) its_read[n] = copy_in<Vec>(read - columns + n * lanes, lanes);
        }
        for (int n = 0; LEAVE && n < N; ++n) through[n] = grad_read[n];
        T* to = grad;
        for (int64_t i = 0; i < p.keys; ++i, state += columns, to += columns) {
            Vec sums[5] = {};
            for (int n = 0; n < N; ++n) {
                const Vec s = copy_in<Vec>(state + n * lanes, lanes);
                Vec g = copy_in<Vec>(to + n * lanes, lanes);
                if (LEAVE) {
                    sums[0] += g * s;
                    sums[1] += s * through[n];
                    g = left.decay[i] * g + left.a[i] * through[n];
                }
                if (ENTER) {
                    g += entered.r[i] * grad_y[n];
                    sums[2] += s * grad_y[n];
                    sums[3] += g * v[n];
                    sums[4] += g * its_read[n];
                    grad_v[n] += entered.k[i] * g;
                    next[n] += entered.b[i] * g;
                }
                copy_out(to + n * lanes, g, lanes);
            }
            if (LEAVE) {
                copy_out(by_decay + i * lanes, sums[0], lanes);
                copy_out(by_a + i * lanes, sums[1], lanes);
            }
            if (ENTER) {
                copy_out(by_r + i * lanes, sums[2], lanes);
                copy_out(by_k + i * lanes, sums[3], lanes);
                copy_out(by_b + i * lanes, sums[4], lanes);
            }
        }
        if (LEAVE) {
            write_sums(p.grad_decay, t, by_decay);
            write_sums(p.grad_a, t, by_a);
        }
        if (ENTER) {
            write_sums(p.grad_r, t - 1, by_r);
            write_sums(p.grad_k, t - 1, by_k);
            write_sums(p.grad_b, t - 1, by_b);
            this->write_values(p.grad_v, t - 1, grad_v);
            for (int n = 0; n < N; ++n) grad_read[n] = next[n];
        }
    }

    void write_sums(void* grads, int64_t t, const T* rows) const {
        write_row_sums<IO>(static_cast<T*>(grads) + this->at(t, p.keys), rows, p.keys, this->first > 0);
    }
};

}  // namespace

namespace lm::LM_UNIT {

void dplr_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? run_blocks<Backward, Double>(p, from, to, scratch) : run_blocks<Backward, Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
