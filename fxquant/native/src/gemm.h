#pragma once

#include <vector>

#include "requantize.h"

namespace fxq {

// Output channels that one pass over the pixels computes: `vectors` times 16 from `channel` on.
struct ChannelBlock {
  int channel;
  int vectors;
};

std::vector<ChannelBlock> channel_blocks(int64_t channels);

struct GemmConvolution : Step {
  Tensor in, out, other, parameters;
  bool has_other = false;
  int groups = 1, kernel_h = 1, kernel_w = 1;
  bool pointwise = false;    // one position, stride 1, no padding
  bool whole_lines = false;  // a line of the window is one string of bytes
  int groups_of_4 = 0;       // bytes of a position, or of such a string, by four
  Requantize requantize;
  const int8_t* weights = nullptr;  // [group][block][position or line][groups_of_4][16 * vectors][4]
  const uint8_t* padding_row = nullptr;
  std::vector<ChannelBlock> channels;
  std::vector<int64_t> packed_offset;              // of [group][block]
  std::vector<int64_t> line_offset, column_offset;  // [y][ky], [x][kx]: bytes, or -1 in the padding
  int64_t first_inside = 0, last_inside = 0;  // columns of the output that see no padding
  int64_t steps[8] = {};                      // bytes from a pixel's inputs to its neighbours'

  void run(const Call& call, const Worker& worker) const override;

 private:
  struct Cursor {  // an output pixel
    int64_t n, y, x;
  };
  Cursor cursor(int64_t pixel) const;
  void run_block(const Call& call, int64_t group, const ChannelBlock& block, int64_t packed,
                 int64_t first, int64_t last) const;
  void find_rows(const uint8_t* input, Cursor& at, int count, const uint8_t** rows) const;
};

}  // namespace fxq
