// lmtrain::delta and its backward: checks, allocation, the cut into pieces and the split into tasks. Fake and autograd
// are in lmtrain/ops/delta.py, which also repeats keys over value heads.
#include <tuple>

#include "arguments.h"
#include "delta/kernel.h"
#include "pieces.h"

namespace {

using namespace lm::delta;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// The inputs, contiguous and checked, the pieces, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape values, keys, rates, state, entries;
    Tensor v, q, k, beta;
    Optional log_decay, starts, initial_state;
    std::optional<lm::Pieces> pieces;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& q_, const Tensor& k_, const Tensor& beta_, const Optional& log_decay_,
           const Optional& starts_, const Optional& initial_state_)
        : Arguments("delta", "v", v_) {
        values = sizes("v", v_, 4, "[B, T, H, V]");
        rates = {values[0], values[1], values[2]};
        keys = {values[0], values[1], values[2], sizes("q", q_, 4, "[B, T, H, K]")[3]};
        p.f64 = f64(), p.batch = values[0], p.length = values[1], p.heads = values[2];
        p.width = values[3], p.keys = keys[3];
        state = {p.batch, p.heads, p.keys, p.width}, entries = {p.batch, p.heads, slots(p.length), p.keys, p.width};
        v = dense("v", v_, values), q = dense("q", q_, keys), k = dense("k", k_, keys);
        beta = dense("beta", beta_, rates), log_decay = dense("log_decay", log_decay_, rates);
        starts = dense_starts(starts_, p.batch, p.length);
        initial_state = dense("initial_state", initial_state_, state);
        p.v = v.const_data_ptr(), p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.beta = beta.const_data_ptr();
        p.log_decay = data_of(log_decay), p.initial_state = data_of(initial_state);
        pieces.emplace(p.batch, p.length, kChunk, static_cast<const bool*>(data_of(starts)), initial_state.has_value());
        p.pieces = pieces->all.data(), p.first = pieces->first.data();
    }

    // A task is a head of a row; fewer multiplications, of about this many in all, are not worth a thread.
    template <typename Kernel>
    void run_heads(Kernel kernel, int64_t scratch_elements) const {
        const int64_t tasks = p.batch * p.heads, work = tasks * p.length * 4 * p.keys * p.width;
        run(kernel, p, tasks, work >> 18, scratch_elements);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& v, const Tensor& q, const Tensor& k,
                                                   const Tensor& beta, const Optional& log_decay,
                                                   const Optional& starts, const Optional& initial_state) {
    Inputs in(v, q, k, beta, log_decay, starts, initial_state);
    Params& p = in.p;
    Tensor y = in.empty(in.values), final_state = in.empty(in.state), wrong = in.empty(in.values);
    Tensor entering = in.empty(in.entries);
    p.y = y.mutable_data_ptr(), p.final_state = final_state.mutable_data_ptr();
    p.wrong = wrong.mutable_data_ptr(), p.entering = entering.mutable_data_ptr();
    in.run_heads(LM_CPU(delta_forward), forward_scratch(p));
    return {y, final_state, wrong, entering};
}

// Without a decay its gradient is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& v, const Tensor& q, const Tensor& k,
    const Tensor& beta, const Optional& log_decay, const Optional& starts, const Optional& initial_state,
    const Tensor& wrong, const Tensor& entering) {
    Inputs in(v, q, k, beta, log_decay, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.values);
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state);
    Tensor wrong_dense = in.dense("wrong", wrong, in.values);
    Tensor entering_dense = in.dense("entering", entering, in.entries);
    Tensor grad_v = in.empty(in.values), grad_q = in.empty(in.keys), grad_k = in.empty(in.keys);
    Tensor grad_beta = in.empty(in.rates), grad_initial = in.empty(in.state);
    Tensor grad_log_decay = log_decay ? in.empty(in.rates) : in.empty({0});
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.wrong = wrong_dense.mutable_data_ptr(), p.entering = entering_dense.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
    p.grad_beta = grad_beta.mutable_data_ptr(), p.grad_initial = grad_initial.mutable_data_ptr();
    p.grad_log_decay = log_decay ? grad_log_decay.mutable_data_ptr() : nullptr;
    in.run_heads(LM_CPU(delta_backward), backward_scratch(p));
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
