// The torch-free core on its own: serial and std::thread backends give the same bits, both agree with
// the definition, and bad arguments come back as messages. Run by ctest (-DPADKERN_CPP_TESTS=ON).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "mkmmd/mkmmd.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

uint32_t g_threads = 1;

int32_t thread_count(uint32_t* out) {
  *out = g_threads;
  return 0;
}

int32_t std_parallel_for(int64_t begin, int64_t end, int64_t, padkern::ParallelBody body,
                         void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

struct Result {
  float value = 0;
  double sigma_gradient = 0;
  std::vector<float> source_gradient, target_gradient;
};

const double kAlphas[] = {0.125, 0.25, 0.5, 1.0, 2.0};

std::vector<float> make_rows(int64_t rows, int64_t dim, float shift) {
  std::vector<float> out(static_cast<size_t>(rows * dim));
  uint32_t state = 12345u + static_cast<uint32_t>(rows);
  for (float& value : out) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f + shift;
  }
  return out;
}

Result run(const std::vector<float>& source, const std::vector<float>& target, int64_t dim) {
  Result result;
  result.source_gradient.resize(source.size());
  result.target_gradient.resize(target.size());
  padkern::MkmmdParams params;
  params.dim = dim;
  for (auto [sample, data, gradient] :
       {std::make_tuple(&params.source, &source, &result.source_gradient),
        std::make_tuple(&params.target, &target, &result.target_gradient)}) {
    sample->data = data->data();
    sample->rows = static_cast<int64_t>(data->size()) / dim;
    sample->row_stride = dim;
    sample->column_stride = 1;
    sample->gradient = gradient->data();
    sample->gradient_stride = dim;
  }
  params.alphas = kAlphas;
  params.num_alphas = 5;
  params.want_gradient = true;
  params.value = &result.value;
  params.sigma_gradient = &result.sigma_gradient;
  params.workspace_bytes = padkern::mkmmd_workspace_bytes(params);
  // Exactly the bytes asked for, so that a sanitizer sees one byte too many.
  params.workspace = std::aligned_alloc(64, static_cast<size_t>(params.workspace_bytes));
  const padkern::Status status = padkern::mkmmd_cpu(params);
  expect(status.ok, status.message);
  std::free(params.workspace);
  return result;
}

double by_definition(const std::vector<float>& source, const std::vector<float>& target,
                     int64_t dim) {
  std::vector<float> all(source);
  all.insert(all.end(), target.begin(), target.end());
  const int64_t n = static_cast<int64_t>(source.size()) / dim;
  const int64_t total = static_cast<int64_t>(all.size()) / dim;
  const int64_t m = total - n;
  const auto distance = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double diff = static_cast<double>(all[i * dim + d]) - all[j * dim + d];
      sum += diff * diff;
    }
    return sum;
  };
  double sigma_sq = 0;
  for (int64_t i = 0; i < total; ++i) {
    for (int64_t j = 0; j < total; ++j) sigma_sq += distance(i, j);
  }
  sigma_sq /= static_cast<double>(total * total);
  double loss = 0;
  for (int64_t i = 0; i < total; ++i) {
    for (int64_t j = 0; j < total; ++j) {
      if (i == j) continue;
      double kernel = 0;
      for (double alpha : kAlphas) kernel += std::exp(-distance(i, j) / (2 * alpha * sigma_sq));
      const double factor = i < n && j < n     ? 1.0 / static_cast<double>(n * (n - 1))
                            : i >= n && j >= n ? 1.0 / static_cast<double>(m * (m - 1))
                                               : -1.0 / static_cast<double>(n * m);
      loss += factor * kernel;
    }
  }
  return loss;
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{2, 2, 1}, {49, 97, 33}, {200, 150, 16}, {481, 500, 24}};
  for (const auto& shape : shapes) {
    const auto source = make_rows(shape[0], shape[2], 0.0f);
    const auto target = make_rows(shape[1], shape[2], 0.3f);
    padkern::set_parallel(nullptr, nullptr);
    const Result serial = run(source, target, shape[2]);
    const double exact = by_definition(source, target, shape[2]);
    expect(std::fabs(serial.value - exact) < 5e-6, "value by definition");
    padkern::set_parallel(std_parallel_for, thread_count);
    for (uint32_t threads : {1u, 2u, 3u, 8u}) {
      g_threads = threads;
      const Result other = run(source, target, shape[2]);
      expect(other.value == serial.value, "value bits for any thread count");
      expect(other.sigma_gradient == serial.sigma_gradient, "sigma gradient bits");
      expect(other.source_gradient == serial.source_gradient, "source gradient bits");
      expect(other.target_gradient == serial.target_gradient, "target gradient bits");
    }
  }
  padkern::MkmmdParams empty;
  const padkern::Status status = padkern::mkmmd_cpu(empty);
  expect(!status.ok && std::strstr(status.message, "sizes must be positive") != nullptr,
         "empty parameters are refused");
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
