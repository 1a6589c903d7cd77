// 16 keys by R rows of queries, 64 products an instruction. Included in a namespace compiled for AVX512-VNNI.
struct Dots {
  static constexpr int kRows = 8;
  static constexpr int kBlocks = 3;  // side by side: a row that is loaded serves all; 3 x 8 accumulators, 3 keys, 1 row

  // out [R, kBlock]: products over some quads, on top of start [R], or if that is null of what is there. Meanwhile
  // codes are fetched.
  template <int R>
  static void tile(
      const uint8_t* keys, const int8_t* rows, int64_t quads, const int32_t* start, Fetch fetch, int32_t* out) {
    // Few rows: more accumulators, so that a multiply-add need not wait for the one before.
    constexpr int U = R == 1 ? 8 : R == 2 ? 4 : R <= 4 ? 2 : 1;
    __m512i total[R][U];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) total[r][u] = _mm512_setzero_si512();
      total[r][0] = start != nullptr ? _mm512_set1_epi32(start[r]) : _mm512_loadu_si512(out + r * kBlock);
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

  // The same for K blocks, ``step`` bytes apart, whose products are ``apart`` integers apart.
  template <int K, int R>
  static void together(
      const uint8_t* keys, int64_t step, const int8_t* rows, int64_t quads, const int32_t* start, Fetch fetch,
      int32_t* out, int64_t apart) {
    __m512i total[K][R];
#pragma GCC unroll 3
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int32_t* there = out + k * apart + r * kBlock;
        total[k][r] = start != nullptr ? _mm512_set1_epi32(start[r]) : _mm512_loadu_si512(there);
      }
    }
    for (int64_t t = 0; t < quads; ++t, keys += 64) {
      __m512i own[K];
#pragma GCC unroll 3
      for (int k = 0; k < K; ++k) {
        __builtin_prefetch(fetch.from + k * step);
        own[k] = _mm512_loadu_si512(keys + k * step);
      }
      fetch.from += fetch.step;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, rows + (t * R + r) * 4, sizeof(four));
        const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 3
        for (int k = 0; k < K; ++k) add(total[k][r], own[k], row);
      }
    }
#pragma GCC unroll 3
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) _mm512_storeu_si512(out + k * apart + r * kBlock, total[k][r]);
    }
  }

  // out [kBlock]: sums of squares of code - 128 over some quads: code (code - 128) less 128 times (code - 128).
  static void squares(const uint8_t* keys, int64_t quads, int32_t* out) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i totals[4], sums[4];  // so that a multiply-add need not wait for the one before
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) totals[u] = sums[u] = _mm512_setzero_si512();
    int64_t t = 0;
    for (; t + 4 <= quads; t += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) squares(keys + (t + u) * 64, sign, totals[u], sums[u]);
    }
    for (; t < quads; ++t) squares(keys + t * 64, sign, totals[0], sums[0]);
#pragma GCC unroll 3
    for (int u = 1; u < 4; ++u) {
      totals[0] = _mm512_add_epi32(totals[0], totals[u]);
      sums[0] = _mm512_add_epi32(sums[0], sums[u]);
    }
    _mm512_storeu_si512(out, _mm512_sub_epi32(totals[0], sums[0]));
  }

  static void squares(const uint8_t* keys, __m512i sign, __m512i& total, __m512i& sum) {
    const __m512i code = _mm512_loadu_si512(keys), less = _mm512_xor_si512(code, sign);
    add(total, code, less);
    add(sum, sign, less);
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
