// lmtrain::rmsnorm and its backward: checks, allocation, and the split into tasks. Fake and autograd are in
// lmtrain/ops/rmsnorm.py.
#include <tuple>

#include "arguments.h"
#include "rmsnorm/kernel.h"

namespace {

using namespace lm::rmsnorm;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape shape;
    Tensor x, weight;
    Optional gate;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& weight_, const Optional& gate_, int64_t num_groups)
        : Arguments("rmsnorm", "x", x_, Values::f32_f64_bf16), shape(lm::shape_of(x_)) {
        STD_TORCH_CHECK(!shape.empty(), "rmsnorm: x: expected [..., D], got 0 dims");
        const int64_t channels = shape.back();
        STD_TORCH_CHECK(channels >= 1 && num_groups >= 1 && channels % num_groups == 0,
                        "rmsnorm: num_groups: expected a divisor of the last dim ", channels, ", got ", num_groups);
        p.dtype = f64() ? DType::f64 : bf16() ? DType::bf16 : DType::f32;
        x = dense("x", x_, shape), weight = dense("weight", weight_, {channels}, computed());
        gate = dense("gate", gate_, shape);
        p.rows = x.numel() / channels, p.groups = num_groups, p.width = channels / num_groups;
        p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.gate = data_of(gate);
    }

    template <typename Kernel>
    void run_all(Kernel kernel) const {
        run(kernel, p, num_tasks(p), x.numel() >> 15, scratch_elements(p));  // fewer values are not worth a thread
    }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Optional& gate, double eps,
                                   int64_t num_groups) {
    Inputs in(x, weight, gate, num_groups);
    Tensor y = in.empty(in.shape);
    Tensor rstd = in.empty_computed({in.p.rows, in.p.groups});
    in.p.eps = eps;
    in.p.y = y.mutable_data_ptr();
    in.p.rstd = rstd.mutable_data_ptr();
    in.run_all(LM_CPU(rmsnorm_forward));
    return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                            const Optional& gate, const Tensor& rstd,
                                            int64_t num_groups) {
    Inputs in(x, weight, gate, num_groups);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.shape);
    Tensor rstd_dense = in.dense("rstd", rstd, {p.rows, p.groups}, in.computed());
    Tensor grad_x = in.empty(in.shape);
    Tensor grad_gate = gate ? in.empty(in.shape) : in.empty({0});
    Tensor partial = torch::stable::new_zeros(in.weight, {num_tasks(p), p.groups * p.width});
    p.grad_y = grad_y_dense.const_data_ptr();
    p.rstd = rstd_dense.mutable_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_gate = grad_gate.mutable_data_ptr();
    p.partial = partial.mutable_data_ptr();
    in.run_all(LM_CPU(rmsnorm_backward));
    return {grad_x, lm::sum_parts(partial), grad_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def("rmsnorm(Tensor x, Tensor weight, Tensor? gate, float eps, int num_groups) -> (Tensor, Tensor)");
    m.def(
        "rmsnorm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? gate, Tensor rstd,"
        " int num_groups) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("rmsnorm", TORCH_BOX(&forward));
    m.impl("rmsnorm_backward", TORCH_BOX(&backward));
}
