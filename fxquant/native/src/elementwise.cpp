#include "elementwise.h"

#include <algorithm>
#include <cmath>

namespace fxq {
namespace {

// Calls f(pixel, a pixel's channels) for this thread's share.
template <typename F>
inline void for_pixels(const Tensor& out, const Worker& worker, F f) {
  int64_t first, last;
  worker.share(out.pixels(), first, last);
  for (int64_t p = first; p < last; p++) f(p);
}

// The pixel of an operand that may have one per image, beside pixel p of the result.
inline int64_t beside(const Tensor& operand, const Tensor& out, int64_t p) {
  return operand.h * operand.w == 1 ? p / (out.h * out.w) : p;
}

// Floats to bytes; remembers whether one of them was NaN.
struct Quantizer {
  __m512 inverse, zero_point;
  __mmask16 nan = 0;

  Quantizer(float factor, float term)
      : inverse(_mm512_set1_ps(factor)), zero_point(_mm512_set1_ps(term)) {}
  FXQ_INLINE __m512i operator()(__m512 x) {
    nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512 y = _mm512_fmadd_ps(x, inverse, zero_point);
    return to_int(y, _mm512_setzero_ps(), _mm512_set1_ps(255.0f));
  }
  void tell(const Call& call) const {
    if (nan != 0) call.strange->store(true, std::memory_order_relaxed);
  }
};

// Rows of 16 by 16 bytes become columns.
inline void transpose_bytes_16(uint8_t* square) {
  const auto* rows = reinterpret_cast<const __m128i*>(square);
  __m128i a[16], b[16];
  unrolled<16>(FXQ_EACH { a[i] = _mm_load_si128(rows + i); });
  // Each round interleaves row i with row i + 8; after four, bytes are where they belong.
  const auto round = [](const __m128i* x, __m128i* y) __attribute__((always_inline)) {
    unrolled<8>(FXQ_EACH {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    });
  };
  round(a, b), round(b, a), round(a, b), round(b, a);
  unrolled<16>(FXQ_EACH { _mm_store_si128(reinterpret_cast<__m128i*>(square) + i, a[i]); });
}

// 64 bytes become 48.
inline __m512i without_every_fourth(__m512i bytes) {
  const __m128i each = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(
      order, _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(each)));
}

}  // namespace

void Quantize::run(const Call& call, const Worker& worker) const {
  const float* input = call.floats(in);
  uint8_t* output = call.at(out);
  float factor = inverse, term = zero_point;
  if (dynamic) {
    const auto& found = *reinterpret_cast<const Parameters*>(call.at(parameters));
    factor = 1.0f / found.scale, term = static_cast<float>(found.zero_point);
  }
  Quantizer quantized(factor, term);
  int64_t first, last;
  if (stride_c == 1 && stride_w == out.c && stride_h == out.w * out.c &&
      stride_n == out.h * out.w * out.c && out.pixel == out.c && margin == 0) {  // the same order: one long row
    worker.share(round_up(out.pixels() * out.c, 64) / 64, first, last);
    for (int64_t i = 64 * first; i < std::min(64 * last, out.pixels() * out.c); i += 16) {
      const int64_t left = out.pixels() * out.c - i;
      const __m512 values = _mm512_maskz_loadu_ps(mask16(left), input + i);
      store_16(output + i, quantized(values), left);
    }
    quantized.tell(call);
    return;
  }
  worker.share(out.n * out.h, first, last);
  for (int64_t line = first; line < last; line++) {
    const float* from = input + line / out.h * stride_n + line % out.h * stride_h;
    uint8_t* to = output + line * out.row;
    if (margin > 0) {
      const auto bytes = static_cast<size_t>(margin * out.pixel);
      memset(to - bytes, static_cast<int>(zero_point), bytes);
      memset(to + out.w * out.pixel, static_cast<int>(zero_point), bytes);
    }
    if (stride_w == 1 && (out.pixel == 4 || out.pixel == 3)) {  // planes of an image, interleaved
      for (int64_t x = 0; x < out.w; x += 16) {
        const __mmask16 mask = mask16(out.w - x);
        __m512i lanes = _mm512_setzero_si512();
        for (int64_t c = out.c - 1; c >= 0; c--) {
          const __m512 plane = _mm512_maskz_loadu_ps(mask, from + c * stride_c + x);
          lanes = _mm512_or_si512(_mm512_slli_epi32(lanes, 8), quantized(plane));
        }
        if (out.pixel == 3) {
          store_bytes(to + 3 * x, without_every_fourth(lanes), 3 * std::min<int64_t>(16, out.w - x));
        } else if (x + 16 <= out.w) {
          _mm512_storeu_si512(to + 4 * x, lanes);
        } else {
          _mm512_mask_storeu_epi32(to + 4 * x, mask, lanes);
        }
      }
    } else if (stride_w == 1 && out.w > 1) {  // planes: 16 pixels of 16 channels change places
      for (int64_t c = 0; c < out.c; c += 16) {
        const int64_t channels = std::min<int64_t>(16, out.c - c);
        for (int64_t x = 0; x < out.w; x += 16) {
          const int64_t pixels = std::min<int64_t>(16, out.w - x);
          alignas(64) uint8_t square[256];
          for (int64_t i = 0; i < channels; i++) {
            const float* plane = from + (c + i) * stride_c + x;
            store_16(square + 16 * i, quantized(_mm512_maskz_loadu_ps(mask16(pixels), plane)), 16);
          }
          transpose_bytes_16(square);
          uint8_t* pixel = to + x * out.pixel + c;
          for (int64_t i = 0; i < pixels; i++, pixel += out.pixel) {
            const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i*>(square + 16 * i));
            if (channels == 16) {
              _mm_storeu_si128(reinterpret_cast<__m128i*>(pixel), row);
            } else {
              _mm_mask_storeu_epi8(pixel, mask16(channels), row);
            }
          }
        }
      }
    } else if (stride_c == 1) {
      for (int64_t x = 0; x < out.w; x++) {
        for (int64_t c = 0; c < out.c; c += 16) {
          const __m512 values =
              _mm512_maskz_loadu_ps(mask16(out.c - c), from + x * stride_w + c);
          store_16(to + x * out.pixel + c, quantized(values), out.c - c);
        }
      }
    } else {
      for (int64_t x = 0; x < out.w; x++) {
        for (int64_t c = 0; c < out.c; c++) {
          const __m512 value = _mm512_set1_ps(from[x * stride_w + c * stride_c]);
          to[x * out.pixel + c] = static_cast<uint8_t>(
              _mm_cvtsi128_si32(_mm512_castsi512_si128(quantized(value))));
        }
      }
    }
  }
  quantized.tell(call);
}

void ChooseParameters::run(const Call& call, const Worker& worker) const {
  if (worker.index != 0) return;
  const float* input = call.floats(in);
  const int64_t count = in.pixels() * in.c;
  __m512 least = _mm512_setzero_ps(), most = _mm512_setzero_ps();  // the range holds zero
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(mask16(count - i), input + i);
    least = _mm512_min_ps(x, least);
    most = _mm512_max_ps(x, most);
    nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  }
  float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
  if (nan != 0 || std::isinf(high - low)) {
    call.strange->store(true, std::memory_order_relaxed);
    low = high = 0.0f;
  }
  constexpr float kSmallest = 6.1e-5f;
  double scale = (static_cast<double>(high) - low) / highest;
  if (static_cast<float>(scale) == 0.0f || std::isinf(1.0f / static_cast<float>(scale)))
    scale = 0.1;
  if (scale < kSmallest) {
    const auto before = static_cast<float>(scale);
    scale = kSmallest;
    if (low == 0.0f) {
      high = kSmallest * static_cast<float>(highest);
    } else if (high == 0.0f) {
      low = -kSmallest * static_cast<float>(highest);
    } else {
      low *= kSmallest / before;
      high *= kSmallest / before;
    }
  }
  // The end of the range that is nearer to an integer decides about the zero point.
  const double from_low = -low / scale, from_high = highest - high / scale;
  const double low_error = std::fabs(low / scale), high_error = highest + std::fabs(high / scale);
  const double chosen = low_error < high_error ? from_low : from_high;
  auto& found = *reinterpret_cast<Parameters*>(call.at(out));
  found.scale = static_cast<float>(scale);
  found.zero_point =
      static_cast<int32_t>(std::clamp(std::nearbyint(chosen), 0.0, static_cast<double>(highest)));
}

void Dequantize::run(const Call& call, const Worker& worker) const {
  const uint8_t* input = call.at(in);
  float* output = call.floats(out);
  const __m512 factor = _mm512_set1_ps(scale), zero = _mm512_set1_ps(zero_point);
  for_pixels(out, worker, [&](int64_t p) {
    for (int64_t c = 0; c < out.c; c += 16) {
      const __mmask16 mask = mask16(out.c - c);
      const __m512 x = bytes_to_float(input + p * in.pixel + c, mask);
      store_16(output + p * out.pixel + c, _mm512_mul_ps(_mm512_sub_ps(x, zero), factor), out.c - c);
    }
  });
}

void Add::run(const Call& call, const Worker& worker) const {
  const uint8_t *left = call.at(a), *right = call.at(b);
  uint8_t* output = call.at(out);
  const __m512 a_factor = _mm512_set1_ps(a_scale), b_factor = _mm512_set1_ps(b_scale);
  const __m512 a_term = _mm512_set1_ps(-a_zero_point * a_scale);
  const __m512 b_term = _mm512_set1_ps(-b_zero_point * b_scale);
  const __m512 scale = _mm512_set1_ps(inverse), zero = _mm512_set1_ps(zero_point);
  const __m512 lowest = _mm512_set1_ps(low), highest = _mm512_set1_ps(255.0f);
  for_pixels(out, worker, [&](int64_t p) {
    const uint8_t* x = left + beside(a, out, p) * a.pixel;
    const uint8_t* y = right + beside(b, out, p) * b.pixel;
    for (int64_t c = 0; c < out.c; c += 16) {
      const __mmask16 mask = mask16(out.c - c);
      const __m512 sum = _mm512_add_ps(_mm512_fmadd_ps(bytes_to_float(x + c, mask), a_factor, a_term),
                                       _mm512_fmadd_ps(bytes_to_float(y + c, mask), b_factor, b_term));
      const __m512 rounded = _mm512_roundscale_ps(
          _mm512_mul_ps(sum, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512i q = to_int(_mm512_add_ps(rounded, zero), lowest, highest);
      store_16(output + p * out.pixel + c, q, out.c - c);
    }
  });
}

void Multiply::run(const Call& call, const Worker& worker) const {
  const uint8_t *left = call.at(a), *right = call.at(b);
  uint8_t* output = call.at(out);
  const __m512i a_zero = _mm512_set1_epi32(a_zero_point), b_zero = _mm512_set1_epi32(b_zero_point);
  const __m512 factor = _mm512_set1_ps(multiplier), zero = _mm512_set1_ps(zero_point);
  const __m512 lowest = _mm512_set1_ps(low), highest = _mm512_set1_ps(255.0f);
  for_pixels(out, worker, [&](int64_t p) {
    const uint8_t* x = left + beside(a, out, p) * a.pixel;
    const uint8_t* y = right + beside(b, out, p) * b.pixel;
    for (int64_t c = 0; c < out.c; c += 16) {
      const __mmask16 mask = mask16(out.c - c);
      const __m512i i = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, x + c));
      const __m512i j = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, y + c));
      const __m512i product =
          _mm512_mullo_epi32(_mm512_sub_epi32(i, a_zero), _mm512_sub_epi32(j, b_zero));
      const __m512 rounded =
          _mm512_roundscale_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(product), factor),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512i q = to_int(_mm512_add_ps(rounded, zero), lowest, highest);
      store_16(output + p * out.pixel + c, q, out.c - c);
    }
  });
}

void ChannelAffine::run(const Call& call, const Worker& worker) const {
  const uint8_t* input = call.at(in);
  uint8_t* output = call.at(out);
  const __m512 in_zero = _mm512_set1_ps(in_zero_point), zero = _mm512_set1_ps(zero_point);
  const __m512 lowest = _mm512_set1_ps(low), highest = _mm512_set1_ps(255.0f);
  for_pixels(out, worker, [&](int64_t p) {
    for (int64_t c = 0; c < out.c; c += 16) {
      const __mmask16 mask = mask16(out.c - c);
      const __m512 x = _mm512_sub_ps(bytes_to_float(input + p * in.pixel + c, mask), in_zero);
      const __m512 y = _mm512_fmadd_ps(x, _mm512_loadu_ps(factor.data() + c),
                                       _mm512_loadu_ps(term.data() + c));
      const __m512 rounded =
          _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m512i q = to_int(_mm512_add_ps(rounded, zero), lowest, highest);
      store_16(output + p * out.pixel + c, q, out.c - c);
    }
  });
}

void CopyChannels::run(const Call& call, const Worker& worker) const {
  const uint8_t* input = call.at(in);
  uint8_t* output = call.at(out);
  for_pixels(out, worker, [&](int64_t p) {
    const int64_t at = p / in.w * in.row + p % in.w * in.pixel;  // lines may have margins
    const uint8_t* from = input + at * element;
    uint8_t* to = output + p * out.pixel * element;
    if (source.empty()) {
      memcpy(to, from, static_cast<size_t>(out.c * element));
    } else if (halves) {
      const int64_t half = out.c / 2;
      for (int64_t c = 0; c < half; c += 16) {
        const __mmask16 mask = mask16(half - c);
        const __m128i a = _mm_maskz_loadu_epi8(mask, from + c);
        const __m128i b = _mm_maskz_loadu_epi8(mask, from + half + c);
        const __m256i both =
            _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
        store_bytes(to + 2 * c, _mm512_castsi256_si512(both), 2 * std::min<int64_t>(16, half - c));
      }
    } else {
      for (int64_t c = 0; c < out.c; c++) to[c] = from[source[c]];
    }
  });
}

void Lookup::run(const Call& call, const Worker& worker) const {
  const uint8_t* input = call.at(in);
  uint8_t* output = call.at(out);
  for_pixels(out, worker, [&](int64_t p) {
    for (int64_t c = 0; c < out.c; c++)
      output[p * out.pixel + c] = table[input[p * in.pixel + c]];
  });
}

void FloatMap::run(const Call& call, const Worker& worker) const {
  const float *left = call.floats(a), *right = call.floats(b);
  float* output = call.floats(out);
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  for_pixels(out, worker, [&](int64_t p) {
    const float* x = left + p * a.pixel;
    const float* y = right + p * b.pixel;
    for (int64_t c = 0; c < out.c; c += 16) {
      const __mmask16 mask = mask16(out.c - c);
      __m512 v = _mm512_maskz_loadu_ps(mask, x + c);
      switch (function) {
        case FloatFunction::relu:
          v = _mm512_max_ps(zero, v);  // NaN, the second of the two, stays
          break;
        case FloatFunction::add:
          v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, y + c));
          break;
        case FloatFunction::gelu:
          v = onednn_gelu(v);
          break;
        case FloatFunction::hardsigmoid: {
          const __m512 six = _mm512_set1_ps(6.0f);
          v = _mm512_add_ps(v, _mm512_set1_ps(3.0f));
          v = _mm512_div_ps(_mm512_min_ps(six, _mm512_max_ps(zero, v)), six);
          break;
        }
        case FloatFunction::sigmoid: {
          const int64_t whole = out.pixels() * out.c / 32 * 32;
          const __m512 negated = _mm512_sub_ps(zero, v);
          // torch takes two vectors at a time, and the scalar function for what is left.
          const int64_t left = whole - (p * out.c + c);
          alignas(64) float e[16];
          _mm512_store_ps(e, left > 0 ? exp16(negated) : negated);
          for (int64_t i = std::clamp<int64_t>(left, 0, 16); i < 16; i++) {
            alignas(64) float plain[16];
            _mm512_store_ps(plain, negated);
            e[i] = std::exp(plain[i]);
          }
          v = _mm512_div_ps(one, _mm512_add_ps(one, _mm512_load_ps(e)));
          break;
        }
      }
      store_16(output + p * out.pixel + c, v, out.c - c);
    }
  });
}

}  // namespace fxq
