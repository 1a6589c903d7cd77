// The scan over keys, written once for all instruction sets. Included inside a namespace that defines Vec; no
// include guard on purpose, and no function from the standard library (its code would be compiled for the
// instruction set and could be linked into the others).
//
// A tile of kQueries x kKeys distances is kept in registers while the dimension runs: every key that is loaded
// serves kQueries queries, and subtract + multiply-add run at full rate, so the exact direct form costs no more
// than the expansion |q|^2 - 2 q.k + |k|^2. The next keys are fetched into the cache while a tile computes.
// Every distance is summed in the same order whatever tile it falls into, so equal keys give equal distances.

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

// out[i * K + j] = |query i - key j|^2. Meanwhile P cache lines from ``next`` on are fetched per register of the
// dimension.
template <int Q, int K, int P, class T>
inline void tile(
    const float* query, int64_t query_stride, const T* key, int64_t key_stride, int64_t dim, const char* next,
    float* out) {
  Vec total[Q][K];
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) total[i][j] = Vec::zero();
  }
  int64_t d = 0;
  for (; d + Vec::kWidth <= dim; d += Vec::kWidth) {
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
  if (d < dim) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      Vec k = load_tail(key + j * key_stride + d, dim - d);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        total[i][j] = total[i][j].plus_square(Vec::load(query + i * query_stride + d) - k);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) out[i * K + j] = total[i][j].sum();
  }
}

template <int K, int P, class T>
inline void tile(
    int64_t queries, const float* query, int64_t query_stride, const T* key, int64_t key_stride, int64_t dim,
    const char* next, float* out) {
#define DUALEDIT_CASE(Q)                                                                               \
  case Q:                                                                                              \
    if constexpr (Q <= Vec::kQueries) {                                                                \
      tile<Q, K, P>(query, query_stride, key, key_stride, dim, next, out);                             \
    }                                                                                                  \
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

// Memory to fetch while a block of keys is worked on, spread over the tiles.
struct Ahead {
  const char* from;
  const char* to;
};

// All queries of a group against a block of K keys, in tiles of nearly equal height.
template <int K, class T>
inline void group(
    const Lookup& lookup, int64_t first_query, int64_t queries, const T* key, int64_t key_stride, Ahead ahead,
    int64_t first_key, float* best, int64_t* index) {
  float distance[Vec::kQueries * K];
  const int64_t tiles = (queries + Vec::kQueries - 1) / Vec::kQueries;
  const int64_t steps = lookup.dim / Vec::kWidth;
  const int64_t wanted = (ahead.to - ahead.from + tiles * steps * kLine - 1) / (tiles * steps * kLine + 1);
  int64_t begin = first_query;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t height = queries / tiles + (t < queries % tiles ? 1 : 0);
    const float* query = lookup.query + begin * lookup.stride;
    const int64_t lines = ahead.from >= ahead.to ? 0 : wanted <= 1 ? 1 : wanted <= 2 ? 2 : 4;
    if (K == 1 || lines == 0) {
      tile<K, 0>(height, query, lookup.stride, key, key_stride, lookup.dim, ahead.from, distance);
    } else if (lines == 1) {
      tile<K, 1>(height, query, lookup.stride, key, key_stride, lookup.dim, ahead.from, distance);
    } else if (lines == 2) {
      tile<K, 2>(height, query, lookup.stride, key, key_stride, lookup.dim, ahead.from, distance);
    } else {
      tile<K, 4>(height, query, lookup.stride, key, key_stride, lookup.dim, ahead.from, distance);
    }
    ahead.from += lines * steps * kLine;
    for (int64_t i = 0; i < height * K; ++i) {
      if (distance[i] < best[begin + i / K]) {
        best[begin + i / K] = distance[i];
        index[begin + i / K] = first_key + i % K;
      }
    }
    begin += height;
  }
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

// One query: a single stream of keys, as fast as memory delivers them.
template <class T>
inline float one(const float* query, const T* key, int64_t dim, bool cosine) {
  constexpr int kUnroll = 8;
  Vec scale = Vec::broadcast(cosine ? 1.0f / __builtin_sqrtf(squared_norm(key, dim)) : 1.0f);
  Vec total[kUnroll];
  for (int u = 0; u < kUnroll; ++u) total[u] = Vec::zero();
  int64_t d = 0;
  for (; d + kUnroll * Vec::kWidth <= dim; d += kUnroll * Vec::kWidth) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
      int64_t at = d + u * Vec::kWidth;
      __builtin_prefetch(reinterpret_cast<const char*>(key + at) + 8192);
      Vec k = Vec::load(key + at);
      total[u] = total[u].plus_square(Vec::load(query + at) - (cosine ? k * scale : k));
    }
  }
  for (; d < dim; d += Vec::kWidth) {
    Vec k = d + Vec::kWidth <= dim ? Vec::load(key + d) : load_tail(key + d, dim - d);
    total[0] = total[0].plus_square(Vec::load(query + d) - (cosine ? k * scale : k));
  }
  for (int step = kUnroll / 2; step > 0; step /= 2) {
    for (int u = 0; u < step; ++u) total[u] = total[u] + total[u + step];
  }
  return total[0].sum();
}

template <int K, class T>
inline void block(
    const Lookup& lookup, int64_t first_query, int64_t queries, int64_t n, int64_t last, float* best,
    int64_t* index, float* scratch) {
  const T* key = static_cast<const T*>(lookup.keys) + n * lookup.dim;
  // The next rows, as far as they are whole and inside the range.
  const T* next = key + K * lookup.dim;
  Ahead ahead{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next)};
  if (n + 2 * K <= last) ahead.to = reinterpret_cast<const char*>(next + K * lookup.dim);
  // Widening 16-bit keys once pays for three tiles or more, if the floats stay in the first-level cache.
  const bool once = sizeof(T) != sizeof(float) && queries > 2 * Vec::kQueries && K * lookup.stride <= 6 * 1024;
  if (lookup.cosine || once) {
    for (int j = 0; j < K; ++j) {
      expand(key + j * lookup.dim, lookup.dim, lookup.cosine, scratch + j * lookup.stride);
    }
    const float* ready = scratch;
    group<K>(lookup, first_query, queries, ready, lookup.stride, ahead, n, best, index);
  } else {
    group<K>(lookup, first_query, queries, key, lookup.dim, ahead, n, best, index);
  }
}

template <class T>
void scan_typed(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index, float* scratch) {
  if (lookup.batch == 1) {
    const T* keys = static_cast<const T*>(lookup.keys);
    for (int64_t n = first; n < last; ++n) {
      float distance = one(lookup.query, keys + n * lookup.dim, lookup.dim, lookup.cosine);
      if (distance < best[0]) {
        best[0] = distance;
        index[0] = n;
      }
    }
    return;
  }
  // Queries of a group stay in the second-level cache; a panel of keys stays in the third while the groups pass.
  constexpr int64_t kGroupFloats = 96 * 1024;
  constexpr int64_t kPanelFloats = 512 * 1024;
  int64_t fit = kGroupFloats / lookup.stride / Vec::kQueries * Vec::kQueries;
  int64_t groups = fit < Vec::kQueries ? (lookup.batch + Vec::kQueries - 1) / Vec::kQueries
                                       : (lookup.batch + fit - 1) / fit;
  int64_t panel = groups == 1 ? last - first : kPanelFloats / lookup.stride / Vec::kKeys * Vec::kKeys;
  if (panel < Vec::kKeys) panel = Vec::kKeys;
  for (int64_t begin = first; begin < last; begin += panel) {
    int64_t end = begin + panel < last ? begin + panel : last;
    int64_t first_query = 0;
    for (int64_t g = 0; g < groups; ++g) {
      int64_t queries = lookup.batch / groups + (g < lookup.batch % groups ? 1 : 0);
      int64_t n = begin;
      for (; n + Vec::kKeys <= end; n += Vec::kKeys) {
        block<Vec::kKeys, T>(lookup, first_query, queries, n, end, best, index, scratch);
      }
      for (; n < end; ++n) block<1, T>(lookup, first_query, queries, n, end, best, index, scratch);
      first_query += queries;
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
