// Attention of one head after the other: its keys and values are packed once, then rows of queries
// are multiplied, passed through the softmax and multiplied again while they are in the cache.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>

#include "functions.h"

namespace fxq {
namespace {

constexpr int kRows = 8;      // queries at once
constexpr int kPanel = 32;    // columns at once

// Memory of a thread, which grows to what its largest call needs.
float* scratch(size_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local size_t size = 0;
  if (size < floats) {
    const size_t bytes = static_cast<size_t>(round_up(static_cast<int64_t>(floats * 4), 64));
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    memset(memory.get(), 0, bytes);
    size = floats;
  }
  return memory.get();
}

// 16 rows of 16 floats become 16 columns: to[c * to_row + r] = from[r * from_row + c].
void transpose_16(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m512 a[16], b[16];
  unrolled<16>(FXQ_EACH { a[i] = _mm512_loadu_ps(from + i * from_row); });
  unrolled<8>(FXQ_EACH {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  });
  unrolled<4>(FXQ_EACH {
    const auto pair = [&](int j) { return _mm512_castps_pd(b[4 * i + j]); };
    a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
    a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
    a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
    a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
  });
  unrolled<4>(FXQ_EACH {  // a[4 * g + i]: columns i, i + 4, i + 8, i + 12 of rows 4 * g to 4 * g + 3
    const __m512 low01 = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_store_ps(to + i * to_row, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_store_ps(to + (i + 8) * to_row, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_store_ps(to + (i + 4) * to_row, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_store_ps(to + (i + 12) * to_row, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  });
}

// How many products the matrix library adds up before it starts a new sum and adds that to the
// first: all, two halves, or pieces of 192.
int64_t piece_of(int64_t inner) {
  constexpr int64_t kPiece = 192;
  if (inner <= kPiece || inner >= 2 * kPiece) return std::min(inner, kPiece);
  return (inner + 1) / 2;
}

// kRows rows by 32 columns of a product; each sum in the order of the inner index.
void product(const float* a, int64_t a_row, const float* panel, int64_t inner, float* out,
             int64_t out_row) {
  const int64_t piece = piece_of(inner);
  for (int64_t first = 0; first < inner; first += piece) {
    __m512 sum[kRows * 2];
    unrolled<kRows * 2>(FXQ_EACH { sum[i] = _mm512_setzero_ps(); });
    for (int64_t k = first; k < std::min(inner, first + piece); k++) {
      const __m512 left = _mm512_load_ps(panel + k * kPanel);
      const __m512 right = _mm512_load_ps(panel + k * kPanel + 16);
      unrolled<kRows>(FXQ_EACH {
        const __m512 factor = _mm512_set1_ps(a[i * a_row + k]);
        sum[2 * i] = _mm512_fmadd_ps(factor, left, sum[2 * i]);
        sum[2 * i + 1] = _mm512_fmadd_ps(factor, right, sum[2 * i + 1]);
      });
    }
    unrolled<kRows * 2>(FXQ_EACH {
      float* const to = out + i / 2 * out_row + i % 2 * 16;
      _mm512_store_ps(to, first == 0 ? sum[i] : _mm512_add_ps(_mm512_load_ps(to), sum[i]));
    });
  }
}

// The larger one, or NaN where either is.
FXQ_INLINE __m512 maximum(__m512 a, __m512 b) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), nan,
                            _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
}

template <typename F>
FXQ_INLINE float reduced(__m512 v, const F& f) {
  v = f(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  v = f(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  v = f(v, _mm512_shuffle_ps(v, v, 0x4e));
  v = f(v, _mm512_shuffle_ps(v, v, 0xb1));
  return _mm512_cvtss_f32(v);
}

// One query's row of a mask.
struct MaskRow {
  const uint8_t* start = nullptr;
  MaskKind kind = MaskKind::none;
  int64_t step = 0;

  FXQ_INLINE __m512 at(int64_t i) const {  // what is added to 16 scores
    if (kind == MaskKind::floats) {
      const auto* floats = reinterpret_cast<const float*>(start);
      return step == 0 ? _mm512_set1_ps(*floats) : _mm512_loadu_ps(floats + i);
    }
    const __m128i bytes = step == 0 ? _mm_set1_epi8(static_cast<char>(*start))
                                    : _mm_loadu_si128(reinterpret_cast<const __m128i*>(start + i));
    const __mmask16 hidden = _mm_cmpeq_epi8_mask(bytes, _mm_setzero_si128());
    return _mm512_maskz_mov_ps(hidden, _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
  }
};

// Scores become e^(scale * score + mask - largest); 1 / their sum.
float soften(float* scores, int64_t count, float scale, const MaskRow& mask) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 score = _mm512_load_ps(scores + i);
    const __m512 scaled = mask.kind == MaskKind::none
                              ? _mm512_mul_ps(score, factor)
                              : _mm512_fmadd_ps(score, factor, mask.at(i));
    _mm512_store_ps(scores + i, scaled);
    most = maximum(most, scaled);
  }
  const float largest =
      reduced(most, [](__m512 a, __m512 b) { return maximum(a, b); });
  if (largest == -std::numeric_limits<float>::infinity()) {
    std::fill(scores, scores + count, 0.0f);
    return 1.0f;
  }
  const __m512 shift = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 e = onednn_exp(_mm512_sub_ps(_mm512_load_ps(scores + i), shift));
    _mm512_store_ps(scores + i, e);
    sum = _mm512_add_ps(sum, e);
  }
  const float total = reduced(sum, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  return 1.0f / (total == 0.0f ? 1.0f : total);
}

}  // namespace

void Attention::run(const Call& call, const Worker& worker) const {
  const int64_t size = out.c / heads, queries = out.pixels() / images;
  const int64_t keys = key.pixels() / images, rows = round_up(queries, kRows);
  const int64_t keys_padded = round_up(keys, kPanel), size_padded = round_up(size, kPanel);
  float* const packed_keys = scratch(static_cast<size_t>(  // [keys / 32][size][32]
      keys_padded * size + size_padded * keys + kRows * (keys_padded + size_padded + size)));
  float* const packed_values = packed_keys + keys_padded * size;  // [size / 32][keys][32]
  float* const scores = packed_values + size_padded * keys;       // [kRows][keys]
  float* const mixed = scores + kRows * keys_padded;              // [kRows][size]
  float* const last_rows = mixed + kRows * size_padded;           // [kRows][size]
  const uint8_t* const masks = mask_kind == MaskKind::none ? nullptr : call.at(mask);
  int64_t first, last;
  worker.share(images * heads, first, last);
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t image = unit / heads, column = unit % heads * size;
    const float* q = call.floats(query) + image * queries * query.pixel + column;
    const float* k = call.floats(key) + image * keys * key.pixel + column;
    const float* v = call.floats(value) + image * keys * value.pixel + column;
    float* o = call.floats(out) + image * queries * out.pixel + column;
    for (int64_t j = 0; j < keys; j += 16)
      for (int64_t d = 0; d < size; d += 16)
        transpose_16(k + j * key.pixel + d, key.pixel,
                     packed_keys + j / kPanel * kPanel * size + d * kPanel + j % kPanel, kPanel);
    for (int64_t j = 0; j < keys; j++)
      for (int64_t d = 0; d < size; d += 16)
        _mm512_store_ps(packed_values + d / kPanel * kPanel * keys + j * kPanel + d % kPanel,
                        _mm512_loadu_ps(v + j * value.pixel + d));
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t count = std::min<int64_t>(kRows, queries - m);
      const float* block = q + m * query.pixel;
      int64_t block_row = query.pixel;
      if (count < kRows) {
        for (int64_t i = 0; i < count; i++)
          std::copy(block + i * query.pixel, block + i * query.pixel + size, last_rows + i * size);
        block = last_rows, block_row = size;
      }
      for (int64_t j = 0; j < keys; j += kPanel)
        product(block, block_row, packed_keys + j * size, size, scores + j, keys_padded);
      float inverse[kRows];
      MaskRow row{masks, mask_kind, mask_key};
      for (int64_t i = 0; i < count; i++) {
        if (masks != nullptr) {
          const int64_t at = image * mask_image + unit % heads * mask_head + (m + i) * mask_query;
          row.start = masks + at * (mask_kind == MaskKind::floats ? 4 : 1);
        }
        inverse[i] = soften(scores + i * keys_padded, keys, scale, row);
      }
      for (int64_t d = 0; d < size; d += kPanel)
        product(scores, keys_padded, packed_values + d * keys, keys, mixed + d, size_padded);
      for (int64_t i = 0; i < count; i++) {
        const __m512 factor = _mm512_set1_ps(inverse[i]);
        for (int64_t d = 0; d < size; d += 16)
          _mm512_storeu_ps(o + (m + i) * out.pixel + d,
                           _mm512_mul_ps(_mm512_load_ps(mixed + i * size_padded + d), factor));
      }
    }
  }
}

}  // namespace fxq
