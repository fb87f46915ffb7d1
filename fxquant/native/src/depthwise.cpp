// Depthwise convolutions: 64 channels at a time, products of four neighbouring columns at once.
//
// Bytes of four columns are interleaved, so that each 32-bit lane holds one channel's four inputs,
// and vpdpbusd multiplies them with four weights of a row of the window. Neighbouring output pixels
// of a tile share the interleaved columns, and shift the weights instead.
#include "depthwise.h"

#include <algorithm>

namespace fxq {
namespace {

constexpr int kMaxColumns = 8;

struct Interleaved {
  __m512i part[4];
};

inline __attribute__((always_inline)) Interleaved interleave(const uint8_t* const* columns) {
  const __m512i a = _mm512_loadu_si512(columns[0]), b = _mm512_loadu_si512(columns[1]);
  const __m512i c = _mm512_loadu_si512(columns[2]), d = _mm512_loadu_si512(columns[3]);
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
           _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)}};
}

inline __attribute__((always_inline)) void store(const __m512i* acc, const Requantize& r,
                                                 int64_t channel, uint8_t* out,
                                                 const uint8_t* other, __mmask64 mask) {
  __m512i q[4];
  if (r.activation == Activation::none && other == nullptr && !r.to_float) {
    const __m512 input_scale = _mm512_set1_ps(r.input_scale), inverse = _mm512_set1_ps(r.inverse);
    const __m512 zero_point = _mm512_set1_ps(r.zero_point);
    const __m512 low = _mm512_set1_ps(r.low), high = _mm512_set1_ps(r.high);
    for (int v = 0; v < 4; v++) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[v]), input_scale);
      y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_loadu_ps(r.scale + channel + 16 * v)),
                        _mm512_loadu_ps(r.bias + channel + 16 * v));
      q[v] = to_int(_mm512_add_ps(_mm512_mul_ps(y, inverse), zero_point), low, high);
    }
  } else {
    // The addend is spread over the lanes as the inputs were.
    __m512i spread[4];
    if (other != nullptr) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(mask, other), zero = _mm512_setzero_si512();
      const __m512i low = _mm512_unpacklo_epi8(bytes, zero);
      const __m512i high = _mm512_unpackhi_epi8(bytes, zero);
      spread[0] = _mm512_unpacklo_epi16(low, zero);
      spread[1] = _mm512_unpackhi_epi16(low, zero);
      spread[2] = _mm512_unpacklo_epi16(high, zero);
      spread[3] = _mm512_unpackhi_epi16(high, zero);
    }
    for (int v = 0; v < 4; v++) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[v]), _mm512_set1_ps(r.input_scale));
      y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_loadu_ps(r.scale + channel + 16 * v)),
                        _mm512_loadu_ps(r.bias + channel + 16 * v));
      if (other != nullptr) {
        const __m512 from_zero = _mm512_sub_ps(_mm512_cvtepi32_ps(spread[v]),
                                               _mm512_set1_ps(r.other_zero_point));
        y = _mm512_fmadd_ps(from_zero, _mm512_set1_ps(r.other_scale), y);
      }
      q[v] = in_integers(activate(y, r), r);
    }
  }
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  _mm512_mask_storeu_epi8(out, mask, bytes);
}

struct Row {
  const uint8_t* lines[16];  // of the window, at the first of the 64 channels; null in the padding
  int64_t chunk;
  __mmask64 mask;
};

// T output pixels from G groups of four columns.
template <int T, int G>
inline __attribute__((always_inline)) void tile(const DepthwiseConvolution& d, const Row& row,
                                                int64_t x, int count, uint8_t* out,
                                                const uint8_t* other) {
  __m512i acc[T][4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    const __m512i start =
        _mm512_loadu_si512(d.requantize.correction + row.chunk * 64 + 16 * v);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[t][v] = start;
  }
  const int8_t* weights =
      d.weights + row.chunk * d.kernel_h * (static_cast<int64_t>(G) * T * 256);
  const int64_t first = x * d.stride_w - d.padding_w;
  const int columns = T == 1 ? d.kernel_w : (T - 1) * d.stride_w + d.kernel_w;
  const int step = T == 1 ? d.dilation_w : 1;
  const bool inside = first >= 0 && first + static_cast<int64_t>(4 * G - 1) * step < d.in.w;
  for (int ky = 0; ky < d.kernel_h; ky++) {
    const uint8_t* line = row.lines[ky];
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) {
      const uint8_t* at[4];
      if (inside && line != nullptr) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) at[i] = line + (first + (4 * g + i) * step) * d.in.pixel;
      } else {
        for (int i = 0; i < 4; i++) {
          const int64_t column = first + (4 * g + i) * step;
          const bool real =
              line != nullptr && column >= 0 && column < d.in.w && 4 * g + i < columns;
          at[i] = real ? line + column * d.in.pixel : d.padding_row;
        }
      }
      const Interleaved four = interleave(at);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          const __m512i w = _mm512_loadu_si512(weights + 64 * v);
          asm("vpdpbusd %2, %1, %0" : "+v"(acc[t][v]) : "v"(four.part[v]), "v"(w));
        }
        weights += 256;
      }
    }
  }
  const int64_t channel = row.chunk * 64;
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    if (t < count) {
      store(acc[t], d.requantize, channel, out + t * d.out.pixel,
            other == nullptr ? nullptr : other + t * d.other.pixel, row.mask);
    }
  }
}

template <int T, int G>
void run_rows(const DepthwiseConvolution& d, const Call& call, const Worker& worker) {
  const int64_t chunks = round_up(d.out.c, 64) / 64;
  int64_t first, last;
  worker.share(d.out.n * d.out.h, first, last);
  const uint8_t* input = call.at(d.in);
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    Row row;
    row.chunk = chunk;
    row.mask = mask64(d.out.c - 64 * chunk);
    for (int64_t line = first; line < last; line++) {
      const int64_t n = line / d.out.h, y = line % d.out.h;
      for (int ky = 0; ky < d.kernel_h; ky++) {
        const int64_t iy = y * d.stride_h - d.padding_h + ky * d.dilation_h;
        row.lines[ky] = iy < 0 || iy >= d.in.h
                            ? nullptr
                            : input + (n * d.in.h + iy) * d.in.w * d.in.pixel + 64 * chunk;
      }
      uint8_t* out = call.at(d.out) + line * d.out.w * d.out.pixel + 64 * chunk;
      const uint8_t* other =
          d.has_other ? call.at(d.other) + line * d.out.w * d.other.pixel + 64 * chunk : nullptr;
      for (int64_t x = 0; x < d.out.w; x += T) {
        tile<T, G>(d, row, x, static_cast<int>(std::min<int64_t>(T, d.out.w - x)),
                   out + x * d.out.pixel, other == nullptr ? nullptr : other + x * d.other.pixel);
      }
    }
  }
}

}  // namespace

int depthwise_channel(int lane) {
  const int vector = lane / 16, within = lane % 16;
  return within / 4 * 16 + vector * 4 + within % 4;
}

void DepthwiseConvolution::run(const Call& call, const Worker& worker) const {
  if (tile_pixels == 2 && column_groups == 1) return run_rows<2, 1>(*this, call, worker);
  if (tile_pixels == 4 && column_groups == 2) return run_rows<4, 2>(*this, call, worker);
  if (tile_pixels == 2 && column_groups == 2) return run_rows<2, 2>(*this, call, worker);
  if (column_groups == 1) return run_rows<1, 1>(*this, call, worker);
  return run_rows<1, 2>(*this, call, worker);
}

}  // namespace fxq
