// lmtrain::selective_scan and its backward: checks, allocation, the split into tasks, and the sums over their partial
// gradients. Fake and autograd are in lmtrain/ops/selective_scan.py.
#include <tuple>

#include "arguments.h"
#include "selective_scan/kernel.h"

namespace {

using namespace lm::selective_scan;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

constexpr int64_t kMostLanes = 16;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape row, keys, rates, state, saved;
    Tensor x, dt, b, c;
    Optional a, starts, initial_state;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& dt_, const Optional& a_, const Tensor& b_, const Tensor& c_,
           const Optional& starts_, const Optional& initial_state_)
        : Arguments("selective_scan", "x", x_) {
        row = sizes("x", x_, 3, "[B, T, D]"), keys = sizes("B", b_, 4, "[B, T, G, N]");
        keys[0] = row[0], keys[1] = row[1];
        p.f64 = f64(), p.batch = row[0], p.length = row[1], p.channels = row[2];
        p.groups = keys[2], p.d_state = keys[3];
        STD_TORCH_CHECK(p.groups > 0 && p.channels % p.groups == 0,
                        "selective_scan: B: expected groups that divide the ", p.channels, " channels, got ", p.groups);
        rates = {p.channels, p.d_state}, state = {p.batch, p.channels, p.d_state};
        saved = {p.batch, num_chunks(p), p.d_state, p.channels};
        x = dense("x", x_, row), dt = dense("dt", dt_, row), b = dense("B", b_, keys), c = dense("C", c_, keys);
        a = dense("A", a_, rates);
        starts = dense_starts(starts_, p.batch, p.length);
        initial_state = dense("initial_state", initial_state_, state);
        p.x = x.const_data_ptr(), p.dt = dt.const_data_ptr(), p.b = b.const_data_ptr(), p.c = c.const_data_ptr();
        p.a = data_of(a), p.starts = static_cast<const bool*>(data_of(starts));
        p.initial_state = data_of(initial_state);
    }

    template <typename Kernel>
    void run_all(Kernel kernel, int64_t scratch_elements) const {
        const int64_t work = x.numel() * p.d_state;  // states, of which fewer are not worth a thread
        run(kernel, p, num_tasks(p), work >> 15, scratch_elements);
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Optional& a,
                                           const Tensor& b, const Tensor& c, const Optional& starts,
                                           const Optional& initial_state) {
    Inputs in(x, dt, a, b, c, starts, initial_state);
    Params& p = in.p;
    Tensor y = in.empty(in.row), final_state = in.empty(in.state);
    Tensor checkpoints = in.empty(in.saved);
    p.y = y.mutable_data_ptr();
    p.final_state = final_state.mutable_data_ptr();
    p.checkpoints = checkpoints.mutable_data_ptr();
    in.run_all(LM_CPU(selective_scan_forward), forward_scratch(p));
    return {y, final_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& x, const Tensor& dt, const Optional& a,
    const Tensor& b, const Tensor& c, const Optional& starts, const Optional& initial_state,
    const Tensor& checkpoints) {
    Inputs in(x, dt, a, b, c, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.row);
    const Tensor grad_final_dense = in.dense("grad_state", grad_final, in.state);
    Tensor checkpoints_dense = in.dense("checkpoints", checkpoints, in.saved);
    Tensor grad_x = in.empty(in.row), grad_dt = in.empty(in.row), grad_initial = in.empty(in.state);
    const Shape parts = {num_parts(p), p.batch, p.length, p.groups, p.d_state};
    Tensor partial_a = in.empty(in.a ? in.state : Shape{0}), partial_b = in.empty(parts), partial_c = in.empty(parts);
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.checkpoints = checkpoints_dense.mutable_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr(), p.grad_dt = grad_dt.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    p.partial_a = partial_a.mutable_data_ptr();
    p.partial_b = partial_b.mutable_data_ptr(), p.partial_c = partial_c.mutable_data_ptr();
    in.run_all(LM_CPU(selective_scan_backward), backward_scratch(p, kMostLanes));
    Tensor grad_a = in.a ? lm::sum_parts(partial_a) : torch::stable::new_zeros(in.x, in.rates);
    return {grad_x, grad_dt, grad_a, lm::sum_parts(partial_b), lm::sum_parts(partial_c), grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "selective_scan(Tensor x, Tensor dt, Tensor? A, Tensor B, Tensor C, Tensor? starts, Tensor? initial_state)"
        " -> (Tensor, Tensor, Tensor)");
    m.def(
        "selective_scan_backward(Tensor grad_y, Tensor grad_state, Tensor x, Tensor dt, Tensor? A, Tensor B, Tensor C,"
        " Tensor? starts, Tensor? initial_state, Tensor checkpoints)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("selective_scan", TORCH_BOX(&forward));
    m.impl("selective_scan_backward", TORCH_BOX(&backward));
}
