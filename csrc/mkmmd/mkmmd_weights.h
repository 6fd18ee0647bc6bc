// Row weights: reading any element type, one power-of-two scale, and the sums that normalise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/status.h"
#include "mkmmd/mkmmd_plan.h"

namespace padkern {

struct WeightMoments {
  double sum = 0.0;
  double squares = 0.0;
  double pairs = 0.0;  // what sums over pairs inside the sample are divided by
  int64_t rows = 0;    // rows of weight other than 0
};

inline double read_weight(const MkmmdSample& sample, int64_t row) {
  if (sample.weight == nullptr) return 1.0;
  const int64_t at = row * sample.weight_stride;
  const auto half = [&] { return static_cast<const uint16_t*>(sample.weight)[at]; };
  switch (sample.weight_dtype) {
    case MkmmdDtype::kFloat32:
      return static_cast<double>(static_cast<const float*>(sample.weight)[at]);
    case MkmmdDtype::kFloat64:
      return static_cast<const double*>(sample.weight)[at];
    case MkmmdDtype::kBool:
      return static_cast<const uint8_t*>(sample.weight)[at] != 0 ? 1.0 : 0.0;
    case MkmmdDtype::kBFloat16: {
      const uint32_t bits = static_cast<uint32_t>(half()) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return static_cast<double>(value);
    }
    default: {
      const uint16_t bits = half();
      const int exponent = (bits >> 10) & 31;
      const double mantissa = static_cast<double>(bits & 1023);
      const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
      if (exponent == 31) return mantissa != 0.0 ? std::nan("") : sign * HUGE_VAL;
      return exponent == 0 ? sign * std::ldexp(mantissa, -24)
                           : sign * std::ldexp(1024.0 + mantissa, exponent - 25);
    }
  }
}

// Copies the weights into the blocks, scaled by one power of two for both samples (returned in
// *scale) so that products stay in range. moments[0] is the source's, moments[1] the target's.
template <class T>
Status load_weights(const MkmmdParams& params, const Cut& cut, T* weights, WeightMoments* moments,
                    double* scale) {
  const MkmmdSample* samples[2] = {&params.source, &params.target};
  double largest = 0.0;
  for (int k = 0; k < 2; ++k) {
    if (samples[k]->weight == nullptr) {
      largest = std::max(largest, 1.0);
      continue;
    }
    for (int64_t i = 0; i < samples[k]->rows; ++i) {
      const double w = read_weight(*samples[k], i);
      if (w < 0.0) {
        return error_status("%s_weight must be >= 0, got %g at row %lld",
                            k == 0 ? "source" : "target", w, static_cast<long long>(i));
      }
      if (w > largest) largest = w;
    }
  }
  int exponent = 1;
  if (largest > 0.0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  *scale = std::ldexp(1.0, 1 - exponent);  // maps ones to ones
  for (int64_t b = 0; b < cut.blocks(); ++b) {
    const int k = cut.is_source(b) ? 0 : 1;
    const int64_t first = cut.first_row(b);
    const int64_t rows = cut.rows(b);
    T* out = weights + b * cut.padded_rows;
    WeightMoments& moment = moments[k];
    if (samples[k]->weight == nullptr) {
      const double w = *scale;
      std::fill(out, out + rows, static_cast<T>(w));
      moment.sum += w * static_cast<double>(rows);
      moment.squares += w * w * static_cast<double>(rows);
      moment.rows += rows;
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        const double w = read_weight(*samples[k], first + i) * *scale;
        out[i] = static_cast<T>(w);
        moment.sum += w;
        moment.squares += w * w;
        if (w != 0.0) ++moment.rows;
      }
    }
    std::fill(out + rows, out + cut.padded_rows, T(0));
  }
  const MkmmdEstimator estimator = params.estimator;
  const bool unbiased =
      estimator == MkmmdEstimator::kUnbiased || estimator == MkmmdEstimator::kTllib;
  const int64_t needed = unbiased ? 2 : estimator == MkmmdEstimator::kCross ? 0 : 1;
  for (int k = 0; k < 2; ++k) {
    if (moments[k].rows < needed) {
      return error_status("%s_weight must leave at least %lld rows, leaves %lld",
                          k == 0 ? "source" : "target", static_cast<long long>(needed),
                          static_cast<long long>(moments[k].rows));
    }
    moments[k].pairs = moments[k].sum * moments[k].sum - (unbiased ? moments[k].squares : 0.0);
  }
  return Status();
}

}  // namespace padkern
