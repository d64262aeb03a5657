// What the kernels share: layouts in shared memory, the ring of stages, checks of tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>

enum class DType { bfloat16, float16 };

#include "hopper.cuh"

// ------------------------------------------------------------------------------ shared memory

// Elements of D a stage: 128 bytes, the span of the swizzle.
constexpr int BLOCK_D = 64;
constexpr int ROW_BYTES = 128;
constexpr int WARP_GROUP = 128;
// What one CTA may have: 227 KB.
constexpr int MAX_SHARED_BYTES = 227 * 1024;

// Where TMA puts byte `offset` of a box of 128-byte rows: 16-byte units permuted by the row.
inline __device__ uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 3 & 0x70); }

// Descriptor of a K-major operand of wgmma whose 128-byte rows are swizzled: groups of 8 rows are
// 1024 bytes apart. The next 16 elements of K are 32 bytes, hence 2, further.
inline __device__ uint64_t operand(uint32_t address) {
  constexpr uint64_t SWIZZLE_128B = 1;
  return SWIZZLE_128B << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
         (address & 0x3FFFF) >> 4;
}
constexpr int OPERAND_STEP = 16 * 2 >> 4;

// Stages that TMA fills and warps drain, in the same order on both sides. Use u of the ring is
// stage u % STAGES, and its u / STAGES-th filling. Barriers: STAGES full ones, then STAGES empty.
template <int STAGES>
struct Ring {
  uint64_t* barriers;

  __device__ static int stage(uint32_t use) { return use % STAGES; }
  __device__ uint64_t* full(uint32_t use) const { return barriers + stage(use); }
  __device__ uint64_t* empty(uint32_t use) const { return barriers + STAGES + stage(use); }
  __device__ void init(int consumers) const {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), consumers);
    }
  }
  __device__ void wait_full(uint32_t use) const { barrier_wait(full(use), use / STAGES & 1); }
  // The first filling waits for the phase before the first, which is complete.
  __device__ void wait_empty(uint32_t use) const {
    barrier_wait(empty(use), (use / STAGES & 1) ^ 1);
  }
};

// ----------------------------------------------------------------------------------- softmax

constexpr float LN2 = 0.6931471805599453f;
constexpr float LOG2E = 1.4426950408889634f;
// A finite stand-in for -inf beyond V: 2^x is 0, and so is x 2^x.
constexpr float NOTHING = -1e30f;

// Sums over a piece of a row: of 2^x and x 2^x, and the largest x.
struct Partial {
  float total = 0, weighted = 0, highest = -INFINITY;

  __device__ void add(float x) {
    const float exp = exp2_approximate(x);
    total += exp;
    weighted = fmaf(exp, x, weighted);
    highest = fmaxf(highest, x);
  }
  __device__ void add(const Partial& other) {
    total += other.total;
    weighted += other.weighted;
    highest = fmaxf(highest, other.highest);
  }
  // Add what the lane has whose number differs by `bit`; both get the same sum.
  __device__ void add_lane(int bit) {
    add({__shfl_xor_sync(~0u, total, bit), __shfl_xor_sync(~0u, weighted, bit),
         __shfl_xor_sync(~0u, highest, bit)});
  }
  // partials is [N, 3, blocks].
  __device__ void store(float* partials, int row, int block, int num_blocks) const {
    float* to = partials + static_cast<int64_t>(row) * 3 * num_blocks + block;
    to[0] = total;
    to[num_blocks] = weighted;
    to[2 * num_blocks] = highest;
  }
};

// x in steps of 2^-9 in the low 16 bits: adding 1.5 2^23 rounds to an integer and leaves it there.
inline __device__ uint32_t kept_bits(float x) {
  const float steps = fminf(fmaxf(x * 512.0f, -32768.0f), 32767.0f) + 12582912.0f;
  return __float_as_uint(steps) & 0xFFFF;
}

// Replace logits by t = tanh(z / C) = 1 - 2 / (e^2u + 1), and by a series near u = 0, where that
// cancels; `Softcap::scale` has the factor C. About 14 instructions and two special functions for
// each: callers branch around it, and a head without a cap pays for one branch of a tile.
template <int COUNT>
__device__ void cap(float (&logits)[COUNT], float softcap) {
  const float inverse = 1 / softcap;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float u = logits[i] * inverse, s = u * u;
    const float series =
        u * (1 - s * (1.0f / 3 - s * (2.0f / 15 - s * (17.0f / 315 - s * (62.0f / 2835)))));
    const float tanh = 1 - 2 * reciprocal_approximate(exp2_approximate(u * (2 * LOG2E)) + 1);
    logits[i] = s < 0.0625f ? series : tanh;
  }
}

// The softcap, 0 for none, and what `Softcap::scale` multiplies a logit or its t with to temper it
// in base 2, rounded in the order of `cap` in _head_kernels.py, from which the anchor comes. The
// factor is 1 without a cap: a condition there would make a second epilogue, and spills at B = 128.
struct Softcap {
  float value = 0, factor = 1;

  Softcap() = default;
  explicit Softcap(double cap)
      : value(static_cast<float>(cap)), factor(cap > 0 ? static_cast<float>(cap) : 1) {}
  __device__ float scale(float inv_temperature) const {
    return inv_temperature * LOG2E * factor;
  }
};

// ------------------------------------------------------------------------------------ checks

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// H [N, D] and W [V, D], as TMA needs them.
inline void check_head(const Tensor& hidden_states, const Tensor& weight) {
  for (const Tensor& x : {hidden_states, weight}) {
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == weight.scalar_type() &&
                        (x.scalar_type() == ScalarType::BFloat16 ||
                         x.scalar_type() == ScalarType::Half),
                    "impl='cuda' expected two contiguous matrices, both bfloat16 or both float16");
    STD_TORCH_CHECK(x.size(1) == weight.size(1) && x.size(1) % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                    "impl='cuda' loads by TMA, which expected 16-byte aligned rows of a multiple "
                    "of 8 elements, got rows of ",
                    x.size(1), " at ", x.const_data_ptr(), "; use impl='triton'");
  }
  STD_TORCH_CHECK(hidden_states.size(0) > 0, "expected at least one row");
}

// A contiguous vector or block of `count` elements; returns its memory.
template <typename T>
T* elements(const Tensor& x, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == type && x.numel() == count,
                  "expected ", count, " contiguous elements, got ", x.numel());
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(x.const_data_ptr());
  } else {
    return static_cast<T*>(x.mutable_data_ptr());
  }
}

// Flags [N + 1], or null for all rows.
inline const int32_t* flags_or_null(const std::optional<Tensor>& flags, int64_t N) {
  return flags.has_value() ? elements<const int32_t>(*flags, ScalarType::Int, N + 1) : nullptr;
}

inline const float* floats(const Tensor& x, int64_t count) {
  return elements<const float>(x, ScalarType::Float, count);
}

// A matrix of 16-bit elements that is written, its rows 16-byte aligned.
inline void check_output(const Tensor& out, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns &&
                      out.element_size() == 2 && out.stride(1) == 1 && out.stride(0) % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) % 16 == 0,
                  "expected an output [", rows, ", ", columns, "] of 2 bytes an element with rows ",
                  "padded to 16 bytes");
}

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
