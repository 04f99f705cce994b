// The decays between tokens of a piece, for one head.
#pragma once

#include "simd/decay.h"
#include "simd/tile.h"
#include "ssd/kernel.h"

namespace {

using lm::ssd::kChunk;

// The lower triangular D as it is cheapest made: left of i's block a product of two factors, within it a table.
template <typename IO>
struct Between {
    using T = typename IO::Compute;
    using Vec = typename IO::Vec;
    static constexpr int lanes = kLanes<IO>;

    alignas(64) T since[kChunk];                    // e^{log_a after the first token of i's block, up to i}
    alignas(64) T until[kChunk / kBlock][kChunk];   // e^{log_a after j, up to the first token of the block}
    alignas(64) T inside[kChunk][kBlock];           // D within i's block
    Vec lane;

    explicit Between(const Decay<IO, kChunk>& decay) {
        for (int l = 0; l < lanes; ++l) lane[l] = l;
        for (int64_t block = 0; block < decay.count; block += kBlock) {
            const int64_t end = least(block + kBlock, decay.count);
            T* to_block = until[block / kBlock];
            for (int64_t i = block; i < block + kBlock; ++i) {
                since[i] = i < end ? static_cast<T>(decay.sum[i] - decay.sum[block]) : 0;
            }
            for (int64_t j = 0; j < block; ++j) to_block[j] = static_cast<T>(decay.sum[block] - decay.sum[j]);
            Decay<IO, kChunk>::exponentiate(since + block, kBlock);
            Decay<IO, kChunk>::exponentiate(to_block, block);
            Vec row[kBlock / lanes] = {};
            for (int64_t i = block; i < end; ++i) {
                for (int v = 0; v < kBlock / lanes; ++v) {
                    const Vec value = flushed(row[v] * decay.step[i]);
                    row[v] = is(i - block, v * lanes) ? splat<Vec>(T(1)) : value;
                    copy_out(inside[i] + v * lanes, row[v], lanes);
                }
            }
        }
    }

    // Where column `first` + lane is i.
    auto is(int64_t i, int64_t first) const { return lane == splat<Vec>(static_cast<T>(i - first)); }

    static Vec flushed(Vec value) { return value < T(1e-37) ? Vec{} : value; }  // denormals are slow

    // Row i, columns [j, j + lanes), which lie in i's block or left of it.
    LM_INLINE Vec at(int64_t i, int64_t j) const {
        const int64_t block = i / kBlock * kBlock;
        if (j >= block) return copy_in<Vec>(inside[i] + (j - block), lanes);
        return flushed(since[i] * copy_in<Vec>(until[block / kBlock] + j, lanes));
    }
};

}  // namespace
