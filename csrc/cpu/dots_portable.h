// 16 keys by R rows of queries in plain C++.
struct Dots {
  static constexpr int kBlocks = 1;
  static constexpr int kRows = 2;

  // out [R, kBlock]: products over some quads, on top of start [R], or if that is null of what is there.
  template <int R>
  static void tile(
      const uint8_t* keys, const int8_t* rows, int64_t quads, const int32_t* start, Fetch, int32_t* out) {
    int32_t total[R][kBlock] = {};
    for (int64_t t = 0; t < quads; ++t) {
      for (int r = 0; r < R; ++r) {
        const int8_t* q = rows + (t * R + r) * 4;
        for (int j = 0; j < kBlock; ++j) {
          const uint8_t* k = keys + t * 64 + j * 4;
          total[r][j] += k[0] * q[0] + k[1] * q[1] + k[2] * q[2] + k[3] * q[3];
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kBlock; ++j) {
        int32_t& to = out[r * kBlock + j];
        to = (start != nullptr ? start[r] : to) + total[r][j];
      }
    }
  }

  // out [kBlock]: sums of squares of code - 128 over some quads.
  static void squares(const uint8_t* keys, int64_t quads, int32_t* out) {
    for (int64_t t = 0; t < quads; ++t) {
      for (int i = 0; i < kBlock * 4; ++i) {
        const int32_t code = keys[t * 64 + i] - 128;
        out[i / 4] += code * code;
      }
    }
  }

  // Bit j: not low[j] > edge[j], for NaN, too.
  static uint32_t not_above(const float* low, const float* edge) {
    uint32_t bits = 0;
    for (int j = 0; j < kBlock; ++j) bits |= static_cast<uint32_t>(!(low[j] > edge[j])) << j;
    return bits;
  }
};
