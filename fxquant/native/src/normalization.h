#pragma once

#include <vector>

#include "fxq.h"

namespace fxq {

// Layer norm of rows of floats, or of the sums of two tensors' rows, in the order in which torch
// computes mean and variance.
struct LayerNorm : Step {
  Tensor a, b, out;
  bool has_other = false;
  std::vector<float> factor, term;  // per element of a row
  float epsilon;
  void run(const Call& call, const Worker& worker) const override;
};

}  // namespace fxq
