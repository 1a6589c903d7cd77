// 16 floats in an AVX-512 register. Included inside a namespace that is compiled for AVX-512.
struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kQueries = 6;  // 6 x 4 accumulators, 4 keys, 1 query and 1 difference in 32 registers
  static constexpr int kKeys = 4;
  __m512 value;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, value); }
  Vec operator+(Vec other) const { return {_mm512_add_ps(value, other.value)}; }
  Vec operator-(Vec other) const { return {_mm512_sub_ps(value, other.value)}; }
  Vec operator*(Vec other) const { return {_mm512_mul_ps(value, other.value)}; }
  Vec plus_square(Vec other) const { return {_mm512_fmadd_ps(other.value, other.value, value)}; }
  float sum() const { return _mm512_reduce_add_ps(value); }

  // Sums of 4 registers at once, or of one in the same order.
  static __m128 four(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  }
  template <int K>
  static void sums(const Vec* v, float* out) {
    static_assert(K == 1 || K == 4, "tiles are 4 keys wide, or 1");
    if constexpr (K == 4) {
      _mm_storeu_ps(out, four(v[0].value, v[1].value, v[2].value, v[3].value));
    } else {
      __m512 none = _mm512_setzero_ps();
      out[0] = _mm_cvtss_f32(four(v[0].value, none, none, none));
    }
  }
};
