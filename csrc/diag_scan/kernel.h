// Diagonal scan: what the bindings and the kernels share.
//
//   h_t = exp(log_a_t) h_{t-1} + x_t          y_t = h_t
//
// A token in `starts` sees no h_{t-1}, nor does column 0 without an initial state: log_a is not read there. Where the
// decay is 0 (log_a below -87) what is not finite is dropped too.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::diag_scan {

constexpr int64_t kTileBytes = 512;  // of channels, which one task carries through a row

// All arrays are contiguous, fp32 or, if f64, fp64.
struct Params {
    bool f64;
    int64_t batch, length, channels;
    const void* log_a;          // [batch, length, channels]
    const bool* starts;         // [batch, length] or null
    const void* initial_state;  // [batch, channels] or null

    const void* x;      // forward: as log_a
    void* y;            // as log_a
    void* final_state;  // [batch, channels]

    const void* states;        // backward: y
    const void* grad_y;        // as log_a
    const void* grad_final;    // as final_state
    void *grad_x, *grad_log_a;  // as log_a
    void* grad_initial;        // as final_state, written even if initial_state is null
};

namespace {  // not shared between units, see vector.h

inline int64_t tile_channels(const Params& p) { return kTileBytes / (p.f64 ? 8 : 4); }

inline int64_t num_tiles(const Params& p) { return (p.channels + tile_channels(p) - 1) / tile_channels(p); }

inline int64_t num_tasks(const Params& p) { return p.batch * num_tiles(p); }

}  // namespace
}  // namespace lm::diag_scan

// forward and backward: tasks [from, to) of num_tasks
LM_CPU_DECLARE(void, diag_scan_forward, (const lm::diag_scan::Params&, int64_t from, int64_t to))
LM_CPU_DECLARE(void, diag_scan_backward, (const lm::diag_scan::Params&, int64_t from, int64_t to))
