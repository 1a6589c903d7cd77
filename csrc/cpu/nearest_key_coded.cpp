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

#include "cpu/nearest_key_shortlist.h"

namespace dualedit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

std::atomic<int64_t> refined{0}, given_up{0};

// Queries in codes of one or two planes, with the memory for them.
struct Coding {
  Coding(const Codes& codes, const Lookup& lookup, int64_t first, int64_t batch, int64_t planes, CoarseKernel kernel)
      : bytes(aligned(batch * planes * codes.quads)),
        integers((1 + codes.parts) * batch * planes),
        floats(batch * (codes.parts + 4 + codes.apart + 3 * kCuts)) {
    float* at = floats.data();
    const auto take = [&](int64_t each) { return std::exchange(at, at + each * batch); };
    float* scale = take(codes.parts);
    float *square = take(2), *error = take(1), *length = take(1), *apart = take(codes.apart);
    // One query alone is not looked at in parts, nor is a key that has to be scaled first.
    const bool cuts = codes.parts > 1 && !lookup.stream && !lookup.cosine;
    queries = {batch, planes, head_of(codes), codes.parts, part_of(codes.quads), cuts,
               reinterpret_cast<int8_t*>(bytes.get()), integers.data(), scale, square, error, length, apart,
               take(3 * kCuts)};
    const int64_t stride = lookup.stride;
    Buffer rows = aligned(batch * planes * stride / 4), scratch = aligned(stride);
    auto* own = reinterpret_cast<int8_t*>(rows.get());
    for (int64_t b = 0; b < batch; ++b) {
      kernel.code(codes, lookup.query + (first + b) * stride, queries, b, own, stride, scratch.get());
    }
    kernel.arrange(queries, codes.quads, own, stride);
  }

  // A sixteenth of the dimensions, 128 at least, in whole registers.
  static int64_t head_of(const Codes& codes) {
    if (codes.quads < kFewestQuads) return 0;
    return std::max<int64_t>(32, codes.quads / 16 / 4 * 4);
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
  // Products of coded rows and keys that an exact distance takes the time of.
  const double exact_cost = arguments.lookup.type == KeyType::kFloat32 ? 24 : 14;
  const Pass pass{codes, coding->queries, kernel, rounding, count, exact_cost};
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
    Exact exact(arguments, rounding, coding->queries, first);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t last = (p + 1) * share < blocks ? (p + 1) * share : blocks;
      if (!shortlist(pass, p * share, last, exact, lists[p].data())) right = false;
    }
    refined += exact.looked;
  };
  auto refine_part = [&](int64_t begin, int64_t end) {
    Exact exact(arguments, rounding, coding->queries, first);
    for (int64_t b = begin; b < end; ++b) {
      Shortlist& list = lists[0][b];
      for (int64_t p = 1; p < parts; ++p) {
        const Shortlist& other = lists[p][b];
        list.too_long |= other.too_long;
        list.limit = other.limit < list.limit ? other.limit : list.limit;
        if (other.squared < list.squared) {  // of equal ones the part before has the lower index
          list.squared = other.squared;
          list.index = other.index;
        }
        list.keys.insert(list.keys.end(), other.keys.begin(), other.keys.end());
      }
    }
    if (!exact.refine(begin, end, worth, lists[0].data())) right = false;
    for (int64_t b = begin; b < end; ++b) {
      const Shortlist& list = lists[0][b];
      if (list.too_long) continue;
      nearest.squared[first + b] = list.squared;
      nearest.index[first + b] = list.index;
    }
    refined += exact.looked;
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
    const Tensor& rows, const Tensor& apart, const Tensor& tails, int64_t count, int64_t dim, bool cosine) {
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
  const int64_t padded = blocks * kBlock, parts = parts_of(quads);
  return {static_cast<const uint8_t*>(codes.const_data_ptr()),
          floats("scale", scale, padded * parts),
          floats("square", square, padded),
          floats("error", error, padded),
          floats("centre", centre, dim),
          floats("rows", rows, padded * apart.size(0)),
          at,
          apart.size(0),
          quads,
          dim,
          parts,
          floats("tails", tails, parts == 1 ? 0 : padded * 2 * kCuts),
          cosine ? (static_cast<float>(dim) / 16 + 32) * 6.2e-8f : 0.0f};
}

}  // namespace

// `nearest_key` of nearest_key.cpp with codes as in dualedit_kernels/nearest_key/codes.py.
std::tuple<Tensor, Tensor> nearest_key_coded(
    Tensor query, Tensor keys, Tensor radius, bool cosine, int64_t isa, Tensor codes, Tensor scale, Tensor square,
    Tensor error, Tensor centre, Tensor rows, Tensor apart, Tensor tails) {
  const Arguments arguments = prepare(query, keys, radius, cosine, isa);
  const int64_t batch = arguments.lookup.batch, count = arguments.count;
  const Codes tables =
      unpack(codes, scale, square, error, centre, rows, apart, tails, count, arguments.lookup.dim, cosine);
  Nearest nearest(batch);
  refined = given_up = 0;
  std::vector<int64_t> hopeless;
  for (int64_t first = 0; first < batch && count > 0; first += kMostQueries) {
    const int64_t some = batch - first < kMostQueries ? batch - first : kMostQueries;
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
