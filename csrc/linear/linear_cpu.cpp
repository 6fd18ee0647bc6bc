#include <algorithm>
#include <new>
#include <vector>

#include "common/isa.h"
#include "common/tickets.h"
#include "linear/linear.h"
#include "linear/linear_kernel.h"

namespace padkern {
namespace {

const LinearKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::linear_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::linear_kernels_f32();
#endif
  (void)isa;
  return baseline::linear_kernels_f32();
}

const LinearKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::linear_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::linear_kernels_f64();
#endif
  (void)isa;
  return baseline::linear_kernels_f64();
}

int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }

Status check(const LinearParams& p, bool backward) {
  if (p.rows < 0 || p.in < 0 || p.out < 0) return error_status("linear: a size is out of range");
  bool bad = false;
  if (p.out > 0 && p.in > 0) bad = p.weight == nullptr;
  if (p.rows > 0 && p.in > 0) bad = bad || p.x == nullptr;
  if (p.rows > 0 && p.out > 0) {
    bad = bad || (backward ? p.d_y == nullptr || (p.relu && p.y == nullptr) : p.y == nullptr);
  }
  if (bad) return error_status("linear: a pointer is null");
  return {};
}

template <class T>
class Run {
 public:
  Run(const LinearParams& params, const LinearKernels<T>& kernels)
      : p_(params), k_(kernels), blocks_(up(p_.rows, kLinearRows)) {}

  void forward() {
    const T* bias = padded_bias();
    product_of_rows(in(p_.x), p_.x_stride, p_.in, true, p_.out, bias, p_.relu,
                    static_cast<T*>(p_.y));
  }

  void backward() {
    const T* d_y = in(p_.d_y);
    int64_t stride = p_.d_y_stride;
    Buffer<T> masked(p_.relu ? p_.rows * p_.out : 0);
    if (p_.relu) {
      run_tickets(blocks_, workers(p_.rows * p_.out, blocks_), [&](int64_t, int64_t block) {
        const int64_t first = block * kLinearRows;
        k_.mask(d_y + first * stride, stride, in(p_.y) + first * p_.out, rows_of(block), p_.out,
                masked.get() + first * p_.out);
      });
      d_y = masked.get();
      stride = p_.out;
    }
    if (p_.d_x != nullptr) {
      product_of_rows(d_y, stride, p_.out, false, p_.in, nullptr, false, static_cast<T*>(p_.d_x));
    }
    if (p_.d_weight != nullptr || p_.d_bias != nullptr) weight_gradient(d_y, stride);
  }

 private:
  static const T* in(const void* x) { return static_cast<const T*>(x); }
  int64_t rows_of(int64_t block) const {
    return std::min(kLinearRows, p_.rows - block * kLinearRows);
  }
  static int64_t workers(int64_t terms, int64_t tickets) {
    return useful_workers(static_cast<double>(terms), tickets);
  }

  const T* padded_bias() {
    if (p_.bias == nullptr) return nullptr;
    bias_.assign(up(p_.out, k_.width) * k_.width, T(0));
    std::copy_n(in(p_.bias), p_.out, bias_.data());
    return bias_.data();
  }

  // y[rows, columns] = act(a x W^T + bias) with W [columns, depth], or a x W with W [depth,
  // columns].
  void product_of_rows(const T* a, int64_t a_stride, int64_t depth, bool transposed,
                       int64_t columns, const T* bias, bool relu, T* y) {
    if (p_.rows == 0 || columns == 0) return;
    Buffer<T> panels(up(columns, k_.width) * k_.width * depth);
    k_.pack(in(p_.weight), p_.weight_stride, depth, columns, transposed, panels.get());
    const int64_t count = workers(p_.rows * columns * (depth + 8), blocks_);
    Buffer<T> scratch(count * kLinearRows * k_.width);
    run_tickets(blocks_, count, [&](int64_t worker, int64_t block) {
      const int64_t first = block * kLinearRows;
      k_.rows(a + first * a_stride, a_stride, rows_of(block), depth, panels.get(), columns, bias,
              relu, y + first * columns, columns, scratch.get() + worker * kLinearRows * k_.width);
    });
  }

  // Tasks are tiles of the gradient times stretches of rows; both depend on the shape alone. Each
  // stretch has a matrix of its own, and these are added in order.
  void weight_gradient(const T* d_y, int64_t stride) {
    const int64_t panels = p_.d_weight == nullptr ? 0 : up(p_.in, k_.width);
    const int64_t strips = up(p_.out, kLinearRows);
    const int64_t tiles = std::max<int64_t>(1, strips * std::max<int64_t>(panels, 1));
    const int64_t parts =
        std::clamp<int64_t>(std::min(up(kTasks, tiles), p_.rows / kPartRows), 1, kTasks);
    const int64_t width = up(p_.in, k_.lanes) * k_.lanes, size = p_.out * width;
    const int64_t tickets = parts * strips * (panels + (p_.d_bias == nullptr ? 0 : 1));
    const int64_t count = workers(p_.rows * p_.out * (p_.in + 8), tickets);
    Buffer<T> products(panels == 0 ? 0 : parts * size);
    Buffer<T> scratch(count * kLinearDepth * k_.width);
    std::vector<double> sums(p_.d_bias == nullptr ? 0 : parts * p_.out, 0.0);
    run_tickets(tickets, count, [&](int64_t worker, int64_t ticket) {
      const int64_t part = ticket / strips % parts, strip = ticket % strips;
      const int64_t panel = ticket / strips / parts;
      const int64_t first = p_.rows * part / parts;
      const int64_t rows = p_.rows * (part + 1) / parts - first;
      const int64_t row = strip * kLinearRows, some = std::min(kLinearRows, p_.out - row);
      const T* left = d_y + first * stride + row;
      if (panel == panels) {
        k_.column_sums(left, stride, rows, some, sums.data() + part * p_.out + row);
        return;
      }
      const int64_t column = panel * k_.width;
      k_.product(left, stride, some, in(p_.x) + first * p_.x_stride + column, p_.x_stride,
                 std::min(k_.width, p_.in - column), rows,
                 products.get() + part * size + row * width + column, width,
                 scratch.get() + worker * kLinearDepth * k_.width);
    });
    for (int64_t i = 0; panels > 0 && i < p_.out; ++i) {
      T* to = static_cast<T*>(p_.d_weight) + i * p_.in;
      if (p_.rows == 0) {
        std::fill_n(to, p_.in, T(0));
      } else {
        k_.merge(products.get() + i * width, size, parts, p_.in, to);
      }
    }
    for (int64_t c = 0; p_.d_bias != nullptr && c < p_.out; ++c) {
      double total = 0.0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * p_.out + c];
      static_cast<T*>(p_.d_bias)[c] = static_cast<T>(total);
    }
  }

  static constexpr int64_t kTasks = 16;      // at least so many where there are rows enough
  static constexpr int64_t kPartRows = 256;  // of a stretch, at least

  const LinearParams& p_;
  const LinearKernels<T>& k_;
  const int64_t blocks_;
  std::vector<T> bias_;
};

Status call(const LinearParams& params, bool backward) {
  Status status = check(params, backward);
  if (!status.ok) return status;
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  const auto run = [&](auto kind) {
    Run<decltype(kind)> run(params, kernels_of(isa, kind));
    backward ? run.backward() : run.forward();
  };
  try {
    params.dtype == LinearDtype::kFloat64 ? run(0.0) : run(0.0f);
  } catch (const std::bad_alloc&) {
    return error_status("linear: out of memory for %lld rows of width %lld",
                        static_cast<long long>(params.rows), static_cast<long long>(params.in));
  }
  return {};
}

}  // namespace

Status linear_cpu(const LinearParams& params) { return call(params, false); }

Status linear_backward_cpu(const LinearParams& params) { return call(params, true); }

}  // namespace padkern
