// Panels of blocks, one after the other: bounds from the heads of the codes, then from all of them where a head
// leaves a question. In each panel the most promising key of a query is looked at first, so that others are held
// against an exact distance.
#include "cpu/nearest_key_shortlist.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dualedit {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kLongest = 32768;  // keys of a query that are noted: 256 MB for a group, at worst
constexpr int64_t kPatience = 7;  // panels without a look at heads, after one where heads ruled little out
constexpr int64_t kFew = 4;  // queries
constexpr int64_t kTile = 8;  // rows of queries whose products are skipped together, about

// The memory of a panel.
struct Room {
  Room(const CodedQueries& coded, int64_t most)
      : rows(coded.batch * coded.planes),
        blocks(std::min(most, std::min<int64_t>(64, std::max<int64_t>(8, 2048 / rows)))),
        near(coded.batch * blocks) {
    const int64_t parts = coded.parts, batch = coded.batch, cuts = parts == 1 ? 0 : kCuts;
    floats = aligned(((rows + (cuts + 1) * batch) * blocks + kTogether * (parts - 1) * rows + 2 * batch) * kBlock);
    float* at = floats.get();
    const auto take = [&](int64_t each) { return std::exchange(at, at + each * kBlock); };
    auto* product = reinterpret_cast<int32_t*>(take(blocks * rows));
    auto* others = reinterpret_cast<int32_t*>(take(kTogether * (parts - 1) * rows));
    float *behind = take(blocks * cuts * batch), *low = take(blocks * batch), *smallest = take(batch);
    panel = {0, batch, rows, product, others, behind, low, near.data(), smallest,
             reinterpret_cast<int32_t*>(take(batch))};
  }

  int64_t rows;
  int64_t blocks;
  Buffer floats;
  std::vector<uint16_t> near;
  Panel panel;
};

class Shortlister {
 public:
  Shortlister(const Pass& pass, Exact& exact, Shortlist* lists, int64_t most)
      : pass_(pass),
        exact_(exact),
        lists_(lists),
        room_(pass.coded, most),
        panel_(room_.panel),
        candidate_(pass.coded.batch),
        bound_(pass.coded.batch),
        wanted_(pass.coded.batch),
        lower_(pass.coded.batch),
        limit_(pass.coded.batch),
        reach_(pass.coded.batch) {}

  bool run(int64_t begin, int64_t end) {
    for (int64_t b = 0; b < panel_.batch; ++b) lists_[b].keys.reserve(40);  // up to 1 KB memory comes quickly
    // For few queries reading the codes is the whole cost, and heads read for themselves come slowly.
    if (pass_.coded.head > 0 && end - begin > room_.blocks && panel_.batch > kFew) sweep(begin, end);
    for (int64_t at = begin; at < end && right_; at += room_.blocks) {
      start_ = panel_.start = at;
      blocks_ = std::min(room_.blocks, end - at);
      if (!open()) break;
      const bool heads = pass_.coded.head > 0 && patience_ == 0;
      if (patience_ > 0) --patience_;
      heads_only_ = heads && by_heads();
      if (!heads_only_) {
        bounds(false, heads);
        select(false);
      }
      note(begin);
      known_ = true;
    }
    return right_;
  }

 private:
  // All keys of the panel are near to all queries; false if no query is left.
  bool open() {
    bool any = false;
    for (int64_t b = 0; b < panel_.batch; ++b) any |= !lists_[b].too_long;
    for (int64_t place = 0; place < blocks_; ++place) {
      const int64_t left = pass_.count - (start_ + place) * kBlock;
      const uint16_t all = left >= kBlock ? 0xffff : static_cast<uint16_t>((1 << left) - 1);
      for (int64_t b = 0; b < panel_.batch; ++b) near(place, b) = lists_[b].too_long ? 0 : all;
    }
    return any;
  }

  uint16_t& near(int64_t place, int64_t b) { return panel_.near[place * panel_.batch + b]; }

  // The heads of all panels, and a look at the most promising key of each query: with a near key known from the
  // start, heads rule out most others. If that finds no key much nearer than heads let the others be, heads are
  // no use.
  void sweep(int64_t begin, int64_t end) {
    start_ = panel_.start = begin;
    blocks_ = 1;
    open();
    std::fill_n(panel_.smallest, panel_.batch * kBlock, kInfinity);
    for (int64_t block = begin; block < end; ++block) {
      pass_.kernel.bound(pass_.codes, pass_.coded, panel_, block, 0, 1, true, false, 1);
    }
    look(true);
    known_ = true;
    // Of the last block at hand, as good as any: what heads leave there.
    const int64_t keys = std::min(kBlock, pass_.count - (end - 1) * kBlock) * panel_.batch;
    const int64_t left = pass_.kernel.select(
        pass_.codes, pass_.coded, panel_, end - 1, 0, true, limit_.data(), reach_.data());
    if (left * 4 > keys * 3) patience_ = kPatience;
  }

  // Bounds from the heads. True if so few keys are left that looking at them is quicker than bounds from all.
  bool by_heads() {
    const bool sampled = !known_ && panel_.batch > kFew;
    if (sampled && !pays_for_few()) return false;
    const double before = left();
    bounds(true, sampled);
    const int64_t pairs = select(true);
    const double after = left(), share = static_cast<double>(pass_.coded.head) / pass_.codes.quads;
    const bool few = static_cast<double>(pairs) * pass_.exact_cost < after * (1 - share);
    if (!few && after > before * 3 / 4) patience_ = kPatience;
    return few;
  }

  // Whether heads rule out a quarter of the keys for some queries, one of each tile: where they do not, the tile's
  // products are needed anyway. Bounds and exact distances of all queries are more than a tenth of a lookup.
  bool pays_for_few() {
    const int64_t step = std::max<int64_t>(1, kTile / pass_.coded.planes);
    bounds(true, false, step);
    int64_t keys = 0, kept = 0;
    for (int64_t b = 0; b < panel_.batch; b += step) {
      if (lists_[b].too_long) continue;
      for (int64_t place = 0; place < blocks_; ++place) {
        const float* low = panel_.low + (place * panel_.batch + b) * kBlock;
        const float* error = pass_.codes.error + (start_ + place) * kBlock;
        for (int64_t j = 0; j < kBlock; ++j) {
          const float within = limit_[b] + error[j];
          kept += !(low[j] > within * within);
        }
        keys += kBlock;
      }
    }
    if (kept * 4 <= keys * 3) return true;
    patience_ = kPatience;
    return false;
  }

  // Bounds from the heads or from all codes, and a look at the most promising key, of every step-th query. there: the
  // products of the heads are there already.
  void bounds(bool head, bool there, int64_t step = 1) {
    std::fill_n(panel_.smallest, panel_.batch * kBlock, kInfinity);
    for (int64_t place = 0; place < blocks_; place += kTogether) {
      const int64_t count = std::min(kTogether, blocks_ - place);
      pass_.kernel.bound(pass_.codes, pass_.coded, panel_, start_ + place, place, count, head, there, step);
    }
    look(head);
  }

  // Which keys are near; how many.
  int64_t select(bool head) {
    int64_t pairs = 0;
    for (int64_t place = 0; place < blocks_; ++place) {
      pairs += pass_.kernel.select(
          pass_.codes, pass_.coded, panel_, start_ + place, place, head, limit_.data(), reach_.data());
    }
    for (int64_t b = 0; b < panel_.batch; ++b) {  // a key that was looked at is done
      const int64_t key = lists_[b].last, place = key / kBlock - start_;
      if (key < 0 || place < 0 || place >= blocks_) continue;
      uint16_t& bits = near(place, b);
      pairs -= bits >> (key % kBlock) & 1;
      bits &= static_cast<uint16_t>(~(1u << (key % kBlock)));
    }
    return pairs;
  }

  // Look at the key of the panel with the smallest bound, for each query.
  void look(bool head) {
    for (int64_t b = 0; b < panel_.batch; ++b) {
      candidate_[b] = -1;
      bound_[b] = kInfinity;
      for (int64_t j = 0; j < kBlock && !lists_[b].too_long; ++j) {
        const float low = panel_.smallest[b * kBlock + j];
        if (!(low < bound_[b])) continue;
        const int64_t key = (start_ + panel_.at[b * kBlock + j]) * kBlock + j;
        if (key >= pass_.count) continue;
        bound_[b] = low;
        candidate_[b] = key;
      }
    }
    for (int64_t b = 0; b < panel_.batch; ++b) {
      const int64_t key = candidate_[b];
      wanted_[b] = -1;
      if (key < 0) continue;
      lower_[b] = lower_of(key, b, bound_[b], head);
      if (key != lists_[b].last && !(lower_[b] > lists_[b].limit)) wanted_[b] = key;
    }
    right_ &= exact_.look(wanted_.data(), lower_.data(), lists_);
    for (int64_t b = 0; b < panel_.batch; ++b) {
      Shortlist& list = lists_[b];
      const int64_t key = candidate_[b];
      if (key >= 0) {
        if (!head && key == list.last && std::isfinite(list.last_squared)) {
          right_ &= !(list.last_squared > pass_.rounding.most(upper_of(key, b, bound_[b])));
        }
      }
      limit_[b] = static_cast<float>((list.limit + pass_.coded.error[b]) * kUp);
      reach_[b] = static_cast<float>(list.limit * list.limit * kUp);
    }
  }

  double error_of(int64_t key, int64_t b) const {
    return static_cast<double>(pass_.codes.error[key]) + pass_.coded.error[b];
  }

  // The distance is not below it. low: of the heads, or of all.
  float lower_of(int64_t key, int64_t b, float low, bool head) const {
    double lower = (low > 0.0f ? std::sqrt(static_cast<double>(low)) * kDown : 0.0) - error_of(key, b);
    if (!head) {
      const double length = std::sqrt(static_cast<double>(pass_.codes.square[key]));
      const double gap = length * (pass_.coded.error[b] + pass_.codes.drift) +
                         static_cast<double>(pass_.coded.length[b]) * pass_.codes.error[key];
      const double square = low - 2.00001 * gap;
      if (square > 0.0) lower = std::max(lower, std::sqrt(square));
    }
    lower *= kDown * kDown;
    return lower > 0.0 ? static_cast<float>(lower) : 0.0f;
  }

  // The distance is not above it. The sum is computed anew, so a share more of it than the kernel takes off.
  double upper_of(int64_t key, int64_t b, float low) const {
    const Codes& codes = pass_.codes;
    double sum = static_cast<double>(pass_.coded.square[panel_.batch + b]) + codes.square[key];
    for (int64_t p = 0; p < codes.apart; ++p) {
      const double rows = codes.rows[(key / kBlock * codes.apart + p) * kBlock + key % kBlock];
      const double difference = pass_.coded.apart[b * codes.apart + p] - rows;
      sum += difference * difference;
    }
    const double high = low + 2.01 * (sum * kShare + kTiny);
    return (high > 0.0 ? std::sqrt(high) * kUp : 0.0) + error_of(key, b);
  }

  // The square of the distance in the dimensions behind each cut is not below rest [kCuts]. With q = q' + r,
  // k = k' + s there, q.k = q'.k' + q'.s + r.k, and |q'| is at most |q| + |r|.
  void rests_of(int64_t key, int64_t b, float* rest) const {
    const Codes& codes = pass_.codes;
    const CodedQueries& coded = pass_.coded;
    const int64_t block = key / kBlock, j = key % kBlock, batch = panel_.batch;
    const float* dot = panel_.behind + ((block - start_) * kCuts * batch + b) * kBlock + j;
    const float* tails = codes.tails + block * 2 * kCuts * kBlock + j;
    const float* own = coded.tails + b * kCuts * 3;
    for (int64_t cut = 0; cut < kCuts; ++cut) {
      const double length = tails[cut * kBlock], error = tails[(kCuts + cut) * kBlock];
      const double doubt =
          (static_cast<double>(own[cut * 3 + 1]) + own[cut * 3 + 2]) * error + own[cut * 3 + 2] * length;
      double apart = 0.0;
      for (int64_t p = 0; p < codes.apart; ++p) {
        if (codes.apart_at[p] < first_part_behind(coded.parts, cut) * coded.part * 4) continue;
        const double rows = codes.rows[(block * codes.apart + p) * kBlock + j];
        const double difference = static_cast<double>(coded.apart[b * codes.apart + p]) - rows;
        apart += difference * difference;
      }
      const double squares = own[cut * 3] + length * length * kDown * kDown;
      const double products = 2.0 * (dot[cut * batch * kBlock] + doubt * kUp);
      const double left = squares * (1 - kShare) - kTiny - products + apart * kDown;
      rest[cut] = left > 0.0 ? static_cast<float>(left * kDown) : 0.0f;  // 0, too, where nothing is known of a key
    }
  }

  // Products that bounds from all codes would take.
  double left() {
    double result = 0.0;
    const int64_t queries = std::max<int64_t>(1, kTile / pass_.coded.planes);
    for (int64_t place = 0; place < blocks_; ++place) {
      for (int64_t b = 0; b < panel_.batch; b += queries) {
        const int64_t end = std::min(b + queries, panel_.batch);
        bool any = false;
        for (int64_t i = b; i < end; ++i) any |= near(place, i) != 0;
        if (any) result += static_cast<double>((end - b) * pass_.coded.planes * kBlock);
      }
    }
    return result;
  }

  // Put down the keys that are near.
  void note(int64_t begin) {
    for (int64_t place = 0; place < blocks_; ++place) {
      for (int64_t b = 0; b < panel_.batch; ++b) {
        const float* low = panel_.low + (place * panel_.batch + b) * kBlock;
        for (uint32_t bits = near(place, b); bits != 0; bits &= bits - 1) {
          const int64_t j = __builtin_ctz(bits);
          const int64_t key = (start_ + place) * kBlock + j;
          Candidate candidate{key, lower_of(key, b, low[j], heads_only_), {}};
          if (!heads_only_ && pass_.coded.cuts) rests_of(key, b, candidate.rest);
          lists_[b].keys.push_back(candidate);
        }
      }
    }
    // A quarter of the keys so far: bounds are too wide for these keys, and looking at all of them is faster.
    const size_t quarter = static_cast<size_t>((start_ + blocks_ - begin) * kBlock / 4);
    const size_t most = quarter < 512 ? 512 : quarter > kLongest ? kLongest : quarter;
    for (int64_t b = 0; b < panel_.batch; ++b) {
      Shortlist& list = lists_[b];
      if (list.too_long || list.keys.size() <= 2 * most) continue;
      list.keep(list.limit);
      list.too_long = list.keys.size() > most;
    }
  }

  const Pass& pass_;
  Exact& exact_;
  Shortlist* lists_;
  Room room_;
  Panel& panel_;
  std::vector<int64_t> candidate_;
  std::vector<float> bound_;
  std::vector<int64_t> wanted_;
  std::vector<float> lower_;
  std::vector<float> limit_;
  std::vector<float> reach_;
  int64_t start_ = 0, blocks_ = 0, patience_ = 0;
  bool known_ = false;  // a key of each query
  bool heads_only_ = false;
  bool right_ = true;
};

}  // namespace

bool shortlist(const Pass& pass, int64_t begin, int64_t end, Exact& exact, Shortlist* lists) {
  if (begin >= end) return true;
  for (int64_t b = 0; b < pass.coded.batch; ++b) {
    lists[b].too_long |= !std::isfinite(pass.coded.error[b]);  // nothing is known of the query
  }
  return Shortlister(pass, exact, lists, end - begin).run(begin, end);
}

}  // namespace dualedit
