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
};
