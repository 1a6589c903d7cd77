// Vectors of floats and products of bytes with the instruction set DUALEDIT_ISA, numbered as in Isa. Included once for
// each, inside a namespace that is compiled for it; no include guard on purpose.
#if DUALEDIT_ISA == 2
constexpr int kWidth = 16;
constexpr int kQueries = 6, kKeys = 4;  // 6 x 4 sums, 4 keys, 1 query and 1 difference in 32 registers
#elif DUALEDIT_ISA == 1
constexpr int kWidth = 8;
constexpr int kQueries = 3, kKeys = 3;  // 3 x 3 sums, 3 keys, 1 query and 1 difference in 16 registers
#else
constexpr int kWidth = 4;
constexpr int kQueries = 2, kKeys = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef int8_t Bytes __attribute__((vector_size(kWidth)));

template <class V>
inline V get(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}
template <class V>
inline void put(const V& value, void* to) {
  __builtin_memcpy(to, &value, sizeof(V));
}

inline Vec all(float x) { return x - Vec{}; }
inline Vec load(const float* p) { return get<Vec>(p); }
// 16-bit integers as 32-bit ones. By intrinsics, because gcc converts 256 bits at a time.
inline Ints widened(const void* p) {
#if DUALEDIT_ISA == 2
  return (Ints)_mm512_cvtepu16_epi32(get<__m256i>(p));
#elif DUALEDIT_ISA == 1
  return (Ints)_mm256_cvtepu16_epi32(get<__m128i>(p));
#else
  return __builtin_convertvector(get<Halves>(p), Ints);
#endif
}
inline Vec load(const BFloat16* p) { return (Vec)(widened(p) << 16); }
inline Vec load(const Float16* p) {
#if DUALEDIT_ISA == 2
  return (Vec)_mm512_cvtph_ps(get<__m256i>(p));
#elif DUALEDIT_ISA == 1
  return (Vec)_mm256_cvtph_ps(get<__m128i>(p));
#else
  // Exponent and mantissa move into place and are scaled by 2^112; infinity and NaN need the full exponent.
  const Ints bits = widened(p), size = (bits & 0x7fff) << 13;
  const Ints scaled = (Ints)((Vec)size * 5.192296858534828e33f);
  return (Vec)(((bits & 0x7c00) == 0x7c00 ? size | 0x7f800000 : scaled) | (bits & 0x8000) << 16);
#endif
}

// total + x * x, rounded once where the instruction set can.
inline Vec plus_square(Vec total, Vec x) {
#if DUALEDIT_ISA == 2
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)x, (__m512)total);
#elif DUALEDIT_ISA == 1
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)x, (__m256)total);
#else
  return total + x * x;
#endif
}

// The sum of all lanes, always in the same order; K sums are computed side by side.
#if DUALEDIT_ISA == 2
inline __m128 four_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const __m512 lanes = (__m512)low + (__m512)high;
  const __m256 halves = _mm512_castps512_ps256(lanes) + _mm512_extractf32x8_ps(lanes, 1);
  return _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
}
#endif
inline float sum(Vec v) {
#if DUALEDIT_ISA == 2
  return four_sums((__m512)v, __m512{}, __m512{}, __m512{})[0];
#else
#if DUALEDIT_ISA == 1
  const __m128 four = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
#else
  const Vec four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}
template <int K>
inline void sums(const Vec* v, float* out) {
#if DUALEDIT_ISA == 2
  if constexpr (K == 4) return put(four_sums((__m512)v[0], (__m512)v[1], (__m512)v[2], (__m512)v[3]), out);
#endif
  for (int j = 0; j < K; ++j) out[j] = sum(v[j]);
}

inline float largest(Vec v) {
#if DUALEDIT_ISA == 2
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int j = 1; j < kWidth; ++j) most = v[j] > most ? v[j] : most;
  return most;
#endif
}

// Bit j: not a[j] > b[j], for NaN, too.
inline uint32_t not_above(Vec a, Vec b) {
#if DUALEDIT_ISA == 2
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NGT_UQ);
#elif DUALEDIT_ISA == 1
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NGT_UQ)));
#else
  uint32_t bits = 0;
  for (int j = 0; j < kWidth; ++j) bits |= static_cast<uint32_t>(!(a[j] > b[j])) << j;
  return bits;
#endif
}

// Products of the codes of 16 keys (unsigned) with those of a query (signed), four dimensions at a time.
#if DUALEDIT_ISA == 2
constexpr int kRows = 8, kGroups = 3;  // 8 queries x 3 x 16 keys of sums, 3 x 16 keys and 1 query in 32 registers
struct Dots {
  typedef __m512i Keys;
  typedef __m512i Query;
  __m512i sums;

  static Keys keys(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Query query(int32_t four) { return _mm512_set1_epi32(four); }
  static Dots start(int32_t x) { return {_mm512_set1_epi32(x)}; }
  // Assembly, because compilers copy every sum twice around the intrinsic, which halves the speed.
  void add(Keys keys, Query query) { asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(keys), "v"(query)); }
  Vec floats(int) const { return (Vec)_mm512_cvtepi32_ps(sums); }
};
#elif DUALEDIT_ISA == 1
constexpr int kRows = 2, kGroups = 1;
struct Dots {
  struct Keys {
    __m256i four[4];  // widened: products of bytes in 16 bits would saturate
  };
  typedef __m256i Query;
  __m256i sums[4];  // two for each key

  static Keys keys(const uint8_t* p) {
    Keys keys;
    for (int u = 0; u < 4; ++u) keys.four[u] = _mm256_cvtepu8_epi16(get<__m128i>(p + u * 16));
    return keys;
  }
  static Query query(int32_t four) { return _mm256_cvtepi8_epi16(_mm_set1_epi32(four)); }
  static Dots start(int32_t x) {
    const __m256i first = _mm256_set1_epi64x(static_cast<uint32_t>(x));
    return {{first, first, first, first}};
  }
  void add(const Keys& keys, Query query) {
    for (int u = 0; u < 4; ++u) sums[u] = _mm256_add_epi32(sums[u], _mm256_madd_epi16(keys.four[u], query));
  }
  Vec floats(int half) const {
    const __m256i pairs = _mm256_hadd_epi32(sums[2 * half], sums[2 * half + 1]);
    return (Vec)_mm256_cvtepi32_ps(_mm256_permute4x64_epi64(pairs, 0xd8));
  }
};
#else
constexpr int kRows = 1, kGroups = 1;
struct Dots {
  typedef const uint8_t* Keys;
  typedef int32_t Query;
  int32_t sums[16];

  static Keys keys(const uint8_t* p) { return p; }
  static Query query(int32_t four) { return four; }
  static Dots start(int32_t x) {
    Dots dots;
    for (int j = 0; j < 16; ++j) dots.sums[j] = x;
    return dots;
  }
  void add(Keys keys, Query query) {
    int8_t q[4];
    __builtin_memcpy(q, &query, sizeof(q));
    for (int j = 0; j < 16; ++j) {
      const uint8_t* k = keys + 4 * j;
      sums[j] += k[0] * q[0] + k[1] * q[1] + k[2] * q[2] + k[3] * q[3];
    }
  }
  Vec floats(int part) const { return __builtin_convertvector(get<Ints>(sums + part * kWidth), Vec); }
};
#endif
