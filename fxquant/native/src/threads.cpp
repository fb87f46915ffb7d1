// Worker threads, one set for the process. They spin for a moment after a call, then sleep.
#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fxq {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kAwake{100};  // the gap between two calls in a loop
constexpr int kPauses = 200;                      // some microseconds

// Waiting for another thread: the core is left to others soon, as that thread may need it.
class Wait {
 public:
  void once() {
    if (pauses_ < kPauses) {
      pauses_++;
      _mm_pause();
    } else {
      std::this_thread::yield();
    }
  }

 private:
  int pauses_ = 0;
};

struct Job {
  const Step* const* steps;
  size_t count;
  const Call* call;
  int threads;
  uint64_t arrived;  // how many arrivals were counted before this job
};

// Where one worker waits for its next job, and nobody else: who takes no part is not disturbed.
struct alignas(64) Seat {
  std::atomic<uint64_t> ticket{0};  // how many jobs this worker was called to
  std::mutex mutex;
  std::condition_variable wake;

  void invite() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ticket.fetch_add(1, std::memory_order_release);
    }
    wake.notify_one();
  }

  void await(uint64_t seen) {
    const auto invited = [&] { return ticket.load(std::memory_order_acquire) != seen; };
    const auto end = Clock::now() + kAwake;
    for (Wait wait; Clock::now() < end; wait.once()) {
      if (invited()) return;
    }
    std::unique_lock<std::mutex> lock(mutex);
    wake.wait(lock, invited);
  }
};

class Pool {
 public:
  std::mutex busy;  // held by the call that uses the workers

  // All threads have arrived behind the last step when it returns, so that nobody reads `job_`, or
  // what it points to, any more.
  void run(Job job) {
    job.threads = 1 + ensure(job.threads - 1);
    job.arrived = arrived_.load(std::memory_order_relaxed);
    job_ = job;
    for (int i = 0; i < job.threads - 1; i++) seats_[i]->invite();
    work(0, job);
  }

 private:
  // How many workers there are for a job that would like `wanted`: the system may refuse threads.
  int ensure(int wanted) {
    while (static_cast<int>(seats_.size()) < wanted) {
      seats_.push_back(std::make_unique<Seat>());
      const int index = static_cast<int>(seats_.size());
      try {
        std::thread([this, index, seat = seats_.back().get()] { loop(index, *seat); }).detach();
      } catch (const std::system_error&) {
        seats_.pop_back();
        break;
      }
    }
    return std::min(wanted, static_cast<int>(seats_.size()));
  }

  void loop(int index, Seat& seat) {
    for (uint64_t seen = 0;; seen++) {
      seat.await(seen);
      const Job job = job_;
      work(index, job);
    }
  }

  void work(int index, const Job& job) {
    const Worker worker{index, job.threads};
    for (size_t i = 0; i < job.count; i++) {
      job.steps[i]->run(*job.call, worker);
      meet(job.arrived + static_cast<uint64_t>(i + 1) * job.threads);
    }
  }

  void meet(uint64_t everyone) {
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    for (Wait wait; arrived_.load(std::memory_order_acquire) < everyone;) wait.once();
  }

  Job job_{};
  std::vector<std::unique_ptr<Seat>> seats_;  // of worker 1, 2, ...; for who holds `busy`
  alignas(64) std::atomic<uint64_t> arrived_{0};
};

Pool* pool = nullptr;
std::mutex making;

Pool* the_pool() {
  // Threads do not survive a fork, and nobody may hold the lock in it.
  static const int once = pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                                         [] {
                                           pool = nullptr;
                                           making.unlock();
                                         });
  (void)once;
  std::lock_guard<std::mutex> lock(making);
  if (pool == nullptr) pool = new Pool;  // never deleted: its threads end with the process
  return pool;
}

// How many processors the caller may run on, and so the workers that it starts.
int processors() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return CPU_SETSIZE;  // more than it holds
  return CPU_COUNT(&allowed);
}

}  // namespace

void run_steps(const Step* const* steps, size_t count, const Call& call, int threads) {
  if (threads > 1 && count > 0) threads = std::min(threads, processors());
  if (threads > 1 && count > 0) {
    Pool* workers = the_pool();
    std::unique_lock<std::mutex> lock(workers->busy, std::try_to_lock);
    if (lock.owns_lock()) return workers->run({steps, count, &call, threads, 0});
  }
  const Worker alone{0, 1};
  for (size_t i = 0; i < count; i++) steps[i]->run(call, alone);
}

}  // namespace fxq
