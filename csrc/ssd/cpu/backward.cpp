// The backward of one row, group and block of heads: back over the pieces with the gradients of the states.
//
// With U_ij = grad_y_i . x_j, S the state before the piece and S' that after it, per head:
//
//   grad_x_j = sum_i (D_ij C_i . B_j) grad_y_i + leave_j grad_S'^T B_j
//   grad_C_i = sum_j (D_ij U_ij) B_j + enter_i S grad_y_i        grad_B_j = sum_i (D_ij U_ij) C_i + leave_j grad_S' x_j
//
// and the gradient of log_a_t sums what every pair of a writer j < t and a reader i >= t contributes, where S is a
// writer before the piece and grad_S' a reader after it.
#include "ssd/cpu/scan.h"

namespace {

template <typename IO>
struct Backward {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    const Params& p;
    const int64_t width = padded(p.head_dim), key_width = padded(p.d_state), state_size = p.d_state * width;
    const int64_t key_stride = p.groups * p.d_state, value_stride = p.heads * p.head_dim;
    const int64_t together = block_heads(p);
    T* grad_states;  // [heads, d_state, width]
    // of a piece and group; a name ending in t is transposed, its rows kChunk long
    T *b, *c, *bt, *ct, *scores, *grad_bt, *grad_ct, *grad_scores;
    // of a head; values is first x, then grad_y
    Ahead<T, 3> ahead;  // grad_y, x and grad_x of the next head
    T *values, *grad_yt, *xt, *weights, *read_sums;  // read_sums: [kChunk, lanes]
    // of a head: what tokens contribute to the gradient of log_a, as readers and writers of the piece and of states
    alignas(64) T reads[kChunk], writes[kChunk], reads_state[kChunk], writes_state[kChunk];

    Backward(const Params& params, T* memory) : p(params) {
        Scratch<T> scratch{memory};
        b = scratch.take(kChunk * key_width);
        c = scratch.take(kChunk * key_width);
        bt = scratch.take(kChunk * p.d_state);
        ct = scratch.take(kChunk * p.d_state);
        grad_bt = scratch.take(kChunk * p.d_state);
        grad_ct = scratch.take(kChunk * p.d_state);
        scores = scratch.take(kChunk * kChunk);
        grad_scores = scratch.take(kChunk * kChunk);
        weights = scratch.take(kChunk * kChunk);
        std::memset(weights, 0, kChunk * kChunk * sizeof(T));  // blocks right of the diagonal stay so
        values = scratch.take(kChunk * width);
        grad_yt = scratch.take(kChunk * p.head_dim);
        xt = scratch.take(kChunk * p.head_dim);
        read_sums = scratch.take(kChunk * lanes);
        grad_states = scratch.next;
    }

    // Heads of blocks [from, to) of a group; all of them piece after piece, since they share B, C and memory pages.
    void run(int64_t row, int64_t group, int64_t from, int64_t to) {
        const int64_t size = p.heads / p.groups, first = group * size + from * together;
        const int64_t last = group * size + least(to * together, size), begin = p.first[row], end = p.first[row + 1];
        for (int64_t head = first; head < last; ++head) {
            read_state<IO>(p, grad_states + (head - first) * state_size, p.grad_final, row, head);
        }
        for (int64_t k = end - 1; k >= begin; --k) {
            run_piece(p.pieces[k], p.pieces[k > begin ? k - 1 : k], group, from, first, last);
        }
        const bool acts = begin == end || p.pieces[begin].slot != Piece::kNone;  // the state before the row
        if (!acts) std::memset(grad_states, 0, (last - first) * state_size * sizeof(T));
        for (int64_t head = first; head < last; ++head) {
            write_state(p, p.grad_initial, row, head, grad_states + (head - first) * state_size);
        }
    }

    // Heads [first, last), the first being that of a block; `next` is the piece after this, or this.
    void run_piece(const Piece& piece, const Piece& next, int64_t group, int64_t block, int64_t first, int64_t last) {
        const T* keys = at_piece<const T>(p, piece, p.b, p.groups, group, p.d_state);
        const T* queries = at_piece<const T>(p, piece, p.c, p.groups, group, p.d_state);
        pack<IO>(b, key_width, keys, key_stride, piece.count, p.d_state);
        pack<IO>(c, key_width, queries, key_stride, piece.count, p.d_state);
        transpose_padded<IO>(bt, kChunk, b, key_width, piece.count, p.d_state);
        transpose_padded<IO>(ct, kChunk, c, key_width, piece.count, p.d_state);
        piece_scores<IO>(p, piece, bt, ct, scores);
        for (int64_t from = first; from < last; from += together, ++block) {
            std::memset(grad_bt, 0, kChunk * p.d_state * sizeof(T));
            std::memset(grad_ct, 0, kChunk * p.d_state * sizeof(T));
            std::memset(grad_scores, 0, kChunk * kChunk * sizeof(T));
            for (int64_t head = from; head < least(from + together, last); ++head) {
                const bool turn = head + 1 == last;  // to the next piece's first head
                ask_for(turn ? next : piece, turn ? first : head + 1);
                run_head(piece, head, entering<T>(p, piece, head), grad_states + (head - first) * state_size);
            }
            write_grad_keys(piece, group, block);
        }
    }

    void ask_for(const Piece& piece, int64_t head) {
        ahead.arrays[0] = at_piece<const T>(p, piece, p.grad_y, p.heads, head, p.head_dim);
        ahead.arrays[1] = at_piece<const T>(p, piece, p.x, p.heads, head, p.head_dim);
        ahead.arrays[2] = at_piece<const T>(p, piece, p.grad_x, p.heads, head, p.head_dim);
        ahead.start(value_stride, piece.count);
    }

    // `grad_state` is the gradient of the state after the piece, and becomes that of the state before it.
    void run_head(const Piece& piece, int64_t head, const T* state, T* grad_state) {
        const T* log_a = at_piece<const T>(p, piece, p.log_a, p.heads, head, 1);
        const Decay<IO, kChunk> decay(log_a, p.heads, piece.count, !state);
        const T* x = at_piece<const T>(p, piece, p.x, p.heads, head, p.head_dim);
        const T* grad_y = at_piece<const T>(p, piece, p.grad_y, p.heads, head, p.head_dim);
        const T* leaving = piece.leaves ? grad_state : nullptr;
        pack<IO>(values, width, grad_y, value_stride, piece.count, p.head_dim);
        transpose_padded<IO>(grad_yt, kChunk, values, width, piece.count, p.head_dim);
        transpose_padded<IO>(xt, kChunk, x, value_stride, piece.count, p.head_dim);

        within_piece(piece, decay);
        write_grad_x(piece, head, leaving, decay);
        std::memset(reads_state, 0, sizeof(reads_state));
        std::memset(writes_state, 0, sizeof(writes_state));
        T across = 0;
        if (leaving) through_state(piece, leaving, xt, bt, decay.leave, grad_bt, writes_state);
        if (leaving && state && decay.total() != 0) across = decay.total() * dot(state, leaving);
        if (state) {
            through_state(piece, state, grad_yt, ct, decay.enter, grad_ct, reads_state);
            scale_rows<IO>(values, width, piece.count, p.head_dim, decay.enter);
            step_state<IO>(p, grad_state, leaving, decay.total(), c, key_width, values, piece.count, ahead);
        }
        write_grad_log_a(piece, head, across);
    }

    // U, and from it: grad_scores += D U, reads and writes = row and column sums of D U scores left of the diagonal.
    // weights = D scores.
    void within_piece(const Piece& piece, const Decay<IO, kChunk>& decay) {
        const Between<IO> between(decay);
        std::memset(writes, 0, sizeof(writes));
        for (int64_t block = 0; block < piece.count; block += kBlock) {
            const int64_t end = least(block + kBlock, piece.count);
            std::memset(read_sums + block * lanes, 0, kBlock * lanes * sizeof(T));
            for_tiles<IO>(block, end, block + kBlock, [&](auto& tile, int64_t i, int64_t j) LM_INLINE {
                ahead.ask();
                tile.add(values + i * width, width, 1, xt + j, kChunk, p.head_dim);
                const T* score = scores + i * kChunk + j;
                T *grad = grad_scores + i * kChunk + j, *weight = weights + i * kChunk + j;
                T* read = read_sums + i * lanes;
                Vec write[2] = {};  // per vector of the tile's columns
                tile.each([&](Vec& value, int r, int column) LM_INLINE {
                    const int64_t at = r * kChunk + column;
                    const Vec d = between.at(i + r, j + column), s = copy_in<Vec>(score + at, lanes), u = d * value;
                    const Vec pair = j + column < block ? u * s : between.is(i + r, j + column) ? Vec{} : u * s;
                    copy_out(grad + at, copy_in<Vec>(grad + at, lanes) + u, lanes);
                    copy_out(weight + at, d * s, lanes);
                    copy_out(read + r * lanes, copy_in<Vec>(read + r * lanes, lanes) + pair, lanes);
                    write[column / lanes] += pair;
                });
                for (int v = 0; v < tile.vectors; ++v) {
                    T* to = writes + j + v * lanes;
                    copy_out(to, copy_in<Vec>(to, lanes) + write[v], lanes);
                }
            });
        }
        write_row_sums<IO>(reads, read_sums, piece.count, false);
    }

    void write_grad_x(const Piece& piece, int64_t head, const T* grad_state, const Decay<IO, kChunk>& decay) {
        T* grad_x = at_piece<T>(p, piece, p.grad_x, p.heads, head, p.head_dim);
        for_tiles<IO>(0, piece.count, p.head_dim, [&](auto& tile, int64_t j, int64_t column) LM_INLINE {
            ahead.ask();
            if (grad_state) {
                tile.add(bt + j, 1, kChunk, grad_state + column, width, p.d_state);
                tile.scale_rows(decay.leave + j);
            }
            tile.add(weights + j * kChunk + j, 1, kChunk, values + j * width + column, width, piece.count - j);
            tile.store(grad_x + j * value_stride + column, value_stride, p.head_dim - column);
        });
    }

    // grad_keys[n, i] += factor_i (state right)[n, i], and sums[i] = the same times keys[n, i], summed over n.
    void through_state(const Piece& piece, const T* state, const T* right, const T* keys, const T* factor, T* grad_keys,
                       T* sums) {
        for_tiles<IO>(0, p.d_state, piece.count, [&](auto& tile, int64_t n, int64_t i) LM_INLINE {
            ahead.ask();
            tile.add(state + n * width, width, 1, right + i, kChunk, p.head_dim);
            const T *key = keys + n * kChunk + i, *scale = factor + i;
            T* grad = grad_keys + n * kChunk + i;
            Vec sum[2] = {};  // per vector of the tile's columns
            tile.each([&](Vec& value, int r, int column) LM_INLINE {
                const int64_t at = r * kChunk + column;
                const Vec factors = copy_in<Vec>(scale + column, lanes);
                copy_out(grad + at, copy_in<Vec>(grad + at, lanes) + value * factors, lanes);
                sum[column / lanes] += value * copy_in<Vec>(key + at, lanes);
            });
            for (int v = 0; v < tile.vectors; ++v) {
                T* to = sums + i + v * lanes;
                copy_out(to, copy_in<Vec>(to, lanes) + sum[v] * copy_in<Vec>(scale + v * lanes, lanes), lanes);
            }
        });
    }

    T dot(const T* left, const T* right) const {
        Vec sums[4] = {};
        for (int64_t i = 0; i < p.d_state * width; i += kBlock) {
            for (int v = 0; v < kBlock / lanes; ++v) {
                sums[v % 4] += copy_in<Vec>(left + i + v * lanes, lanes) * copy_in<Vec>(right + i + v * lanes, lanes);
            }
        }
        return sum_lanes<IO>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    void write_grad_log_a(const Piece& piece, int64_t head, T across) {
        T* grad = at_piece<T>(p, piece, p.grad_log_a, p.heads, head, 1);
        // Sums from the side on which they begin with 0, never totals less what has passed: where nothing reads any
        // more the gradient is 0, not what rounding left over.
        double writers[kChunk];  // of S', before t
        double sum = 0;
        for (int64_t t = 0; t < piece.count; ++t) {
            writers[t] = sum;
            sum += writes_state[t];
        }
        double readers = across;  // of S, at t or later
        double pairs = 0;         // of a writer before t and a reader at t or later, in the piece
        for (int64_t t = piece.count - 1; t >= 0; --t) {
            readers += reads_state[t];
            pairs += reads[t] - writes[t];
            grad[t * p.heads] = static_cast<T>(readers + writers[t] + (t > 0 ? pairs : 0));
        }
    }

    // grad_C = grad_scores B, grad_B = grad_scores^T C, each with what came through the states.
    void write_grad_keys(const Piece& piece, int64_t group, int64_t block_of_heads) {
        const int64_t offset = block_of_heads * p.batch * p.length * key_stride;
        T* grad_b = at_piece<T>(p, piece, p.grad_b, p.groups, group, p.d_state) + offset;
        T* grad_c = at_piece<T>(p, piece, p.grad_c, p.groups, group, p.d_state) + offset;
        transpose<IO>(grad_b, key_stride, grad_bt, kChunk, p.d_state, piece.count);
        transpose<IO>(grad_c, key_stride, grad_ct, kChunk, p.d_state, piece.count);
        for (int64_t block = 0; block < piece.count; block += kBlock) {
            const int64_t end = least(block + kBlock, piece.count);
            for_tiles<IO>(block, end, p.d_state, [&](auto& tile, int64_t i, int64_t n) LM_INLINE {
                tile.add(grad_scores + i * kChunk, kChunk, 1, b + n, key_width, i + tile.rows);
                tile.add_to(grad_c + i * key_stride + n, key_stride, p.d_state - n);
            });
            for_tiles<IO>(block, end, p.d_state, [&](auto& tile, int64_t j, int64_t n) LM_INLINE {
                tile.add(grad_scores + j * kChunk + j, 1, kChunk, c + j * key_width + n, key_width, piece.count - j);
                tile.add_to(grad_b + j * key_stride + n, key_stride, p.d_state - n);
            });
        }
    }
};

template <typename IO, typename T = typename IO::Compute>
void backward(const Params& p, int64_t from, int64_t to, T* scratch) {
    Backward<IO> task(p, scratch);
    const int64_t count = blocks(p), most = kMostHeads / block_heads(p);
    while (from < to) {
        const int64_t block = from % count, end = least(to, least(from - block + count, from + most));
        task.run(from / count / p.groups, from / count % p.groups, block, block + end - from);
        from = end;
    }
}

}  // namespace

namespace lm::LM_UNIT {

void ssd_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    if (p.f64) return backward<Double>(p, from, to, static_cast<double*>(scratch));
    backward<Float>(p, from, to, static_cast<float*>(scratch));
}

}  // namespace lm::LM_UNIT
