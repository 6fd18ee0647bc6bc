// The C interface of libpadkern_cuda on host memory, for the tests of the Python side.
#include "cuda_emulation.h"

namespace {

padkern::cuda::Error g_error = {0, ""};
padkern::cuda::HostLauncher g_launcher;

}  // namespace

extern "C" {

int32_t padkern_cuda_abi(void) { return PADKERN_CUDA_ABI; }

int64_t padkern_mkmmd_params_bytes(void) { return sizeof(padkern_mkmmd_params); }

int64_t padkern_mkmmd_workspace_bytes(const padkern_mkmmd_params* params) {
  return padkern::cuda::workspace_bytes(*params, &g_error);
}

int32_t padkern_mkmmd(const padkern_mkmmd_params* params) {
  return padkern::cuda::run(*params, g_launcher, &g_error);
}

const char* padkern_cuda_error_text(void) { return g_error.text; }

// What a GPU leaves open, and how much shared memory there is.
void padkern_emulation(int32_t late_copies, int32_t backward, int64_t shared_limit) {
  g_launcher.freedom = {late_copies != 0, backward != 0};
  g_launcher.limit = shared_limit;
}
}
