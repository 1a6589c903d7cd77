// The coarse pass over coded keys: bounds of all distances from a quarter of the bytes.
#pragma once

#include <cstdint>

#include "cpu/nearest_key.h"

namespace dualedit {

// Codes of keys. With c the centre and S the dimensions kept apart, key k is
//     k_d = rows_d                                     for d in S, exactly
//     k_d = c_d + scale_p (code_d - 128) + residue_d   elsewhere, in part p of the dimensions, ||residue|| <= error,
// and in each part the residue is at a right angle to the code, but for the rounding of scale to fp32. The largest
// value of a part sets its scale, and fewer dimensions have a smaller one: parts make for a smaller error.
// For the cosine metric k is the key scaled to length 1, and error covers the rounding of that, too.
struct Codes {
  const uint8_t* codes;  // [blocks, quads, kBlock, 4]: 4 dimensions of 16 keys side by side; 64-byte lines
  const float* scale;  // [blocks, parts, kBlock]
  const float* square;  // [blocks, kBlock]: sum of scale^2 (code - 128)^2
  const float* error;  // [blocks, kBlock]: inf where nothing is known of a key
  const float* centre;  // [dim], zero at the dimensions apart
  const float* rows;  // [blocks, apart, kBlock]
  const int64_t* apart_at;  // [apart]
  int64_t apart;
  int64_t quads;
  int64_t dim;
  int64_t parts;
  const float* tails;  // [blocks, 2 kCuts, kBlock]: lengths of k - c behind each cut, then those of its residues
  float drift;  // how far the kernels' keys may lie from those that were coded: the cosine metric scales in fp32
};

constexpr int64_t kBlock = 16;  // keys side by side
constexpr int64_t kTogether = 3;  // blocks whose products are computed together
constexpr int64_t kMostQueries = 256;  // that are coded together
constexpr int64_t kMostCodedDim = 65536;  // 255 * 127 * dim, and 255 * 128 * dim, fit 32 bits

// Codes lie in parts of as many quads, in whole registers; the last has what is left. Short codes are one part.
// As in dualedit_kernels/nearest_key/codes.py.
constexpr int64_t kMostParts = 8;
constexpr int64_t kFewestQuads = 128;
inline int64_t parts_of(int64_t quads) {
  return quads < kFewestQuads ? 1 : quads < 4 * kFewestQuads ? 4 : kMostParts;
}
inline int64_t part_of(int64_t quads) { return quads / (4 * parts_of(quads)) * 4; }

// Behind a quarter and behind half of the parts are cuts: what is behind one has bounds of its own, so that an exact
// distance can be given up there. Short codes are not cut.
constexpr int64_t kCuts = 2;
inline int64_t first_part_behind(int64_t parts, int64_t cut) { return parts / 4 << cut; }

// Queries in the same form, q - c = scale_p * code + residue, at a right angle, too. Their codes have 8 bits in one
// plane or 16 in two (code = 256 high + low). A row is a plane of a query; rows are kept in tiles. The head
// are the first dimensions, from which alone most keys can be ruled out if some key is very near.
struct CodedQueries {
  int64_t batch;
  int64_t planes;
  int64_t head;  // quads
  int64_t parts;
  int64_t part;  // quads
  bool cuts;  // whether distances are given up at cuts
  int8_t* codes;  // tiles of [quads, rows of the tile, 4]
  // [1 + parts, batch, planes]: what the products of each part start with, -128 times the sum of a row's codes, as a
  // key's codes are 128 too large. In front, what the products of the heads lack if they start like the first part.
  int32_t* offset;
  float* scale;  // [batch, parts]
  float* square;  // [2, batch]: of the head and of all
  float* error;  // [batch]: inf where the query cannot be coded
  float* length;  // [batch]: not below that of q - c
  float* apart;  // [batch, apart]
  float* tails;  // [batch, kCuts, 3] of q - c behind a cut: not above its square, not below its length, its error

  // First quad of a part, or the end of the last one.
  int64_t begin_of(int64_t number, int64_t quads) const { return number < parts ? number * part : quads; }
};

// A computed squared distance T = |q|^2 + |k|^2 + apart - 2 q.k is off by less than this share of the three
// squares: about 40 roundings of 2^-24 each, 30 more by which scales miss those of least squares, and nearly twice
// that for good measure. And by less than the smallest normal number a few times.
constexpr float kShare = 1.0f / (1 << 17);
constexpr float kTiny = 1e-36f;

// A panel: some blocks of keys and all queries, a lower bound of each squared distance of decoded forms.
struct Panel {
  int64_t start;  // its first block
  int64_t batch;
  int64_t rows;
  int32_t* product;  // [blocks, rows, kBlock]: of the first parts of the codes, or of the heads
  int32_t* others;  // [kTogether, parts - 1, rows, kBlock]: of the other parts, of the blocks at work
  float* behind;  // [blocks, kCuts, batch, kBlock]: of decoded forms behind the cuts, off by less than T
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
