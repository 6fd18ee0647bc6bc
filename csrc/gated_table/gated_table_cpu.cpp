#include <algorithm>
#include <new>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/tickets.h"
#include "gated_table/gated_table.h"
#include "gated_table/gated_table_kernel.h"

namespace padkern {
namespace {

// Work is cut by the shape alone, so the thread count changes no bit.
constexpr int64_t kMinBlockRows = 256;
constexpr int64_t kMaxBlocks = 64;

const GatedTableKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::gated_table_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::gated_table_kernels_f32();
#endif
  (void)isa;
  return baseline::gated_table_kernels_f32();
}

const GatedTableKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::gated_table_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::gated_table_kernels_f64();
#endif
  (void)isa;
  return baseline::gated_table_kernels_f64();
}

Status check(const GatedTableParams& p) {
  if (p.experts < 1 || p.experts > kGatedTableMaxExperts) {
    return error_status("tables must hold 1 to %lld experts, got %lld",
                        shown(kGatedTableMaxExperts), shown(p.experts));
  }
  if (p.rows < 0 || p.bins < 1) return error_status("gated_table: a size is out of range");
  if (p.gate == nullptr || p.widths == nullptr || p.tables == nullptr || p.strides == nullptr ||
      (p.rows > 0 && p.item_bins == nullptr) || (p.d_tables != nullptr && p.d_gate == nullptr)) {
    return error_status("gated_table: a pointer is null");
  }
  for (int64_t e = 0; e < p.experts; ++e) {
    if (p.widths[e] < 0) return error_status("gated_table: a size is out of range");
    if (p.rows == 0 || p.widths[e] == 0) continue;
    if (p.tables[e] == nullptr ||
        (p.d_tables == nullptr ? p.out == nullptr
                               : p.d_tables[e] == nullptr || p.d_out == nullptr)) {
      return error_status("gated_table: a pointer is null");
    }
  }
  return check_ids("item_bins", p.item_bins, p.rows, 0, p.bins - 1);
}

template <class T>
void run(const GatedTableParams& p, const GatedTableKernels<T>& kernels) {
  int64_t width = 0, starts[kGatedTableMaxExperts];
  for (int64_t e = 0; e < p.experts; ++e) {
    starts[e] = width;
    width += p.widths[e];
  }
  const bool gradient = p.d_tables != nullptr;
  const int64_t block_rows = std::max(kMinBlockRows, (p.rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  const int64_t gate_size = p.bins * p.experts;
  std::vector<double> d_gate(gradient ? blocks * gate_size : 0, 0.0);
  const T* gate = static_cast<const T*>(p.gate);
  const double work = 8.0 * static_cast<double>(p.rows) * static_cast<double>(width);
  run_tickets(blocks, useful_workers(work, blocks), [&](int64_t, int64_t block) {
    const int64_t end = std::min(p.rows, (block + 1) * block_rows);
    for (int64_t i = block * block_rows; i < end; ++i) {
      const int64_t first = p.item_bins[i] * p.experts;
      for (int64_t e = 0; e < p.experts; ++e) {
        const T* row = static_cast<const T*>(p.tables[e]) + i * p.strides[e];
        if (!gradient) {
          kernels.scale(row, gate[first + e], p.widths[e],
                        static_cast<T*>(p.out) + i * width + starts[e]);
          continue;
        }
        d_gate[block * gate_size + first + e] += kernels.scale_and_dot(
            static_cast<const T*>(p.d_out) + i * p.d_out_stride + starts[e], row, gate[first + e],
            p.widths[e], static_cast<T*>(p.d_tables[e]) + i * p.widths[e]);
      }
    }
  });
  for (int64_t g = 0; gradient && g < gate_size; ++g) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += d_gate[b * gate_size + g];
    static_cast<T*>(p.d_gate)[g] = static_cast<T>(sum);
  }
}

}  // namespace

Status gated_table_cpu(const GatedTableParams& params) {
  Status status = check(params);
  if (!status.ok) return status;
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  try {
    if (params.dtype == GatedTableDtype::kFloat64) {
      run<double>(params, kernels_of(isa, double()));
    } else {
      run<float>(params, kernels_of(isa, float()));
    }
  } catch (const std::bad_alloc&) {
    return error_status("gated_table: out of memory for %lld rows", shown(params.rows));
  }
  return {};
}

}  // namespace padkern
