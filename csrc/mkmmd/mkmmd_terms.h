// The sum of kernels as the drivers prepare it for the per-instruction-set objects.
#pragma once

#include "mkmmd/mkmmd.h"

namespace padkern {

// Terms in descending order of bandwidth. With s_u = 2 alpha_u sigma_sq and r = d / s_u, a term has
// the value beta_u k_u(r) and the derivative -(1 / s_u) beta_u h_u(r) by d, so that
//   sum_u beta_u dk_u/dd = -(1 / s_0) sum_u slope_u h_u,   slope_u = beta_u s_0 / s_u.
// A Gaussian term is the previous one squared squarings[u] times, or a new exponential when
// squarings[u] is -1.
template <class T>
struct MkmmdTerms {
  MkmmdKernel kernel;
  int count;
  bool ladder;  // Gaussian, no betas, every term after the first is the square of the one before
  int squarings[kMkmmdMaxKernels];
  int order[kMkmmdMaxKernels];        // where the caller has the term
  T inverse_scale[kMkmmdMaxKernels];  // 1 / s_u; energy: 1
  T beta[kMkmmdMaxKernels];
  T slope[kMkmmdMaxKernels];
};

// Fills terms; sigma_sq > 0 (energy takes no notice of it and of alphas).
template <class T>
void make_terms(MkmmdKernel kernel, const double* alphas, const double* betas, int64_t count,
                double sigma_sq, MkmmdTerms<T>* terms) {
  terms->kernel = kernel;
  terms->count = static_cast<int>(count);
  terms->ladder = kernel == MkmmdKernel::kGaussian && betas == nullptr;
  for (int u = 0; u < terms->count; ++u) {  // insertion sort, stable
    int place = u;
    for (; place > 0 && alphas[terms->order[place - 1]] < alphas[u]; --place) {
      terms->order[place] = terms->order[place - 1];
    }
    terms->order[place] = u;
  }
  int since_exp = 0;  // squarings double the relative error, so a chain is cut after six
  for (int u = 0; u < terms->count; ++u) {
    const double alpha = alphas[terms->order[u]];
    const double widest = alphas[terms->order[0]];
    const double beta = betas == nullptr ? 1.0 : betas[terms->order[u]];
    const bool energy = kernel == MkmmdKernel::kEnergy;
    terms->inverse_scale[u] = energy ? T(1) : static_cast<T>(0.5 / (alpha * sigma_sq));
    terms->beta[u] = static_cast<T>(beta);
    terms->slope[u] = static_cast<T>(energy ? beta : beta * (widest / alpha));
    terms->squarings[u] = -1;
    if (u == 0) continue;
    const double ratio = alphas[terms->order[u - 1]] / alpha;
    for (int s = 0; s <= 3; ++s) {
      if (ratio == static_cast<double>(1 << s) && since_exp + s <= 6) terms->squarings[u] = s;
    }
    since_exp = terms->squarings[u] < 0 ? 0 : since_exp + terms->squarings[u];
    terms->ladder = terms->ladder && terms->squarings[u] == 1;
  }
}

}  // namespace padkern
