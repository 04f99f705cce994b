// What every binding does with the tensors of a call: checks them, makes them contiguous, makes results, runs tasks.
// On torch's stable ABI; included by bindings only.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace lm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& tensor) {
    Shape shape;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) shape.push_back(tensor.size(dim));
    return shape;
}

inline std::string text_of(const Shape& shape, ScalarType dtype) {
    std::ostringstream text;
    for (size_t dim = 0; dim < shape.size(); ++dim) text << (dim ? ", " : "[") << shape[dim];
    text << (shape.empty() ? "[] " : "] ") << dtype;
    return text.str();
}

inline const void* data_of(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The sum of [parts, ...], fp32 or fp64, over the first dim, in order: the same bits for any number of threads.
inline Tensor sum_parts(const Tensor& parts) {
    Shape shape = shape_of(parts);
    const int64_t count = shape[0];
    shape.erase(shape.begin());
    Tensor sum = torch::stable::new_empty(parts, shape);
    const auto add = [&](auto* to, const auto* from) {
        const int64_t size = sum.numel();
        torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) to[i] = 0;
            for (int64_t part = 0; part < count; ++part) {
                for (int64_t i = begin; i < end; ++i) to[i] += from[part * size + i];
            }
        });
    };
    void* to = sum.mutable_data_ptr();
    const void* from = parts.const_data_ptr();
    if (parts.scalar_type() == ScalarType::Double) add(static_cast<double*>(to), static_cast<const double*>(from));
    else add(static_cast<float*>(to), static_cast<const float*>(from));
    return sum;
}

// The arguments of one call. Values have the dtype of the first of them, parameters and scratch the computing dtype:
// fp32, or fp64 for fp64 values.
class Arguments {
public:
    enum class Values { f32_f64, f32_f64_bf16 };

    Arguments(const char* op, const char* name, const Tensor& first, Values accepted = Values::f32_f64)
        : op_(op), values_(first.scalar_type()), first_(first) {
        const bool narrow = values_ == ScalarType::BFloat16 && accepted == Values::f32_f64_bf16;
        STD_TORCH_CHECK(values_ == ScalarType::Float || values_ == ScalarType::Double || narrow, op_, ": ", name,
                        ": expected float32", accepted == Values::f32_f64 ? " or float64" : ", float64 or bfloat16",
                        ", got ", values_);
    }

    bool f64() const { return values_ == ScalarType::Double; }
    bool bf16() const { return values_ == ScalarType::BFloat16; }
    ScalarType computed() const { return f64() ? ScalarType::Double : ScalarType::Float; }

    // The sizes of a tensor from which shapes are read; `axes` names them: "[B, T, D]".
    Shape sizes(const char* name, const Tensor& tensor, int64_t dims, const char* axes) const {
        STD_TORCH_CHECK(tensor.dim() == dims, op_, ": ", name, ": expected ", axes, ", got ", tensor.dim(), " dims");
        return shape_of(tensor);
    }

    // `tensor` contiguous, if it has this shape and type.
    Tensor dense(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype) const {
        const Shape got = shape_of(tensor);
        STD_TORCH_CHECK(got == shape && tensor.scalar_type() == dtype, op_, ": ", name, ": expected ",
                        text_of(shape, dtype), ", got ", text_of(got, tensor.scalar_type()));
        return torch::stable::contiguous(tensor);
    }
    Optional dense(const char* name, const Optional& tensor, const Shape& shape, ScalarType dtype) const {
        return tensor ? Optional(dense(name, *tensor, shape, dtype)) : std::nullopt;
    }
    Tensor dense(const char* name, const Tensor& tensor, const Shape& shape) const {
        return dense(name, tensor, shape, values_);
    }
    Optional dense(const char* name, const Optional& tensor, const Shape& shape) const {
        return dense(name, tensor, shape, values_);
    }
    Optional dense_starts(const Optional& tensor, int64_t batch, int64_t length) const {
        return dense("starts", tensor, {batch, length}, ScalarType::Bool);
    }

    Tensor empty(const Shape& shape) const { return torch::stable::new_empty(first_, shape); }
    Tensor empty_computed(const Shape& shape) const { return torch::stable::new_empty(first_, shape, computed()); }

    // kernel(p, from, to) for all tasks, on as many threads as pay: at most `threads`.
    template <typename Kernel, typename Params>
    void run(Kernel kernel, const Params& p, int64_t tasks, int64_t threads) const {
        share(tasks, threads, [](int64_t) {}, [&](int64_t, int64_t from, int64_t to) { kernel(p, from, to); });
    }

    // kernel(p, from, to, scratch), each thread with scratch of its own.
    template <typename Kernel, typename Params>
    void run(Kernel kernel, const Params& p, int64_t tasks, int64_t threads, int64_t scratch_elements) const {
        Optional scratch;
        char* memory = nullptr;
        const int64_t bytes = scratch_elements * (f64() ? 8 : 4);
        const auto reserve = [&](int64_t workers) {
            scratch = empty_computed({workers, scratch_elements});
            memory = static_cast<char*>(scratch->mutable_data_ptr());
        };
        share(tasks, threads, reserve, [&](int64_t worker, int64_t from, int64_t to) {
            kernel(p, from, to, memory + worker * bytes);
        });
    }

private:
    // before(workers), then body(worker, from, to) for every worker.
    template <typename Before, typename Body>
    static void share(int64_t tasks, int64_t threads, const Before& before, const Body& body) {
        int64_t workers = torch::stable::get_num_threads();
        for (int64_t limit : {tasks, threads}) workers = limit < workers ? limit : workers;
        if (workers < 1) workers = 1;
        before(workers);
        torch::stable::parallel_for(0, workers, 1, [&](int64_t from, int64_t to) {
            for (int64_t w = from; w < to; ++w) body(w, tasks * w / workers, tasks * (w + 1) / workers);
        });
    }

    const char* const op_;
    const ScalarType values_;
    const Tensor first_;
};

}  // namespace lm
