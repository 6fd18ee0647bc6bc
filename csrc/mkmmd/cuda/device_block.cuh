// A thread block on the device. The kernel bodies are templates over this interface; the tests give
// them one that emulates all threads of a block on the host.
//
// each(f) calls f(thread, slot) for the threads that this copy of the code stands for: here for the
// one that runs it, with slot 0. Reg<T> is a register: indexed by slot. What works on whole warps
// (mma, load_blocks, warp_sum, warp_largest) takes the registers of all slots, outside each().
#pragma once

#include "mkmmd/cuda/tiling.cuh"

namespace padkern {
namespace cuda {

struct Words4 {
  uint32_t x[4];
};
struct Floats4 {
  float x[4];
};

#if defined(__CUDACC__)

extern __shared__ __align__(16) unsigned char padkern_shared_memory[];

template <int THREADS>
struct DeviceBlock {
  static constexpr int kBlockThreads = THREADS;
  static constexpr int kSlots = 1;
  template <class T>
  using Reg = T[kSlots];

  PADKERN_DEVICE int64_t index_x() const { return blockIdx.x; }
  PADKERN_DEVICE int64_t index_y() const { return blockIdx.y; }
  PADKERN_DEVICE int64_t count_x() const { return gridDim.x; }
  PADKERN_DEVICE unsigned char* shared() const { return padkern_shared_memory; }

  template <class F>
  PADKERN_DEVICE void each(const F& f) const {
    f(static_cast<int>(threadIdx.x), 0);
  }
  PADKERN_DEVICE void sync() const { __syncthreads(); }

  // Asynchronous copy of 16 bytes to shared memory; complete after commit(), wait<n>(), sync().
  PADKERN_DEVICE void copy16(void* shared, const void* global) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(shared)), "l"(global)
                 : "memory");
  }
  PADKERN_DEVICE void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until at most PENDING of the committed groups are under way.
  template <int PENDING>
  PADKERN_DEVICE void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  }

  // ldmatrix.x4 from where(thread); with TRANSPOSE each 8 x 8 matrix is transposed.
  template <bool TRANSPOSE, class F>
  PADKERN_DEVICE void load_blocks(Words4 (&out)[kSlots], const F& where) const {
    uint32_t* x = out[0].x;
    const uint32_t from = address(where(static_cast<int>(threadIdx.x)));
    if (TRANSPOSE) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(from)
                   : "memory");
    }
  }

  // sum += left right, 16 x 8 x 16 per warp; the right operand is words 2 half, 2 half + 1.
  PADKERN_DEVICE void mma(Floats4 (&sum)[kSlots], const Words4 (&left)[kSlots],
                          const Words4 (&right)[kSlots], int half) const {
    float* c = sum[0].x;
    const uint32_t* a = left[0].x;
    const uint32_t* b = right[0].x + 2 * half;
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  // Largest value of the warp, in every lane.
  PADKERN_DEVICE void warp_largest(float (&value)[kSlots]) const {
    PADKERN_UNROLL
    for (int step = 16; step > 0; step >>= 1) {
      value[0] = fmaxf(value[0], __shfl_xor_sync(0xffffffffu, value[0], step));
    }
  }

  // Sum over the warp, in every lane, always in the same order.
  template <class T>
  PADKERN_DEVICE void warp_sum(T (&value)[kSlots]) const {
    PADKERN_UNROLL
    for (int step = 16; step > 0; step >>= 1) {
      value[0] += __shfl_xor_sync(0xffffffffu, value[0], step);
    }
  }

 private:
  static PADKERN_DEVICE uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
};

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace padkern
