// Binds csrc/cuda to the schemas of dualedit_kernels/library.py, through the stable ABI of libtorch.
//
// Empty unless the build defines DUALEDIT_CUDA, which it does where it has compiled the .cu files: the CPU build
// takes every .cpp under csrc.
#ifdef DUALEDIT_CUDA

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/nearest_key.cuh"

// Weak: a torch that was built without CUDA lacks it, and the library must load there all the same.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dualedit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

CudaType cuda_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return CudaType::kFloat32;
    case ScalarType::BFloat16: return CudaType::kBFloat16;
    case ScalarType::Half: return CudaType::kFloat16;
    default: STD_TORCH_CHECK(false, "nearest_key: ", name, " must be fp32, bf16 or fp16");
  }
}

void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "nearest_key: CUDA says ", cudaGetErrorString(status));
}

int multiprocessors(int32_t device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// query [B, D], keys [N, D], radius [N] fp32, all on one GPU; rows of query and keys may be strided.
std::tuple<Tensor, Tensor> nearest_key_on_gpu(Tensor query, Tensor keys, Tensor radius, bool cosine) {
  STD_TORCH_CHECK(
      query.dim() == 2 && keys.dim() == 2 && radius.dim() == 1 && query.size(1) == keys.size(1) &&
          keys.size(0) == radius.size(0),
      "nearest_key: expected query [B, D], keys [N, D] and radius [N]");
  STD_TORCH_CHECK(query.size(0) > 0 && keys.numel() > 0, "nearest_key: expected B, N and D of at least 1");
  STD_TORCH_CHECK(
      query.stride(1) == 1 && keys.stride(1) == 1 && radius.is_contiguous(),
      "nearest_key: the last dimension of query, keys and radius must be contiguous");
  STD_TORCH_CHECK(radius.scalar_type() == ScalarType::Float, "nearest_key: radius must be fp32");
  STD_TORCH_CHECK(
      query.is_cuda() && keys.is_cuda() && radius.is_cuda() &&
          query.get_device_index() == keys.get_device_index() &&
          query.get_device_index() == radius.get_device_index(),
      "nearest_key: query, keys and radius must be on one GPU");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "nearest_key: this torch was built without CUDA");

  const int32_t device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "nearest_key: no current stream");

  const int processors = multiprocessors(device);
  const int64_t batch = query.size(0), count = keys.size(0), dim = query.size(1);
  const auto bytes = static_cast<int64_t>(nearest_key_cuda_scratch(batch, count, dim, processors));
  Tensor scratch = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
  Tensor index = torch::stable::new_empty(query, {batch}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(query, {batch}, ScalarType::Float);
  CudaLookup lookup{};
  lookup.query = query.const_data_ptr();
  lookup.query_type = cuda_type(query, "query");
  lookup.query_stride = query.stride(0);
  lookup.keys = keys.const_data_ptr();
  lookup.key_type = cuda_type(keys, "keys");
  lookup.key_stride = keys.stride(0);
  lookup.radius = static_cast<const float*>(radius.const_data_ptr());
  lookup.batch = batch;
  lookup.count = count;
  lookup.dim = dim;
  lookup.cosine = cosine;
  lookup.index = static_cast<int64_t*>(index.mutable_data_ptr());
  lookup.distance = static_cast<float*>(distance.mutable_data_ptr());
  check(nearest_key_cuda(lookup, processors, scratch.mutable_data_ptr(), static_cast<cudaStream_t>(stream)));
  return std::make_tuple(index, distance);
}

}  // namespace
}  // namespace dualedit

STABLE_TORCH_LIBRARY_IMPL(dualedit_kernels, CUDA, library) {
  library.impl("nearest_key_cuda", TORCH_BOX(&dualedit::nearest_key_on_gpu));
}

// Whether the library holds CUDA code. Read by Python through ctypes.
extern "C" __attribute__((visibility("default"))) int dualedit_has_cuda() { return 1; }

#endif  // DUALEDIT_CUDA
