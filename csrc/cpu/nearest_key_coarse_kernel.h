// The coarse pass, written once for all instruction sets. Included inside a namespace; no include guard on purpose,
// and no function from the standard library (its code would be compiled for the instruction set and could be
// linked into the others).

// What to fetch into the cache with each quad.
struct Fetch {
  const uint8_t* from;
  int64_t step;  // bytes
};

#include DUALEDIT_DOTS

// 16 keys side by side, in as many registers as the instruction set needs. Compilers take loops over
// arrays of this size apart and make a muddle of them.
typedef float Floats __attribute__((vector_size(64)));
typedef float Halves __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
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
constexpr int64_t kMostTiles = 2 * kMostQueries / Dots::kRows + 1;
inline int64_t tiles_of(int64_t rows) { return (rows + Dots::kRows - 1) / Dots::kRows; }
inline int64_t height_of(int64_t rows, int64_t tile) {
  const int64_t tiles = tiles_of(rows);
  return rows / tiles + (tile < rows % tiles ? 1 : 0);
}

// Quads of two rows in turn: of the first 8 quads, or of the last.
inline void in_turn(const Integers& a, const Integers& b, Integers& first, Integers& last) {
#if defined(__clang__) || __GNUC__ >= 12
  first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  last = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  first = __builtin_shuffle(a, b, Integers{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  last = __builtin_shuffle(a, b, Integers{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// 16 quads of 8 rows, in tiles.
inline void arrange_eight(const int8_t* from, int64_t stride, int8_t* to) {
  Integers one[8], two[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) get(one[r], from + r * stride);
  // Rows r and r + 4, then r, r + 2, r + 4 and r + 6, then all: in order.
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) in_turn(one[r], one[r + 4], two[2 * r], two[2 * r + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int at = i / 2 * 4 + i % 2 * 2;  // of row i / 2 on, half i % 2
    in_turn(two[i], two[i + 4], one[at], one[at + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    in_turn(one[i], one[i + 4], two[0], two[1]);
    put(two[0], to + 2 * i * static_cast<int64_t>(sizeof(Integers)));
    put(two[1], to + (2 * i + 1) * static_cast<int64_t>(sizeof(Integers)));
  }
}

// The codes of rows in tiles: 16 quads of a row after the other, so that what is written stays in the cache.
void arrange(const CodedQueries& coded, int64_t quads, const int8_t* bytes, int64_t stride) {
  const int64_t rows = coded.batch * coded.planes;
  int64_t first = 0;
  for (int64_t t = 0; t < tiles_of(rows); ++t) {
    const int64_t height = height_of(rows, t);
    for (int64_t begin = 0; begin < quads; begin += 16) {
      const int64_t end = begin + 16 < quads ? begin + 16 : quads;
      if (height == 8 && end == begin + 16) {
        arrange_eight(
            bytes + first * stride + begin * 4, stride, coded.codes + first * quads * 4 + begin * height * 4);
        continue;
      }
      for (int64_t r = 0; r < height; ++r) {
        const int8_t* from = bytes + (first + r) * stride + begin * 4;
        int8_t* to = coded.codes + first * quads * 4 + (begin * height + r) * 4;
        for (int64_t quad = begin; quad < end; ++quad, from += 4, to += height * 4) __builtin_memcpy(to, from, 4);
      }
    }
    first += height;
  }
}

// What is summed up over some dimensions of a query x and its codes n, before scales are those of least squares:
// r = x - scale n.
struct Sums {
  double x = 0.0;  // x^2, up to dim / 16 + 8 roundings of 2^-24 of it
  double r = 0.0;  // r^2, as well
  double n = 0.0;  // n^2, exactly if n are bytes, else up to a rounding of 2^-24
  double rn = 0.0;  // r n, up to 18 roundings of 2^-24 of |r| |n|, where |r| is at most scale |n|
};

inline double sum_of(const Doubles& lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}
inline void add(Doubles& total, const Floats& lanes) {
  // Sums whose halves are read by address would live in memory all the time: only the copy is to.
  Floats copy = lanes;
  asm("" : "+m"(copy));
  Halves low, high;
  __builtin_memcpy(&low, &copy, sizeof(low));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&copy) + sizeof(low), sizeof(high));
  total += __builtin_convertvector(low, Doubles) + __builtin_convertvector(high, Doubles);
}
inline double sum_of(const Floats& lanes) {
  Doubles sums = {};
  add(sums, lanes);
  return sum_of(sums);
}
inline int32_t sum_of(const Integers& lanes) {
  int32_t sum = 0;
  for (int j = 0; j < kBlock; ++j) sum += lanes[j];
  return sum;
}

inline void put(const Integers& codes, int8_t* to) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  put(__builtin_convertvector(codes, Bytes), to);
}

// Codes of dimensions begin..end of x, written to the planes of a query, and their sums. Meanwhile ``next`` is
// fetched.
template <int P>
inline Sums codes_of(
    const float* x, int64_t begin, int64_t end, float scale, float inverse, int8_t* bytes, int64_t stride,
    const float* next, int32_t* offset) {
  constexpr float kRounder = 12582912.0f;  // rounds to nearest: the last bits of 1.5 * 2^23 + x are x
  constexpr int64_t run = (P == 1 ? 16 : 1) * kBlock;  // sums of so many dimensions need no doubles
  Sums sums;
  Floats squares = {}, rests = {};
  Doubles all = {}, together = {};
  Integers high = {}, low = {};
  for (int64_t first = begin; first < end; first += run) {
    const int64_t last = first + run < end ? first + run : end;
    Floats own = {}, both = {};
    for (int64_t d = first; d < last; d += kBlock) {
      Floats value;
      __builtin_prefetch(next + d);
      get(value, x + d);
      const Floats rounded = value * inverse + kRounder;
      const Floats code = rounded - kRounder;
      const Floats rest = value - scale * code;
      squares += value * value;
      rests += rest * rest;
      own += code * code;
      both += rest * code;
      const Integers n = __builtin_convertvector(code, Integers);
      if constexpr (P == 1) {
        low += n;
        put(n, bytes + d);
      } else {
        const Integers shifted = n + 128, upper = shifted >> 8, lower = (shifted & 255) - 128;
        high += upper;
        low += lower;
        put(upper, bytes + d);
        put(lower, bytes + stride + d);
      }
    }
    add(all, own);
    add(together, both);
  }
  sums.n = sum_of(all);
  sums.rn = sum_of(together);
  sums.x = sum_of(squares);
  sums.r = sum_of(rests);
  offset[P - 1] = 128 * sum_of(low);
  if (P == 2) offset[0] = 128 * sum_of(high);
  return sums;
}

// The larger magnitudes, by their bits: those are in the order of the values, NaN above infinity.
inline void larger(const Floats& value, Integers& top) {
  Integers size;
  __builtin_memcpy(&size, &value, sizeof(size));
  size &= 0x7fffffff;
  top = size > top ? size : top;
}

// x = q - c, zero at the dimensions apart and behind the last; the largest magnitude.
inline float centred(const Codes& codes, const float* query, int64_t padded, float* x) {
  Integers top = {};
  int64_t d = 0;
  for (; d + kBlock <= codes.dim; d += kBlock) {
    Floats value, centre;
    get(value, query + d);
    get(centre, codes.centre + d);
    value -= centre;
    put(value, x + d);
    larger(value, top);
  }
  for (; d < codes.dim; ++d) x[d] = query[d] - codes.centre[d];
  for (; d < padded; ++d) x[d] = 0.0f;
  for (int64_t p = 0; p < codes.apart; ++p) x[codes.apart_at[p]] = 0.0f;
  if (codes.apart > 0) top = Integers{};
  // What has not been looked at yet, or has changed.
  for (d = codes.apart > 0 ? 0 : codes.dim / kBlock * kBlock; d < padded; d += kBlock) {
    Floats value;
    get(value, x + d);
    larger(value, top);
  }
  int32_t most = 0;
  for (int j = 0; j < kBlock; ++j) most = top[j] > most ? top[j] : most;
  float result;
  __builtin_memcpy(&result, &most, sizeof(result));
  return result;
}

// Code query b: as in CodedQueries.
void code(
    const Codes& codes, const float* query, CodedQueries& coded, int64_t b, int8_t* bytes, int64_t stride,
    float* scratch) {
  constexpr int64_t kPieces = kCuts + 2;  // the head, the rest of the first part, and the other parts
  const int64_t padded = (codes.dim + kLanes - 1) / kLanes * kLanes, planes = coded.planes;
  float* own = coded.apart + b * codes.apart;
  double apart = 0.0;
  for (int64_t p = 0; p < codes.apart; ++p) {
    own[p] = query[codes.apart_at[p]];
    apart += static_cast<double>(own[p]) * own[p];
  }
  const float most = centred(codes, query, padded, scratch);
  const float first = most / (planes == 1 ? 127.0f : 127.0f * 256.0f);
  // Beyond these sizes squares could overflow, or scales lose their precision. NaN compares false.
  bool fine = most <= 4e18f && apart <= 1e37 && (most == 0.0f || first >= 1e-18f);
  if (!fine) {
    for (int64_t d = 0; d < padded; ++d) scratch[d] = 0.0f;
  }
  Sums pieces[kPieces], all;
  int32_t offset[kPieces][2], total[2] = {};
  int64_t begin = 0;
  for (int64_t i = 0; i < kPieces; ++i) {
    const int64_t quad = i == 0 ? coded.head : coded.begin_of(i, codes.quads);
    const int64_t end = quad < codes.quads ? quad * 4 : padded;
    const float inverse = fine && most > 0.0f ? 1.0f / first : 0.0f;
    const auto run = planes == 1 ? codes_of<1> : codes_of<2>;
    const float* next = query + (b + 1 < coded.batch ? stride : 0);
    pieces[i] = run(scratch, begin, end, first, inverse, bytes + b * planes * stride, stride, next, offset[i]);
    all.x += pieces[i].x;
    all.r += pieces[i].r;
    all.n += pieces[i].n;
    all.rn += pieces[i].rn;
    for (int64_t p = 0; p < planes; ++p) total[p] += offset[i][p];
    begin = end;
  }
  fine = fine && all.x <= 1e37;
  if (!fine) {
    for (int64_t p = 0; p < codes.apart; ++p) own[p] = 0.0f;
  }
  for (int64_t p = 0; p < planes; ++p) {
    int32_t* to = coded.offset + b * planes + p;
    const int64_t step = coded.batch * planes;
    to[0] = offset[0][p];
    to[step] = total[p];
    int32_t behind = total[p] - offset[0][p] - offset[1][p];
    for (int64_t c = 0; c < kCuts; ++c) {
      to[(2 + c) * step] = behind;
      behind -= offset[2 + c][p];
    }
  }
  // That of least squares: the residue is then at a right angle to the code.
  const float scale = fine && all.n > 0.0 ? static_cast<float>(first + all.rn / all.n) : 0.0f;
  coded.scale[b] = scale;
  const double unit = static_cast<double>(scale) * scale;
  coded.square[b] = static_cast<float>(unit * pieces[0].n);
  coded.square[coded.batch + b] = static_cast<float>(unit * all.n);
  // Subtracting the centre and the coded value rounds by 2^-24 of the value each, summing squares by another 2^-24
  // for each addition to a lane, and squares that underflow amount to less than 1e-16 in length.
  const double summing = 1 + (static_cast<double>(padded) / 16 + 32) * 6.1e-8;
  const double change = static_cast<double>(scale) - first;  // r of the other scale is r - change n
  const double left = all.r * summing * (1 + 4e-6) - 2 * change * all.rn + change * change * all.n * (1 + 4e-6);
  const double rounded_off = __builtin_sqrt(all.x) * 2.5e-7;
  const double error = (__builtin_sqrt(left > 0.0 ? left : 0.0) + rounded_off) * (1 + 1e-6) + 1e-16;
  coded.error[b] = fine ? static_cast<float>(error * (1 + 1e-6)) : __builtin_inff();
  coded.length[b] = static_cast<float>((__builtin_sqrt(unit * all.n) + error) * (1 + 1e-6));
  Sums behind;
  for (int64_t c = kCuts - 1; c >= 0; --c) {
    float* tail = coded.tails + (b * kCuts + c) * 3;
    behind.x += pieces[2 + c].x;
    behind.r += pieces[2 + c].r;
    behind.n += pieces[2 + c].n;
    tail[0] = static_cast<float>(behind.x * (2 - summing) * (1 - 1e-6));
    tail[1] = static_cast<float>((__builtin_sqrt(behind.x * summing) + 1e-16) * (1 + 1e-6));
    const double own_error =
        __builtin_sqrt(behind.r * summing) + __builtin_fabs(change) * __builtin_sqrt(behind.n) + rounded_off;
    tail[2] = fine ? static_cast<float>(own_error * (1 + 4e-6) + 1e-16) : __builtin_inff();
  }
}

// Some blocks' keys, and where their products go.
struct Blocks {
  const uint8_t* keys;
  int64_t step;  // bytes from one block to the next
  int32_t* out;
  int64_t apart;  // integers from the products of one to those of the next
  int64_t count;
};

// Products of some quads of the blocks' keys with a tile.
template <int R, class Kernel = Dots>
inline void dots(const Blocks& blocks, const int8_t* rows, int64_t quads, bool more, Fetch fetch) {
  if constexpr (R > 4 && Kernel::kBlocks == 3) {
    const uint8_t* keys = blocks.keys;
    if (blocks.count == 3) {
      Kernel::template together<3, R>(keys, blocks.step, rows, quads, more, fetch, blocks.out, blocks.apart);
    } else if (blocks.count == 2) {
      Kernel::template together<2, R>(keys, blocks.step, rows, quads, more, fetch, blocks.out, blocks.apart);
    } else {
      Kernel::template together<1, R>(keys, blocks.step, rows, quads, more, fetch, blocks.out, blocks.apart);
    }
    return;
  }
  for (int64_t i = 0; i < blocks.count; ++i) {
    const uint8_t* keys = blocks.keys + i * blocks.step;
    const Fetch own{fetch.from + i * blocks.step, fetch.step};
    Kernel::template tile<R>(keys, rows, quads, more, own, blocks.out + i * blocks.apart);
  }
}

inline void dots(
    int64_t height, const Blocks& blocks, const int8_t* rows, int64_t quads, bool more, Fetch fetch) {
#define DUALEDIT_CASE(R)                                                              \
  case R:                                                                             \
    if constexpr (R <= Dots::kRows) dots<R>(blocks, rows, quads, more, fetch);        \
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
    default:
      break;
  }
#undef DUALEDIT_CASE
}

// Whether the panel needs the products of a tile's rows with a block.
inline bool wanted(const CodedQueries& coded, const uint16_t* near, int64_t first, int64_t height) {
  for (int64_t b = coded.planes == 2 ? first / 2 : first; b * coded.planes < first + height; ++b) {
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

// Products of one row, of parts 0..last together.
inline void total_of(const int32_t* product, int64_t last, int64_t rows, Integers& total) {
  Integers part;
  get(total, product);
  for (int64_t p = 1; p <= last; ++p) {
    get(part, product + p * rows * kBlock);
    total += part;
  }
}

// Products of ``count`` blocks with the queries to which a key of them is near; the last part that has any.
inline int64_t multiply(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, int64_t count,
    bool head, bool there) {
  const int64_t size = codes.quads * 4 * kBlock, rows = panel.rows, tiles = tiles_of(rows);
  const int64_t step = 64 / tiles, low = rows / tiles, higher = rows % tiles;  // as height_of: a division for each would be felt
  const uint8_t* keys = codes.codes + block * size;
  const int64_t apart = (kCuts + 1) * rows * kBlock;
  int32_t* products = panel.product + place * apart;
  const uint16_t* near = panel.near + place * panel.batch;
  // Some of the keys' codes stay in the first-level cache while the tiles pass.
  const int64_t most = tiles == 1 ? codes.quads : 128;
  const int64_t begin = there ? coded.head : 0, end = head ? coded.head : codes.quads;
  bool needed[kMostTiles];
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t height = low + (t < higher ? 1 : 0);
    needed[t] = false;
    for (int64_t i = 0; i < count; ++i) needed[t] |= wanted(coded, near + i * panel.batch, first, height);
    first += height;
  }
  int64_t part = 0;
  for (int64_t quad = begin; quad < end;) {
    while (coded.begin_of(part + 1, codes.quads) <= quad) ++part;
    const int64_t start = coded.begin_of(part, codes.quads), stop = coded.begin_of(part + 1, codes.quads);
    const int64_t edge = stop < end ? stop : end, quads = edge - quad < most ? edge - quad : most;
    int32_t* sums = products + part * rows * kBlock;
    // What comes next is fetched little by little, by all tiles; by a single one, a little ahead.
    const uint8_t* now = keys + quad * 4 * kBlock;
    const uint8_t* next = quad + quads < end ? now + quads * 64 : keys + count * size + begin * 64;
    if (tiles == 1 && !head) next = now + 8192;
    int64_t first = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t height = low + (t < higher ? 1 : 0);
      const Fetch fetch{next + t * step * quads, step};
      if (needed[t]) {
        const int8_t* own = coded.codes + (first * codes.quads + quad * height) * 4;
        const Blocks blocks{now, size, sums + first * kBlock, apart, count};
        dots(height, blocks, own, quads, quad > start, fetch);
      }
      first += height;
    }
    quad += quads;
  }
  return part;
}

// Bounds of one block from its products.
inline void bound_block(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, bool head,
    int64_t parts, int64_t step) {
  // In variables: what is written could be what pointers are read from, for all that compilers know.
  const int64_t rows = panel.rows, batch = panel.batch, planes = coded.planes, others = codes.apart;
  const int64_t half = head ? 0 : batch;
  const int32_t* product = panel.product + place * (kCuts + 1) * rows * kBlock;
  const int32_t* offset = coded.offset + half * planes;
  const uint16_t* near = panel.near + place * batch;
  const float* apart = codes.rows + block * others * kBlock;
  const float *own_scale = coded.scale, *own_square = coded.square + half, *own_apart = coded.apart;
  float *out = panel.low + place * batch * kBlock, *smallest = panel.smallest;
  int32_t* at = panel.at;
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
  for (int64_t b = 0; b < batch; b += step, product += step * planes * kBlock, offset += step * planes) {
    if (near[b] == 0) continue;
    Integers total;
    total_of(product, parts, rows, total);
    Floats dot = __builtin_convertvector(total - offset[0], Floats);
    if (planes == 2) {
      total_of(product + kBlock, parts, rows, total);
      dot = dot * 256.0f + __builtin_convertvector(total - offset[1], Floats);
    }
    Floats sum = square + own_square[b];
    for (int64_t p = 0; p < others; ++p) {
      Floats other;
      get(other, apart + p * kBlock);
      const Floats difference = other - own_apart[b * others + p];
      sum += difference * difference;
    }
    const Floats low = sum - (2.0f * own_scale[b]) * scale * dot - (sum * kShare + kTiny);
    put(low, out + b * kBlock);
    Floats least;
    Integers place_of;
    get(least, smallest + b * kBlock);
    get(place_of, at + b * kBlock);
    put(low < least ? number : place_of, at + b * kBlock);
    put(low < least ? low : least, smallest + b * kBlock);
  }
}

void bound(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, int64_t count,
    bool head, bool there, int64_t step) {
  // For a single tile reading the keys is the whole cost, and one stream of them is read the fastest; heads are none.
  const int64_t some = tiles_of(panel.rows) == 1 && !head ? 1 : count;
  for (int64_t i = 0; i < count; i += some) {
    const int64_t parts = multiply(codes, coded, panel, block + i, place + i, some, head, there);
    for (int64_t j = i; j < i + some; ++j) bound_block(codes, coded, panel, block + j, place + j, head, parts, step);
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
