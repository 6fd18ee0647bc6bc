// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
//
// One (sequence, head) at a time, all of it in L1: every product is of a few rows and at most 64
// keys, so the probabilities of a row are plain vectors and no online softmax is needed.
#include "short_attention/short_attention_kernel.h"

#include "common/philox.h"
#include "common/simd.h"
#include "short_attention/short_attention.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

#define PADKERN_INLINE inline __attribute__((always_inline))

constexpr int64_t kMost = kShortAttentionMaxTokens;

template <class T>
PADKERN_INLINE int64_t round_up(int64_t n) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  return (n + kLanes - 1) / kLanes * kLanes;
}

template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
  using Type = Lanes<L...>;
};

template <class T, int HALF, int... L>
PADKERN_INLINE T largest_of_halves(Vec<T> v, Lanes<L...> lanes) {
  const Vec<T> other = __builtin_shufflevector(v, v, (L ^ HALF)...);
  v = v > other ? v : other;
  if constexpr (HALF > 1) {
    return largest_of_halves<T, HALF / 2>(v, lanes);
  } else {
    return v[0];
  }
}

template <class T>
PADKERN_INLINE T lane_largest(Vec<T> v) {
  constexpr int kLanes = Simd<T>::kLanes;
  return largest_of_halves<T, kLanes / 2>(v, typename CountLanes<kLanes>::Type());
}

// Left operand of a product: element (i, k) at data[i * row + k * depth].
template <class T>
struct Left {
  const T* data;
  int64_t row;
  int64_t depth;
};

// Rows of whole vectors: element (k, c) at data[k * stride + c].
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

template <class T, int ROWS, int VECS>
PADKERN_INLINE void tile(Left<T> a, Rows<const T> b, Rows<T> c, int64_t first, int64_t last) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vec<T> sum[ROWS][VECS] = {};
  for (int64_t k = first; k < last; ++k) {
    Vec<T> right[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) right[v] = load(b.data + k * b.stride + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const T left = a.data[i * a.row + k * a.depth];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store(c.data + i * c.stride + v * kLanes, sum[i][v]);
  }
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif

template <class T, int ROWS>
PADKERN_INLINE void tile_row_group(Left<T> a, Rows<const T> b, Rows<T> c, int64_t width,
                                   int64_t first, int64_t last) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t x = 0;
  for (; x + kVecs * kLanes <= width; x += kVecs * kLanes) {
    tile<T, ROWS, kVecs>(a, {b.data + x, b.stride}, {c.data + x, c.stride}, first, last);
  }
  if (kVecs == 4 && x + 2 * kLanes <= width) {
    tile<T, ROWS, 2>(a, {b.data + x, b.stride}, {c.data + x, c.stride}, first, last);
    x += 2 * kLanes;
  }
  if (x < width) tile<T, ROWS, 1>(a, {b.data + x, b.stride}, {c.data + x, c.stride}, first, last);
}

// Which part of a product with a triangle is wanted.
enum class Part {
  kAll,
  kColumnsUpToRow,  // scores: a query's keys
  kTermsUpToRow,    // sums over a query's keys
  kTermsFromRow,    // sums over a key's queries
};

template <class T, Part PART, int ROWS>
PADKERN_INLINE void row_group(int64_t i, int64_t depth, int64_t width, Left<T> a, Rows<const T> b,
                              Rows<T> c) {
  int64_t first = 0, last = depth;
  if (PART == Part::kColumnsUpToRow) width = round_up<T>(i + ROWS);
  if (PART == Part::kTermsUpToRow) last = i + ROWS;
  if (PART == Part::kTermsFromRow) first = i;
  tile_row_group<T, ROWS>({a.data + i * a.row, a.row, a.depth}, b,
                          {c.data + i * c.stride, c.stride}, width, first, last);
}

// c[i, 0..width) = sum_k a(i, k) b[k, :] for i < rows. Rows go four at a time and a group takes
// what its widest row needs; the excess terms have a(i, k) = 0, the excess columns are never read.
template <class T, Part PART>
__attribute__((noinline)) void product(int64_t rows, int64_t depth, int64_t width, Left<T> a,
                                       Rows<const T> b, Rows<T> c) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) row_group<T, PART, 4>(i, depth, width, a, b, c);
  if (i + 2 <= rows) {
    row_group<T, PART, 2>(i, depth, width, a, b, c);
    i += 2;
  }
  if (i < rows) row_group<T, PART, 1>(i, depth, width, a, b, c);
}

// out[c * ld + i] = rows[i, c] for i < count.
template <class T>
PADKERN_INLINE void transpose(const T* rows, int64_t stride, int64_t count, int64_t dim, T* out,
                              int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    int64_t c = 0;
    for (; c + 4 <= dim; c += 4) {
      transpose4(rows + i * stride + c, stride, out + c * ld + i, ld);
    }
    for (; c < dim; ++c) {
      for (int64_t r = i; r < i + 4; ++r) out[c * ld + r] = rows[r * stride + c];
    }
  }
  for (; i < count; ++i) {
    for (int64_t c = 0; c < dim; ++c) out[c * ld + i] = rows[i * stride + c];
  }
}

template <class T>
PADKERN_INLINE typename Simd<T>::Bits lane_index() {
  typename Simd<T>::Bits lanes = {};
  for (int l = 0; l < Simd<T>::kLanes; ++l) lanes[l] = static_cast<uint32_t>(l);
  return lanes;
}

// Scores of row i to probabilities, in place; columns beyond the row become 0.
template <class T>
PADKERN_INLINE void softmax_row(T* row, int64_t i, int64_t span, T scale) {
  using Bits = typename Simd<T>::Bits;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const Bits lanes = lane_index<T>();
  const Vec<T> zero = {};
  const Vec<T> lowest = zero - static_cast<T>(__builtin_inf());
  Vec<T> top = lowest;
  for (int64_t x = 0; x < span; x += kLanes) {
    // Selected, not multiplied away: what lies beyond the row may be NaN.
    const Vec<T> s = lanes + static_cast<uint32_t>(x) <= Bits{} + static_cast<uint32_t>(i)
                         ? load(row + x) * scale
                         : lowest;
    store(row + x, s);
    top = s > top ? s : top;
  }
  const T most = lane_largest<T>(top);
  Vec<T> sum = zero;
  for (int64_t x = 0; x < span; x += kLanes) {
    const Vec<T> e = lanes + static_cast<uint32_t>(x) <= Bits{} + static_cast<uint32_t>(i)
                         ? exp_or_zero<T>(load(row + x) - most)
                         : zero;
    store(row + x, e);
    sum += e;
  }
  const T inverse = static_cast<T>(1.0 / lane_sum<T>(sum));
  for (int64_t x = 0; x < span; x += kLanes) store(row + x, load(row + x) * inverse);
}

// Columns of row i that later products read: those of its group of four rows.
template <class T>
PADKERN_INLINE int64_t span_of(int64_t i, int64_t ld) {
  const int64_t span = round_up<T>((i | 3) + 1);
  return span < ld ? span : ld;
}

// Bits of queries 4 group .. 4 group + 3 for the first `keys` keys: out[w * kMost + key]. The
// counter is (step, sequence, group * 2^16 + key, head); its four words are the four queries.
template <class T>
PADKERN_INLINE void query_bits(const ShortAttentionView<T>& view, int64_t sequence, int64_t head,
                               int64_t group, int64_t keys, uint32_t* out) {
  const uint32_t key[2] = {static_cast<uint32_t>(view.seed),
                           static_cast<uint32_t>(view.seed >> 32)};
  const Words lanes = lane_numbers();
  for (int64_t x = 0; x < keys; x += kPhiloxLanes) {
    Words counter[4] = {
        Words{} + static_cast<uint64_t>(view.step), Words{} + static_cast<uint64_t>(sequence),
        lanes + static_cast<uint64_t>((group << 16) + x), Words{} + static_cast<uint64_t>(head)};
    philox(counter, key);
    for (int w = 0; w < 4; ++w) store_words(out + w * kMost + x, counter[w]);
  }
}

// One (sequence, head) with its scratch.
template <class T>
struct Task {
  static constexpr int64_t kLanes = Simd<T>::kLanes;
  const ShortAttentionView<T>& view;
  int64_t begin, count, ld, wide, sequence, head;
  T *keys, *values, *scores, *slopes, *padded;

  Task(const ShortAttentionView<T>& v, int64_t b, int64_t h, T* scratch)
      : view(v),
        begin(v.offsets[b]),
        count(v.offsets[b + 1] - v.offsets[b]),
        ld(round_up<T>(count)),
        wide(round_up<T>(v.dim)),
        sequence(b),
        head(h) {
    keys = scratch;
    values = keys + v.dim * kMost;
    scores = values + v.dim * kMost;
    slopes = scores + kMost * kMost;
    padded = slopes + kMost * kMost;
  }

  static int64_t scratch_size(int64_t dim) {
    return 2 * dim * kMost + 2 * kMost * kMost + 5 * kMost * round_up<T>(dim);
  }

  const T* first(const HeadedView<T>& rows) const {
    return rows.data + begin * rows.token_stride + head * rows.head_stride;
  }

  Left<T> left(const HeadedView<T>& rows) const { return {first(rows), rows.token_stride, 1}; }

  // The rows as whole vectors: where they lie, or in a padded copy.
  Rows<const T> whole(const HeadedView<T>& rows, int place) const {
    if (wide == view.dim) return {first(rows), rows.token_stride};
    T* copy = padded + place * kMost * wide;
    for (int64_t i = 0; i < count; ++i) {
      const T* row = first(rows) + i * rows.token_stride;
      for (int64_t c = 0; c < wide; ++c) copy[i * wide + c] = c < view.dim ? row[c] : T(0);
    }
    return {copy, wide};
  }

  Rows<T> target(T* out, int64_t stride) const {
    if (wide == view.dim) return {out, stride};
    return {padded + 4 * kMost * wide, wide};
  }

  void finish(T* out, int64_t stride) const {
    if (wide == view.dim) return;
    const T* from = padded + 4 * kMost * wide;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < view.dim; ++c) out[i * stride + c] = from[i * wide + c];
    }
  }

  void probabilities() const {
    transpose(first(view.k), view.k.token_stride, count, view.dim, keys, ld);
    product<T, Part::kColumnsUpToRow>(count, view.dim, ld, left(view.q), {keys, ld}, {scores, ld});
    for (int64_t i = 0; i < count; ++i) {
      softmax_row(scores + i * ld, i, span_of<T>(i, ld), view.scale);
    }
  }

  void forward() const {
    probabilities();
    if (view.drops) {
      uint32_t bits[4 * kMost];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t span = span_of<T>(i, ld);
        if (i % 4 == 0) query_bits(view, sequence, head, i / 4, span, bits);
        T* row = scores + i * ld;
        for (int64_t x = 0; x < span; x += kLanes) {
          store(row + x, load(row + x) * keep_factor<T>(bits + i % 4 * kMost + x, view.threshold,
                                                        view.keep_scale));
        }
      }
    }
    const int64_t stride = view.heads * view.dim;
    T* out = view.out + begin * stride + head * view.dim;
    product<T, Part::kTermsUpToRow>(count, count, wide, {scores, ld, 1}, whole(view.v, 0),
                                    target(out, stride));
    finish(out, stride);
  }

  // Scores become the dropped probabilities, slopes the derivatives by q k^T.
  void slope_rows() const {
    uint32_t bits[4 * kMost];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t span = span_of<T>(i, ld);
      if (view.drops && i % 4 == 0) query_bits(view, sequence, head, i / 4, span, bits);
      T* p = scores + i * ld;
      T* g = slopes + i * ld;
      const typename Simd<T>::Bits lanes = lane_index<T>();
      const Vec<T> zero = {};
      Vec<T> sum = zero;
      for (int64_t x = 0; x < span; x += kLanes) {
        const auto within =
            lanes + static_cast<uint32_t>(x) <= typename Simd<T>::Bits{} + static_cast<uint32_t>(i);
        Vec<T> slope = within ? load(g + x) : zero;
        if (view.drops) {
          slope *= keep_factor<T>(bits + i % 4 * kMost + x, view.threshold, view.keep_scale);
        }
        store(g + x, slope);
        sum += load(p + x) * slope;
      }
      const T mean = static_cast<T>(lane_sum<T>(sum));
      for (int64_t x = 0; x < span; x += kLanes) {
        const auto within =
            lanes + static_cast<uint32_t>(x) <= typename Simd<T>::Bits{} + static_cast<uint32_t>(i);
        const Vec<T> own = load(p + x);
        store(g + x, within ? own * (load(g + x) - mean) * view.scale : zero);
        if (view.drops) {
          store(p + x,
                own * keep_factor<T>(bits + i % 4 * kMost + x, view.threshold, view.keep_scale));
        }
      }
    }
  }

  void backward() const {
    probabilities();
    transpose(first(view.v), view.v.token_stride, count, view.dim, values, ld);
    product<T, Part::kColumnsUpToRow>(count, view.dim, ld, left(view.d_out), {values, ld},
                                      {slopes, ld});
    slope_rows();
    const int64_t size = view.heads * view.dim, stride = 3 * size;
    T* d_q = view.gradients + begin * stride + head * view.dim;
    T *d_k = d_q + size, *d_v = d_k + size;
    product<T, Part::kTermsUpToRow>(count, count, wide, {slopes, ld, 1}, whole(view.k, 0),
                                    target(d_q, stride));
    finish(d_q, stride);
    product<T, Part::kTermsFromRow>(count, count, wide, {slopes, 1, ld}, whole(view.q, 1),
                                    target(d_k, stride));
    finish(d_k, stride);
    product<T, Part::kTermsFromRow>(count, count, wide, {scores, 1, ld}, whole(view.d_out, 2),
                                    target(d_v, stride));
    finish(d_v, stride);
  }
};

template <class T>
int64_t scratch_size(int64_t dim) {
  return Task<T>::scratch_size(dim);
}

template <class T>
void forward(const ShortAttentionView<T>& view, int64_t first, int64_t last, T* scratch) {
  for (int64_t b = first; b < last; ++b) {
    if (view.offsets[b] == view.offsets[b + 1]) continue;
    for (int64_t h = 0; h < view.heads; ++h) Task<T>(view, b, h, scratch).forward();
  }
}

template <class T>
void backward(const ShortAttentionView<T>& view, int64_t first, int64_t last, T* scratch) {
  for (int64_t b = first; b < last; ++b) {
    if (view.offsets[b] == view.offsets[b + 1]) continue;
    for (int64_t h = 0; h < view.heads; ++h) Task<T>(view, b, h, scratch).backward();
  }
}

constexpr ShortAttentionKernels<float> kFloat = {scratch_size<float>, forward<float>,
                                                 backward<float>};
constexpr ShortAttentionKernels<double> kDouble = {scratch_size<double>, forward<double>,
                                                   backward<double>};

}  // namespace

const ShortAttentionKernels<float>& short_attention_kernels_f32() { return kFloat; }
const ShortAttentionKernels<double>& short_attention_kernels_f64() { return kDouble; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
