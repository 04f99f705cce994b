// lmtrain::causal_conv1d and its backward: checks, allocation, and the split into tasks. Fake and autograd are in
// lmtrain/ops/causal_conv1d.py.
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "causal_conv1d/kernel.h"

namespace {

using namespace lm::causal_conv1d;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::Double: return DType::f64;
        case ScalarType::BFloat16: return DType::bf16;
        default: STD_TORCH_CHECK(false, "causal_conv1d: x: expected float32, float64 or bfloat16");
    }
}

// The inputs, contiguous and checked, and the parameters that point to them.
struct Inputs {
    Tensor x, weight;  // weight as [width, channels]
    std::optional<Tensor> bias, positions, tail;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
           const std::optional<Tensor>& positions_, const std::optional<Tensor>& tail_, const std::string& activation) {
        STD_TORCH_CHECK(x_.dim() == 3, "causal_conv1d: x: expected [B, T, C], got ", x_.dim(), " dims");
        p.dtype = dtype_of(x_);
        p.silu = activation == "silu";
        STD_TORCH_CHECK(p.silu || activation == "none", "causal_conv1d: activation: expected none or silu, got ",
                        activation);
        p.batch = x_.size(0), p.length = x_.size(1), p.channels = x_.size(2);
        const ScalarType computed = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
        STD_TORCH_CHECK(weight_.dim() == 2 && weight_.size(0) == p.channels && weight_.scalar_type() == computed,
                        "causal_conv1d: weight: expected [C, W] in the computing dtype");
        p.width = weight_.size(1);
        STD_TORCH_CHECK(1 <= p.width && p.width <= kMaxWidth, "causal_conv1d: weight: expected 1 to ", kMaxWidth,
                        " taps, got ", p.width);

        x = torch::stable::contiguous(x_);
        weight = torch::stable::contiguous(torch::stable::transpose(weight_, 0, 1));
        if (bias_) {
            STD_TORCH_CHECK(bias_->numel() == p.channels && bias_->scalar_type() == computed,
                            "causal_conv1d: bias: expected [C] in the computing dtype");
            bias = torch::stable::contiguous(*bias_);
            p.bias = bias->const_data_ptr();
        }
        if (positions_) {
            STD_TORCH_CHECK(positions_->numel() == p.batch * p.length && positions_->scalar_type() == ScalarType::Int,
                            "causal_conv1d: positions: expected int32 [B, T]");
            positions = torch::stable::contiguous(*positions_);
            p.positions = static_cast<const int32_t*>(positions->const_data_ptr());
        }
        if (tail_) {
            STD_TORCH_CHECK(tail_->numel() == p.batch * (p.width - 1) * p.channels &&
                                tail_->scalar_type() == x.scalar_type(),
                            "causal_conv1d: tail: expected [B, W-1, C] in x's dtype");
            tail = torch::stable::contiguous(*tail_);
            p.tail = tail->const_data_ptr();
        }
        p.x = x.const_data_ptr();
        p.weight = weight.const_data_ptr();
    }

    Tensor like_x() const { return torch::stable::new_empty(x, {p.batch, p.length, p.channels}); }
    Tensor like_tail() const { return torch::stable::new_empty(x, {p.batch, p.width - 1, p.channels}); }

    // Tasks per thread below which starting one costs more than it saves.
    int64_t grain() const {
        const int64_t columns = p.length < kChunk ? p.length : kChunk;
        const int64_t values = columns * (p.channels < tile_channels(p) ? p.channels : tile_channels(p));
        return values >= 16384 ? 1 : 16384 / (values + 1) + 1;
    }
};

// The last width-1 columns of tail and x.
Tensor final_tail(const Inputs& in) {
    const Params& p = in.p;
    Tensor result = in.like_tail();
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

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& positions, const std::optional<Tensor>& tail,
                                   const std::string& activation) {
    Inputs in(x, weight, bias, positions, tail, activation);
    Tensor y = in.like_x();
    in.p.y = y.mutable_data_ptr();
    const auto kernel = LM_CPU(causal_conv1d_forward);
    torch::stable::parallel_for(0, num_tasks(in.p), in.grain(),
                                [&](int64_t from, int64_t to) { kernel(in.p, from, to); });
    return {y, final_tail(in)};
}

// Sum of the chunks' partials [batch * chunks, columns], in order.
template <typename Compute>
void sum_partials(const Params& p, void* total) {
    const int64_t columns = (p.width + 1) * p.channels;
    const auto* partial = static_cast<const Compute*>(p.partial);
    torch::stable::parallel_for(0, columns, 4096, [&](int64_t from, int64_t to) {
        for (int64_t part = 0; part < p.batch * num_chunks(p); ++part) {
            for (int64_t i = from; i < to; ++i) static_cast<Compute*>(total)[i] += partial[part * columns + i];
        }
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& grad_final, const Tensor& x,
                                                    const Tensor& weight, const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& positions,
                                                    const std::optional<Tensor>& tail, const std::string& activation) {
    Inputs in(x, weight, bias, positions, tail, activation);
    Params& p = in.p;
    STD_TORCH_CHECK(grad_y.numel() == x.numel() && grad_y.scalar_type() == x.scalar_type(),
                    "causal_conv1d_backward: grad_y: expected x's shape and dtype");
    STD_TORCH_CHECK(grad_final.numel() == p.batch * (p.width - 1) * p.channels &&
                        grad_final.scalar_type() == x.scalar_type(),
                    "causal_conv1d_backward: grad_tail: expected [B, W-1, C] in x's dtype");
    const Tensor grad_y_dense = torch::stable::contiguous(grad_y);
    const Tensor grad_final_dense = torch::stable::contiguous(grad_final);
    Tensor grad_x = in.like_x(), grad_tail = in.like_tail();
    Tensor partial = torch::stable::new_zeros(in.weight, {p.batch * num_chunks(p), p.width + 1, p.channels});
    Tensor total = torch::stable::new_zeros(in.weight, {p.width + 1, p.channels});
    p.grad_y = grad_y_dense.const_data_ptr();
    p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_tail = grad_tail.mutable_data_ptr();
    p.partial = partial.mutable_data_ptr();
    const auto kernel = LM_CPU(causal_conv1d_backward);
    torch::stable::parallel_for(0, num_tasks(p), in.grain(), [&](int64_t from, int64_t to) { kernel(p, from, to); });
    (p.dtype == DType::f64 ? sum_partials<double> : sum_partials<float>)(p, total.mutable_data_ptr());
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
