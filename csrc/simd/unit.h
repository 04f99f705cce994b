// Which of the compiled vector units this machine runs.
#pragma once

#if defined(__x86_64__)
#define LM_X86 1
#else
#define LM_X86 0
#endif

namespace lm {

enum class CpuUnit { generic, avx2, avx512 };

// The widest unit the CPU has, or the one that LMTRAIN_CPU_UNIT names; decided once.
// Throws std::runtime_error if that is unknown or the CPU lacks it.
CpuUnit cpu_unit();

}  // namespace lm

// Declares a kernel function in the namespace of every unit: LM_CPU_DECLARE(void, f, (const Params&, int64_t)).
// LM_CPU(f) is the active unit's f; taken before parallel_for, which swallows the text of an exception.
#if LM_X86
#define LM_CPU_DECLARE(result, function, arguments) \
    namespace lm::generic {                         \
    result function arguments;                      \
    }                                               \
    namespace lm::avx2 {                            \
    result function arguments;                      \
    }                                               \
    namespace lm::avx512 {                          \
    result function arguments;                      \
    }
#define LM_CPU(function)                                               \
    (::lm::cpu_unit() == ::lm::CpuUnit::avx512 ? ::lm::avx512::function \
     : ::lm::cpu_unit() == ::lm::CpuUnit::avx2 ? ::lm::avx2::function   \
                                               : ::lm::generic::function)
#else
#define LM_CPU_DECLARE(result, function, arguments) \
    namespace lm::generic {                         \
    result function arguments;                      \
    }
#define LM_CPU(function) (::lm::generic::function)
#endif
