// Exact distances of the keys that bounds leave in question.
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
  // What is computed in the end is not below it: s is that of the first dimensions, ``rest`` at most the square of
  // the distance in the others.
  double least_of(double s, double rest) const {
    return ((s - kSmall) / (1 + gamma) * kDown + rest) * (1 - gamma) * kDown - kSmall;
  }
};

struct Candidate {
  int64_t index;
  float lower;  // the distance is not below it
  float rest[kCuts];  // nor the square of the distance in the dimensions behind a cut below this
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
  // cut: dimensions where distances can be given up.
  Exact(const Arguments& arguments, const Rounding& rounding, const CodedQueries& coded);

  // Look at a key, of which ``lower`` bounds the distance, and lower the list of query q by it; meanwhile the key
  // ``next`` is fetched, unless it is -1. False if the distance is below its bound.
  bool look(int64_t q, int64_t key, float lower, int64_t next, Shortlist& list);

  // Look at the keys of the list, unless too many are left: part by part, those that may still be nearest. The
  // first ones of ``next`` are fetched. False as above.
  bool refine(int64_t q, Shortlist& list, size_t worth, const Shortlist* next);

  int64_t looked = 0;  // distances computed so far, to the end

 private:
  struct Some {  // keys, and where they are among those that are left
    int64_t count = 0;
    int64_t keys[kMaxBlock];
    size_t at[kMaxBlock];
  };

  void run(int64_t q, const Some& some, const Some& next, int64_t next_begin, float* squared);
  bool lower_by(int64_t key, float lower, float squared, Shortlist& list);
  bool part(int64_t q, Shortlist& list, const Shortlist* next);
  Some take(const Shortlist& list, size_t& at) const;

  const Arguments& arguments_;
  const Rounding& rounding_;
  int64_t edge_[kCuts + 2];  // where parts begin and end, in dimensions
  int64_t part_ = 0;
  std::vector<size_t> left_;  // places in the list
  std::vector<float> lanes_;  // [left, kLanes]
  float* at_[kMaxBlock] = {};  // lanes of the keys at work
  Buffer scratch_;
};

}  // namespace dualedit
