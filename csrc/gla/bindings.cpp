// lmtrain::gla and its backward: checks, allocation, the cut into pieces, and the split into tasks. Fake and autograd
// are in lmtrain/ops/gla.py.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "gla/kernel.h"

namespace {

using namespace lm::gla;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The inputs, contiguous and checked, the pieces, and the parameters that point to them.
struct Inputs {
    Tensor v, q, k, g;
    Optional u, starts, initial_state;
    std::vector<Piece> pieces;
    std::vector<int64_t> first;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& q_, const Tensor& k_, const Tensor& g_, const Optional& u_,
           const Optional& starts_, const Optional& initial_state_) {
        STD_TORCH_CHECK(v_.dim() == 4, "gla: v: expected [B, T, H, V], got ", v_.dim(), " dims");
        STD_TORCH_CHECK(q_.dim() == 4, "gla: q: expected [B, T, H, K], got ", q_.dim(), " dims");
        STD_TORCH_CHECK(v_.scalar_type() == ScalarType::Float || v_.scalar_type() == ScalarType::Double,
                        "gla: v: expected float32 or float64");
        p.f64 = v_.scalar_type() == ScalarType::Double;
        p.batch = v_.size(0), p.length = v_.size(1), p.heads = v_.size(2), p.value_dim = v_.size(3);
        p.key_dim = q_.size(3);
        v = dense("v", v_, tokens() * p.value_dim);
        q = dense("q", q_, tokens() * p.key_dim);
        k = dense("k", k_, tokens() * p.key_dim);
        g = dense("g", g_, tokens() * p.key_dim);
        if (u_) u = dense("u", *u_, p.heads * p.key_dim);
        if (initial_state_) initial_state = dense("initial_state", *initial_state_, state_elements());
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "gla: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
        }
        p.v = v.const_data_ptr(), p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.g = g.const_data_ptr();
        if (u) p.u = u->const_data_ptr();
        if (initial_state) p.initial_state = initial_state->const_data_ptr();
        cut();
    }

    int64_t tokens() const { return p.batch * p.length * p.heads; }
    int64_t state_elements() const { return p.batch * p.heads * p.key_dim * p.value_dim; }

    // `tensor` contiguous, if it has v's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        const ScalarType wanted = p.f64 ? ScalarType::Double : ScalarType::Float;
        STD_TORCH_CHECK(tensor.numel() == elements && tensor.scalar_type() == wanted, "gla: ", name, ": expected ",
                        elements, " elements in v's dtype");
        return torch::stable::contiguous(tensor);
    }

    void cut() {
        const auto* start = starts ? static_cast<const bool*>(starts->const_data_ptr()) : nullptr;
        for (int64_t row = 0; row < p.batch; ++row, start += start ? p.length : 0) {
            first.push_back(static_cast<int64_t>(pieces.size()));
            for (int64_t begin = 0, end; begin < p.length; begin = end) {
                end = begin + 1;
                while (end < p.length && end - begin < kPiece && !(start && start[end])) ++end;
                const bool fresh = (start && start[begin]) || (begin == 0 && !p.initial_state);
                pieces.push_back({begin, end - begin, fresh});
            }
            const int64_t count = static_cast<int64_t>(pieces.size()) - first.back();
            if (count > p.most_pieces) p.most_pieces = count;
        }
        first.push_back(static_cast<int64_t>(pieces.size()));
        p.pieces = pieces.data(), p.first = first.data();
    }

    Tensor empty_values() const {
        return torch::stable::new_empty(v, {p.batch, p.length, p.heads, p.value_dim});
    }
    Tensor empty_keys() const { return torch::stable::new_empty(v, {p.batch, p.length, p.heads, p.key_dim}); }
    Tensor empty_state() const { return torch::stable::new_empty(v, {p.batch, p.heads, p.key_dim, p.value_dim}); }

    // Runs the heads of all rows on as many threads as pay, each with its own scratch.
    template <typename Kernel>
    void run(Kernel kernel, int64_t scratch_elements) const {
        // multiplications below which a thread is not worth starting, of about this many in all
        const int64_t least = 1 << 18, work = tokens() * (p.value_dim + kPiece) * p.key_dim;
        const int64_t tasks = p.batch * p.heads;
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

std::tuple<Tensor, Tensor> forward(const Tensor& v, const Tensor& q, const Tensor& k, const Tensor& g,
                                   const Optional& u, const Optional& starts, const Optional& initial_state) {
    Inputs in(v, q, k, g, u, starts, initial_state);
    Tensor y = in.empty_values(), final_state = in.empty_state();
    in.p.y = y.mutable_data_ptr();
    in.p.final_state = final_state.mutable_data_ptr();
    in.run(LM_CPU(gla_forward), forward_scratch(in.p));
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& v, const Tensor& q, const Tensor& k, const Tensor& g,
    const Optional& u, const Optional& starts, const Optional& initial_state) {
    Inputs in(v, q, k, g, u, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, v.numel());
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state_elements());
    Tensor grad_v = in.empty_values(), grad_q = in.empty_keys(), grad_k = in.empty_keys(), grad_g = in.empty_keys();
    Tensor grad_u = torch::stable::new_empty(in.v, {p.batch, p.heads, p.key_dim}), grad_initial = in.empty_state();
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr(), p.grad_g = grad_g.mutable_data_ptr();
    p.grad_u = grad_u.mutable_data_ptr(), p.grad_initial = grad_initial.mutable_data_ptr();
    in.run(LM_CPU(gla_backward), backward_scratch(p));
    return {grad_v, grad_q, grad_k, grad_g, grad_u, grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "gla(Tensor v, Tensor q, Tensor k, Tensor g, Tensor? u, Tensor? starts, Tensor? initial_state)"
        " -> (Tensor, Tensor)");
    m.def(
        "gla_backward(Tensor grad_y, Tensor grad_final, Tensor v, Tensor q, Tensor k, Tensor g, Tensor? u,"
        " Tensor? starts, Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("gla", TORCH_BOX(&forward));
    m.impl("gla_backward", TORCH_BOX(&backward));
}
