// The coarse pass over coded keys: bounds of all distances from a quarter of the bytes.
#pragma once

#include <cstdint>

#include "cpu/nearest_key.h"

namespace dualedit {

// Codes of keys. With c the centre and S the dimensions kept apart, key k is
//     k_d = rows_d                                     for d in S, exactly
//     k_d = c_d + scale (code_d - 128) + residue_d     elsewhere, ||residue|| <= error,
// and the residue is at a right angle to the code, but for the rounding of scale to fp32.
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
  const float* tails;  // [blocks, 2 kCuts, kBlock]: lengths of k - c behind each cut, then those of its residues
  float drift;  // how far the kernels' keys may lie from those that were coded: the cosine metric scales in fp32
};

constexpr int64_t kBlock = 16;  // keys side by side
constexpr int64_t kTogether = 3;  // blocks whose products are computed together
constexpr int64_t kMostQueries = 256;  // that are coded together
constexpr int64_t kMostCodedDim = 65536;  // 255 * 127 * dim, and 255 * 128 * dim, fit 32 bits

// Codes are cut in three: behind a quarter and behind half of their quads, in whole registers. What is behind a cut
// has bounds of its own, so that an exact distance can be given up there. Short codes are not cut: the cuts are at
// their end. As in dualedit_kernels/nearest_key/codes.py.
constexpr int64_t kCuts = 2;
constexpr int64_t kFewestQuads = 128;
inline int64_t cut_of(int64_t quads, int64_t cut) { return quads < kFewestQuads ? quads : quads / 16 * (4 << cut); }

// Queries in the same form, q - c = scale * code + residue, at a right angle, too. Their codes have 8 bits in one
// plane or 16 in two (code = 256 high + low). A row is a plane of a query; rows are kept in tiles. The head
// are the first dimensions, from which alone most keys can be ruled out if some key is very near.
struct CodedQueries {
  int64_t batch;
  int64_t planes;
  int64_t head;  // quads
  int64_t cut[kCuts];  // quads; at the end where distances are not given up
  int8_t* codes;  // tiles of [quads, rows of the tile, 4]
  int32_t* offset;  // [2 + kCuts, batch, planes]: 128 times the sum of a row's codes, of the head, of all, behind cuts
  float* scale;  // [batch]
  float* square;  // [2, batch]: of the head and of all
  float* error;  // [batch]: inf where the query cannot be coded
  float* length;  // [batch]: not below that of q - c
  float* apart;  // [batch, apart]
  float* tails;  // [batch, kCuts, 3] of q - c behind a cut: not above its square, not below its length, its error

  // First quad of a part, or the end of the last one.
  int64_t begin_of(int64_t part, int64_t quads) const {
    return part == 0 ? 0 : part <= kCuts ? cut[part - 1] : quads;
  }
};

// A computed squared distance T = |q|^2 + |k|^2 + apart - 2 q.k is off by less than this share of the three
// squares: about 30 roundings of 2^-24 each, 30 more by which scales miss those of least squares, and twice that
// for good measure. And by less than the smallest normal number a few times.
constexpr float kShare = 1.0f / (1 << 17);
constexpr float kTiny = 1e-36f;

// A panel: some blocks of keys and all queries, a lower bound of each squared distance of decoded forms.
struct Panel {
  int64_t start;  // its first block
  int64_t batch;
  int64_t rows;
  int32_t* product;  // [blocks, kCuts + 1, rows, kBlock]: of each part of the codes
  float* low;  // [blocks, batch, kBlock]: T, less what T is off by at most; NaN where nothing is known of a key
  uint16_t* near;  // [blocks, batch]: bit j: key j may be within the limit of the query
  float* smallest;  // [batch, kBlock]: of low, by place in a block
  int32_t* at;  // [batch, kBlock]: and the block where it is, less start
};

struct CoarseKernel {
  // Code query b of ``coded`` all but for its codes: those are put down row by row in ``bytes`` [rows, stride].
  // query: in rows of ``stride`` floats, too, one after the other. scratch: room for a query, in whole registers of kLanes floats.
  void (*code)(
      const Codes& codes, const float* query, CodedQueries& coded, int64_t b, int8_t* bytes, int64_t stride,
      float* scratch);
  // Those codes in tiles.
  void (*arrange)(const CodedQueries& coded, int64_t quads, const int8_t* bytes, int64_t stride);
  // Products of ``count`` blocks, kTogether at most (from ``place`` on in the panel), over their heads or over all,
  // for the queries that have a key ``near`` in them; then low, smallest and at of every step-th query. there: the
  // products of the heads are there already.
  void (*bound)(
      const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, int64_t count,
      bool head, bool there, int64_t step);
  // near [batch] of a block: keys that had been near and whose low, of their heads or of all, lets them be within
  // limit [batch] of their query; their number. reach: squares of limits of the distances, limit: those, and the
  // query's error on top.
  int64_t (*select)(
      const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, bool head,
      const float* limit, const float* reach);
};

// The best kernel that an instruction set (as in Isa) allows on this processor.
CoarseKernel coarse_for(int64_t isa);
// "avx512-vnni", "avx2" or "portable".
const char* coarse_name(int64_t isa);

}  // namespace dualedit
