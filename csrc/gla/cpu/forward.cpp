#include "gla/cpu/window.h"

namespace {

template <typename IO, typename T = typename IO::Compute>
void forward(const Params& p, int64_t from, int64_t to, T* scratch) {
    const unsigned mode = flush_denormals();
    Window<IO> at(p, scratch);
    T* const state = at.take(p.key_dim * at.width);
    for (int64_t task = from; task < to; ++task) {
        at.move_to(task);
        at.read_state(state, p.initial_state);
        for (int64_t index = p.first[at.row]; index < p.first[at.row + 1]; ++index) {
            const Piece& piece = p.pieces[index];
            at.load(piece);
            at.template sweep<true>();
            T* y = at.at(p.y, p.value_dim);
            for_tiles<IO>(0, piece.count, p.value_dim, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
                if (!piece.fresh) {
                    tile.add(at.read + i * at.key_width, at.key_width, 1, state + column, at.width, p.key_dim);
                }
                tile.add(at.scores + i * kPiece, kPiece, 1, at.values + column, at.width, piece.count);
                tile.store(y + i * at.value_stride + column, at.value_stride, p.value_dim - column);
            });
            at.advance(state, state);
        }
        at.write_state(state, p.final_state);
    }
    restore(mode);
}

}  // namespace

namespace lm::LM_UNIT {

void gla_forward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) return forward<Double>(p, from, to, static_cast<double*>(scratch));
    forward<Float>(p, from, to, static_cast<float*>(scratch));
}

}  // namespace lm::LM_UNIT
