#pragma once

#include <vector>

#include "requantize.h"

namespace fxq {

// Float in any strides -> bytes: round(x / scale + zero point), in one step with the layout change.
struct Quantize : Step {
  Tensor in, out;  // of `in`, only slot, offset and sizes are used
  int64_t stride_n, stride_c, stride_h, stride_w;  // of the input, in elements
  float inverse, zero_point;
  bool dynamic = false;  // scale and zero point are found in the call
  Tensor parameters;
  int32_t margin = 0;  // pixels on both sides of each line, to be filled with the zero point
  void run(const Call& call, const Worker& worker) const override;
};

// Scale and zero point for the range of a float tensor, as FBGEMM chooses them.
struct ChooseParameters : Step {
  Tensor in, out;
  int32_t highest = 255;
  void run(const Call& call, const Worker& worker) const override;
};

// (q - zero point) * scale.
struct Dequantize : Step {
  Tensor in, out;
  float scale, zero_point;
  void run(const Call& call, const Worker& worker) const override;
};

// Sum of two byte tensors, either of which may have one pixel per image, as quantized::add does it.
struct Add : Step {
  Tensor a, b, out;
  float a_scale, a_zero_point, b_scale, b_zero_point;
  float inverse, zero_point, low;
  void run(const Call& call, const Worker& worker) const override;
};

// Product, as quantized::mul does it: of integers, times one multiplier.
struct Multiply : Step {
  Tensor a, b, out;
  int32_t a_zero_point, b_zero_point;
  float multiplier, zero_point, low;
  void run(const Call& call, const Worker& worker) const override;
};

// x * factor + term per channel, in bytes (a batch-norm that nothing absorbed).
struct ChannelAffine : Step {
  Tensor in, out;
  std::vector<float> factor, term;  // padded to 16
  float in_zero_point, zero_point, low;
  void run(const Call& call, const Worker& worker) const override;
};

// Copies bytes (or floats), channel `source[c]` to channel c; or all in order where `source` is empty.
struct CopyChannels : Step {
  Tensor in, out;
  int64_t element = 1;
  std::vector<int32_t> source;
  bool halves = false;  // `source` takes the first and the second half of the channels in turns
  void run(const Call& call, const Worker& worker) const override;
};

// Bytes through a table of 256.
struct Lookup : Step {
  Tensor in, out;
  std::vector<uint8_t> table;
  void run(const Call& call, const Worker& worker) const override;
};

enum class FloatFunction : int32_t { relu, hardsigmoid, sigmoid, add, gelu };

// A function of floats, of two for `add`.
struct FloatMap : Step {
  Tensor a, b, out;
  FloatFunction function;
  __m512 (*exp16)(__m512) = nullptr;  // of the library that torch computes with
  void run(const Call& call, const Worker& worker) const override;
};

}  // namespace fxq
