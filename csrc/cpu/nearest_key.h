// Nearest key by direct differences: what the kernels of every instruction set share.
#pragma once

#include <cstdint>

namespace dualedit {

// Storage of 16-bit floats; the instruction sets convert them themselves.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class KeyType { kFloat32, kBFloat16, kFloat16 };

// One lookup. Distances are squared Euclidean; for the cosine metric both sides are scaled to length 1 first,
// and half of the squared distance is 1 - cos.
struct Lookup {
  const float* query;  // [batch, stride], zero beyond dim, of length 1 for the cosine metric; 64-byte aligned
  int64_t batch;
  int64_t dim;  // leading dimensions that count
  int64_t stride;
  const void* keys;  // [*, key_stride]
  int64_t key_stride;
  KeyType type;
  bool cosine;
  bool stream;  // one query, keys in one stream
  int64_t head;  // first place, in dimensions, where a key may be given up; a multiple of kHead, or 0 for nowhere
};

constexpr int64_t kLanes = 16;  // the widest register of any instruction set, in floats
constexpr int64_t kHead = 64;
constexpr int64_t kMaxBlock = 4;  // keys that any instruction set holds at once

// Scan keys first..last and lower best/index [batch] wherever a key is closer, or as close with a lower index.
// NaN is never closer. scratch: [kMaxBlock, stride] floats, 64-byte aligned.
using Scan = void (*)(
    const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index, float* scratch);

struct Pair {
  int64_t query;
  int64_t key;
};

// Dimensions begin..end of some pairs, kMaxBlock at most.
struct Piece {
  const Pair* pairs;
  int64_t some;
  int64_t begin;  // a multiple of kLanes
  int64_t end;
};

// Squared distances out [some] of the pairs ``now`` over dimensions 0..end, as `scan` computes them in a batch (not
// in a stream). They are continued from lanes [kMaxBlock][kLanes], one for each pair, where begin > 0, and left
// there where end < dim; for the cosine metric they are computed at once. Meanwhile as much of the keys of ``next``
// is fetched. scratch: as above.
using Few = void (*)(
    const Lookup& lookup, const Piece& now, const Piece& next, float* const* lanes, float* out, float* scratch);

// Instruction sets, worst first.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
Isa best_isa();

}  // namespace dualedit
