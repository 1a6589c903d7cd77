// Exact distances of the keys that bounds leave in question, by the very code of the lookup without codes. They are
// computed in parts: with what the codes say of the dimensions to come, most keys are given up behind the first
// part, which saves reading them.
#include "cpu/nearest_key_exact.h"

#include <algorithm>
#include <cstring>

namespace dualedit {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void Shortlist::keep(double within) {
  size_t kept = 0;
  for (const Candidate& key : keys) {
    if (!(key.lower > within)) keys[kept++] = key;
  }
  keys.resize(kept);
}

Exact::Exact(const Arguments& arguments, const Rounding& rounding, const CodedQueries& coded)
    : arguments_(arguments), rounding_(rounding), scratch_(aligned(kMaxBlock * arguments.lookup.stride)) {
  const int64_t dim = arguments.lookup.dim;
  edge_[0] = 0;
  for (int64_t c = 0; c < kCuts; ++c) edge_[c + 1] = std::min(dim, coded.cut[c] * 4);
  edge_[kCuts + 1] = dim;
}

// Squared distances of some keys in the dimensions up to the end of the part at hand.
void Exact::run(int64_t q, const Some& some, const Some& next, int64_t next_begin, float* squared) {
  Lookup own = arguments_.lookup;
  own.query += q * own.stride;
  own.batch = 1;
  own.head = 0;
  if (own.stream) {  // one query alone is summed in another order, and not in parts
    for (int64_t i = 0; i < some.count; ++i) {
      int64_t found = -1;
      squared[i] = kInfinity;
      arguments_.scan(own, some.keys[i], some.keys[i] + 1, &squared[i], &found, scratch_.get());
    }
    return;
  }
  const Piece now{some.keys, some.count, edge_[part_], edge_[part_ + 1]};
  const Piece then{next.keys, next.count, next_begin, next_begin};
  arguments_.few(own, now, then, at_, squared, scratch_.get());
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

bool Exact::look(int64_t q, int64_t key, float lower, int64_t next, Shortlist& list) {
  const int64_t end = edge_[1];
  edge_[1] = arguments_.lookup.dim;  // all of it
  part_ = 0;
  float squared[kMaxBlock];
  run(q, Some{1, {key}, {}}, Some{next >= 0 ? 1 : 0, {next}, {}}, 0, squared);
  edge_[1] = end;
  return lower_by(key, lower, squared[0], list);
}

// From place ``at`` on: the next keys that may still be nearest, as many as are worked on together.
Exact::Some Exact::take(const Shortlist& list, size_t& at) const {
  Some some;
  for (; at < left_.size() && some.count < kMaxBlock; ++at) {
    const Candidate& key = list.keys[left_[at]];
    if (key.lower > list.limit) continue;
    some.at[some.count] = at;
    some.keys[some.count++] = key.index;
  }
  return some;
}

// One part of the distances of all keys that are left.
bool Exact::part(int64_t q, Shortlist& list, const Shortlist* next) {
  const int64_t end = edge_[part_ + 1];
  const bool last = end == arguments_.lookup.dim;
  bool right = true;
  size_t kept = 0, at = 0;
  Some some = take(list, at), ahead;
  for (; some.count > 0; some = ahead) {
    ahead = take(list, at);
    Some fetched = ahead;
    int64_t begin = edge_[part_];
    if (ahead.count == 0 && !last && kept > 0) {  // the part that follows, of keys known to be in it
      begin = end;
      for (size_t i = 0; i < kept && fetched.count < kMaxBlock; ++i) {
        fetched.keys[fetched.count++] = list.keys[left_[i]].index;
      }
    } else if (ahead.count == 0 && next != nullptr && !next->too_long) {
      begin = 0;
      for (size_t i = 0; i < next->keys.size() && fetched.count < kMaxBlock; ++i) {
        fetched.keys[fetched.count++] = next->keys[i].index;
      }
    }
    for (int64_t j = 0; j < kMaxBlock; ++j) at_[j] = lanes_.data() + some.at[j < some.count ? j : 0] * kLanes;
    float squared[kMaxBlock];
    run(q, some, fetched, begin, squared);
    for (int64_t j = 0; j < some.count; ++j) {
      const size_t place = left_[some.at[j]];
      const Candidate& key = list.keys[place];
      if (last) {
        right &= lower_by(key.index, key.lower, squared[j], list);
      } else if (!(rounding_.least_of(squared[j], key.rest[part_]) > list.squared)) {
        if (kept != some.at[j]) std::copy_n(at_[j], kLanes, lanes_.data() + kept * kLanes);
        left_[kept++] = place;
      }
    }
  }
  left_.resize(last ? 0 : kept);
  return right;
}

bool Exact::refine(int64_t q, Shortlist& list, size_t worth, const Shortlist* next) {
  list.keep(list.limit);
  bool right = true;
  if (!list.keys.empty() && (list.index < 0 || list.keys.size() > worth)) {  // the most promising one alone
    const auto nearer = [](const Candidate& a, const Candidate& b) { return a.lower < b.lower; };
    const auto first = std::min_element(list.keys.begin(), list.keys.end(), nearer);
    right = look(q, first->index, first->lower, -1, list);
    list.keys.erase(first);
    list.keep(list.limit);
  }
  list.too_long = list.keys.size() > worth;
  if (list.too_long) return right;
  left_.clear();
  for (size_t i = 0; i < list.keys.size(); ++i) left_.push_back(i);
  if (lanes_.size() < left_.size() * kLanes) lanes_.resize(left_.size() * kLanes);
  for (part_ = 0; part_ <= kCuts && !left_.empty(); ++part_) right &= part(q, list, next);
  part_ = 0;
  return right;
}

}  // namespace dualedit
