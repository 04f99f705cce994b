// lmtrain::diag_scan and its backward: checks, allocation, and the split into tasks. Fake and autograd are in
// lmtrain/ops/diag_scan.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "diag_scan/kernel.h"

namespace {

using namespace lm::diag_scan;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What forward and backward both read, contiguous and checked. `values` is x, or y in the backward.
struct Inputs {
    Tensor values, log_a;
    std::optional<Tensor> starts, initial_state;
    Params p = {};

    Inputs(const Tensor& values_, const Tensor& log_a_, const std::optional<Tensor>& starts_,
           const std::optional<Tensor>& initial_state_) {
        STD_TORCH_CHECK(values_.dim() == 3, "diag_scan: x: expected [B, T, D], got ", values_.dim(), " dims");
        STD_TORCH_CHECK(values_.scalar_type() == ScalarType::Float || values_.scalar_type() == ScalarType::Double,
                        "diag_scan: x: expected float32 or float64");
        p.f64 = values_.scalar_type() == ScalarType::Double;
        p.batch = values_.size(0), p.length = values_.size(1), p.channels = values_.size(2);
        values = row("x", values_);
        log_a = row("log_a", log_a_);
        p.log_a = log_a.const_data_ptr();
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "diag_scan: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
            p.starts = static_cast<const bool*>(starts->const_data_ptr());
        }
        if (initial_state_) {
            initial_state = state("initial_state", *initial_state_);
            p.initial_state = initial_state->const_data_ptr();
        }
    }

    Tensor row(const char* name, const Tensor& tensor) const {
        return dense(name, tensor, p.batch * p.length * p.channels);
    }
    Tensor state(const char* name, const Tensor& tensor) const { return dense(name, tensor, p.batch * p.channels); }

    // `tensor` contiguous, if it has x's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        const ScalarType expected = p.f64 ? ScalarType::Double : ScalarType::Float;
        STD_TORCH_CHECK(tensor.numel() == elements && tensor.scalar_type() == expected, "diag_scan: ", name,
                        ": expected ", elements, " elements in x's dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty_row() const { return torch::stable::new_empty(values, {p.batch, p.length, p.channels}); }
    Tensor empty_state() const { return torch::stable::new_empty(values, {p.batch, p.channels}); }

    template <typename Kernel>
    void run(Kernel kernel) const {
        // a task below this many values is not worth a thread of its own
        const int64_t least = 1 << 15, values_of_task = p.length * tile_channels(p) + 1;
        const int64_t grain = values_of_task >= least ? 1 : least / values_of_task;
        torch::stable::parallel_for(0, num_tasks(p), grain, [&](int64_t from, int64_t to) { kernel(p, from, to); });
    }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& log_a, const std::optional<Tensor>& starts,
                                   const std::optional<Tensor>& initial_state) {
    Inputs in(x, log_a, starts, initial_state);
    Tensor y = in.empty_row(), final_state = in.empty_state();
    in.p.x = in.values.const_data_ptr();
    in.p.y = y.mutable_data_ptr();
    in.p.final_state = final_state.mutable_data_ptr();
    in.run(LM_CPU(diag_scan_forward));
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_final, const Tensor& y,
                                            const Tensor& log_a, const std::optional<Tensor>& starts,
                                            const std::optional<Tensor>& initial_state) {
    Inputs in(y, log_a, starts, initial_state);
    const Tensor grad_y_dense = in.row("grad_y", grad_y), grad_final_dense = in.state("grad_state", grad_final);
    Tensor grad_x = in.empty_row(), grad_log_a = in.empty_row(), grad_initial = in.empty_state();
    in.p.states = in.values.const_data_ptr();
    in.p.grad_y = grad_y_dense.const_data_ptr();
    in.p.grad_final = grad_final_dense.const_data_ptr();
    in.p.grad_x = grad_x.mutable_data_ptr();
    in.p.grad_log_a = grad_log_a.mutable_data_ptr();
    in.p.grad_initial = grad_initial.mutable_data_ptr();
    in.run(LM_CPU(diag_scan_backward));
    return {grad_x, grad_log_a, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def("diag_scan(Tensor x, Tensor log_a, Tensor? starts, Tensor? initial_state) -> (Tensor, Tensor)");
    m.def(
        "diag_scan_backward(Tensor grad_y, Tensor grad_state, Tensor y, Tensor log_a, Tensor? starts,"
        " Tensor? initial_state) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("diag_scan", TORCH_BOX(&forward));
    m.impl("diag_scan_backward", TORCH_BOX(&backward));
}
