// H W^T of many rows with a softmax epilogue: what statistics_kernel and dlogits_kernel of
// kernels/laser_kernels/_head_kernels.py compute, for Hopper. Formulas and symbols are theirs.
//
// A cluster of two CTAs, one per multiprocessor, takes tiles of 2 x 128 rows of H and 192 of W:
//
//     producer warp      H tile [128, 64] of its CTA, and half of the W tile [192, 64], which TMA
//                        delivers to both CTAs, into a ring of stages of 40 KB
//     2 consumer groups  in turns: while one runs the epilogue of its tile, the other has the
//                        tensor cores; 192 accumulators a thread, which is why the producer's
//                        group gives registers away
//
// Per step of 64 along D a CTA reads 16 KB of H and 12 KB of W from L2 for 768 clocks of tensor
// cores (2 * 128 * 192 * 64 FLOP at 4096 a clock): 37 bytes a clock, 53 without the cluster; a
// multiprocessor takes at most 64, and all of them together less than 132 times that. The
// epilogue's 192 exponentials a thread are 1536 clocks of the special function units, against 768 D
// / 64 = 43000 of the loop at D = 3584: hidden, as long as the other group has work. A tile of 128
// x 256 would need 256 accumulators a thread. Four stages and two buffers of 24 KB for output, or
// five stages: 208 or 200 KB. Extra memory: the partials, 12 N V / 192 bytes. Rows and columns
// beyond the end are zeros that TMA fills in; it also clips what is stored. All sums have a fixed
// order, whatever N is.
#include "common.cuh"

namespace {

constexpr int CLUSTER = 2;
constexpr int CONSUMERS = 2;
constexpr int BLOCK_N = 128;  // rows a CTA
constexpr int BLOCK_V = 192;
constexpr int CLUSTER_N = CLUSTER * BLOCK_N;
// Tiles of 256 rows that share a stripe of W in the L2 cache.
constexpr int GROUP = 8;
constexpr int THREADS = (1 + CONSUMERS) * WARP_GROUP;
// At launch all threads have 168; then the producer's group gives to the consumers.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARP_GROUP <= 168 * THREADS);
constexpr int HIDDEN_BYTES = BLOCK_N * ROW_BYTES;
constexpr int WEIGHT_BYTES = BLOCK_V * ROW_BYTES;
constexpr int STAGE_BYTES = HIDDEN_BYTES + WEIGHT_BYTES;
// A consumer stages 64 rows of its tile at a time, in boxes of 64 columns.
constexpr int BOX_BYTES = 64 * ROW_BYTES;
constexpr int OUTPUT_BYTES = BLOCK_V / 64 * BOX_BYTES;

enum class Output { none, kept, dlogits };

template <Output OUTPUT>
struct Layout {
  static constexpr int BUFFERS = OUTPUT == Output::none ? 0 : CONSUMERS * OUTPUT_BYTES;
  static constexpr int STAGES = (MAX_SHARED_BYTES - BUFFERS - 256) / STAGE_BYTES;
  static constexpr int BARRIERS = STAGES * STAGE_BYTES + BUFFERS;
  static constexpr int BYTES = BARRIERS + (2 * STAGES + 1) * sizeof(uint64_t);
};

// Vectors [N] of the rows, each null where the output does not need it.
struct Rows {
  const float* inv_temperature;
  const float* anchor;     // base 2, as is log_total
  const float* log_total;
  const float* constant;
  const float* slope;  // or null: 0
  const float* target;
  const int64_t* labels;
  const int32_t* flags;  // [N + 1]: rows to do; at the end 0 for none, 1 for some, 2 for all
  float* partials;       // [N, 3, column blocks]
  Softcap softcap;
};

struct Position {
  int row, column;
};

// First row and column of a cluster's tile: down GROUP row blocks, then to the right.
__device__ Position position(int tile, int N, int V) {
  const int tiles_per_group = GROUP * ceil_div(V, BLOCK_V);
  const int first = tile / tiles_per_group * GROUP;
  const int group_size = min(ceil_div(N, CLUSTER_N) - first, GROUP);
  const int within = tile % tiles_per_group;
  return {(first + within % group_size) * CLUSTER_N, within / group_size * BLOCK_V};
}

// Whether the rows of a cluster's tile are to be done; the same answer for all of its warps.
__device__ bool is_wanted(const int32_t* flags, int row, int N) {
  if (flags == nullptr || flags[N] == 2) return true;
  bool is_flagged = false;
  for (int i = row + threadIdx.x % 32; i < min(row + CLUSTER_N, N); i += 32) {
    is_flagged |= flags[i] > 0;
  }
  return __any_sync(~0u, is_flagged);
}

// One row of a quad of lanes: 48 accumulators a lane, in pairs of columns 8 apart.
template <DType DTYPE, Output OUTPUT>
__device__ void finish_row(const float (&acc)[BLOCK_V / 2], int half, int row, int column,
                           const Rows& rows, uint8_t* buffer, int N, int V) {
  const int lane = threadIdx.x % 32;
  const int source = min(row, N - 1);  // rows beyond the end repeat the last; nothing keeps them
  const float scale = rows.softcap.scale(rows.inv_temperature[source]);
  const int first = column + 2 * (lane % 4);
  const int num_columns = V - first;  // valid ones, counted from this lane's first
  // Within 64 rows, a warp has 16 and a quad the rows lane / 4 and 8 below.
  const int buffer_row = threadIdx.x % WARP_GROUP / 32 * 16 + half * 8 + lane / 4;
  const auto put = [&](int j, uint32_t pair) {
    const int byte = (8 * j + 2 * (lane % 4)) * 2;
    const uint32_t offset = byte / ROW_BYTES * BOX_BYTES +
                            swizzled(buffer_row * ROW_BYTES + byte % ROW_BYTES);
    *reinterpret_cast<uint32_t*>(buffer + offset) = pair;
  };
  if constexpr (OUTPUT == Output::dlogits) {
    const float anchor = rows.anchor[source], log_total = rows.log_total[source];
    const float constant = rows.constant[source];
    const float slope = rows.slope != nullptr ? rows.slope[source] * LN2 : 0;
    const float target = rows.target[source];
    const int label = static_cast<int>(rows.labels[source]) - first;
    const auto put_all = [&](auto is_capped) {
      const auto dlogit = [&](float z, int offset) {
        const float logprob2 = fmaf(z, scale, -anchor) - log_total;
        float other = exp2_approximate(logprob2) * fmaf(slope, logprob2, constant);
        if constexpr (is_capped) other *= fmaf(-z, z, 1.0f);
        return offset == label ? target : other;
      };
#pragma unroll
      for (int j = 0; j < BLOCK_V / 8; ++j) {
        const float* z = acc + 4 * j + 2 * half;
        put(j, pack<DTYPE>(dlogit(z[0], 8 * j), dlogit(z[1], 8 * j + 1)));
      }
    };
    // Two loops: the one for no cap has no instruction of the other.
    if (rows.softcap.value > 0) {
      put_all(std::true_type{});
    } else {
      put_all(std::false_type{});
    }
  } else {
    const float anchor = rows.anchor[source];
    Partial partial;
    const auto shifted = [&](float z, int offset) {
      const float x = offset < num_columns ? fmaf(z, scale, -anchor) : NOTHING;
      partial.add(x);
      return x;
    };
#pragma unroll
    for (int j = 0; j < BLOCK_V / 8; ++j) {
      const float* z = acc + 4 * j + 2 * half;
      const float x0 = shifted(z[0], 8 * j), x1 = shifted(z[1], 8 * j + 1);
      if constexpr (OUTPUT == Output::kept) put(j, kept_bits(x0) | kept_bits(x1) << 16);
    }
    partial.add_lane(1);
    partial.add_lane(2);
    if (row < N && lane % 4 == 0) {
      partial.store(rows.partials, row, column / BLOCK_V, ceil_div(V, BLOCK_V));
    }
  }
}

template <DType DTYPE, Output OUTPUT>
__global__ void __launch_bounds__(THREADS, 1)
    head_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight,
                const __grid_constant__ TensorMap output, const Rows rows, int N, int V, int D) {
  if (rows.flags != nullptr && rows.flags[N] == 0) return;
  using Shared = Layout<OUTPUT>;
  uint8_t* const shared = shared_memory();
  const Ring<Shared::STAGES> ring{reinterpret_cast<uint64_t*>(shared + Shared::BARRIERS)};
  uint64_t* const turn = ring.barriers + 2 * Shared::STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank());
  const int num_steps = ceil_div(D, BLOCK_D);
  const int num_tiles = ceil_div(N, CLUSTER_N) * ceil_div(V, BLOCK_V);
  const int first_tile = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    // A stage is free when the four warps of one group in each CTA have drained it.
    ring.init(CLUSTER * 4);
    barrier_init(turn, 4);
    fence_barrier_init();
  }
  cluster_sync();

  uint32_t done = 0;  // tiles so far
  if (warp < 4) {
    give_registers<PRODUCER_REGISTERS>();
    for (int tile = first_tile; warp == 0 && tile < num_tiles; tile += stride) {
      const Position at = position(tile, N, V);
      if (!is_wanted(rows.flags, at.row, N)) continue;
      if (lane == 0) {
        for (int step = 0; step < num_steps; ++step) {
          const uint32_t use = done * num_steps + step;
          uint8_t* const to = shared + ring.stage(use) * STAGE_BYTES;
          ring.wait_empty(use);
          barrier_arrive_expecting(ring.full(use), STAGE_BYTES);
          load_box(to, hidden, step * BLOCK_D, at.row + rank * BLOCK_N, ring.full(use),
                   Cache::NORMAL);
          const int part = rank * BLOCK_V / CLUSTER;
          load_box_multicast(to + HIDDEN_BYTES + part * ROW_BYTES, weight, step * BLOCK_D,
                             at.column + part, ring.full(use), (1 << CLUSTER) - 1, Cache::NORMAL);
        }
      }
      __syncwarp();
      ++done;
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warp / 4 - 1;
    uint8_t* const buffer = shared + Shared::STAGES * STAGE_BYTES + consumer * OUTPUT_BYTES;
    const bool is_first_thread = threadIdx.x % WARP_GROUP == 0;
    const auto release = [&](uint32_t use) {
      if (lane < CLUSTER) barrier_arrive_at(ring.empty(use), lane);
    };
    for (int tile = first_tile; tile < num_tiles; tile += stride) {
      const Position at = position(tile, N, V);
      if (!is_wanted(rows.flags, at.row, N)) continue;
      if (done++ % CONSUMERS != static_cast<uint32_t>(consumer)) continue;
      // Without turns a group that is two uses of a stage ahead would mistake an old phase for its
      // own: parity tells only neighbours apart. Phase t - 1 of `turn` ends with the loop of tile
      // t - 1, the one before this; that phase t - 2 has ended, this group's last, the barrier
      // makes sure for all of its warps.
      named_barrier(1 + consumer, WARP_GROUP);
      barrier_wait(turn, done & 1);
      float acc[2][BLOCK_V / 2];
      const uint32_t first_use = (done - 1) * num_steps;
      for (int step = 0; step < num_steps; ++step) {
        const uint32_t use = first_use + step;
        ring.wait_full(use);
        const uint32_t stage = shared_address(shared + ring.stage(use) * STAGE_BYTES);
        const uint64_t w = operand(stage + HIDDEN_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BLOCK_D / 16; ++k) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint64_t h = operand(stage + m * 64 * ROW_BYTES);
            wgmma<DTYPE, BLOCK_V>(acc[m], h + k * OPERAND_STEP, w + k * OPERAND_STEP,
                                  step + k > 0);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(use - 1);
      }
      if (lane == 0) barrier_arrive(turn);
      wgmma_wait<0>();
      release(first_use + num_steps - 1);

      if (rows.softcap.value > 0) {
        cap(acc[0], rows.softcap.value);
        cap(acc[1], rows.softcap.value);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if constexpr (OUTPUT != Output::none) {
          if (is_first_thread) store_wait();
          named_barrier(1 + consumer, WARP_GROUP);
        }
        const int row = at.row + rank * BLOCK_N + m * 64;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          __syncwarp();  // else loads for both halves are issued first, and registers run out
          finish_row<DTYPE, OUTPUT>(acc[m], half, row + warp % 4 * 16 + half * 8 + lane / 4,
                                    at.column, rows, buffer, N, V);
        }
        if constexpr (OUTPUT != Output::none) {
          fence_async_proxy();
          named_barrier(1 + consumer, WARP_GROUP);
          if (is_first_thread) {
            for (int box = 0; box < BLOCK_V / 64; ++box) {
              const int column = at.column + box * 64;
              if (row < N && column < V) store_box(output, column, row, buffer + box * BOX_BYTES);
            }
            store_commit();
          }
        }
      }
    }
    if (OUTPUT != Output::none && is_first_thread) store_wait();
  }
  cluster_sync();  // the other CTA may still load into this one, or arrive at its barriers
}

template <DType DTYPE, Output OUTPUT>
void run(const Tensor& hidden_states, const Tensor& weight, const Tensor* output,
         const Rows& rows) {
  const int N = static_cast<int>(hidden_states.size(0)), V = static_cast<int>(weight.size(0));
  const int D = static_cast<int>(weight.size(1)), device = weight.get_device_index();
  const DeviceGuard guard(device);
  const TensorMap hidden = matrix_map(hidden_states.const_data_ptr(), N, D, D, BLOCK_N);
  const TensorMap weights = matrix_map(weight.const_data_ptr(), V, D, D, BLOCK_V / CLUSTER);
  TensorMap outputs{};
  if (output != nullptr) {
    check_output(*output, N, V);
    outputs = matrix_map(output->mutable_data_ptr(), N, V, output->stride(0), 64);
  }
  const int num_tiles = ceil_div(N, CLUSTER_N) * ceil_div(V, BLOCK_V);
  const int blocks = std::min(num_tiles, num_multiprocessors(device) / CLUSTER) * CLUSTER;
  launch(head_kernel<DTYPE, OUTPUT>, device, blocks, CLUSTER, THREADS, Layout<OUTPUT>::BYTES,
         hidden, weights, outputs, rows, N, V, D);
}

template <Output OUTPUT>
void run(const Tensor& hidden_states, const Tensor& weight, const Tensor* output,
         const Rows& rows) {
  const bool is_bfloat16 = weight.scalar_type() == ScalarType::BFloat16;
  (is_bfloat16 ? run<DType::bfloat16, OUTPUT> : run<DType::float16, OUTPUT>)(
      hidden_states, weight, output, rows);
}

void statistics(const Tensor& hidden_states, const Tensor& weight,
                const std::optional<Tensor>& kept, const std::optional<Tensor>& flags,
                const Tensor& anchor, const Tensor& inv_temperature, double softcap,
                const Tensor& partials) {
  check_head(hidden_states, weight);
  const int64_t N = hidden_states.size(0), blocks = ceil_div(weight.size(0), BLOCK_V);
  Rows rows{};
  rows.inv_temperature = floats(inv_temperature, N);
  rows.anchor = floats(anchor, N);
  rows.softcap = Softcap(softcap);
  rows.flags = flags_or_null(flags, N);
  rows.partials = elements<float>(partials, ScalarType::Float, N * 3 * blocks);
  if (kept.has_value()) {
    run<Output::kept>(hidden_states, weight, &kept.value(), rows);
  } else {
    run<Output::none>(hidden_states, weight, nullptr, rows);
  }
}

void dlogits(const Tensor& hidden_states, const Tensor& weight, const Tensor& out,
             const Tensor& labels, const Tensor& inv_temperature, double softcap,
             const Tensor& anchor, const Tensor& log_total, const Tensor& constant,
             const std::optional<Tensor>& slope, const Tensor& target) {
  check_head(hidden_states, weight);
  const int64_t N = hidden_states.size(0);
  Rows rows{};
  rows.inv_temperature = floats(inv_temperature, N);
  rows.softcap = Softcap(softcap);
  rows.anchor = floats(anchor, N);
  rows.log_total = floats(log_total, N);
  rows.constant = floats(constant, N);
  if (slope.has_value()) rows.slope = floats(*slope, N);
  rows.target = floats(target, N);
  rows.labels = elements<const int64_t>(labels, ScalarType::Long, N);
  run<Output::dlogits>(hidden_states, weight, &out, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LIBRARY, library) {
  library.def(
      "statistics(Tensor hidden_states, Tensor weight, Tensor(a!)? kept, Tensor? flags, "
      "Tensor anchor, Tensor inv_temperature, float softcap, Tensor(b!) partials) -> ()");
  library.def(
      "dlogits(Tensor hidden_states, Tensor weight, Tensor(a!) out, Tensor labels, "
      "Tensor inv_temperature, float softcap, Tensor anchor, Tensor log_total, Tensor constant, "
      "Tensor? slope, Tensor target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, DISPATCH_KEY, library) {
  library.impl("statistics", TORCH_BOX(&statistics));
  library.impl("dlogits", TORCH_BOX(&dlogits));
}
