#include "pooling.h"

#include <algorithm>

#include "requantize.h"

namespace fxq {

void MaxPool::run(const Call& call, const Worker& worker) const {
  const uint8_t* input = call.at(in);
  uint8_t* output = call.at(out);
  int64_t first, last;
  worker.share(out.n * out.h, first, last);
  for (int64_t line = first; line < last; line++) {
    const int64_t n = line / out.h;
    const int64_t y = line % out.h * window.stride_h - window.padding_h;
    for (int64_t column = 0; column < out.w; column++) {
      const int64_t x = column * window.stride_w - window.padding_w;
      for (int64_t c = 0; c < out.c; c += 64) {
        const __mmask64 mask = mask64(out.c - c);
        __m512i best = _mm512_setzero_si512();
        for (int ky = 0; ky < window.kernel_h; ky++) {
          const int64_t iy = y + ky * window.dilation_h;
          if (iy < 0 || iy >= in.h) continue;
          for (int kx = 0; kx < window.kernel_w; kx++) {
            const int64_t ix = x + kx * window.dilation_w;
            if (ix < 0 || ix >= in.w) continue;
            best = _mm512_max_epu8(
                best, _mm512_maskz_loadu_epi8(
                          mask, input + ((n * in.h + iy) * in.w + ix) * in.pixel + c));
          }
        }
        store_bytes(output + (line * out.w + column) * out.pixel + c, best,
                    std::min<int64_t>(64, out.c - c));
      }
    }
  }
}

void AveragePool::run(const Call& call, const Worker& worker) const {
  const uint8_t* input = call.at(in);
  uint8_t* output = call.at(out);
  int64_t first, last;
  worker.share(out.n * out.h, first, last);
  for (int64_t line = first; line < last; line++) {
    const int64_t n = line / out.h;
    const int64_t y = line % out.h * window.stride_h - window.padding_h;
    const int64_t y_end = std::min(y + window.kernel_h, in.h + window.padding_h);
    const int64_t y_from = std::max<int64_t>(y, 0), y_to = std::min(y + window.kernel_h, in.h);
    for (int64_t column = 0; column < out.w; column++) {
      const int64_t x = column * window.stride_w - window.padding_w;
      const int64_t x_end = std::min(x + window.kernel_w, in.w + window.padding_w);
      const int64_t x_from = std::max<int64_t>(x, 0), x_to = std::min(x + window.kernel_w, in.w);
      const int64_t real = (y_to - y_from) * (x_to - x_from);
      const int64_t count =
          divisor != 0 ? divisor : count_padding ? (y_end - y) * (x_end - x) : real;
      const __m512i start = _mm512_set1_epi32(static_cast<int>(-real * zero_point));
      const float share = 1.0f / static_cast<float>(count);
      const __m512 factor = _mm512_set1_ps(share);
      const __m512 last_factor = _mm512_set1_ps(1.0f / (1.0f / share));  // twice, as torch does it
      uint8_t* to = output + (line * out.w + column) * out.pixel;
      for (int64_t c = 0; c < out.c; c += 64) {
        const __mmask64 mask = mask64(out.c - c);
        const __m512i zero = _mm512_setzero_si512();
        // Sums of up to 257 bytes fit into 16 bits; of more, into the wide ones.
        __m512i low = zero, high = zero, wide[4] = {zero, zero, zero, zero};
        int narrow = 0;
        const auto widen = [&] {
          wide[0] = _mm512_add_epi32(wide[0], _mm512_unpacklo_epi16(low, zero));
          wide[1] = _mm512_add_epi32(wide[1], _mm512_unpackhi_epi16(low, zero));
          wide[2] = _mm512_add_epi32(wide[2], _mm512_unpacklo_epi16(high, zero));
          wide[3] = _mm512_add_epi32(wide[3], _mm512_unpackhi_epi16(high, zero));
          low = high = zero;
          narrow = 0;
        };
        for (int64_t iy = y_from; iy < y_to; iy++) {
          const uint8_t* at = input + ((n * in.h + iy) * in.w + x_from) * in.pixel + c;
          for (int64_t ix = x_from; ix < x_to; ix++, at += in.pixel) {
            const __m512i bytes = _mm512_maskz_loadu_epi8(mask, at);
            low = _mm512_add_epi16(low, _mm512_unpacklo_epi8(bytes, zero));
            high = _mm512_add_epi16(high, _mm512_unpackhi_epi8(bytes, zero));
            if (++narrow == 257) widen();
          }
        }
        widen();
        const auto packed = [&](auto rounded) __attribute__((always_inline)) {
          __m512i q[4];
          unrolled<4>(FXQ_EACH {
            q[i] = rounded(_mm512_cvtepi32_ps(_mm512_add_epi32(wide[i], start)));
          });
          return _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
        };
        __m512i bytes = packed([&](__m512 sum) {
          return _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(sum, factor)),
                                  _mm512_set1_epi32(zero_point));
        });
        // Channels behind the last whole vector of 16 are rounded with the zero point.
        const int64_t whole = out.c / 16 * 16 - c;
        if (whole < std::min<int64_t>(64, out.c - c)) {
          const __m512i last = packed([&](__m512 sum) {
            const __m512 zero_points = _mm512_set1_ps(static_cast<float>(zero_point));
            return _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(sum, last_factor), zero_points));
          });
          bytes = _mm512_mask_mov_epi8(last, mask64(std::max<int64_t>(whole, 0)), bytes);
        }
        store_bytes(to + c, bytes, std::min<int64_t>(64, out.c - c));
      }
    }
  }
}

namespace {

// torch sums in levels: sums of `step` values, sums of `step` such sums, and so on (cascade_sum).
struct Cascade {
  static constexpr int kLevels = 4;
  int64_t power, step, mask;
  explicit Cascade(int64_t count) {
    int64_t log = 0;
    while ((int64_t{1} << log) < count) log++;
    power = std::max<int64_t>(4, log / kLevels);
    step = int64_t{1} << power;
    mask = step - 1;
  }
};

template <typename Value>
inline __m512 cascade_sum(const Cascade& cascade, int64_t count, Value value) {
  __m512 level[Cascade::kLevels];
  for (auto& sum : level) sum = _mm512_setzero_ps();
  int64_t i = 0;
  while (i + cascade.step <= count) {
    for (int64_t j = 0; j < cascade.step; j++, i++) level[0] = _mm512_add_ps(level[0], value(i));
    for (int j = 1; j < Cascade::kLevels; j++) {
      level[j] = _mm512_add_ps(level[j], level[j - 1]);
      level[j - 1] = _mm512_setzero_ps();
      if ((i & (cascade.mask << (j * cascade.power))) != 0) break;
    }
  }
  for (; i < count; i++) level[0] = _mm512_add_ps(level[0], value(i));
  for (int j = 1; j < Cascade::kLevels; j++) level[0] = _mm512_add_ps(level[0], level[j]);
  return level[0];
}

}  // namespace

void GlobalMean::run(const Call& call, const Worker& worker) const {
  const int64_t pixels = in.h * in.w, vectors = round_up(out.c, 16) / 16;
  const uint8_t* bytes = call.at(in);
  const float* floats = call.floats(in);
  float* output = call.floats(out);
  const __m512 factor = _mm512_set1_ps(scale), zero = _mm512_set1_ps(zero_point);
  const __m512 count = _mm512_set1_ps(static_cast<float>(pixels));
  int64_t first, last;
  worker.share(out.n * vectors, first, last);
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t n = unit / vectors, c = unit % vectors * 16;
    const __mmask16 mask = mask16(out.c - c);
    const auto value = [&](int64_t pixel) {
      const int64_t at = (n * pixels + pixel) * in.pixel + c;
      if (!from_bytes) return _mm512_maskz_loadu_ps(mask, floats + at);
      return _mm512_mul_ps(_mm512_sub_ps(bytes_to_float(bytes + at, mask), zero), factor);
    };
    // Whole groups of four (AVX2) vectors are summed in order; channels behind them in four sums, of
    // every fourth pixel.
    const bool in_order = c < out.c / 32 * 32;
    __m512 sum = _mm512_setzero_ps();
    if (in_order) {
      sum = cascade_sum(Cascade(pixels), pixels, value);
    } else {
      const int64_t each = pixels / 4;
      __m512 part[4];
      for (int64_t k = 0; k < 4; k++)
        part[k] = cascade_sum(Cascade(each), each, [&](int64_t i) { return value(4 * i + k); });
      for (int64_t i = 4 * each; i < pixels; i++) part[0] = _mm512_add_ps(part[0], value(i));
      for (int k = 1; k < 4; k++) part[0] = _mm512_add_ps(part[0], part[k]);
      sum = part[0];
    }
    store_16(output + n * out.pixel + c, _mm512_div_ps(sum, count), out.c - c);
  }
}

}  // namespace fxq
