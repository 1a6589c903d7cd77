// Exact distances, written once for all instruction sets. Included behind vector.h; no include guard on purpose, and
// no function from the standard library (its code would be compiled for the instruction set and could be linked into
// the others).
//
// A tile of kQueries x kKeys distances is kept in registers while the dimension runs: every key that is loaded
// serves kQueries queries, and subtract + multiply-add run at full rate, so the exact direct form costs no more
// than the expansion |q|^2 - 2 q.k + |k|^2. The next keys are fetched into the cache while a tile computes.
//
// A tile is given up as soon as all its partial sums exceed the best distances known (checked at head, 2 head,
// 4 head, ..). That is exact in floating point too: every lane only grows when a square is added, rounding keeps
// the order, and the lanes are always added up in the same order. For the same reason equal keys have equal
// distances, whatever tile they fall into, and `measure` finds the distances of the tiles.

template <class T>
inline Vec load_tail(const T* p, int64_t count) {
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
inline float squared_norm(const T* key, int64_t dim) {
  Vec total[4] = {};
  int64_t d = 0;
  for (; d + 4 * kWidth <= dim; d += 4 * kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) total[u] = plus_square(total[u], load(key + d + u * kWidth));
  }
  for (; d + kWidth <= dim; d += kWidth) total[0] = plus_square(total[0], load(key + d));
  if (d < dim) total[0] = plus_square(total[0], load_tail(key + d, dim - d));
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// What keys are multiplied by: to length 1 for the cosine metric (a zero key becomes NaN: never near).
template <bool Cosine, class T>
inline Vec scale_of(const T* key, int64_t dim) {
  return Cosine ? all(1.0f / __builtin_sqrtf(squared_norm(key, dim))) : Vec{};
}
template <bool Cosine>
inline Vec scaled(Vec key, Vec scale) {
  return Cosine ? key * scale : key;
}

// What to fetch into the cache with each register of the dimension: some lines, so many bytes apart, and ``step``
// bytes further each time.
struct Ahead {
  const char* from;
  int64_t lines;
  int64_t apart;
  int64_t step;
};

// distance[i * K + j] = |query i - key j|^2. Returns the dimension where the tile was given up, or dim.
template <int Q, int K, bool Cosine, class T>
inline int64_t tile(
    const Lookup& lookup, const float* query, const T* keys, int64_t head, Ahead ahead, const float* best,
    float* distance) {
  const int64_t dim = lookup.dim;
  const T* key[K];
  Vec scale[K], total[Q][K] = {};
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) {
    key[j] = keys + j * lookup.key_stride;
    scale[j] = scale_of<Cosine>(key[j], dim);
  }
  for (int64_t d = 0, stop = head;; stop *= 2) {
    if (stop > dim) stop = dim;
    for (; d + kWidth <= stop; d += kWidth) {
      for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.from + line * ahead.apart);
      ahead.from += ahead.step;
      Vec k[K];
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) k[j] = scaled<Cosine>(load(key[j] + d), scale[j]);
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) {
        const Vec q = load(query + i * lookup.stride + d);
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) total[i][j] = plus_square(total[i][j], q - k[j]);
      }
    }
    if (stop == dim && d < dim) {
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const Vec k = scaled<Cosine>(load_tail(key[j] + d, dim - d), scale[j]);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) total[i][j] = plus_square(total[i][j], load(query + i * lookup.stride + d) - k);
      }
    }
    bool within = false;
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
      sums<K>(total[i], distance + i * K);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) within |= !(distance[i * K + j] > best[i]);
    }
    if (stop == dim || !within) return stop;
  }
}

// ``queries`` rows, Q at most.
template <int Q, int K, bool Cosine, class T>
inline int64_t tile_of(
    int64_t queries, const Lookup& lookup, const float* query, const T* keys, int64_t head, const Ahead& ahead,
    const float* best, float* distance) {
  if constexpr (Q > 1) {
    if (queries < Q) return tile_of<Q - 1, K, Cosine>(queries, lookup, query, keys, head, ahead, best, distance);
  }
  return tile<Q, K, Cosine>(lookup, query, keys, head, ahead, best, distance);
}

// Whether giving up keys early pays, judged by what it saved so far.
struct Pruning {
  int64_t tried = 0;
  int64_t evaluated = 0;  // dimensions

  bool pays(const Lookup& lookup) const {
    return lookup.head > 0 && (tried < 64 || evaluated * 4 < tried * lookup.dim * 3);
  }
};

// Queries first_query.. against the keys n..n + K, in tiles of nearly equal height, Q at most.
template <int Q, int K, bool Cosine, class T>
inline void block(
    const Lookup& lookup, int64_t first_query, int64_t queries, int64_t n, Pruning& pruning, float* best,
    int64_t* index) {
  const T* keys = static_cast<const T*>(lookup.keys) + n * lookup.key_stride;
  const int64_t tiles = (queries + Q - 1) / Q, head = pruning.pays(lookup) ? lookup.head : lookup.dim;
  // Keys that are read whole follow without a gap, and the tiles share in fetching them. Of those that may be given up
  // their beginnings are fetched, some blocks ahead.
  constexpr int64_t kLine = 64, kRow = kWidth * sizeof(T), kBlocksAhead = 4;
  const bool whole = head == lookup.dim && lookup.key_stride == lookup.dim;
  const int64_t stride = lookup.key_stride * sizeof(T);
  const int64_t lines = (K * kRow + kLine * tiles - 1) / (kLine * tiles);
  const char* next = reinterpret_cast<const char*>(keys) + K * stride;
  Ahead ahead{next, lines, kLine, lines * kLine};
  if (!whole) ahead = {next + (kBlocksAhead - 1) * K * stride, K, stride, kRow};
  int64_t row = first_query, furthest = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t height = queries / tiles + (t < queries % tiles ? 1 : 0);
    float distance[Q * K];
    const float* query = lookup.query + row * lookup.stride;
    const int64_t end =
        tile_of<Q, K, Cosine>(height, lookup, query, keys, head, ahead, best + row, distance);
    if (whole) {
      ahead.from += lookup.dim / kWidth * ahead.step;
      if (ahead.from >= next + K * stride) ahead.lines = 0;
    } else {
      ahead.lines = 0;
    }
    furthest = end > furthest ? end : furthest;
    for (int64_t i = row; i < (end == lookup.dim ? row + height : 0); ++i) {
      const float* own = distance + (i - row) * K;
      bool nearer = false;
      for (int j = 0; j < K; ++j) nearer |= own[j] <= best[i];
      for (int j = 0; nearer && j < K; ++j) {
        if (!(own[j] < best[i] || (own[j] == best[i] && n + j < index[i]))) continue;
        if (own[j] * 4 < best[i]) pruning = Pruning{};  // much nearer: ask again
        best[i] = own[j];
        index[i] = n + j;
      }
    }
    row += height;
  }
  if (head < lookup.dim) {
    ++pruning.tried;
    pruning.evaluated += furthest;
  }
}

template <bool Cosine, class T>
void scan_typed(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index) {
  // Queries of a group stay in the second-level cache while the keys pass.
  constexpr int64_t kGroupFloats = 160 * 1024;
  const int64_t fit = kGroupFloats / lookup.stride / kQueries * kQueries, most = fit < kQueries ? kQueries : fit;
  for (int64_t row = 0; row < lookup.batch; row += most) {
    const int64_t queries = lookup.batch - row < most ? lookup.batch - row : most;
    Pruning pruning;
    int64_t n = first;
    for (; n + kKeys <= last; n += kKeys) {
      block<kQueries, kKeys, Cosine, T>(lookup, row, queries, n, pruning, best, index);
    }
    for (; n < last; ++n) block<1, 1, Cosine, T>(lookup, row, queries, n, pruning, best, index);
  }
}

// Some pairs at a time, wherever they lie, summed in the order of the tiles; meanwhile the next ones are fetched.
template <bool Cosine, class T>
void measure_typed(const Lookup& lookup, const Pair* pairs, int64_t count, int64_t cut, float* squared) {
  constexpr int kPairs = 4;
  const T* keys = static_cast<const T*>(lookup.keys);
  const int64_t whole = lookup.dim / kWidth * kWidth, stop = cut > 0 ? cut : whole;
  for (int64_t first = 0; first < count; first += kPairs) {
    const float* query[kPairs];
    const T *key[kPairs], *next[kPairs];
    Vec scale[kPairs], total[kPairs] = {};
    for (int j = 0; j < kPairs; ++j) {
      const int64_t at = first + j < count ? first + j : count - 1, then = at + kPairs < count ? at + kPairs : at;
      query[j] = lookup.query + pairs[at].query * lookup.stride;
      key[j] = keys + pairs[at].key * lookup.key_stride;
      next[j] = keys + pairs[then].key * lookup.key_stride;
      scale[j] = scale_of<Cosine>(key[j], lookup.dim);
    }
    const auto add = [&](int j, int64_t d, Vec k) {
      total[j] = plus_square(total[j], load(query[j] + d) - scaled<Cosine>(k, scale[j]));
    };
    for (int64_t d = 0; d < stop; d += kWidth) {
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j) {
        __builtin_prefetch(next[j] + d, 0, 2);
        add(j, d, load(key[j] + d));
      }
    }
    for (int j = 0; j < kPairs && first + j < count; ++j) {
      squared[first + j] = __builtin_inff();
      if (cut > 0 && sum(total[j]) > pairs[first + j].enough) continue;
      for (int64_t d = stop; d < whole; d += kWidth) add(j, d, load(key[j] + d));
      if (whole < lookup.dim) add(j, whole, load_tail(key[j] + whole, lookup.dim - whole));
      squared[first + j] = sum(total[j]);
    }
  }
}

template <bool Value>
struct Flag {
  static constexpr bool value = Value;
};

// Calls ``run`` with a value of the keys' type and whether the metric is the cosine.
template <class Run>
inline void typed(const Lookup& lookup, const Run& run) {
  const auto with = [&](auto type) { lookup.cosine ? run(type, Flag<true>{}) : run(type, Flag<false>{}); };
  switch (lookup.type) {
    case KeyType::kFloat32:
      return with(float{});
    case KeyType::kBFloat16:
      return with(BFloat16{});
    case KeyType::kFloat16:
      return with(Float16{});
  }
}

void scan(const Lookup& lookup, int64_t first, int64_t last, float* best, int64_t* index) {
  typed(lookup, [&](auto type, auto cosine) {
    scan_typed<decltype(cosine)::value, decltype(type)>(lookup, first, last, best, index);
  });
}

void measure(const Lookup& lookup, const Pair* pairs, int64_t count, int64_t cut, float* squared) {
  typed(lookup, [&](auto type, auto cosine) {
    measure_typed<decltype(cosine)::value, decltype(type)>(lookup, pairs, count, cut, squared);
  });
}
