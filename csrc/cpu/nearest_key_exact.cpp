// Exact distances of the keys that bounds leave in question, by the very code of the lookup without codes. They are
// computed in parts: with what the codes say of the dimensions to come, most keys are given up behind the first
// part, which saves reading them.
#include "cpu/nearest_key_exact.h"

#include <algorithm>
#include <cstring>

namespace dualedit {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kOpen = 2048;  // distances that are computed side by side

}  // namespace

void Shortlist::keep(double within) {
  size_t kept = 0;
  for (const Candidate& key : keys) {
    if (!(key.lower > within)) keys[kept++] = key;
  }
  keys.resize(kept);
}

// Pairs that are worked on together, where their distances are among those that are open, and their sums.
struct Exact::Group {
  int64_t some = 0;
  Pair pairs[kMaxBlock];
  size_t at[kMaxBlock];
  size_t lanes[kMaxBlock];
};

Exact::Exact(const Arguments& arguments, const Rounding& rounding, const CodedQueries& coded, int64_t first)
    : arguments_(arguments),
      rounding_(rounding),
      first_(first),
      batch_(coded.batch),
      cached_(fit_cache(arguments.lookup, arguments.count)),
      lanes_(aligned(kOpen * kLanes)),
      scratch_(aligned(kMaxBlock * arguments.lookup.stride)) {
  open_.reserve(512);
  const int64_t dim = arguments.lookup.dim;
  edge_[0] = 0;
  for (int64_t c = 0; c < kCuts; ++c) {
    edge_[c + 1] = coded.cuts ? first_part_behind(coded.parts, c) * coded.part * 4 : dim;
  }
  edge_[kCuts + 1] = dim;
}

// Squared distances of some pairs in the dimensions up to ``end``, from ``begin`` on continued from their lanes.
void Exact::run(
    const Group& now, const Group& next, int64_t begin, int64_t end, int64_t next_begin, float* squared) {
  Lookup own = arguments_.lookup;
  own.query += first_ * own.stride;
  own.head = 0;
  if (own.stream) {  // one query alone is summed in another order, and not in parts
    for (int64_t i = 0; i < now.some; ++i) {
      int64_t found = -1;
      squared[i] = kInfinity;
      const int64_t key = now.pairs[i].key;
      arguments_.scan(own, key, key + 1, &squared[i], &found, scratch_.get());
    }
    return;
  }
  float* lanes[kMaxBlock];
  for (int64_t j = 0; j < kMaxBlock; ++j) lanes[j] = lanes_.get() + now.lanes[j < now.some ? j : 0] * kLanes;
  const Piece piece{now.pairs, now.some, begin, end};
  const Piece then{next.pairs, next.some, next_begin, next_begin};
  arguments_.few(own, piece, then, lanes, squared, scratch_.get());
}

bool Exact::lower_by(int64_t key, float lower, float squared, Shortlist& list) {
  ++looked;
  list.last = key;
  list.last_squared = squared;
  const bool right = !(squared < rounding_.least(lower));
  if (!(squared < kInfinity)) return right;  // nor NaN
  if (squared < list.squared || (squared == list.squared && key < list.index)) {
    list.squared = squared;
    list.index = key;
    list.limit = std::min(list.limit, rounding_.reach(squared));
  }
  return right;
}

bool Exact::look(const int64_t* keys, const float* lower, Shortlist* lists) {
  int64_t b = 0;
  const auto some = [&]() {
    Group group;
    for (; b < batch_ && group.some < kMaxBlock; ++b) {
      if (keys[b] < 0) continue;
      group.lanes[group.some] = static_cast<size_t>(group.some);
      group.pairs[group.some++] = {b, keys[b]};
    }
    return group;
  };
  bool right = true;
  Group now = some(), next;
  for (; now.some > 0; now = next) {
    next = some();
    float squared[kMaxBlock];
    run(now, next, 0, arguments_.lookup.dim, 0, squared);
    for (int64_t j = 0; j < now.some; ++j) {
      const int64_t query = now.pairs[j].query;
      right &= lower_by(now.pairs[j].key, lower[query], squared[j], lists[query]);
    }
  }
  return right;
}

// From place ``at`` on: the next keys that may still be nearest, as many as are worked on together.
Exact::Group Exact::take(const Shortlist* lists, size_t& at) const {
  Group group;
  for (; at < open_.size() && group.some < kMaxBlock; ++at) {
    const Open& one = open_[at];
    if (one.key->lower > lists[one.query].limit) continue;
    group.at[group.some] = at;
    group.lanes[group.some] = one.lanes;
    group.pairs[group.some++] = {one.query, one.key->index};
  }
  return group;
}

// A part of the open distances.
bool Exact::part(int64_t number, Shortlist* lists) {
  const int64_t begin = edge_[number], end = edge_[number + 1];
  const bool last = end == arguments_.lookup.dim;
  bool right = true;
  size_t kept = 0, at = 0;
  Group now = take(lists, at), next;
  for (; now.some > 0; now = next) {
    next = take(lists, at);
    float squared[kMaxBlock];
    run(now, next, begin, end, begin, squared);
    for (int64_t j = 0; j < now.some; ++j) {
      const Open one = open_[now.at[j]];
      Shortlist& list = lists[one.query];
      if (last) {
        right &= lower_by(one.key->index, one.key->lower, squared[j], list);
      } else if (!(rounding_.least_of(squared[j], one.key->rest[number]) > list.squared)) {
        open_[kept++] = one;
      }
    }
  }
  open_.resize(last ? 0 : kept);
  return right;
}

// All open distances. They come query by query, and a query stays in the first-level cache; but keys that lie in
// memory are read in their order, as a key may be wanted by several queries.
bool Exact::flush(Shortlist* lists) {
  if (!cached_) sort_by_keys();
  bool right = true;
  for (int64_t number = 0; number <= kCuts && !open_.empty(); ++number) right &= part(number, lists);
  return right;
}

void Exact::sort_by_keys() {
  constexpr int64_t kBins = 256;
  size_t starts[kBins + 1] = {};
  const auto bin = [&](const Open& one) { return one.key->index * kBins / arguments_.count; };
  for (const Open& one : open_) ++starts[bin(one) + 1];
  for (int64_t i = 0; i < kBins; ++i) starts[i + 1] += starts[i];
  sorted_.resize(open_.size());
  for (const Open& one : open_) sorted_[starts[bin(one)]++] = one;
  open_.swap(sorted_);
}

// The most promising key alone, where none is known or the others are too many.
bool Exact::look_first(int64_t begin, int64_t end, size_t worth, Shortlist* lists) {
  std::vector<int64_t> keys(batch_, -1);
  std::vector<float> lower(batch_);
  const auto nearer = [](const Candidate& a, const Candidate& b) { return a.lower < b.lower; };
  bool any = false;
  for (int64_t b = begin; b < end; ++b) {
    Shortlist& list = lists[b];
    if (list.too_long) continue;
    list.keep(list.limit);
    if (list.keys.empty() || (list.index >= 0 && list.keys.size() <= worth)) continue;
    const auto first = std::min_element(list.keys.begin(), list.keys.end(), nearer);
    keys[b] = first->index;
    lower[b] = first->lower;
    list.keys.erase(first);
    any = true;
  }
  if (!any) return true;
  const bool right = look(keys.data(), lower.data(), lists);
  for (int64_t b = begin; b < end; ++b) {
    if (keys[b] >= 0) lists[b].keep(lists[b].limit);
  }
  return right;
}

bool Exact::refine(int64_t begin, int64_t end, size_t worth, Shortlist* lists) {
  bool right = look_first(begin, end, worth, lists);
  for (int64_t b = begin; b < end; ++b) {
    Shortlist& list = lists[b];
    list.too_long |= list.keys.size() > worth;
    if (list.too_long) continue;
    for (const Candidate& key : list.keys) {
      open_.push_back({b, &key, open_.size()});
      if (open_.size() == kOpen) right &= flush(lists);
    }
  }
  return flush(lists) && right;
}

}  // namespace dualedit
