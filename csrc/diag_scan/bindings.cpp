// lmtrain::diag_scan and its backward: checks, allocation, and the split into tasks. Fake and autograd are in
// lmtrain/ops/diag_scan.py.
#include <tuple>

#include "arguments.h"
#include "diag_scan/kernel.h"

namespace {

using namespace lm::diag_scan;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// What forward and backward both read, contiguous and checked. `values` is x, or y in the backward.
struct Inputs : lm::Arguments {
    Shape row, state;
    Tensor values, log_a;
    Optional starts, initial_state;
    Params p = {};

    Inputs(const Tensor& values_, const Tensor& log_a_, const Optional& starts_, const Optional& initial_state_)
        : Arguments("diag_scan", "x", values_) {
        row = sizes("x", values_, 3, "[B, T, D]");
        state = {row[0], row[2]};
        p.f64 = f64(), p.batch = row[0], p.length = row[1], p.channels = row[2];
        values = dense("x", values_, row), log_a = dense("log_a", log_a_, row);
        starts = dense_starts(starts_, p.batch, p.length);
        initial_state = dense("initial_state", initial_state_, state);
        p.log_a = log_a.const_data_ptr(), p.starts = static_cast<const bool*>(data_of(starts));
        p.initial_state = data_of(initial_state);
    }

    template <typename Kernel>
    void run_all(Kernel kernel) const {
        run(kernel, p, num_tasks(p), values.numel() >> 15);  // fewer values are not worth a thread
    }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& log_a, const Optional& starts,
                                   const Optional& initial_state) {
    Inputs in(x, log_a, starts, initial_state);
    Tensor y = in.empty(in.row), final_state = in.empty(in.state);
    in.p.x = in.values.const_data_ptr();
    in.p.y = y.mutable_data_ptr();
    in.p.final_state = final_state.mutable_data_ptr();
    in.run_all(LM_CPU(diag_scan_forward));
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_final, const Tensor& y,
                                            const Tensor& log_a, const Optional& starts,
                                            const Optional& initial_state) {
    Inputs in(y, log_a, starts, initial_state);
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.row);
    const Tensor grad_final_dense = in.dense("grad_state", grad_final, in.state);
    Tensor grad_x = in.empty(in.row), grad_log_a = in.empty(in.row), grad_initial = in.empty(in.state);
    in.p.states = in.values.const_data_ptr();
    in.p.grad_y = grad_y_dense.const_data_ptr();
    in.p.grad_final = grad_final_dense.const_data_ptr();
    in.p.grad_x = grad_x.mutable_data_ptr();
    in.p.grad_log_a = grad_log_a.mutable_data_ptr();
    in.p.grad_initial = grad_initial.mutable_data_ptr();
    in.run_all(LM_CPU(diag_scan_backward));
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
