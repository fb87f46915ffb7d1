#pragma once

#include "fxq.h"

namespace fxq {

// softmax(query key' scale) value of each head, in float, in the order in which torch's flash
// attention and its matrix products sum. Rows hold the heads side by side.
struct Attention : Step {
  Tensor query, key, value, out;  // [n * length][heads * size]
  int64_t images, heads;
  float scale;
  void run(const Call& call, const Worker& worker) const override;
};

}  // namespace fxq
