#pragma once

#include "fxq.h"

namespace fxq {

// softmax(query key' scale) value of each head, in float, in the order in which torch's flash
// attention and its matrix products sum. Rows hold the heads side by side.
enum class MaskKind : int32_t { none, floats, booleans };

struct Attention : Step {
  Tensor query, key, value, out;  // [n * length][heads * size]
  Tensor mask;                    // added to the scores; or where false, they do not count
  MaskKind mask_kind = MaskKind::none;
  int64_t mask_image, mask_head, mask_query, mask_key;  // its strides, the last one 0 or 1
  int64_t images, heads;
  float scale;
  void run(const Call& call, const Worker& worker) const override;
};

}  // namespace fxq
