// The coarse pass, written once for all instruction sets. Included inside a namespace; no include guard on purpose,
// and no function from the standard library (its code would be compiled for the instruction set and could be
// linked into the others).

#include DUALEDIT_DOTS

// Tiles of nearly equal height.
inline int64_t tiles_of(int64_t rows) { return (rows + Dots::kRows - 1) / Dots::kRows; }
inline int64_t height_of(int64_t rows, int64_t tile) {
  const int64_t tiles = tiles_of(rows);
  return rows / tiles + (tile < rows % tiles ? 1 : 0);
}

// Where the codes of a row are, and the bytes from one quad of them to the next.
inline int8_t* place_of(const CodedQueries& coded, int64_t quads, int64_t row, int64_t* step) {
  int64_t first = 0;
  for (int64_t t = 0;; ++t) {
    const int64_t height = height_of(coded.batch * coded.planes, t);
    if (row < first + height) {
      *step = height * 4;
      return coded.codes + first * quads * 4 + (row - first) * 4;
    }
    first += height;
  }
}

// Write the codes of a row to its place among the others.
inline void put(const int8_t* codes, const CodedQueries& coded, int64_t quads, int64_t row) {
  int64_t step;
  int8_t* to = place_of(coded, quads, row, &step);
  for (int64_t t = 0; t < quads; ++t) __builtin_memcpy(to + t * step, codes + t * 4, 4);
}

// Sum of squares of n, exactly up to the rounding of doubles: over whole registers of 16.
inline double squares_of(const int32_t* n, int64_t padded) {
  constexpr int W = 16;
  double total[W] = {};
  for (int64_t d = 0; d < padded; d += W) {
    for (int j = 0; j < W; ++j) total[j] += static_cast<double>(n[d + j]) * n[d + j];
  }
  double sum = 0.0;
  for (int j = 0; j < W; ++j) sum += total[j];
  return sum;
}

// Sum of squares of x - scale * n (of x where there is no n), in 16 lanes.
inline float squares_of(const float* x, const int32_t* n, float scale, int64_t padded) {
  constexpr int W = 16;
  float total[W] = {};
  if (n == nullptr) {
    for (int64_t d = 0; d < padded; d += W) {
      for (int j = 0; j < W; ++j) total[j] += x[d + j] * x[d + j];
    }
  } else {
    for (int64_t d = 0; d < padded; d += W) {
      float rest[W];
      for (int j = 0; j < W; ++j) rest[j] = x[d + j] - scale * static_cast<float>(n[d + j]);
      for (int j = 0; j < W; ++j) total[j] += rest[j] * rest[j];
    }
  }
  float sum = 0.0f;
  for (int j = 0; j < W; ++j) sum += total[j];
  return sum;
}

// Code query b: as in CodedQueries. Loops are such that compilers turn them into whole registers. scratch: room for
// 5/2 of the query.
void code(const Codes& codes, const float* query, CodedQueries& coded, int64_t b, float* scratch) {
  const int64_t padded = (codes.dim + kLanes - 1) / kLanes * kLanes;
  float* own = coded.apart + b * codes.apart;
  double apart = 0.0;
  for (int64_t p = 0; p < codes.apart; ++p) {
    own[p] = query[codes.apart_at[p]];
    apart += static_cast<double>(own[p]) * own[p];
  }
  for (int64_t d = 0; d < codes.dim; ++d) scratch[d] = query[d] - codes.centre[d];
  for (int64_t d = codes.dim; d < padded; ++d) scratch[d] = 0.0f;
  for (int64_t p = 0; p < codes.apart; ++p) scratch[codes.apart_at[p]] = 0.0f;

  // The largest magnitude, by its bits: they are in the order of the values, NaN above infinity.
  int32_t* whole = reinterpret_cast<int32_t*>(scratch + padded);
  __builtin_memcpy(whole, scratch, padded * sizeof(float));
  int32_t top = 0;
  for (int64_t d = 0; d < padded; ++d) {
    const int32_t size = whole[d] & 0x7fffffff;
    top = size > top ? size : top;
  }
  float most;
  __builtin_memcpy(&most, &top, sizeof(most));
  const float squares = squares_of(scratch, nullptr, 0.0f, padded);
  const float scale = most / (coded.planes == 1 ? 127.0f : 127.0f * 256.0f);
  // Beyond these sizes squares could overflow, or scales lose their precision. NaN compares false.
  const bool fine = squares <= 1e37 && apart <= 1e37 && (most == 0.0f || scale >= 1e-18f);
  if (!fine) {
    for (int64_t d = 0; d < padded; ++d) scratch[d] = 0.0f;
    for (int64_t p = 0; p < codes.apart; ++p) own[p] = 0.0f;
  }
  // Rounds to nearest: the last bits of 1.5 * 2^23 + x are x.
  const float inverse = fine && most > 0.0f ? 1.0f / scale : 0.0f;
  float* rounded = reinterpret_cast<float*>(whole);
  for (int64_t d = 0; d < padded; ++d) rounded[d] = scratch[d] * inverse + 12582912.0f;
  __builtin_memcpy(whole, rounded, padded * sizeof(float));
  for (int64_t d = 0; d < padded; ++d) whole[d] -= 0x4b400000;

  int8_t* bytes = reinterpret_cast<int8_t*>(whole + padded);
  for (int64_t p = 0; p < coded.planes; ++p) {
    int32_t sum = 0;
    if (coded.planes == 1) {
      for (int64_t d = 0; d < padded; ++d) bytes[d] = static_cast<int8_t>(whole[d]);
    } else if (p == 0) {
      for (int64_t d = 0; d < padded; ++d) bytes[d] = static_cast<int8_t>((whole[d] + 128) >> 8);
    } else {
      for (int64_t d = 0; d < padded; ++d) bytes[d] = static_cast<int8_t>(((whole[d] + 128) & 255) - 128);
    }
    for (int64_t d = 0; d < padded; ++d) sum += bytes[d];
    put(bytes, coded, codes.quads, b * coded.planes + p);
    coded.offset[b * coded.planes + p] = 128 * sum;
  }
  coded.scale[b] = fine ? scale : 0.0f;
  coded.square[b] =
      fine ? static_cast<float>(static_cast<double>(scale) * scale * squares_of(whole, padded)) : 0.0f;
  // Subtracting the centre and the coded value rounds by 2^-24 of the value each, summing squares by another 2^-24
  // for each addition to a lane, and squares that underflow amount to less than 1e-16 in length.
  const double summing = 1 + (static_cast<double>(padded) / 16 + 32) * 6.1e-8;
  const double left = __builtin_sqrt(static_cast<double>(squares_of(scratch, whole, scale, padded)));
  const double rounded_off = __builtin_sqrt(static_cast<double>(squares)) * 2.5e-7;
  const double error = (left + rounded_off) * summing + 1e-16;
  coded.error[b] = fine ? static_cast<float>(error * (1 + 1e-6)) : __builtin_inff();
}

inline void dots(int64_t height, const uint8_t* keys, const int8_t* rows, int64_t quads, bool more, int32_t* out) {
#define DUALEDIT_CASE(R)                                                          \
  case R:                                                                         \
    if constexpr (R <= Dots::kRows) Dots::tile<R>(keys, rows, quads, more, out);  \
    break
  switch (height) {
    DUALEDIT_CASE(1);
    DUALEDIT_CASE(2);
    DUALEDIT_CASE(3);
    DUALEDIT_CASE(4);
    DUALEDIT_CASE(5);
    DUALEDIT_CASE(6);
    DUALEDIT_CASE(7);
    DUALEDIT_CASE(8);
    DUALEDIT_CASE(9);
    DUALEDIT_CASE(10);
    DUALEDIT_CASE(11);
    DUALEDIT_CASE(12);
    DUALEDIT_CASE(13);
    DUALEDIT_CASE(14);
    DUALEDIT_CASE(15);
    DUALEDIT_CASE(16);
    default:
      break;
  }
#undef DUALEDIT_CASE
}

void block(const Codes& codes, const CodedQueries& coded, int64_t at, const float* limit, Bounds* bounds) {
  const uint8_t* keys = codes.codes + at * codes.quads * 4 * kBlock;
  const int64_t rows = coded.batch * coded.planes;
  // A part of the keys stays in the first-level cache while the tiles pass.
  const int64_t part = tiles_of(rows) == 1 ? codes.quads : 256;
  for (int64_t quad = 0; quad < codes.quads; quad += part) {
    const int64_t quads = codes.quads - quad < part ? codes.quads - quad : part;
    int64_t first = 0;
    for (int64_t t = 0; t < tiles_of(rows); ++t) {
      const int64_t height = height_of(rows, t);
      const int8_t* own = coded.codes + (first * codes.quads + quad * height) * 4;
      dots(height, keys + quad * 4 * kBlock, own, quads, quad > 0, coded.product + first * kBlock);
      first += height;
    }
  }
  const float* scale = codes.scale + at * kBlock;
  const float* square = codes.square + at * kBlock;
  const float* error = codes.error + at * kBlock;
  const float* apart = codes.rows + at * codes.apart * kBlock;
  for (int64_t b = 0; b < coded.batch; ++b) {
    const int32_t* product = coded.product + b * coded.planes * kBlock;
    const int32_t* offset = coded.offset + b * coded.planes;
    float dot[kBlock], sum[kBlock];
    for (int j = 0; j < kBlock; ++j) dot[j] = static_cast<float>(product[j] - offset[0]);
    if (coded.planes == 2) {
      for (int j = 0; j < kBlock; ++j) dot[j] = dot[j] * 256.0f + static_cast<float>(product[kBlock + j] - offset[1]);
    }
    for (int j = 0; j < kBlock; ++j) sum[j] = coded.square[b] + square[j];
    for (int64_t p = 0; p < codes.apart; ++p) {
      const float q = coded.apart[b * codes.apart + p];
      for (int j = 0; j < kBlock; ++j) {
        const float difference = q - apart[p * kBlock + j];
        sum[j] += difference * difference;
      }
    }
    const float twice = 2.0f * coded.scale[b];
    const float within = limit[b];
    Bounds& own = bounds[b];
    float low[kBlock], edge[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      own.total[j] = sum[j] - twice * scale[j] * dot[j];
      own.spread[j] = sum[j] * kShare + kTiny;
      low[j] = own.total[j] - own.spread[j];
    }
    for (int j = 0; j < kBlock; ++j) edge[j] = (within + error[j]) * (within + error[j]) * 1.000001f;
    own.near = Dots::not_above(low, edge);
  }
}
