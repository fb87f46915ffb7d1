// Calls of run_steps in turn: numbers of threads, callers at once, forks. Prints what went wrong.
#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "threads.h"

static std::atomic<int> processors{8};

// Takes the place of the system's, so that the answer is the same on every machine.
extern "C" int sched_getaffinity(pid_t, size_t size, cpu_set_t* set) noexcept {
  CPU_ZERO_S(size, set);
  for (int i = 0; i < processors; i++) CPU_SET_S(i, size, set);
  return 0;
}

namespace {

constexpr int kMost = 8;
int failures = 0;

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  failures++;
}

// Sums what all threads of the step before wrote: wrong where they did not meet.
struct Sum : fxq::Step {
  const Sum* before = nullptr;
  mutable int64_t shares[kMost] = {};
  mutable int count = 0;
  mutable clockid_t clocks[kMost] = {};

  void run(const fxq::Call&, const fxq::Worker& worker) const override {
    int64_t sum = 1;
    for (int i = 0; before != nullptr && i < worker.count; i++) sum += before->shares[i];
    shares[worker.index] = sum;
    pthread_getcpuclockid(pthread_self(), &clocks[worker.index]);
    if (worker.index == 0) count = worker.count;
  }
};

struct Chain {
  static constexpr int kSteps = 6;
  Sum sums[kSteps];
  std::vector<const fxq::Step*> steps;

  Chain() {
    for (int i = 0; i < kSteps; i++) {
      if (i > 0) sums[i].before = &sums[i - 1];
      steps.push_back(&sums[i]);
    }
  }

  // How many threads took part; every one has the right sum.
  int run(int threads) {
    run_some(steps.size(), threads);
    const int count = sums[0].count;
    int64_t expected = 1;
    for (const Sum& sum : sums) {
      for (int i = 0; i < count; i++) check(sum.shares[i] == expected, "wrong sum");
      expected = 1 + count * expected;
    }
    return count;
  }

  void run_some(size_t count, int threads) {
    const fxq::Call call{};
    fxq::run_steps(steps.data(), count, call, threads);
  }
};

int64_t nanoseconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

void never_more_than_processors() {
  Chain chain;
  for (int count : {1, 3, 2, 8}) {
    processors = count;
    for (int threads : {1, 2, 3, 8}) {
      check(chain.run(threads) == std::min(threads, count), "wrong number of threads");
    }
  }
  chain.run_some(0, 2);
}

void who_takes_no_part_sleeps() {
  Chain chain;
  check(chain.run(kMost) == kMost, "not all threads");
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // all have gone to sleep
  int64_t before[kMost];
  for (int i = 0; i < kMost; i++) before[i] = nanoseconds(chain.sums[0].clocks[i]);
  for (int i = 0; i < 1000; i++) chain.run(2);
  check(nanoseconds(chain.sums[0].clocks[1]) > before[1], "a worker that takes part used no time");
  for (int i = 2; i < kMost; i++) {
    check(nanoseconds(chain.sums[0].clocks[i]) == before[i], "a worker without work was woken");
  }
}

void callers_at_once(int rounds) {
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; c++) {
    callers.emplace_back([rounds] {
      Chain chain;
      for (int i = 0; i < rounds; i++) chain.run(1 + i % 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void forks(int rounds) {
  std::atomic<bool> over{false};
  std::thread other([&over] {
    Chain chain;
    while (!over) chain.run(2);
  });
  for (int i = 0; i < rounds; i++) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      Chain chain;
      for (int j = 0; j < 30; j++) check(chain.run(1 + j % 3) == 1 + j % 3, "wrong in the child");
      _exit(failures);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child failed");
    Chain().run(3);
  }
  over = true;
  other.join();
}

}  // namespace

int main() {
  never_more_than_processors();
  who_takes_no_part_sleeps();
  callers_at_once(2000);
#ifdef __SANITIZE_THREAD__
  (void)forks;  // the sanitizer starts no threads behind a fork
#else
  forks(20);
#endif
  return failures;
}
