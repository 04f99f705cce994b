// lmtrain::rmsnorm and its backward: checks, allocation, and the split into tasks. Fake and autograd are in
// lmtrain/ops/rmsnorm.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "rmsnorm/kernel.h"

namespace {

using namespace lm::rmsnorm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::Double: return DType::f64;
        case ScalarType::BFloat16: return DType::bf16;
        default: STD_TORCH_CHECK(false, "rmsnorm: x: expected float32, float64 or bfloat16");
    }
}

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs {
    Tensor x, weight;
    std::optional<Tensor> gate;
    ScalarType computed;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& gate_, int64_t num_groups)
        : x(torch::stable::contiguous(x_)), weight(torch::stable::contiguous(weight_)) {
        STD_TORCH_CHECK(x.dim() >= 1, "rmsnorm: x: expected at least 1 dim");
        const int64_t channels = x.size(x.dim() - 1);
        STD_TORCH_CHECK(channels >= 1 && num_groups >= 1 && channels % num_groups == 0,
                        "rmsnorm: num_groups: expected a divisor of the last dim ", channels, ", got ", num_groups);
        p.dtype = dtype_of(x);
        computed = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
        STD_TORCH_CHECK(weight.numel() == channels && weight.scalar_type() == computed,
                        "rmsnorm: weight: expected [D] in the computing dtype");
        p.rows = x.numel() / channels, p.groups = num_groups, p.width = channels / num_groups;
        if (gate_) {
            gate = like_x("gate", *gate_);
            p.gate = gate->const_data_ptr();
        }
        p.x = x.const_data_ptr();
        p.weight = weight.const_data_ptr();
    }

    Tensor like_x(const char* name, const Tensor& tensor) const {
        STD_TORCH_CHECK(tensor.numel() == x.numel() && tensor.scalar_type() == x.scalar_type(), "rmsnorm: ", name,
                        ": expected x's shape and dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty_like_x() const { return torch::stable::new_empty(x, x.sizes()); }

    // Runs the tasks on as many threads as pay, each with its own scratch.
    template <typename Kernel>
    void run(Kernel kernel) const {
        const int64_t least = 1 << 15;  // values below which a thread is not worth starting
        int64_t workers = torch::stable::get_num_threads();
        for (int64_t limit : {num_tasks(p), x.numel() / least}) workers = limit < workers ? limit : workers;
        if (workers < 1) workers = 1;
        Tensor scratch = torch::stable::new_empty(weight, {workers, scratch_elements(p)});
        auto* memory = static_cast<char*>(scratch.mutable_data_ptr());
        const int64_t bytes = scratch_elements(p) * (p.dtype == DType::f64 ? 8 : 4);
        torch::stable::parallel_for(0, workers, 1, [&](int64_t from, int64_t to) {
            for (int64_t w = from; w < to; ++w) {
                kernel(p, num_tasks(p) * w / workers, num_tasks(p) * (w + 1) / workers, memory + w * bytes);
            }
        });
    }
};

template <typename Compute>
void sum_partials(const Params& p, void* total) {
    const auto* partial = static_cast<const Compute*>(p.partial);
    auto* sum = static_cast<Compute*>(total);
    const int64_t channels = p.groups * p.width;
    for (int64_t task = 0; task < num_tasks(p); ++task, partial += channels) {
        for (int64_t c = 0; c < channels; ++c) sum[c] += partial[c];
    }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& gate, double eps,
                                   int64_t num_groups) {
    Inputs in(x, weight, gate, num_groups);
    Tensor y = in.empty_like_x();
    Tensor rstd = torch::stable::new_empty(in.weight, {in.p.rows, in.p.groups});
    in.p.eps = eps;
    in.p.y = y.mutable_data_ptr();
    in.p.rstd = rstd.mutable_data_ptr();
    in.run(LM_CPU(rmsnorm_forward));
    return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& gate, const Tensor& rstd,
                                            int64_t num_groups) {
    Inputs in(x, weight, gate, num_groups);
    Params& p = in.p;
    const Tensor grad_y_dense = in.like_x("grad_y", grad_y);
    STD_TORCH_CHECK(rstd.numel() == p.rows * p.groups && rstd.scalar_type() == in.computed,
                    "rmsnorm: rstd: expected [rows, num_groups] in the computing dtype");
    Tensor rstd_dense = torch::stable::contiguous(rstd);
    Tensor grad_x = in.empty_like_x();
    Tensor grad_gate = gate ? in.empty_like_x() : torch::stable::new_empty(in.x, {0});
    Tensor partial = torch::stable::new_zeros(in.weight, {num_tasks(p), p.groups * p.width});
    Tensor grad_weight = torch::stable::new_zeros(in.weight, {p.groups * p.width});
    p.grad_y = grad_y_dense.const_data_ptr();
    p.rstd = rstd_dense.mutable_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_gate = grad_gate.mutable_data_ptr();
    p.partial = partial.mutable_data_ptr();
    in.run(LM_CPU(rmsnorm_backward));
    (p.dtype == DType::f64 ? sum_partials<double> : sum_partials<float>)(p, grad_weight.mutable_data_ptr());
    return {grad_x, grad_weight, grad_gate};
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
