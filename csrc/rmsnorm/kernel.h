// Root-mean-square normalisation, optionally gated: what the bindings and the kernels share.
//
//   u = x * silu(gate), or x without one       rstd = (mean_group(u^2) + eps)^-1/2       y = u * rstd * weight
//
// Arrays are read as segments: a segment is one group of one row, and segment s belongs to group s % groups.
#pragma once

#include <cstdint>

#include "simd/unit.h"

namespace lm::rmsnorm {

// A task is this many rows. The number is fixed, so that the gradient of weight, a sum over rows, is taken in the same
// order for any number of threads.
constexpr int64_t kRows = 32;

enum class DType { f32, f64, bf16 };

// All arrays are contiguous; values of `dtype`; weight, rstd and weight's gradient fp32, or fp64 for f64.
struct Params {
    DType dtype;
    int64_t rows, groups, width;  // width: of one group
    double eps;                   // forward
    const void* x;       // [rows, groups, width]
    const void* weight;  // [groups, width]
    const void* gate;    // as x, or null
    void* y;             // as x
    void* rstd;          // [rows, groups]: written by forward, read by backward

    const void* grad_y;  // backward: as x
    void* grad_x;        // as x
    void* grad_gate;     // as x, or null
    void* partial;       // [tasks, groups, width], zeros: the gradient of weight from each task's rows
};

namespace {  // not shared between units, see vector.h

inline int64_t num_tasks(const Params& p) { return (p.rows + kRows - 1) / kRows; }

// Elements of scratch, per thread.
inline int64_t scratch_elements(const Params& p) { return 2 * p.width; }

}  // namespace
}  // namespace lm::rmsnorm

// tasks [from, to) of num_tasks
LM_CPU_DECLARE(void, rmsnorm_forward, (const lm::rmsnorm::Params&, int64_t from, int64_t to, void* scratch))
LM_CPU_DECLARE(void, rmsnorm_backward, (const lm::rmsnorm::Params&, int64_t from, int64_t to, void* scratch))
