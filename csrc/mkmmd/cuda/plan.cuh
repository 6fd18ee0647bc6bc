// From the caller's parameters to a Call: checks, sizes, workspace, order of the terms. Host only.
#pragma once

#include <cstdio>

#include "mkmmd/cuda/gradient.cuh"
#include "mkmmd/cuda/strip.cuh"
#include "mkmmd/cuda/value.cuh"
#include "mkmmd/cuda/wide.cuh"
#include "mkmmd/mkmmd_cuda.h"

namespace padkern {
namespace cuda {

struct Error {
  int32_t code;
  char text[240];
};

// Blocks of the value kernel: enough to fill any machine, few enough to add up afterwards.
constexpr int64_t kValueBlocks = 1024;
constexpr int64_t kMaxChunks = 128;  // ranges of rows of the statistics, per sample

template <class... Values>
int32_t fail(Error* error, int32_t code, const char* format, Values... values) {
  error->code = code;
  std::snprintf(error->text, sizeof(error->text), format, values...);
  return code;
}

inline bool wants_gradient(const padkern_mkmmd_params& p) { return p.sigma_gradient != nullptr; }
inline bool wants_terms(const padkern_mkmmd_params& p) { return p.alphas_gradient != nullptr; }

inline int32_t check_sizes(const padkern_mkmmd_params& p, Error* error) {
  const int64_t limit = int64_t{1} << 40;
  const long long n = p.source.rows, m = p.target.rows, dim = p.dim;
  if (n <= 0 || m <= 0 || dim <= 0 || n >= limit || m >= limit || dim >= (1 << 20) ||
      n + m >= limit / dim) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "sizes must be positive, dim below 2^20 and all below 2^40 elements, "
                "got %lld and %lld rows of %lld",
                n, m, dim);
  }
  if (p.num_alphas < 1 || p.num_alphas > kMaxTerms) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "alphas must hold 1 to %d values, got %lld",
                kMaxTerms, static_cast<long long>(p.num_alphas));
  }
  if (p.dtype != 0 && p.dtype != 1) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "dtype must be 0 (float32) or 1 (float64), got %d", p.dtype);
  }
  if ((p.alphas_gradient == nullptr) != (p.betas_gradient == nullptr) ||
      (wants_terms(p) && !wants_gradient(p))) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "alphas_gradient and betas_gradient go together, and need sigma_gradient");
  }
  return PADKERN_CUDA_OK;
}

inline int32_t check_sample(const padkern_mkmmd_params& p, const padkern_mkmmd_sample& s,
                            const char* name, Error* error) {
  if (s.dtype < 0 || s.dtype > 3 || (s.dtype == 1 && p.dtype != 1)) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "%s has dtype %d, which is unknown or wider than the compute type", name, s.dtype);
  }
  if (s.weight != nullptr && (s.weight_dtype < 0 || s.weight_dtype > 4)) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "%s_weight has unknown dtype %d", name,
                s.weight_dtype);
  }
  if (s.data == nullptr || (s.gradient != nullptr) != wants_gradient(p)) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "%s must not be null, and its gradient is wanted exactly when sigma_gradient is",
                name);
  }
  if ((p.estimator == kUnbiased || p.estimator == kTllib) && s.rows < 2) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "%s needs at least 2 rows for this estimator, got %lld", name,
                static_cast<long long>(s.rows));
  }
  return PADKERN_CUDA_OK;
}

inline int32_t check(const padkern_mkmmd_params& p, Error* error) {
  if (int32_t code = check_sizes(p, error)) return code;
  if (p.estimator < 0 || p.estimator > 3 || p.kernel < 0 || p.kernel > 4) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "estimator must be 0 to 3 and kernel 0 to 4, got %d and %d", p.estimator, p.kernel);
  }
  if (p.products != 1 && p.products != 3) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "products must be 1 or 3, got %d", p.products);
  }
  if (p.path != PADKERN_CUDA_PATH_AUTO && p.path != PADKERN_CUDA_PATH_MMA) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "path must be 0 (auto) or 1 (mma), got %d",
                p.path);
  }
  if (int32_t code = check_sample(p, p.source, "source", error)) return code;
  if (int32_t code = check_sample(p, p.target, "target", error)) return code;
  if (p.estimator == kTllib && p.source.rows != p.target.rows) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "the tllib estimator needs equal sizes, got %lld and %lld",
                static_cast<long long>(p.source.rows), static_cast<long long>(p.target.rows));
  }
  if ((p.host_alphas == nullptr) == (p.alphas == nullptr)) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "give either host_alphas or alphas");
  }
  for (int64_t u = 0; p.host_alphas != nullptr && u < p.num_alphas; ++u) {
    if (!(p.host_alphas[u] > 0.0 && p.host_alphas[u] < HUGE_VAL)) {
      return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "alphas must be positive and finite, got %g",
                  p.host_alphas[u]);
    }
  }
  const int32_t types[] = {p.alphas == nullptr ? 0 : p.alphas_dtype,
                           p.betas == nullptr ? 0 : p.betas_dtype,
                           p.sigma_sq == nullptr ? 0 : p.sigma_dtype};
  for (int32_t type : types) {
    if (type < 0 || type > 3) {
      return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                  "alphas, betas and sigma_sq must be of dtype 0 to 3, got %d", type);
    }
  }
  if (p.value == nullptr) return fail(error, PADKERN_CUDA_BAD_ARGUMENT, "value must not be null");
  if (reinterpret_cast<uintptr_t>(p.workspace) % 64 != 0 || p.workspace == nullptr) {
    return fail(error, PADKERN_CUDA_BAD_ARGUMENT,
                "workspace must not be null and must be aligned to 64 bytes");
  }
  return PADKERN_CUDA_OK;
}

// Bump allocator over the workspace; with a null base it only measures.
class Space {
 public:
  explicit Space(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* out = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return out;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Terms by descending alpha; a Gaussian one is squared from the one before it where alphas are 1,
// 2, 4 or 8 times apart, at most six squarings in a row, because each doubles the relative error.
inline void order_terms(const padkern_mkmmd_params& p, Call* call) {
  for (int u = 0; u < call->count; ++u) {
    int place = u;
    if (p.host_alphas != nullptr) {
      for (; place > 0 && p.host_alphas[call->order[place - 1]] < p.host_alphas[u]; --place) {
        call->order[place] = call->order[place - 1];
      }
    }
    call->order[place] = static_cast<int8_t>(u);
  }
  int chained = 0;
  for (int u = 0; u < call->count; ++u) {
    call->squarings[u] = -1;
    if (p.host_alphas == nullptr) continue;
    call->host_alphas[u] = p.host_alphas[call->order[u]];
    if (u == 0 || call->kernel != kGaussian) continue;
    const double ratio = call->host_alphas[u - 1] / call->host_alphas[u];
    for (int q = 0; q <= 3; ++q) {
      if (ratio == static_cast<double>(1 << q) && chained + q <= 6) {
        call->squarings[u] = static_cast<int8_t>(q);
      }
    }
    chained = call->squarings[u] < 0 ? 0 : chained + call->squarings[u];
  }
}

// The default alphas: five, each half of the one before, no weights of their own.
inline bool is_ladder(const Call& call) {
  if (call.kernel != kGaussian || call.count != 5 || call.betas.data != nullptr ||
      call.per_kernel != 0) {
    return false;
  }
  for (int u = 1; u < 5; ++u) {
    if (call.squarings[u] != 1) return false;
  }
  return true;
}

inline Sample make_sample(const padkern_mkmmd_sample& s) {
  return {s.data,       {s.weight, s.weight_stride, s.weight_dtype},
          s.gradient,   s.rows,
          s.row_stride, s.column_stride,
          s.dtype};
}

// Fills the call from checked parameters and lays out the workspace; returns its bytes.
inline int64_t make_call(const padkern_mkmmd_params& p, Call* call) {
  *call = Call{};
  call->sample[0] = make_sample(p.source);
  call->sample[1] = make_sample(p.target);
  call->dim = p.dim;
  call->width = padded_width(p.dim);
  call->kernel = p.kernel;
  call->estimator = p.estimator;
  call->products = p.products;
  call->count = static_cast<int>(p.num_alphas);
  call->per_kernel = wants_terms(p) ? 1 : 0;
  call->wide = p.dtype;
  call->alphas = {p.alphas, p.alphas_stride, p.alphas_dtype};
  call->betas = {p.betas, p.betas_stride, p.betas_dtype};
  call->sigma_sq = {p.sigma_sq, 0, p.sigma_dtype};
  call->value = p.value;
  call->sigma_gradient = p.sigma_gradient;
  call->alphas_gradient = p.alphas_gradient;
  call->betas_gradient = p.betas_gradient;
  order_terms(p, call);
  for (int k = 0; k < 2; ++k) {
    const int64_t rows = call->sample[k].rows;
    call->tiles[k] = tile_count(rows);
    call->chunk_rows[k] = ceil_div(rows, smaller(kMaxChunks, call->tiles[k]));
    call->chunks[k] = ceil_div(rows, call->chunk_rows[k]);
  }
  const bool gradient = wants_gradient(p);
  const int64_t tiles = all_tiles(*call);
  const int64_t padded = tiles * kTile;
  const int64_t shares = call->wide != 0 ? 2 : 1;  // the wide kernels have half as many rows
  const bool strips = gradient && call->wide == 0 && call->width > kMaxGradientWidth;
  call->strips = strips ? static_cast<int>(ceil_div(tiles, kStripTiles)) : 0;
  call->splits = 1;
  if (gradient && call->wide == 0 && !strips) {
    call->splits = split_count(call->tiles[0], call->tiles[1]);
  }
  call->pair_blocks =
      strips ? tiles * strip_slots(*call)
      : gradient
          ? shares * tiles * call->splits
          : smaller(kValueBlocks, pair_count(shares * call->tiles[0], shares * call->tiles[1],
                                             call->estimator == kCross));
  Space space(p.workspace);
  call->state = space.take<State>(1);
  call->column_sums = space.take<double>((call->chunks[0] + call->chunks[1]) * call->width);
  call->bounds = space.take<double>((call->chunks[0] + call->chunks[1] + 1) * call->width);
  call->origin = space.take<double>(call->width);
  call->shift = space.take<double>(call->width);
  if (call->wide != 0) {
    call->points = space.take<double>(padded * call->width);
    call->wide_weights = space.take<double>(padded);
  } else {
    call->high = space.take<uint16_t>(padded * call->width);
    call->low = space.take<uint16_t>(padded * call->width);
    call->norms = space.take<float>(padded);
    call->weights = space.take<float>(padded);
  }
  call->moments = space.take<double>(tiles * ceil_div(call->width, kChunk));
  call->sums = space.take<PairSums>(call->pair_blocks);
  if (call->per_kernel != 0) {
    call->term_sums = space.take<double>(call->pair_blocks * call->count * 2);
  }
  if (call->splits > 1) call->parts = space.take<float>(call->splits * padded * call->width);
  if (strips) {
    call->strip_high = space.take<uint16_t>(padded * kStripColumns);
    call->strip_low = space.take<uint16_t>(padded * kStripColumns);
    call->strip_scales = space.take<float>(strip_slots(*call) * padded / 16);
    call->strip_slopes = space.take<double>(strip_slots(*call) * padded);
  }
  return space.used();
}

// 0 when the sizes are invalid.
inline int64_t workspace_bytes(const padkern_mkmmd_params& p, Error* error) {
  if (check_sizes(p, error) != PADKERN_CUDA_OK) return 0;
  padkern_mkmmd_params sizes = p;
  sizes.workspace = nullptr;
  Call call;
  return make_call(sizes, &call);
}

}  // namespace cuda
}  // namespace padkern
