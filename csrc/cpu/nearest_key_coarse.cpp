// The coarse pass for each instruction set, and which of them this processor has.
#include "cpu/nearest_key_coarse.h"

#include "cpu/nearest_key.h"
#include "cpu/target.h"

namespace dualedit {

#ifdef DUALEDIT_X86
DUALEDIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace coarse_avx512vnni {
namespace {
#define DUALEDIT_DOTS "cpu/dots_avx512vnni.h"
#include "cpu/nearest_key_coarse_kernel.h"
#undef DUALEDIT_DOTS
}  // namespace
}  // namespace coarse_avx512vnni
DUALEDIT_TARGET_END
DUALEDIT_TARGET("avx2,fma,f16c")
namespace coarse_avx2 {
namespace {
#define DUALEDIT_DOTS "cpu/dots_avx2.h"
#include "cpu/nearest_key_coarse_kernel.h"
#undef DUALEDIT_DOTS
}  // namespace
}  // namespace coarse_avx2
DUALEDIT_TARGET_END
#endif

namespace coarse_portable {
namespace {
#define DUALEDIT_DOTS "cpu/dots_portable.h"
#include "cpu/nearest_key_coarse_kernel.h"
#undef DUALEDIT_DOTS
}  // namespace
}  // namespace coarse_portable

namespace {

bool has_vnni() {
#ifdef DUALEDIT_X86
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

CoarseKernel coarse_for(int64_t isa) {
#ifdef DUALEDIT_X86
  if (isa >= static_cast<int>(Isa::kAvx512) && has_vnni()) {
    return {coarse_avx512vnni::code, coarse_avx512vnni::arrange, coarse_avx512vnni::bound, coarse_avx512vnni::select};
  }
  if (isa >= static_cast<int>(Isa::kAvx2)) {
    return {coarse_avx2::code, coarse_avx2::arrange, coarse_avx2::bound, coarse_avx2::select};
  }
#endif
  return {coarse_portable::code, coarse_portable::arrange, coarse_portable::bound, coarse_portable::select};
}

const char* coarse_name(int64_t isa) {
  if (isa >= static_cast<int>(Isa::kAvx512) && has_vnni()) return "AVX512-VNNI";
  return isa >= static_cast<int>(Isa::kAvx2) ? "AVX2" : "plain C++";
}

}  // namespace dualedit
