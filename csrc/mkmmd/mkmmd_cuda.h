/* C interface of libpadkern_cuda: MK-MMD on NVIDIA GPUs. No torch, no C++ types.
 * Codes of types, estimators and kernels are those of mkmmd.h. Design: padkern/ops/mkmmd/CUDA.md.
 */
#ifndef PADKERN_MKMMD_CUDA_H
#define PADKERN_MKMMD_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PADKERN_CUDA_ABI 1

/* Kernels for the pairs. */
enum {
  PADKERN_CUDA_PATH_AUTO = 0, /* what is known to work: mma.sync */
  PADKERN_CUDA_PATH_MMA = 1   /* mma.sync on float16 parts, from sm_80 on */
};

/* Own error numbers; a CUDA error e is returned as 1000 + e. */
enum {
  PADKERN_CUDA_OK = 0,
  PADKERN_CUDA_BAD_ARGUMENT = 1,
  PADKERN_CUDA_UNSUPPORTED = 2 /* right in itself, but not for these kernels or this device */
};

/* All pointers but host_alphas are device pointers. Strides count elements. */
typedef struct {
  const void* data;   /* [rows, dim] of dtype */
  const void* weight; /* [rows] of weight_dtype, or null for ones */
  void* gradient;     /* [rows, dim] of the compute type, contiguous; null when not wanted */
  int64_t rows;
  int64_t row_stride;
  int64_t column_stride;
  int64_t weight_stride;
  int32_t dtype;
  int32_t weight_dtype;
} padkern_mkmmd_sample;

typedef struct {
  padkern_mkmmd_sample source;
  padkern_mkmmd_sample target;
  int64_t dim;
  int64_t num_alphas;
  int64_t alphas_stride;
  int64_t betas_stride;
  const double* host_alphas; /* [num_alphas], on the host; or null, and then ... */
  const void* alphas;        /* [num_alphas] of alphas_dtype */
  const void* betas;         /* [num_alphas] of betas_dtype, or null for ones */
  const void* sigma_sq;      /* scalar of sigma_dtype, or null: mean pairwise squared distance */
  void* value;               /* scalar of the compute type */
  double* sigma_gradient;    /* scalar; not null exactly when gradients are wanted */
  double* alphas_gradient;   /* [num_alphas] each; both or neither, with gradients only */
  double* betas_gradient;
  void* workspace; /* aligned to 64 bytes */
  int64_t workspace_bytes;
  void* stream;
  int32_t dtype; /* compute type: float32, or float64 when an input is float64 */
  int32_t estimator;
  int32_t kernel;
  int32_t products; /* 3: errors of the float32 class; 1: one float16 product, errors of 1e-3 */
  int32_t path;
  int32_t alphas_dtype;
  int32_t betas_dtype;
  int32_t sigma_dtype;
} padkern_mkmmd_params;

int32_t padkern_cuda_abi(void);
/* Size of padkern_mkmmd_params, for callers that restate it. */
int64_t padkern_mkmmd_params_bytes(void);

/* Reads sizes, types, num_alphas and which outputs are null. 0 when they are invalid. */
int64_t padkern_mkmmd_workspace_bytes(const padkern_mkmmd_params* params);

/* Queues the kernels on the stream and returns; the host never waits. Returns an error number. */
int32_t padkern_mkmmd(const padkern_mkmmd_params* params);

/* What the calling thread's last failed call meant; valid until its next call. */
const char* padkern_cuda_error_text(void);

#ifdef __cplusplus
}
#endif

#endif
