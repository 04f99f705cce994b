// lmtrain::wkv4 and its backward: checks, allocation and the split into tasks. Fake and autograd are in
// lmtrain/ops/wkv4.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "wkv4/kernel.h"

namespace {

using namespace lm::wkv4;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs {
    Tensor v, k, w, u;
    Optional starts, initial_state;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& k_, const Tensor& w_, const Tensor& u_, const Optional& starts_,
           const Optional& initial_state_) {
        STD_TORCH_CHECK(v_.dim() == 3, "wkv4: v: expected [B, T, D], got ", v_.dim(), " dims");
        STD_TORCH_CHECK(v_.scalar_type() == ScalarType::Float || v_.scalar_type() == ScalarType::Double,
                        "wkv4: v: expected float32 or float64");
        p.f64 = v_.scalar_type() == ScalarType::Double;
        p.batch = v_.size(0), p.length = v_.size(1), p.width = v_.size(2);
        v = dense("v", v_, v_.numel());
        k = dense("k", k_, v_.numel());
        w = dense("w", w_, p.width);
        u = dense("u", u_, p.width);
        if (initial_state_) initial_state = dense("initial_state", *initial_state_, 3 * p.batch * p.width);
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "wkv4: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
            p.starts = static_cast<const bool*>(starts->const_data_ptr());
        }
        p.v = v.const_data_ptr(), p.k = k.const_data_ptr(), p.w = w.const_data_ptr(), p.u = u.const_data_ptr();
        if (initial_state) p.initial_state = initial_state->const_data_ptr();
    }

    // `tensor` contiguous, if it has v's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        const ScalarType wanted = p.f64 ? ScalarType::Double : ScalarType::Float;
        STD_TORCH_CHECK(tensor.numel() == elements && tensor.scalar_type() == wanted, "wkv4: ", name, ": expected ",
                        elements, " elements in v's dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty_values() const { return torch::stable::new_empty(v, {p.batch, p.length, p.width}); }
    Tensor empty_state() const { return torch::stable::new_empty(v, {p.batch, 3, p.width}); }
    Tensor empty_channels() const { return torch::stable::new_empty(v, {p.batch, p.width}); }

    // body(worker, from, to) for all tasks, on as many threads as pay.
    template <typename Body>
    void run(const Body& body, int64_t workers) const {
        const int64_t tasks = p.batch * ((p.width + kChannels - 1) / kChannels);
        torch::stable::parallel_for(0, workers, 1, [&](int64_t from, int64_t to) {
            for (int64_t n = from; n < to; ++n) body(n, tasks * n / workers, tasks * (n + 1) / workers);
        });
    }

    int64_t workers() const {
        // tokens of channels below which a thread is not worth starting, of about this many in all
        const int64_t least = 1 << 14, work = v.numel() / least, threads = torch::stable::get_num_threads();
        const int64_t most = work < threads ? work : threads;
        return most < 1 ? 1 : most;
    }
};

std::tuple<Tensor, Tensor> forward(const Tensor& v, const Tensor& k, const Tensor& w, const Tensor& u,
                                   const Optional& starts, const Optional& initial_state) {
    Inputs in(v, k, w, u, starts, initial_state);
    Tensor y = in.empty_values(), final_state = in.empty_state();
    in.p.y = y.mutable_data_ptr();
    in.p.final_state = final_state.mutable_data_ptr();
    auto* const kernel = LM_CPU(wkv4_forward);
    in.run([&](int64_t, int64_t from, int64_t to) { kernel(in.p, from, to); }, in.workers());
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_final,
                                                            const Tensor& v, const Tensor& k, const Tensor& w,
                                                            const Tensor& u, const Optional& starts,
                                                            const Optional& initial_state) {
    Inputs in(v, k, w, u, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, v.numel());
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, 3 * p.batch * p.width);
    Tensor grad_v = in.empty_values(), grad_k = in.empty_values(), grad_initial = in.empty_state();
    Tensor grad_w = in.empty_channels(), grad_u = in.empty_channels();
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
    p.grad_w = grad_w.mutable_data_ptr(), p.grad_u = grad_u.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    const int64_t workers = in.workers(), elements = 3 * kChannels * p.length;
    Tensor scratch = torch::stable::new_empty(in.v, {workers, elements});
    auto* memory = static_cast<char*>(scratch.mutable_data_ptr());
    auto* const kernel = LM_CPU(wkv4_backward);
    in.run([&](int64_t n, int64_t from, int64_t to) { kernel(p, from, to, memory + n * elements * (p.f64 ? 8 : 4)); },
           workers);
    return {grad_v, grad_k, grad_w, grad_u, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "wkv4(Tensor v, Tensor k, Tensor w, Tensor u, Tensor? starts, Tensor? initial_state) -> (Tensor, Tensor)");
    m.def(
        "wkv4_backward(Tensor grad_y, Tensor grad_final, Tensor v, Tensor k, Tensor w, Tensor u, Tensor? starts,"
        " Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("wkv4", TORCH_BOX(&forward));
    m.impl("wkv4_backward", TORCH_BOX(&backward));
}
