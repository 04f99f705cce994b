// lmtrain::causal_conv1d and its backward: checks, allocation, and the split into tasks. Fake and autograd are in
// lmtrain/ops/causal_conv1d.py.
#include <cstring>
#include <string>
#include <tuple>

#include "arguments.h"
#include "causal_conv1d/kernel.h"

namespace {

using namespace lm::causal_conv1d;
using lm::data_of;
using lm::Optional;
using lm::Shape;
using lm::Tensor;

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs : lm::Arguments {
    Shape row, state;
    Tensor x, weight;  // weight as [width, channels]
    Optional bias, positions, tail;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& weight_, const Optional& bias_, const Optional& positions_,
           const Optional& tail_, const std::string& activation)
        : Arguments("causal_conv1d", "x", x_, Values::f32_f64_bf16) {
        row = sizes("x", x_, 3, "[B, T, C]");
        p.dtype = f64() ? DType::f64 : bf16() ? DType::bf16 : DType::f32;
        p.silu = activation == "silu";
        STD_TORCH_CHECK(p.silu || activation == "none", "causal_conv1d: activation: expected none or silu, got ",
                        activation);
        p.batch = row[0], p.length = row[1], p.channels = row[2];
        p.width = sizes("weight", weight_, 2, "[C, W]")[1];
        STD_TORCH_CHECK(1 <= p.width && p.width <= kMaxWidth, "causal_conv1d: weight: expected 1 to ", kMaxWidth,
                        " taps, got ", p.width);
        state = {p.batch, p.width - 1, p.channels};
        x = dense("x", x_, row);
        weight = dense("weight", weight_, {p.channels, p.width}, computed());
        weight = torch::stable::contiguous(torch::stable::transpose(weight, 0, 1));
        bias = dense("bias", bias_, {p.channels}, computed());
        positions = dense("positions", positions_, {p.batch, p.length}, lm::ScalarType::Int);
        tail = dense("tail", tail_, state);
        p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.bias = data_of(bias);
        p.positions = static_cast<const int32_t*>(data_of(positions)), p.tail = data_of(tail);
    }

    template <typename Kernel>
    void run_all(Kernel kernel) const {
        run(kernel, p, num_tasks(p), x.numel() >> 14);  // fewer values are not worth a thread
    }
};

// The last width-1 columns of tail and x.
Tensor final_tail(const Inputs& in) {
    const Params& p = in.p;
    Tensor result = in.empty(in.state);
    const int64_t w = p.width - 1;
    const size_t bytes = p.channels * (p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2);
    if (bytes == 0) return result;
    auto* to = static_cast<char*>(result.mutable_data_ptr());
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t s = p.length - w; s < p.length; ++s, to += bytes) {
            if (s >= 0) {
                std::memcpy(to, static_cast<const char*>(p.x) + (b * p.length + s) * bytes, bytes);
            } else if (p.tail) {
                std::memcpy(to, static_cast<const char*>(p.tail) + (b * w + w + s) * bytes, bytes);
            } else {
                std::memset(to, 0, bytes);
            }
        }
    }
    return result;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                   const Optional& positions, const Optional& tail,
                                   const std::string& activation) {
    Inputs in(x, weight, bias, positions, tail, activation);
    Tensor y = in.empty(in.row);
    in.p.y = y.mutable_data_ptr();
    in.run_all(LM_CPU(causal_conv1d_forward));
    return {y, final_tail(in)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_final, const Tensor& x,
                                                    const Tensor& weight, const Optional& bias,
                                                    const Optional& positions, const Optional& tail,
                                                    const std::string& activation) {
    Inputs in(x, weight, bias, positions, tail, activation);
    Params& p = in.p;
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, in.row);
    const Tensor grad_final_dense = in.dense("grad_tail", grad_final, in.state);
    Tensor grad_x = in.empty(in.row), grad_tail = in.empty(in.state);
    Tensor partial = torch::stable::new_zeros(in.weight, {p.batch * num_chunks(p), p.width + 1, p.channels});
    p.grad_y = grad_y_dense.const_data_ptr();
    p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_tail = grad_tail.mutable_data_ptr();
    p.partial = partial.mutable_data_ptr();
    in.run_all(LM_CPU(causal_conv1d_backward));
    Tensor total = lm::sum_parts(partial);
    // copies: an op's outputs may not share memory
    Tensor taps = torch::stable::narrow(total, 0, 0, p.width);
    return {grad_x, torch::stable::clone(torch::stable::contiguous(torch::stable::transpose(taps, 0, 1))),
            torch::stable::clone(torch::stable::select(total, 0, p.width)), grad_tail};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? positions, Tensor? tail, str activation)"
        " -> (Tensor, Tensor)");
    m.def(
        "causal_conv1d_backward(Tensor grad_y, Tensor grad_tail, Tensor x, Tensor weight, Tensor? bias,"
        " Tensor? positions, Tensor? tail, str activation) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("causal_conv1d", TORCH_BOX(&forward));
    m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
}
