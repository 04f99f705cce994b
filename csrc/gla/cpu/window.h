// One piece of one head: its panels, its decayed keys and scores, and the step of the state over it.
#pragma once

#include "gla/kernel.h"
#include "simd/panel.h"
#include "simd/tile.h"

namespace {

using namespace lm::gla;

// exp that reaches 0, which the clamped vexp does not.
inline VecF decay_exp(VecF x) { return x < -87.0f ? VecF{} : vexp(x); }
inline VecD decay_exp(VecD x) { return vexp(x); }

// Denormals are slow, and decayed keys pass through them: from here they are 0, until `restore` of what this returns.
// No destructor does it: an object's cleanup makes the units share a symbol.
inline unsigned flush_denormals() {
#if LM_X86
    const unsigned mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}

inline void restore([[maybe_unused]] unsigned mode) {
#if LM_X86
    __builtin_ia32_ldmxcsr(mode);
#endif
}

template <typename IO>
struct Window {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>, vectors = kPiece / lanes;

    const Params& p;
    const int64_t key_width = whole(p.key_dim), width = whole(p.value_dim);
    const int64_t key_stride = p.heads * p.key_dim, value_stride = p.heads * p.value_dim;
    int64_t row = 0, head = 0;
    Piece piece = {};
    T* next;
    T* const q = take(kPiece * key_width);      // [tokens, key_width]
    T* const decay = take(kPiece * key_width);  // e^g, likewise
    T* const enter = take(kPiece * key_width);  // e^{g over the piece up to the token}: of the state
    T* const read = take(kPiece * key_width);   // q times the decay of the state that the token reads
    T* const keys = take(kPiece * key_width);   // [key_dim, kPiece], transposed
    T* const leave = take(kPiece * key_width);  // as keys, decayed to the end of the piece
    T* const values = take(kPiece * width);     // [tokens, width]
    T* const scores = take(kPiece * kPiece);    // [reader, writer], 0 where the writer is later
    T* const u = take(key_width);

    Window(const Params& params, T* scratch) : p(params), next(scratch) {}

    T* take(int64_t elements) { return (next += elements) - elements; }

    void move_to(int64_t task) {
        row = task / p.heads, head = task % p.heads;
        if (p.u) pack<IO>(u, key_width, static_cast<const T*>(p.u) + head * p.key_dim, 0, 1, p.key_dim);
    }

    // The piece's first token in a tensor [batch, length, heads, columns].
    template <typename Base>
    auto at(Base* tensor, int64_t columns) const {
        return as<T>(tensor) + ((row * p.length + piece.begin) * p.heads + head) * columns;
    }

    // The head in a tensor [batch, heads, size].
    template <typename Base>
    auto of_head(Base* tensor, int64_t size) const {
        return as<T>(tensor) + (row * p.heads + head) * size;
    }

    template <typename To>
    static To* as(void* memory) { return static_cast<To*>(memory); }
    template <typename To>
    static const To* as(const void* memory) { return static_cast<const To*>(memory); }

    void load(const Piece& to) {
        piece = to;
        pack<IO>(q, key_width, at(p.q, p.key_dim), key_stride, piece.count, p.key_dim);
        pack<IO>(decay, key_width, at(p.g, p.key_dim), key_stride, piece.count, p.key_dim);
        pack<IO>(values, width, at(p.v, p.value_dim), value_stride, piece.count, p.value_dim);
        for (int64_t k = 0; k < key_width; k += lanes) {
            Vec entered = splat<Vec>(T(1));
            for (int64_t i = 0; i < piece.count; ++i) {
                const int64_t to = i * key_width + k;
                Vec a = decay_exp(copy_in<Vec>(decay + to, lanes));
                if (piece.fresh && i == 0) a = Vec{};  // it acts on nothing, whatever it is
                const Vec before = entered;
                entered *= a;
                copy_out(decay + to, a, lanes);
                copy_out(enter + to, entered, lanes);
                copy_out(read + to, copy_in<Vec>(q + to, lanes) * (p.u ? before : entered), lanes);
            }
        }
        transpose<IO>(keys, kPiece, at(p.k, p.key_dim), key_stride, piece.count, p.key_dim);
        for (int64_t k = 0; k < p.key_dim; ++k) {
            for (int64_t i = piece.count; i < kPiece; ++i) keys[k * kPiece + i] = 0;
        }
    }

    const T* total() const { return enter + (piece.count - 1) * key_width; }

    // Decays the keys: `leave`, and the scores if SCORES.
    template <bool SCORES>
    void sweep() {
        if constexpr (SCORES) std::memset(scores, 0, kPiece * kPiece * sizeof(T));
        int64_t k = 0;
        for (; k + 4 <= p.key_dim; k += 4) p.u ? sweep_keys<SCORES, true, 4>(k) : sweep_keys<SCORES, false, 4>(k);
        for (; k < p.key_dim; ++k) p.u ? sweep_keys<SCORES, true, 1>(k) : sweep_keys<SCORES, false, 1>(k);
    }

    // Channels [k, k + KEYS), the writing tokens side by side in the lanes, the reading ones in order.
    template <bool SCORES, bool BONUS, int KEYS>
    void sweep_keys(int64_t k) {
        for (int v = 0; v < vectors; ++v) {
            Vec key[KEYS], decayed[KEYS], lane;
            for (int l = 0; l < lanes; ++l) lane[l] = static_cast<T>(v * lanes + l);
            for (int s = 0; s < KEYS; ++s) {
                key[s] = copy_in<Vec>(keys + (k + s) * kPiece + v * lanes, lanes);
                decayed[s] = Vec{};
            }
            for (int64_t i = 0; i < piece.count; ++i) {
                const auto own = lane == splat<Vec>(static_cast<T>(i));
                T* score = scores + i * kPiece + v * lanes;
                Vec sum = {};
                if constexpr (SCORES) sum = copy_in<Vec>(score, lanes);
#pragma GCC unroll 4
                for (int s = 0; s < KEYS; ++s) {
                    const T query = q[i * key_width + k + s];
                    if constexpr (SCORES && BONUS) sum += query * (own ? u[k + s] * key[s] : decayed[s]);
                    decayed[s] = own ? key[s] : decayed[s] * decay[i * key_width + k + s];
                    if constexpr (SCORES && !BONUS) sum += query * decayed[s];
                }
                if constexpr (SCORES) copy_out(score, sum, lanes);
            }
            for (int s = 0; s < KEYS; ++s) copy_out(leave + (k + s) * kPiece + v * lanes, decayed[s], lanes);
        }
    }

    // after = Diag(total) before + left^T right, for left's element (token, k) at token * left_token + k * left_key and
    // right [tokens, width]. Where the decay is 0, and in a fresh piece, it drops even what is not finite.
    void step_state(T* after, const T* before, const T* left, int64_t left_key, int64_t left_token, const T* right) {
        for_tiles<IO>(0, p.key_dim, width, [&](auto& tile, int64_t k, int64_t column) LM_INLINE {
            tile.add(left + k * left_key, left_key, left_token, right + column, width, piece.count);
            if (!piece.fresh) {
                tile.each([&](Vec& value, int r, int c) LM_INLINE {
                    const T factor = total()[k + r];
                    if (factor != 0) value += factor * copy_in<Vec>(before + (k + r) * width + column + c, lanes);
                });
            }
            tile.store(after + k * width + column, width);
        });
    }

    // The state after the piece, by the keys that `sweep` decayed.
    void advance(T* after, const T* before) { step_state(after, before, leave, kPiece, 1, values); }

    // `state` [key_dim, width] from this head of a tensor [batch, heads, key_dim, value_dim], or zeros.
    void read_state(T* state, const void* tensor) const {
        const int64_t size = p.key_dim * p.value_dim;
        if (tensor) pack<IO>(state, width, of_head(tensor, size), p.value_dim, p.key_dim, p.value_dim);
        else std::memset(state, 0, p.key_dim * width * sizeof(T));
    }

    void write_state(const T* state, void* tensor) const {
        T* to = of_head(tensor, p.key_dim * p.value_dim);
        for (int64_t k = 0; k < p.key_dim; ++k) {
            std::memcpy(to + k * p.value_dim, state + k * width, p.value_dim * sizeof(T));
        }
    }
};

}  // namespace
