#include "delta/cpu/task.h"

namespace {

template <typename IO>
struct Forward : Task<IO> {
    using Base = Task<IO>;
    using typename Base::T;
    using typename Base::Vec;
    using Base::p, Base::q, Base::k, Base::key_width, Base::width, Base::take;

    T *state, *wrong, *written;  // [keys, width], [kChunk, width]

    Forward(const Params& params, T* scratch) : Base(params, scratch) {
        state = take(this->state_size);
        wrong = take(kChunk * width);
        written = take(kChunk * width);
    }

    void run() {
        this->read_state(state, p.initial_state);
        const int64_t all = slots(p.length);
        int64_t entered = 0;
        for (int64_t n = p.first[this->row]; n < p.first[this->row + 1]; ++n) {
            run_piece(p.pieces[n]);
            entered += p.pieces[n].slot != Piece::kNone;
        }
        this->write_state(p.final_state, state);
        for (; entered < all; ++entered) {  // an output holds no chance values, even where nobody reads it
            T* unused = static_cast<T*>(p.entering) + this->state_at(entered, all);
            std::memset(unused, 0, p.keys * p.width * sizeof(T));
        }
    }

    void run_piece(const Piece& piece) {
        const bool fresh = piece.slot == Piece::kNone;
        const auto decay = this->decay_of(piece);
        this->load(piece, decay);
        if (!fresh) this->write_state(p.entering, state, piece.slot, slots(p.length));
        pack<IO>(wrong, width, this->at(piece, p.v, p.width), this->stride(p.width), piece.count, p.width);
        this->template solve<false>(piece.count, wrong, written, [&](auto& tile, int64_t, int64_t i,
                                                                      int64_t column) LM_INLINE {
            if (!fresh) {
                tile.add(k + i * key_width, key_width, 1, state + column, width, p.keys);
                tile.scale_rows(decay.enter + i);
            }
            const T* values = wrong + i * width + column;
            tile.each([&](Vec& value, int r, int c) LM_INLINE {
                value = copy_in<Vec>(values + r * width + c, kLanes<IO>) - value;
            });
        });
        T *kept = this->at(piece, p.wrong, p.width), *y = this->at(piece, p.y, p.width);
        const int64_t stride = this->stride(p.width);
        for (int64_t i = 0; i < piece.count; ++i) {
            std::memcpy(kept + i * stride, wrong + i * width, p.width * sizeof(T));
        }
        for (int64_t block = 0; block < piece.count; block += kBlock) {
            const int64_t end = least(block + kBlock, piece.count);
            for_tiles<IO>(block, end, p.width, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
                if (!fresh) {
                    tile.add(q + i * key_width, key_width, 1, state + column, width, p.keys);
                    tile.scale_rows(decay.enter + i);
                }
                tile.add(this->by_query + i * kChunk, kChunk, 1, written + column, width, end);
                tile.store(y + i * stride + column, stride, p.width - column);
            });
        }
        if (!piece.leaves) return;
        scale_rows<IO>(written, width, piece.count, p.width, decay.leave);
        const bool carry = !fresh && decay.total() != 0;  // a decay of 0 drops even what is not finite
        for_tiles<IO>(0, p.keys, p.width, [&](auto& tile, int64_t n, int64_t column) LM_INLINE {
            T* to = state + n * width + column;
            tile.add(k + n, 1, key_width, written + column, width, piece.count);
            if (carry) {
                tile.each([&](Vec& value, int r, int c) LM_INLINE {
                    value += decay.total() * copy_in<Vec>(to + r * width + c, kLanes<IO>);
                });
            }
            tile.store(to, width);
        });
    }
};

}  // namespace

namespace lm::LM_UNIT {

void delta_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? run_tasks<Forward, Double>(p, from, to, scratch) : run_tasks<Forward, Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
