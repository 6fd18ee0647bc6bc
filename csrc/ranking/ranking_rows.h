// What happens to a tile of scores: masks, counts, best items. Included only by sources that CMake
// compiles once per instruction set.
#pragma once

#include "common/gemm_tile.h"
#include "ranking/ranking_kernel.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {

// Lanes of a that exceed b (or, with OR_EQUAL, reach it) as bits; NaN never does.
template <bool OR_EQUAL>
PADKERN_INLINE uint64_t bits_above(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, OR_EQUAL ? _CMP_GE_OQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(a, b, OR_EQUAL ? _CMP_GE_OQ : _CMP_GT_OQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(OR_EQUAL ? _mm_cmpge_ps(a, b) : _mm_cmpgt_ps(a, b)));
#else
  uint64_t bits = 0;
  for (int l = 0; l < Simd<float>::kLanes; ++l) {
    bits |= static_cast<uint64_t>(OR_EQUAL ? a[l] >= b[l] : a[l] > b[l]) << l;
  }
  return bits;
#endif
}

template <bool OR_EQUAL>
PADKERN_INLINE uint64_t bits_above(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(a, b, OR_EQUAL ? _CMP_GE_OQ : _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_pd(_mm256_cmp_pd(a, b, OR_EQUAL ? _CMP_GE_OQ : _CMP_GT_OQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_pd(OR_EQUAL ? _mm_cmpge_pd(a, b) : _mm_cmpgt_pd(a, b)));
#else
  uint64_t bits = 0;
  for (int l = 0; l < Simd<double>::kLanes; ++l) {
    bits |= static_cast<uint64_t>(OR_EQUAL ? a[l] >= b[l] : a[l] > b[l]) << l;
  }
  return bits;
#endif
}

template <class T>
PADKERN_INLINE Vec<T> spread(T value) {
  return Vec<T>{} + value;
}

// The values of a row above (or, with OR_EQUAL, not below) a bound, a bit each.
template <class T, int VECS, bool OR_EQUAL>
PADKERN_INLINE uint64_t row_bits(const T* row, T bound) {
  uint64_t bits = 0;
#pragma GCC unroll 3
  for (int v = 0; v < VECS; ++v) {
    bits |= bits_above<OR_EQUAL>(load(row + v * Simd<T>::kLanes), spread<T>(bound))
            << (v * Simd<T>::kLanes);
  }
  return bits;
}

// Whether the first comes after the second: lower score, or the same and the higher id.
template <class T>
PADKERN_INLINE bool is_worse(T score, int32_t id, T other, int32_t other_id) {
  return score < other || (score == other && id > other_id);
}

// Puts a candidate into the heap of the best k, if it is one of them.
template <class T>
inline void push(RankTop<T>* top, int64_t k, T score, int32_t id) {
  T* scores = top->scores;
  int32_t* ids = top->ids;
  int64_t place;
  if (top->size < k) {
    place = top->size++;
    while (place > 0) {
      const int64_t above = (place - 1) / 2;
      if (!is_worse(score, id, scores[above], ids[above])) break;
      scores[place] = scores[above];
      ids[place] = ids[above];
      place = above;
    }
  } else {
    if (!is_worse(scores[0], ids[0], score, id)) return;
    place = 0;
    for (;;) {
      int64_t below = 2 * place + 1;
      if (below >= k) break;
      if (below + 1 < k && is_worse(scores[below + 1], ids[below + 1], scores[below], ids[below])) {
        ++below;
      }
      if (!is_worse(scores[below], ids[below], score, id)) break;
      scores[place] = scores[below];
      ids[place] = ids[below];
      place = below;
    }
  }
  scores[place] = score;
  ids[place] = id;
}

template <class T, int VECS>
PADKERN_INLINE void collect(const RankTask<T>& in, RankTop<T>* top, const T* row, int64_t start) {
  const bool full = top->size == in.top_k;
  const T bound = full ? top->scores[0] : -static_cast<T>(__builtin_inf());
  // In id order a later item never wins a tie. A score of -inf is never taken.
  uint64_t bits = full && in.items.order != nullptr ? row_bits<T, VECS, true>(row, bound)
                                                    : row_bits<T, VECS, false>(row, bound);
  for (; bits != 0; bits &= bits - 1) {
    const int place = __builtin_ctzll(bits);
    const int64_t id =
        in.items.order != nullptr ? in.items.order[start + place] : start + place + 1;
    push(top, in.top_k, row[place], static_cast<int32_t>(id));
  }
}

// counter -= lanes of a above b, as -1 each.
PADKERN_INLINE void count_above(Simd<float>::Bits* counter, Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const __mmask16 above = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  *counter = (Simd<float>::Bits)_mm512_mask_add_epi32((__m512i)*counter, above, (__m512i)*counter,
                                                      _mm512_set1_epi32(1));
#else
  *counter -= (Simd<float>::Bits)(a > b);
#endif
}

PADKERN_INLINE void count_above(Simd<double>::Bits* counter, Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  const __mmask8 above = _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
  *counter = (Simd<double>::Bits)_mm512_mask_add_epi64((__m512i)*counter, above, (__m512i)*counter,
                                                       _mm512_set1_epi64(1));
#else
  *counter -= (Simd<double>::Bits)(a > b);
#endif
}

template <class T>
PADKERN_INLINE bool any_equal(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (_mm512_cmp_ps_mask(a, value, _CMP_EQ_OQ) | _mm512_cmp_ps_mask(b, value, _CMP_EQ_OQ) |
            _mm512_cmp_ps_mask(c, value, _CMP_EQ_OQ)) != 0;
  } else {
    return (_mm512_cmp_pd_mask(a, value, _CMP_EQ_OQ) | _mm512_cmp_pd_mask(b, value, _CMP_EQ_OQ) |
            _mm512_cmp_pd_mask(c, value, _CMP_EQ_OQ)) != 0;
  }
#else
  const auto equal = (a == value) | (b == value) | (c == value);
#if defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)equal) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)equal) != 0;
#else
  bool any = false;
  for (int l = 0; l < Simd<T>::kLanes; ++l) any = any || equal[l] != 0;
  return any;
#endif
#endif
}

// Rows [first, last) of the tile of a panel: `width` positions from `start` on.
template <class T, int VECS, bool COUNT, bool TOP>
void finish_rows(const RankTask<T>& in, int64_t first, int64_t last, int64_t start, int64_t width) {
  constexpr int kLanes = Simd<T>::kLanes;
  const T nan = static_cast<T>(__builtin_nan(""));
  typename Simd<T>::Bits* counters = static_cast<typename Simd<T>::Bits*>(in.counters);
  const int64_t stop = start + width;
  for (int64_t i = first; i < last; ++i) {
    T* row = in.tile + i * kTileWidth<T>;
    int64_t nans = 0;
    if (in.count_nans) {
      for (int64_t j = 0; j < width; ++j) nans += row[j] != row[j];
    }
    for (int64_t j = width; j < VECS * kLanes; ++j) row[j] = nan;
    bool own_here = false;
    while (*in.masked[i] < stop) {
      const int32_t position = *in.masked[i]++;
      T* score = row + (position - start);
      if (in.count_nans) nans -= *score != *score;
      if (COUNT && TOP && position == in.own[i]) {
        own_here = true;
        continue;
      }
      // NaN is neither greater than nor equal to anything.
      *score = nan;
    }
    if (TOP) collect<T, VECS>(in, in.tops[i], row, start);
    if (COUNT) {
      if (TOP && own_here) row[in.own[i] - start] = nan;
      in.nans[i] += nans;
      const Vec<T> target = spread<T>(in.targets[i]);
      Vec<T> score[VECS];
      typename Simd<T>::Bits counter = counters[i];
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) {
        score[v] = load(row + v * kLanes);
        count_above(&counter, score[v], target);
      }
      counters[i] = counter;
      if (__builtin_expect(any_equal<T>(score[0], score[VECS > 1], score[VECS - 1], target), 0)) {
        for (int64_t j = 0; j < width; ++j) in.equal[i] += row[j] == in.targets[i];
      }
    }
  }
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
