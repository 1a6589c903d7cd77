// Attention in bf16 for AVX512-BF16. Included inside a namespace that is compiled for it; no include guard on purpose,
// and no function from the standard library (its code could be linked into what other processors run).
//
// The scores of kRows queries with all keys of a head stay in the first-level cache: product, softmax, product. Keys
// and values are packed once for a head, in pairs as the multiply-add wants them, and stay in the second-level cache.

constexpr int64_t kWide = 16;  // floats, or pairs of bf16, in a register
constexpr int64_t kPair = 2 * kWide;  // columns of a tile
constexpr int kRows = 12;  // 12 x 2 accumulators, 2 columns and 1 query in 32 registers

inline int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// The memory of one thread.
struct Room {
  explicit Room(const Attention& a)
      : keys(padded(a.keys, kPair)),
        size(padded(a.size, kPair)),
        k(0),
        v(k + keys * size / 2),
        q(v + keys * size / 2),
        scores(q + kRows * size / 2),
        weights(scores + kRows * keys),
        floats(weights + kRows * keys / 2) {}

  int64_t keys;  // of the edit, and up to a whole tile
  int64_t size;  // of a head, likewise
  // Where parts begin, in floats.
  int64_t k;  // [keys / 16, size / 2, 16] pairs of dimensions
  int64_t v;  // [size / 16, keys / 2, 16] pairs of keys
  int64_t q;  // [kRows, size] bf16
  int64_t scores;  // [kRows, keys] fp32
  int64_t weights;  // [kRows, keys] bf16
  int64_t floats;  // of all
};

inline __mmask16 first(int64_t count) {
  return count >= kWide ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// The compiler's intrinsic copies accumulators around.
inline void add(__m512& total, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
}

inline int32_t pair_of(const uint16_t* from, int64_t at, int64_t count) {
  const uint32_t low = at < count ? from[at] : 0, high = at + 1 < count ? from[at + 1] : 0;
  return static_cast<int32_t>(low | high << 16);
}

// Keys of a head, zero beyond the last key and dimension.
inline void pack_keys(const Attention& a, int64_t head, const Room& room, int32_t* out) {
  const uint16_t* k = a.k + head * a.size;
  for (int64_t n = 0; n < room.keys; n += kWide) {
    for (int64_t d = 0; d < room.size; d += 2, out += kWide) {
      for (int64_t j = 0; j < kWide; ++j) {
        out[j] = n + j < a.keys ? pair_of(k + (n + j) * a.k_stride, d, a.size) : 0;
      }
    }
  }
}

// 16 dimensions of a key as integers, zero beyond the last.
inline __m512i widened(const Attention& a, int64_t head, int64_t key, int64_t d) {
  const uint16_t* from = a.v + key * a.v_stride + head * a.size + d;
  const __mmask16 mask = key < a.keys ? first(a.size - d) : 0;
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}

inline void pack_values(const Attention& a, int64_t head, const Room& room, int32_t* out) {
  for (int64_t d = 0; d < room.size; d += kWide) {
    for (int64_t n = 0; n < room.keys; n += 2, out += kWide) {
      const __m512i high = _mm512_slli_epi32(widened(a, head, n + 1, d), 16);
      _mm512_storeu_si512(out, _mm512_or_si512(widened(a, head, n, d), high));
    }
  }
}

// Products of kRows rows [kRows, 2 * pairs] with two columns' worth of packed pairs.
inline void tile(const uint16_t* rows, int64_t stride, const int32_t* one, int64_t pairs, __m512 (*total)[2]) {
  const int32_t* other = one + pairs * kWide;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512i left = _mm512_loadu_si512(one + p * kWide), right = _mm512_loadu_si512(other + p * kWide);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int32_t two;
      __builtin_memcpy(&two, rows + r * stride + 2 * p, sizeof(two));
      const __m512i row = _mm512_set1_epi32(two);
      add(total[r][0], row, left);
      add(total[r][1], row, right);
    }
  }
}

// 2^x for x <= 0, to 3e-6 of it; 0 far below.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // NaN stays: the second operand is returned
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(0.0013333558f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0096181291f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0555041087f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.2402265070f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.6931471806f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

inline __m512 as_floats(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// Weights [keys] in bf16, the largest of size 1, of scores in fp32; 1 / their sum.
inline float softmax(const float* scores, int64_t keys, float scale, uint16_t* weights) {
  __m512 most = _mm512_loadu_ps(scores);
  for (int64_t n = kWide; n < keys; n += kWide) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + n));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), unit = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t n = 0; n < keys; n += kWide) {
    const __m512 weight = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + n), top), unit));
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weight);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + n), rounded);
    sum = _mm512_add_ps(sum, as_floats(rounded));  // of what is multiplied with the values
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

// kRows queries of a head at most, from ``row`` on.
inline void attend_rows(const Attention& a, int64_t head, int64_t row, const Room& room, float* memory) {
  const int64_t rows = a.queries - row < kRows ? a.queries - row : kRows;
  auto* q = reinterpret_cast<uint16_t*>(memory + room.q);
  auto* weights = reinterpret_cast<uint16_t*>(memory + room.weights);
  float* scores = memory + room.scores;
  for (int64_t r = 0; r < kRows; ++r) {
    const uint16_t* from = a.q + (row + r) * a.q_stride + head * a.size;
    for (int64_t d = 0; d < room.size; d += kWide) {
      const __mmask16 mask = r < rows ? first(a.size - d) : 0;
      const __m256i values = _mm256_maskz_loadu_epi16(mask, from + d);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + r * room.size + d), values);
    }
  }
  __m512 total[kRows][2];
  const __m512 none = _mm512_set1_ps(-__builtin_inff());
  for (int64_t n = 0; n < room.keys; n += kPair) {
    tile(q, room.size, reinterpret_cast<int32_t*>(memory + room.k) + n * room.size / 2, room.size / 2, total);
    const __mmask16 left = first(a.keys - n), right = first(a.keys - n - kWide);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(scores + r * room.keys + n, _mm512_mask_mov_ps(none, left, total[r][0]));
      _mm512_storeu_ps(scores + r * room.keys + n + kWide, _mm512_mask_mov_ps(none, right, total[r][1]));
    }
  }
  float share[kRows];
  const float scale = 1.4426950408889634f / __builtin_sqrtf(static_cast<float>(a.size));  // log2(e)
  for (int64_t r = 0; r < kRows; ++r) {
    share[r] = softmax(scores + r * room.keys, room.keys, scale, weights + r * room.keys);
  }
  for (int64_t d = 0; d < a.size; d += kPair) {
    tile(weights, room.keys, reinterpret_cast<int32_t*>(memory + room.v) + d * room.keys / 2, room.keys / 2, total);
    const __mmask16 left = first(a.size - d), right = first(a.size - d - kWide);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const __m512 unit = _mm512_set1_ps(share[r]);
      uint16_t* to = a.out + (row + r) * a.heads * a.size + head * a.size + d;
      _mm256_mask_storeu_epi16(to, left, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(total[r][0], unit)));
      _mm256_mask_storeu_epi16(to + kWide, right, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(total[r][1], unit)));
    }
  }
}

// Queries begin..end of a head.
void attend(const Attention& a, int64_t head, int64_t begin, int64_t end, const Room& room, float* memory) {
  pack_keys(a, head, room, reinterpret_cast<int32_t*>(memory + room.k));
  pack_values(a, head, room, reinterpret_cast<int32_t*>(memory + room.v));
  Attention part = a;
  part.queries = end;
  for (int64_t row = begin; row < end; row += kRows) attend_rows(part, head, row, room, memory);
}
