// The CUDA launcher and the C interface.
#include "mkmmd/cuda/run.cuh"
#include "mkmmd/mkmmd_cuda.h"

namespace padkern {
namespace cuda {
namespace {

template <class Body>
__global__ void __launch_bounds__(Body::kBlockThreads, Body::kMinBlocks)
    kernel(const __grid_constant__ Call call) {
  const DeviceBlock<Body::kBlockThreads> block;
  Body::run(block, call);
}

int32_t cuda_failure(cudaError_t status, const char* what, Error* error) {
  return fail(error, 1000 + static_cast<int32_t>(status), "%s: %s", what,
              cudaGetErrorString(status));
}

// Shared memory that a block gets without asking.
constexpr int64_t kPlainShared = 48 * 1024;

struct StreamLauncher {
  cudaStream_t stream;

  template <class Body>
  int32_t launch(const Call& call, int64_t x, int64_t y, Error* error) const {
    const int64_t bytes = Body::shared_bytes(call);
    if (x >= (int64_t{1} << 31) || y >= 65536) {
      return fail(error, PADKERN_CUDA_UNSUPPORTED, "%lld x %lld blocks are too many",
                  static_cast<long long>(x), static_cast<long long>(y));
    }
    if (bytes > kPlainShared) {
      const cudaError_t status = cudaFuncSetAttribute(
          kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
      if (status != cudaSuccess) return cuda_failure(status, "shared memory of a kernel", error);
    }
    kernel<Body><<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), Body::kBlockThreads,
                   static_cast<size_t>(bytes), stream>>>(call);
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? PADKERN_CUDA_OK : cuda_failure(status, "launch", error);
  }

  int64_t shared_limit(Error* error) const {
    int device = 0, limit = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (status != cudaSuccess) {
      cuda_failure(status, "device attributes", error);
      return 0;
    }
    return limit;
  }
};

thread_local Error g_error = {PADKERN_CUDA_OK, ""};

}  // namespace
}  // namespace cuda
}  // namespace padkern

#define PADKERN_EXPORT extern "C" __attribute__((visibility("default")))

PADKERN_EXPORT int32_t padkern_cuda_abi(void) { return PADKERN_CUDA_ABI; }

PADKERN_EXPORT int64_t padkern_mkmmd_params_bytes(void) { return sizeof(padkern_mkmmd_params); }

PADKERN_EXPORT int64_t padkern_mkmmd_workspace_bytes(const padkern_mkmmd_params* params) {
  return padkern::cuda::workspace_bytes(*params, &padkern::cuda::g_error);
}

PADKERN_EXPORT int32_t padkern_mkmmd(const padkern_mkmmd_params* params) {
  using namespace padkern::cuda;
  StreamLauncher launcher{static_cast<cudaStream_t>(params->stream)};
  return run(*params, launcher, &g_error);
}

PADKERN_EXPORT const char* padkern_cuda_error_text(void) { return padkern::cuda::g_error.text; }
