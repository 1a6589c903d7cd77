// The kernels of each instruction set, and which of them this processor has.
#include "cpu/nearest_key.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define DUALEDIT_X86 1
#include <immintrin.h>
#endif

#define DUALEDIT_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define DUALEDIT_TARGET(features) \
  DUALEDIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DUALEDIT_TARGET_END _Pragma("clang attribute pop")
#else
#define DUALEDIT_TARGET(features) _Pragma("GCC push_options") DUALEDIT_PRAGMA(GCC target(features))
#define DUALEDIT_TARGET_END _Pragma("GCC pop_options")
#endif

namespace dualedit {

#ifdef DUALEDIT_X86
DUALEDIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace avx512 {
namespace {
#define DUALEDIT_ISA 2
#include "cpu/vector.h"
#include "cpu/nearest_key_scan.h"
#include "cpu/nearest_key_coarse.h"
#undef DUALEDIT_ISA
}  // namespace
}  // namespace avx512
DUALEDIT_TARGET_END
DUALEDIT_TARGET("avx2,fma,f16c")
namespace avx2 {
namespace {
#define DUALEDIT_ISA 1
#include "cpu/vector.h"
#include "cpu/nearest_key_scan.h"
#include "cpu/nearest_key_coarse.h"
#undef DUALEDIT_ISA
}  // namespace
}  // namespace avx2
DUALEDIT_TARGET_END
#endif

namespace portable {
namespace {
#define DUALEDIT_ISA 0
#include "cpu/vector.h"
#include "cpu/nearest_key_scan.h"
#include "cpu/nearest_key_coarse.h"
#undef DUALEDIT_ISA
}  // namespace
}  // namespace portable

Isa best_isa() {
#ifdef DUALEDIT_X86
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx512;
  }
  if (fma) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

#define DUALEDIT_KERNELS(isa) {isa::scan, isa::measure, isa::code, isa::bound, isa::smallest, isa::select}
Kernels kernels(Isa isa) {
#ifdef DUALEDIT_X86
  if (isa == Isa::kAvx512) return DUALEDIT_KERNELS(avx512);
  if (isa == Isa::kAvx2) return DUALEDIT_KERNELS(avx2);
#endif
  return DUALEDIT_KERNELS(portable);
}

}  // namespace dualedit
