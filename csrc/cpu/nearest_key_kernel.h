// The scan over keys, written once for all instruction sets. Included inside a namespace that defines Vec; no
// include guard on purpose, and no function from the standard library (its code would be compiled for the
// instruction set and could be linked into the others).
//
// A tile of kQueries x kKeys distances is kept in registers while the dimension runs: every key that is loaded
// serves kQueries queries, and subtract + multiply-add run at full rate, so the exact direct form costs no more
// than the expansion |q|^2 - 2 q.k + |k|^2. The next keys are fetched into the cache while a tile computes.
//
// A tile is given up as soon as all its partial sums exceed the best distances known (checked at head, 2 head,
// 4 head, ..). That is exact in floating point too: every lane only grows when a square is added, rounding keeps
// the order, and the lanes are always added up in the same order. For the same reason equal keys have equal
// distances, whatever tile they fall into.

constexpr int64_t kLine = 64;  // bytes of a cache line

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
inline float widen(Float16 x) {
  // Shift exponent and mantissa into place and rescale by 2^112; infinity and NaN need the full exponent.
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, sizeof(bits));
  if ((x.bits & 0x7c00) == 0x7c00) bits = 0x7f800000u | (magnitude & 0x007fffffu);
  bits |= sign;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

#include DUALEDIT_VECTOR

template <class T>
inline Vec load_tail(const T* p, int64_t count) {
  alignas(64) float lanes[Vec::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
  return Vec::load(lanes);
}

// Dimensions begin..end of the squared distances: out[i * K + j] = |query i - key j|^2 over 0..end. state holds the
// lanes between calls that continue each other. Meanwhile P cache lines from ``next`` on are fetched per register
// of the dimension.
template <int Q, int K, int P, class T>
inline void tile(
    const float* query, int64_t query_stride, const T* key, int64_t key_stride, int64_t begin, int64_t end,
    const char* next, float* state, float* out) {
  Vec total[Q][K];
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) total[i][j] = begin == 0 ? Vec::zero() : Vec::load(state + (i * K + j) * Vec::kWidth);
  }
  int64_t d = begin;
  for (; d + Vec::kWidth <= end; d += Vec::kWidth) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) __builtin_prefetch(next + p * kLine);
    next += P * kLine;
    Vec k[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) k[j] = Vec::load(key + j * key_stride + d);
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
      Vec q = Vec::load(query + i * query_stride + d);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) total[i][j] = total[i][j].plus_square(q - k[j]);
    }
  }
  if (d < end) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      Vec k = load_tail(key + j * key_stride + d, end - d);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        total[i][j] = total[i][j].plus_square(Vec::load(query + i * query_stride + d) - k);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) {
    Vec::sums<K>(total[i], out + i * K);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      if (state != nullptr) total[i][j].store(state + (i * K + j) * Vec::kWidth);
    }
  }
}

template <int K, int P, class T>
inline void tile(
    int64_t queries, const float* query, int64_t query_stride, const T* key, int64_t key_stride, int64_t begin,
    int64_t end, const char* next, float* state, float* out) {
#define DUALEDIT_CASE(Q)                                                                   \
  case Q:                                                                                  \
    if constexpr (Q <= Vec::kQueries) {                                                    \
      tile<Q, K, P>(query, query_stride, key, key_stride, begin, end, next, state, out);   \
    }                                                                                      \
    break
  switch (queries) {
    DUALEDIT_CASE(1);
    DUALEDIT_CASE(2);
    DUALEDIT_CASE(3);
    DUALEDIT_CASE(4);
    DUALEDIT_CASE(5);
    DUALEDIT_CASE(6);
    default:
      break;
  }
#undef DUALEDIT_CASE
}

// Whether giving up keys early pays, judged by what it saved so far.
struct Pruning {
  int64_t tried;
  int64_t evaluated;  // dimensions
  int64_t last;  // where the last key was given up

  bool pays(const Lookup& lookup) const {
    return lookup.head > 0 && (tried < 64 || evaluated * 4 < tried * lookup.dim * 3);
  }
  void count(int64_t end) {
    ++tried;
    evaluated += end;
    last = end;
  }
};

// Fetch the beginnings of some rows.
template <class T>
inline void fetch(const T* key, int64_t key_stride, int64_t rows, int64_t dims) {
  for (int64_t r = 0; r < rows; ++r) {
    const char* from = reinterpret_cast<const char*>(key + r * key_stride);
    for (int64_t byte = 0; byte < dims * static_cast<int64_t>(sizeof(T)); byte += kLine) {
      __builtin_prefetch(from + byte);
    }
  }
}

template <int K>
inline bool any_within(const float* distance, int64_t height, const float* best) {
  bool result = false;
  for (int64_t i = 0; i < height * K; ++i) result |= !(distance[i] > best[i / K]);
  return result;
}

template <int K>
inline void lower(
    const float* distance, int64_t height, int64_t first_key, Pruning* pruning, float* best, int64_t* index) {
  for (int64_t row = 0; row < height; ++row, distance += K) {
    bool any = false;
    for (int j = 0; j < K; ++j) any |= distance[j] <= best[row];
    if (!any) continue;
    for (int j = 0; j < K; ++j) {
      const int64_t n = first_key + j;
      if (distance[j] < best[row] || (distance[j] == best[row] && n < index[row])) {
        if (distance[j] * 4 < best[row]) pruning->tried = pruning->evaluated = 0;  // much nearer: ask again
        best[row] = distance[j];
        index[row] = n;
      }
    }
  }
}

// Memory to fetch while a block of keys is worked on, spread over the tiles.
struct Ahead {
  const char* from;
  const char* to;
};

// All queries of a group against a block of K keys, in tiles of nearly equal height.
template <int K, class T>
inline void group(
    const Lookup& lookup, int64_t first_query, int64_t queries, const T* key, int64_t key_stride, Ahead ahead,
    int64_t first_key, Pruning* pruning, float* best, int64_t* index) {
  float distance[Vec::kQueries * K];
  alignas(64) float state[Vec::kQueries * K * Vec::kWidth];
  const int64_t tiles = (queries + Vec::kQueries - 1) / Vec::kQueries;
  const int64_t fetched = tiles * (lookup.dim / Vec::kWidth) * kLine;  // with one line per register
  const int64_t wanted = fetched == 0 ? 0 : (ahead.to - ahead.from + fetched - 1) / fetched;
  const int64_t head = pruning->pays(lookup) ? lookup.head : lookup.dim;
  int64_t furthest = 0;
  int64_t row = first_query;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t height = queries / tiles + (t < queries % tiles ? 1 : 0);
    const float* query = lookup.query + row * lookup.stride;
    int64_t end = 0;
    do {
      const int64_t begin = end;
      end = begin == 0 ? head : 2 * begin;
      if (end > lookup.dim) end = lookup.dim;
      const int64_t lines = ahead.from >= ahead.to ? 0 : wanted <= 1 ? 1 : wanted <= 2 ? 2 : 4;
      float* keep = head < lookup.dim ? state : nullptr;
      if (K == 1 || lines == 0) {
        tile<K, 0>(height, query, lookup.stride, key, key_stride, begin, end, ahead.from, keep, distance);
      } else if (lines == 1) {
        tile<K, 1>(height, query, lookup.stride, key, key_stride, begin, end, ahead.from, keep, distance);
      } else if (lines == 2) {
        tile<K, 2>(height, query, lookup.stride, key, key_stride, begin, end, ahead.from, keep, distance);
      } else {
        tile<K, 4>(height, query, lookup.stride, key, key_stride, begin, end, ahead.from, keep, distance);
      }
      ahead.from += lines * ((end - begin) / Vec::kWidth) * kLine;
    } while (end < lookup.dim && any_within<K>(distance, height, best + row));
    if (end == lookup.dim) lower<K>(distance, height, first_key, pruning, best + row, index + row);
    if (end > furthest) furthest = end;
    row += height;
  }
  if (head < lookup.dim) pruning->count(furthest);
}

template <class T>
inline float squared_norm(const T* key, int64_t dim) {
  Vec total[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t d = 0;
  for (; d + 4 * Vec::kWidth <= dim; d += 4 * Vec::kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) total[u] = total[u].plus_square(Vec::load(key + d + u * Vec::kWidth));
  }
  for (; d < dim; d += Vec::kWidth) {
    total[0] = total[0].plus_square(
        d + Vec::kWidth <= dim ? Vec::load(key + d) : load_tail(key + d, dim - d));
  }
  return ((total[0] + total[1]) + (total[2] + total[3])).sum();
}

// Widen one key to floats, scaled to length 1 for the cosine metric (a zero key becomes NaN: never near).
template <class T>
inline void expand(const T* key, int64_t dim, bool cosine, float* out) {
  Vec scale = Vec::broadcast(cosine ? 1.0f / __builtin_sqrtf(squared_norm(key, dim)) : 1.0f);
  int64_t d = 0;
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) (Vec::load(key + d) * scale).store(out + d);
  if (d < dim) (load_tail(key + d, dim - d) * scale).store(out + d);
}

// Dimensions begin..end of one distance, added to four registers of lanes. fetch_ahead: the keys behind follow
// without a gap and will all be read.
template <class T>
inline void one(
    const float* query, const T* key, int64_t begin, int64_t end, Vec scale, bool cosine, bool fetch_ahead,
    Vec* total) {
  int64_t d = begin;
  for (; d + 4 * Vec::kWidth <= end; d += 4 * Vec::kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const int64_t at = d + u * Vec::kWidth;
      if (fetch_ahead) __builtin_prefetch(reinterpret_cast<const char*>(key + at) + 8192);
      Vec k = Vec::load(key + at);
      total[u] = total[u].plus_square(Vec::load(query + at) - (cosine ? k * scale : k));
    }
  }
  for (; d < end; d += Vec::kWidth) {
    Vec k = d + Vec::kWidth <= end ? Vec::load(key + d) : load_tail(key + d, end - d);
    total[0] = total[0].plus_square(Vec::load(query + d) - (cosine ? k * scale : k));
  }
}

// One query: a single stream of keys, as fast as memory delivers them.
template <class T>
void stream(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index) {
  constexpr int64_t kRowsAhead = 16;
  Pruning pruning{0, 0, lookup.dim};
  for (int64_t n = first; n < last; ++n) {
    const T* key = static_cast<const T*>(lookup.keys) + n * lookup.key_stride;
    const bool prune = pruning.pays(lookup);
    const bool gaps = lookup.key_stride != lookup.dim || (prune && pruning.last * 4 <= lookup.dim);
    if (gaps && n + kRowsAhead < last) {
      fetch(key + kRowsAhead * lookup.key_stride, 0, 1, pruning.last);
    }
    Vec scale = Vec::broadcast(lookup.cosine ? 1.0f / __builtin_sqrtf(squared_norm(key, lookup.dim)) : 1.0f);
    Vec total[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    float distance;
    int64_t end = 0;
    do {
      const int64_t begin = end;
      end = !prune ? lookup.dim : begin == 0 ? lookup.head : 2 * begin;
      if (end > lookup.dim) end = lookup.dim;
      one(lookup.query, key, begin, end, scale, lookup.cosine, !gaps, total);
      distance = ((total[0] + total[1]) + (total[2] + total[3])).sum();
    } while (end < lookup.dim && !(distance > best[0]));
    if (end == lookup.dim) lower<1>(&distance, 1, n, &pruning, best, index);
    if (prune) pruning.count(end);
  }
}

template <int K, class T>
inline void block(
    const Lookup& lookup, int64_t first_query, int64_t queries, int64_t n, int64_t last, Pruning* pruning,
    float* best, int64_t* index, float* scratch) {
  constexpr int64_t kBlocksAhead = 4;
  const T* key = static_cast<const T*>(lookup.keys) + n * lookup.key_stride;
  const T* next = key + K * lookup.key_stride;
  Ahead ahead{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next)};
  const bool prune = pruning->pays(lookup);
  if (lookup.key_stride != lookup.dim || (prune && pruning->last * 4 <= lookup.dim)) {
    if (n + (kBlocksAhead + 1) * K <= last) {
      fetch(key + kBlocksAhead * K * lookup.key_stride, lookup.key_stride, K, pruning->last);
    }
  } else if (n + 2 * K <= last) {
    ahead.to = reinterpret_cast<const char*>(next + K * lookup.key_stride);
  }
  // Widening 16-bit keys once pays for three tiles or more, if the floats stay in the first-level cache.
  const bool once =
      sizeof(T) != sizeof(float) && queries > 2 * Vec::kQueries && K * lookup.stride <= 6 * 1024 && !prune;
  if (lookup.cosine || once) {
    for (int j = 0; j < K; ++j) {
      expand(key + j * lookup.key_stride, lookup.dim, lookup.cosine, scratch + j * lookup.stride);
    }
    const float* ready = scratch;
    group<K>(lookup, first_query, queries, ready, lookup.stride, ahead, n, pruning, best, index);
  } else {
    group<K>(lookup, first_query, queries, key, lookup.key_stride, ahead, n, pruning, best, index);
  }
}

template <class T>
void scan_typed(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index, float* scratch) {
  if (lookup.stream) return stream<T>(lookup, first, last, best, index);
  // Queries of a group stay in the second-level cache; a panel of keys stays in the third while the groups pass.
  constexpr int64_t kGroupFloats = 96 * 1024;
  constexpr int64_t kPanelFloats = 512 * 1024;
  const int64_t fit = kGroupFloats / lookup.stride / Vec::kQueries * Vec::kQueries;
  const int64_t most = fit < Vec::kQueries ? Vec::kQueries : fit;
  const int64_t groups = (lookup.batch + most - 1) / most;
  int64_t panel = groups == 1 ? last - first : kPanelFloats / lookup.stride / Vec::kKeys * Vec::kKeys;
  if (panel < Vec::kKeys) panel = Vec::kKeys;
  Pruning pruning{0, 0, lookup.dim};
  for (int64_t begin = first; begin < last; begin += panel) {
    const int64_t end = begin + panel < last ? begin + panel : last;
    int64_t row = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t queries = lookup.batch / groups + (g < lookup.batch % groups ? 1 : 0);
      int64_t n = begin;
      for (; n + Vec::kKeys <= end; n += Vec::kKeys) {
        block<Vec::kKeys, T>(lookup, row, queries, n, end, &pruning, best, index, scratch);
      }
      for (; n < end; ++n) block<1, T>(lookup, row, queries, n, end, &pruning, best, index, scratch);
      row += queries;
    }
  }
}

void scan(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index, float* scratch) {
  switch (lookup.type) {
    case KeyType::kFloat32:
      return scan_typed<float>(lookup, first, last, best, index, scratch);
    case KeyType::kBFloat16:
      return scan_typed<BFloat16>(lookup, first, last, best, index, scratch);
    case KeyType::kFloat16:
      return scan_typed<Float16>(lookup, first, last, best, index, scratch);
  }
}

// Up to kMaxBlock pairs of a query and a key, wherever they lie: summed in the order of the tiles.
template <class T>
inline void few_typed(
    const Lookup& lookup, const Piece& now, const Piece& next, float* const* lanes, float* out, float* scratch) {
  const float* query[kMaxBlock];
  const T* key[kMaxBlock];
  const char* ahead[kMaxBlock];
  for (int64_t j = 0; j < kMaxBlock; ++j) {
    const Pair& pair = now.pairs[j < now.some ? j : 0];
    const T* from = static_cast<const T*>(lookup.keys);
    query[j] = lookup.query + pair.query * lookup.stride;
    key[j] = from + pair.key * lookup.key_stride;
    const T* then = j < next.some ? from + next.pairs[j].key * lookup.key_stride + next.begin : key[0] + now.begin;
    ahead[j] = reinterpret_cast<const char*>(then);
  }
  constexpr int64_t kStep = Vec::kWidth * sizeof(T);
  if (lookup.cosine) {
    for (int64_t j = 0; j < now.some; ++j) {
      expand(key[j], lookup.dim, true, scratch + j * lookup.stride);
      for (int64_t byte = 0; byte < lookup.dim * static_cast<int64_t>(sizeof(T)); byte += kLine) {
        __builtin_prefetch(ahead[j] + byte, 0, 2);
      }
    }
    for (int64_t j = 0; j < now.some; ++j) {
      tile<1, 1, 0>(
          query[j], lookup.stride, scratch + j * lookup.stride, lookup.stride, 0, lookup.dim, nullptr, nullptr,
          out + j);
    }
    return;
  }
  Vec total[kMaxBlock];
#pragma GCC unroll 4
  for (int j = 0; j < kMaxBlock; ++j) total[j] = now.begin == 0 ? Vec::zero() : Vec::load(lanes[j]);
  int64_t d = now.begin;
  if (query[1] == query[0] && query[2] == query[0] && query[3] == query[0]) {
    // A line of each key at a time; of the query, which stays in the first-level cache, each register once.
    constexpr int64_t kTurn = kLine / sizeof(T);
    for (const float* own = query[0]; d + kTurn <= now.end; d += kTurn) {
#pragma GCC unroll 4
      for (int j = 0; j < kMaxBlock; ++j) __builtin_prefetch(ahead[j] + (d - now.begin) * sizeof(T), 0, 2);
#pragma GCC unroll 8
      for (int64_t e = 0; e < kTurn; e += Vec::kWidth) {
        const Vec q = Vec::load(own + d + e);
#pragma GCC unroll 4
        for (int j = 0; j < kMaxBlock; ++j) total[j] = total[j].plus_square(q - Vec::load(key[j] + d + e));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kMaxBlock; ++j) ahead[j] += (d - now.begin) * sizeof(T);
  }
  for (; d + Vec::kWidth <= now.end; d += Vec::kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < kMaxBlock; ++j) {
      __builtin_prefetch(ahead[j], 0, 2);  // to the second level: the first holds what is at work
      ahead[j] += kStep;
      total[j] = total[j].plus_square(Vec::load(query[j] + d) - Vec::load(key[j] + d));
    }
  }
  if (d < now.end) {
#pragma GCC unroll 4
    for (int j = 0; j < kMaxBlock; ++j) {
      total[j] = total[j].plus_square(Vec::load(query[j] + d) - load_tail(key[j] + d, lookup.dim - d));
    }
  }
  if (now.end < lookup.dim) {
    for (int64_t j = 0; j < now.some; ++j) total[j].store(lanes[j]);
  }
  float all[kMaxBlock];
  Vec::sums<kMaxBlock>(total, all);
  for (int64_t j = 0; j < now.some; ++j) out[j] = all[j];
}

void few(
    const Lookup& lookup, const Piece& now, const Piece& next, float* const* lanes, float* out, float* scratch) {
  switch (lookup.type) {
    case KeyType::kFloat32:
      return few_typed<float>(lookup, now, next, lanes, out, scratch);
    case KeyType::kBFloat16:
      return few_typed<BFloat16>(lookup, now, next, lanes, out, scratch);
    case KeyType::kFloat16:
      return few_typed<Float16>(lookup, now, next, lanes, out, scratch);
  }
}
