// Clusters of threads on one CPU thread: fibers, a scheduler in random order, what they wait for.
//
// A thread gives way when its condition does not hold and goes on when it does, in warps of random
// speed. TMA transfers under way are closures that the scheduler runs at random moments. When
// neither a thread nor a transfer can go on, the cluster is in a deadlock, which is an error and
// not a hang.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr uint32_t FIRST_ADDRESS = 1024;  // of dynamic shared memory, as on sm_90
constexpr int NUM_MULTIPROCESSORS = 4;

inline int num_launches = 0, shared_bytes = 0;  // so far, and of the last one

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("emulated Hopper: " + message);
}

struct Index {
  unsigned x;
};

// Threads that wait for each other, again and again.
struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Barrier {
  int64_t arrivals = 0, pending = 0, bytes = 0;
  uint64_t phase = 0;

  void update() {
    if (pending == 0 && bytes == 0) ++phase, pending = arrivals;
  }
};

struct Warp {
  Rendezvous meeting;
  float values[2][32];  // of this meeting and of the one before
};

struct Cluster;

struct Cta {
  Cluster* cluster;
  Index block, grid;
  uint32_t rank;
  int num_threads, num_running;
  std::vector<uint8_t> storage;
  uint8_t* memory;
  size_t bytes;
  std::map<uint32_t, Barrier> barriers;  // by address
  std::map<int, Rendezvous> named;
  std::vector<Warp> warps;

  // Bytes at a shared address.
  uint8_t* at(uint32_t address, size_t size) {
    require(address >= FIRST_ADDRESS && address + size <= FIRST_ADDRESS + bytes,
            "access beyond shared memory");
    return memory + (address - FIRST_ADDRESS);
  }
  Barrier& barrier(uint32_t address) {
    require(num_running > 0, "the CTA of an mbarrier has ended");
    require(barriers.count(address), "mbarrier used before its init");
    return barriers[address];
  }
};

struct Thread {
  Index thread;
  Cta* cta;
  std::function<bool()> can_go_on;  // empty: at once
  bool is_done = false, is_fenced = false;
  int stores = 0;
  std::vector<std::vector<std::function<void()>>> groups{{}};  // wgmma; the last one is open
  std::vector<uint8_t> stack = std::vector<uint8_t>(64 * 1024);
  ucontext_t context;
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::function<void()>> transfers;  // TMA under way
  Rendezvous meeting;
  std::function<void()> body;
  std::exception_ptr error;
  ucontext_t scheduler;
  std::minstd_rand random;

  void run();
};

inline thread_local Thread* current = nullptr;

inline void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  current->can_go_on = std::move(condition);
  swapcontext(&current->context, &current->cta->cluster->scheduler);
}

inline void meet(Rendezvous& meeting, int count) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; });
}

inline void enter() {
  Cluster& cluster = *current->cta->cluster;
  try {
    cluster.body();
    require(current->stores == 0, "a thread ended before its stores were read");
  } catch (...) {
    cluster.error = std::current_exception();
  }
  current->is_done = true;
  --current->cta->num_running;
  swapcontext(&current->context, &cluster.scheduler);
}

inline void Cluster::run() {
  for (auto& thread : threads) {
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.data();
    thread->context.uc_stack.ss_size = thread->stack.size();
    makecontext(&thread->context, enter, 0);
  }
  // Of how many rounds a warp takes one: slow warps fall behind by whole tiles.
  std::vector<unsigned> slowness(threads.size() / 32);
  for (unsigned& rounds : slowness) rounds = std::array<unsigned, 3>{1, 4, 100}[random() % 3];
  size_t num_done = 0;
  bool goes_on = true;
  while (num_done < threads.size()) {
    const bool all_take_part = !goes_on;  // if nobody could in the last round
    goes_on = false;
    const size_t first = random() % slowness.size();
    for (size_t i = 0; i < slowness.size(); ++i) {
      const size_t warp = (first + i) % slowness.size();
      if (!all_take_part && random() % slowness[warp] != 0) continue;
      for (size_t lane = 0; lane < 32; ++lane) {
        Thread& thread = *threads[warp * 32 + lane];
        if (thread.is_done || (thread.can_go_on && !thread.can_go_on())) continue;
        thread.can_go_on = nullptr;
        current = &thread;
        swapcontext(&scheduler, &thread.context);
        if (error) std::rethrow_exception(error);
        num_done += thread.is_done;
        goes_on = true;
      }
    }
    if (!transfers.empty() && (!goes_on || random() % 2)) {
      std::swap(transfers[random() % transfers.size()], transfers.back());
      const auto transfer = std::move(transfers.back());
      transfers.pop_back();
      transfer();
      goes_on = true;
    }
    require(goes_on || !all_take_part, "deadlock: every thread waits");
  }
  require(transfers.empty(), "a CTA ended before its TMA transfers");
}

// Run `body` in every thread of a grid, cluster after cluster.
inline void run_grid(int blocks, int cluster_size, int threads, int bytes,
                     const std::function<void()>& body) {
  require(bytes <= 227 * 1024, "more than 227 KB of shared memory");
  require(blocks % cluster_size == 0, "the grid is no multiple of the cluster");
  shared_bytes = bytes;
  ++num_launches;
  for (int block = 0; block < blocks; block += cluster_size) {
    Cluster cluster;
    cluster.random.seed(1000 * num_launches + block);  // every launch has an order of its own
    cluster.body = body;
    for (int rank = 0; rank < cluster_size; ++rank) {
      auto cta = std::make_unique<Cta>();
      cta->cluster = &cluster;
      cta->block = {static_cast<unsigned>(block + rank)};
      cta->grid = {static_cast<unsigned>(blocks)};
      cta->rank = rank;
      cta->num_threads = cta->num_running = threads;
      cta->warps.resize(threads / 32);
      cta->storage.assign(bytes + 1024, 0xFF);  // NaN
      const auto address = reinterpret_cast<uintptr_t>(cta->storage.data());
      cta->memory = cta->storage.data() + (1024 - address % 1024) % 1024;
      cta->bytes = bytes;
      for (int i = 0; i < threads; ++i) {
        auto thread = std::make_unique<Thread>();
        thread->thread = {static_cast<unsigned>(i)};
        thread->cta = cta.get();
        cluster.threads.push_back(std::move(thread));
      }
      cluster.ctas.push_back(std::move(cta));
    }
    cluster.run();
  }
}

}  // namespace emulator
