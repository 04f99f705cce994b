// lmtrain::selective_scan and its backward: checks, allocation, the split into tasks, and the sums over their partial
// gradients. Fake and autograd are in lmtrain/ops/selective_scan.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "selective_scan/kernel.h"

namespace {

using namespace lm::selective_scan;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostLanes = 16;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs {
    Tensor x, dt, b, c;
    std::optional<Tensor> a, starts, initial_state;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& dt_, const std::optional<Tensor>& a_, const Tensor& b_, const Tensor& c_,
           const std::optional<Tensor>& starts_, const std::optional<Tensor>& initial_state_) {
        STD_TORCH_CHECK(x_.dim() == 3, "selective_scan: x: expected [B, T, D], got ", x_.dim(), " dims");
        STD_TORCH_CHECK(x_.scalar_type() == ScalarType::Float || x_.scalar_type() == ScalarType::Double,
                        "selective_scan: x: expected float32 or float64");
        STD_TORCH_CHECK(b_.dim() == 4, "selective_scan: B: expected [B, T, G, N], got ", b_.dim(), " dims");
        p.f64 = x_.scalar_type() == ScalarType::Double;
        p.batch = x_.size(0), p.length = x_.size(1), p.channels = x_.size(2);
        p.groups = b_.size(2), p.d_state = b_.size(3);
        STD_TORCH_CHECK(p.groups > 0 && p.channels % p.groups == 0,
                        "selective_scan: B: expected groups that divide the channels");
        x = dense("x", x_, row_elements()), dt = dense("dt", dt_, row_elements());
        b = dense("B", b_, key_elements()), c = dense("C", c_, key_elements());
        p.x = x.const_data_ptr(), p.dt = dt.const_data_ptr(), p.b = b.const_data_ptr(), p.c = c.const_data_ptr();
        if (a_) {
            a = dense("A", *a_, p.channels * p.d_state);
            p.a = a->const_data_ptr();
        }
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "selective_scan: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
            p.starts = static_cast<const bool*>(starts->const_data_ptr());
        }
        if (initial_state_) {
            initial_state = dense("initial_state", *initial_state_, state_elements());
            p.initial_state = initial_state->const_data_ptr();
        }
    }

    int64_t row_elements() const { return p.batch * p.length * p.channels; }
    int64_t key_elements() const { return p.batch * p.length * p.groups * p.d_state; }
    int64_t state_elements() const { return p.batch * p.channels * p.d_state; }
    int64_t checkpoint_elements() const { return num_chunks(p) * state_elements(); }

    // `tensor` contiguous, if it has x's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        const ScalarType expected = p.f64 ? ScalarType::Double : ScalarType::Float;
        STD_TORCH_CHECK(tensor.numel() == elements && tensor.scalar_type() == expected, "selective_scan: ", name,
                        ": expected ", elements, " elements in x's dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty_row() const { return torch::stable::new_empty(x, {p.batch, p.length, p.channels}); }
    Tensor empty_state() const { return torch::stable::new_empty(x, {p.batch, p.channels, p.d_state}); }

    // Runs all tasks on as many threads as pay, each with its own scratch.
    template <typename Kernel>
    void run(Kernel kernel, int64_t scratch_elements) const {
        // states below which a thread is not worth starting
        const int64_t least = 1 << 15, tasks = num_tasks(p), work = row_elements() * p.d_state;
        int64_t workers = torch::stable::get_num_threads();
        for (int64_t limit : {tasks, work / least}) workers = limit < workers ? limit : workers;
        if (workers < 1) workers = 1;
        Tensor scratch = torch::stable::new_empty(x, {workers, scratch_elements});
        auto* memory = static_cast<char*>(scratch.mutable_data_ptr());
        const int64_t bytes = scratch_elements * (p.f64 ? 8 : 4);
        torch::stable::parallel_for(0, workers, 1, [&](int64_t from, int64_t to) {
            for (int64_t w = from; w < to; ++w) {
                kernel(p, tasks * w / workers, tasks * (w + 1) / workers, memory + w * bytes);
            }
        });
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const std::optional<Tensor>& a,
                                           const Tensor& b, const Tensor& c, const std::optional<Tensor>& starts,
                                           const std::optional<Tensor>& initial_state) {
    Inputs in(x, dt, a, b, c, starts, initial_state);
    Params& p = in.p;
    Tensor y = in.empty_row(), final_state = in.empty_state();
    Tensor checkpoints = torch::stable::new_empty(in.x, {p.batch, num_chunks(p), p.d_state, p.channels});
    p.y = y.mutable_data_ptr();
    p.final_state = final_state.mutable_data_ptr();
    p.checkpoints = checkpoints.mutable_data_ptr();
    in.run(LM_CPU(selective_scan_forward), forward_scratch(p));
    return {y, final_state, checkpoints};
}

// total = the sum of `count` parts of `size` elements each, in order.
template <typename T>
void sum_parts(const Tensor& parts, int64_t count, int64_t size, Tensor& total) {
    const T* from = static_cast<const T*>(parts.const_data_ptr());
    T* to = static_cast<T*>(total.mutable_data_ptr());
    torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[i] = 0;
        for (int64_t part = 0; part < count; ++part) {
            for (int64_t i = begin; i < end; ++i) to[i] += from[part * size + i];
        }
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& x, const Tensor& dt, const std::optional<Tensor>& a,
    const Tensor& b, const Tensor& c, const std::optional<Tensor>& starts, const std::optional<Tensor>& initial_state,
    const Tensor& checkpoints) {
    Inputs in(x, dt, a, b, c, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.row_elements());
    const Tensor grad_final_dense = in.dense("grad_state", grad_final, in.state_elements());
    Tensor saved = in.dense("checkpoints", checkpoints, in.checkpoint_elements());
    Tensor grad_x = in.empty_row(), grad_dt = in.empty_row(), grad_initial = in.empty_state();
    Tensor grad_a = torch::stable::new_zeros(in.x, {p.channels, p.d_state});
    Tensor grad_b = torch::stable::new_empty(in.x, {p.batch, p.length, p.groups, p.d_state});
    Tensor grad_c = torch::stable::new_empty(in.x, {p.batch, p.length, p.groups, p.d_state});
    Tensor partial_a = torch::stable::new_empty(in.x, {in.a ? in.state_elements() : 0});
    Tensor partial_b = torch::stable::new_empty(in.x, {num_parts(p) * in.key_elements()});
    Tensor partial_c = torch::stable::new_empty(in.x, {num_parts(p) * in.key_elements()});
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.checkpoints = saved.mutable_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr(), p.grad_dt = grad_dt.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    p.partial_a = partial_a.mutable_data_ptr();
    p.partial_b = partial_b.mutable_data_ptr(), p.partial_c = partial_c.mutable_data_ptr();
    in.run(LM_CPU(selective_scan_backward), backward_scratch(p, kMostLanes));
    const auto sum = p.f64 ? sum_parts<double> : sum_parts<float>;
    if (in.a) sum(partial_a, p.batch, p.channels * p.d_state, grad_a);
    sum(partial_b, num_parts(p), in.key_elements(), grad_b);
    sum(partial_c, num_parts(p), in.key_elements(), grad_c);
    return {grad_x, grad_dt, grad_a, grad_b, grad_c, grad_initial};
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
