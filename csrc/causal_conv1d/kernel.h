// Depthwise causal convolution over time: what the bindings and the kernels share.
//
//   y[b,t] = act(bias + sum_{d < visible(b,t)} weight[width-1-d] * in[b,t-d])
//
// `in` is x preceded by the tail. A tap at distance d is visible iff d <= positions[b,t]; without positions, always;
// without a tail, what lies left of column 0 is zero.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::causal_conv1d {

constexpr int64_t kMaxWidth = 16;
// A task is a chunk of columns of one row and a tile of channels. Both sizes are fixed, so that sums over time are
// taken in the same order for any number of threads.
constexpr int64_t kChunk = 128;
constexpr int64_t kTileBytes = 2048;

enum class DType { f32, f64, bf16 };

// All arrays are contiguous; values and states of `dtype`, parameters and their gradients fp32, or fp64 for f64.
struct Params {
    DType dtype;
    bool silu;
    int64_t batch, length, channels, width;
    const void* x;             // [batch, length, channels]
    const void* weight;        // [width, channels]
    const void* bias;          // [channels] or null
    const int32_t* positions;  // [batch, length] or null
    const void* tail;          // [batch, width-1, channels] or null
    void* y;                   // forward: as x

    const void* grad_y;      // backward: as x
    const void* grad_final;  // gradient of the returned tail, as tail
    void* grad_x;            // as x
    void* grad_tail;         // as tail, written even if tail is null
    void* partial;           // [batch * chunks, width + 1, channels], zeros: gradients of weight and, last, bias
};

namespace {  // not shared between units, see vector.h

// at least one: the backward of an empty row still hands the returned tail's gradient to the tail
inline int64_t num_chunks(const Params& p) { return p.length > kChunk ? (p.length + kChunk - 1) / kChunk : 1; }

inline int64_t tile_channels(const Params& p) { return kTileBytes / (p.dtype == DType::f64 ? 8 : 4); }

inline int64_t num_tiles(const Params& p) { return (p.channels + tile_channels(p) - 1) / tile_channels(p); }

inline int64_t num_tasks(const Params& p) { return p.batch * num_chunks(p) * num_tiles(p); }

}  // namespace
}  // namespace lm::causal_conv1d

// forward and backward: tasks [from, to) of num_tasks
LM_CPU_DECLARE(void, causal_conv1d_forward, (const lm::causal_conv1d::Params&, int64_t from, int64_t to))
LM_CPU_DECLARE(void, causal_conv1d_backward, (const lm::causal_conv1d::Params&, int64_t from, int64_t to))
