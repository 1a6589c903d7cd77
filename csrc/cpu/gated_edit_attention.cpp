// The attention of gated_edit_attention on CPUs that multiply bf16: splits heads and queries over torch's threads.
#include "cpu/gated_edit_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/nearest_key_search.h"
#include "cpu/target.h"

namespace dualedit {

#ifdef DUALEDIT_X86
DUALEDIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
namespace avx512bf16 {
namespace {
#include "cpu/gated_edit_attention_kernel.h"
}  // namespace
}  // namespace avx512bf16
DUALEDIT_TARGET_END
#endif

bool has_bf16_products() {
#ifdef DUALEDIT_X86
  return best_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

const uint16_t* rows_of(const char* name, const Tensor& tensor, int64_t width) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(1) == width && tensor.scalar_type() == ScalarType::BFloat16 &&
          (tensor.stride(1) == 1 || width == 1),
      "gated_edit_attention: ", name, " must be bf16 [rows, M] with rows in one piece");
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

}  // namespace

// softmax(q k.T / sqrt(M / heads)) v by head: q [P, M], k and v [S, M] -> [P, M], all bf16.
Tensor attend_bf16(Tensor q, Tensor k, Tensor v, int64_t heads) {
  STD_TORCH_CHECK(has_bf16_products(), "gated_edit_attention: this processor lacks AVX512-BF16");
  const int64_t width = q.dim() == 2 ? q.size(1) : 0;
  STD_TORCH_CHECK(heads > 0 && width > 0 && width % heads == 0, "gated_edit_attention: heads must divide M");
  Attention a{};
  a.q = rows_of("q", q, width);
  a.k = rows_of("k", k, width);
  a.v = rows_of("v", v, width);
  STD_TORCH_CHECK(
      k.size(0) == v.size(0) && k.size(0) > 0, "gated_edit_attention: as many keys as values, one at least");
  Tensor out = torch::stable::new_empty(q, {q.size(0), width}, ScalarType::BFloat16);
  a.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  a.queries = q.size(0);
  a.keys = k.size(0);
  a.heads = heads;
  a.size = width / heads;
  a.q_stride = q.stride(0);
  a.k_stride = k.stride(0);
  a.v_stride = v.stride(0);
#ifdef DUALEDIT_X86
  const avx512bf16::Room room(a);
  // Heads are shared out; with more threads than heads, queries too, in whole tiles.
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t tiles = (a.queries + avx512bf16::kRows - 1) / avx512bf16::kRows;
  int64_t parts = (threads + heads - 1) / heads;
  if (parts > tiles) parts = tiles;
  const auto work_on = [&](int64_t begin, int64_t end) {
    Buffer memory = aligned(room.floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, part = i % parts;
      const int64_t from = tiles * part / parts * avx512bf16::kRows;
      const int64_t to = tiles * (part + 1) / parts * avx512bf16::kRows;
      avx512bf16::attend(a, head, from, to < a.queries ? to : a.queries, room, memory.get());
    }
  };
  if (threads == 1) {
    work_on(0, heads * parts);
  } else {
    torch::stable::parallel_for(0, heads * parts, 1, work_on);
  }
#endif
  return out;
}

}  // namespace dualedit
