// lmtrain::wkv4 and its backward: checks, allocation and the split into tasks. Fake and autograd are in
// lmtrain/ops/wkv4.py.
#include <tuple>

#include "arguments.h"
#include "wkv4/kernel.h"

namespace {

using namespace lm::wkv4;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape row, state, channels;
    Tensor v, k, w, u;
    Optional starts, initial_state;
    Params p = {};

    Inputs(const Tensor& v_, const Tensor& k_, const Tensor& w_, const Tensor& u_, const Optional& starts_,
           const Optional& initial_state_)
        : Arguments("wkv4", "v", v_) {
        row = sizes("v", v_, 3, "[B, T, D]");
        state = {row[0], 3, row[2]}, channels = {row[2]};
        p.f64 = f64(), p.batch = row[0], p.length = row[1], p.width = row[2];
        v = dense("v", v_, row), k = dense("k", k_, row), w = dense("w", w_, channels), u = dense("u", u_, channels);
        starts = dense_starts(starts_, p.batch, p.length);
        initial_state = dense("initial_state", initial_state_, state);
        p.v = v.const_data_ptr(), p.k = k.const_data_ptr(), p.w = w.const_data_ptr(), p.u = u.const_data_ptr();
        p.starts = static_cast<const bool*>(data_of(starts)), p.initial_state = data_of(initial_state);
    }

    int64_t tasks() const { return p.batch * ((p.width + kChannels - 1) / kChannels); }
    int64_t threads() const { return v.numel() >> 14; }  // fewer values are not worth a thread
};

std::tuple<Tensor, Tensor> forward(const Tensor& v, const Tensor& k, const Tensor& w, const Tensor& u,
                                   const Optional& starts, const Optional& initial_state) {
    Inputs in(v, k, w, u, starts, initial_state);
    Tensor y = in.empty(in.row), final_state = in.empty(in.state);
    in.p.y = y.mutable_data_ptr();
    in.p.final_state = final_state.mutable_data_ptr();
    in.run(LM_CPU(wkv4_forward), in.p, in.tasks(), in.threads());
    return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_final,
                                                            const Tensor& v, const Tensor& k, const Tensor& w,
                                                            const Tensor& u, const Optional& starts,
                                                            const Optional& initial_state) {
    Inputs in(v, k, w, u, starts, initial_state);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.row);
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state);
    Tensor grad_v = in.empty(in.row), grad_k = in.empty(in.row), grad_initial = in.empty(in.state);
    Tensor grad_w = in.empty({p.batch, p.width}), grad_u = in.empty({p.batch, p.width});
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
    p.grad_w = grad_w.mutable_data_ptr(), p.grad_u = grad_u.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    in.run(LM_CPU(wkv4_backward), p, in.tasks(), in.threads(), 3 * kChannels * p.length);
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
