// lmtrain::dplr and its backward: checks, allocation and the split into tasks. Fake and autograd are in
// lmtrain/ops/dplr.py, which also takes the exponential of the decay.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dplr/kernel.h"

namespace {

using namespace lm::dplr;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs {
    Tensor v, r, decay, k, a, b;
    std::optional<Tensor> starts, initial_state;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& r_, const Tensor& decay_, const Tensor& k_, const Tensor& a_,
           const Tensor& b_, const std::optional<Tensor>& starts_, const std::optional<Tensor>& initial_state_) {
        STD_TORCH_CHECK(v_.dim() == 4, "dplr: v: expected [B, T, H, V], got ", v_.dim(), " dims");
        STD_TORCH_CHECK(v_.scalar_type() == ScalarType::Float || v_.scalar_type() == ScalarType::Double,
                        "dplr: v: expected float32 or float64");
        STD_TORCH_CHECK(r_.dim() == 4, "dplr: r: expected [B, T, H, K], got ", r_.dim(), " dims");
        p.f64 = v_.scalar_type() == ScalarType::Double;
        p.batch = v_.size(0), p.length = v_.size(1), p.heads = v_.size(2), p.width = v_.size(3), p.keys = r_.size(3);
        const int64_t tokens = p.batch * p.length * p.heads;
        v = dense("v", v_, tokens * p.width);
        r = dense("r", r_, tokens * p.keys);
        decay = dense("decay", decay_, tokens * p.keys);
        k = dense("k", k_, tokens * p.keys);
        a = dense("a", a_, tokens * p.keys);
        b = dense("b", b_, tokens * p.keys);
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "dplr: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
            p.starts = static_cast<const bool*>(starts->const_data_ptr());
        }
        if (initial_state_) {
            initial_state = dense("initial_state", *initial_state_, p.batch * p.heads * p.keys * p.width);
            p.initial_state = initial_state->const_data_ptr();
        }
        p.v = v.const_data_ptr(), p.r = r.const_data_ptr(), p.decay = decay.const_data_ptr();
        p.k = k.const_data_ptr(), p.a = a.const_data_ptr(), p.b = b.const_data_ptr();
    }

    // `tensor` contiguous, if it has v's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        STD_TORCH_CHECK(tensor.numel() == elements && (tensor.scalar_type() == ScalarType::Double) == p.f64 &&
                            (tensor.scalar_type() == ScalarType::Float) != p.f64,
                        "dplr: ", name, ": expected ", elements, " elements in v's dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty(int64_t size) const { return torch::stable::new_empty(v, {p.batch, p.length, p.heads, size}); }
    Tensor empty_state() const { return torch::stable::new_empty(v, {p.batch, p.heads, p.keys, p.width}); }

    // Runs every head of every row on as many threads as pay, each with its own scratch.
    template <typename Kernel>
    void run(Kernel kernel, int64_t scratch_elements) const {
        // multiplications below which a thread is not worth starting, of about this many in all
        const int64_t least = 1 << 18, tasks = p.batch * p.heads, work = tasks * p.length * 5 * p.keys * p.width;
        int64_t workers = torch::stable::get_num_threads();
        for (int64_t limit : {tasks, work / least}) workers = limit < workers ? limit : workers;
        if (workers < 1) workers = 1;
        Tensor scratch = torch::stable::new_empty(v, {workers, scratch_elements});
        auto* memory = static_cast<char*>(scratch.mutable_data_ptr());
        const int64_t bytes = scratch_elements * (p.f64 ? 8 : 4);
        torch::stable::parallel_for(0, workers, 1, [&](int64_t from, int64_t to) {
            for (int64_t w = from; w < to; ++w) {
                kernel(p, tasks * w / workers, tasks * (w + 1) / workers, memory + w * bytes);
            }
        });
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& v, const Tensor& r, const Tensor& decay, const Tensor& k,
                                           const Tensor& a, const Tensor& b, const std::optional<Tensor>& starts,
                                           const std::optional<Tensor>& initial_state) {
    Inputs in(v, r, decay, k, a, b, starts, initial_state);
    Params& p = in.p;
    Tensor y = in.empty(p.width), final_state = in.empty_state();
    Tensor kept = torch::stable::new_empty(in.v, {p.batch, p.heads, pieces(p), p.keys, p.width});
    p.y = y.mutable_data_ptr(), p.final_state = final_state.mutable_data_ptr(), p.kept = kept.mutable_data_ptr();
    in.run(LM_CPU(dplr_forward), forward_scratch(p));
    return {y, final_state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& v, const Tensor& r, const Tensor& decay,
    const Tensor& k, const Tensor& a, const Tensor& b, const std::optional<Tensor>& starts,
    const std::optional<Tensor>& initial_state, const Tensor& kept) {
    Inputs in(v, r, decay, k, a, b, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, v.numel());
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, p.batch * p.heads * p.keys * p.width);
    Tensor kept_dense = in.dense("kept", kept, grad_final.numel() * pieces(p));
    Tensor grad_v = in.empty(p.width), grad_r = in.empty(p.keys), grad_decay = in.empty(p.keys);
    Tensor grad_k = in.empty(p.keys), grad_a = in.empty(p.keys), grad_b = in.empty(p.keys);
    Tensor grad_initial = in.empty_state();
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.kept = kept_dense.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_r = grad_r.mutable_data_ptr();
    p.grad_decay = grad_decay.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
    p.grad_a = grad_a.mutable_data_ptr(), p.grad_b = grad_b.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    in.run(LM_CPU(dplr_backward), backward_scratch(p));
    return {grad_v, grad_r, grad_decay, grad_k, grad_a, grad_b, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "dplr(Tensor v, Tensor r, Tensor decay, Tensor k, Tensor a, Tensor b, Tensor? starts, Tensor? initial_state)"
        " -> (Tensor, Tensor, Tensor)");
    m.def(
        "dplr_backward(Tensor grad_y, Tensor grad_final, Tensor v, Tensor r, Tensor decay, Tensor k, Tensor a,"
        " Tensor b, Tensor? starts, Tensor? initial_state, Tensor kept)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("dplr", TORCH_BOX(&forward));
    m.impl("dplr_backward", TORCH_BOX(&backward));
}
