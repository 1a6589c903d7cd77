// Nearest key with coded keys: bounds of all distances from the codes, then exact distances where the bounds leave
// a question, by the very code of the lookup without codes. The result is the same, bit for bit.
//
// Let d be the distance of a query q and a key k in real numbers, t that of their decoded forms q' and k', e and f
// the lengths of what the coding of key and query left over. Then t - e - f <= d <= t + e + f. What is left over is
// at a right angle to the decoded form, so |k|^2 >= |k'|^2, |q|^2 >= |q'|^2 and d^2 >= t^2 - 2 (|k'| f + |q| e): for
// vectors that are at a right angle to each other the better bound by a third. The kernels compute s = d^2 up to a
// share ``gamma`` of it, so a key whose bound squared, less that share, is above s of any other key cannot win, nor
// tie.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/nearest_key_lookup.h"

namespace dualedit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr double kSmall = 1e-33;  // more than squares that underflow can amount to
constexpr double kUp = 1 + 1e-6, kDown = 1 - 1e-6;  // more than any conversion or square root rounds
std::atomic<int64_t> measured{0}, given_up{0};

// Queries in codes, with the memory for them.
struct Coding {
  Coding(const Codes& codes, const Lookup& lookup, int64_t batch, const Kernels& kernels)
      : bytes(aligned(batch * lookup.stride / 4)),
        starts(codes.parts * batch),
        floats(batch * (codes.parts + 7 + codes.apart)) {
    float* at = floats.data();
    const auto take = [&](int64_t each) { return std::exchange(at, at + each * batch); };
    float *scale = take(codes.parts), *head = take(1), *square = take(1), *length = take(1), *error = take(1);
    queries = {batch, lookup.stride, reinterpret_cast<int8_t*>(bytes.get()), starts.data(), scale, head, square,
               length, error, take(codes.apart), take(1), take(1), take(1)};
    Buffer scratch = aligned(lookup.stride);
    for (int64_t b = 0; b < batch; ++b) {
      kernels.code(codes, lookup.query + b * lookup.stride, queries, b, scratch.get());
    }
  }

  Buffer bytes;
  std::vector<int32_t> starts;
  std::vector<float> floats;
  CodedQueries queries;
};

// One thread's search among some blocks of keys.
class Search {
 public:
  Search(const Arguments& arguments, const Lookup& lookup, const Codes& codes, const CodedQueries& coded)
      : kernels_(arguments.kernels),
        lookup_(lookup),
        codes_(codes),
        coded_(coded),
        gamma_((static_cast<double>(codes.dim) / kFewestLanes + 32) * 6.1e-8),
        reach_(coded.batch),
        looked_(coded.batch, -1),
        looked_squared_(coded.batch) {}

  // Lower ``nearest`` by the keys of blocks begin..end, but for queries that become hopeless: for those bounds rule
  // too little out. False if a distance contradicts the codes.
  bool run(int64_t begin, int64_t end, Nearest& nearest, std::vector<std::atomic<bool>>& hopeless) {
    const int64_t batch = coded_.batch;
    const int64_t blocks = std::min(end - begin, std::max<int64_t>(8, kPanel / (batch * kBlock)));
    // An odd number of lines: rows that are powers of two apart would crowd the cache.
    panel_.stride = (blocks * kBlock / kLanes | 1) * kLanes;
    Buffer room = aligned(3 * batch * panel_.stride);
    panel_.dot = room.get();
    panel_.tail = room.get() + batch * panel_.stride;
    panel_.low = room.get() + 2 * batch * panel_.stride;
    for (int64_t b = 0; b < batch; ++b) set_reach(b, nearest);
    const bool one = blocks == end - begin, heads = codes_.parts >= 4;
    const bool filter = heads && look_at_heads(begin, end, blocks, nearest, hopeless);
    for (int64_t at = begin; at < end; at += blocks) {
      panel_.begin = at;
      panel_.end = std::min(end, at + blocks);
      const bool there = heads && one;
      if (filter && !there) kernels_.bound(codes_, coded_, panel_, 0, 1, nullptr);
      if (filter && heads_do(nearest, hopeless)) continue;
      kernels_.bound(
          codes_, coded_, panel_, there || filter ? 1 : 0, codes_.parts, filter ? reach_.data() : nullptr);
      look(nearest, hopeless);
    }
    return right_;
  }

 private:
  static constexpr int64_t kPanel = 1 << 16;  // bounds that are held at once

  int64_t keys() const { return std::min(panel_.end * kBlock, codes_.count) - panel_.begin * kBlock; }
  float* low(int64_t b) const { return panel_.low + b * panel_.stride; }

  // Look at the key of each query whose head is the nearest: if it is very near, heads rule most others out. Whether
  // some query has such a key.
  bool look_at_heads(
      int64_t begin, int64_t end, int64_t blocks, Nearest& nearest,
      const std::vector<std::atomic<bool>>& hopeless) {
    std::vector<Smallest> heads(coded_.batch, Smallest{-1, std::numeric_limits<float>::infinity(), 0.0});
    for (int64_t at = begin; at < end; at += blocks) {
      panel_.begin = at;
      panel_.end = std::min(end, at + blocks);
      kernels_.bound(codes_, coded_, panel_, 0, 1, nullptr);
      for (int64_t b = 0; b < coded_.batch; ++b) {
        const Smallest own = kernels_.smallest(low(b), (panel_.end - panel_.begin) * kBlock);
        if (own.at >= 0 && own.value < heads[b].value) heads[b] = {at * kBlock + own.at, own.value, own.mean};
      }
    }
    const double share = static_cast<double>(codes_.part) / static_cast<double>(codes_.dim);
    for (int64_t b = 0; b < coded_.batch; ++b) {
      if (!hopeless[b] && heads[b].at >= 0 && heads[b].value < share * heads[b].mean) want(b, heads[b].at);
    }
    const bool any = !wanted_.empty();
    measure(false, nearest);
    return any;
  }

  // Look at the keys of the panel whose heads leave them in question, if that is quicker than bounds from all codes.
  bool heads_do(Nearest& nearest, const std::vector<std::atomic<bool>>& hopeless) {
    const int64_t most = coded_.batch * keys() / 24;  // products of a row and a key in the time of an exact distance
    wanted_.resize(most);
    int64_t found = 0;
    for (int64_t b = 0; b < coded_.batch && found < most; ++b) {
      if (hopeless[b]) continue;
      const Reach reach{reach_[b].distance, std::numeric_limits<float>::infinity()};
      found += kernels_.select(codes_, coded_, panel_, b, reach, most - found, wanted_.data() + found);
    }
    wanted_.resize(found < most ? found : 0);
    remove_looked();
    heads_ = true;
    measure(true, nearest);
    heads_ = false;
    return found < most;
  }

  // Look at the panel's most promising key of each query, then at those that it leaves in question.
  void look(Nearest& nearest, std::vector<std::atomic<bool>>& hopeless) {
    for (int64_t b = 0; b < coded_.batch; ++b) {
      if (hopeless[b]) continue;
      const Smallest own = kernels_.smallest(low(b), (panel_.end - panel_.begin) * kBlock);
      const int64_t key = panel_.begin * kBlock + own.at;
      if (own.at < 0) continue;
      if (key == looked_[b]) {
        right_ &= agrees(b, key, looked_squared_[b]);
      } else if (!(least(own.value, error_of(b, key)) > reach_[b].distance)) {
        want(b, key);
      }
    }
    measure(true, nearest);
    // Bounds are too wide if they leave more: looking at all keys is faster then.
    const int64_t most = keys() / 4 + 64;
    for (int64_t b = 0; b < coded_.batch; ++b) {
      if (hopeless[b]) continue;
      const size_t before = wanted_.size();
      wanted_.resize(before + most);
      const int64_t found = kernels_.select(codes_, coded_, panel_, b, reach_[b], most, wanted_.data() + before);
      wanted_.resize(before + (found < most ? found : 0));
      if (found == most) hopeless[b] = true;
    }
    remove_looked();
    // A key that has to be scaled first is read whole anyway.
    const bool cut = codes_.cut() < codes_.parts && !lookup_.cosine;
    for (size_t i = 0; i < (cut ? wanted_.size() : 0); ++i) wanted_[i].enough = enough_for(wanted_[i], nearest);
    measure(true, nearest, cut ? codes_.cut() * codes_.part : 0);
  }

  void remove_looked() {
    const auto looked = [&](const Pair& pair) { return pair.key == looked_[pair.query]; };
    wanted_.erase(std::remove_if(wanted_.begin(), wanted_.end(), looked), wanted_.end());
  }

  void want(int64_t b, int64_t key) {
    wanted_.push_back({b, key});
    looked_[b] = key;
  }

  // The exact distances of what is wanted. in_panel: low is there, and must not contradict them. cut: dimension where
  // one may be given up.
  void measure(bool in_panel, Nearest& nearest, int64_t cut = 0) {
    squared_.resize(wanted_.size());
    kernels_.measure(lookup_, wanted_.data(), static_cast<int64_t>(wanted_.size()), cut, squared_.data());
    for (size_t i = 0; i < wanted_.size(); ++i) {
      const int64_t b = wanted_[i].query, key = wanted_[i].key;
      if (cut > 0 && squared_[i] == std::numeric_limits<float>::infinity()) continue;
      ++measured;
      if (key == looked_[b]) looked_squared_[b] = squared_[i];
      if (in_panel) right_ &= agrees(b, key, squared_[i]);
      nearest.lower(b, squared_[i], key);
      set_reach(b, nearest);
    }
    wanted_.clear();
  }

  // No distance beyond it has a square that is computed as that of the nearest key, or as less.
  void set_reach(int64_t b, const Nearest& nearest) {
    const double reach = std::sqrt((nearest.squared[b] + kSmall) / (1 - gamma_)) * kUp;
    reach_[b] = {static_cast<float>((reach + coded_.error[b]) * kUp), static_cast<float>(reach * reach * kUp)};
  }

  const float* value_of(int64_t key, int64_t row) const {
    return codes_.of(key / kBlock) + (codes_.parts + row) * kBlock + key % kBlock;
  }
  double error_of(int64_t b, int64_t key) const { return static_cast<double>(coded_.error[b]) + *value_of(key, 2); }
  // The distance is not below it.
  static double least(float low, double error) {
    return (low > 0.0f ? std::sqrt(static_cast<double>(low)) * kDown : 0.0) - error;
  }

  // With q = q' + r and k = k' + s behind the cut, q.k = q'.k' + q'.s + r.k there, and |q'| is at most |q| + |r|.
  float enough_for(const Pair& pair, const Nearest& nearest) const {
    const int64_t b = pair.query, key = pair.key;
    const double length = *value_of(key, 3), error = *value_of(key, 4), own_error = coded_.tail_error[b];
    const double dot = panel_.tail[b * panel_.stride + key - panel_.begin * kBlock];
    const double doubt = (coded_.tail_length[b] + own_error) * error + own_error * length;
    const double squares = coded_.tail_square[b] + length * length * kDown;
    const double rest = squares * (1 - codes_.share) - kTiny - 2 * (dot + doubt * kUp);
    const double within = (nearest.squared[b] + kSmall) / (1 - gamma_) * kUp;
    return rest > 0 ? static_cast<float>(((within - rest) * (1 + gamma_) + kSmall) * kUp) : kLargest;
  }

  bool agrees(int64_t b, int64_t key, float squared) const {
    const double low = low_of(b, key), error = error_of(b, key), length = *value_of(key, 0);
    const double square = static_cast<double>(squared), lower = std::max(0.0, least(low, error));
    const double made_of = (coded_.square[b] + length * length) * codes_.share + kTiny;
    const double upper = std::sqrt(std::max(0.0, low + 3 * made_of) / (1 - 3 * codes_.share)) * kUp + error;
    return !(square < lower * lower * (1 - gamma_) * kDown - kSmall) &&
           (heads_ || !(square > upper * upper * (1 + gamma_) * kUp + kSmall));
  }
  float low_of(int64_t b, int64_t key) const { return low(b)[key - panel_.begin * kBlock]; }

  const Kernels& kernels_;
  const Lookup& lookup_;
  const Codes& codes_;
  const CodedQueries& coded_;
  double gamma_;  // the kernels' squares of distances are off by less than this share
  Panel panel_{};
  std::vector<Reach> reach_;
  std::vector<int64_t> looked_;  // the most promising key of each query that was looked at last
  std::vector<float> looked_squared_;  // and the square of its distance
  std::vector<Pair> wanted_;
  std::vector<float> squared_;
  bool heads_ = false;  // whether low is that of heads
  bool right_ = true;
};

// Queries first..first + batch: lower ``nearest``, but for those that are hopeless, which are collected.
void look_up_coded(
    const Arguments& arguments, const Codes& codes, int64_t first, int64_t batch, Nearest& nearest,
    std::vector<int64_t>& hopeless) {
  Lookup lookup = arguments.lookup;
  lookup.query += first * lookup.stride;
  lookup.batch = batch;
  const Coding coding(codes, lookup, batch, arguments.kernels);
  std::vector<std::atomic<bool>> lost(batch);
  for (int64_t b = 0; b < batch; ++b) lost[b] = !std::isfinite(coding.queries.error[b]);
  std::atomic<bool> right{true};
  Nearest found(batch);
  // Threads pay from about 2^19 byte products each.
  const double threads = static_cast<double>(codes.count) * codes.dim * batch / (1 << 19);
  divide((codes.count + kBlock - 1) / kBlock, threads, found, [&](int64_t begin, int64_t end, Nearest& own) {
    if (!Search(arguments, lookup, codes, coding.queries).run(begin, end, own, lost)) right = false;
  });
  STD_TORCH_CHECK(
      right, "nearest_key: codes contradict keys: they were made from other keys, or the keys changed since. "
             "Encode the keys again.");
  for (int64_t b = 0; b < batch; ++b) {
    if (lost[b]) hopeless.push_back(first + b);
    nearest.squared[first + b] = found.squared[b];
    nearest.index[first + b] = found.index[b];
  }
}

// The lookup without codes for some of the queries.
void look_up_some(const Arguments& arguments, const std::vector<int64_t>& rows, Nearest& nearest) {
  const int64_t some = static_cast<int64_t>(rows.size()), stride = arguments.lookup.stride;
  Buffer packed = aligned(some * stride);
  for (int64_t i = 0; i < some; ++i) {
    std::memcpy(packed.get() + i * stride, arguments.lookup.query + rows[i] * stride, stride * sizeof(float));
  }
  Lookup lookup = arguments.lookup;
  lookup.query = packed.get();
  lookup.batch = some;
  Nearest found(some);
  look_up(arguments.kernels, lookup, arguments.count, found);
  for (int64_t i = 0; i < some; ++i) {
    nearest.squared[rows[i]] = found.squared[i];
    nearest.index[rows[i]] = found.index[i];
  }
}

const float* floats(const char* name, const Tensor& tensor, int64_t least) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() >= least,
      "nearest_key: codes: ", name, " must hold ", least, " contiguous fp32 values");
  return static_cast<const float*>(tensor.const_data_ptr());
}

Codes unpack(
    const Tensor& codes, const Tensor& values, const Tensor& centre, const Tensor& apart, int64_t count, int64_t dim,
    bool cosine) {
  const int64_t blocks = (count + kBlock - 1) / kBlock, quads = (dim + 3) / 4;
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && codes.dim() == 4 &&
          codes.size(0) >= blocks && codes.size(1) == quads && codes.size(2) == kBlock && codes.size(3) == 4,
      "nearest_key: codes must be contiguous bytes [N / 48, D / 4, 48, 4]");
  STD_TORCH_CHECK(dim <= kMostCodedDim, "nearest_key: codes of D=", dim, " dimensions, at most ", kMostCodedDim);
  STD_TORCH_CHECK(
      apart.scalar_type() == ScalarType::Long && apart.is_contiguous() && apart.dim() == 1,
      "nearest_key: codes: apart must be int64 [P]");
  const auto* at = static_cast<const int64_t*>(apart.const_data_ptr());
  for (int64_t p = 0; p < apart.size(0); ++p) {
    STD_TORCH_CHECK(at[p] >= 0 && at[p] < dim, "nearest_key: codes: apart holds ", at[p], ", D is ", dim);
  }
  const int64_t part = part_of(dim), parts = (dim + part - 1) / part;
  // Products and squares round less than 160 times and once for each addition to a lane, of a part, by 2^-24 each.
  const float share = (static_cast<float>(part) / 2 + 160) * 6e-8f;
  const float drift = cosine ? (static_cast<float>(dim) / 8 + 32) * 6.2e-8f : 0.0f;
  return {static_cast<const uint8_t*>(codes.const_data_ptr()),
          floats("values", values, blocks * kBlock * (parts + 5 + apart.size(0))),
          floats("centre", centre, (dim + kLanes - 1) / kLanes * kLanes),
          at, apart.size(0), count, quads, dim, part, parts, share, drift};
}

}  // namespace

// `nearest_key` of nearest_key.cpp with codes as in dualedit_kernels/nearest_key/codes.py.
std::tuple<Tensor, Tensor> nearest_key_coded(
    Tensor query, Tensor keys, Tensor radius, bool cosine, int64_t isa, Tensor codes, Tensor values, Tensor centre,
    Tensor apart) {
  const Arguments arguments = prepare(query, keys, radius, cosine, isa);
  const int64_t batch = arguments.lookup.batch, count = arguments.count;
  const Codes tables = unpack(codes, values, centre, apart, count, arguments.lookup.dim, cosine);
  Nearest nearest(batch);
  measured = given_up = 0;
  std::vector<int64_t> hopeless;
  for (int64_t first = 0; first < batch && count > 0; first += kMostQueries) {
    look_up_coded(arguments, tables, first, std::min(batch - first, kMostQueries), nearest, hopeless);
  }
  given_up = static_cast<int64_t>(hopeless.size());
  if (!hopeless.empty()) look_up_some(arguments, hopeless, nearest);
  return answer(query, radius, cosine, nearest);
}

// Of the last lookup with codes: distances computed exactly, and queries whose bounds were no use.
void last_coded(int64_t* out) {
  out[0] = measured;
  out[1] = given_up;
}

}  // namespace dualedit
