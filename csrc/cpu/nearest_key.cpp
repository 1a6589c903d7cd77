// Nearest key on the CPU: chooses the instruction set, splits the keys over torch's threads, applies the radius.
#include "cpu/nearest_key.h"

#include "cpu/nearest_key_search.h"

#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/target.h"

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Buffer aligned(int64_t floats) {
  size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
  STD_TORCH_CHECK(memory != nullptr, "nearest_key: out of memory for ", bytes, " bytes of queries");
  return Buffer(memory);
}

namespace {

Scan scan_for(int64_t isa) {
  STD_TORCH_CHECK(
      isa >= 0 && isa <= static_cast<int>(best_isa()), "nearest_key: this processor lacks instruction set ", isa);
#ifdef DUALEDIT_X86
  if (isa == static_cast<int>(Isa::kAvx512)) return avx512::scan;
  if (isa == static_cast<int>(Isa::kAvx2)) return avx2::scan;
#endif
  return portable::scan;
}

Few few_for(int64_t isa) {
#ifdef DUALEDIT_X86
  if (isa == static_cast<int>(Isa::kAvx512)) return avx512::few;
  if (isa == static_cast<int>(Isa::kAvx2)) return avx2::few;
#endif
  return portable::few;
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
    if (cosine) {
      double squares = 0.0;
      for (int64_t d = 0; d < dim; ++d) squares += static_cast<double>(from[d]) * from[d];
      const double norm = std::sqrt(squares);
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d] / norm);
    } else {
      std::memcpy(to, from, dim * sizeof(float));
    }
    for (int64_t d = dim; d < stride; ++d) to[d] = 0.0f;
  }
  return packed;
}

// Lower ``nearest`` by keys 0..count, on torch's threads.
void search(Scan scan, const Lookup& lookup, int64_t count, Nearest& nearest) {
  // Threads pay from about 2^17 multiply-adds each.
  const double work = static_cast<double>(count) * lookup.dim * lookup.batch / (1 << 17);
  int64_t parts = static_cast<int64_t>(torch::stable::get_num_threads());
  if (work < parts) parts = work < 1 ? 1 : static_cast<int64_t>(work);
  const int64_t share = ((count + parts - 1) / parts + kMaxBlock - 1) / kMaxBlock * kMaxBlock;
  std::vector<Nearest> found(parts, nearest);
  Buffer scratch = aligned(parts * kMaxBlock * lookup.stride);
  auto work_on = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t last = (p + 1) * share < count ? (p + 1) * share : count;
      float* own = scratch.get() + p * kMaxBlock * lookup.stride;
      if (p * share < last) scan(lookup, p * share, last, found[p].squared.data(), found[p].index.data(), own);
    }
  };
  if (parts == 1) {
    work_on(0, 1);
  } else {
    torch::stable::parallel_for(0, parts, 1, work_on);
  }
  for (const Nearest& part : found) {
    for (int64_t b = 0; b < lookup.batch; ++b) {
      const bool tie = part.squared[b] == nearest.squared[b] && part.index[b] < nearest.index[b];
      if (part.squared[b] < nearest.squared[b] || (tie && part.index[b] >= 0)) {
        nearest.squared[b] = part.squared[b];
        nearest.index[b] = part.index[b];
      }
    }
  }
}

// Replace the coarse distance of each query's nearest key by the distance itself.
void refine(Scan scan, const Lookup& lookup, Nearest& nearest) {
  Buffer scratch = aligned(kMaxBlock * lookup.stride);
  for (int64_t b = 0; b < lookup.batch; ++b) {
    const int64_t candidate = nearest.index[b];
    nearest.squared[b] = std::numeric_limits<float>::infinity();
    nearest.index[b] = -1;
    if (candidate < 0) continue;
    Lookup own = lookup;
    own.query = lookup.query + b * lookup.stride;
    own.batch = 1;
    own.head = 0;
    scan(own, candidate, candidate + 1, &nearest.squared[b], &nearest.index[b], scratch.get());
  }
}

// A tensor [size], without the dispatcher: a small lookup would feel it.
Tensor empty(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace

Arguments prepare(const Tensor& query, const Tensor& keys, const Tensor& radius, bool cosine, int64_t isa) {
  STD_TORCH_CHECK(
      query.is_contiguous() && keys.is_contiguous() && radius.is_contiguous(),
      "nearest_key: query, keys and radius must be contiguous");
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::Float, "nearest_key: query must be fp32");
  STD_TORCH_CHECK(radius.scalar_type() == ScalarType::Float, "nearest_key: radius must be fp32");
  STD_TORCH_CHECK(
      query.dim() == 2 && keys.dim() == 2 && radius.dim() == 1 && query.size(1) == keys.size(1) &&
          keys.size(0) == radius.size(0),
      "nearest_key: expected query [B, D], keys [N, D] and radius [N]");
  STD_TORCH_CHECK(query.size(1) > 0, "nearest_key: expected D of at least 1");
  const int64_t batch = query.size(0), dim = query.size(1), count = keys.size(0);
  const int64_t stride = (dim + kLanes - 1) / kLanes * kLanes;
  const auto* given = static_cast<const float*>(query.const_data_ptr());
  // Queries that lie as the kernels want them stay where they are: the caller keeps them as long as the lookup.
  const bool ready = !cosine && dim == stride && reinterpret_cast<uintptr_t>(given) % 64 == 0;
  Buffer packed = ready ? nullptr : pack(given, batch, dim, stride, cosine);
  // The cosine metric needs the norm of a key first, so it reads all of it anyway.
  const bool prune = !cosine && dim >= 8 * kHead && count >= 256;
  const int64_t head = prune ? (dim / 32 < kHead ? kHead : dim / 32 / kHead * kHead) : 0;
  const float* rows = ready ? given : packed.get();
  const Lookup lookup{
      rows, batch, dim, stride, keys.const_data_ptr(), dim, key_type(keys), cosine, batch == 1, head};
  return {std::move(packed), lookup, count, scan_for(isa), few_for(isa)};
}

void look_up(Scan scan, const Lookup& lookup, int64_t count, Nearest& nearest) {
  // A first look at the heads alone finds a near key early, so that the others are soon given up. It is not worth
  // it for rows shorter than two pages, which memory delivers almost as slowly as whole, nor where reading all
  // keys is the whole cost: few queries and more keys than a cache holds.
  const int64_t row_bytes = lookup.dim * (lookup.type == KeyType::kFloat32 ? 4 : 2);
  if (lookup.head > 0 && row_bytes >= 8192 && (lookup.batch >= 4 || fit_cache(lookup, count))) {
    Lookup coarse = lookup;
    coarse.dim = lookup.head;
    coarse.head = 0;
    search(scan, coarse, count, nearest);
    refine(scan, lookup, nearest);
  }
  search(scan, lookup, count, nearest);
}

std::tuple<Tensor, Tensor> answer(
    const Tensor& query, const Tensor& radius, bool cosine, const Nearest& nearest) {
  const int64_t batch = query.size(0);
  Tensor index = empty(batch, aoti_torch_dtype_int64()), distance = empty(batch, aoti_torch_dtype_float32());
  auto* index_out = static_cast<int64_t*>(index.mutable_data_ptr());
  auto* distance_out = static_cast<float*>(distance.mutable_data_ptr());
  const auto* radii = static_cast<const float*>(radius.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t found = nearest.index[b];
    const float value = cosine ? nearest.squared[b] / 2 : std::sqrt(nearest.squared[b]);
    distance_out[b] = value;
    index_out[b] = found >= 0 && value <= radii[found] ? found : -1;
  }
  return std::make_tuple(index, distance);
}

// See `prepare` for the arguments and `answer` for the result.
std::tuple<Tensor, Tensor> nearest_key(Tensor query, Tensor keys, Tensor radius, bool cosine, int64_t isa) {
  const Arguments arguments = prepare(query, keys, radius, cosine, isa);
  Nearest nearest(arguments.lookup.batch);
  look_up(arguments.scan, arguments.lookup, arguments.count, nearest);
  return answer(query, radius, cosine, nearest);
}

}  // namespace dualedit
