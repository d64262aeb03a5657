// The machine, as far as the kernels know it: PTX instructions of sm_90a and host calls of CUDA.
//
// Every function is one instruction or one call, named for what it does; section names are those of
// the PTX ISA. tests/kernels/emulation/hopper.cuh has the same functions in plain C++, so that the
// kernels above run, thread by thread, on a CPU. Nothing else in csrc/ holds assembly.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

// Where the operators are registered; every copy of the package names its own.
#ifndef LIBRARY
#define LIBRARY laser_kernels_cuda
#endif
#define DISPATCH_KEY CUDA

using TensorMap = CUtensorMap;

// ------------------------------------------------------------------ threads, clusters, registers

inline __device__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

inline __device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

inline __device__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

inline __device__ void cluster_sync() {
  __syncwarp();  // .aligned
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// Barriers are numbered from 1; 0 is __syncthreads.
inline __device__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int COUNT>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ------------------------------------------------------------------------------------- mbarrier

inline __device__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

inline __device__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

inline __device__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrive at the same barrier of another CTA of the cluster. Only for what the async proxy has read:
// `.release.cluster`, for writes of this thread, would cost a membar.gpu each time.
inline __device__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrive, and let the phase wait for this many bytes of TMA loads.
inline __device__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Return when the phase of this parity is complete; the phase before the first has parity 1.
inline __device__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t is_complete = 0;
  while (!is_complete) {
    asm volatile(
        "{\n.reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(is_complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// ---------------------------------------------------------------- TMA (cp.async.bulk.tensor)

// Cache policies as `createpolicy` encodes them.
enum class Cache : uint64_t {
  NORMAL = 0x1000000000000000,
  EVICT_FIRST = 0x12F0000000000000,
  EVICT_LAST = 0x14F0000000000000,
};

// Load the map's box at (column, row) into shared memory; its bytes count at the barrier.
inline __device__ void load_box(void* to, const TensorMap& map, int column, int row,
                                uint64_t* barrier, Cache cache) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)),
      "l"(static_cast<uint64_t>(cache))
      : "memory");
}

// The same into the same place of every CTA in `mask`; the bytes count at the barrier of each.
inline __device__ void load_box_multicast(void* to, const TensorMap& map, int column, int row,
                                          uint64_t* barrier, uint16_t mask, Cache cache) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(mask),
      "l"(static_cast<uint64_t>(cache))
      : "memory");
}

// Store a box; what lies outside the tensor is left out.
inline __device__ void store_box(const TensorMap& map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                   &map),
               "r"(column), "r"(row), "r"(shared_address(from))
               : "memory");
}

inline __device__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until the boxes that this thread stored are read, so that shared memory may be overwritten.
inline __device__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Make writes of this thread to shared memory visible to TMA.
inline __device__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---------------------------------------------------------------------------------------- wgmma

inline __device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline __device__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d [64, N] = a [64, 16] b [N, 16]^T, plus d if wanted; a and b by matrix descriptor, both K-major.
template <DType DTYPE, int N>
__device__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool adds);

#define LASER_LIST_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LASER_LIST_32                                                                         \
  LASER_LIST_8 ",%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
               "%27,%28,%29,%30,%31"
#define LASER_LIST_64                                                                          \
  LASER_LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50," \
                "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LASER_LIST_96                                                                          \
  LASER_LIST_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82," \
                "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LASER_D8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LASER_D32(i) LASER_D8(i), LASER_D8(i + 8), LASER_D8(i + 16), LASER_D8(i + 24)
// The three operands after the accumulators: a, b, and whether to add.
#define LASER_WGMMA(DTYPE, NAME, N, LIST, A, B, ADDS, ...)                                        \
  template <>                                                                                     \
  inline __device__ void wgmma<DTYPE, N>(float (&d)[N / 2], uint64_t a, uint64_t b, bool adds) {  \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS                                   \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, " A \
                 ", " B ", adds, 1, 1, 0, 0;\n}"                                                  \
                 : __VA_ARGS__                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                                  \
  }
#define LASER_WGMMA_SIZES(DTYPE, NAME)                                                             \
  LASER_WGMMA(DTYPE, NAME, 16, LASER_LIST_8, "%8", "%9", "%10", LASER_D8(0))                       \
  LASER_WGMMA(DTYPE, NAME, 64, LASER_LIST_32, "%32", "%33", "%34", LASER_D32(0))                   \
  LASER_WGMMA(DTYPE, NAME, 128, LASER_LIST_64, "%64", "%65", "%66", LASER_D32(0), LASER_D32(32))   \
  LASER_WGMMA(DTYPE, NAME, 192, LASER_LIST_96, "%96", "%97", "%98", LASER_D32(0), LASER_D32(32), \
              LASER_D32(64))
LASER_WGMMA_SIZES(DType::bfloat16, "bf16")
LASER_WGMMA_SIZES(DType::float16, "f16")

// ------------------------------------------------------------------------------------ arithmetic

inline __device__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

inline __device__ float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Two floats as 16-bit ones, `low` in the lower half.
template <DType DTYPE>
__device__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (DTYPE == DType::bfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// ------------------------------------------------------------------------------------------ host

// Describe a matrix of 16-bit elements, loaded and stored in boxes of at most 64 columns whose
// 128-byte rows are swizzled in shared memory. The driver's function comes from the runtime:
// linking libcuda would keep the library from loading where there is no driver.
inline TensorMap matrix_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                            int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                              const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess,
                    "impl='cuda' needs an NVIDIA driver of CUDA 12.0 or newer: this one has no "
                    "cuTensorMapEncodeTiled; update the driver or use impl='triton'");
    return reinterpret_cast<Encode>(function);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with code ",
                  static_cast<int>(result), " for a matrix of ", rows, " x ", columns);
  return map;
}

inline int num_multiprocessors(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Makes a device current while it lives.
using torch::stable::accelerator::DeviceGuard;

// Launch on PyTorch's current stream of the device, which is current; `blocks` is a multiple of
// `cluster`.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int device, int blocks, int cluster, int threads,
            int shared_bytes, const Arguments&... arguments) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}
