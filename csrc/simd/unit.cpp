#include "simd/unit.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>

namespace lm {
namespace {

const char* const kNames[] = {"generic", "avx2", "avx512"};

bool has(CpuUnit unit) {
    if (unit == CpuUnit::generic) return true;
#if LM_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (unit == CpuUnit::avx2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

CpuUnit choose() {
    const CpuUnit widest_first[] = {CpuUnit::avx512, CpuUnit::avx2, CpuUnit::generic};
    const char* wanted = std::getenv("LMTRAIN_CPU_UNIT");
    for (CpuUnit unit : widest_first) {
        const char* name = kNames[static_cast<int>(unit)];
        if (wanted == nullptr || *wanted == '\0') {
            if (has(unit)) return unit;
        } else if (std::string(wanted) == name) {
            if (has(unit)) return unit;
            throw std::runtime_error(std::string("LMTRAIN_CPU_UNIT=") + name + ": this CPU lacks it");
        }
    }
    throw std::runtime_error(std::string("LMTRAIN_CPU_UNIT=") + wanted + ": expected generic, avx2 or avx512");
}

std::string cpu_unit_name() { return kNames[static_cast<int>(cpu_unit())]; }

}  // namespace

CpuUnit cpu_unit() {
    static const CpuUnit unit = choose();
    return unit;
}

}  // namespace lm

STABLE_TORCH_LIBRARY_FRAGMENT(lmtrain, m) { m.def("cpu_unit() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(lmtrain, CompositeExplicitAutograd, m) { m.impl("cpu_unit", TORCH_BOX(&lm::cpu_unit_name)); }
