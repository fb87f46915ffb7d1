// From an accumulator to the result, operation by operation as the engines of torch compute it.
#pragma once

#include "functions.h"

namespace fxq {

// `silu_for_bytes` stands for `silu` where the result becomes bytes; nobody asks for it by number.
enum class Activation : int32_t { none, relu, hardswish, silu, clamp, gelu, silu_for_bytes };

// What a tensor is quantized with, found when a call sees it.
struct Parameters {
  float scale;
  int32_t zero_point;
};

// Per-channel constants are padded to 16 channels by who builds them.
struct Requantize {
  const int32_t* correction;  // where accumulators start: -zero point * sum of the weights
  const float* scale;         // of the weights (oneDNN), or input scale * weight scale / output scale
  const float* bias;          // in float (oneDNN), or divided by input scale * weight scale (FBGEMM)
  float input_scale;          // oneDNN multiplies by it first; unused by FBGEMM
  float inverse;              // 1 / output scale
  float zero_point;           // of the output
  float low, high;            // of the output's integers
  int32_t fbgemm;             // whose order of operations
  int32_t to_float;           // the result stays in float
  Activation activation;
  float alpha, beta;          // bounds of `clamp`
  const uint8_t* other;       // what oneDNN's sum adds, at the output's pixels; or null
  float other_scale, other_zero_point;
  int32_t dynamic;  // FBGEMM's order for inputs that were quantized in the call
  int32_t bounded;  // no result can leave int32 in front of the clamp
};

template <Activation kActivation>
FXQ_INLINE __m512 activate(__m512 y, const Requantize& r) {
  const __m512 zero = _mm512_setzero_ps();
  if constexpr (kActivation == Activation::relu) {
    return _mm512_max_ps(y, zero);
  } else if constexpr (kActivation == Activation::clamp) {
    return _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(r.alpha)), _mm512_set1_ps(r.beta));
  } else if constexpr (kActivation == Activation::hardswish) {
    const __m512 sixth = _mm512_mul_ps(y, _mm512_set1_ps(1.0f / 6.0f));
    const __m512 gate = _mm512_add_ps(sixth, _mm512_set1_ps(0.5f));
    return _mm512_mul_ps(y, _mm512_min_ps(_mm512_max_ps(gate, zero), _mm512_set1_ps(1.0f)));
  } else if constexpr (kActivation == Activation::silu) {
    return _mm512_mul_ps(onednn_logistic(y), y);
  } else if constexpr (kActivation == Activation::silu_for_bytes) {
    return onednn_silu_for_bytes(y);
  } else if constexpr (kActivation == Activation::gelu) {
    return onednn_gelu(y);
  } else {
    return y;
  }
}

// f(activation), with an activation that is a constant.
template <typename F>
FXQ_INLINE void with_activation_of(const Requantize& r, const F& f) {
  switch (r.activation) {
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::hardswish:
      return f(std::integral_constant<Activation, Activation::hardswish>{});
    case Activation::silu:
    case Activation::silu_for_bytes:
      if (r.bounded && !r.to_float)
        return f(std::integral_constant<Activation, Activation::silu_for_bytes>{});
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::clamp:
      return f(std::integral_constant<Activation, Activation::clamp>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
  }
}

// 16 channels in float, in front of the conversion to bytes; `other` points at these channels.
template <Activation kActivation>
FXQ_INLINE __m512 in_float(__m512i sum, __m512 scale, __m512 bias, const Requantize& r,
                       const uint8_t* other, __mmask16 mask) {
  __m512 y = _mm512_cvtepi32_ps(sum);
  if (r.dynamic) {
    const __m512 both = _mm512_mul_ps(_mm512_set1_ps(r.input_scale), scale);
    return activate<kActivation>(_mm512_fmadd_ps(y, both, bias), r);
  }
  if (r.fbgemm) return _mm512_mul_ps(_mm512_add_ps(y, bias), scale);
  y = _mm512_mul_ps(y, _mm512_set1_ps(r.input_scale));
  y = _mm512_add_ps(_mm512_mul_ps(y, scale), bias);
  if (other != nullptr) {
    const __m512 from_zero =
        _mm512_sub_ps(bytes_to_float(other, mask), _mm512_set1_ps(r.other_zero_point));
    y = _mm512_fmadd_ps(from_zero, _mm512_set1_ps(r.other_scale), y);
  }
  return activate<kActivation>(y, r);
}

FXQ_INLINE __m512i in_integers(__m512 y, const Requantize& r) {
  const __m512 zero_point = _mm512_set1_ps(r.zero_point);
  if (r.fbgemm) {  // rounds first
    y = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    y = _mm512_add_ps(y, zero_point);
  } else {
    y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_set1_ps(r.inverse)), zero_point);
  }
  return to_int(y, _mm512_set1_ps(r.low), _mm512_set1_ps(r.high));
}

}  // namespace fxq
