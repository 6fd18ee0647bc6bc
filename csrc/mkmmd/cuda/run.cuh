// The sequence of launches, for any launcher: the CUDA one, and the tests' emulation.
#pragma once

#include "mkmmd/cuda/finish.cuh"
#include "mkmmd/cuda/plan.cuh"

namespace padkern {
namespace cuda {

// A launcher has template <class Body> int32_t launch(const Call&, int64_t x, int64_t y, Error*)
// and int64_t shared_limit(Error*), the bytes of shared memory a block may have (0: error).
template <class Launcher>
int32_t launch_strips(Launcher& launcher, Call* call, Error* error) {
  const int64_t tiles = all_tiles(*call), slots = strip_slots(*call);
  const bool ladder = is_ladder(*call);
  for (call->strip = 0; call->strip < call->strips; ++call->strip) {
    int32_t code =
        ladder ? launcher.template launch<StripCoefficients<true>>(*call, tiles, slots, error)
               : launcher.template launch<StripCoefficients<false>>(*call, tiles, slots, error);
    if (code == 0) {
      code = launcher.template launch<StripRows>(*call, tiles, ceil_div(call->width, kStripOut),
                                                 error);
    }
    if (code != 0) return code;
  }
  return 0;
}

template <class Launcher>
int32_t launch_pairs(Launcher& launcher, Call* call, Error* error) {
  const bool gradient = call->sigma_gradient != nullptr;
  const int64_t blocks = call->pair_blocks;
  if (call->wide != 0) {
    return gradient ? launcher.template launch<WideGradient>(*call, blocks, 1, error)
                    : launcher.template launch<WideValue>(*call, blocks, 1, error);
  }
  const bool ladder = is_ladder(*call);
  if (!gradient && call->width > kMaxGradientWidth) {
    return ladder ? launcher.template launch<Value<true, true>>(*call, blocks, 1, error)
                  : launcher.template launch<Value<false, true>>(*call, blocks, 1, error);
  }
  if (!gradient) {
    return ladder ? launcher.template launch<Value<true, false>>(*call, blocks, 1, error)
                  : launcher.template launch<Value<false, false>>(*call, blocks, 1, error);
  }
  if (call->strips > 0) return launch_strips(launcher, call, error);
  const int64_t limit = launcher.shared_limit(error);
  if (limit <= 0) return error->code;
  call->stages = gradient_bytes(*call, 2) <= limit ? 2 : 1;
  if (gradient_bytes(*call, call->stages) > limit) {
    return fail(error, PADKERN_CUDA_UNSUPPORTED,
                "gradients of %lld columns need %lld bytes of shared memory per block, "
                "this device has %lld",
                static_cast<long long>(call->dim), static_cast<long long>(gradient_bytes(*call, 1)),
                static_cast<long long>(limit));
  }
  const int64_t tiles = all_tiles(*call);
  if (call->width <= 128) {
    return ladder
               ? launcher.template launch<Gradient<16, 8, true>>(*call, tiles, call->splits, error)
               : launcher.template launch<Gradient<16, 4, false>>(*call, tiles, call->splits,
                                                                  error);
  }
  return ladder
             ? launcher.template launch<Gradient<32, 4, true>>(*call, tiles, call->splits, error)
             : launcher.template launch<Gradient<32, 2, false>>(*call, tiles, call->splits, error);
}

template <class Launcher>
int32_t run(const padkern_mkmmd_params& params, Launcher& launcher, Error* error) {
  if (int32_t code = check(params, error)) return code;
  Call call;
  const int64_t needed = make_call(params, &call);
  if (params.workspace_bytes < needed) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "workspace must hold %lld bytes, got %lld",
                static_cast<long long>(needed), static_cast<long long>(params.workspace_bytes));
  }
  const int64_t tiles = all_tiles(call);
  const int64_t blocks = ceil_div(call.width, kChunk);
  const int64_t chunks = call.chunks[0] + call.chunks[1];
  if (int32_t code = launcher.template launch<WeightSums>(call, 1, 1, error)) return code;
  if (int32_t code = launcher.template launch<ColumnSums>(call, chunks, blocks, error)) return code;
  const int64_t groups = ceil_div(call.width, Mean::kColumns);
  if (int32_t code = launcher.template launch<Mean>(call, groups, 1, error)) return code;
  int32_t code = 0;
  if (call.wide != 0) {
    code = launcher.template launch<Pack<true>>(call, tiles, blocks, error);
  } else {
    code = launcher.template launch<Pack<false>>(call, tiles, blocks, error);
    if (code == 0) {
      code = call.width > kMaxGradientWidth
                 ? launcher.template launch<Norms<true>>(call, tiles, 1, error)
                 : launcher.template launch<Norms<false>>(call, tiles, 1, error);
    }
  }
  if (code == 0) code = launcher.template launch<Bandwidth>(call, 1, 1, error);
  if (code == 0) code = launch_pairs(launcher, &call, error);
  if (code == 0 && call.splits > 1) {
    code = launcher.template launch<Combine>(call, tiles * (kTile / Combine::kRows), 1, error);
  }
  if (code == 0) code = launcher.template launch<Finish>(call, 1, 1, error);
  return code;
}

}  // namespace cuda
}  // namespace padkern
