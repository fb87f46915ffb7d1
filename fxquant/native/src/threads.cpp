// Worker threads, one set for the process. They spin for a moment after a call, then sleep.
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fxq {
namespace {

constexpr int kSpins = 20000;  // some 100 us: the gap between two calls in a loop

struct Job {
  const Step* const* steps;
  size_t count;
  const Call* call;
  int threads;
};

class Pool {
 public:
  std::mutex busy;  // held by the call that uses the workers

  void run(const Job& job) {
    ensure(job.threads - 1);
    job_ = job;
    arrived_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(0, job);
    while (finished_.load(std::memory_order_acquire) != workers_) _mm_pause();
  }

 private:
  void ensure(int workers) {
    for (; workers_ < workers; workers_++) {
      const int index = workers_ + 1;
      const uint64_t seen = generation_.load(std::memory_order_relaxed);
      std::thread([this, index, seen] { loop(index, seen); }).detach();
    }
  }

  void loop(int index, uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (generation_.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          _mm_pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock,
                   [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      }
      seen++;
      const Job job = job_;
      if (index < job.threads) work(index, job);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }

  void work(int index, const Job& job) {
    const Worker worker{index, job.threads};
    for (size_t i = 0; i < job.count; i++) {
      job.steps[i]->run(*job.call, worker);
      meet(static_cast<uint64_t>(i + 1) * job.threads);
    }
  }

  void meet(uint64_t everyone) {
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    int spins = 0;
    while (arrived_.load(std::memory_order_acquire) < everyone) {
      _mm_pause();
      if (++spins % 4096 == 0) std::this_thread::yield();  // more threads than free cores
    }
  }

  Job job_{};
  int workers_ = 0;
  std::atomic<uint64_t> generation_{0}, arrived_{0};
  std::atomic<int> finished_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

Pool* pool = nullptr;
std::mutex making;

Pool* the_pool() {
  std::lock_guard<std::mutex> lock(making);
  if (pool == nullptr) {
    pool = new Pool;  // never deleted: its threads end with the process
    static const int once =
        pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });  // threads do not survive a fork
    (void)once;
  }
  return pool;
}

}  // namespace

void run_steps(const Step* const* steps, size_t count, const Call& call, int threads) {
  if (threads > 1) {
    Pool* workers = the_pool();
    std::unique_lock<std::mutex> lock(workers->busy, std::try_to_lock);
    if (lock.owns_lock()) return workers->run({steps, count, &call, threads});
  }
  const Worker alone{0, 1};
  for (size_t i = 0; i < count; i++) steps[i]->run(call, alone);
}

}  // namespace fxq
