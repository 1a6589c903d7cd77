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
  int64_t head;  // first place, in dimensions, where a key may be given up; a multiple of kLanes, or 0 for nowhere
};

struct Pair {
  int64_t query;
  int64_t key;
  float enough = 0.0f;  // where the square of the distance up to some dimension exceeds it, the rest is not needed
};

constexpr int64_t kLanes = 16;  // the widest register of any instruction set, in floats
constexpr int64_t kFewestLanes = 4;

// Codes of keys, made by dualedit_kernels/nearest_key/codes.py. With c the centre and S the dimensions kept apart, the
// key k is
//     k_d = apart_d                                   for d in S, exactly
//     k_d = c_d + scale_p (code_d - 128) + residue_d  elsewhere, in part p of the dimensions, |residue| <= error,
// and in each part the residue is at a right angle to the code, but for the rounding of scale to fp32. The largest
// value of a part sets its scale: parts make for a smaller error. The first part is the head.
// For the cosine metric k is the key scaled to length 1, and error covers the rounding of that, too.
struct Codes {
  const uint8_t* codes;  // [blocks, quads, kBlock, 4]: 4 dimensions of all keys of a block side by side
  const float* values;  // [blocks, parts + 5 + apart, kBlock]: scale of each part; length of scale (code - 128) over
                        // all dimensions and over the head; error, inf where nothing is known of a key; length of
                        // k - c behind the cut, and error there; apart
  const float* centre;  // [dim rounded up to kLanes], zero at the dimensions apart
  const int64_t* apart_at;  // [apart]
  int64_t apart;
  int64_t count;  // keys
  int64_t quads;
  int64_t dim;
  int64_t part;  // dimensions of each part but the last
  int64_t parts;
  float share;  // bounds computed from codes are off by less than this share of the squares they are made of
  float drift;  // how far the kernels' keys may lie from those that were coded: the cosine metric scales in fp32

  // The part where an exact distance may be given up; short codes have none.
  int64_t cut() const { return parts < 4 ? parts : parts / 2; }
  const float* of(int64_t block) const;
};

constexpr int64_t kBlock = 48;  // keys side by side
constexpr int64_t kMostQueries = 64;  // that are coded together
constexpr int64_t kMostCodedDim = 65536;
constexpr float kLargest = 3.4028235e38f;
constexpr float kTiny = 1e-36f;  // squares that underflow amount to less

inline const float* Codes::of(int64_t block) const { return values + block * (parts + 5 + apart) * kBlock; }
// As in codes.py: at most 16 parts, and 128 dimensions at least where there are as many.
inline int64_t part_of(int64_t dim) { return dim <= 2048 ? 128 : (dim + 1023) / 1024 * 64; }

// Queries in the same form, q - c = scale_p code + residue, at a right angle, too.
struct CodedQueries {
  int64_t batch;
  int64_t stride;  // of a query's codes
  int8_t* codes;  // [batch, stride]
  int32_t* start;  // [parts, batch]: -128 times the sum of the codes, as a key's codes are 128 too large
  float* scale;  // [parts, batch]
  float* head;  // [batch]: square of the length of the decoded head
  float* square;  // [batch]: and of the whole
  float* length;  // [batch]: not below that of q - c
  float* error;  // [batch]: not below that of the residue; inf where a query cannot be coded
  float* apart;  // [apart, batch]
  // Of q - c behind the cut: not above the square of its length, not below its length, nor that of the residue.
  float *tail_square, *tail_length, *tail_error;  // [batch]
};

// Some blocks of keys and all queries. low is the square of the distance of decoded forms, less what it may be off by
// through rounding; NaN where nothing is known of a key, infinite where there is none or it is ruled out.
struct Panel {
  int64_t begin, end;  // blocks
  int64_t stride;  // of a query's products
  float* dot;  // [batch, stride]: products of the decoded forms up to the cut
  float* tail;  // [batch, stride]: and behind it
  float* low;  // [batch, stride]
};

// What of a key is within reach of a query, whose nearest key so far is at ``distance``.
struct Reach {
  float distance;  // and the query's error
  float square;  // of the distance alone
};

struct Smallest {
  int64_t at = -1;  // -1: all are infinite or NaN
  float value;
  double mean;  // of those that are numbers
};

// The kernels of one instruction set.
struct Kernels {
  // Scan keys first..last and lower best/index [batch] wherever a key is closer, or as close with a lower index.
  // NaN is never closer.
  void (*scan)(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index);
  // Squared distances [count] of pairs, the very ones that `scan` computes; infinite for one that is given up at
  // dimension ``cut`` (0: none is).
  void (*measure)(const Lookup& lookup, const Pair* pairs, int64_t count, int64_t cut, float* squared);
  // Code query b. x: room for a query.
  void (*code)(const Codes& codes, const float* query, CodedQueries& coded, int64_t b, float* x);
  // Products with parts begin..end, added to those of the parts before, and low: of the head where end is 1, else of
  // all. reach [batch], or null: low of the head is there, and tells which keys need no products with the rest.
  void (*bound)(
      const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t begin, int64_t end,
      const Reach* reach);
  // The smallest of low [count].
  Smallest (*smallest)(const float* low, int64_t count);
  // Pairs of query b and the keys of the panel that may be within its reach, at most ``most``; their number.
  int64_t (*select)(
      const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t b, const Reach& reach, int64_t most,
      Pair* pairs);
};

// Instruction sets, worst first.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
Isa best_isa();
Kernels kernels(Isa isa);

}  // namespace dualedit
