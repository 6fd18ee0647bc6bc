// Batched problems of the torch-free core: they equal single calls bit for bit, serially and on
// threads, and broken offsets come back as messages. Run by ctest (-DPADKERN_CPP_TESTS=ON).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "common/parallel.h"
#include "mkmmd/mkmmd_batched.h"

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

const double kAlphas[] = {0.25, 0.5, 1.0};
constexpr int64_t kDim = 9;

struct Rows {
  std::vector<int64_t> offsets{0};
  std::vector<float> data, gradient;

  void add(int64_t rows) { offsets.push_back(offsets.back() + rows); }
  void fill(uint32_t state) {
    data.resize(static_cast<size_t>(offsets.back() * kDim));
    gradient.assign(data.size(), 7.0f);
    for (float& value : data) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
  }
};

struct Batch {
  Rows source, target;
  std::vector<float> value;
  std::vector<double> sigma_gradient;
  padkern::MkmmdBatchedParams params;

  // Sizes from 2 up, one problem too small, and with `large` one that runs on all threads.
  explicit Batch(bool large) {
    for (int64_t b = 0; b < 60; ++b) {
      source.add(b == 7 ? 1 : 2 + 13 * b % 50);
      target.add(large && b == 20 ? 1500 : 2 + 29 * b % 70);
    }
    source.fill(1);
    target.fill(2);
    value.assign(60, 7.0f);
    sigma_gradient.assign(60, 7.0);
    params.problems = 60;
    params.dim = kDim;
    for (auto* pair : {&params.source, &params.target}) {
      Rows& rows = pair == &params.source ? source : target;
      pair->data = rows.data.data();
      pair->offsets = rows.offsets.data();
      pair->total_rows = rows.offsets.back();
      pair->row_stride = kDim;
      pair->column_stride = 1;
      pair->gradient = rows.gradient.data();
    }
    params.alphas = kAlphas;
    params.num_alphas = 3;
    params.want_gradient = true;
    params.value = value.data();
    params.sigma_gradient = sigma_gradient.data();
  }

  padkern::Status run() {
    params.workspace_bytes = padkern::mkmmd_batched_workspace_bytes(params);
    // Exactly the bytes asked for, so that a sanitizer sees one byte too many.
    void* space = std::aligned_alloc(64, static_cast<size_t>(params.workspace_bytes + 64));
    params.workspace = space;
    const padkern::Status status = padkern::mkmmd_batched_cpu(params);
    std::free(space);
    return status;
  }
};

bool same(const Batch& a, const Batch& b) {
  const auto equal = [](const auto& x, const auto& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
  };
  return equal(a.value, b.value) && equal(a.sigma_gradient, b.sigma_gradient) &&
         equal(a.source.gradient, b.source.gradient) && equal(a.target.gradient, b.target.gradient);
}

void test_threads() {
  for (const bool large : {false, true}) {
    padkern::set_parallel(nullptr, nullptr);
    Batch serial(large);
    expect(serial.run().ok, "a serial batch runs");
    for (int64_t b = 0; b < 60; ++b) {
      expect(std::isnan(serial.value[static_cast<size_t>(b)]) == (b == 7),
             "only the problem that is too small is NaN");
    }
    padkern::set_parallel(std_parallel_for, thread_count);
    for (const uint32_t threads : {2u, 5u}) {
      g_threads = threads;
      Batch parallel(large);
      expect(parallel.run().ok, "a batch on threads runs");
      expect(same(serial, parallel), "threads change no bit");
    }
  }
  padkern::set_parallel(nullptr, nullptr);
}

void test_single() {
  Batch batch(false);
  expect(batch.run().ok, "a batch runs");
  for (int64_t b : {0, 30, 59}) {
    padkern::MkmmdParams one;
    float value = 0.0f;
    double sigma_gradient = 0.0;
    std::vector<float> gradients[2];
    for (auto* sample : {&one.source, &one.target}) {
      const Rows& rows = sample == &one.source ? batch.source : batch.target;
      const int64_t first = rows.offsets[static_cast<size_t>(b)];
      sample->data = rows.data.data() + first * kDim;
      sample->rows = rows.offsets[static_cast<size_t>(b + 1)] - first;
      sample->row_stride = kDim;
      sample->column_stride = 1;
      std::vector<float>& gradient = gradients[sample == &one.source ? 0 : 1];
      gradient.resize(static_cast<size_t>(sample->rows * kDim));
      sample->gradient = gradient.data();
      sample->gradient_stride = kDim;
    }
    one.dim = kDim;
    one.alphas = kAlphas;
    one.num_alphas = 3;
    one.want_gradient = true;
    one.value = &value;
    one.sigma_gradient = &sigma_gradient;
    one.workspace_bytes = padkern::mkmmd_workspace_bytes(one);
    one.workspace = std::aligned_alloc(64, static_cast<size_t>(one.workspace_bytes + 64));
    expect(padkern::mkmmd_cpu(one).ok, "a single problem runs");
    std::free(one.workspace);
    expect(value == batch.value[static_cast<size_t>(b)], "a problem has the value of its own call");
    const int64_t first = batch.source.offsets[static_cast<size_t>(b)] * kDim;
    expect(std::memcmp(batch.source.gradient.data() + first, gradients[0].data(),
                       gradients[0].size() * sizeof(float)) == 0,
           "a problem has the gradient of its own call");
  }
}

void test_messages() {
  Batch batch(false);
  batch.source.offsets[3] = batch.source.offsets[2] - 1;
  expect(padkern::mkmmd_batched_workspace_bytes(batch.params) == 0, "no workspace for bad offsets");
  expect(std::strstr(batch.run().message, "must not decrease") != nullptr, "decreasing offsets");
  Batch longer(false);
  longer.target.offsets.back() += 1;
  expect(std::strstr(longer.run().message, "target_offsets must end at") != nullptr,
         "offsets past the end");
  Batch small(false);
  small.params.workspace_bytes = 64;
  alignas(64) char space[64];
  small.params.workspace = space;
  expect(std::strstr(padkern::mkmmd_batched_cpu(small.params).message, "too small") != nullptr,
         "a workspace that is too small");
  Batch narrow(false);
  narrow.params.source.offset_bytes = 2;
  expect(!narrow.run().ok, "offsets of two bytes");
}

}  // namespace

int main() {
  test_threads();
  test_single();
  test_messages();
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}
