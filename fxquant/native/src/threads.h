#pragma once

#include "fxq.h"

namespace fxq {

// Runs every step with `threads` threads, which meet behind each; with fewer where the caller may
// use fewer processors, and with the caller alone where the workers are busy with another call.
void run_steps(const Step* const* steps, size_t count, const Call& call, int threads);

}  // namespace fxq
