#pragma once

#include "fxq.h"

namespace fxq {

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

struct MaxPool : Step {
  Tensor in, out;
  Window window;
  void run(const Call& call, const Worker& worker) const override;
};

// Average of bytes, on the integers, as torch's avg_pool3d of quantized tensors computes it; the
// result has the input's scale.
struct AveragePool : Step {
  Tensor in, out;
  Window window;
  int32_t count_padding = 1, divisor = 0;  // 0: the size of the window
  int32_t zero_point;
  void run(const Call& call, const Worker& worker) const override;
};

// Mean over the pixels of an image, in float and in the order in which torch sums.
struct GlobalMean : Step {
  Tensor in, out;
  int32_t from_bytes = 0;
  float scale, zero_point;  // of bytes
  void run(const Call& call, const Worker& worker) const override;
};

}  // namespace fxq
