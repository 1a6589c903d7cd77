// The coarse pass: which keys may be nearest to each query, by bounds of their distances.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/nearest_key_coarse.h"
#include "cpu/nearest_key_search.h"

namespace dualedit {

constexpr double kSmall = 1e-33;  // more than squares that underflow can amount to
constexpr double kUp = 1 + 1e-6, kDown = 1 - 1e-6;  // more than any conversion or square root rounds

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

// What is known of one query: the nearest key looked at, and the others that may be nearer.
struct Shortlist {
  float squared = std::numeric_limits<float>::infinity();
  int64_t index = -1;  // of the nearest key looked at
  double limit = std::numeric_limits<double>::infinity();  // keys whose lower bound exceeds it are out
  bool too_long = false;
  std::vector<Candidate> keys;  // not looked at yet
  int64_t last = -1;  // the key looked at last, and what was found
  float last_squared = std::numeric_limits<float>::infinity();

  void keep(double within);
};

// Exact distances, one query and some keys at a time. Not for two threads at once.
class Exact {
 public:
  Exact(const Arguments& arguments, const Rounding& rounding);

  // Look at ``some`` keys, kMaxBlock at most, and lower the list of query q by them; meanwhile ``next`` [more] are
  // fetched. lower: bounds of the distances, or null. False if a distance is below its bound.
  bool look(
      int64_t q, const int64_t* keys, const float* lower, int64_t some, const int64_t* next, int64_t more,
      Shortlist& list);

  int64_t looked = 0;  // keys so far

 private:
  const Arguments& arguments_;
  const Rounding& rounding_;
  Buffer scratch_;
};

struct Pass {
  const Codes& codes;
  const CodedQueries& coded;
  CoarseKernel kernel;
  const Rounding& rounding;
  int64_t first;  // number of the first coded query among all
  int64_t count;  // keys
  double exact_cost;  // of one exact distance, in products of a coded row and a coded key
};

// Lower lists [batch] by the keys of blocks begin..end. False if distances contradict the codes.
bool shortlist(const Pass& pass, int64_t begin, int64_t end, Exact& exact, Shortlist* lists);

}  // namespace dualedit
