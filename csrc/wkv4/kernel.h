// RWKV-4's time mixing (wkv4): what the bindings and the kernels share. The equation is in lmtrain/ops/wkv4.py.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::wkv4 {

constexpr int64_t kChannels = 16;  // of a task, at most

// All arrays but `starts` are contiguous and of one type, fp32, or fp64 if `f64`. The state is (a, b, p).
struct Params {
    bool f64;
    int64_t batch, length, width;
    const void *v, *k;          // [batch, length, width]
    const void *w, *u;          // [width]
    const bool* starts;         // [batch, length] or null: a document starts here
    const void* initial_state;  // [batch, 3, width] or null
    void* y;                    // forward: as v
    void* final_state;          // as initial_state

    const void* grad_y;      // backward: as v
    const void* grad_final;  // as initial_state
    void *grad_v, *grad_k;
    void *grad_w, *grad_u;  // [batch, width]
    void* grad_initial;     // as initial_state, written even if that is null
};

}  // namespace lm::wkv4

// Tasks [from, to), a task being kChannels channels of a row; results do not depend on how they are split. The backward
// needs scratch for 3 * kChannels * length elements.
LM_CPU_DECLARE(void, wkv4_forward, (const lm::wkv4::Params&, int64_t from, int64_t to))
LM_CPU_DECLARE(void, wkv4_backward, (const lm::wkv4::Params&, int64_t from, int64_t to, void* scratch))
