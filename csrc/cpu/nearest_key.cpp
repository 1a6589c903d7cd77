// Nearest key on the CPU: chooses the instruction set, splits the keys over torch's threads, applies the radius.
#include "cpu/nearest_key.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__GNUC__) && defined(__x86_64__)
#define DUALEDIT_X86 1
#include <immintrin.h>
#endif

#ifdef __clang__
#define DUALEDIT_PRAGMA(text) _Pragma(#text)
#define DUALEDIT_TARGET(features) \
  DUALEDIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DUALEDIT_TARGET_END _Pragma("clang attribute pop")
#else
#define DUALEDIT_PRAGMA(text) _Pragma(#text)
#define DUALEDIT_TARGET(features) _Pragma("GCC push_options") DUALEDIT_PRAGMA(GCC target(features))
#define DUALEDIT_TARGET_END _Pragma("GCC pop_options")
#endif

namespace dualedit {

#ifdef DUALEDIT_X86
DUALEDIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
namespace {
#define DUALEDIT_VECTOR "cpu/vector_avx512.h"
#include "cpu/nearest_key_kernel.h"
#undef DUALEDIT_VECTOR
}  // namespace
}  // namespace avx512
DUALEDIT_TARGET_END
DUALEDIT_TARGET("avx2,fma,f16c")
namespace avx2 {
namespace {
#define DUALEDIT_VECTOR "cpu/vector_avx2.h"
#include "cpu/nearest_key_kernel.h"
#undef DUALEDIT_VECTOR
}  // namespace
}  // namespace avx2
DUALEDIT_TARGET_END
#endif

namespace portable {
namespace {
#define DUALEDIT_VECTOR "cpu/vector_portable.h"
#include "cpu/nearest_key_kernel.h"
#undef DUALEDIT_VECTOR
}  // namespace
}  // namespace portable

Isa best_isa() {
#ifdef DUALEDIT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kPortable;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer aligned(int64_t floats) {
  size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
  STD_TORCH_CHECK(memory != nullptr, "nearest_key: out of memory for ", bytes, " bytes of queries");
  return Buffer(memory);
}

Scan scan_for(int64_t isa) {
  STD_TORCH_CHECK(
      isa >= 0 && isa <= static_cast<int>(best_isa()), "nearest_key: this processor lacks instruction set ", isa);
#ifdef DUALEDIT_X86
  if (isa == static_cast<int>(Isa::kAvx512)) return avx512::scan;
  if (isa == static_cast<int>(Isa::kAvx2)) return avx2::scan;
#endif
  return portable::scan;
}

KeyType key_type(const Tensor& keys) {
  switch (keys.scalar_type()) {
    case ScalarType::Float:
      return KeyType::kFloat32;
    case ScalarType::BFloat16:
      return KeyType::kBFloat16;
    default:
      STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Half, "nearest_key: keys must be fp32, bf16 or fp16");
      return KeyType::kFloat16;
  }
}

// Queries in rows of a whole number of registers, scaled to length 1 for the cosine metric.
Buffer pack(const float* query, int64_t batch, int64_t dim, int64_t stride, bool cosine) {
  Buffer packed = aligned(batch * stride);
  for (int64_t b = 0; b < batch; ++b) {
    const float* from = query + b * dim;
    float* to = packed.get() + b * stride;
    double norm = 1.0;
    if (cosine) {
      double squares = 0.0;
      for (int64_t d = 0; d < dim; ++d) squares += static_cast<double>(from[d]) * from[d];
      norm = std::sqrt(squares);
    }
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d] / norm);
    for (int64_t d = dim; d < stride; ++d) to[d] = 0.0f;
  }
  return packed;
}

}  // namespace

// query [B, D] fp32, keys [N, D] fp32, bf16 or fp16, radius [N] fp32, all contiguous on the CPU; isa as in Isa.
std::tuple<Tensor, Tensor> nearest_key(Tensor query, Tensor keys, Tensor radius, bool cosine, int64_t isa) {
  STD_TORCH_CHECK(
      query.is_contiguous() && keys.is_contiguous() && radius.is_contiguous(),
      "nearest_key: query, keys and radius must be contiguous");
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float, "nearest_key: query must be fp32");
  STD_TORCH_CHECK(radius.scalar_type() == ScalarType::Float, "nearest_key: radius must be fp32");
  STD_TORCH_CHECK(
      query.dim() == 2 && keys.dim() == 2 && radius.dim() == 1 && query.size(1) == keys.size(1) &&
          keys.size(0) == radius.size(0),
      "nearest_key: expected query [B, D], keys [N, D] and radius [N]");
  const int64_t batch = query.size(0), dim = query.size(1), count = keys.size(0);
  const int64_t stride = (dim + kLanes - 1) / kLanes * kLanes;
  Tensor index = torch::stable::new_empty(query, {batch}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(query, {batch}, ScalarType::Float);
  auto* index_out = static_cast<int64_t*>(index.mutable_data_ptr());
  auto* distance_out = static_cast<float*>(distance.mutable_data_ptr());

  Scan scan = scan_for(isa);
  Buffer packed = pack(static_cast<const float*>(query.const_data_ptr()), batch, dim, stride, cosine);
  Lookup lookup{packed.get(), batch, dim, stride, keys.const_data_ptr(), key_type(keys), cosine};

  // Threads pay from about 2^17 multiply-adds each.
  const double work = static_cast<double>(count) * dim * batch;
  int64_t parts = static_cast<int64_t>(torch::stable::get_num_threads());
  if (work / (1 << 17) < parts) parts = static_cast<int64_t>(work / (1 << 17));
  if (parts < 1) parts = 1;
  const int64_t share = ((count + parts - 1) / parts + kMaxBlock - 1) / kMaxBlock * kMaxBlock;
  std::vector<float> best(parts * batch, std::numeric_limits<float>::infinity());
  std::vector<int64_t> nearest(parts * batch, -1);
  Buffer scratch = aligned(parts * kMaxBlock * stride);
  auto work_on = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int64_t last = (p + 1) * share < count ? (p + 1) * share : count;
      scan(
          lookup, p * share, last, best.data() + p * batch, nearest.data() + p * batch,
          scratch.get() + p * kMaxBlock * stride);
    }
  };
  if (parts == 1) {
    work_on(0, 1);
  } else {
    torch::stable::parallel_for(0, parts, 1, work_on);
  }

  const auto* radii = static_cast<const float*>(radius.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    int64_t part = 0;  // parts hold ascending keys: the first of the smallest keeps a tie
    for (int64_t p = 1; p < parts; ++p) {
      if (best[p * batch + b] < best[part * batch + b]) part = p;
    }
    int64_t found = nearest[part * batch + b];
    float squared = best[part * batch + b];
    float value = cosine ? squared / 2 : std::sqrt(squared);
    distance_out[b] = value;
    index_out[b] = found >= 0 && value <= radii[found] ? found : -1;
  }
  return std::make_tuple(index, distance);
}

}  // namespace dualedit
