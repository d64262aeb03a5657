// csrc/hopper.cuh in plain C++: the device code of csrc/ runs on a CPU, every thread of it.
//
// Written from the PTX ISA (9.0) and the CUDA driver API, not from what the kernels expect:
//
//     mbarrier                  "Parallel Synchronization and Communication Instructions:
//                               mbarrier": phases, pending arrivals, tx-count
//     load_box, store_box       "Data Movement: Tensor: Tiled Mode", "Swizzling Modes" (128B), zero
//                               fill and clipping out of bounds; cuTensorMapEncodeTiled's limits
//     wgmma                     "Asynchronous Warpgroup Level Matrix Instructions": "Matrix
//                               Descriptor Format", "Strides", "Canonical Layouts" (K-major, 128B),
//                               "Register Fragments" of D for m64nNk16
//     named and cluster barriers, shuffles, votes
//
// and the arithmetic of wgmma, which NVIDIA does not document, from measurements of it: Fasi et al.,
// PeerJ CS 330 (truncation, V100 to A100); Khattak and Mikaitis, arXiv 2512.07004 (H100 and B200);
// Xie et al., arXiv 2511.10909, whose model of Hopper's mma and wgmma agrees with it bit for bit.
//
// A cluster's threads are fibers in a random order (emulator.h). What the hardware does
// asynchronously happens here as late as it may: TMA at a random moment, a wgmma when it is waited
// for. So a stage that is released early, read before its barrier, or awaited in the wrong phase
// gives wrong numbers or a deadlock. Shared memory starts as NaN. Clusters run one after the other.
//
// It cannot show: speed, races of the memory model (everything is sequentially consistent), missing
// proxy fences, divergence within a warp at `.aligned` instructions, descriptor bits beyond
// address, stride and swizzle mode, disagreement of the warps of a group, and register limits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator.h"

#ifndef LIBRARY
#define LIBRARY laser_kernels_emulated
#endif
#define DISPATCH_KEY CPU
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->cta->block)
#define gridDim (emulator::current->cta->grid)

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

namespace emulator {

template <DType DTYPE>
float value(uint16_t bits) {
  if constexpr (DTYPE == DType::bfloat16) return c10::BFloat16(bits, c10::BFloat16::from_bits());
  return c10::Half(bits, c10::Half::from_bits());
}

// Swizzle 128B: bits 4 to 6 of the address, the 16-byte unit, are XORed with bits 7 to 9.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Row i of a K-major matrix [rows, 16], a row of A or a column of B, and its exponents.
struct MatrixRow {
  double values[16];
  int exponents[16];
};

// Of the leading bit, not below `lowest`; of 0 the lowest of float32.
inline int exponent(float x, int lowest) {
  return x == 0 ? -126 : std::max(static_cast<int>(__float_as_uint(x) >> 23 & 0xFF) - 127, lowest);
}

template <DType DTYPE>
MatrixRow matrix_row(uint64_t descriptor, int i) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  require(descriptor >> 62 == 1, "only the 128-byte swizzle is known");
  require((descriptor >> 49 & 7) == 0 && (start >> 7 & 7) == 0, "base offset is not 0");
  constexpr int LOWEST = DTYPE == DType::bfloat16 ? -126 : -14;
  MatrixRow row;
  for (int k = 0; k < 16; k += 8) {
    uint16_t unit[8];
    const uint32_t address = swizzle(start + i / 8 * stride + i % 8 * 128 + k * 2);
    std::memcpy(unit, current->cta->at(address, 16), 16);
    for (int j = 0; j < 8; ++j) {
      const float x = value<DTYPE>(unit[j]);
      row.values[k + j] = x;
      row.exponents[k + j] = exponent(x, LOWEST);
    }
  }
  return row;
}

// A tensor core's sum + <a, b>: sum and products are aligned to the largest exponent among them
// and truncated to 25 bits below it, added exactly, and truncated again to float32.
inline float fused_dot(float sum, const MatrixRow& a, const MatrixRow& b) {
  constexpr int FRACTION_BITS = 25;
  int highest = exponent(sum, -126);
  double plain = sum;
  for (int k = 0; k < 16; ++k) {
    highest = std::max(highest, a.exponents[k] + b.exponents[k]);
    plain += a.values[k] * b.values[k];
  }
  if (!std::isfinite(plain)) return plain;
  const double unit = std::ldexp(1.0, highest - FRACTION_BITS), scale = 1 / unit;
  double steps = static_cast<int>(sum * scale);
  for (int k = 0; k < 16; ++k) steps += static_cast<int>(a.values[k] * b.values[k] * scale);
  const float result = steps * unit;
  return std::abs(result) > std::abs(steps * unit) ? std::nextafter(result, 0.0f) : result;
}

}  // namespace emulator

// ------------------------------------------------------------------------- CUDA's own functions

using std::min;
inline void __syncthreads() {
  emulator::Cta& cta = *emulator::current->cta;
  emulator::meet(cta.named[0], cta.num_threads);
}
inline emulator::Warp& this_warp() {
  return emulator::current->cta->warps[threadIdx.x / 32];
}
inline void __syncwarp() { emulator::meet(this_warp().meeting, 32); }
inline const float* exchanged(float mine) {
  emulator::Warp& warp = this_warp();
  float* values = warp.values[warp.meeting.generation % 2];
  values[threadIdx.x % 32] = mine;
  emulator::meet(warp.meeting, 32);
  return values;
}
inline float __shfl_xor_sync(unsigned, float mine, int bit) {
  return exchanged(mine)[(threadIdx.x % 32) ^ bit];
}
inline bool __any_sync(unsigned, bool mine) {
  const float* values = exchanged(mine);
  return std::any_of(values, values + 32, [](float x) { return x != 0; });
}

// --------------------------------------------------------------- threads, clusters, registers

inline uint8_t* shared_memory() { return emulator::current->cta->memory; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - shared_memory() + emulator::FIRST_ADDRESS;
}
inline uint32_t cluster_rank() { return emulator::current->cta->rank; }
inline void cluster_sync() {
  __syncwarp();
  emulator::Cluster& cluster = *emulator::current->cta->cluster;
  emulator::meet(cluster.meeting, cluster.threads.size());
}
inline void named_barrier(int number, int threads) {
  emulator::require(number > 0 && number < 16, "named barriers are 1 to 15");
  emulator::meet(emulator::current->cta->named[number], threads);
}
template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}

// ------------------------------------------------------------------------------------ mbarrier

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  emulator::current->cta->barriers[shared_address(barrier)] = {arrivals, arrivals, 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  auto& cluster = *emulator::current->cta->cluster;
  emulator::Barrier& state = cluster.ctas.at(rank)->barrier(shared_address(barrier));
  emulator::require(state.pending > 0, "more arrivals than the mbarrier expects");
  --state.pending;
  state.update();
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive_at(barrier, cluster_rank()); }
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulator::current->cta->barrier(shared_address(barrier)).bytes += bytes;
  barrier_arrive(barrier);
}
// True for the phase before the running one, false for the running one: parity knows no others.
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const emulator::Barrier& state = emulator::current->cta->barrier(shared_address(barrier));
  emulator::wait_until([&state, parity] { return state.phase % 2 != parity; });
}

// ----------------------------------------------------------------------------------------- TMA

struct TensorMap {
  uint8_t* data;
  int64_t rows, columns, stride;
  int box_rows;
};

enum class Cache { NORMAL, EVICT_FIRST, EVICT_LAST };

namespace emulator {

// Call for every element of a box: its place in shared memory, and in the matrix or nullptr.
template <typename Function>
void for_box(const TensorMap& map, int column, int row, uint32_t address, Function function) {
  for (int i = 0; i < map.box_rows; ++i) {
    for (int j = 0; j < 64; ++j) {
      const int64_t r = row + i, c = column + j;
      const bool is_inside = r >= 0 && r < map.rows && c >= 0 && c < map.columns;
      function(swizzle(address + i * 128 + j * 2),
               is_inside ? map.data + (r * map.stride + c) * 2 : nullptr);
    }
  }
}

}  // namespace emulator

inline void load_box_multicast(void* to, const TensorMap& map, int column, int row,
                               uint64_t* barrier, uint16_t mask, Cache) {
  const uint32_t address = shared_address(to), barrier_address = shared_address(barrier);
  emulator::require(address % 128 == 0, "a box's place in shared memory is not aligned");
  emulator::Cluster& cluster = *emulator::current->cta->cluster;
  for (auto& cta : cluster.ctas) {
    if (!(mask >> cta->rank & 1)) continue;
    cluster.transfers.push_back([=, destination = cta.get()] {
      emulator::for_box(map, column, row, address, [&](uint32_t place, const uint8_t* element) {
        uint8_t* const here = destination->at(place, 2);
        element != nullptr ? std::memcpy(here, element, 2) : std::memset(here, 0, 2);
      });
      emulator::Barrier& state = destination->barrier(barrier_address);
      state.bytes -= map.box_rows * 128;
      state.update();
    });
  }
}
inline void load_box(void* to, const TensorMap& map, int column, int row, uint64_t* barrier,
                     Cache cache) {
  load_box_multicast(to, map, column, row, barrier, 1 << cluster_rank(), cache);
}
inline void store_box(const TensorMap& map, int column, int row, const void* from) {
  emulator::Thread* const thread = emulator::current;
  const uint32_t address = shared_address(from);
  emulator::require(address % 128 == 0, "a box's place in shared memory is not aligned");
  ++thread->stores;
  thread->cta->cluster->transfers.push_back([=] {
    emulator::for_box(map, column, row, address, [&](uint32_t place, uint8_t* element) {
      if (element != nullptr) std::memcpy(element, thread->cta->at(place, 2), 2);
    });
    --thread->stores;
  });
}
inline void store_commit() {}
inline void store_wait() {
  emulator::wait_until([thread = emulator::current] { return thread->stores == 0; });
}
inline void fence_async_proxy() {}

// --------------------------------------------------------------------------------------- wgmma

// `.sync`: a thread waits until all threads of its warp execute the same instruction.
inline void wgmma_fence() {
  __syncwarp();
  emulator::current->is_fenced = true;
}
inline void wgmma_commit() {
  __syncwarp();
  emulator::current->groups.emplace_back();
}

template <int PENDING>
void wgmma_wait() {
  __syncwarp();
  auto& groups = emulator::current->groups;
  emulator::require(groups.back().empty(), "wgmma waited for but not committed");
  while (groups.size() > PENDING + 1) {
    for (const auto& compute : groups.front()) compute();
    groups.erase(groups.begin());
  }
  __syncwarp();  // what one lane releases now, all lanes have read
  emulator::current->is_fenced = false;
}

template <DType DTYPE, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool adds) {
  static_assert(N % 8 == 0 && N <= 256);
  emulator::require(emulator::current->is_fenced, "wgmma without wgmma.fence");
  emulator::current->groups.back().push_back([&d, a, b, adds] {
    const int thread = threadIdx.x % 128, first = thread / 32 * 16 + thread % 32 / 4;
    const auto upper = emulator::matrix_row<DTYPE>(a, first);
    const auto lower = emulator::matrix_row<DTYPE>(a, first + 8);
    for (int pair = 0; pair < N / 4; ++pair) {
      const int column = pair / 2 * 8 + thread % 4 * 2 + pair % 2;
      const auto other = emulator::matrix_row<DTYPE>(b, column);
      for (const auto* row : {&upper, &lower}) {
        float& sum = d[pair / 2 * 4 + (row == &lower) * 2 + pair % 2];
        sum = emulator::fused_dot(adds ? sum : 0, *row, other);
      }
    }
  });
}

// ---------------------------------------------------------------------------------- arithmetic

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1 / x; }

template <DType DTYPE>
uint32_t pack(float low, float high) {
  if constexpr (DTYPE == DType::bfloat16) return c10::BFloat16(low).x | c10::BFloat16(high).x << 16;
  return c10::Half(low).x | c10::Half(high).x << 16;
}

// ---------------------------------------------------------------------------------------- host

// The tensors lie on the device that PyTorch calls -1, while 0 is current until a guard says
// otherwise.
inline int current_device = 0;

struct DeviceGuard {
  const int before = current_device;
  explicit DeviceGuard(int device) { current_device = device; }
  ~DeviceGuard() { current_device = before; }
};

inline TensorMap matrix_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                            int box_rows) {
  emulator::require(reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % 8 == 0,
                    "a matrix's address and row stride are multiples of 16 bytes");
  emulator::require(current_device != 0, "a tensor map is made while another device is current");
  emulator::require(box_rows > 0 && box_rows <= 256, "a box has 1 to 256 rows");
  emulator::require(rows > 0 && columns > 0 && row_stride >= columns, "a matrix is not empty");
  auto* const memory = static_cast<uint8_t*>(const_cast<void*>(data));
  return {memory, rows, columns, row_stride, box_rows};
}

inline int num_multiprocessors(int) { return emulator::NUM_MULTIPROCESSORS; }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int device, int blocks, int cluster_size, int threads,
            int shared_bytes, const Arguments&... arguments) {
  emulator::require(current_device == device, "a launch while another device is current");
  emulator::run_grid(blocks, cluster_size, threads, shared_bytes, [&] { kernel(arguments...); });
}

// For ctypes.
extern "C" __attribute__((used)) inline int shared_bytes_of_last_launch() {
  return emulator::shared_bytes;
}
