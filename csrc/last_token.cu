// W H^T of few rows with a softmax epilogue: statistics_kernel of
// kernels/laser_kernels/_head_kernels.py for at most 128 rows, the last-token score of a batch.
//
// All cost is the stream of W, so the vocabulary is the M dimension of wgmma and the batch is N, in
// sizes of 16, 64 and 128. A CTA per multiprocessor takes tiles of 256 rows of W:
//
//     producer warp      W tile [256, 64], read once, and H tile [B, 64], which stays in L2, into a
//                        ring that fills shared memory
//     2 consumer groups  128 rows of W each; B accumulators a thread
//
// Bytes in flight: 4 to 6 stages with 32 KB of W each, 128 to 192 KB a multiprocessor; 4.8 TB/s
// over 132 of them at a latency of 1 us need 36 KB. The ring holds 6000 clocks of that stream and
// keeps filling while the consumers run their epilogue, which takes about half of that (estimated:
// 1500 instructions a warp at B = 128). H adds B / 256 to what L2 delivers: 6 TB/s at B = 64. Half
// a round at the end (V = 152064: 594 tiles, 4.5 rounds of 132) costs little, since 66
// multiprocessors can nearly saturate HBM too. From about 165 rows on the tensor cores are the
// limit, and linear_logprob.cu is the better kernel. Extra memory: the partials, 12 B V / 256
// bytes.
//
// The backward has no kernel here. With B = 64 and a 7B head (D 3584, V 152064) it reads W for dH
// and writes dW, 0.23 ms each at 4.8 TB/s, in two library GEMMs; turning the kept logits into
// dlogits moves 2 * 19.5 MB through L2, 9 us at HBM speed. A kernel that writes dW itself could
// save those 9 us of 680, and what the library's GEMM loses against its own stream, not yet
// measured. dH could come from the forward's read of W, as attention with K = V = W, and save 0.23
// ms; but its accumulators [B, D] take a cluster of 8 CTAs that split D and exchange each tile's
// logits through distributed shared memory: a third kernel, the most complicated, for callers that
// cannot do as the trainer does and give the score's rows to linear_logprob_loss.
#include "common.cuh"

namespace {

constexpr int CONSUMERS = 2;
constexpr int BLOCK_V = 256;
constexpr int CONSUMER_V = BLOCK_V / CONSUMERS;
constexpr int CONSUMER_WARPS = CONSUMERS * 4;
constexpr int THREADS = (CONSUMER_WARPS + 1) * 32;
constexpr int WEIGHT_BYTES = BLOCK_V * ROW_BYTES;

template <int BLOCK_B>
struct Layout {
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + BLOCK_B * ROW_BYTES;
  static constexpr int SUM_BYTES = CONSUMER_WARPS * BLOCK_B * sizeof(Partial);
  static constexpr int STAGES = (MAX_SHARED_BYTES - SUM_BYTES - 256) / STAGE_BYTES;
  static constexpr int SUMS = STAGES * STAGE_BYTES;
  static constexpr int BARRIERS = SUMS + SUM_BYTES;
  static constexpr int BYTES = BARRIERS + 2 * STAGES * sizeof(uint64_t);
};

struct Rows {
  const float* inv_temperature;
  const float* anchor;
  const int32_t* flags;  // [B + 1]: rows to do; at the end 0 for none, 1 for some, 2 for all
  float* partials;       // [B, 3, column blocks]
  int16_t* kept;         // [B, stride], or null
  int64_t kept_stride;
  Softcap softcap;
};

// A warp's 32 rows of W times the batch: partial sums for every row of the batch into `sums`
// [BLOCK_B], and the kept logits.
template <int BLOCK_B, bool KEEP>
__device__ void finish_warp(const float (&acc)[2][BLOCK_B / 2], int first_column, const Rows& rows,
                            Partial* sums, int B, int V) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < BLOCK_B / 4; ++i) {
    // This lane's i-th row of the batch: pairs, 8 apart.
    const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
    const bool is_row = row < B;
    const float scale = is_row ? rows.softcap.scale(rows.inv_temperature[row]) : 0.0f;
    const float anchor = is_row ? rows.anchor[row] : 0.0f;
    Partial partial;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = first_column + m * 64 + half * 8 + lane / 4;
        const float z = acc[m][i / 2 * 4 + half * 2 + i % 2];
        const float x = column < V ? fmaf(z, scale, -anchor) : NOTHING;
        partial.add(x);
        if (KEEP && is_row && column < V) {
          rows.kept[row * rows.kept_stride + column] = static_cast<int16_t>(kept_bits(x));
        }
      }
    }
    partial.add_lane(4);
    partial.add_lane(8);
    partial.add_lane(16);
    if (lane < 4) sums[row] = partial;
  }
}

template <DType DTYPE, int BLOCK_B, bool KEEP>
__global__ void __launch_bounds__(THREADS, 1)
    last_token_kernel(const __grid_constant__ TensorMap hidden,
                      const __grid_constant__ TensorMap weight, const Rows rows, int B, int V,
                      int D) {
  if (rows.flags != nullptr && rows.flags[B] == 0) return;
  using Shared = Layout<BLOCK_B>;
  uint8_t* const shared = shared_memory();
  const Ring<Shared::STAGES> ring{reinterpret_cast<uint64_t*>(shared + Shared::BARRIERS)};
  Partial* const sums = reinterpret_cast<Partial*>(shared + Shared::SUMS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_steps = ceil_div(D, BLOCK_D), num_tiles = ceil_div(V, BLOCK_V);
  if (threadIdx.x == 0) {
    ring.init(CONSUMER_WARPS);
    fence_barrier_init();
  }
  __syncthreads();

  uint32_t use = 0;
  if (warp == CONSUMER_WARPS) {
    if (lane > 0) return;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      for (int step = 0; step < num_steps; ++step, ++use) {
        uint8_t* const to = shared + ring.stage(use) * Shared::STAGE_BYTES;
        ring.wait_empty(use);
        barrier_arrive_expecting(ring.full(use), Shared::STAGE_BYTES);
        load_box(to, weight, step * BLOCK_D, tile * BLOCK_V, ring.full(use), Cache::EVICT_FIRST);
        load_box(to + WEIGHT_BYTES, hidden, step * BLOCK_D, 0, ring.full(use), Cache::EVICT_LAST);
      }
    }
    return;
  }
  const int first_row = warp / 4 * CONSUMER_V;  // of the W tile, for this group
  const auto release = [&](uint32_t drained) {
    if (lane == 0) barrier_arrive(ring.empty(drained));
  };
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    float acc[2][BLOCK_B / 2];
    for (int step = 0; step < num_steps; ++step, ++use) {
      ring.wait_full(use);
      const uint32_t stage =
          shared_address(shared + ring.stage(use) * Shared::STAGE_BYTES);
      const uint64_t h = operand(stage + WEIGHT_BYTES);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BLOCK_D / 16; ++k) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint64_t w = operand(stage + (first_row + m * 64) * ROW_BYTES);
          wgmma<DTYPE, BLOCK_B>(acc[m], w + k * OPERAND_STEP, h + k * OPERAND_STEP, step + k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(use - 1);
    }
    wgmma_wait<0>();
    release(use - 1);

    if (rows.softcap.value > 0) {
      cap(acc[0], rows.softcap.value);
      cap(acc[1], rows.softcap.value);
    }
    const int first_column = tile * BLOCK_V + first_row + warp % 4 * 16;
    finish_warp<BLOCK_B, KEEP>(acc, first_column, rows, sums + warp * BLOCK_B, B, V);
    named_barrier(1, CONSUMER_WARPS * 32);
    if (static_cast<int>(threadIdx.x) < min(BLOCK_B, B)) {
      Partial partial;
      for (int i = 0; i < CONSUMER_WARPS; ++i) partial.add(sums[i * BLOCK_B + threadIdx.x]);
      partial.store(rows.partials, threadIdx.x, tile, num_tiles);
    }
    named_barrier(1, CONSUMER_WARPS * 32);  // before the next tile's sums replace these
  }
}

template <DType DTYPE, int BLOCK_B>
void run(const Tensor& hidden_states, const Tensor& weight, const Rows& rows) {
  const int B = static_cast<int>(hidden_states.size(0)), V = static_cast<int>(weight.size(0));
  const int D = static_cast<int>(weight.size(1)), device = weight.get_device_index();
  const DeviceGuard guard(device);
  const TensorMap hidden = matrix_map(hidden_states.const_data_ptr(), B, D, D, BLOCK_B);
  const TensorMap weights = matrix_map(weight.const_data_ptr(), V, D, D, BLOCK_V);
  const auto kernel = rows.kept != nullptr ? last_token_kernel<DTYPE, BLOCK_B, true>
                                           : last_token_kernel<DTYPE, BLOCK_B, false>;
  const int blocks = std::min(ceil_div(V, BLOCK_V), num_multiprocessors(device));
  launch(kernel, device, blocks, 1, THREADS, Layout<BLOCK_B>::BYTES, hidden, weights, rows, B, V,
         D);
}

template <DType DTYPE>
void run(const Tensor& hidden_states, const Tensor& weight, const Rows& rows) {
  const int64_t B = hidden_states.size(0);
  STD_TORCH_CHECK(B <= 128, "statistics_few expected at most 128 rows, got ", B);
  (B <= 16 ? run<DTYPE, 16> : B <= 64 ? run<DTYPE, 64> : run<DTYPE, 128>)(hidden_states, weight,
                                                                         rows);
}

void statistics_few(const Tensor& hidden_states, const Tensor& weight,
                    const std::optional<Tensor>& kept, const std::optional<Tensor>& flags,
                    const Tensor& anchor, const Tensor& inv_temperature, double softcap,
                    const Tensor& partials) {
  check_head(hidden_states, weight);
  const int64_t B = hidden_states.size(0), V = weight.size(0);
  Rows rows{};
  rows.inv_temperature = floats(inv_temperature, B);
  rows.anchor = floats(anchor, B);
  rows.softcap = Softcap(softcap);
  rows.flags = flags_or_null(flags, B);
  rows.partials = elements<float>(partials, ScalarType::Float, B * 3 * ceil_div(V, BLOCK_V));
  if (kept.has_value()) {
    check_output(kept.value(), B, V);
    rows.kept = static_cast<int16_t*>(kept.value().mutable_data_ptr());
    rows.kept_stride = kept.value().stride(0);
  }
  const bool is_bfloat16 = weight.scalar_type() == ScalarType::BFloat16;
  (is_bfloat16 ? run<DType::bfloat16> : run<DType::float16>)(hidden_states, weight, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LIBRARY, library) {
  library.def(
      "statistics_few(Tensor hidden_states, Tensor weight, Tensor(a!)? kept, Tensor? flags, "
      "Tensor anchor, Tensor inv_temperature, float softcap, Tensor(b!) partials) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, DISPATCH_KEY, library) {
  library.impl("statistics_few", TORCH_BOX(&statistics_few));
}
