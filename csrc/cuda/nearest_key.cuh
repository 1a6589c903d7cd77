// Nearest key on NVIDIA GPUs: raw pointers in, a cudaError_t out, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace dualedit {

enum class CudaType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One lookup; all pointers are on the current device.
struct CudaLookup {
  const void* query;  // [batch, dim], rows query_stride elements apart
  CudaType query_type;
  int64_t query_stride;
  const void* keys;  // [count, dim], rows key_stride elements apart
  CudaType key_type;
  int64_t key_stride;
  const float* radius;  // [count]
  int64_t batch;
  int64_t count;
  int64_t dim;
  bool cosine;
  int64_t* index;  // [batch] out: the nearest key, or -1 outside its radius
  float* distance;  // [batch] out: inf when there is no nearest key
};

// Bytes of scratch memory for batch, count, dim and a device with that many multiprocessors.
size_t nearest_key_cuda_scratch(int64_t batch, int64_t count, int64_t dim, int multiprocessors);

// Run on a stream. batch, count and dim are at least 1, count below 2^31; scratch is aligned to 16 bytes.
cudaError_t nearest_key_cuda(const CudaLookup& lookup, int multiprocessors, void* scratch, cudaStream_t stream);

}  // namespace dualedit
