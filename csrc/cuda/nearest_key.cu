// Nearest key on NVIDIA GPUs by exact differences, in three launches and without atomics.
//
//   prepare  queries to fp32, scaled to length 1 for the cosine metric, padded with zeros
//   scan     each warp walks a share of the keys in ascending order, kKeys at a time against QUERIES queries held
//            in the L1 cache; sum_d (q_d - k_d)^2 in fp32 registers, reduced by warp shuffles
//   finish   one warp for each query: the smallest over all shares, then the radius of that key
//
// Minima do not depend on the order and ties go to the lowest index, so the split never shows in the result.
// NaN is never smaller than anything: a key or a query that is not finite is never near.
#include "cuda/nearest_key.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

namespace dualedit {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // warps of a block
constexpr int kKeys = 4;  // keys that a warp holds at once
constexpr int kVector = 8;  // elements that a lane loads at once
constexpr int kNone = 0x7fffffff;  // larger than every index
constexpr unsigned kAll = 0xffffffffu;

__host__ __device__ int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// kVector elements from an address aligned to 16 bytes.
template <typename T>
__device__ void load_vector(const T* from, float (&to)[kVector]) {
  constexpr int kWords = kVector * sizeof(T) / 16;
  uint4 words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  const T* elements = reinterpret_cast<const T*>(words);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = to_float(elements[i]);
}

// The same from any address, zero from ``left`` elements on.
template <typename T>
__device__ void load_some(const T* from, int64_t left, float (&to)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = i < left ? to_float(from[i]) : 0.0f;
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// The smaller distance, and of equal ones the lower index.
__device__ void keep_nearer(float& best, int& nearest, float other, int other_index) {
  if (other < best || (other == best && other_index < nearest)) {
    best = other;
    nearest = other_index;
  }
}

// query [B, D] to prepared [B, stride] fp32; one block for each query.
template <typename T>
__global__ void prepare(const T* query, int64_t query_stride, int64_t dim, int64_t stride, bool cosine, float* prepared) {
  __shared__ float sums[kWarps];
  const T* from = query + blockIdx.x * query_stride;
  float* to = prepared + blockIdx.x * stride;
  float length = 1.0f;
  if (cosine) {
    float sum = 0.0f;
    for (int64_t d = threadIdx.x; d < dim; d += blockDim.x) {
      const float x = to_float(from[d]);
      sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w];
    length = sqrtf(sum);  // 0 makes NaN below: no direction, never near
  }
  for (int64_t d = threadIdx.x; d < stride; d += blockDim.x) {
    to[d] = d < dim ? to_float(from[d]) / length : 0.0f;
  }
}

// 1 / |key| of kKeys keys, for the cosine metric. The second read of the keys comes from the cache.
template <typename T, bool VECTOR>
__device__ void inverse_lengths(const T* const (&rows)[kKeys], int64_t dim, int lane, float (&inverse)[kKeys]) {
  float sums[kKeys] = {};
  for (int64_t d = lane * kVector; d < dim; d += kWarp * kVector) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      float k[kVector];
      if (VECTOR) {
        load_vector(rows[i] + d, k);
      } else {
        load_some(rows[i] + d, dim - d, k);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[i] = fmaf(k[j], k[j], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kKeys; ++i) inverse[i] = 1.0f / sqrtf(warp_sum(sums[i]));
}

// best, nearest [parts, B]: of each share the smallest squared distance and its lowest index.
// grid (parts, tiles of QUERIES queries); VECTOR: rows of keys are aligned to 16 bytes and dim divides by kVector.
template <typename T, int QUERIES, bool COSINE, bool VECTOR>
__global__ void __launch_bounds__(kWarp * kWarps, 1) scan(
    const float* prepared, int64_t stride, const T* keys, int64_t key_stride, int64_t batch, int64_t count, int64_t dim,
    int64_t share, float* best, int* nearest) {
  __shared__ float block_best[kWarps][QUERIES];
  __shared__ int block_nearest[kWarps][QUERIES];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_query = static_cast<int64_t>(blockIdx.y) * QUERIES;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * share;
  const int64_t end = begin + share < count ? begin + share : count;
  const float* queries[QUERIES];
#pragma unroll
  for (int q = 0; q < QUERIES; ++q) {  // beyond the batch: the last query again, not written
    queries[q] = prepared + (first_query + q < batch ? first_query + q : batch - 1) * stride;
  }

  float mine = CUDART_INF_F;  // lane q keeps the best of query q
  int mine_index = kNone;
  for (int64_t n = begin; n < end; n += kKeys) {
    const T* rows[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) rows[i] = keys + (n + i < end ? n + i : end - 1) * key_stride;
    float inverse[kKeys];
    if (COSINE) inverse_lengths<T, VECTOR>(rows, dim, lane, inverse);
    float sums[kKeys][QUERIES] = {};
    for (int64_t d = lane * kVector; d < dim; d += kWarp * kVector) {
      float k[kKeys][kVector];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (VECTOR) {
          load_vector(rows[i] + d, k[i]);
        } else {
          load_some(rows[i] + d, dim - d, k[i]);
        }
        if (COSINE) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) k[i][j] = VECTOR || d + j < dim ? k[i][j] * inverse[i] : 0.0f;
        }
      }
#pragma unroll
      for (int q = 0; q < QUERIES; ++q) {
        float x[kVector];
        load_vector(queries[q] + d, x);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            const float difference = x[j] - k[i][j];
            sums[i][q] = fmaf(difference, difference, sums[i][q]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
#pragma unroll
      for (int q = 0; q < QUERIES; ++q) {
        const float squared = warp_sum(sums[i][q]);
        // Strictly closer: an earlier key keeps a tie, and inf or NaN never enters.
        if (lane == q && n + i < end && squared < mine) {
          mine = squared;
          mine_index = static_cast<int>(n + i);
        }
      }
    }
  }
  if (lane < QUERIES) {
    block_best[warp][lane] = mine;
    block_nearest[warp][lane] = mine_index;
  }
  __syncthreads();
  const int64_t query = first_query + threadIdx.x;
  if (threadIdx.x < QUERIES && query < batch) {
    float nearest_best = CUDART_INF_F;
    int index = kNone;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) keep_nearer(nearest_best, index, block_best[w][threadIdx.x], block_nearest[w][threadIdx.x]);
    best[blockIdx.x * batch + query] = nearest_best;
    nearest[blockIdx.x * batch + query] = index;
  }
}

// index, distance [B] from best, nearest [parts, B]; one warp for each query.
__global__ void finish(
    const float* best, const int* nearest, int64_t parts, int64_t batch, const float* radius, bool cosine,
    int64_t* index, float* distance) {
  float mine = CUDART_INF_F;
  int mine_index = kNone;
  for (int64_t p = threadIdx.x; p < parts; p += kWarp) {
    keep_nearer(mine, mine_index, best[p * batch + blockIdx.x], nearest[p * batch + blockIdx.x]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAll, mine, offset);
    const int other_index = __shfl_xor_sync(kAll, mine_index, offset);
    keep_nearer(mine, mine_index, other, other_index);
  }
  if (threadIdx.x != 0) return;
  const float reached = cosine ? mine * 0.5f : sqrtf(mine);
  distance[blockIdx.x] = reached;
  index[blockIdx.x] = mine_index != kNone && reached <= radius[mine_index] ? mine_index : -1;
}

// How a lookup is laid over the GPU and over the scratch memory.
struct Layout {
  int queries;  // of a tile
  int64_t tiles;
  int64_t share;  // keys of a warp
  int64_t parts;  // blocks along the keys
  int64_t stride;  // of the prepared queries

  Layout(int64_t batch, int64_t count, int64_t dim, int multiprocessors) {
    queries = batch == 1 ? 1 : batch <= 4 ? 4 : 8;
    tiles = (batch + queries - 1) / queries;
    stride = round_up(dim, kVector);
    int64_t wanted = 4 * static_cast<int64_t>(multiprocessors) / tiles;
    if (wanted < 1) wanted = 1;
    share = round_up((count + wanted * kWarps - 1) / (wanted * kWarps), kKeys);
    parts = (count + share * kWarps - 1) / (share * kWarps);
  }
};

template <typename T, int QUERIES>
void launch_scan(const CudaLookup& lookup, const Layout& layout, const float* prepared, float* best, int* nearest, cudaStream_t stream) {
  const T* keys = static_cast<const T*>(lookup.keys);
  const bool vector = lookup.dim % kVector == 0 && lookup.key_stride * sizeof(T) % 16 == 0 &&
      reinterpret_cast<uintptr_t>(keys) % 16 == 0;
  auto* kernel = lookup.cosine ? (vector ? scan<T, QUERIES, true, true> : scan<T, QUERIES, true, false>)
                               : (vector ? scan<T, QUERIES, false, true> : scan<T, QUERIES, false, false>);
  const dim3 grid(static_cast<unsigned>(layout.parts), static_cast<unsigned>(layout.tiles));
  kernel<<<grid, kWarp * kWarps, 0, stream>>>(
      prepared, layout.stride, keys, lookup.key_stride, lookup.batch, lookup.count, lookup.dim, layout.share, best, nearest);
}

template <typename T>
void launch_tiles(const CudaLookup& lookup, const Layout& layout, const float* prepared, float* best, int* nearest, cudaStream_t stream) {
  switch (layout.queries) {
    case 1: return launch_scan<T, 1>(lookup, layout, prepared, best, nearest, stream);
    case 4: return launch_scan<T, 4>(lookup, layout, prepared, best, nearest, stream);
    default: return launch_scan<T, 8>(lookup, layout, prepared, best, nearest, stream);
  }
}

template <typename T>
void launch_prepare(const CudaLookup& lookup, const Layout& layout, float* prepared, cudaStream_t stream) {
  prepare<T><<<static_cast<unsigned>(lookup.batch), kWarp * kWarps, 0, stream>>>(
      static_cast<const T*>(lookup.query), lookup.query_stride, lookup.dim, layout.stride, lookup.cosine, prepared);
}

}  // namespace

size_t nearest_key_cuda_scratch(int64_t batch, int64_t count, int64_t dim, int multiprocessors) {
  const Layout layout(batch, count, dim, multiprocessors);
  return sizeof(float) * batch * layout.stride + (sizeof(float) + sizeof(int)) * layout.parts * batch;
}

cudaError_t nearest_key_cuda(const CudaLookup& lookup, int multiprocessors, void* scratch, cudaStream_t stream) {
  const Layout layout(lookup.batch, lookup.count, lookup.dim, multiprocessors);
  if (layout.tiles > 65535 || lookup.count >= kNone) return cudaErrorInvalidValue;
  float* prepared = static_cast<float*>(scratch);
  float* best = prepared + lookup.batch * layout.stride;
  int* nearest = reinterpret_cast<int*>(best + layout.parts * lookup.batch);
  switch (lookup.query_type) {
    case CudaType::kFloat32: launch_prepare<float>(lookup, layout, prepared, stream); break;
    case CudaType::kBFloat16: launch_prepare<__nv_bfloat16>(lookup, layout, prepared, stream); break;
    case CudaType::kFloat16: launch_prepare<__half>(lookup, layout, prepared, stream); break;
  }
  switch (lookup.key_type) {
    case CudaType::kFloat32: launch_tiles<float>(lookup, layout, prepared, best, nearest, stream); break;
    case CudaType::kBFloat16: launch_tiles<__nv_bfloat16>(lookup, layout, prepared, best, nearest, stream); break;
    case CudaType::kFloat16: launch_tiles<__half>(lookup, layout, prepared, best, nearest, stream); break;
  }
  finish<<<static_cast<unsigned>(lookup.batch), kWarp, 0, stream>>>(
      best, nearest, layout.parts, lookup.batch, lookup.radius, lookup.cosine, lookup.index, lookup.distance);
  return cudaGetLastError();
}

}  // namespace dualedit
