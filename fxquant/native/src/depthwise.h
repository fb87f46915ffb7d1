#pragma once

#include <vector>

#include "requantize.h"

namespace fxq {

// A convolution with one input channel per output channel.
struct DepthwiseConvolution : Step {
  Tensor in, out, other;
  bool has_other = false;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1;
  int tile_pixels = 1;    // output pixels that share the gathered columns
  int column_groups = 1;  // columns gathered for a tile, by four
  int chunks = 1;         // by 64 channels; or, where rows are flat, chunks until phases repeat
  bool flat = false;      // rows are taken as bytes, whatever pixel these are of
  Requantize requantize;  // its constants are in the order of the kernel's lanes, by chunks
  const int8_t* weights = nullptr;  // [chunk][ky][group][pixel of the tile][4][64]
  const uint8_t* padding_row = nullptr;

  void run(const Call& call, const Worker& worker) const override;
};

// Lane `i` of 64 of the kernel's four vectors holds this channel of 64.
int depthwise_channel(int lane);

}  // namespace fxq
