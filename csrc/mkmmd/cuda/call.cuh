// One call as the kernels see it: a plain struct passed by value, and the state they share.
#pragma once

#include "mkmmd/cuda/tiling.cuh"

namespace padkern {
namespace cuda {

constexpr int kMaxTerms = 64;

// Values of MkmmdKernel and MkmmdEstimator in mkmmd/mkmmd.h.
constexpr int kGaussian = 0;
constexpr int kLaplacian = 1;
constexpr int kInverseMultiquadric = 2;
constexpr int kRationalQuadratic = 3;
constexpr int kEnergy = 4;
constexpr int kUnbiased = 0;
constexpr int kBiased = 1;
constexpr int kTllib = 2;
constexpr int kCross = 3;

// A vector or scalar in device memory, of any MkmmdDtype; null when not given.
struct Vector {
  const void* data;
  int64_t stride;
  int dtype;
};

PADKERN_HD double element(const Vector& vector, int64_t index) {
  return read_element(vector.data, vector.dtype, index * vector.stride);
}

struct Sample {
  const void* data;  // [rows, dim], strides in elements
  Vector weight;
  void* gradient;  // [rows, dim] contiguous, of the compute type
  int64_t rows;
  int64_t row_stride;
  int64_t column_stride;
  int dtype;
};

// Terms in the order of evaluation: by descending alpha when the host knows the alphas, else as the
// caller has them.
template <class T>
struct Table {
  T ratio[kMaxTerms];  // alpha_0 / alpha_u
  T beta[kMaxTerms];
  T slope[kMaxTerms];  // beta ratio
};

enum Mode : int {
  kRegular = 0,
  kZero = 1,  // bandwidth 0: every kernel is 1
  kNan = 2    // bandwidth negative or NaN
};

// Written by the first kernels, read by the later ones; lives in the workspace.
struct State {
  // By sample: the power of two that brings its largest weight to [1, 2), sums of weights so
  // scaled, and what makes such weights of both samples comparable, for pooled sums.
  double weight_scale[2];
  double weight_sum[2];
  double weight_squares[2];
  double pool_scale[2];
  int64_t origin_sample;  // the first row of weight other than 0
  int64_t origin_row;
  int mode;
  double sigma_sq;
  double divisor[2];  // of sums over pairs inside a sample
  double factor[3];   // of a pair's kernel: source x source, target x target, across
  double row_scale;   // power of two that brings packed rows below 2^14, the range of float16
  double scale;       // y = d scale is the argument of the widest kernel, see profile(); d of
                      // packed rows
  double rate;        // 1 / (2 alpha_0 sigma_sq): dL/dd = -rate factor w_i w_j slope
  // Factors of the coefficients of the rows of a sample, relative to unit, the larger of the two.
  float coefficient[2][2];  // by the row's sample: inside it, across
  double unit[2];
  double alphas[kMaxTerms];  // in order of evaluation, as are the tables
  Table<float> single;
  Table<double> wide;
};

// Sums of one block of the pair kernels, over ordered pairs of different rows.
struct PairSums {
  double same;    // w_i w_j k_ij inside the samples, divided by their divisors
  double cross;   // w_i w_j k_ij across
  double spread;  // factor w_i w_j slope_ij y_ij
};

struct Call {
  Sample sample[2];
  int64_t dim;
  int width;  // columns of a packed row
  int kernel;
  int estimator;
  // 1: leading parts only. 3: both parts, without the product of the lower ones.
  int products;
  int count;  // terms
  int per_kernel;
  int wide;  // float64
  int splits;
  int stages;  // column tiles in shared memory, of the gradient kernel
  int strips;  // ranges of columns of the strip kernels, 0: not used
  int strip;   // the one at hand
  int64_t tiles[2];
  int64_t chunks[2];              // ranges of rows of the statistics
  int64_t chunk_rows[2];          // rows of a range
  int64_t pair_blocks;            // blocks of the pair kernel, one PairSums each
  double host_alphas[kMaxTerms];  // in order of evaluation, when alphas.data is null
  int8_t order[kMaxTerms];        // where the caller has the term
  int8_t squarings[kMaxTerms];    // of the term before it, or -1: a new exponential
  Vector alphas;
  Vector betas;
  Vector sigma_sq;
  // outputs
  void* value;
  double* sigma_gradient;
  double* alphas_gradient;
  double* betas_gradient;
  // workspace
  State* state;
  double* column_sums;  // [chunks, width]
  double* origin;       // [width]
  double* shift;        // [width], the mean of the rows relative to origin
  double* bounds;       // [chunks, width] largest |row - origin|; then [width] of |row - mean|
  uint16_t* high;       // [padded rows, width] float16
  uint16_t* low;
  double* points;  // [padded rows, width], float64 path
  float* norms;    // [padded rows]
  float* weights;  // [padded rows], scaled, 0 for padding
  double* wide_weights;
  double* moments;       // [tiles, column blocks]
  PairSums* sums;        // [pair_blocks]
  double* term_sums;     // [pair_blocks, count, 2]: the sums of factor w_i w_j k_u and of spread
  float* parts;          // [splits, padded rows, width], when splits > 1
  uint16_t* strip_high;  // [padded rows, kStripColumns] coefficients of one strip, in two parts
  uint16_t* strip_low;
  float* strip_scales;   // [kStripTiles, padded rows / 16] of the coefficients
  double* strip_slopes;  // [kStripTiles, padded rows]
};

PADKERN_HD double pooled_weight(const State& state) {
  return state.weight_sum[0] * state.pool_scale[0] + state.weight_sum[1] * state.pool_scale[1];
}
PADKERN_HD bool cross_only(const Call& call) { return call.estimator == kCross; }
PADKERN_HD int64_t all_tiles(const Call& call) { return call.tiles[0] + call.tiles[1]; }
PADKERN_HD int side_of_tile(const Call& call, int64_t tile) { return tile < call.tiles[0] ? 0 : 1; }
// First row of a tile within its sample.
PADKERN_HD int64_t first_row(const Call& call, int64_t tile) {
  return (tile < call.tiles[0] ? tile : tile - call.tiles[0]) * kTile;
}
PADKERN_HD double row_weight(const Sample& sample, int64_t row) {
  return sample.weight.data == nullptr ? 1.0 : element(sample.weight, row);
}

}  // namespace cuda
}  // namespace padkern
