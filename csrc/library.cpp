// Binds the C++ operators to the schemas of dualedit_kernels/library.py, through the stable ABI of libtorch.
#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/nearest_key.h"

namespace dualedit {
std::tuple<torch::stable::Tensor, torch::stable::Tensor> nearest_key(
    torch::stable::Tensor query, torch::stable::Tensor keys, torch::stable::Tensor radius, bool cosine, int64_t isa);
std::tuple<torch::stable::Tensor, torch::stable::Tensor> nearest_key_coded(
    torch::stable::Tensor query, torch::stable::Tensor keys, torch::stable::Tensor radius, bool cosine, int64_t isa,
    torch::stable::Tensor codes, torch::stable::Tensor values, torch::stable::Tensor centre,
    torch::stable::Tensor apart);
void last_coded(int64_t* out);
}  // namespace dualedit

STABLE_TORCH_LIBRARY_IMPL(dualedit_kernels, CPU, library) {
  library.impl("nearest_key_cpp", TORCH_BOX(&dualedit::nearest_key));
  library.impl("nearest_key_codes_cpp", TORCH_BOX(&dualedit::nearest_key_coded));
}

#ifdef _WIN32
#define DUALEDIT_EXPORT extern "C" __declspec(dllexport)
#else
#define DUALEDIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The best instruction set of this processor, as in dualedit::Isa. Read by Python through ctypes.
DUALEDIT_EXPORT int dualedit_best_isa() { return static_cast<int>(dualedit::best_isa()); }

// out[0]: distances that the last coded lookup of any thread computed exactly, out[1]: queries it gave up on. For
// tests and benchmarks.
DUALEDIT_EXPORT void dualedit_last_coded(int64_t* out) { dualedit::last_coded(out); }
