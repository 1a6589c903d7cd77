// Attention of many queries over the keys and values of one edit, in bf16.
#pragma once

#include <cstdint>

namespace dualedit {

// One call: heads lie side by side in the rows of all matrices.
struct Attention {
  const uint16_t* q;  // [queries, q_stride]
  const uint16_t* k;  // [keys, k_stride]
  const uint16_t* v;  // [keys, v_stride]
  uint16_t* out;  // [queries, heads * size]
  int64_t queries;
  int64_t keys;
  int64_t heads;
  int64_t size;  // of a head
  int64_t q_stride;
  int64_t k_stride;
  int64_t v_stride;
};

// Whether this processor multiplies bf16 (AVX512-BF16), without which there is no kernel.
bool has_bf16_products();

}  // namespace dualedit
