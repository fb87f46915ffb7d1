// Convolutions and linears as products of gathered rows of bytes with packed weights (vpdpbusd).
//
// A kernel computes MR pixels by 16 * NV channels in registers. The rows of a pixel are found through
// pointers, one for each position of the window, and a row of zero points stands in for the padding.
#include "gemm.h"

#include <alloca.h>

#include <algorithm>
#include <vector>

namespace fxq {
namespace {

constexpr int kMaxRows = 14;
constexpr int kMaxVectors = 4;

struct Tile {
  const uint8_t* const* rows;  // [positions][MR]
  int positions;
  int groups_of_4;  // input channels of one position, by four
  const int8_t* weights;
  const Requantize* requantize;
  int channel;          // the first one, for the per-channel constants
  int last_count;       // channels of the last vector
  uint8_t* out;         // bytes or floats
  int64_t out_pixel;    // in elements
  const uint8_t* other;
  int64_t other_pixel;
  const char* ahead;    // the next block's weights, of which each tile fetches its part
  int64_t ahead_step;   // bytes for each step of the sum
};

// Up to four vectors of integers, NV of them used, as bytes in a row.
template <int NV>
FXQ_INLINE void store_row(uint8_t* to, __m512i (&q)[4], __m512i low, int count) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  unrolled<4 - NV>(FXQ_EACH { q[NV + i] = q[0]; });
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  store_bytes(to, _mm512_max_epu8(_mm512_permutexvar_epi32(order, bytes), low), count);
}

// The general epilogue, from sums in memory.
template <Activation kActivation, int NV>
void finish_with(const Tile& t, const int32_t* sums, int rows) {
  const Requantize r = *t.requantize;  // a copy, which no store can change
  for (int m = 0; m < rows; m++) {
    __m512i q[4];
    unrolled<NV>(FXQ_EACH {
      const int count = i == NV - 1 ? t.last_count : 16;
      const uint8_t* other = t.other == nullptr ? nullptr : t.other + m * t.other_pixel + 16 * i;
      const __m512 y = in_float<kActivation>(_mm512_load_si512(sums + 16 * (m * NV + i)),
                                             _mm512_loadu_ps(r.scale + t.channel + 16 * i),
                                             _mm512_loadu_ps(r.bias + t.channel + 16 * i), r,
                                             other, mask16(count));
      if (r.to_float) {
        store_16(reinterpret_cast<float*>(t.out) + m * t.out_pixel + 16 * i, y, count);
      } else {
        q[i] = in_integers(y, r);
      }
    });
    if (!r.to_float)
      store_row<NV>(t.out + m * t.out_pixel, q, _mm512_setzero_si512(), 16 * (NV - 1) + t.last_count);
  }
}

template <int NV>
__attribute__((noinline)) void finish(const Tile& t, const int32_t* sums, int rows) {
  with_activation_of(*t.requantize,
                     [&](auto a) { finish_with<decltype(a)::value, NV>(t, sums, rows); });
}

// The usual epilogue: oneDNN's order of operations, bytes, and nothing that leaves int32.
template <int MR, int NV, bool kSum>
FXQ_INLINE void store_rows(const Tile& t, const __m512i (&acc)[MR * NV]) {
  const Requantize& r = *t.requantize;
  const __m512 input_scale = _mm512_set1_ps(r.input_scale);
  const __m512 inverse = _mm512_set1_ps(r.inverse), zero_point = _mm512_set1_ps(r.zero_point);
  const __m512 other_scale = _mm512_set1_ps(r.other_scale);
  const __m512 other_zero = _mm512_set1_ps(r.other_zero_point);
  const float* scale = r.scale + t.channel;
  const float* bias = r.bias + t.channel;
  const __m512i low = _mm512_set1_epi8(static_cast<char>(static_cast<int>(r.low)));
  const int count = 16 * (NV - 1) + t.last_count;
  const __mmask16 last = mask16(t.last_count);
  unrolled<MR>([&](auto m) __attribute__((always_inline)) {
    __m512i q[4];
    unrolled<NV>(FXQ_EACH {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m * NV + i]), input_scale);
      y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_loadu_ps(scale + 16 * i)),
                        _mm512_loadu_ps(bias + 16 * i));
      if constexpr (kSum) {
        const uint8_t* other = t.other + m * t.other_pixel + 16 * i;
        const __m512 addend = bytes_to_float(other, i == NV - 1 ? last : __mmask16{0xffff});
        y = _mm512_fmadd_ps(_mm512_sub_ps(addend, other_zero), other_scale, y);
      }
      q[i] = _mm512_cvtps_epi32(_mm512_add_ps(_mm512_mul_ps(y, inverse), zero_point));
    });
    store_row<NV>(t.out + m * t.out_pixel, q, low, count);
  });
}

template <int MR, int NV>
__attribute__((noinline)) void tile(const Tile& t) {
  __m512i acc[MR * NV];  // [pixel][vector of channels]
  const Requantize& r = *t.requantize;
  unrolled<NV>(FXQ_EACH { acc[i] = _mm512_loadu_si512(r.correction + t.channel + 16 * i); });
  unrolled<MR * NV - NV>(FXQ_EACH { acc[NV + i] = acc[i % NV]; });
  const int8_t* weights = t.weights;
  const char* ahead = t.ahead;
  const int64_t ahead_step = t.ahead_step;
  const int groups = t.groups_of_4;
  for (int p = 0; p < t.positions; p++) {
    const uint8_t* rows[MR];
    unrolled<MR>(FXQ_EACH { rows[i] = t.rows[p * MR + i]; });
    for (int k = 0; k < groups; k++) {
      __m512i w[NV];
      unrolled<NV>(FXQ_EACH { w[i] = _mm512_loadu_si512(weights + 64 * i); });
      weights += 64 * NV;
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += ahead_step;
      unrolled<MR>([&](auto m) __attribute__((always_inline)) {
        int32_t four;
        memcpy(&four, rows[m] + 4 * k, 4);
        const __m512i a = _mm512_set1_epi32(four);
        // In assembly, since compilers copy accumulators around the intrinsic.
        unrolled<NV>(FXQ_EACH {
          asm("vpdpbusd %2, %1, %0" : "+v"(acc[m * NV + i]) : "v"(a), "v"(w[i]));
        });
      });
    }
  }
  if (r.dynamic && r.activation == Activation::none && t.last_count == 16) {
    const __m512 input_scale = _mm512_set1_ps(r.input_scale);
    unrolled<MR * NV>(FXQ_EACH {
      const float* constants = r.scale + t.channel + 16 * (i % NV);
      const __m512 both = _mm512_mul_ps(input_scale, _mm512_loadu_ps(constants));
      const __m512 bias = _mm512_loadu_ps(r.bias + t.channel + 16 * (i % NV));
      _mm512_storeu_ps(reinterpret_cast<float*>(t.out) + i / NV * t.out_pixel + 16 * (i % NV),
                       _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i]), both, bias));
    });
  } else if (!r.bounded || r.fbgemm || r.to_float || r.activation != Activation::none) {
    alignas(64) int32_t sums[MR * NV * 16];
    unrolled<MR * NV>(FXQ_EACH { _mm512_store_si512(sums + 16 * i, acc[i]); });
    finish<NV>(t, sums, MR);
  } else if (t.other == nullptr) {
    store_rows<MR, NV, false>(t, acc);
  } else {
    store_rows<MR, NV, true>(t, acc);
  }
}

using TileFunction = void (*)(const Tile&);

// kTiles[NV - 1][MR - 1]; as many rows as leave room for weights and a broadcast in 32 registers.
const TileFunction kTiles[kMaxVectors][kMaxRows] = {
    {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>, tile<7, 1>,
     tile<8, 1>, tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>, tile<13, 1>, tile<14, 1>},
    {tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>, tile<7, 2>,
     tile<8, 2>, tile<9, 2>, tile<10, 2>, tile<11, 2>, tile<12, 2>},
    {tile<1, 3>, tile<2, 3>, tile<3, 3>, tile<4, 3>, tile<5, 3>, tile<6, 3>, tile<7, 3>,
     tile<8, 3>},
    {tile<1, 4>, tile<2, 4>, tile<3, 4>, tile<4, 4>, tile<5, 4>, tile<6, 4>},
};
constexpr int kRows[kMaxVectors] = {14, 12, 8, 6};

}  // namespace

std::vector<ChannelBlock> channel_blocks(int64_t channels) {
  std::vector<ChannelBlock> blocks;
  int64_t vectors = round_up(channels, 16) / 16, channel = 0;
  while (vectors > 0) {
    // 5 = 3 + 2 rather than 4 + 1: one vector alone leaves half of the multipliers idle.
    const int64_t take = vectors == 5 ? 3 : std::min<int64_t>(vectors, kMaxVectors);
    blocks.push_back({static_cast<int>(channel), static_cast<int>(take)});
    channel += 16 * take;
    vectors -= take;
  }
  return blocks;
}

void GemmConvolution::run(const Call& call, const Worker& worker) const {
  const int64_t pixels = out.n * out.h * out.w;
  const int64_t blocks = static_cast<int64_t>(channels.size());
  // Threads share the weights' columns where these are many, else the pixels.
  const bool by_pixels = worker.count == 1 || pixels >= 4 * 14 * worker.count;
  int64_t first_pixel = 0, last_pixel = pixels, first_block = 0, last_block = groups * blocks;
  if (worker.count > 1) {
    if (by_pixels) {
      worker.share(pixels, first_pixel, last_pixel);
    } else {
      worker.share(groups * blocks, first_block, last_block);
    }
  }
  for (int64_t b = first_block; b < last_block; b++)
    run_block(call, b / blocks, channels[b % blocks], packed_offset[b], first_pixel, last_pixel);
}

void GemmConvolution::run_block(const Call& call, int64_t group, const ChannelBlock& block,
                                int64_t packed, int64_t first, int64_t last) const {
  const int64_t group_channels = out.c / groups;
  const int positions = whole_lines ? kernel_h : kernel_h * kernel_w;
  const int rows_at_once = kRows[block.vectors - 1];
  const uint8_t* input = call.at(in) + group * (in.c / groups);
  const int64_t element = requantize.to_float ? 4 : 1;
  Requantize r = requantize;
  alignas(64) int32_t correction[16 * kMaxVectors];
  const int64_t constants = group * round_up(group_channels, 16);
  if (r.dynamic) {
    const auto& found = *reinterpret_cast<const Parameters*>(call.at(parameters));
    r.input_scale = found.scale;
    for (int i = 0; i < 16 * block.vectors; i++)
      correction[i] = found.zero_point * r.correction[constants + block.channel + i];
    r.correction = correction - (constants + block.channel);
  }
  Tile t;
  t.positions = positions;
  t.groups_of_4 = groups_of_4;
  t.weights = weights + packed;
  t.requantize = &r;
  t.channel = static_cast<int>(constants) + block.channel;
  t.last_count = static_cast<int>(
      std::min<int64_t>(16, group_channels - block.channel - 16 * (block.vectors - 1)));
  t.out_pixel = out.pixel;
  t.other_pixel = other.pixel;
  const int64_t column = group * group_channels + block.channel;
  uint8_t* output = call.at(out) + column * element;
  const uint8_t* addend = has_other ? call.at(other) + column : nullptr;
  const auto rows =
      static_cast<const uint8_t**>(alloca(sizeof(uint8_t*) * positions * rows_at_once));
  t.rows = rows;
  // Each tile fetches its part of the next block's weights, which come from far away in large layers,
  // in small steps: many fetches at once would hold up the loads between them. Behind the last block
  // lie, as a rule, the weights of the next layer.
  const int64_t steps = int64_t{positions} * t.groups_of_4;
  const int64_t size = int64_t{64} * block.vectors * steps;
  const int64_t tiles = (last - first + rows_at_once - 1) / rows_at_once;
  const bool fetch = tiles >= 4;  // each weight is used often enough to hide the others' way
  t.ahead = reinterpret_cast<const char*>(t.weights + (fetch ? size : 0));
  t.ahead_step = fetch ? (64 * block.vectors + tiles - 1) / tiles : 0;
  Cursor at = cursor(first);
  for (int64_t m = first; m < last; m += rows_at_once) {
    const int count = static_cast<int>(std::min<int64_t>(rows_at_once, last - m));
    if (pointwise) {
      for (int i = 0; i < count; i++) rows[i] = input + (m + i) * in.pixel;
    } else {
      find_rows(input, at, count, rows);
    }
    t.out = output + m * out.pixel * element;
    t.other = addend == nullptr ? nullptr : addend + m * other.pixel;
    kTiles[block.vectors - 1][count - 1](t);
    t.ahead += t.ahead_step * steps;
  }
}

GemmConvolution::Cursor GemmConvolution::cursor(int64_t pixel) const {
  const int64_t image = out.h * out.w;
  return {pixel / image, pixel % image / out.w, pixel % out.w};
}

void GemmConvolution::find_rows(const uint8_t* input, Cursor& at, int count,
                                const uint8_t** rows) const {
  const int columns_of_window = whole_lines ? 1 : kernel_w;
  const int64_t image = in.h * in.w * in.pixel;
  int i = 0;
  while (i < count) {
    const uint8_t* base = input + at.n * image;
    const int64_t* columns = column_offset.data() + at.x * columns_of_window;
    const int64_t* lines = line_offset.data() + at.y * kernel_h;
    const uint8_t** row = rows + i;
    int64_t pixels = 1;
    if (at.x >= first_inside && at.x < last_inside) {
      // Neighbours in a line, none of which sees the padding at the sides: eight pointers at once.
      pixels = std::min<int64_t>({count - i, last_inside - at.x, 8});
      const __mmask8 mask = static_cast<__mmask8>((1u << pixels) - 1);
      for (int ky = 0; ky < kernel_h; ky++) {
        const bool padded = lines[ky] < 0;
        for (int kx = 0; kx < columns_of_window; kx++) {
          const uint8_t* first = padded ? padding_row : base + lines[ky] + columns[kx];
          const __m512i start = _mm512_set1_epi64(reinterpret_cast<int64_t>(first));
          const __m512i all = _mm512_add_epi64(start, _mm512_loadu_si512(steps));
          _mm512_mask_storeu_epi64(row, mask, padded ? start : all);
          row += count;
        }
      }
    } else {
      for (int ky = 0; ky < kernel_h; ky++) {
        for (int kx = 0; kx < columns_of_window; kx++) {
          // Offsets are negative in the padding.
          *row = (lines[ky] | columns[kx]) < 0 ? padding_row : base + lines[ky] + columns[kx];
          row += count;
        }
      }
    }
    i += static_cast<int>(pixels);
    at.x += pixels;
    if (at.x == out.w) {
      at.x = 0;
      if (++at.y == out.h) {
        at.y = 0;
        at.n++;
      }
    }
  }
}

}  // namespace fxq
