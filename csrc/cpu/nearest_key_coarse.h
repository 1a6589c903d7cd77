// Bounds from codes, written once for all instruction sets. Included behind vector.h; the rules of
// nearest_key_scan.h hold.

// Products of a block's keys with R queries, over the quads of one part: added to dot, or put there. Meanwhile the
// codes ``ahead`` are fetched, as much as one of some tiles has to.
template <int R>
inline void products(
    const uint8_t* keys, const CodedQueries& coded, int64_t b, int64_t begin, int64_t quads, int64_t part,
    const float* key_scale, const Panel& panel, float* dot, bool fresh, const uint8_t* ahead, int64_t tiles) {
  const int8_t* codes = coded.codes + b * coded.stride + begin * 4;
  const int32_t* start = coded.start + part * coded.batch + b;
  const float* scale = coded.scale + part * coded.batch + b;
  const int64_t step = 64 * kGroups / tiles;
  for (int first = 0; first < kBlock / 16; first += kGroups) {
    Dots total[R][kGroups];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) total[r][g] = Dots::start(start[r]);
    }
    const uint8_t* from = keys + first * 64;
    for (int64_t t = 0; t < quads; ++t, from += kBlock * 4, ahead += step) {
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) __builtin_prefetch(ahead + g * step / kGroups);
      Dots::Keys k[kGroups];
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) k[g] = Dots::keys(from + g * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Dots::Query q = Dots::query(get<int32_t>(codes + r * coded.stride + t * 4));
#pragma GCC unroll 3
        for (int g = 0; g < kGroups; ++g) total[r][g].add(k[g], q);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) {
        for (int i = 0; i < 16 / kWidth; ++i) {
          const int64_t at = (first + g) * 16 + i * kWidth;
          float* to = dot + r * panel.stride + at;
          const Vec value = total[r][g].floats(i) * load(key_scale + at) * scale[r];
          put(fresh ? value : load(to) + value, to);
        }
      }
    }
  }
}

// ``rows`` queries, R at most.
template <int R, class... Rest>
inline void products_of(int64_t rows, const Rest&... rest) {
  if constexpr (R > 1) {
    if (rows < R) return products_of<R - 1>(rows, rest...);
  }
  products<R>(rest...);
}

inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// Bit j: key j of some may be within reach, by the triangle inequality.
inline uint32_t within(const float* low, const float* error, const Reach& reach) {
  const Vec edge = load(error) + reach.distance;
  return not_above(load(low), smaller(edge * edge * 1.000001f, all(kLargest)));
}

void bound(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t begin, int64_t end,
    const Reach* reach) {
  constexpr int64_t kPartsAhead = 3;  // memory needs about as long as two parts do for one query
  const int64_t tiles = (coded.batch + kRows - 1) / kRows, height = (coded.batch + tiles - 1) / tiles;
  for (int64_t block = panel.begin; block < panel.end; ++block) {
    const float* values = codes.of(block);
    const float *lengths = values + (codes.parts + (end == 1 ? 1 : 0)) * kBlock;
    const float *error = values + (codes.parts + 2) * kBlock, *apart = error + 3 * kBlock;
    const int64_t column = (block - panel.begin) * kBlock;
    uint64_t idle = 0;
    for (int64_t t = 0; reach != nullptr && t < tiles; ++t) {
      uint32_t any = 0;
      for (int64_t b = t * height; b < (t + 1) * height && b < coded.batch; ++b) {
        const float* low = panel.low + b * panel.stride + column;
        for (int i = 0; i < kBlock; i += kWidth) any |= within(low + i, error + i, reach[b]);
      }
      idle |= static_cast<uint64_t>(any == 0) << t;
    }
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * codes.part / 4, last = first + codes.part / 4;
      const int64_t quads = (last < codes.quads ? last : codes.quads) - first;
      const uint8_t* keys = codes.codes + (block * codes.quads + first) * 4 * kBlock;
      // What is fetched meanwhile: the part so many later, which may lie in a later block.
      const int64_t later = part - begin + kPartsAhead, next_part = begin + later % (end - begin);
      const int64_t next_block = block + later / (end - begin);
      const uint8_t* next = codes.codes + (next_block * codes.quads + next_part * codes.part / 4) * 4 * kBlock;
      for (int64_t t = 0, b = 0; t < tiles; ++t, b += height) {
        if (idle >> t & 1) continue;
        const int64_t rows = coded.batch - b < height ? coded.batch - b : height;
        const uint8_t* ahead = next + t * quads * 4 * kBlock / tiles;  // the tiles share in fetching them
        float* dot = (part < codes.cut() ? panel.dot : panel.tail) + b * panel.stride + column;
        products_of<kRows>(
            rows, keys, coded, b, first, quads, part, values + part * kBlock, panel, dot,
            part == 0 || part == codes.cut(), ahead, tiles);
      }
    }
    const float* square = end == 1 ? coded.head : coded.square;
    for (int64_t b = 0; b < coded.batch; ++b) {
      float* low = panel.low + b * panel.stride + column;
      for (int64_t i = 0; i < kBlock; i += kWidth) {
        // NaN where the error is infinite: such a key is never the smallest, and never ruled out.
        const Vec length = load(lengths + i);
        Vec squares = length * length + square[b] + load(error + i) * 0.0f;
        for (int64_t p = 0; p < codes.apart; ++p) {
          const Vec difference = load(apart + p * kBlock + i) - coded.apart[p * coded.batch + b];
          squares += difference * difference;
        }
        const int64_t at = b * panel.stride + column + i;
        const Vec front = load(panel.dot + at), dot = end > codes.cut() ? front + load(panel.tail + at) : front;
        put(squares - 2.0f * dot - (squares * codes.share + kTiny), low + i);
      }
      const int64_t left = idle >> b / height & 1 ? 0 : codes.count - block * kBlock;
      for (int64_t i = left; i < kBlock; ++i) low[i] = __builtin_inff();
    }
  }
}

Smallest smallest(const float* low, int64_t count) {
  Vec least = all(__builtin_inff()), total = {}, number = {};
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec value = load(low + i), zero = {};
    least = smaller(value, least);
    const auto known = value < __builtin_inff();
    total += known ? value : zero;
    number += known ? zero + 1.0f : zero;
  }
  Smallest result;
  result.mean = sum(total) / sum(number);
  result.value = -largest(-least);
  for (int64_t i = 0; i < count && result.at < 0 && result.value < __builtin_inff(); i += kWidth) {
    for (uint32_t bits = not_above(load(low + i), all(result.value)); bits != 0; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      if (result.at < 0 && low[at] == result.value) result.at = at;  // not NaN
    }
  }
  return result;
}

int64_t select(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t b, const Reach& reach, int64_t most,
    Pair* pairs) {
  int64_t found = 0;
  // By right angles, see nearest_key_coded.cpp.
  const float own = 2.00001f * (coded.error[b] + codes.drift), others = 2.00001f * coded.length[b];
  for (int64_t block = panel.begin; block < panel.end; ++block) {
    const float *lengths = codes.of(block) + codes.parts * kBlock, *error = lengths + 2 * kBlock;
    const float* low = panel.low + b * panel.stride + (block - panel.begin) * kBlock;
    for (int64_t i = 0; i < kBlock; i += kWidth) {
      const Vec doubt = load(lengths + i) * own + load(error + i) * others;
      uint32_t bits = within(low + i, error + i, reach);
      if (bits != 0) bits &= not_above(load(low + i) - doubt, all(reach.square));
      for (; bits != 0 && found < most; bits &= bits - 1) {
        pairs[found++] = {b, block * kBlock + i + __builtin_ctz(bits)};
      }
    }
  }
  return found;
}

// Code query b: as in CodedQueries.
void code(const Codes& codes, const float* query, CodedQueries& coded, int64_t b, float* x) {
  constexpr float kRounder = 12582912.0f;  // rounds to nearest: the last bits of 1.5 * 2^23 + x are x
  const int64_t padded = (codes.dim + kLanes - 1) / kLanes * kLanes, batch = coded.batch;
  for (int64_t d = 0; d < padded; d += kWidth) put(load(query + d) - load(codes.centre + d), x + d);
  double squares = 0.0;  // of the lengths of q apart and x
  for (int64_t p = 0; p < codes.apart; ++p) {
    const float value = query[codes.apart_at[p]];
    coded.apart[p * batch + b] = value;
    x[codes.apart_at[p]] = 0.0f;
    squares += static_cast<double>(value) * value;
  }
  double left = 0.0, tail_left = 0.0, decoded = 0.0;  // squares of the residue, of that behind the cut, of the rest
  Vec xx[2] = {};  // squares in front of the cut and behind it
  for (int64_t part = 0; part < codes.parts; ++part) {
    const int64_t begin = part * codes.part, end = begin + codes.part < padded ? begin + codes.part : padded;
    const bool tail = part >= codes.cut();
    Vec top = {};
    for (int64_t d = begin; d < end; d += kWidth) {
      const Vec value = load(x + d), size = value < 0.0f ? -value : value;
      top = top < size ? size : top;
      xx[tail] += value * value;
    }
    // Smaller scales would lose their precision: codes are zero then.
    const float first = largest(top) / 127.0f, inverse = first >= 1e-18f ? 1.0f / first : 0.0f;
    Vec of[4] = {};  // r^2, r n, n^2 and n, with r = x - first n
    for (int64_t d = begin; d < end; d += kWidth) {
      const Vec value = load(x + d), n = (value * inverse + kRounder) - kRounder, rest = value - first * n;
      of[0] += rest * rest;
      of[1] += rest * n;
      of[2] += n * n;
      of[3] += n;
      put(__builtin_convertvector(__builtin_convertvector(n, Ints), Bytes), coded.codes + b * coded.stride + d);
    }
    float total[4];
    sums<4>(of, total);
    // Of least squares: what is left is then at a right angle to the code.
    const double nn = total[2], change = nn > 0.0 ? total[1] / nn : 0.0, rest = total[0] - change * change * nn;
    const float scale = nn > 0.0 ? static_cast<float>(first + change) : 0.0f;
    left += rest > 0.0 ? rest : 0.0;
    tail_left += tail && rest > 0.0 ? rest : 0.0;
    decoded += static_cast<double>(scale) * scale * nn;
    coded.scale[part * batch + b] = scale;
    coded.start[part * batch + b] = -128 * static_cast<int32_t>(total[3]);
    if (part == 0) coded.head[b] = static_cast<float>(decoded);
  }
  // Subtractions round by 2^-24 of a value each, sums by another for each addition to a lane, and squares that
  // underflow amount to less than 1e-16 in length. Beyond 1e37 squares could overflow; NaN compares false.
  const double summing = (static_cast<double>(padded) / kWidth + 32) * 6.1e-8, tail_squares = sum(xx[1]);
  squares += sum(xx[0]) + tail_squares;
  const double rounded = __builtin_sqrt(squares) * 2.5e-7 + 1e-16;
  const double error = __builtin_sqrt(left) * (1 + summing) + rounded;
  coded.error[b] = squares <= 1e37 ? static_cast<float>(error * (1 + 1e-6)) : __builtin_inff();
  coded.square[b] = static_cast<float>(decoded);
  coded.length[b] = static_cast<float>((__builtin_sqrt(decoded) + error) * (1 + 1e-6));
  coded.tail_square[b] = static_cast<float>(tail_squares * (1 - summing));
  coded.tail_length[b] = static_cast<float>(__builtin_sqrt(tail_squares) * (1 + summing) + rounded);
  coded.tail_error[b] = static_cast<float>(__builtin_sqrt(tail_left) * (1 + summing) + rounded);
}
