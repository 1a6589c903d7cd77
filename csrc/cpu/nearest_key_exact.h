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

// Exact distances of pairs of a query and a key, some at a time. Not for two threads at once.
class Exact {
 public:
  // first: number of the first coded query among all.
  Exact(const Arguments& arguments, const Rounding& rounding, const CodedQueries& coded, int64_t first);

  // Look at one key for each of the coded queries [batch] and lower their lists by them. keys: -1 for none; lower:
  // bounds of the distances. False if a distance is below its bound.
  bool look(const int64_t* keys, const float* lower, Shortlist* lists);

  // Look at the keys in the lists of queries begin..end, but for lists with more than ``worth``: those are too long.
  // False as above.
  bool refine(int64_t begin, int64_t end, size_t worth, Shortlist* lists);

  int64_t looked = 0;  // distances computed so far, to the end

 private:
  struct Group;

  void run(const Group& now, const Group& next, int64_t begin, int64_t end, int64_t next_begin, float* squared);
  bool lower_by(int64_t key, float lower, float squared, Shortlist& list);
  bool look_first(int64_t begin, int64_t end, size_t worth, Shortlist* lists);
  Group take(const Shortlist* lists, size_t& at) const;
  bool part(int64_t number, Shortlist* lists);
  bool flush(Shortlist* lists);
  void sort_by_keys();

  struct Open {  // a distance that is not yet computed to the end
    int64_t query;
    const Candidate* key;
    size_t lanes;  // where its sums are
  };

  const Arguments& arguments_;
  const Rounding& rounding_;
  int64_t first_;
  int64_t batch_;
  bool cached_;
  int64_t edge_[kCuts + 2];  // where parts begin and end, in dimensions
  std::vector<Open> open_, sorted_;
  Buffer lanes_;  // [kOpen, kLanes]
  Buffer scratch_;
};

}  // namespace dualedit
