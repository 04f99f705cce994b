// lmtrain::ssd and its backward: checks, allocation, the cut into pieces, and the split into tasks. Fake and autograd
// are in lmtrain/ops/ssd.py.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "pieces.h"
#include "ssd/kernel.h"

namespace {

using namespace lm::ssd;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The inputs, contiguous and checked, the pieces, and the parameters that point to them.
struct Inputs {
    Tensor x, log_a, b, c;
    std::optional<Tensor> starts, initial_state;
    std::optional<lm::Pieces> pieces;
    Params p = {};

    Inputs(const Tensor& x_, const Tensor& log_a_, const Tensor& b_, const Tensor& c_,
           const std::optional<Tensor>& starts_, const std::optional<Tensor>& initial_state_, int64_t chunk) {
        STD_TORCH_CHECK(x_.dim() == 4, "ssd: x: expected [B, T, H, P], got ", x_.dim(), " dims");
        STD_TORCH_CHECK(x_.scalar_type() == ScalarType::Float || x_.scalar_type() == ScalarType::Double,
                        "ssd: x: expected float32 or float64");
        STD_TORCH_CHECK(b_.dim() == 4, "ssd: B: expected [B, T, G, N], got ", b_.dim(), " dims");
        STD_TORCH_CHECK(chunk >= 1, "ssd: chunk: expected at least 1, got ", chunk);
        p.f64 = x_.scalar_type() == ScalarType::Double;
        p.batch = x_.size(0), p.length = x_.size(1), p.heads = x_.size(2), p.head_dim = x_.size(3);
        p.groups = b_.size(2), p.d_state = b_.size(3);
        STD_TORCH_CHECK(p.heads > 0, "ssd: x: expected at least one head");
        STD_TORCH_CHECK(p.groups > 0 && p.heads % p.groups == 0, "ssd: B: expected groups that divide the heads");
        x = dense("x", x_, p.batch * p.length * p.heads * p.head_dim);
        log_a = dense("log_a", log_a_, p.batch * p.length * p.heads);
        b = dense("B", b_, p.batch * p.length * p.groups * p.d_state);
        c = dense("C", c_, p.batch * p.length * p.groups * p.d_state);
        if (starts_) {
            STD_TORCH_CHECK(starts_->scalar_type() == ScalarType::Bool && starts_->numel() == p.batch * p.length,
                            "ssd: starts: expected bool [B, T]");
            starts = torch::stable::contiguous(*starts_);
        }
        if (initial_state_) initial_state = dense("initial_state", *initial_state_, state_elements());
        p.x = x.const_data_ptr(), p.log_a = log_a.const_data_ptr();
        p.b = b.const_data_ptr(), p.c = c.const_data_ptr();
        if (initial_state) p.initial_state = initial_state->const_data_ptr();
        const int64_t longest = chunk < kChunk ? chunk : kChunk;
        // as many as in a row of one document; lmtrain/ops/ssd.py says the same
        p.slots = p.length ? (p.length + longest - 1) / longest - (p.initial_state ? 0 : 1) : 0;
        pieces.emplace(p.batch, p.length, longest,
                       starts ? static_cast<const bool*>(starts->const_data_ptr()) : nullptr,
                       p.initial_state != nullptr);
        p.pieces = pieces->all.data(), p.first = pieces->first.data();
    }

    int64_t state_elements() const { return p.batch * p.heads * p.d_state * p.head_dim; }

    // `tensor` contiguous, if it has x's type and this many elements.
    Tensor dense(const char* name, const Tensor& tensor, int64_t elements) const {
        STD_TORCH_CHECK(tensor.numel() == elements && (tensor.scalar_type() == ScalarType::Double) == p.f64 &&
                            (tensor.scalar_type() == ScalarType::Float) != p.f64,
                        "ssd: ", name, ": expected ", elements, " elements in x's dtype");
        return torch::stable::contiguous(tensor);
    }

    Tensor empty_state() const {
        return torch::stable::new_empty(x, {p.batch, p.heads, p.d_state, p.head_dim});
    }

    // [blocks, ...] to [...], in the order of blocks.
    Tensor sum_blocks(const Tensor& parts) const {
        Tensor sum = torch::stable::new_empty(x, {p.batch, p.length, p.groups, p.d_state});
        const auto add = [&](auto* to, const auto* from) {
            torch::stable::parallel_for(0, sum.numel(), 32768, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) to[i] = from[i];
                for (int64_t block = 1; block < blocks(p); ++block) {
                    const auto* part = from + block * sum.numel();
                    for (int64_t i = begin; i < end; ++i) to[i] += part[i];
                }
            });
        };
        void* to = sum.mutable_data_ptr();
        const void* from = parts.const_data_ptr();
        if (p.f64) add(static_cast<double*>(to), static_cast<const double*>(from));
        else add(static_cast<float*>(to), static_cast<const float*>(from));
        return sum;
    }

    // Runs tasks [0, tasks) on as many threads as pay, each with its own scratch.
    template <typename Kernel>
    void run(Kernel kernel, int64_t tasks, int64_t scratch_elements) const {
        // multiplications below which a thread is not worth starting, of about this many in all
        const int64_t least = 1 << 18, work = p.batch * p.length * p.heads * (p.d_state + kChunk) * p.head_dim;
        int64_t workers = torch::stable::get_num_threads();
        for (int64_t limit : {tasks, work / least}) workers = limit < workers ? limit : workers;
        if (workers < 1) workers = 1;
        Tensor scratch = torch::stable::new_empty(x, {workers, scratch_elements});
        auto* memory = static_cast<char*>(scratch.mutable_data_ptr());
        const int64_t bytes = scratch_elements * (p.f64 ? 8 : 4);
        torch::stable::parallel_for(0, workers, 1, [&](int64_t from, int64_t to) {
            for (int64_t w = from; w < to; ++w) {
                kernel(p, tasks * w / workers, tasks * (w + 1) / workers, memory + w * bytes);
            }
        });
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& log_a, const Tensor& b, const Tensor& c,
                                   const std::optional<Tensor>& starts, const std::optional<Tensor>& initial_state,
                                   int64_t chunk) {
    Inputs in(x, log_a, b, c, starts, initial_state, chunk);
    Params& p = in.p;
    Tensor y = torch::stable::new_empty(in.x, {p.batch, p.length, p.heads, p.head_dim});
    Tensor final_state = in.empty_state();
    Tensor states = torch::stable::new_empty(in.x, {p.batch, p.slots, p.heads, p.d_state, padded(p.head_dim)});
    p.y = y.mutable_data_ptr();
    p.final_state = final_state.mutable_data_ptr();
    p.states = states.mutable_data_ptr();
    in.run(LM_CPU(ssd_forward), p.batch * p.heads, forward_scratch(p));
    return {y, final_state, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& grad_final, const Tensor& x, const Tensor& log_a, const Tensor& b,
    const Tensor& c, const std::optional<Tensor>& starts, const std::optional<Tensor>& initial_state,
    const Tensor& states, int64_t chunk) {
    Inputs in(x, log_a, b, c, starts, initial_state, chunk);
    Params& p = in.p;
    const Tensor states_dense =
        in.dense("states", states, p.batch * p.slots * p.heads * p.d_state * padded(p.head_dim));
    p.states = const_cast<void*>(states_dense.const_data_ptr());
    const Tensor grad_y_dense = in.dense("grad_y", grad_y, x.numel());
    const Tensor grad_final_dense = in.dense("grad_final", grad_final, in.state_elements());
    Tensor grad_x = torch::stable::new_empty(in.x, {p.batch, p.length, p.heads, p.head_dim});
    Tensor grad_log_a = torch::stable::new_empty(in.x, {p.batch, p.length, p.heads});
    const std::vector<int64_t> keys = {blocks(p), p.batch, p.length, p.groups, p.d_state};
    Tensor grad_b = torch::stable::new_empty(in.x, keys), grad_c = torch::stable::new_empty(in.x, keys);
    Tensor grad_initial = in.empty_state();
    p.grad_y = grad_y_dense.const_data_ptr(), p.grad_final = grad_final_dense.const_data_ptr();
    p.grad_x = grad_x.mutable_data_ptr(), p.grad_log_a = grad_log_a.mutable_data_ptr();
    p.grad_b = grad_b.mutable_data_ptr(), p.grad_c = grad_c.mutable_data_ptr();
    p.grad_initial = grad_initial.mutable_data_ptr();
    in.run(LM_CPU(ssd_backward), p.batch * p.groups * blocks(p), backward_scratch(p));
    return {grad_x, grad_log_a, in.sum_blocks(grad_b), in.sum_blocks(grad_c), grad_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) {
    m.def(
        "ssd(Tensor x, Tensor log_a, Tensor B, Tensor C, Tensor? starts, Tensor? initial_state, int chunk)"
        " -> (Tensor, Tensor, Tensor)");
    m.def(
        "ssd_backward(Tensor grad_y, Tensor grad_final, Tensor x, Tensor log_a, Tensor B, Tensor C, Tensor? starts,"
        " Tensor? initial_state, Tensor states, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CPU, m) {
    m.impl("ssd", TORCH_BOX(&forward));
    m.impl("ssd_backward", TORCH_BOX(&backward));
}
