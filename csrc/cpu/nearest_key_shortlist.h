// The coarse pass: which keys may be nearest to each query, by bounds of their distances.
#pragma once

#include <cstdint>

#include "cpu/nearest_key_exact.h"

namespace dualedit {

struct Pass {
  const Codes& codes;
  const CodedQueries& coded;
  CoarseKernel kernel;
  const Rounding& rounding;
  int64_t count;  // keys
  double exact_cost;  // of one exact distance, in products of a coded row and a coded key
};

// Lower lists [batch] by the keys of blocks begin..end. False if distances contradict the codes.
bool shortlist(const Pass& pass, int64_t begin, int64_t end, Exact& exact, Shortlist* lists);

}  // namespace dualedit
