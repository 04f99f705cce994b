// lmtrain::gla and its backward: checks, allocation, the cut into pieces, and the split into tasks. Fake and autograd
// are in lmtrain/ops/gla.py.
#include <tuple>
#include <vector>

#include "arguments.h"
#include "gla/kernel.h"

namespace {

using namespace lm::gla;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// The inputs, contiguous and checked, the pieces, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape values, keys, state;
    Tensor v, q, k, g;
    Optional u, starts, initial_state;
    std::vector<Piece> pieces;
    std::vector<int64_t> first;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& q_, const Tensor& k_, const Tensor& g_, const Optional& u_,
           const Optional& starts_, const Optional& initial_state_)
        : Arguments("gla", "v", v_) {
        values = sizes("v", v_, 4, "[B, T, H, V]");
        keys = {values[0], values[1], values[2], sizes("q", q_, 4, "[B, T, H, K]")[3]};
        p.f64 = f64(), p.batch = values[0], p.length = values[1], p.heads = values[2];
        p.value_dim = values[3], p.key_dim = keys[3];
        state = {p.batch, p.heads, p.key_dim, p.value_dim};
        v = dense("v", v_, values), q = dense("q", q_, keys), k = dense("k", k_, keys), g = dense("g", g_, keys);
        u = dense("u", u_, {p.heads, p.key_dim});
        starts = dense_starts(starts_, p.batch, p.length);
        initial_state = dense("initial_state", initial_state_, state);
        p.v = v.const_data_ptr(), p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.g = g.const_data_ptr();
        p.u = data_of(u), p.initial_state = data_of(initial_state);
        cut();
    }

    void cut() {
        const auto* start = static_cast<const bool*>(data_of(starts));
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

    // A task is a head of a row; fewer multiplications, of about this many in all, are not worth a thread.
    template <typename Kernel>
    void run_heads(Kernel kernel, int64_t scratch_elements) const {
        const int64_t tasks = p.batch * p.heads, work = tasks * p.length * (p.value_dim + kPiece) * p.key_dim;
        run(kernel, p, tasks, work >> 18, scratch_elements);
    }
};

std::tuple<Tensor, Tensor> forward(const Tensor& v, const Tensor& q, const Tensor& k, const Tensor& g,
                                   const Optional& u, const Optional& starts, const Optional& initial_state) {
    Inputs in(v, q, k, g, u, starts, initial_state);
    Tensor y = in.empty(in.values), final_state = in.empty(in.state);
    in.p.y = y.mutable_data_ptr();
    in.p.final_state = final_state.mutable_data_ptr();
    in.run_heads(LM_CPU(gla_forward), forward_scratch(in.p));
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& v, const Tensor& q, const Tensor& k, const Tensor& g,
    const Optional& u, const Optional& starts, const Optional& initial_state) {
    Inputs in(v, q, k, g, u, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.values);
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state);
    Tensor grad_v = in.empty(in.values), grad_q = in.empty(in.keys);
    Tensor grad_k = in.empty(in.keys), grad_g = in.empty(in.keys);
    Tensor grad_u = in.empty({p.batch, p.heads, p.key_dim}), grad_initial = in.empty(in.state);
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr(), p.grad_g = grad_g.mutable_data_ptr();
    p.grad_u = grad_u.mutable_data_ptr(), p.grad_initial = grad_initial.mutable_data_ptr();
    in.run_heads(LM_CPU(gla_backward), backward_scratch(p));
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
