// The coarse pass over coded keys: bounds of all distances from a quarter of the bytes.
#pragma once

#include <cstdint>

#include "cpu/nearest_key.h"

namespace dualedit {

// Codes of keys. With c the centre and S the dimensions kept apart, key k is
//     k_d = rows_d                                     for d in S, exactly
//     k_d = c_d + scale (code_d - 128) + residue_d     elsewhere, ||residue|| <= error.
// For the cosine metric k is the key scaled to length 1, and error covers the rounding of that, too.
struct Codes {
  const uint8_t* codes;  // [blocks, quads, kBlock, 4]: 4 dimensions of 16 keys side by side; 64-byte lines
  const float* scale;  // [blocks, kBlock]
  const float* square;  // [blocks, kBlock]: scale^2 sum (code - 128)^2
  const float* error;  // [blocks, kBlock]: inf where nothing is known of a key
  const float* centre;  // [dim], zero at the dimensions apart
  const float* rows;  // [blocks, apart, kBlock]
  const int64_t* apart_at;  // [apart]
  int64_t apart;
  int64_t quads;
  int64_t dim;
};

constexpr int64_t kBlock = 16;  // keys side by side
constexpr int64_t kMostCodedDim = 65536;  // 255 * 127 * dim, and 255 * 128 * dim, fit 32 bits

// Queries in the same form, q - c = scale * code + residue, their codes 8 bits in one plane or 16 in two
// (code = 256 high + low). A row is a plane of a query; rows are kept in tiles.
struct CodedQueries {
  int64_t batch;
  int64_t planes;
  int8_t* codes;  // tiles of [quads, rows of the tile, 4]
  int32_t* offset;  // [batch, planes]: 128 times the sum of a row's codes
  float* scale;  // [batch]
  float* square;  // [batch]
  float* error;  // [batch]: inf where the query cannot be coded
  float* apart;  // [batch, apart]
  int32_t* product;  // [batch, planes, kBlock], of the block at work
};

// A computed squared distance T = |q|^2 + |k|^2 + apart - 2 q.k is off by less than this share of the three
// squares: about 30 roundings of 2^-24 each, and twice that for good measure. And by less than the smallest normal
// number a few times.
constexpr float kShare = 1.0f / (1 << 18);
constexpr float kTiny = 1e-36f;

// Whatever is done with 16 bounds at once.
struct Bounds {
  float total[kBlock];  // T
  float spread[kBlock];  // what T is off by, at most
  uint32_t near;  // bit j: key j may be as near as limit
};

struct CoarseKernel {
  // Code query b of ``coded``. scratch: room for 5/2 of a query, in whole registers of kLanes floats.
  void (*code)(const Codes& codes, const float* query, CodedQueries& coded, int64_t b, float* scratch);
  // Bounds of all queries and the keys of one block, for near: those within limit [batch] of their query.
  void (*block)(
      const Codes& codes, const CodedQueries& coded, int64_t block, const float* limit, Bounds* bounds);
};

// The best kernel that an instruction set (as in Isa) allows on this processor.
CoarseKernel coarse_for(int64_t isa);
// "avx512-vnni", "avx2" or "portable".
const char* coarse_name(int64_t isa);

}  // namespace dualedit
