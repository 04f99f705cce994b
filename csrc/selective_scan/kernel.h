// Selective scan: what the bindings and the kernels share.
//
//   h_t[d,n] = decay_t[d,n] h_{t-1}[d,n] + dt_t[d] x_t[d] B_t[n]          y_t[d] = sum_n C_t[n] h_t[d,n]
//   decay = exp(dt_t[d] A[d,n]), or 1 - dt_t[d] B_t[n]^2 without A
//
// A token in `starts` sees no h_{t-1}, nor does column 0 without an initial state. Where the decay is 0 (an exponent
// below -87) what is not finite is dropped too. Lanes are channels; a channel's N states are N vectors.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::selective_scan {

// The forward keeps the state before every chunk, the backward recomputes from there. It equals CHUNK in
// lmtrain/ops/selective_scan.py.
constexpr int64_t kChunk = 32;
// States that the backward carries through a chunk together: few enough for registers, and for their scratch for L1.
constexpr int kBlock = 4;
// Channels of one task. Fixed, so that sums over channels are taken in the same order for any number of threads.
constexpr int64_t kPart = 128;

// All arrays are contiguous, fp32 or, if f64, fp64.
struct Params {
    bool f64;
    int64_t batch, length, channels, groups, d_state;
    const void *x, *dt;         // [batch, length, channels]
    const void* a;              // [channels, d_state] or null
    const void *b, *c;          // [batch, length, groups, d_state]
    const bool* starts;         // [batch, length] or null
    const void* initial_state;  // [batch, channels, d_state] or null
    void* checkpoints;          // [batch, chunks, d_state, channels]; backward: read

    void* y;            // forward: as x
    void* final_state;  // [batch, channels, d_state]

    const void* grad_y;        // backward: as x
    const void* grad_final;    // as final_state
    void *grad_x, *grad_dt;    // as x
    void* grad_initial;        // as final_state, written even if initial_state is null
    void* partial_a;           // [batch, channels, d_state]
    void *partial_b, *partial_c;  // [parts, batch, length, groups, d_state]
};

namespace {  // not shared between units, see vector.h

inline int64_t num_chunks(const Params& p) { return (p.length + kChunk - 1) / kChunk; }

inline int64_t num_parts(const Params& p) { return (p.channels / p.groups + kPart - 1) / kPart; }

// a task is a part of a group's channels in one row
inline int64_t num_tasks(const Params& p) { return p.batch * p.groups * num_parts(p); }

// the states, rounded up to whole blocks
inline int64_t padded_states(const Params& p) { return (p.d_state + kBlock - 1) / kBlock * kBlock; }

// elements of a thread's scratch memory
inline int64_t forward_scratch(const Params& p) { return 2 * padded_states(p) * kPart; }

inline int64_t backward_scratch(const Params& p, int64_t lanes) {
    const int64_t states = padded_states(p);
    return (3 * states + 5 * kChunk) * kPart + (4 * kChunk + 1) * kBlock * lanes + 2 * kChunk * states;
}

}  // namespace
}  // namespace lm::selective_scan

// forward and backward: tasks [from, to) of num_tasks, with scratch aligned to a vector
LM_CPU_DECLARE(void, selective_scan_forward,
               (const lm::selective_scan::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, selective_scan_backward,
               (const lm::selective_scan::Params&, int64_t from, int64_t to, void* scratch))
