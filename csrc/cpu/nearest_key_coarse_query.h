// Queries in codes, written once for all instruction sets: a part of nearest_key_coarse_kernel.h, whose rules hold.

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

// The first halves of two, and their second ones; then the same of quarters.
inline void halves(Floats a, Floats b, Floats& first, Floats& last) {
#if defined(__clang__) || __GNUC__ >= 12
  first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  last = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#else
  first = __builtin_shuffle(a, b, Integers{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
  last = __builtin_shuffle(a, b, Integers{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
#endif
}
inline void quarters(Floats a, Floats b, Floats& first, Floats& last) {
#if defined(__clang__) || __GNUC__ >= 12
  first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  last = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#else
  first = __builtin_shuffle(a, b, Integers{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
  last = __builtin_shuffle(a, b, Integers{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
#endif
}

// Lane j holds what lane j + N did, in a circle.
template <int N>
inline Integers turned(const Integers& v) {
#define DUALEDIT_LANES                                                                                              \
  N % 16, (N + 1) % 16, (N + 2) % 16, (N + 3) % 16, (N + 4) % 16, (N + 5) % 16, (N + 6) % 16, (N + 7) % 16,         \
      (N + 8) % 16, (N + 9) % 16, (N + 10) % 16, (N + 11) % 16, (N + 12) % 16, (N + 13) % 16, (N + 14) % 16,        \
      (N + 15) % 16
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, DUALEDIT_LANES);
#else
  return __builtin_shuffle(v, Integers{DUALEDIT_LANES});
#endif
#undef DUALEDIT_LANES
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
  double rn = 0.0;  // r n, up to 40 roundings of 2^-24 of |r| |n|, where |r| is at most scale |n|
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
// Sums of four, each added up in pairs of lanes.
inline void sums_of(const Floats& a, const Floats& b, const Floats& c, const Floats& d, float* out) {
  Floats ab, ba, cd, dc;
  halves(a, b, ab, ba);
  halves(c, d, cd, dc);
  ab += ba;
  cd += dc;
  quarters(ab, cd, ab, cd);
  float lanes[kBlock];
  put(ab + cd, lanes);
  for (int i = 0; i < 4; ++i) {
    const float* own = lanes + i * 4;
    out[i] = (own[0] + own[1]) + (own[2] + own[3]);
  }
}
inline int32_t sum_of(Integers lanes) {
  lanes += turned<8>(lanes);
  lanes += turned<4>(lanes);
  lanes += turned<2>(lanes);
  return lanes[0] + lanes[1];
}

inline void put(const Integers& codes, int8_t* to) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  put(__builtin_convertvector(codes, Bytes), to);
}

// Codes of x [count], some dimensions of a query, written to its planes, and their sums. Meanwhile ``next`` is fetched.
template <int P>
inline Sums codes_of(
    const float* x, int64_t count, float scale, float inverse, int8_t* bytes, int64_t stride, const float* next,
    int32_t* offset) {
  constexpr float kRounder = 12582912.0f;  // rounds to nearest: the last bits of 1.5 * 2^23 + x are x
  constexpr int64_t run = (P == 1 ? 32 : 1) * kBlock;  // sums of so many dimensions need no doubles
  Sums sums;
  Floats squares = {}, rests = {};
  Doubles all = {}, together = {};
  Integers high = {}, low = {};
  for (int64_t first = 0; first < count; first += run) {
    const int64_t last = first + run < count ? first + run : count;
    Floats own = {}, both = {};
    const auto add_to = [&](int64_t d, Floats& squares, Floats& rests, Floats& own, Floats& both, Integers& low) {
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
    };
    int64_t d = first;
    if constexpr (P == 1) {  // two at a time, so that a sum need not wait for the one before
      Floats squares_2 = {}, rests_2 = {}, own_2 = {}, both_2 = {};
      Integers low_2 = {};
      for (; d + 2 * kBlock <= last; d += 2 * kBlock) {
        add_to(d, squares, rests, own, both, low);
        add_to(d + kBlock, squares_2, rests_2, own_2, both_2, low_2);
      }
      squares += squares_2;
      rests += rests_2;
      own += own_2;
      both += both_2;
      low += low_2;
    }
    for (; d < last; d += kBlock) add_to(d, squares, rests, own, both, low);
    if constexpr (P == 1) {
      float four[4];
      sums_of(squares, rests, own, both, four);
      squares = rests = Floats{};
      sums.x += four[0];
      sums.r += four[1];
      sums.n += four[2];
      sums.rn += four[3];
    } else {
      add(all, own);
      add(together, both);
    }
  }
  if constexpr (P == 2) {
    sums.n = sum_of(all);
    sums.rn = sum_of(together);
    sums.x = sum_of(squares);
    sums.r = sum_of(rests);
  }
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

inline float largest_of(Integers top) {
  const auto with = [&](const Integers& other) { top = other > top ? other : top; };
  with(turned<8>(top));
  with(turned<4>(top));
  with(turned<2>(top));
  with(turned<1>(top));
  const int32_t most = top[0];
  float result;
  __builtin_memcpy(&result, &most, sizeof(result));
  return result;
}

// x [end - begin] = q - c in some dimensions, in whole registers, zero at those apart and behind the last; the largest
// magnitude.
inline float centred(const Codes& codes, const float* query, int64_t begin, int64_t end, float* x) {
  Integers top = {}, top_2 = {};
  const auto subtract = [&](int64_t d, Integers& top) {
    Floats value, centre;
    get(value, query + d);
    get(centre, codes.centre + d);
    value -= centre;
    put(value, x + d - begin);
    larger(value, top);
  };
  int64_t d = begin;
  for (; d + kBlock < end && d + 2 * kBlock <= codes.dim; d += 2 * kBlock) {
    subtract(d, top);
    subtract(d + kBlock, top_2);
  }
  for (; d < end && d + kBlock <= codes.dim; d += kBlock) subtract(d, top);
  top = top > top_2 ? top : top_2;
  int64_t seen = d;
  for (; d < end; ++d) x[d - begin] = d < codes.dim ? query[d] - codes.centre[d] : 0.0f;
  for (int64_t p = 0; p < codes.apart; ++p) {
    const int64_t at = codes.apart_at[p];
    if (at < begin || at >= end) continue;
    x[at - begin] = 0.0f;
    top = Integers{};
    seen = begin;
  }
  for (d = seen; d < end; d += kBlock) {
    Floats value;
    get(value, x + d - begin);
    larger(value, top);
  }
  return largest_of(top);
}

// What was found of a part of a query: its sums, those of its head (of the first part), and the scale of its codes
// before it is that of least squares.
struct CodedPart {
  Sums sums;
  double head_n = 0.0;
  float first = 0.0f;
};

// The codes of query b, part by part, zero if it is ``blank``; false where a magnitude is too large. scratch: as `code`.
inline bool code_parts(
    const Codes& codes, const float* query, CodedQueries& coded, int64_t b, int8_t* bytes, int64_t stride,
    float* scratch, bool blank, CodedPart* found) {
  const int64_t padded = (codes.dim + kLanes - 1) / kLanes * kLanes, planes = coded.planes, batch = coded.batch;
  const auto edge = [&](int64_t part) { return part < coded.parts ? part * coded.part * 4 : padded; };
  // Two parts are at work: the next one is centred while the scale of this one is not yet known.
  float* const both[2] = {scratch, scratch + (coded.parts == 1 ? 0 : padded / 2 / kLanes * kLanes)};
  const auto centre = [&](int64_t part) {
    float* x = both[part % 2];
    if (!blank) return centred(codes, query, edge(part), edge(part + 1), x);
    for (int64_t d = 0; d < edge(part + 1) - edge(part); ++d) x[d] = 0.0f;
    return 0.0f;
  };
  const auto run = planes == 1 ? codes_of<1> : codes_of<2>;
  const float* next = query + (b + 1 < batch ? stride : 0);
  int8_t* to = bytes + b * planes * stride;
  float most = centre(0);
  for (int64_t p = 0; p < coded.parts; ++p) {
    if (!(most <= 4e18f)) return false;  // beyond it squares could overflow; NaN compares false
    // Smaller scales would lose their precision: codes are zero then.
    const float first = most / (planes == 1 ? 127.0f : 127.0f * 256.0f);
    const float inverse = first >= 1e-18f ? 1.0f / first : 0.0f;
    if (p + 1 < coded.parts) most = centre(p + 1);
    const float* x = both[p % 2];
    const int64_t begin = edge(p), end = edge(p + 1), head = p == 0 ? coded.head * 4 : begin;
    int32_t before[2] = {}, behind[2] = {};  // 128 times the sums of codes
    CodedPart part;
    if (p == 0) {
      part.sums = run(x, head, first, inverse, to, stride, next, before);
      part.head_n = part.sums.n;
    }
    const Sums rest =
        run(x + head - begin, end - head, first, inverse, to + head, stride, next + head, behind);
    part.sums.x += rest.x;
    part.sums.r += rest.r;
    part.sums.n += rest.n;
    part.sums.rn += rest.rn;
    part.first = first;
    found[p] = part;
    for (int64_t plane = 0; plane < planes; ++plane) {
      int32_t* offset = coded.offset + b * planes + plane;
      if (p == 0) offset[0] = behind[plane];
      offset[(1 + p) * batch * planes] = -before[plane] - behind[plane];
    }
  }
  return true;
}

// Code query b: as in CodedQueries.
void code(
    const Codes& codes, const float* query, CodedQueries& coded, int64_t b, int8_t* bytes, int64_t stride,
    float* scratch) {
  const int64_t padded = (codes.dim + kLanes - 1) / kLanes * kLanes, batch = coded.batch;
  float* own = coded.apart + b * codes.apart;
  double apart = 0.0;
  for (int64_t p = 0; p < codes.apart; ++p) {
    own[p] = query[codes.apart_at[p]];
    apart += static_cast<double>(own[p]) * own[p];
  }
  CodedPart found[kMostParts];
  bool fine = apart <= 1e37;
  fine = code_parts(codes, query, coded, b, bytes, stride, scratch, !fine, found) && fine;
  if (!fine) code_parts(codes, query, coded, b, bytes, stride, scratch, true, found);
  // Subtracting the centre and the coded value rounds by 2^-24 of the value each, summing squares by another 2^-24
  // for each addition to a lane, and squares that underflow amount to less than 1e-16 in length.
  const double summing = 1 + (static_cast<double>(padded) / 16 + 32) * 6.1e-8;
  double squares[kMostParts], left[kMostParts], x = 0.0, coded_square = 0.0;
  for (int64_t p = 0; p < coded.parts; ++p) {
    const Sums& sums = found[p].sums;
    const float first = found[p].first;
    // That of least squares: the residue is then at a right angle to the code.
    const float scale = sums.n > 0.0 ? static_cast<float>(first + sums.rn / sums.n) : 0.0f;
    coded.scale[b * coded.parts + p] = scale;
    const double unit = static_cast<double>(scale) * scale;
    if (p == 0) coded.square[b] = static_cast<float>(unit * found[p].head_n);
    coded_square += unit * sums.n;
    const double change = static_cast<double>(scale) - first;  // r of the other scale is r - change n
    const double own_left =
        sums.r * summing * (1 + 4e-6) - 2 * change * sums.rn + change * change * sums.n * (1 + 4e-6);
    left[p] = sums.n > 0.0 ? (own_left > 0.0 ? own_left : 0.0) : sums.x * summing;
    squares[p] = sums.x;
    x += sums.x;
  }
  fine = fine && x <= 1e37;
  if (!fine) {
    for (int64_t p = 0; p < codes.apart; ++p) own[p] = 0.0f;
  }
  coded.square[batch + b] = static_cast<float>(coded_square);
  const double rounded_off = __builtin_sqrt(x) * 2.5e-7;
  double behind_x = 0.0, behind_left = 0.0, error = 0.0;
  for (int64_t p = coded.parts - 1; p >= 0; --p) {
    behind_x += squares[p];
    behind_left += left[p];
    error = (__builtin_sqrt(behind_left) + rounded_off) * (1 + 1e-6) + 1e-16;
    for (int64_t c = 0; c < kCuts; ++c) {
      if (p == 0 || first_part_behind(coded.parts, c) != p) continue;
      float* tail = coded.tails + (b * kCuts + c) * 3;
      tail[0] = static_cast<float>(behind_x * (2 - summing) * (1 - 1e-6));
      tail[1] = static_cast<float>((__builtin_sqrt(behind_x * summing) + 1e-16) * (1 + 1e-6));
      tail[2] = fine ? static_cast<float>(error * (1 + 1e-6)) : __builtin_inff();
    }
  }
  coded.error[b] = fine ? static_cast<float>(error * (1 + 1e-6)) : __builtin_inff();
  coded.length[b] = static_cast<float>((__builtin_sqrt(coded_square) + error) * (1 + 1e-6));
}
