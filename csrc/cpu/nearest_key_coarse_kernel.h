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

#include "cpu/nearest_key_coarse_query.h"

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
inline void dots(const Blocks& blocks, const int8_t* rows, int64_t quads, const int32_t* start, Fetch fetch) {
  if constexpr (R > 4 && Kernel::kBlocks == 3) {
    const uint8_t* keys = blocks.keys;
    if (blocks.count == 3) {
      Kernel::template together<3, R>(keys, blocks.step, rows, quads, start, fetch, blocks.out, blocks.apart);
    } else if (blocks.count == 2) {
      Kernel::template together<2, R>(keys, blocks.step, rows, quads, start, fetch, blocks.out, blocks.apart);
    } else {
      Kernel::template together<1, R>(keys, blocks.step, rows, quads, start, fetch, blocks.out, blocks.apart);
    }
    return;
  }
  for (int64_t i = 0; i < blocks.count; ++i) {
    const uint8_t* keys = blocks.keys + i * blocks.step;
    const Fetch own{fetch.from + i * blocks.step, fetch.step};
    Kernel::template tile<R>(keys, rows, quads, start, own, blocks.out + i * blocks.apart);
  }
}

inline void dots(
    int64_t height, const Blocks& blocks, const int8_t* rows, int64_t quads, const int32_t* start, Fetch fetch) {
#define DUALEDIT_CASE(R)                                                              \
  case R:                                                                             \
    if constexpr (R <= Dots::kRows) dots<R>(blocks, rows, quads, start, fetch);        \
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
    const float scale = codes.scale[block * codes.parts * kBlock + j];
    out[j] = scale * scale * static_cast<float>(sum[j]);
  }
}

// Products of ``count`` blocks with the queries to which a key of them is near.
inline void multiply(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, int64_t count,
    bool head, bool there) {
  const int64_t size = codes.quads * 4 * kBlock, rows = panel.rows, tiles = tiles_of(rows);
  const int64_t step = 64 / tiles, low = rows / tiles, higher = rows % tiles;  // as height_of: a division for each would be felt
  const uint8_t* keys = codes.codes + block * size;
  const int64_t apart = (coded.parts - 1) * rows * kBlock;
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
    const bool first_part = part == 0;
    int32_t* sums = first_part ? panel.product + place * rows * kBlock : panel.others + (part - 1) * rows * kBlock;
    const int32_t* offset = quad > start ? nullptr : coded.offset + (1 + part) * rows;
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
        const Blocks blocks{now, size, sums + first * kBlock, first_part ? rows * kBlock : apart, count};
        dots(height, blocks, own, quads, offset == nullptr ? nullptr : offset + first, fetch);
      }
      first += height;
    }
    quad += quads;
  }
}

// Bounds of one block, number ``own`` of those at work, from its products in P parts.
template <int P>
inline void bound_block(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, int64_t own,
    bool head, int64_t step) {
  // In variables: what is written could be what pointers are read from, for all that compilers know.
  const int64_t rows = panel.rows, batch = panel.batch, planes = coded.planes, apart = codes.apart;
  const int64_t parts = coded.parts;
  const int32_t* product = panel.product + place * rows * kBlock;
  const int32_t* others = panel.others + own * (parts - 1) * rows * kBlock;
  const int32_t* missing = coded.offset;
  const uint16_t* near = panel.near + place * batch;
  const float* key_apart = codes.rows + block * apart * kBlock;
  const float *own_scale = coded.scale, *own_square = coded.square + (head ? 0 : batch), *own_apart = coded.apart;
  float *out = panel.low + place * batch * kBlock, *behind = panel.behind + place * kCuts * batch * kBlock;
  float* smallest = panel.smallest;
  int32_t* at = panel.at;
  const Integers number = Integers{} + static_cast<int32_t>(block - panel.start);
  Floats square, error, scale[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) get(scale[p], codes.scale + (block * parts + p) * kBlock);
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
  for (int64_t b = 0; b < batch; b += step) {
    if (near[b] == 0) continue;
    Floats dot = {};
#pragma GCC unroll 8
    for (int p = P - 1; p >= 0; --p) {
      const int32_t* from = p == 0 ? product : others + (p - 1) * rows * kBlock;
      Integers total;
      get(total, from + b * planes * kBlock);
      if (P == 1 && head) total += missing[b * planes];
      Floats value = __builtin_convertvector(total, Floats);
      if (planes == 2) {
        get(total, from + (b * planes + 1) * kBlock);
        if (P == 1 && head) total += missing[b * planes + 1];
        value = value * 256.0f + __builtin_convertvector(total, Floats);
      }
      dot += value * scale[p] * own_scale[b * parts + p];
#pragma GCC unroll 2
      for (int c = 0; c < kCuts; ++c) {
        if (P > 1 && p == first_part_behind(P, c)) put(dot, behind + (c * batch + b) * kBlock);
      }
    }
    Floats sum = square + own_square[b];
    for (int64_t p = 0; p < apart; ++p) {
      Floats other;
      get(other, key_apart + p * kBlock);
      const Floats difference = other - own_apart[b * apart + p];
      sum += difference * difference;
    }
    const Floats low = sum - 2.0f * dot - (sum * kShare + kTiny);
    put(low, out + b * kBlock);
    Floats least;
    Integers place_of;
    get(least, smallest + b * kBlock);
    get(place_of, at + b * kBlock);
    put(low < least ? number : place_of, at + b * kBlock);
    put(low < least ? low : least, smallest + b * kBlock);
  }
}

// What bounds are made of, and exact distances later: small tables, which the codes push out of the caches.
inline void fetch_tables(const Codes& codes, int64_t block, int64_t count) {
  const auto fetch = [&](const float* table, int64_t lines) {
    for (int64_t i = 0; i < count * lines; ++i) __builtin_prefetch(table + (block * lines + i) * kBlock);
  };
  fetch(codes.scale, codes.parts);
  fetch(codes.square, 1);
  fetch(codes.error, 1);
  fetch(codes.tails, codes.parts == 1 ? 0 : 2 * kCuts);
}

void bound(
    const Codes& codes, const CodedQueries& coded, const Panel& panel, int64_t block, int64_t place, int64_t count,
    bool head, bool there, int64_t step) {
  // For a single tile reading the keys is the whole cost, and one stream of them is read the fastest; heads are none.
  const int64_t some = tiles_of(panel.rows) == 1 && !head ? 1 : count;
  const auto bounds = head || coded.parts == 1 ? bound_block<1> : coded.parts == 4 ? bound_block<4> : bound_block<8>;
  for (int64_t i = 0; i < count; i += some) {
    fetch_tables(codes, block + i, some);
    multiply(codes, coded, panel, block + i, place + i, some, head, there);
    for (int64_t j = i; j < i + some; ++j) bounds(codes, coded, panel, block + j, place + j, j - i, head, step);
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
