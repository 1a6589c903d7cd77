// 16 keys by R rows of queries, 64 products an instruction. Included in a namespace compiled for AVX512-VNNI.
struct Dots {
  static constexpr int kRows = 8;
  static constexpr int kBlocks = 2;  // side by side: a row that is loaded serves both

  // out [R, kBlock]: products over some quads, on top of what is there if ``more``. Meanwhile codes are
  // fetched.
  template <int R>
  static void tile(const uint8_t* keys, const int8_t* rows, int64_t quads, bool more, Fetch fetch, int32_t* out) {
    // Few rows: more accumulators, so that a multiply-add need not wait for the one before.
    constexpr int U = R == 1 ? 8 : R == 2 ? 4 : R <= 4 ? 2 : 1;
    __m512i total[R][U];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) total[r][u] = _mm512_setzero_si512();
      if (more) total[r][0] = _mm512_loadu_si512(out + r * kBlock);
    }
    int64_t t = 0;
    for (; t + U <= quads; t += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        __builtin_prefetch(fetch.from + (t + u) * fetch.step);
        const __m512i k = _mm512_loadu_si512(keys + (t + u) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add(total[r][u], k, rows + ((t + u) * R + r) * 4);
      }
    }
    for (; t < quads; ++t) {
      const __m512i k = _mm512_loadu_si512(keys + t * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) add(total[r][0], k, rows + (t * R + r) * 4);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) total[r][0] = _mm512_add_epi32(total[r][0], total[r][u]);
      _mm512_storeu_si512(out + r * kBlock, total[r][0]);
    }
  }

  // The same for two blocks, ``step`` bytes apart, whose products are ``apart`` integers apart.
  template <int R>
  static void two(
      const uint8_t* keys, int64_t step, const int8_t* rows, int64_t quads, bool more, Fetch fetch, int32_t* out,
      int64_t apart) {
    __m512i total[2][R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      total[0][r] = more ? _mm512_loadu_si512(out + r * kBlock) : _mm512_setzero_si512();
      total[1][r] = more ? _mm512_loadu_si512(out + apart + r * kBlock) : _mm512_setzero_si512();
    }
    for (int64_t t = 0; t < quads; ++t, keys += 64) {
      __builtin_prefetch(fetch.from);
      __builtin_prefetch(fetch.from + step);
      fetch.from += fetch.step;
      const __m512i one = _mm512_loadu_si512(keys), other = _mm512_loadu_si512(keys + step);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, rows + (t * R + r) * 4, sizeof(four));
        const __m512i row = _mm512_set1_epi32(four);
        add(total[0][r], one, row);
        add(total[1][r], other, row);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_si512(out + r * kBlock, total[0][r]);
      _mm512_storeu_si512(out + apart + r * kBlock, total[1][r]);
    }
  }

  // out [kBlock]: sums of squares of code - 128 over some quads: code (code - 128) less 128 times (code - 128).
  static void squares(const uint8_t* keys, int64_t quads, int32_t* out) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i total = _mm512_setzero_si512(), sums = _mm512_setzero_si512();
    for (int64_t t = 0; t < quads; ++t) {
      const __m512i code = _mm512_loadu_si512(keys + t * 64), less = _mm512_xor_si512(code, sign);
      total = _mm512_dpbusd_epi32(total, code, less);
      sums = _mm512_dpbusd_epi32(sums, sign, less);
    }
    _mm512_storeu_si512(out, _mm512_sub_epi32(total, sums));
  }

  // Bit j: not low[j] > edge[j], for NaN, too.
  static uint32_t not_above(const float* low, const float* edge) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(low), _mm512_loadu_ps(edge), _CMP_NGT_UQ);
  }

  // Assembly, because compilers copy every accumulator twice around the intrinsic, which halves the speed.
  static void add(__m512i& total, __m512i keys, const int8_t* four) {
    using Four = int32_t __attribute__((may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(keys), "m"(*reinterpret_cast<const Four*>(four)));
  }
  static void add(__m512i& total, __m512i keys, __m512i row) {
    asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(keys), "v"(row));
  }
};
