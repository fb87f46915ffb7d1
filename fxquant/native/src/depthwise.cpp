// Depthwise convolutions: 64 channels at a time, products of four neighbouring columns at once.
//
// Bytes of four columns are interleaved, so that each 32-bit lane holds one channel's four inputs,
// and vpdpbusd multiplies them with four weights of a row of the window. Neighbouring output pixels
// of a tile share the interleaved columns, and shift the weights instead. Where the channels are not
// about a multiple of 64 and the stride is 1, a row is taken as a string of bytes: 64 of them at a
// time, of several pixels, and a column is the same string moved by a pixel.
#include "depthwise.h"

#include <algorithm>

namespace fxq {
namespace {

// The four columns of each of 64 channels, in 32-bit lanes.
struct Interleaved {
  __m512i part[4];
  FXQ_INLINE Interleaved(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    part[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    part[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    part[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    part[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
  }
};

// What the results of a tile are made with.
struct Output {
  const Requantize& r;
  bool plain;  // nothing but scale, bias and rounding
  __m512 input_scale, inverse, zero_point;
  __m512i low;
  explicit Output(const DepthwiseConvolution& d)
      : r(d.requantize),
        plain(r.bounded && r.activation == Activation::none && !d.has_other),
        input_scale(_mm512_set1_ps(r.input_scale)),
        inverse(_mm512_set1_ps(r.inverse)),
        zero_point(_mm512_set1_ps(r.zero_point)),
        low(_mm512_set1_epi8(static_cast<char>(static_cast<int>(r.low)))) {}
};

FXQ_INLINE __m512 scaled(const Output& o, __m512i sum, int64_t at) {
  const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), o.input_scale);
  return _mm512_add_ps(_mm512_mul_ps(y, _mm512_loadu_ps(o.r.scale + at)),
                       _mm512_loadu_ps(o.r.bias + at));
}

// Four vectors of integers as 64 bytes, in order: packing undoes the interleaving.
FXQ_INLINE __m512i packed(const __m512i* q) {
  return _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
}

template <Activation kActivation>
__m512i general(const Output& o, const __m512i* acc, int64_t at, const uint8_t* other,
                __mmask64 mask) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i bytes = other == nullptr ? zero : _mm512_maskz_loadu_epi8(mask, other);
  const Interleaved addend(bytes, zero, zero, zero);
  __m512i q[4];
  unrolled<4>([&](auto v) __attribute__((always_inline)) {
    __m512 y = scaled(o, acc[v], at + 16 * v);
    if (other != nullptr) {
      const __m512 from_zero = _mm512_sub_ps(_mm512_cvtepi32_ps(addend.part[v]),
                                             _mm512_set1_ps(o.r.other_zero_point));
      y = _mm512_fmadd_ps(from_zero, _mm512_set1_ps(o.r.other_scale), y);
    }
    q[v] = in_integers(activate<kActivation>(y, o.r), o.r);
  });
  return packed(q);
}

__attribute__((noinline)) __m512i general(const Output& o, const __m512i* acc, int64_t at,
                                          const uint8_t* other, __mmask64 mask) {
  __m512i bytes;
  with_activation_of(o.r, [&](auto a) {
    bytes = general<decltype(a)::value>(o, acc, at, other, mask);
  });
  return bytes;
}

FXQ_INLINE void store(const Output& o, const __m512i (&acc)[4], int64_t at, uint8_t* out,
                      const uint8_t* other, int64_t count) {
  __m512i bytes;
  if (o.plain) {
    __m512i q[4];
    unrolled<4>(FXQ_EACH {
      const __m512 y = scaled(o, acc[i], at + 16 * i);
      q[i] = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(y, o.inverse), o.zero_point));
    });
    bytes = _mm512_max_epu8(packed(q), o.low);
  } else {
    alignas(64) __m512i sums[4];
    unrolled<4>(FXQ_EACH { sums[i] = acc[i]; });
    bytes = general(o, sums, at, other, mask64(count));
  }
  store_bytes(out, bytes, count);
}

// A row of the window: where its columns are. In the padding all of them are one.
struct Line {
  const uint8_t* start;
  int64_t pixel;
};
constexpr int kMaxLines = 16;

template <int T>
FXQ_INLINE void multiply(__m512i (&acc)[T][4], const Interleaved& four, const int8_t* weights) {
  unrolled<4 * T>(FXQ_EACH {
    const __m512i w = _mm512_loadu_si512(weights + 64 * i);
    asm("vpdpbusd %2, %1, %0" : "+v"(acc[i / 4][i % 4]) : "v"(four.part[i % 4]), "v"(w));
  });
}

template <int T>
FXQ_INLINE void start(__m512i (&acc)[T][4], const Output& o, int64_t at) {
  unrolled<4 * T>(FXQ_EACH {
    acc[i / 4][i % 4] = _mm512_loadu_si512(o.r.correction + at + 16 * (i % 4));
  });
}

// T output pixels from G groups of four columns.
template <int T, int G>
FXQ_INLINE void tile(const DepthwiseConvolution& d, const Output& o, const Line* lines,
                     int64_t chunk, int64_t channels, int64_t x, int count, uint8_t* out,
                     const uint8_t* other) {
  __m512i acc[T][4];
  start(acc, o, 64 * chunk);
  const int kernel_h = d.kernel_h, step = T == 1 ? d.dilation_w : 1;
  const int8_t* weights = d.weights + chunk * kernel_h * (int64_t{G} * T * 256);
  const int64_t first = x * d.stride_w - d.padding_w;
  if (first >= 0 && first + int64_t{4 * G - 1} * step < d.in.w) {
    for (int ky = 0; ky < kernel_h; ky++) {
      const int64_t pixel = step * lines[ky].pixel;
      const uint8_t* at = lines[ky].start + first * lines[ky].pixel;
      unrolled<G>(FXQ_EACH {
        const Interleaved four(_mm512_loadu_si512(at), _mm512_loadu_si512(at + pixel),
                               _mm512_loadu_si512(at + 2 * pixel),
                               _mm512_loadu_si512(at + 3 * pixel));
        multiply(acc, four, weights + 256 * T * i);
        at += 4 * pixel;
      });
      weights += 256 * T * G;
    }
  } else {
    for (int ky = 0; ky < kernel_h; ky++) {
      for (int g = 0; g < G; g++) {
        const auto column = [&](int i) {
          const int64_t at = first + int64_t{4 * g + i} * step;
          return _mm512_loadu_si512(at < 0 || at >= d.in.w
                                        ? d.padding_row
                                        : lines[ky].start + at * lines[ky].pixel);
        };
        multiply(acc, Interleaved(column(0), column(1), column(2), column(3)), weights);
        weights += 256 * T;
      }
    }
  }
  unrolled<T>(FXQ_EACH {
    if (i < count) {
      store(o, acc[i], 64 * chunk, out + i * d.out.pixel,
            other == nullptr ? nullptr : other + i * d.other.pixel, channels);
    }
  });
}

void find_lines(const DepthwiseConvolution& d, const uint8_t* input, int64_t line, Line* lines) {
  const int64_t n = line / d.out.h, y = line % d.out.h;
  for (int ky = 0; ky < d.kernel_h; ky++) {
    const int64_t iy = y * d.stride_h - d.padding_h + ky * d.dilation_h;
    if (iy < 0 || iy >= d.in.h) {
      lines[ky] = {d.padding_row, 0};
    } else {
      lines[ky] = {input + (n * d.in.h + iy) * d.in.w * d.in.pixel, d.in.pixel};
    }
  }
}

template <int T, int G>
void run_pixels(const DepthwiseConvolution& d, const Call& call, const Worker& worker) {
  const Output o(d);
  int64_t first, last;
  worker.share(d.out.n * d.out.h, first, last);
  for (int64_t chunk = 0; chunk < d.chunks; chunk++) {
    const int64_t channels = std::min<int64_t>(64, d.out.c - 64 * chunk);
    for (int64_t line = first; line < last; line++) {
      Line lines[kMaxLines];
      find_lines(d, call.at(d.in), line, lines);
      for (int ky = 0; ky < d.kernel_h; ky++)
        if (lines[ky].pixel != 0) lines[ky].start += 64 * chunk;
      uint8_t* out = call.at(d.out) + line * d.out.w * d.out.pixel + 64 * chunk;
      const uint8_t* other =
          d.has_other ? call.at(d.other) + line * d.out.w * d.other.pixel + 64 * chunk : nullptr;
      for (int64_t x = 0; x < d.out.w; x += T) {
        tile<T, G>(d, o, lines, chunk, channels, x, static_cast<int>(std::min<int64_t>(T, d.out.w - x)),
                   out + x * d.out.pixel, other == nullptr ? nullptr : other + x * d.other.pixel);
      }
    }
  }
}

// 64 bytes of a row from `at` on; what lies outside [0, size) is padding.
FXQ_INLINE __m512i flat_column(const Line& line, int64_t at, int64_t size, __m512i padding) {
  if (line.pixel == 0) return padding;
  if (at >= 0 && at + 64 <= size) return _mm512_loadu_si512(line.start + at);
  const int64_t before = std::clamp<int64_t>(-at, 0, 64);
  const int64_t behind = std::clamp<int64_t>(size - at, 0, 64);
  const __mmask64 mask = mask64(behind) & ~mask64(before);
  return _mm512_mask_loadu_epi8(padding, mask, line.start + at);
}

template <int G>
void run_flat(const DepthwiseConvolution& d, const Call& call, const Worker& worker) {
  const Output o(d);
  const __m512i padding = _mm512_loadu_si512(d.padding_row);
  const int64_t size = d.in.w * d.in.c, results = d.out.w * d.out.c;
  const int64_t channels = d.in.c, step = d.dilation_w * channels;
  int64_t first, last;
  worker.share(d.out.n * d.out.h, first, last);
  for (int64_t line = first; line < last; line++) {
    Line lines[kMaxLines];
    find_lines(d, call.at(d.in), line, lines);
    uint8_t* out = call.at(d.out) + line * results;
    const uint8_t* other = d.has_other ? call.at(d.other) + line * results : nullptr;
    int64_t chunk = 0;
    for (int64_t at = 0; at < results; at += 64) {
      __m512i acc[1][4];
      start(acc, o, 64 * chunk);
      const int8_t* weights = d.weights + chunk * d.kernel_h * (int64_t{G} * 256);
      const int64_t column = at - d.padding_w * channels;
      const bool inside = column >= 0 && column + (4 * G - 1) * step + 64 <= size;
      for (int ky = 0; ky < d.kernel_h; ky++) {
        unrolled<G>(FXQ_EACH {
          const int64_t from = column + 4 * i * step;
          if (inside && lines[ky].pixel != 0) {
            const uint8_t* p = lines[ky].start + from;
            multiply(acc,
                           Interleaved(_mm512_loadu_si512(p), _mm512_loadu_si512(p + step),
                                       _mm512_loadu_si512(p + 2 * step),
                                       _mm512_loadu_si512(p + 3 * step)),
                           weights);
          } else {
            multiply(acc,
                           Interleaved(flat_column(lines[ky], from, size, padding),
                                       flat_column(lines[ky], from + step, size, padding),
                                       flat_column(lines[ky], from + 2 * step, size, padding),
                                       flat_column(lines[ky], from + 3 * step, size, padding)),
                           weights);
          }
          weights += 256;
        });
      }
      store(o, acc[0], 64 * chunk, out + at, other == nullptr ? nullptr : other + at,
            std::min<int64_t>(64, results - at));
      if (++chunk == d.chunks) chunk = 0;
    }
  }
}

}  // namespace

int depthwise_channel(int lane) {
  const int vector = lane / 16, within = lane % 16;
  return within / 4 * 16 + vector * 4 + within % 4;
}

void DepthwiseConvolution::run(const Call& call, const Worker& worker) const {
  if (flat && column_groups == 1) return run_flat<1>(*this, call, worker);
  if (flat) return run_flat<2>(*this, call, worker);
  if (tile_pixels == 2 && column_groups == 1) return run_pixels<2, 1>(*this, call, worker);
  if (tile_pixels == 4 && column_groups == 2) return run_pixels<4, 2>(*this, call, worker);
  if (tile_pixels == 2 && column_groups == 2) return run_pixels<2, 2>(*this, call, worker);
  if (column_groups == 1) return run_pixels<1, 1>(*this, call, worker);
  return run_pixels<1, 2>(*this, call, worker);
}

}  // namespace fxq
