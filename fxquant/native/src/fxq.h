// What the steps of a plan share: tensors, the split of work between threads, vector helpers.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FXQ_INLINE inline __attribute__((always_inline))

namespace fxq {

// f(0), f(1), ... f(N - 1), with indices that are constants: arrays indexed by them stay in registers.
template <int N, typename F>
FXQ_INLINE void unrolled(const F& f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}
#define FXQ_EACH [&](auto i) __attribute__((always_inline))

// One 4-d value, held as [n][h][w][c] with `pixel` elements between neighbouring pixels, so that a
// slice of channels is a tensor, too. Slot 0 is the arena; others are inputs and outputs of the call.
struct Tensor {
  int64_t slot;
  int64_t offset;  // bytes
  int64_t n, h, w, c;
  int64_t pixel;
  int64_t row;  // elements between neighbouring lines; only images with a margin have w * pixel < row
  int64_t pixels() const { return n * h * w; }
};

// What a call works on. `slots[0]` is the arena of this call.
struct Call {
  uint8_t* const* slots;
  std::atomic<bool>* strange;  // set where a float was NaN, or a range infinite: torch decides then
  uint8_t* at(const Tensor& t) const { return slots[t.slot] + t.offset; }
  float* floats(const Tensor& t) const { return reinterpret_cast<float*>(at(t)); }
};

// One thread of a call. All threads run each step and meet behind it.
struct Worker {
  int index, count;
  // The share [begin, end) of `total` units of work.
  void share(int64_t total, int64_t& begin, int64_t& end) const {
    begin = total * index / count;
    end = total * (index + 1) / count;
  }
};

struct Step {
  virtual ~Step() = default;
  virtual void run(const Call& call, const Worker& worker) const = 0;
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Float to bytes as the engines do it: clamp, then round half to even.
inline __m512i to_int(__m512 value, __m512 low, __m512 high) {
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
}

inline __m512 bytes_to_float(const uint8_t* bytes, __mmask16 mask = 0xffff) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, bytes)));
}

inline __mmask16 mask16(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline __mmask64 mask64(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// The first `count` bytes (1 to 64). Masked stores are slow on some processors, so they are for the
// sizes that have no store of their own.
FXQ_INLINE void store_bytes(uint8_t* to, __m512i bytes, int64_t count) {
  const __m256i low = _mm512_castsi512_si256(bytes);
  if (count == 64) {
    _mm512_storeu_si512(to, bytes);
  } else if (count == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
  } else if (count == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(low));
  } else if (count == 48) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm512_extracti32x4_epi32(bytes, 2));
  } else {
    _mm512_mask_storeu_epi8(to, mask64(count), bytes);
  }
}

// The first `count` of 16 integers as bytes.
FXQ_INLINE void store_16(uint8_t* to, __m512i integers, int64_t count) {
  const __m128i bytes = _mm512_cvtepi32_epi8(integers);
  if (count >= 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  } else {
    _mm_mask_storeu_epi8(to, mask16(count), bytes);
  }
}

FXQ_INLINE void store_16(float* to, __m512 floats, int64_t count) {
  if (count >= 16) {
    _mm512_storeu_ps(to, floats);
  } else {
    _mm512_mask_storeu_ps(to, mask16(count), floats);
  }
}

}  // namespace fxq
