#include "ssd/cpu/scan.h"

namespace {

template <typename IO>
struct Forward {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;

    const Params& p;
    const int64_t width = padded(p.head_dim), group_size = p.heads / p.groups;
    T *bt, *ct, *scores, *x, *weights;  // bt, ct: B and C transposed

    Forward(const Params& params, T* memory) : p(params) {
        Scratch<T> scratch{memory};
        bt = scratch.take(p.d_state * kChunk);
        ct = scratch.take(p.d_state * kChunk);
        scores = scratch.take(kChunk * kChunk);
        x = scratch.take(kChunk * width);
        weights = scratch.take(kChunk * kChunk);
    }

    // Heads [from, to) of a row; all of them piece after piece, since they share memory pages, and B and C in a group.
    void run(int64_t row, int64_t from, int64_t to) {
        for (int64_t head = from; head < to; ++head) read_initial_state(row, head);
        for (int64_t k = p.first[row]; k < p.first[row + 1]; ++k) {
            const Piece& piece = p.pieces[k];
            for (int64_t head = from; head < to; ++head) {
                const int64_t group = head / group_size;
                if (head == from || head % group_size == 0) {
                    const T* b = at_piece<const T>(p, piece, p.b, p.groups, group, p.d_state);
                    const T* c = at_piece<const T>(p, piece, p.c, p.groups, group, p.d_state);
                    transpose_piece(bt, b, p.groups * p.d_state, piece.count, p.d_state);
                    transpose_piece(ct, c, p.groups * p.d_state, piece.count, p.d_state);
                    piece_scores<IO>(p, piece, bt, ct, scores);
                }
                run_piece(piece, head, group);
            }
        }
        for (int64_t head = from; head < to; ++head) write_state(p, p.final_state, row, head, state_of(row, head));
    }

    T* state_of(int64_t row, int64_t head) const {
        return static_cast<T*>(p.states) + (row * p.heads + head) * p.d_state * width;
    }

    void read_initial_state(int64_t row, int64_t head) {
        T* state = state_of(row, head);
        if (p.initial_state) read_state<IO>(p, state, p.initial_state, row, head);
        else std::memset(state, 0, p.d_state * width * sizeof(T));
    }

    void run_piece(const Piece& piece, int64_t head, int64_t group) {
        const int64_t stride = p.groups * p.d_state;
        T* state = state_of(piece.row, head);
        const bool fresh = piece.slot == kNone;
        const T* b = at_piece<const T>(p, piece, p.b, p.groups, group, p.d_state);
        T* y = at_piece<T>(p, piece, p.y, p.heads, head, p.head_dim);
        const Decay<IO> decay(at_piece<const T>(p, piece, p.log_a, p.heads, head, 1), p.heads, piece.count, fresh);
        pack<IO>(x, at_piece<const T>(p, piece, p.x, p.heads, head, p.head_dim), p.heads * p.head_dim, piece.count,
                 p.head_dim);
        decay_scores(piece, decay);
        for (int64_t block = 0; block < piece.count; block += kBlock) {
            const int64_t end = least(block + kBlock, piece.count);
            for_tiles<IO>(block, end, p.head_dim, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
                if (!fresh) {
                    tile.add(ct + i, 1, kChunk, state + column, width, p.d_state);
                    tile.scale_rows(decay.enter + i);
                }
                tile.add(weights + i * kChunk, kChunk, 1, x + column, width, end);
                tile.store(y + i * p.heads * p.head_dim + column, p.heads * p.head_dim, p.head_dim - column);
            });
        }
        if (!piece.leaves) return;
        scale_rows<IO>(x, piece.count, width, decay.leave);
        step_state<IO>(p, state, fresh ? nullptr : state, decay.total(), b, stride, x, piece.count);
    }

    // weights = D * scores
    void decay_scores(const Piece& piece, const Decay<IO>& decay) {
        DecayRow<IO> row;
        for (int64_t i = 0; i < piece.count; ++i) {
            row.move_to(i, decay);
            for (int64_t j = 0; j < i / kBlock * kBlock + kBlock; j += kLanes<IO>) {
                const Vec value = copy_in<Vec>(row.at + j, kLanes<IO>) *
                                  copy_in<Vec>(scores + i * kChunk + j, kLanes<IO>);
                copy_out(weights + i * kChunk + j, value, kLanes<IO>);
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
