// Nearest key on the CPU: checks and packs the arguments, splits the keys over torch's threads, applies the radius.
#include <algorithm>
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/nearest_key_lookup.h"

namespace dualedit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Buffer aligned(int64_t floats) {
  size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
  STD_TORCH_CHECK(memory != nullptr, "nearest_key: out of memory for ", bytes, " bytes of queries");
  return Buffer(memory);
}

namespace {

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

// Lower ``nearest`` by keys 0..count.
void search(const Kernels& kernels, const Lookup& lookup, int64_t count, Nearest& nearest) {
  // Threads pay from about 2^17 multiply-adds each.
  const double threads = static_cast<double>(count) * lookup.dim * lookup.batch / (1 << 17);
  divide(count, threads, nearest, [&](int64_t begin, int64_t end, Nearest& own) {
    kernels.scan(lookup, begin, end, own.squared.data(), own.index.data());
  });
}

// Replace the distance of each query's nearest key, which was computed from the heads, by that of the whole.
void refine(const Kernels& kernels, const Lookup& lookup, Nearest& nearest) {
  std::vector<Pair> pairs;
  for (int64_t b = 0; b < lookup.batch; ++b) {
    if (nearest.index[b] >= 0) pairs.push_back({b, nearest.index[b]});
  }
  std::vector<float> squared(pairs.size());
  kernels.measure(lookup, pairs.data(), static_cast<int64_t>(pairs.size()), 0, squared.data());
  nearest = Nearest(lookup.batch);
  for (size_t i = 0; i < pairs.size(); ++i) nearest.lower(pairs[i].query, squared[i], pairs[i].key);
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
  const bool prune = !cosine && dim >= 512 && count >= 256;
  const int64_t head = prune ? std::max<int64_t>(64, dim / 32 / 64 * 64) : 0;
  STD_TORCH_CHECK(
      isa >= 0 && isa <= static_cast<int>(best_isa()), "nearest_key: this processor lacks instruction set ", isa);
  const float* rows = ready ? given : packed.get();
  const Lookup lookup{rows, batch, dim, stride, keys.const_data_ptr(), dim, key_type(keys), cosine, head};
  return {std::move(packed), lookup, count, kernels(static_cast<Isa>(isa))};
}

void divide(
    int64_t count, double threads, Nearest& nearest, const std::function<void(int64_t, int64_t, Nearest&)>& run) {
  int64_t parts = static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads < parts) parts = threads < 1 ? 1 : static_cast<int64_t>(threads);
  if (parts == 1) return run(0, count, nearest);
  const int64_t share = (count + parts - 1) / parts;
  std::vector<Nearest> found(parts, nearest);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      if (p * share < count) run(p * share, std::min(count, (p + 1) * share), found[p]);
    }
  });
  for (const Nearest& part : found) {
    for (size_t b = 0; b < part.index.size(); ++b) nearest.lower(b, part.squared[b], part.index[b]);
  }
}

void look_up(const Kernels& kernels, const Lookup& lookup, int64_t count, Nearest& nearest) {
  // A first look at the heads alone finds a near key early, so that the others are soon given up. It is not worth
  // it for rows shorter than two pages, which memory delivers almost as slowly as whole, nor where reading all
  // keys is the whole cost: few queries and more keys than a cache holds.
  const int64_t row_bytes = lookup.dim * (lookup.type == KeyType::kFloat32 ? 4 : 2);
  const bool cached = count <= (int64_t{32} << 20) / row_bytes;
  if (lookup.head > 0 && row_bytes >= 8192 && (lookup.batch >= 4 || cached)) {
    Lookup heads = lookup;
    heads.dim = lookup.head;
    heads.head = 0;
    search(kernels, heads, count, nearest);
    refine(kernels, lookup, nearest);
  }
  search(kernels, lookup, count, nearest);
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
  look_up(arguments.kernels, arguments.lookup, arguments.count, nearest);
  return answer(query, radius, cosine, nearest);
}

}  // namespace dualedit
