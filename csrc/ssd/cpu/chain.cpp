// The first half of the backward: the states before pieces, and the gradients of the states between pieces.
#include "ssd/cpu/scan.h"

namespace {

template <typename IO>
struct Chain {
    using T = typename IO::Compute;

    const Params& p;
    T* const panel;
    const int64_t width = padded(p.head_dim), group_size = p.heads / p.groups;

    // Heads [from, to) of a row, all of them piece after piece, since they share memory pages.
    void run(int64_t row, int64_t from, int64_t to) {
        const int64_t begin = p.first[row], end = p.first[row + 1];
        const int64_t initial = begin < end ? p.pieces[begin].in : row;  // the slot of the state before the row
        if (begin < end && initial != kNone) {
            for (int64_t head = from; head < to; ++head) read(slot(p.states, initial, head), p.initial_state, row, head);
        }
        for (int64_t k = begin; k + 1 < end; ++k) {
            const Piece& piece = p.pieces[k];
            if (piece.out == kNone) continue;
            for (int64_t head = from; head < to; ++head) {
                const Decay<IO> decay = decay_of(piece, head);
                step(piece, head, slot(p.states, piece.out, head), slot(p.states, piece.in, head), decay.total(), p.b,
                     p.x, decay.leave);
            }
        }

        for (int64_t head = from; head < to; ++head) read(slot(p.grad_states, row, head), p.grad_final, row, head);
        for (int64_t k = end - 1; k >= begin; --k) {
            const Piece& piece = p.pieces[k];
            if (piece.in == kNone) continue;
            for (int64_t head = from; head < to; ++head) {
                const Decay<IO> decay = decay_of(piece, head);
                step(piece, head, slot(p.grad_states, piece.in, head), slot(p.grad_states, piece.out, head),
                     decay.total(), p.c, p.grad_y, decay.enter);
            }
        }
        for (int64_t head = from; head < to; ++head) write_grad_initial(slot(p.grad_states, initial, head), row, head);
    }

    T* slot(void* states, int64_t index, int64_t head) const {
        if (index == kNone) return nullptr;
        return static_cast<T*>(states) + (index * p.heads + head) * p.d_state * width;
    }

    Decay<IO> decay_of(const Piece& piece, int64_t head) const {
        const T* log_a = at_piece<const T>(p, piece, p.log_a, p.heads, head, 1);
        return Decay<IO>(log_a, p.heads, piece.count, piece.in == kNone);
    }

    // One step of a state, by the outer products of `keys` (B or C) and `values` (x or grad_y) times `factor`.
    void step(const Piece& piece, int64_t head, T* after, const T* before, T decay, const void* keys,
              const void* values, const T* factor) {
        const T* left = at_piece<const T>(p, piece, keys, p.groups, head / group_size, p.d_state);
        const T* right = at_piece<const T>(p, piece, values, p.heads, head, p.head_dim);
        pack<IO>(panel, right, p.heads * p.head_dim, piece.count, p.head_dim, factor);
        step_state<IO>(p, after, before, decay, left, p.groups * p.d_state, panel, piece.count);
    }

    // `state`, a slot, from a tensor [batch, heads, d_state, head_dim].
    void read(T* state, const void* from, int64_t row, int64_t head) {
        const int64_t offset = (row * p.heads + head) * p.d_state * p.head_dim;
        pack<IO>(state, static_cast<const T*>(from) + offset, p.head_dim, p.d_state, p.head_dim);
    }

    void write_grad_initial(const T* state, int64_t row, int64_t head) {
        T* to = static_cast<T*>(p.grad_initial) + (row * p.heads + head) * p.d_state * p.head_dim;
        for (int64_t n = 0; n < p.d_state; ++n, to += p.head_dim) {
            if (state) std::memcpy(to, state + n * width, p.head_dim * sizeof(T));
            else std::memset(to, 0, p.head_dim * sizeof(T));
        }
    }
};

template <typename IO, typename T = typename IO::Compute>
void chain(const Params& p, int64_t from, int64_t to, T* scratch) {
    Chain<IO> task{.p = p, .panel = scratch};
    for_rows(p, from, to, [&](int64_t row, int64_t first, int64_t last) { task.run(row, first, last); });
}

}  // namespace

namespace lm::LM_UNIT {

void ssd_chain(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) return chain<Double>(p, from, to, static_cast<double*>(scratch));
    chain<Float>(p, from, to, static_cast<float*>(scratch));
}

}  // namespace lm::LM_UNIT
