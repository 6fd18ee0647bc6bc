// Whole emulated calls of the CUDA kernels against the definition, with workspaces of exactly the
// bytes asked for, so that a sanitizer sees one too many. Run by ctest (-DPADKERN_CPP_TESTS=ON).
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda_emulation.h"

namespace {

using namespace padkern::cuda;

int failures = 0;

const double kAlphas[] = {0.125, 0.25, 0.5, 1.0, 2.0};
const double kOther[] = {0.7, 3.0};

// Distances from differences, every pair, in double precision: value and gradients (unbiased).
struct Exact {
  double value = 0.0;
  std::vector<double> gradient;
};

double profile_of(int kernel, double d, double s, double* slope) {
  const double r = d / s;
  switch (kernel) {
    case kGaussian:
      *slope = std::exp(-r) / s;
      return std::exp(-r);
    case kLaplacian:
      *slope = std::exp(-std::sqrt(2 * r)) / std::sqrt(2 * r) / s;
      return std::exp(-std::sqrt(2 * r));
    case kInverseMultiquadric:
      *slope = 0.5 * std::pow(1 + r, -1.5) / s;
      return std::pow(1 + r, -0.5);
    case kRationalQuadratic:
      *slope = std::pow(1 + r, -2) / s;
      return 1 / (1 + r);
    default:
      *slope = 0.5 / std::sqrt(d);
      return -std::sqrt(d);
  }
}

Exact by_definition(const std::vector<double>& rows, int n, int dim, int kernel,
                    const double* alphas, int count) {
  const int total = static_cast<int>(rows.size()) / dim, m = total - n;
  const auto distance = [&](int i, int j) {
    double sum = 0.0;
    for (int c = 0; c < dim; ++c) {
      const double difference = rows[i * dim + c] - rows[j * dim + c];
      sum += difference * difference;
    }
    return sum;
  };
  double sigma_sq = 0.0;
  for (int i = 0; i < total; ++i) {
    for (int j = 0; j < total; ++j) sigma_sq += distance(i, j) / total / total;
  }
  Exact out;
  out.gradient.assign(rows.size(), 0.0);
  for (int i = 0; i < total; ++i) {
    for (int j = 0; j < total; ++j) {
      if (i == j) continue;
      const double factor = i < n && j < n     ? 1.0 / n / (n - 1)
                            : i >= n && j >= n ? 1.0 / m / (m - 1)
                                               : -1.0 / n / m;
      const double d = distance(i, j);
      double slopes = 0.0;
      for (int u = 0; u < count; ++u) {
        double slope;
        out.value += factor * profile_of(kernel, d, 2 * alphas[u] * sigma_sq, &slope);
        slopes += slope;
      }
      for (int c = 0; c < dim; ++c) {
        out.gradient[i * dim + c] -= 4 * factor * slopes * (rows[i * dim + c] - rows[j * dim + c]);
      }
    }
  }
  return out;
}

template <class T>
void test_call(int n, int m, int dim, int kernel, bool ladder, bool gradient) {
  uint32_t state = 99;
  std::vector<T> rows(static_cast<size_t>(n + m) * dim);
  std::vector<double> exact_rows(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    const double shift = i < static_cast<size_t>(n) * dim ? 0.0 : 0.4;
    rows[i] = static_cast<T>(static_cast<double>(state >> 8) / 8388608.0 - 1.0 + shift);
    exact_rows[i] = static_cast<double>(rows[i]);
  }
  const double* alphas = ladder ? kAlphas : kOther;
  const int count = kernel == kEnergy ? 1 : ladder ? 5 : 2;
  std::vector<T> result(rows.size());
  T value;
  double sigma_gradient;
  padkern_mkmmd_params p{};
  p.source.data = rows.data();
  p.target.data = rows.data() + static_cast<size_t>(n) * dim;
  p.source.rows = n;
  p.target.rows = m;
  for (padkern_mkmmd_sample* s : {&p.source, &p.target}) {
    s->row_stride = dim;
    s->column_stride = 1;
    s->dtype = sizeof(T) == 8 ? 1 : 0;
  }
  p.dim = dim;
  p.host_alphas = alphas;
  p.num_alphas = count;
  p.value = &value;
  p.dtype = sizeof(T) == 8 ? 1 : 0;
  p.kernel = kernel;
  p.products = 3;
  if (gradient) {
    p.sigma_gradient = &sigma_gradient;
    p.source.gradient = result.data();
    p.target.gradient = result.data() + static_cast<size_t>(n) * dim;
  }
  Error error{};
  p.workspace_bytes = workspace_bytes(p, &error);
  p.workspace = std::aligned_alloc(64, static_cast<size_t>(p.workspace_bytes));
  std::memset(p.workspace, 0xff, static_cast<size_t>(p.workspace_bytes));
  HostLauncher launcher;
  const int32_t code = run(p, launcher, &error);
  std::free(p.workspace);
  const Exact exact = by_definition(exact_rows, n, dim, kernel, alphas, count);
  double difference = 0.0, size = 0.0;
  for (size_t i = 0; gradient && i < result.size(); ++i) {
    difference += std::pow(static_cast<double>(result[i]) - exact.gradient[i], 2);
    size += std::pow(exact.gradient[i], 2);
  }
  const double limit = sizeof(T) == 8 ? 1e-12 : 5e-6;
  const double value_error = std::fabs(static_cast<double>(value) - exact.value);
  if (code == 0 && value_error < limit && std::sqrt(difference) <= limit * std::sqrt(size)) return;
  std::fprintf(stderr, "FAILED: %d and %d rows of %d, kernel %d: code %d %s, errors %.1e %.1e\n", n,
               m, dim, kernel, code, error.text, value_error, std::sqrt(difference / size));
  ++failures;
}

}  // namespace

int main() {
  const int shapes[][3] = {{2, 3, 3}, {64, 65, 16}, {70, 20, 130}, {30, 40, 250}, {66, 70, 260}};
  for (const auto& shape : shapes) {
    for (bool gradient : {false, true}) {
      test_call<float>(shape[0], shape[1], shape[2], kGaussian, true, gradient);
      test_call<double>(shape[0], shape[1], shape[2], kGaussian, true, gradient);
      for (int kernel = kGaussian; kernel <= kEnergy; ++kernel) {
        if (shape[0] < 64 || shape[2] < 130) {
          test_call<float>(shape[0], shape[1], shape[2], kernel, false, gradient);
        }
      }
    }
  }
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
