// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "triple_expert/gated_bce_kernel.h"

#include "common/simd.h"
#include "triple_expert/gated_bce.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

#define PADKERN_INLINE inline __attribute__((always_inline))

PADKERN_INLINE float exp_scalar(float x) { return __builtin_expf(x); }
PADKERN_INLINE double exp_scalar(double x) { return __builtin_exp(x); }

// Sum of log(1 + z), 0 <= z <= 1, with one logarithm per thousand terms.
struct LogSum {
  double sum = 0.0;
  double product = 1.0;

  PADKERN_INLINE void add(double z) {
    if (z < 1e-8) {
      sum += z - 0.5 * z * z;  // 1 + z would round z away
      return;
    }
    product *= 1.0 + z;  // NaN takes this way too
    if (product > 1e300) flush();
  }

  PADKERN_INLINE void flush() {
    sum += __builtin_log(product);
    product = 1.0;
  }
};

template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
  using Type = Lanes<L...>;
};

// Sum of all lanes by halving: a chain of log2(lanes) additions instead of one per lane. The lane
// numbers are template arguments because the compiler needs them as constants.
template <class T, int HALF, int... L>
PADKERN_INLINE T sum_halves(Vec<T> v, Lanes<L...> lanes) {
  v += __builtin_shufflevector(v, v, (L ^ HALF)...);
  if constexpr (HALF > 1) {
    return sum_halves<T, HALF / 2>(v, lanes);
  } else {
    return v[0];
  }
}

template <class T>
PADKERN_INLINE T sum_lanes(Vec<T> v) {
  constexpr int kLanes = Simd<T>::kLanes;
  return sum_halves<T, kLanes / 2>(v, typename CountLanes<kLanes>::Type());
}

template <class T>
PADKERN_INLINE T dot(const T* a, const T* b, int64_t dim) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] += load(a + i + v * kLanes) * load(b + i + v * kLanes);
  }
  for (; i + kLanes <= dim; i += kLanes) sum[0] += load(a + i) * load(b + i);
  const Vec<T> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T total = sum_lanes<T>(all);
  for (; i < dim; ++i) total += a[i] * b[i];
  return total;
}

// out = (fresh ? 0 : out) + c x
template <class T>
PADKERN_INLINE void axpy(T c, const T* x, bool fresh, T* out, int64_t dim) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  if (fresh) {
    for (; i + kLanes <= dim; i += kLanes) store(out + i, load(x + i) * c);
    for (; i < dim; ++i) out[i] = c * x[i];
    return;
  }
  for (; i + kLanes <= dim; i += kLanes) store(out + i, load(out + i) + load(x + i) * c);
  for (; i < dim; ++i) out[i] += c * x[i];
}

template <class T>
PADKERN_INLINE void prefetch_rows(const GatedBceView<T>& view, int64_t id) {
  for (int64_t e = 0; e < view.experts; ++e) {
    const char* row = reinterpret_cast<const char*>(view.tables + e * view.table_expert_stride +
                                                    id * view.table_row_stride);
    const int64_t bytes = view.dim * static_cast<int64_t>(sizeof(T));
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
  }
}

template <class T>
PADKERN_INLINE int64_t slot_id(const GatedBceView<T>& view, int64_t token, int64_t slot) {
  return slot == 0 ? view.positive_ids[token]
                   : view.negative_ids[token * view.negatives + slot - 1];
}

template <class T>
void tokens(const GatedBceView<T>& view, int64_t first, int64_t last, GatedBceSums* sums,
            double* d_gate) {
  const int64_t experts = view.experts;
  const int64_t slots = view.negatives + 1;
  LogSum logs[2];
  double hinge[2] = {0.0, 0.0};  // sum of max(x, 0); softplus(x) = max(x, 0) + log(1 + exp(-|x|))
  T x[kGatedBceMaxExperts];
  for (int64_t t = first; t < last; ++t) {
    T* d_user = view.want_gradient ? view.d_users + t * experts * view.dim : nullptr;
    if (view.valid != nullptr && view.valid[t] == 0) {
      // Selected away, not multiplied away: a masked token may hold NaN.
      if (view.want_gradient) {
        for (int64_t i = 0; i < experts * view.dim; ++i) d_user[i] = T(0);
      }
      continue;
    }
    const T* user = view.users + t * view.user_token_stride;
    for (int64_t j = 0; j < slots; ++j) {
      const int64_t id = slot_id(view, t, j);
      if (j + 1 < slots) {
        prefetch_rows(view, slot_id(view, t, j + 1));
      } else if (t + 1 < last) {
        prefetch_rows(view, view.positive_ids[t + 1]);
      }
      const T* row = view.tables + id * view.table_row_stride;
      const int64_t bin = view.item_bins[id];
      const T* gate = view.gate + bin * experts;
      T score = 0;
      for (int64_t e = 0; e < experts; ++e) {
        x[e] =
            dot(user + e * view.user_expert_stride, row + e * view.table_expert_stride, view.dim);
        score += gate[e] * x[e];
      }
      const int side = j == 0 ? 0 : 1;
      const T argument = j == 0 ? -score : score;
      const T z = exp_scalar(argument < T(0) ? argument : -argument);
      hinge[side] += argument > T(0) ? static_cast<double>(argument) : 0.0;
      logs[side].add(static_cast<double>(z));
      if (!view.want_gradient) continue;
      // d softplus(a) / da = sigmoid(a), from z = exp(-|a|) without overflow.
      const T sigmoid = (argument < T(0) ? z : T(1)) / (T(1) + z);
      const T delta = j == 0 ? -view.positive_weight * sigmoid : view.negative_weight * sigmoid;
      T* coefficient = view.coefficients + (t * slots + j) * experts;
      for (int64_t e = 0; e < experts; ++e) {
        const T c = delta * gate[e];
        coefficient[e] = c;
        axpy(c, row + e * view.table_expert_stride, j == 0, d_user + e * view.dim, view.dim);
        d_gate[bin * experts + e] += static_cast<double>(delta) * static_cast<double>(x[e]);
      }
    }
  }
  logs[0].flush();
  logs[1].flush();
  sums->positive = hinge[0] + logs[0].sum;
  sums->negative = hinge[1] + logs[1].sum;
}

// out[0, VECS * lanes) = sum over the item's slots of coefficient x user, in slot order.
template <class T, int VECS>
PADKERN_INLINE void item_columns(const GatedBceView<T>& view, int64_t begin, int64_t end, int64_t e,
                                 int64_t column, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> sum[VECS] = {};
  const T* users = view.users + e * view.user_expert_stride + column;
  for (int64_t s = begin; s < end; ++s) {
    const T c = view.coefficients[view.item_slots[s] * view.experts + e];
    const T* user = users + view.item_tokens[s] * view.user_token_stride;
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) sum[v] += load(user + v * kLanes) * c;
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECS; ++v) store(out + column + v * kLanes, sum[v]);
}

template <class T>
void items(const GatedBceView<T>& view, int64_t first, int64_t last) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t e = 0; e < view.experts; ++e) {
    for (int64_t i = first; i < last; ++i) {
      T* out = view.d_tables + (e * view.rows + i) * view.dim;
      const int64_t begin = view.item_offsets[i];
      const int64_t end = view.item_offsets[i + 1];
      int64_t column = 0;
      if (begin == end) {
        for (; column < view.dim; ++column) out[column] = T(0);
        continue;
      }
      for (; column + 8 * kLanes <= view.dim; column += 8 * kLanes) {
        item_columns<T, 8>(view, begin, end, e, column, out);
      }
      for (; column + 2 * kLanes <= view.dim; column += 2 * kLanes) {
        item_columns<T, 2>(view, begin, end, e, column, out);
      }
      for (; column + kLanes <= view.dim; column += kLanes) {
        item_columns<T, 1>(view, begin, end, e, column, out);
      }
      for (; column < view.dim; ++column) {
        T sum = 0;
        for (int64_t s = begin; s < end; ++s) {
          sum += view.coefficients[view.item_slots[s] * view.experts + e] *
                 view.users[view.item_tokens[s] * view.user_token_stride +
                            e * view.user_expert_stride + column];
        }
        out[column] = sum;
      }
    }
  }
}

template <class T>
constexpr GatedBceKernels<T> kKernels = {tokens<T>, items<T>};

}  // namespace

const GatedBceKernels<float>& gated_bce_kernels_f32() { return kKernels<float>; }
const GatedBceKernels<double>& gated_bce_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
