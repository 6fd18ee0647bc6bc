// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "dropout_add_norm/dropout_add_norm_kernel.h"

#include "common/philox.h"
#include "common/simd.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

#define PADKERN_INLINE inline __attribute__((always_inline))

// Channels that share 16 counters of random bits.
constexpr int64_t kBlock = 64;

// The first `left` elements, zeros behind them.
template <class T>
PADKERN_INLINE Vec<T> load_part(const T* p, int64_t left) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  if (left >= kLanes) return load(p);
  Vec<T> v = {};
  for (int64_t l = 0; l < left; ++l) v[l] = p[l];
  return v;
}

template <class T>
PADKERN_INLINE void store_part(T* p, Vec<T> v, int64_t left) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  if (left >= kLanes) {
    store(p, v);
    return;
  }
  for (int64_t l = 0; l < left; ++l) p[l] = v[l];
}

// Bits of 64 channels of one token. The counter is (step, token, 16 block + l, high half of token);
// its word w is that of channel 64 block + 16 w + l.
template <class T>
PADKERN_INLINE void channel_bits(const DropoutAddNormView<T>& view, int64_t token, int64_t block,
                                 uint32_t* out) {
  const uint32_t key[2] = {static_cast<uint32_t>(view.seed),
                           static_cast<uint32_t>(view.seed >> 32)};
  const Words lanes = lane_numbers();
#pragma GCC unroll 8
  for (int64_t l = 0; l < 16; l += kPhiloxLanes) {
    Words counter[4] = {Words{} + static_cast<uint64_t>(view.step),
                        Words{} + static_cast<uint64_t>(token),
                        lanes + static_cast<uint64_t>(16 * block + l),
                        Words{} + (static_cast<uint64_t>(token) >> 32)};
    philox(counter, key);
    for (int w = 0; w < 4; ++w) store_words(out + 16 * w + l, counter[w]);
  }
}

template <class T>
PADKERN_INLINE int64_t token_of(const DropoutAddNormView<T>& view, int64_t row) {
  return view.token_ids == nullptr ? row : view.token_ids[row];
}

// Calls each(c, left, keep) for whole vectors of channels; keep is the dropout factor.
template <class T, class Each>
PADKERN_INLINE void channels(const DropoutAddNormView<T>& view, int64_t row, const Each& each) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  if (!view.drops) {
    const Vec<T> one = Vec<T>{} + T(1);
    for (int64_t c = 0; c < view.dim; c += kLanes) each(c, view.dim - c, one);
    return;
  }
  const int64_t token = token_of(view, row);
  uint32_t bits[kBlock];
  for (int64_t first = 0; first < view.dim; first += kBlock) {
    channel_bits(view, token, first / kBlock, bits);
    const int64_t end = first + kBlock < view.dim ? first + kBlock : view.dim;
    for (int64_t c = first; c < end; c += kLanes) {
      each(c, view.dim - c, keep_factor<T>(bits + c - first, view.threshold, view.keep_scale));
    }
  }
}

struct Moments {
  double mean;
  double inverse;
};

// Of a row in double precision: for sums whose squares leave the range of T.
template <class T>
__attribute__((noinline)) Moments wide_moments(const T* row, int64_t dim, double eps) {
  double mean = 0.0, var = 0.0;
  for (int64_t c = 0; c < dim; ++c) mean += static_cast<double>(row[c]);
  mean /= static_cast<double>(dim);
  for (int64_t c = 0; c < dim; ++c) {
    const double d = static_cast<double>(row[c]) - mean;
    var += d * d;
  }
  return {mean, 1.0 / __builtin_sqrt(var / static_cast<double>(dim) + eps)};
}

// Normalises the padded row (zeros behind dim).
template <class T>
PADKERN_INLINE void normalise(const DropoutAddNormView<T>& view, int64_t row, const T* sum) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> total = {};
  for (int64_t c = 0; c < view.dim; c += kLanes) total += load(sum + c);
  const double count = static_cast<double>(view.dim);
  Moments m;
  m.mean = lane_sum<T>(total) / count;
  // The second pass corrects the mean by what is left: a row of one number has no variance at all.
  const T about = static_cast<T>(m.mean);
  Vec<T> rest = {}, squares = {};
  int64_t c = 0;
  for (; c + kLanes <= view.dim; c += kLanes) {
    const Vec<T> d = load(sum + c) - about;
    rest += d;
    squares += d * d;
  }
  double offset = lane_sum<T>(rest), var = lane_sum<T>(squares);
  for (; c < view.dim; ++c) {
    const T d = sum[c] - about;
    offset += static_cast<double>(d);
    var += static_cast<double>(d * d);
  }
  offset /= count;
  var = var / count - offset * offset;
  m.mean = static_cast<double>(about) + offset;
  T* out = view.out + row * view.dim;
  if (!(var < 1e30)) {  // also NaN
    m = wide_moments(sum, view.dim, view.eps);
    for (int64_t i = 0; i < view.dim; ++i) {
      const double unit = (static_cast<double>(sum[i]) - m.mean) * m.inverse;
      out[i] = static_cast<T>(unit * static_cast<double>(view.weight[i]) +
                              static_cast<double>(view.shift[i]));
    }
  } else {
    m.inverse = 1.0 / __builtin_sqrt((var > 0.0 ? var : 0.0) + view.eps);
    const T mean = static_cast<T>(m.mean), inverse = static_cast<T>(m.inverse);
    for (c = 0; c + kLanes <= view.dim; c += kLanes) {
      store(out + c,
            (load(sum + c) - mean) * inverse * load(view.weight + c) + load(view.shift + c));
    }
    for (; c < view.dim; ++c) {
      out[c] = (sum[c] - mean) * inverse * view.weight[c] + view.shift[c];
    }
  }
  if (view.stats != nullptr) {
    view.stats[2 * row] = static_cast<T>(m.mean);
    view.stats[2 * row + 1] = static_cast<T>(m.inverse);
  }
}

template <class T>
void forward(const DropoutAddNormView<T>& view, int64_t first, int64_t last, T* scratch) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = view.x + row * view.x_stride;
    const T* residual =
        view.residual == nullptr ? nullptr : view.residual + row * view.residual_stride;
    T* kept = view.sum == nullptr ? nullptr : view.sum + row * view.dim;
    channels(view, row, [&](int64_t c, int64_t left, Vec<T> keep) {
      Vec<T> v = load_part(x + c, left);
      if (view.bias != nullptr) v += load_part(view.bias + c, left);
      v *= keep;
      if (residual != nullptr) v += load_part(residual + c, left);
      store(scratch + c, v);
      if (kept != nullptr) store_part(kept + c, v, left);
    });
    if (view.weight != nullptr) normalise(view, row, scratch);
  }
}

template <class T>
void backward(const DropoutAddNormView<T>& view, int64_t first, int64_t last, T* scratch, T* sums) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t dim = view.dim;
  const int64_t wide = (dim + kLanes - 1) / kLanes * kLanes;
  const Vec<T> zero = {};
  // Sums and the row's gradient in whole vectors; what lies behind dim is never given back.
  T *d_bias = scratch, *d_weight = scratch + wide, *d_shift = scratch + 2 * wide;
  T *slope = scratch + 3 * wide, *unit = scratch + 4 * wide;
  for (int64_t c = 0; c < 3 * wide; c += kLanes) store(scratch + c, zero);
  for (int64_t row = first; row < last; ++row) {
    const T* d_sum = view.d_sum == nullptr ? nullptr : view.d_sum + row * view.d_sum_stride;
    const bool norms = view.weight != nullptr && view.d_out != nullptr;
    T mean_slope = 0, mean_product = 0, inverse = 0;
    if (norms) {
      const T* d_out = view.d_out + row * view.d_out_stride;
      const T* sum = view.sum + row * dim;
      const T mean = view.stats[2 * row];
      inverse = view.stats[2 * row + 1];
      Vec<T> slopes = zero, products = zero;
      for (int64_t c = 0; c < dim; c += kLanes) {
        const int64_t left = dim - c;
        const Vec<T> g = load_part(d_out + c, left);
        // Behind dim both factors of every sum are 0 through g.
        Vec<T> u = (load_part(sum + c, left) - mean) * inverse;
        store(d_weight + c, load(d_weight + c) + g * u);
        store(d_shift + c, load(d_shift + c) + g);
        const Vec<T> s = g * load_part(view.weight + c, left);
        slopes += s;
        products += s * u;
        store(slope + c, s);
        store(unit + c, u);
      }
      mean_slope = static_cast<T>(lane_sum<T>(slopes) / static_cast<double>(dim));
      mean_product = static_cast<T>(lane_sum<T>(products) / static_cast<double>(dim));
    }
    T* d_residual = view.d_residual + row * dim;
    T* d_x = view.d_x == nullptr ? nullptr : view.d_x + row * dim;
    channels(view, row, [&](int64_t c, int64_t left, Vec<T> keep) {
      Vec<T> g = zero;
      if (norms) {
        g = (load(slope + c) - mean_slope - load(unit + c) * mean_product) * inverse;
      }
      if (d_sum != nullptr) g += load_part(d_sum + c, left);
      store_part(d_residual + c, g, left);
      g *= keep;
      if (d_x != nullptr) store_part(d_x + c, g, left);
      if (view.want_bias) store(d_bias + c, load(d_bias + c) + g);
    });
  }
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t c = 0; c < dim; ++c) sums[part * dim + c] = scratch[part * wide + c];
  }
}

template <class T>
int64_t scratch_size(int64_t dim) {
  return 5 * ((dim + Simd<T>::kLanes - 1) / Simd<T>::kLanes * Simd<T>::kLanes);
}

constexpr DropoutAddNormKernels<float> kFloat = {scratch_size<float>, forward<float>,
                                                 backward<float>};
constexpr DropoutAddNormKernels<double> kDouble = {scratch_size<double>, forward<double>,
                                                   backward<double>};

}  // namespace

const DropoutAddNormKernels<float>& dropout_add_norm_kernels_f32() { return kFloat; }
const DropoutAddNormKernels<double>& dropout_add_norm_kernels_f64() { return kDouble; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
