// 16 keys by R rows of queries, widened to 16 bits: products of bytes in 16 bits would saturate. Included in a
// namespace compiled for AVX2.
struct Dots {
  static constexpr int kBlocks = 1;
  static constexpr int kRows = 2;  // 2 x 4 accumulators, a key and a row in 16 registers

  // out [R, kBlock]: products over some quads, on top of start [R], or if that is null of what is there. Meanwhile
  // codes are fetched.
  template <int R>
  static void tile(
      const uint8_t* keys, const int8_t* rows, int64_t quads, const int32_t* start, Fetch fetch, int32_t* out) {
    __m256i total[R][4];  // 4 keys each, two sums a key
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) total[r][u] = _mm256_setzero_si256();
    }
    for (int64_t t = 0; t < quads; ++t) {
      __builtin_prefetch(fetch.from + t * fetch.step);
      __m256i q[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        int32_t bits;
        __builtin_memcpy(&bits, rows + (t * R + r) * 4, sizeof(bits));
        q[r] = _mm256_cvtepi8_epi16(_mm_set1_epi32(bits));
      }
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const __m256i k =
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + t * 64 + u * 16)));
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) total[r][u] = _mm256_add_epi32(total[r][u], _mm256_madd_epi16(k, q[r]));
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < 4; ++u) {
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total[r][u]);
        for (int j = 0; j < 4; ++j) {
          int32_t& to = out[r * kBlock + u * 4 + j];
          to = (start != nullptr ? start[r] : to) + lanes[2 * j] + lanes[2 * j + 1];
        }
      }
    }
  }

  // out [kBlock]: sums of squares of code - 128 over some quads.
  static void squares(const uint8_t* keys, int64_t quads, int32_t* out) {
    for (int u = 0; u < 4; ++u) {
      __m256i total = _mm256_setzero_si256();
      for (int64_t t = 0; t < quads; ++t) {
        const __m256i code = _mm256_sub_epi16(
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + t * 64 + u * 16))),
            _mm256_set1_epi16(128));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(code, code));
      }
      alignas(32) int32_t lanes[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
      for (int j = 0; j < 4; ++j) out[u * 4 + j] = lanes[2 * j] + lanes[2 * j + 1];
    }
  }

  // Bit j: not low[j] > edge[j], for NaN, too.
  static uint32_t not_above(const float* low, const float* edge) {
    const __m256 a = _mm256_cmp_ps(_mm256_loadu_ps(low), _mm256_loadu_ps(edge), _CMP_NGT_UQ);
    const __m256 b = _mm256_cmp_ps(_mm256_loadu_ps(low + 8), _mm256_loadu_ps(edge + 8), _CMP_NGT_UQ);
    return static_cast<uint32_t>(_mm256_movemask_ps(a)) | static_cast<uint32_t>(_mm256_movemask_ps(b)) << 8;
  }
};
