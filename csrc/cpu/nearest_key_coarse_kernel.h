// The coarse pass, written once for all instruction sets. Included inside a namespace; no include guard on purpose,
// and no function from the standard library (its code would be compiled for the instruction set and could be
// linked into the others).

#include DUALEDIT_DOTS

// 16 keys side by side, in as many registers as the instruction set needs. Compilers take loops over
// arrays of this size apart and make a muddle of them.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

template <class V, class T>
inline void get(V& to, const T* from) {
  __builtin_memcpy(&to, from, sizeof(V));
}
template <class V, class T>
inline void put(const V& from, T* to) {
  __builtin_memcpy(to, &from, sizeof(V));
}

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

// Sum of squares of n over whole registers of 16: exactly, if n are bytes, else up to the rounding of doubles.
inline double squares_of(const int32_t* n, int64_t padded, bool bytes) {
  constexpr int W = 16;
  double sum = 0.0;
  if (bytes) {
    int32_t total[W] = {};
    for (int64_t d = 0; d < padded; d += W) {
      for (int j = 0; j < W; ++j) total[j] += n[d + j] * n[d + j];  // 127^2 65536 / 16 at most
    }
    for (int j = 0; j < W; ++j) sum += total[j];
    return sum;
  }
  double total[W] = {};
  for (int64_t d = 0; d < padded; d += W) {
    for (int j = 0; j < W; ++j) total[j] += static_cast<double>(n[d + j]) * n[d + j];
  }
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

// Sum of x n, where no product is negative, up to 10 roundings of 2^-24 of it.
inline double product_of(const float* x, const int32_t* n, int64_t padded) {
  constexpr int W = 16, kRun = 8 * W;
  double total[W] = {};
  for (int64_t begin = 0; begin < padded; begin += kRun) {
    const int64_t end = begin + kRun < padded ? begin + kRun : padded;
    float run[W] = {};
    for (int64_t d = begin; d < end; d += W) {
      for (int j = 0; j < W; ++j) run[j] += x[d + j] * static_cast<float>(n[d + j]);
    }
    for (int j = 0; j < W; ++j) total[j] += run[j];
  }
  double sum = 0.0;
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
  float scale = most / (coded.planes == 1 ? 127.0f : 127.0f * 256.0f);
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
    for (int64_t d = 0; d < 4 * coded.head; ++d) sum += bytes[d];
    coded.offset[b * coded.planes + p] = 128 * sum;
    for (int64_t d = 4 * coded.head; d < padded; ++d) sum += bytes[d];
    coded.offset[(coded.batch + b) * coded.planes + p] = 128 * sum;
    put(bytes, coded, codes.quads, b * coded.planes + p);
  }
  const double first = squares_of(whole, 4 * coded.head, coded.planes == 1);
  const double second = squares_of(whole + 4 * coded.head, padded - 4 * coded.head, coded.planes == 1);
  // That of least squares: the residue is then at a right angle to the code.
  const double squared = first + second;
  scale = fine && squared > 0.0 ? static_cast<float>(product_of(scratch, whole, padded) / squared) : 0.0f;
  coded.scale[b] = scale;
  const double unit = static_cast<double>(scale) * scale;
  coded.square[b] = static_cast<float>(unit * first);
  coded.square[coded.batch + b] = static_cast<float>(unit * (first + second));
  // Subtracting the centre and the coded value rounds by 2^-24 of the value each, summing squares by another 2^-24
  // for each addition to a lane, and squares that underflow amount to less than 1e-16 in length.
  const double summing = 1 + (static_cast<double>(padded) / 16 + 32) * 6.1e-8;
  const double left = __builtin_sqrt(static_cast<double>(squares_of(scratch, whole, scale, padded)));
  const double rounded_off = __builtin_sqrt(static_cast<double>(squares)) * 2.5e-7;
  const double error = (left + rounded_off) * summing + 1e-16;
  coded.error[b] = fine ? static_cast<float>(error * (1 + 1e-6)) : __builtin_inff();
  coded.length[b] = static_cast<float>((__builtin_sqrt(unit * (first + second)) + error) * (1 + 1e-6));
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

// Whether the panel needs the products of a tile's rows with a block.
inline bool wanted(const CodedQueries& coded, const uint16_t* near, int64_t first, int64_t height) {
  for (int64_t b = first / coded.planes; b * coded.planes < first + height; ++b) {
    if (near[b] != 0) return true;
  }
  return false;
}

// Squares [kBlock] of the decoded heads of a block's keys.
inline void head_squares(const Codes& codes, int64_t block, int64_t head, float* out) {
  int32_t sum[kBlock] = {};
  Dots::squares(codes.codes + block * codes.quads * 4 * kBlock, head, sum);
  for (int j = 0; j < kBlock; ++j) {
    const float scale = codes.scale[block * kBlock + j];
    out[j] = scale * scale * static_cast<float>(sum[j]);
  }
}

void bound(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, bool head,
    bool whole) {
  const uint8_t* keys = codes.codes + block * codes.quads * 4 * kBlock;
  const int64_t rows = panel.rows;
  int32_t* products = panel.product + place * rows * kBlock;
  const uint16_t* near = panel.near + place * panel.batch;
  // A part of the keys stays in the first-level cache while the tiles pass.
  const int64_t part = tiles_of(rows) == 1 ? codes.quads : 256;
  const int64_t begin = head || whole ? 0 : coded.head, end = head ? coded.head : codes.quads;
  if (head) {  // the next block's is far from here
    const uint8_t* next = keys + codes.quads * 4 * kBlock;
    for (int64_t quad = 0; quad < end; ++quad) __builtin_prefetch(next + quad * 4 * kBlock);
  }
  for (int64_t quad = begin; quad < end; quad += part) {
    const int64_t quads = end - quad < part ? end - quad : part;
    int64_t first = 0;
    for (int64_t t = 0; t < tiles_of(rows); ++t) {
      const int64_t height = height_of(rows, t);
      if (wanted(coded, near, first, height)) {
        const int8_t* own = coded.codes + (first * codes.quads + quad * height) * 4;
        dots(height, keys + quad * 4 * kBlock, own, quads, quad > 0, products + first * kBlock);
      }
      first += height;
    }
  }
  const float* apart = codes.rows + block * codes.apart * kBlock;
  const Integers number = Integers{} + static_cast<int32_t>(block - panel.start);
  Floats square, scale, error;
  get(scale, codes.scale + block * kBlock);
  get(error, codes.error + block * kBlock);
  if (head) {
    float squares[kBlock];
    head_squares(codes, block, coded.head, squares);
    get(square, squares);
  } else {
    get(square, codes.square + block * kBlock);
  }
  // NaN where the error is infinite: such a key is never the smallest, and never ruled out.
  square += error * 0.0f;
  const int64_t half = head ? 0 : panel.batch;
  for (int64_t b = 0; b < panel.batch; ++b) {
    if (near[b] == 0) continue;
    const int32_t* product = products + b * coded.planes * kBlock;
    const int32_t* offset = coded.offset + (half + b) * coded.planes;
    Integers part;
    get(part, product);
    Floats dot = __builtin_convertvector(part - offset[0], Floats);
    if (coded.planes == 2) {
      get(part, product + kBlock);
      dot = dot * 256.0f + __builtin_convertvector(part - offset[1], Floats);
    }
    Floats sum = square + coded.square[half + b];
    for (int64_t p = 0; p < codes.apart; ++p) {
      Floats other;
      get(other, apart + p * kBlock);
      const Floats difference = other - coded.apart[b * codes.apart + p];
      sum += difference * difference;
    }
    const Floats low = sum - (2.0f * coded.scale[b]) * scale * dot - (sum * kShare + kTiny);
    put(low, panel.low + (place * panel.batch + b) * kBlock);
    Floats smallest;
    Integers at;
    get(smallest, panel.smallest + b * kBlock);
    get(at, panel.at + b * kBlock);
    put(low < smallest ? number : at, panel.at + b * kBlock);
    put(low < smallest ? low : smallest, panel.smallest + b * kBlock);
  }
}

int64_t select(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, bool head,
    const float* limit, const float* reach) {
  uint16_t* near = panel.near + place * panel.batch;
  Floats length, error;
  float lengths[kBlock];
  for (int j = 0; j < kBlock; ++j) lengths[j] = __builtin_sqrtf(codes.square[block * kBlock + j]) * 1.000001f;
  get(length, lengths);
  get(error, codes.error + block * kBlock);
  int64_t found = 0;
  for (int64_t b = 0; b < panel.batch; ++b) {
    if (near[b] == 0) continue;
    const float* low = panel.low + (place * panel.batch + b) * kBlock;
    float edge[kBlock], least[kBlock];
    const Floats within = error + limit[b];
    put(within * within * 1.000001f, edge);
    uint32_t bits = Dots::not_above(low, edge);
    if (!head && bits != 0) {  // a head's residue is at no right angle to its code
      const float own = 2.00001f * (coded.error[b] + codes.drift), others = 2.00001f * coded.length[b];
      Floats value;
      get(value, low);
      put(value - (own * length + others * error), least);
      put(Floats{} + reach[b], edge);
      bits &= Dots::not_above(least, edge);
    }
    near[b] &= static_cast<uint16_t>(bits);
    found += __builtin_popcount(near[b]);
  }
  return found;
}
