// Mean and variance as torch finds them: Welford's recurrence over chunks of 16 vectors of 8 floats,
// chunks combined in pairs like the digits of a binary counter, and the 8 lanes one after the other.
// Here each 512-bit vector holds the 8 lanes of two rows.
#include "normalization.h"

#include <algorithm>
#include <cmath>

namespace fxq {
namespace {

constexpr int kLanes = 8;    // of torch's vectors here: its layer norm is compiled for AVX2
constexpr int kChunk = 16;   // vectors
constexpr int kDepth = 32;
constexpr float kShare[kChunk] = {1.0f,      1.0f / 2,  1.0f / 3,  1.0f / 4,  1.0f / 5,  1.0f / 6,
                                  1.0f / 7,  1.0f / 8,  1.0f / 9,  1.0f / 10, 1.0f / 11, 1.0f / 12,
                                  1.0f / 13, 1.0f / 14, 1.0f / 15, 1.0f / 16};

// Mean and sum of squared deviations of `count` values in each lane.
struct Moments {
  int64_t count = 0;
  __m512 mean = _mm512_setzero_ps(), squares = _mm512_setzero_ps();

  void add(const Moments& other) {
    const int64_t both = count + other.count;
    const float share =
        both == 0 ? 0.0f : static_cast<float>(other.count) / static_cast<float>(both);
    const __m512 delta = _mm512_sub_ps(other.mean, mean);
    const __m512 part = _mm512_mul_ps(_mm512_set1_ps(share), delta);
    const __m512 weighted = _mm512_mul_ps(delta, _mm512_set1_ps(static_cast<float>(count)));
    squares = _mm512_fmadd_ps(weighted, part, _mm512_add_ps(squares, other.squares));
    mean = _mm512_add_ps(mean, part);
    count = both;
  }
};

FXQ_INLINE __m512 two_rows(const float* low, const float* high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}

FXQ_INLINE __m512 two_rows(float low, float high) {
  return _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1);
}

Moments moments_of(const float* low, const float* high, int64_t vectors) {
  Moments digits[kDepth];
  const int64_t chunks = (vectors + kChunk - 1) / kChunk;
  int depth = 0;
  while ((int64_t{1} << depth) < chunks) depth++;
  for (int64_t i = 0; i < chunks; i++) {
    Moments chunk;
    chunk.count = std::min<int64_t>(kChunk, vectors - i * kChunk);
    for (int64_t j = 0; j < chunk.count; j++) {
      const int64_t at = (i * kChunk + j) * kLanes;
      const __m512 x = two_rows(low + at, high + at);
      const __m512 delta = _mm512_sub_ps(x, chunk.mean);
      chunk.mean = _mm512_fmadd_ps(_mm512_set1_ps(kShare[j]), delta, chunk.mean);
      chunk.squares = _mm512_fmadd_ps(delta, _mm512_sub_ps(x, chunk.mean), chunk.squares);
    }
    digits[0].add(chunk);
    for (int d = 1; d < depth && ((i + 1) >> (d - 1) & 1) == 0; d++) {
      digits[d].add(digits[d - 1]);
      digits[d - 1] = Moments{};
    }
  }
  for (int d = 1; d < depth; d++) digits[0].add(digits[d]);
  return digits[0];
}

struct Normal {
  float mean, inverse;  // 1 / standard deviation
};

// Of one row, from its 8 lanes.
Normal combined(const float* mean, const float* squares, int64_t each, float epsilon) {
  int64_t count = 0;
  float m = 0.0f, s = 0.0f;
  for (int lane = 0; lane < kLanes; lane++) {
    const int64_t both = count + each;
    const float share = static_cast<float>(each) / static_cast<float>(both);
    const float delta = mean[lane] - m;
    m = std::fma(share, delta, m);
    s += std::fma(delta * delta * share, static_cast<float>(count), squares[lane]);
    count = both;
  }
  return {m, 1.0f / std::sqrt(s / static_cast<float>(count) + epsilon)};
}

}  // namespace

void LayerNorm::run(const Call& call, const Worker& worker) const {
  const float *left = call.floats(a), *right = has_other ? call.floats(b) : nullptr;
  float* output = call.floats(out);
  const int64_t width = out.c;
  int64_t first, last;
  worker.share(out.pixels(), first, last);
  for (int64_t p = first; p < last; p += 2) {
    const int64_t q = p + 1 < last ? p + 1 : p;
    const float *low = left + p * a.pixel, *high = left + q * a.pixel;
    float *low_out = output + p * out.pixel, *high_out = output + q * out.pixel;
    if (right != nullptr) {  // the sums take the results' place until they are read again
      for (const int64_t row : {p, q}) {
        for (int64_t c = 0; c < width; c += kLanes) {
          const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(left + row * a.pixel + c),
                                           _mm256_loadu_ps(right + row * b.pixel + c));
          _mm256_storeu_ps(output + row * out.pixel + c, sum);
        }
      }
      low = low_out, high = high_out;
    }
    const Moments found = moments_of(low, high, width / kLanes);
    alignas(64) float mean[2 * kLanes], squares[2 * kLanes];
    _mm512_store_ps(mean, found.mean);
    _mm512_store_ps(squares, found.squares);
    const Normal n = combined(mean, squares, found.count, epsilon);
    const Normal m = combined(mean + kLanes, squares + kLanes, found.count, epsilon);
    const __m512 centre = two_rows(n.mean, m.mean), inverse = two_rows(n.inverse, m.inverse);
    for (int64_t c = 0; c < width; c += kLanes) {
      const __m512 x = _mm512_mul_ps(_mm512_sub_ps(two_rows(low + c, high + c), centre), inverse);
      const __m512 y = _mm512_fmadd_ps(x, two_rows(factor.data() + c, factor.data() + c),
                                       two_rows(term.data() + c, term.data() + c));
      _mm256_storeu_ps(low_out + c, _mm512_castps512_ps256(y));
      _mm256_storeu_ps(high_out + c, _mm512_extractf32x8_ps(y, 1));
    }
  }
}

}  // namespace fxq
