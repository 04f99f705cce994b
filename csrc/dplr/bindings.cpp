// lmtrain::dplr and its backward: checks, allocation and the split into tasks. Fake and autograd are in
// lmtrain/ops/dplr.py, which also takes the exponential of the decay.
#include <tuple>

#include "arguments.h"
#include "dplr/kernel.h"

namespace {

using namespace lm::dplr;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape values, keys, state, checkpoints;
    Tensor v, r, decay, k, a, b;
    Optional starts, initial_state;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& r_, const Tensor& decay_, const Tensor& k_, const Tensor& a_,
           const Tensor& b_, const Optional& starts_, const Optional& initial_state_)
        : Arguments("dplr", "v", v_) {
        values = sizes("v", v_, 4, "[B, T, H, V]");
        keys = {values[0], values[1], values[2], sizes("r", r_, 4, "[B, T, H, K]")[3]};
        p.f64 = f64(), p.batch = values[0], p.length = values[1], p.heads = values[2];
        p.width = values[3], p.keys = keys[3];
        state = {p.batch, p.heads, p.keys, p.width}, checkpoints = {p.batch, p.heads, pieces(p), p.keys, p.width};
        v = dense("v", v_, values), r = dense("r", r_, keys), decay = dense("decay", decay_, keys);
        k = dense("k", k_, keys), a = dense("a", a_, keys), b = dense("b", b_, keys);
        starts = dense_starts(starts_, p.batch, p.length);
        initial_state = dense("initial_state", initial_state_, state);
        p.v = v.const_data_ptr(), p.r = r.const_data_ptr(), p.decay = decay.const_data_ptr();
        p.k = k.const_data_ptr(), p.a = a.const_data_ptr(), p.b = b.const_data_ptr();
        p.starts = static_cast<const bool*>(data_of(starts)), p.initial_state = data_of(initial_state);
    }

    // A task is a head of a row; fewer multiplications, of about this many in all, are not worth a thread.
    template <typename Kernel>
    void run_heads(Kernel kernel, int64_t scratch_elements) const {
        const int64_t tasks = p.batch * p.heads, work = tasks * p.length * 5 * p.keys * p.width;
        run(kernel, p, tasks, work >> 18, scratch_elements);
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& v, const Tensor& r, const Tensor& decay, const Tensor& k,
                                           const Tensor& a, const Tensor& b, const Optional& starts,
                                           const Optional& initial_state) {
    Inputs in(v, r, decay, k, a, b, starts, initial_state);
    Params& p = in.p;
    Tensor y = in.empty(in.values), final_state = in.empty(in.state);
    Tensor kept = in.empty(in.checkpoints);
    p.y = y.mutable_data_ptr(), p.final_state = final_state.mutable_data_ptr(), p.kept = kept.mutable_data_ptr();
    in.run_heads(LM_CPU(dplr_forward), forward_scratch(p));
    return {y, final_state, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& v, const Tensor& r, const Tensor& decay,
    const Tensor& k, const Tensor& a, const Tensor& b, const Optional& starts,
    const Optional& initial_state, const Tensor& kept) {
    Inputs in(v, r, decay, k, a, b, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.values);
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state);
    Tensor kept_dense = in.dense("kept", kept, in.checkpoints);
    Tensor grad_v = in.empty(in.values), grad_r = in.empty(in.keys), grad_decay = in.empty(in.keys);
    Tensor grad_k = in.empty(in.keys), grad_a = in.empty(in.keys), grad_b = in.empty(in.keys);
    Tensor grad_initial = in.empty(in.state);
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.kept = kept_dense.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_r = grad_r.mutable_data_ptr();
    p.grad_decay = grad_decay.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
    p.grad_a = grad_a.mutable_data_ptr(), p.grad_b = grad_b.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    in.run_heads(LM_CPU(dplr_backward), backward_scratch(p));
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
