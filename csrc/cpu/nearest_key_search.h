// What the lookup with codes shares with the lookup without.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/nearest_key.h"

namespace dualedit {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

// Memory for some floats, aligned to 64 bytes.
Buffer aligned(int64_t floats);

// The nearest key known of each query: squared distance and index, -1 for none.
struct Nearest {
  explicit Nearest(int64_t batch) : squared(batch, std::numeric_limits<float>::infinity()), index(batch, -1) {}

  std::vector<float> squared;
  std::vector<int64_t> index;
};

// Whether ``count`` keys may stay in the last-level cache.
inline bool fit_cache(const Lookup& lookup, int64_t count) {
  return count <= (int64_t{32} << 20) / (lookup.dim * (lookup.type == KeyType::kFloat32 ? 4 : 2));
}

// Checked and packed arguments.
struct Arguments {
  Buffer packed;  // the queries of ``lookup``, unless those that were given serve
  Lookup lookup;
  int64_t count;
  Scan scan;
  Few few;
};

// query [B, D] fp32, keys [N, D] fp32, bf16 or fp16, radius [N] fp32, all contiguous on the CPU; isa as in Isa.
Arguments prepare(
    const torch::stable::Tensor& query, const torch::stable::Tensor& keys, const torch::stable::Tensor& radius,
    bool cosine, int64_t isa);

// Lower ``nearest`` by all keys.
void look_up(Scan scan, const Lookup& lookup, int64_t count, Nearest& nearest);

// index [B] int64 (-1 outside the radius) and distance [B] fp32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> answer(
    const torch::stable::Tensor& query, const torch::stable::Tensor& radius, bool cosine, const Nearest& nearest);

}  // namespace dualedit
