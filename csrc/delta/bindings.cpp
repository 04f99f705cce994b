// lmtrain::delta and its backward: checks, allocation, the cut into pieces and the split into tasks. Fake and autograd
// are in lmtrain/ops/delta.py, which also repeats keys over value heads.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "delta/kernel.h"
#include "pieces.h"

namespace {

using namespace lm::delta;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs {
    Tensor v, q, k, beta;
    std::optional<Tensor> log_decay, starts, initial_state;
    std::optional<lm::Pieces> pieces;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& q_, const Tensor& k_, const Tensor& beta_,
           const std::optional<Tensor>& log_decay_, const std::optional<Tensor>& starts_,
           const std::optional<Tensor>& initial_state_) {
        STD_TORCH_CHECK(v_.dim() == 4, "delta: v: expected [B, T, H, V], got ", v_.dim(), " dims");
        STD_TORCH_CHECK(v_.scalar_type() == ScalarType::Float || v_.scalar_type() == ScalarType::Double,
                        "delta: v: expected float32 or float64");
        STD_TORCH_CHECK(q_.dim() == 4, "delta: q: expected [B, T, H, K], got ", q_.dim(), " dims");
        p.f64 = v_.scalar_type() == ScalarType::Double;
        p.batch = v_.size(0), p.length = v_.size(1), p.heads = v_.size(2), p.width = v_.size(3), p.keys = q_.size(3);
        const int64_t tokens = p.batch * p.length * p.heads;
        v = dense("v", v_, tokens * p.width);
        q = dense("q", q_, tokens * p.keys);
        k = dense("k", k_, tokens * p.keys);
        beta = dense("beta", beta_, tokens);
        if (log_decay_) {
            log_decay = dense("log_decay", *log_decay_, tokens);
            p.log_decay = log_decay->const_data_ptr();
        }
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "delta: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
        }
        if (initial_state_) {
            initial_state = dense("initial_state", *initial_state_, state_elements());
            p.initial_state = initial_state->const_data_ptr();
        }
        const auto* start = starts ? static_cast<const bool*>(starts->const_data_ptr()) : nullptr;
        pieces.emplace(p.batch, p.length, kChunk, start, p.initial_state != nullptr);
        p.pieces = pieces->all.data(), p.first = pieces->first.data();
        p.v = v.const_data_ptr(), p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.beta = beta.const_data_ptr();
    }

    int64_t state_elements() const { return p.batch * p.heads * p.keys * p.width; }

    // `tensor` contiguous, if it has v's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        STD_TORCH_CHECK(tensor.numel() == elements && (tensor.scalar_type() == ScalarType::Double) == p.f64 &&
                            (tensor.scalar_type() == ScalarType::Float) != p.f64,
                        "delta: ", name, ": expected ", elements, " elements in v's dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty(int64_t size) const { return torch::stable::new_empty(v, {p.batch, p.length, p.heads, size}); }
    Tensor empty_rates() const { return torch::stable::new_empty(v, {p.batch, p.length, p.heads}); }
    Tensor empty_state() const { return torch::stable::new_empty(v, {p.batch, p.heads, p.keys, p.width}); }

    // Runs every head of every row on as many threads as pay, each with its own scratch.
    template <typename Kernel>
    void run(Kernel kernel, int64_t scratch_elements) const {
        // multiplications below which a thread is not worth starting, of about this many in all
        const int64_t least = 1 << 18, tasks = p.batch * p.heads, work = tasks * p.length * 4 * p.keys * p.width;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& v, const Tensor& q, const Tensor& k,
                                                   const Tensor& beta, const std::optional<Tensor>& log_decay,
                                                   const std::optional<Tensor>& starts,
                                                   const std::optional<Tensor>& initial_state) {
    Inputs in(v, q, k, beta, log_decay, starts, initial_state);
    Params& p = in.p;
    Tensor y = in.empty(p.width), final_state = in.empty_state(), wrong = in.empty(p.width);
    Tensor entering = torch::stable::new_empty(in.v, {p.batch, p.heads, slots(p.length), p.keys, p.width});
    p.y = y.mutable_data_ptr(), p.final_state = final_state.mutable_data_ptr();
    p.wrong = wrong.mutable_data_ptr(), p.entering = entering.mutable_data_ptr();
    in.run(LM_CPU(delta_forward), forward_scratch(p));
    return {y, final_state, wrong, entering};
}

// Without a decay its gradient is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& v, const Tensor& q, const Tensor& k,
    const Tensor& beta, const std::optional<Tensor>& log_decay, const std::optional<Tensor>& starts,
    const std::optional<Tensor>& initial_state, const Tensor& wrong, const Tensor& entering) {
    Inputs in(v, q, k, beta, log_decay, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, v.numel());
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state_elements());
    Tensor wrong_dense = in.dense("wrong", wrong, v.numel());
    Tensor entering_dense = in.dense("entering", entering, in.state_elements() * slots(p.length));
    Tensor grad_v = in.empty(p.width), grad_q = in.empty(p.keys), grad_k = in.empty(p.keys);
    Tensor grad_beta = in.empty_rates(), grad_initial = in.empty_state();
    Tensor grad_log_decay = log_decay ? in.empty_rates() : torch::stable::new_empty(in.v, {0});
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.wrong = wrong_dense.mutable_data_ptr(), p.entering = entering_dense.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
    p.grad_beta = grad_beta.mutable_data_ptr(), p.grad_initial = grad_initial.mutable_data_ptr();
    p.grad_log_decay = log_decay ? grad_log_decay.mutable_data_ptr() : nullptr;
    in.run(LM_CPU(delta_backward), backward_scratch(p));
    return {grad_v, grad_q, grad_k, grad_beta, grad_log_decay, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "delta(Tensor v, Tensor q, Tensor k, Tensor beta, Tensor? log_decay, Tensor? starts, Tensor? initial_state)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "delta_backward(Tensor grad_y, Tensor grad_final, Tensor v, Tensor q, Tensor k, Tensor beta, Tensor? log_decay,"
        " Tensor? starts, Tensor? initial_state, Tensor wrong, Tensor entering)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("delta", TORCH_BOX(&forward));
    m.impl("delta_backward", TORCH_BOX(&backward));
}
