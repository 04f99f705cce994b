// The backward of a head: its states by one pass from the left, of which every fourth is kept, then its pieces from the
// right. With S the state before a piece, S' that after it, and k_j(i) the key of token j decayed to token i:
//
//   grad_v_j = sum_i (q_i . k_j(i)) grad_y_i + grad_S'^T k_j(end)         grad_S = Diag(total) grad_S' + read^T grad_y
//
// and the gradients of q, k and g follow the keys' decay in reverse, see `write_grad_keys`. Every sum begins with 0
// where nothing reads any more, so gradients there are 0, not what rounding left over.
#include "gla/cpu/window.h"

namespace {

template <typename IO>
struct Backward {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    const Params& p;
    Window<IO> w;
    const int64_t key_width = w.key_width, width = w.width, state_size = p.key_dim * width;
    T* const k = w.take(kPiece * key_width);           // [tokens, key_width]
    T* const grad_read = w.take(kPiece * key_width);   // likewise: S grad_y_i
    T* const grad_leave = w.take(kPiece * key_width);  // likewise: grad_S' v_j
    T* const across = w.take(key_width);               // the gradient of `total`: S * grad_S' summed over columns
    T* const grad_u = w.take(key_width);
    T* const grad_y = w.take(kPiece * width);  // [tokens, width]
    T* const grad_yt = w.take(kPiece * width);  // a name ending in t is transposed, its rows kPiece long
    T* const vt = w.take(kPiece * width);
    T* const keys_t = w.take(kPiece * key_width);
    T* const grad_scores = w.take(kPiece * kPiece);
    T* const grad_state = w.take(state_size);
    T* const states = w.take(kKept * state_size);  // before each piece of a group of kKept
    T* const kept = w.next;                        // before each group

    void run(int64_t task) {
        w.move_to(task);
        const Piece* pieces = p.pieces + p.first[w.row];
        const int64_t count = p.first[w.row + 1] - p.first[w.row], groups = (count + kKept - 1) / kKept;
        w.read_state(kept, p.initial_state);
        for (int64_t group = 0; group + 1 < groups; ++group) {
            T* const state = kept + (group + 1) * state_size;
            const T* before = state - state_size;
            for (int64_t index = group * kKept; index < (group + 1) * kKept; ++index, before = state) {
                step(pieces[index], state, before);
            }
        }
        w.read_state(grad_state, p.grad_final);
        std::memset(grad_u, 0, key_width * sizeof(T));
        for (int64_t group = groups - 1; group >= 0; --group) {
            const int64_t begin = group * kKept, end = least(begin + kKept, count);
            std::memcpy(states, kept + group * state_size, state_size * sizeof(T));
            for (int64_t index = begin; index + 1 < end; ++index) {
                T* const state = states + (index - begin) * state_size;
                step(pieces[index], state + state_size, state);
            }
            for (int64_t index = end - 1; index >= begin; --index) {
                run_piece(pieces[index], states + (index - begin) * state_size);
            }
        }
        w.write_state(grad_state, p.grad_initial);
        std::memcpy(w.of_head(p.grad_u, p.key_dim), grad_u, p.key_dim * sizeof(T));
    }

    void step(const Piece& piece, T* after, const T* before) {
        w.load(piece);
        w.template sweep<false>();
        w.advance(after, before);
    }

    // From grad_S' in `grad_state`, which becomes grad_S.
    void run_piece(const Piece& piece, const T* state) {
        w.load(piece);
        w.template sweep<true>();
        const T* grad_y_rows = w.at(p.grad_y, p.value_dim);
        pack<IO>(k, key_width, w.at(p.k, p.key_dim), w.key_stride, piece.count, p.key_dim);
        pack<IO>(grad_y, width, grad_y_rows, w.value_stride, piece.count, p.value_dim);
        transpose<IO>(grad_yt, kPiece, grad_y_rows, w.value_stride, piece.count, p.value_dim);
        transpose<IO>(vt, kPiece, w.at(p.v, p.value_dim), w.value_stride, piece.count, p.value_dim);
        write_grad_v();
        for_tiles<IO>(0, piece.count, kPiece, [&](auto& tile, int64_t i, int64_t j) LM_INLINE {
            tile.add(grad_y + i * width, width, 1, vt + j, kPiece, p.value_dim);
            tile.store(grad_scores + i * kPiece + j, kPiece);
        });
        times_values(grad_leave, grad_state, vt);
        if (!piece.fresh) {
            times_values(grad_read, state, grad_yt);
            for (int64_t key = 0; key < p.key_dim; ++key) {
                across[key] = dot(state + key * width, grad_state + key * width);
            }
        }
        for (int64_t key = 0; key < p.key_dim; key += lanes) {
            p.u ? write_grad_keys<true>(key) : write_grad_keys<false>(key);
        }
        if (piece.fresh) std::memset(grad_state, 0, state_size * sizeof(T));
        else w.step_state(grad_state, grad_state, w.read, 1, key_width, grad_y);
    }

    void write_grad_v() {
        T* to = w.at(p.grad_v, p.value_dim);
        for_tiles<IO>(0, w.piece.count, p.value_dim, [&](auto& tile, int64_t j, int64_t column) LM_INLINE {
            tile.add(w.leave + j, 1, kPiece, grad_state + column, width, p.key_dim);
            tile.add(w.scores + j, 1, kPiece, grad_y + column, width, w.piece.count);
            tile.store(to + j * w.value_stride + column, w.value_stride, p.value_dim - column);
        });
    }

    // to [tokens, key_width] = (state right)^T for right [value_dim, kPiece].
    void times_values(T* to, const T* state, const T* right) {
        for_tiles<IO>(0, p.key_dim, kPiece, [&](auto& tile, int64_t key, int64_t i) LM_INLINE {
            tile.add(state + key * width, width, 1, right + i, kPiece, p.value_dim);
            tile.store(keys_t + key * kPiece + i, kPiece);
        });
        transpose<IO>(to, key_width, keys_t, kPiece, p.key_dim, w.piece.count);
    }

    T dot(const T* left, const T* right) const {
        Vec sums[2] = {};
        for (int64_t i = 0; i < width; i += 2 * lanes) {
            sums[0] += copy_in<Vec>(left + i, lanes) * copy_in<Vec>(right + i, lanes);
            const int64_t next = i + lanes;
            if (next < width) sums[1] += copy_in<Vec>(left + next, lanes) * copy_in<Vec>(right + next, lanes);
        }
        T lane[lanes];
        copy_out(lane, sums[0] + sums[1], lanes);
        for (int half = lanes / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
        }
        return lane[0];
    }

    // The gradients of q, k and g in channels [key, key + lanes). The decayed keys k_j(i) are made again, token by
    // token; then, from the last token back, grad[j] is the gradient of k_j(i), `entering` that of S's decay up to i.
    template <bool BONUS>
    void write_grad_keys(int64_t key) {
        const int64_t count = w.piece.count;
        const bool fresh = w.piece.fresh;
        const int width_left = static_cast<int>(least(lanes, p.key_dim - key));
        const auto in = [&](const T* panel, int64_t i) LM_INLINE {
            return copy_in<Vec>(panel + i * key_width + key, lanes);
        };
        T* const to[] = {w.at(p.grad_q, p.key_dim), w.at(p.grad_k, p.key_dim), w.at(p.grad_g, p.key_dim)};
        Vec decayed[kPiece][kPiece], grad[kPiece];
        for (int64_t i = 0; i < count; ++i) {
            const Vec decay = in(w.decay, i);
            for (int64_t j = 0; j < i; ++j) decayed[i][j] = decayed[i - 1][j] * decay;
            decayed[i][i] = in(k, i);
            grad[i] = in(grad_leave, i);
        }
        const Vec bonus = BONUS ? copy_in<Vec>(w.u + key, lanes) : splat<Vec>(T(1));
        Vec entering = fresh ? Vec{} : copy_in<Vec>(across + key, lanes), grad_bonus = {};
        for (int64_t i = count - 1; i >= 0; --i) {
            const T* scores = grad_scores + i * kPiece;
            const Vec q = in(w.q, i), decay = in(w.decay, i), own = decayed[i][i];
            const Vec grad_k = grad[i] + scores[i] * (bonus * q);
            Vec grad_q = scores[i] * (bonus * own), grad_g = {};
            grad_bonus += scores[i] * (q * own);
            for (int64_t j = 0; j < i; ++j) {
                if constexpr (BONUS) {
                    grad_g += grad[j] * decayed[i][j];
                    grad_q += scores[j] * decayed[i - 1][j];
                    grad[j] = grad[j] * decay + scores[j] * q;
                } else {
                    const Vec reached = grad[j] + scores[j] * q;
                    grad_g += reached * decayed[i][j];
                    grad_q += scores[j] * decayed[i][j];
                    grad[j] = reached * decay;
                }
            }
            if (!fresh) {
                const Vec through = in(grad_read, i), enter = in(w.enter, i);
                if constexpr (BONUS) {
                    grad_g += entering * enter;
                    grad_q += through * (i > 0 ? in(w.enter, i - 1) : splat<Vec>(T(1)));
                    entering = entering * decay + through * q;
                } else {
                    entering += through * q;
                    grad_g += entering * enter;
                    grad_q += through * enter;
                    entering *= decay;
                }
            }
            const Vec grads[] = {grad_q, grad_k, grad_g};
            for (int n = 0; n < 3; ++n) copy_out(to[n] + i * w.key_stride + key, grads[n], width_left);
        }
        if constexpr (BONUS) copy_out(grad_u + key, copy_in<Vec>(grad_u + key, lanes) + grad_bonus, lanes);
    }
};

template <typename IO, typename T = typename IO::Compute>
void backward(const Params& p, int64_t from, int64_t to, T* scratch) {
    const unsigned mode = flush_denormals();
    Backward<IO> head{.p = p, .w = Window<IO>(p, scratch)};
    for (int64_t task = from; task < to; ++task) head.run(task);
    restore(mode);
}

}  // namespace

namespace lm::LM_UNIT {

void gla_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) return backward<Double>(p, from, to, static_cast<double*>(scratch));
    backward<Float>(p, from, to, static_cast<float*>(scratch));
}

}  // namespace lm::LM_UNIT
