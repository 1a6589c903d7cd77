// What the lookup with codes shares with the lookup without.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
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

  // Ties go to the lowest index; NaN is never nearer.
  void lower(int64_t b, float value, int64_t key) {
    if (!(value < squared[b] || (value == squared[b] && key < index[b])) || key < 0) return;
    squared[b] = value;
    index[b] = key;
  }

  std::vector<float> squared;
  std::vector<int64_t> index;
};

// Checked and packed arguments.
struct Arguments {
  Buffer packed;  // the queries of ``lookup``, unless those that were given serve
  Lookup lookup;
  int64_t count;
  Kernels kernels;
};

// query [B, D] fp32, keys [N, D] fp32, bf16 or fp16, radius [N] fp32, all contiguous on the CPU; isa as in Isa.
Arguments prepare(
    const torch::stable::Tensor& query, const torch::stable::Tensor& keys, const torch::stable::Tensor& radius,
    bool cosine, int64_t isa);

// Lower ``nearest`` by the units 0..count, split over as many of torch's threads as pay: ``run`` is given a range of
// them and what its thread knows.
void divide(
    int64_t count, double threads, Nearest& nearest, const std::function<void(int64_t, int64_t, Nearest&)>& run);

// Lower ``nearest`` by all keys.
void look_up(const Kernels& kernels, const Lookup& lookup, int64_t count, Nearest& nearest);

// index [B] int64 (-1 outside the radius) and distance [B] fp32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> answer(
    const torch::stable::Tensor& query, const torch::stable::Tensor& radius, bool cosine, const Nearest& nearest);

}  // namespace dualedit
