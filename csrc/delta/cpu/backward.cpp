// The backward of one head of a row, over its pieces from the last. With G the gradient of the state S' that leaves a
// piece, gy that of y, A = D (k k^T) below the diagonal, P = D (q k^T), and u, wrong as in kernel.h:
//
//   grad_u      = P^T gy + leave (k G)               solved = grad_u - A^T grad_wrong       grad_wrong = beta solved
//   grad_v      = grad_wrong                         grad_beta = rows of solved wrong summed
//   grad_P      = gy u^T                             grad_A = -grad_wrong u^T
//   grad_q      = enter (gy S^T) + (D grad_P) k
//   grad_k      = leave (u G^T) - enter (grad_wrong S^T) + (D grad_P)^T q + (D grad_A + (D grad_A)^T) k
//   grad_S      = e^{all} G + q^T (enter gy) - k^T (enter grad_wrong)
//
// The gradient of a log decay sums what every pair of a writer before its token and a reader at it or later
// contributes, where S is a writer before the piece and G a reader after it.
#include "delta/cpu/task.h"
#include "simd/lanes.h"

namespace {

template <typename IO>
struct Backward : Task<IO> {
    using Base = Task<IO>;
    using typename Base::PieceDecay;
    using typename Base::T;
    using typename Base::Vec;
    using Base::p, Base::q, Base::k, Base::key_width, Base::width, Base::take, Base::lanes, Base::by_key,
        Base::by_query, Base::rates;

    T *state, *grad;                  // [keys, width]: S, G
    T *state_t, *grad_t;              // transposed: [width, key_width]
    T *written, *grad_y, *solved, *grad_wrong;  // [kChunk, width]; written is `wrong` at first
    T* written_t;                     // [width, kChunk]
    T *grad_by_key, *grad_by_query;   // [kChunk, kChunk]
    T *read_sums, *write_sums;        // [kChunk, lanes], of columns not yet summed
    // what tokens contribute to the gradient of the log decay, as readers and writers of the piece and of states
    alignas(64) T reads[kChunk], writes[kChunk], reads_state[kChunk], writes_state[kChunk];
    alignas(64) T leave_back[kChunk];  // from the last token of the piece

    Backward(const Params& params, T* scratch) : Base(params, scratch) {
        state = take(this->state_size);
        grad = take(this->state_size);
        state_t = take(width * key_width);
        grad_t = take(width * key_width);
        written = take(kChunk * width);
        grad_y = take(kChunk * width);
        solved = take(kChunk * width);
        grad_wrong = take(kChunk * width);
        written_t = take(kChunk * width);
        grad_by_key = take(kChunk * kChunk);
        grad_by_query = take(kChunk * kChunk);
        read_sums = take(kChunk * lanes);
        write_sums = take(kChunk * lanes);
        std::memset(grad_by_key, 0, kChunk * kChunk * sizeof(T));
        std::memset(grad_by_query, 0, kChunk * kChunk * sizeof(T));
    }

    void run() {
        const int64_t begin = p.first[this->row], end = p.first[this->row + 1];
        this->read_state(grad, p.grad_final);
        for (int64_t n = end - 1; n >= begin; --n) run_piece(p.pieces[n]);
        this->write_state(p.grad_initial, grad);
    }

    void run_piece(const Piece& piece) {
        const bool fresh = piece.slot == Piece::kNone;
        const auto decay = this->decay_of(piece);
        this->load(piece, decay);
        pack<IO>(grad_y, width, this->at(piece, p.grad_y, p.width), this->stride(p.width), piece.count, p.width);
        pack<IO>(written, width, this->at(piece, p.wrong, p.width), this->stride(p.width), piece.count, p.width);
        if (!fresh) {
            this->read_state(state, p.entering, piece.slot, slots(p.length));
            transpose_padded<IO>(state_t, key_width, state, width, p.keys, p.width);
        }
        if (piece.leaves) transpose_padded<IO>(grad_t, key_width, grad, width, p.keys, p.width);

        solve_back(piece, decay);
        scale_rows<IO>(written, width, piece.count, p.width, rates);
        transpose_padded<IO>(written_t, kChunk, written, width, piece.count, p.width);
        within_piece(piece, decay);
        scale_rows<IO>(written, width, piece.count, p.width, decay.leave);
        scale_rows<IO>(grad_y, width, piece.count, p.width, decay.enter);
        alignas(64) T minus_enter[kChunk];
        for (int64_t i = 0; i < piece.count; ++i) minus_enter[i] = -decay.enter[i];
        scale_rows<IO>(grad_wrong, width, piece.count, p.width, minus_enter);
        const T across = p.grad_log_decay && !fresh && piece.leaves && decay.total() != 0 ? dot_states() : T(0);
        write_grad_keys(piece);
        step_back(piece, decay.total());
        if (p.grad_log_decay) write_grad_decay(piece, decay.total() * across);
    }

    // solved, grad_wrong, and the gradients of v and beta.
    void solve_back(const Piece& piece, const PieceDecay& decay) {
        const int64_t count = piece.count, stride = this->stride(p.width);
        for (int64_t r = 0; r < count; ++r) leave_back[r] = decay.leave[count - 1 - r];
        const auto right = [&](auto& tile, int64_t r, int64_t i, int64_t column) LM_INLINE {
            if (piece.leaves) {
                tile.add(k + i * key_width, -key_width, 1, grad + column, width, p.keys);
                tile.scale_rows(leave_back + r);
            }
            const int64_t from = i < kTileRows ? 0 : i - kTileRows + 1;  // no token of the tile lies before
            tile.add(by_query + from * kChunk + i, -1, kChunk, grad_y + from * width + column, width, count - from);
        };
        this->template solve<true>(count, solved, grad_wrong, right);
        T* grad_v = this->at(piece, p.grad_v, p.width);
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(grad_v + i * stride, grad_wrong + i * width, p.width * sizeof(T));
            Vec sum = {};
            for (int64_t c = 0; c < p.width; c += lanes) {
                sum += copy_in<Vec>(solved + i * width + c, lanes) * copy_in<Vec>(written + i * width + c, lanes);
            }
            copy_out(read_sums + i * lanes, sum, lanes);
        }
        alignas(64) T grad_beta[kChunk];
        write_row_sums<IO>(grad_beta, read_sums, count, false);
        scatter(this->at(piece, p.grad_beta, 1), grad_beta, count);
    }

    void scatter(T* to, const T* from, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) to[i * p.heads] = from[i];
    }

    // The gradients of the scores before the decay; reads and writes.
    void within_piece(const Piece& piece, const PieceDecay& decay) {
        DecayRow<IO, kChunk> d;
        std::memset(writes, 0, sizeof(writes));
        for (int64_t block = 0; block < piece.count; block += kBlock) {
            const int64_t end = least(block + kBlock, piece.count), columns = block + kBlock;
            outer(grad_y, grad_by_query, block, end);
            outer(grad_wrong, grad_by_key, block, end);
            for (int64_t i = block; i < end; ++i) {
                d.move_to(i, decay);
                Vec read = {};
                for (int64_t j = 0; j < columns; j += lanes) {
                    const int64_t at = i * kChunk + j;
                    const Vec row = copy_in<Vec>(d.at + j, lanes), before = d.is(i, j) ? Vec{} : row;
                    const Vec query = copy_in<Vec>(grad_by_query + at, lanes);
                    const Vec key = copy_in<Vec>(grad_by_key + at, lanes);
                    Vec pair = query * copy_in<Vec>(by_query + at, lanes);
                    pair += key * copy_in<Vec>(by_key + at, lanes);
                    pair = d.is(i, j) ? Vec{} : pair;
                    copy_out(grad_by_query + at, row * query, lanes);
                    copy_out(grad_by_key + at, -before * key, lanes);
                    copy_out(writes + j, copy_in<Vec>(writes + j, lanes) + pair, lanes);
                    read += pair;
                }
                copy_out(read_sums + i * lanes, read, lanes);
            }
        }
        write_row_sums<IO>(reads, read_sums, piece.count, false);
    }

    // Rows [block, end) of left written^T, up to the block's last column.
    void outer(const T* left, T* out, int64_t block, int64_t end) const {
        for_tiles<IO>(block, end, block + kBlock, [&](auto& tile, int64_t i, int64_t j) LM_INLINE {
            tile.add(left + i * width, width, 1, written_t + j, kChunk, p.width);
            tile.store(out + i * kChunk + j, kChunk);
        });
    }

    // The gradients of q and k; reads_state and writes_state. Every panel is scaled by what leaves or enters.
    void write_grad_keys(const Piece& piece) {
        const int64_t count = piece.count, stride = this->stride(p.keys);
        const bool fresh = piece.slot == Piece::kNone;
        T *grad_q = this->at(piece, p.grad_q, p.keys), *grad_k = this->at(piece, p.grad_k, p.keys);
        std::memset(read_sums, 0, kChunk * lanes * sizeof(T));
        std::memset(write_sums, 0, kChunk * lanes * sizeof(T));
        // sums += rows of tile * keys
        const auto dot = [&](auto& tile, const T* keys, int64_t i, int64_t column, T* sums) LM_INLINE {
            tile.each([&](Vec& value, int r, int c) LM_INLINE {
                T* to = sums + (i + r) * lanes;
                const Vec key = copy_in<Vec>(keys + (i + r) * key_width + column + c, lanes);
                copy_out(to, copy_in<Vec>(to, lanes) + value * key, lanes);
            });
        };
        for (int64_t block = 0; block < count; block += kBlock) {
            const int64_t end = least(block + kBlock, count);
            for_tiles<IO>(block, end, p.keys, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
                if (!fresh) {
                    tile.add(grad_y + i * width, width, 1, state_t + column, key_width, p.width);
                    dot(tile, q, i, column, read_sums);
                }
                tile.add(grad_by_query + i * kChunk, kChunk, 1, k + column, key_width, end);
                tile.store(grad_q + i * stride + column, stride, p.keys - column);
            });
            for_tiles<IO>(block, end, p.keys, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
                if (!fresh) {
                    tile.add(grad_wrong + i * width, width, 1, state_t + column, key_width, p.width);
                    dot(tile, k, i, column, read_sums);
                }
                tile.add(grad_by_key + i * kChunk, kChunk, 1, k + column, key_width, end);
                tile.add(grad_by_key + block * kChunk + i, 1, kChunk, k + block * key_width + column, key_width,
                         count - block);
                tile.add(grad_by_query + block * kChunk + i, 1, kChunk, q + block * key_width + column, key_width,
                         count - block);
                tile.store(grad_k + i * stride + column, stride, p.keys - column);
            });
            if (!piece.leaves) continue;
            for_tiles<IO>(block, end, p.keys, [&](auto& tile, int64_t i, int64_t column) LM_INLINE {
                tile.add(written + i * width, width, 1, grad_t + column, key_width, p.width);
                dot(tile, k, i, column, write_sums);
                tile.add_to(grad_k + i * stride + column, stride, p.keys - column);
            });
        }
        write_row_sums<IO>(reads_state, read_sums, count, false);
        write_row_sums<IO>(writes_state, write_sums, count, false);
    }

    T dot_states() const {
        Vec sum = {};
        for (int64_t n = 0; n < p.keys; ++n) {
            for (int64_t c = n * width; c < n * width + p.width; c += lanes) {
                sum += copy_in<Vec>(state + c, lanes) * copy_in<Vec>(grad + c, lanes);
            }
        }
        alignas(64) T rows[lanes * lanes] = {};
        copy_out(rows, sum, lanes);
        T total;
        write_row_sums<IO>(&total, rows, 1, false);
        return total;
    }

    // From the gradient of the state after the piece to that of the state before it.
    void step_back(const Piece& piece, T decay) {
        if (piece.slot == Piece::kNone) {
            std::memset(grad, 0, this->state_size * sizeof(T));
            return;
        }
        const bool carry = piece.leaves && decay != 0;
        for_tiles<IO>(0, p.keys, p.width, [&](auto& tile, int64_t n, int64_t column) LM_INLINE {
            T* to = grad + n * width + column;
            tile.add(q + n, 1, key_width, grad_y + column, width, piece.count);
            tile.add(k + n, 1, key_width, grad_wrong + column, width, piece.count);
            if (carry) {
                tile.each([&](Vec& value, int r, int c) LM_INLINE {
                    value += decay * copy_in<Vec>(to + r * width + c, lanes);
                });
            }
            tile.store(to, width);
        });
    }

    void write_grad_decay(const Piece& piece, T across) const {
        T* to = this->at(piece, p.grad_log_decay, 1);
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
            to[t * p.heads] = static_cast<T>(readers + writers[t] + (t > 0 ? pairs : 0));
        }
    }
};

}  // namespace

namespace lm::LM_UNIT {

void delta_backward(const Params& p, int64_t from, int64_t to, void* scratch) {
    p.f64 ? run_tasks<Backward, Double>(p, from, to, scratch) : run_tasks<Backward, Float>(p, from, to, scratch);
}

}  // namespace lm::LM_UNIT
