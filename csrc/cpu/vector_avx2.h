// 8 floats in an AVX2 register. Included inside a namespace that is compiled for AVX2, FMA and F16C.
struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kQueries = 3;  // 3 x 3 accumulators, 3 keys, 1 query and 1 difference in 16 registers
  static constexpr int kKeys = 3;
  __m256 value;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, value); }
  Vec operator+(Vec other) const { return {_mm256_add_ps(value, other.value)}; }
  Vec operator-(Vec other) const { return {_mm256_sub_ps(value, other.value)}; }
  Vec operator*(Vec other) const { return {_mm256_mul_ps(value, other.value)}; }
  Vec plus_square(Vec other) const { return {_mm256_fmadd_ps(other.value, other.value, value)}; }
  float sum() const {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  template <int K>
  static void sums(const Vec* v, float* out) {
    for (int j = 0; j < K; ++j) out[j] = v[j].sum();
  }
};
