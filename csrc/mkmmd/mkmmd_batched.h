// Many MK-MMD problems in one call: batches of equal problems and ragged ones.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "mkmmd/mkmmd.h"

namespace padkern {

// The rows of all problems. With offsets, problem b has rows offsets[b] to offsets[b + 1] - 1 of
// data; rows past the last offset belong to no problem. Without, it has rows_per_problem rows that
// start at element b * problem_stride.
struct MkmmdBatchedSample {
  const void* data = nullptr;
  MkmmdDtype dtype = MkmmdDtype::kFloat32;
  const void* weight = nullptr;  // one value per row, or null for ones
  MkmmdDtype weight_dtype = MkmmdDtype::kFloat32;
  const void* offsets = nullptr;  // [problems + 1], or null
  int64_t offset_bytes = 8;       // of one offset: 4 or 8
  int64_t total_rows = 0;
  int64_t rows_per_problem = 0;
  int64_t problem_stride = 0;  // strides count elements
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  int64_t weight_problem_stride = 0;
  int64_t weight_stride = 0;
  void* gradient = nullptr;  // [total_rows, dim] of compute type; null when not wanted
};

// Like MkmmdParams, with one value, bandwidth and bandwidth derivative per problem.
struct MkmmdBatchedParams {
  MkmmdDtype dtype = MkmmdDtype::kFloat32;
  MkmmdEstimator estimator = MkmmdEstimator::kUnbiased;
  MkmmdKernel kernel = MkmmdKernel::kGaussian;
  int64_t problems = 0;
  int64_t dim = 0;
  MkmmdBatchedSample source;
  MkmmdBatchedSample target;
  const double* alphas = nullptr;
  int64_t num_alphas = 0;
  const double* sigma_sq = nullptr;  // [problems], or null: each problem's mean squared distance
  bool want_gradient = false;
  void* value = nullptr;             // [problems] of dtype
  double* sigma_gradient = nullptr;  // [problems]; written when want_gradient
  void* workspace = nullptr;         // aligned to 64
  int64_t workspace_bytes = 0;
};

// Depends on the sizes, the offsets and the number of threads. 0 when the offsets break their rule,
// which mkmmd_batched_cpu reports.
int64_t mkmmd_batched_workspace_bytes(const MkmmdBatchedParams& params);

// A problem with too few rows for the estimator gets NaN as value and derivatives. Results have the
// same bits for any number of threads.
Status mkmmd_batched_cpu(const MkmmdBatchedParams& params);

}  // namespace padkern
