#include "ssd/cpu/scan.h"

namespace {

template <typename IO>
struct Forward {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;

    const Params& p;
    const int64_t width = padded(p.head_dim), state_size = p.d_state * width, group_size = p.heads / p.groups;
    const int64_t value_stride = p.heads * p.head_dim;
    T *final_state, *bt, *ct, *scores, *x, *weights;  // bt, ct: B and C transposed
    Ahead<T, 2> ahead;  // x and y of the next head

    Forward(const Params& params, T* memory) : p(params) {
        Scratch<T> scratch{memory};
        final_state = scratch.take(state_size);
        bt = scratch.take(p.d_state * kChunk);
        ct = scratch.take(p.d_state * kChunk);
        scores = scratch.take(kChunk * kChunk);
        x = scratch.take(kChunk * width);
        weights = scratch.take(kChunk * kChunk);
        std::memset(weights, 0, kChunk * kChunk * sizeof(T));  // blocks right of the diagonal stay so
    }

    // Heads [from, to) of a row; all of them piece after piece, since they share memory pages, and B and C in a group.
    void run(int64_t row, int64_t from, int64_t to) {
        const int64_t begin = p.first[row], end = p.first[row + 1];
        if (begin == end) return hand_on(row, from, to);
        int64_t slots = 0;
        for (int64_t k = begin; k < end; ++k) {
            const Piece& piece = p.pieces[k];
            slots += piece.slot != Piece::kNone;
            for (int64_t head = from; head < to; ++head) {
                const int64_t group = head / group_size;
                if (head == from || head % group_size == 0) {
                    const T* b = at_piece<const T>(p, piece, p.b, p.groups, group, p.d_state);
                    const T* c = at_piece<const T>(p, piece, p.c, p.groups, group, p.d_state);
                    transpose_padded<IO>(bt, kChunk, b, p.groups * p.d_state, piece.count, p.d_state);
                    transpose_padded<IO>(ct, kChunk, c, p.groups * p.d_state, piece.count, p.d_state);
                    piece_scores<IO>(p, piece, bt, ct, scores);
                }
                T* state = entering<T>(p, piece, head);
                if (state && k == begin) read_state<IO>(p, state, p.initial_state, row, head);
                T* after = k + 1 == end ? final_state : entering<T>(p, p.pieces[k + 1], head);
                const bool turn = head + 1 == to && k + 1 < end;  // to the next piece's first head
                ask_for(turn ? p.pieces[k + 1] : piece, turn ? from : head + 1);
                run_piece(piece, head, group, state, after);
                if (k + 1 == end) write_state(p, p.final_state, row, head, final_state);
            }
        }
        for (; slots < p.slots; ++slots) {
            T* unused = static_cast<T*>(p.states) + ((row * p.slots + slots) * p.heads + from) * state_size;
            std::memset(unused, 0, (to - from) * state_size * sizeof(T));
        }
    }

    // The state before an empty row is that after it.
    void hand_on(int64_t row, int64_t from, int64_t to) {
        for (int64_t head = from; head < to; ++head) {
            if (p.initial_state) read_state<IO>(p, final_state, p.initial_state, row, head);
            else std::memset(final_state, 0, state_size * sizeof(T));
            write_state(p, p.final_state, row, head, final_state);
        }
    }

    void ask_for(const Piece& piece, int64_t head) {
        ahead.arrays[0] = at_piece<const T>(p, piece, p.x, p.heads, head, p.head_dim);
        ahead.arrays[1] = at_piece<const T>(p, piece, p.y, p.heads, head, p.head_dim);
        ahead.start(value_stride, piece.count);
    }

    // `state` enters the piece, or null for zero; `after` is the state after it, or null if it is not needed.
    void run_piece(const Piece& piece, int64_t head, int64_t group, const T* state, T* after) {
        const int64_t stride = p.groups * p.d_state;
        const T* b = at_piece<const T>(p, piece, p.b, p.groups, group, p.d_state);
        T* y = at_piece<T>(p, piece, p.y, p.heads, head, p.head_dim);
        const T* log_a = at_piece<const T>(p, piece, p.log_a, p.heads, head, 1);
        const Decay<IO, kChunk> decay(log_a, p.heads, piece.count, !state);
        pack<IO>(x, width, at_piece<const T>(p, piece, p.x, p.heads, head, p.head_dim), value_stride, piece.count,
                 p.head_dim);
        decay_scores(piece, decay);
        for_tiles<IO>(0, piece.count, p.head_dim, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
            ahead.ask();
            ahead.ask();
            if (state) {
                tile.add(ct + i, 1, kChunk, state + column, width, p.d_state);
                tile.scale_rows(decay.enter + i);
            }
            tile.add(weights + i * kChunk, kChunk, 1, x + column, width, i + tile.rows);
            tile.store(y + i * value_stride + column, value_stride, p.head_dim - column);
        });
        if (!after) return;
        scale_rows<IO>(x, width, piece.count, p.head_dim, decay.leave);
        step_state<IO>(p, after, state, decay.total(), b, stride, x, piece.count, ahead);
    }

    // weights = D * scores
    void decay_scores(const Piece& piece, const Decay<IO, kChunk>& decay) {
        const Between<IO> between(decay);
        for (int64_t i = 0; i < piece.count; ++i) {
            for (int64_t j = 0; j < i / kBlock * kBlock + kBlock; j += kLanes<IO>) {
                const int64_t at = i * kChunk + j;
                copy_out(weights + at, between.at(i, j) * copy_in<Vec>(scores + at, kLanes<IO>), kLanes<IO>);
            }
        }
    }
};

template <typename IO, typename T = typename IO::Compute>
void forward(const Params& p, int64_t from, int64_t to, T* scratch) {
    Forward<IO> task(p, scratch);
    while (from < to) {
        const int64_t row = from / p.heads, end = least(to, (row + 1) * p.heads);
        task.run(row, from - row * p.heads, end - row * p.heads);
        from = end;
    }
}

}  // namespace

namespace lm::LM_UNIT {

void ssd_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) return forward<Double>(p, from, to, static_cast<double*>(scratch));
    forward<Float>(p, from, to, static_cast<float*>(scratch));
}

}  // namespace lm::LM_UNIT
