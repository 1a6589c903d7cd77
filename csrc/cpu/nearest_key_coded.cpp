// Nearest key with coded keys: bounds of all distances from the codes, then exact distances where the bounds leave
// a question, by the very code of the lookup without codes. The result is the same, bit for bit.
//
// Let d be the distance of a query and a key in real numbers, t that of their decoded forms, e and f the lengths of
// what the coding of key and query left over. Then t - e - f <= d <= t + e + f. The kernels compute s = d^2 up to a
// share ``gamma`` of it, so a key with (t - e - f)^2 (1 - gamma) > s of any other key cannot win, nor tie.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/nearest_key_coarse.h"
#include "cpu/nearest_key_search.h"

namespace dualedit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kSmall = 1e-33;  // more than squares that underflow can amount to
constexpr double kUp = 1 + 1e-6, kDown = 1 - 1e-6;  // more than any conversion or square root rounds
constexpr int64_t kGroup = 256;  // queries that are worked on together
constexpr size_t kLongest = 32768;  // keys of a query that are noted: 256 MB for a group, at worst

std::atomic<int64_t> refined{0}, given_up{0};

// Rounding of the exact kernels: s in [d^2 (1 - gamma) - kSmall, d^2 (1 + gamma) + kSmall]. A lane adds at most
// dim / 8 squares, then lanes are added; a difference and its square round by 3 more.
struct Rounding {
  double gamma;

  explicit Rounding(int64_t dim) : gamma((static_cast<double>(dim) / 8 + 32) * 6.1e-8) {}
  double least(double distance) const { return distance * distance * (1 - gamma) * kDown - kSmall; }
  double most(double distance) const { return distance * distance * (1 + gamma) * kUp + kSmall; }
  // No distance beyond it has a square that is computed as s or less.
  double reach(double s) const { return std::sqrt((s + kSmall) / (1 - gamma)) * kUp; }
};

struct Candidate {
  int64_t index;
  float lower;  // the distance is not below it
};

// What is known of one query: the smallest upper bound of any key, and the keys that may be nearer.
struct Shortlist {
  double upper = std::numeric_limits<double>::infinity();
  double limit = std::numeric_limits<double>::infinity();  // keys whose lower bound exceeds it are out
  bool too_long = false;
  std::vector<Candidate> keys;

  void keep(double within) {
    size_t kept = 0;
    for (const Candidate& key : keys) {
      if (!(key.lower > within)) keys[kept++] = key;
    }
    keys.resize(kept);
  }
};

struct Pass {
  const Codes& codes;
  const CodedQueries& coded;
  CoarseKernel kernel;
  Rounding rounding;
  int64_t count;
};

// Note the keys of a block that may be nearest to query b; lower its limit where an upper bound is smaller.
void note(const Pass& pass, int64_t block, int64_t b, const Bounds& bounds, Shortlist& list) {
  for (int64_t j = 0; j < kBlock && block * kBlock + j < pass.count; ++j) {
    if (!(bounds.near >> j & 1)) continue;
    const double error = static_cast<double>(pass.codes.error[block * kBlock + j]) + pass.coded.error[b];
    const double low = bounds.total[j] - bounds.spread[j], high = bounds.total[j] + bounds.spread[j];
    const double lower = ((low > 0.0 ? std::sqrt(low) * kDown : 0.0) - error) * kDown;
    const double upper = (high > 0.0 ? std::sqrt(high) * kUp : 0.0) + error;
    if (upper < list.upper) {  // false for NaN
      list.upper = upper;
      list.limit = pass.rounding.reach(pass.rounding.most(upper));
    }
    list.keys.push_back({block * kBlock + j, lower > 0.0 ? static_cast<float>(lower) : 0.0f});
  }
}

// Blocks begin..end for all queries.
void shortlist(const Pass& pass, int64_t begin, int64_t end, CodedQueries coded, Shortlist* lists) {
  const int64_t batch = coded.batch;
  std::vector<Bounds> bounds(batch);
  std::vector<float> limit(batch, kInfinity);
  std::vector<int32_t> product(batch * coded.planes * kBlock);
  coded.product = product.data();
  int64_t useful = batch;
  for (int64_t at = begin; at < end && useful > 0; ++at) {
    pass.kernel.block(pass.codes, coded, at, limit.data(), bounds.data());
    for (int64_t b = 0; b < batch; ++b) {
      Shortlist& list = lists[b];
      if (bounds[b].near == 0 || list.too_long) continue;
      note(pass, at, b, bounds[b], list);
      // A quarter of the keys so far: bounds are too wide for these keys, and looking at all of them is faster.
      const size_t quarter = static_cast<size_t>((at + 1 - begin) * kBlock / 4);
      const size_t most = quarter < 512 ? 512 : quarter > kLongest ? kLongest : quarter;
      if (list.keys.size() > 2 * most) {
        list.keep(list.limit);
        list.too_long = list.keys.size() > most;
        if (list.too_long) --useful;
      }
      limit[b] = static_cast<float>((list.limit + coded.error[b]) * kUp);
    }
  }
}

// Exact distances of the keys of a list, the most promising first, unless more than ``worth`` are left after that
// one. False if they contradict the codes.
bool refine(
    const Arguments& arguments, const Rounding& rounding, int64_t b, Shortlist& list, size_t worth, float* scratch,
    float* squared, int64_t* index) {
  Lookup own = arguments.lookup;
  own.query += b * own.stride;
  own.batch = 1;
  own.head = 0;
  bool right = true;
  int64_t looked_at = 0;
  double within = list.limit;
  auto look = [&](const Candidate& key) {
    float s = kInfinity;
    int64_t found = -1;
    arguments.scan(own, key.index, key.index + 1, &s, &found, scratch);
    ++looked_at;
    if (found < 0) return;
    right &= !(s < rounding.least(key.lower));
    if (s < *squared || (s == *squared && found < *index)) {
      *squared = s;
      *index = found;
      within = rounding.reach(s);
    }
  };
  list.keep(within);
  size_t first = 0;
  for (size_t i = 1; i < list.keys.size(); ++i) {
    if (list.keys[i].lower < list.keys[first].lower) first = i;
  }
  if (!list.keys.empty()) look(list.keys[first]);
  if (list.keys.size() > worth) {
    const size_t left = std::count_if(
        list.keys.begin(), list.keys.end(), [&](const Candidate& key) { return !(key.lower > within); });
    list.too_long = left > worth;
    if (list.too_long) return right;
  }
  for (size_t i = 0; i < list.keys.size(); ++i) {
    if (i != first && !(list.keys[i].lower > within)) look(list.keys[i]);
  }
  refined += looked_at;
  return right && !(*squared > rounding.most(list.upper));
}

// Queries in codes of one or two planes, with the memory for them.
struct Coding {
  Coding(const Codes& codes, const Lookup& lookup, int64_t first, int64_t batch, int64_t planes, CoarseKernel kernel)
      : bytes(aligned((batch * planes * codes.quads * 4 + 3) / 4)),
        integers(batch * planes),
        floats(batch * (3 + codes.apart)),
        queries{batch, planes, reinterpret_cast<int8_t*>(bytes.get()), integers.data(), floats.data(),
                floats.data() + batch, floats.data() + 2 * batch, floats.data() + 3 * batch, nullptr} {
    Buffer scratch = aligned(lookup.stride * 5 / 2);
    for (int64_t b = 0; b < batch; ++b) {
      kernel.code(codes, lookup.query + (first + b) * lookup.stride, queries, b, scratch.get());
    }
  }

  // Whether the error of the queries widens the bounds far more than that of the keys does.
  bool coarse(const Codes& codes, int64_t count) const {
    double keys = 0.0, own = 0.0;
    const int64_t some = count < 64 ? count : 64;
    for (int64_t n = 0; n < some; ++n) keys += std::isfinite(codes.error[n]) ? codes.error[n] : 0.0;
    for (int64_t b = 0; b < queries.batch; ++b) own += std::isfinite(queries.error[b]) ? queries.error[b] : 0.0;
    return own / static_cast<double>(queries.batch) > 2 * keys / static_cast<double>(some);
  }

  Buffer bytes;
  std::vector<int32_t> integers;
  std::vector<float> floats;
  CodedQueries queries;
};

// Queries first..first+batch: lower nearest, and collect the queries whose bounds are no use.
void look_up_coded(
    const Arguments& arguments, const Codes& codes, CoarseKernel kernel, int64_t first, int64_t batch,
    Nearest& nearest, std::vector<int64_t>& hopeless) {
  const Rounding rounding(codes.dim);
  const int64_t count = arguments.count;
  // Memory is slower than arithmetic for few queries: their second plane is free.
  auto coding = std::make_unique<Coding>(codes, arguments.lookup, first, batch, batch <= 4 ? 2 : 1, kernel);
  if (batch > 4 && coding->coarse(codes, count)) {
    coding = std::make_unique<Coding>(codes, arguments.lookup, first, batch, 2, kernel);
  }
  const Pass pass{codes, coding->queries, kernel, rounding, count};
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  // Threads pay from about 2^19 byte products each.
  const double work = static_cast<double>(count) * codes.dim * batch / (1 << 19);
  int64_t parts = static_cast<int64_t>(torch::stable::get_num_threads());
  if (work < parts) parts = work < 1 ? 1 : static_cast<int64_t>(work);
  const int64_t share = (blocks + parts - 1) / parts;
  std::vector<std::vector<Shortlist>> lists(parts, std::vector<Shortlist>(batch));
  std::atomic<bool> right{true};
  // One distance after the other costs several times what it costs in the tiles of a large batch.
  const size_t worth = static_cast<size_t>(batch <= 8 ? count / 4 : count / 6);
  auto scan_part = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t last = (p + 1) * share < blocks ? (p + 1) * share : blocks;
      shortlist(pass, p * share, last, coding->queries, lists[p].data());
    }
  };
  auto refine_part = [&](int64_t begin, int64_t end) {
    Buffer scratch = aligned(kMaxBlock * arguments.lookup.stride);
    for (int64_t b = begin; b < end; ++b) {
      Shortlist& list = lists[0][b];
      for (int64_t p = 1; p < parts; ++p) {
        const Shortlist& other = lists[p][b];
        list.too_long |= other.too_long;
        list.upper = other.upper < list.upper ? other.upper : list.upper;
        list.limit = other.limit < list.limit ? other.limit : list.limit;
        list.keys.insert(list.keys.end(), other.keys.begin(), other.keys.end());
      }
      if (list.too_long) continue;
      const int64_t q = first + b;
      right = refine(arguments, rounding, q, list, worth, scratch.get(), &nearest.squared[q], &nearest.index[q]) &&
              right;
    }
  };
  if (parts == 1) {
    scan_part(0, 1);
    refine_part(0, batch);
  } else {
    torch::stable::parallel_for(0, parts, 1, scan_part);
    torch::stable::parallel_for(0, batch, 1, refine_part);
  }
  STD_TORCH_CHECK(
      right, "nearest_key: codes contradict keys: they were made from other keys, or the keys changed since. "
             "Encode the keys again.");
  for (int64_t b = 0; b < batch; ++b) {
    if (lists[0][b].too_long) hopeless.push_back(first + b);
  }
}

// The lookup without codes for some of the queries.
void look_up_some(const Arguments& arguments, const std::vector<int64_t>& rows, Nearest& nearest) {
  const int64_t some = static_cast<int64_t>(rows.size()), stride = arguments.lookup.stride;
  Buffer packed = aligned(some * stride);
  for (int64_t i = 0; i < some; ++i) {
    std::memcpy(packed.get() + i * stride, arguments.lookup.query + rows[i] * stride, stride * sizeof(float));
  }
  Lookup lookup = arguments.lookup;  // with its stream: one query alone is summed in another order
  lookup.query = packed.get();
  lookup.batch = some;
  Nearest found(some);
  look_up(arguments.scan, lookup, arguments.count, found);
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
    const Tensor& codes, const Tensor& scale, const Tensor& square, const Tensor& error, const Tensor& centre,
    const Tensor& rows, const Tensor& apart, int64_t count, int64_t dim) {
  const int64_t blocks = (count + kBlock - 1) / kBlock, quads = (dim + 3) / 4;
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() && codes.dim() == 4 &&
          codes.size(0) >= blocks && codes.size(1) == quads && codes.size(2) == kBlock && codes.size(3) == 4,
      "nearest_key: codes must be contiguous bytes [N / 16, D / 4, 16, 4]");
  STD_TORCH_CHECK(dim <= kMostCodedDim, "nearest_key: codes of D=", dim, " dimensions, at most ", kMostCodedDim);
  STD_TORCH_CHECK(
      apart.scalar_type() == ScalarType::Long && apart.is_contiguous() && apart.dim() == 1,
      "nearest_key: codes: apart must be int64 [P]");
  const auto* at = static_cast<const int64_t*>(apart.const_data_ptr());
  for (int64_t p = 0; p < apart.size(0); ++p) {
    STD_TORCH_CHECK(at[p] >= 0 && at[p] < dim, "nearest_key: codes: apart holds ", at[p], ", D is ", dim);
  }
  const int64_t padded = blocks * kBlock;
  return {static_cast<const uint8_t*>(codes.const_data_ptr()),
          floats("scale", scale, padded),
          floats("square", square, padded),
          floats("error", error, padded),
          floats("centre", centre, dim),
          floats("rows", rows, padded * apart.size(0)),
          at,
          apart.size(0),
          quads,
          dim};
}

}  // namespace

// `nearest_key` of nearest_key.cpp with codes as in dualedit_kernels/nearest_key/codes.py.
std::tuple<Tensor, Tensor> nearest_key_coded(
    Tensor query, Tensor keys, Tensor radius, bool cosine, int64_t isa, Tensor codes, Tensor scale, Tensor square,
    Tensor error, Tensor centre, Tensor rows, Tensor apart) {
  const Arguments arguments = prepare(query, keys, radius, cosine, isa);
  const int64_t batch = arguments.lookup.batch, count = arguments.count;
  const Codes tables =
      unpack(codes, scale, square, error, centre, rows, apart, count, arguments.lookup.dim);
  Nearest nearest(batch);
  refined = given_up = 0;
  std::vector<int64_t> hopeless;
  for (int64_t first = 0; first < batch && count > 0; first += kGroup) {
    const int64_t some = batch - first < kGroup ? batch - first : kGroup;
    look_up_coded(arguments, tables, coarse_for(isa), first, some, nearest, hopeless);
  }
  given_up = static_cast<int64_t>(hopeless.size());
  if (!hopeless.empty()) look_up_some(arguments, hopeless, nearest);
  return answer(query, radius, cosine, nearest);
}

// Of the last lookup with codes: distances computed exactly, and queries whose bounds were no use.
void last_coded(int64_t* out) {
  out[0] = refined;
  out[1] = given_up;
}

}  // namespace dualedit
