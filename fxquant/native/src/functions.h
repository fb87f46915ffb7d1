// Functions of floats, bit by bit as the libraries behind torch compute them.
#pragma once

#include "fxq.h"

namespace fxq {

FXQ_INLINE __m512 from_bits(uint32_t bits) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits)));
}

// e^x of oneDNN for x between -ln(2) / 2 and ln(2) / 2.
FXQ_INLINE __m512 exp_of_rest(__m512 rest) {
  __m512 sum = from_bits(0x3c07cfce);
  sum = _mm512_fmadd_ps(sum, rest, from_bits(0x3d2b9d0d));
  sum = _mm512_fmadd_ps(sum, rest, from_bits(0x3e2aad40));
  sum = _mm512_fmadd_ps(sum, rest, from_bits(0x3efffee3));
  sum = _mm512_fmadd_ps(sum, rest, from_bits(0x3f7ffffb));
  return _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
}

// e^x of oneDNN's elementwise kernels (oneDNN 3, f32 on AVX512), which torch's attention has, too.
FXQ_INLINE __m512 onednn_exp(__m512 x) {
  const __m512 lowest = from_bits(0xc2aeac50), highest = from_bits(0x42b17218);
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, lowest, _CMP_LT_OS);
  x = _mm512_max_ps(_mm512_min_ps(x, highest), lowest);
  const __m512 scaled =
      _mm512_fmadd_ps(x, from_bits(0x3fb8aa3b), _mm512_set1_ps(0.5f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_FLOOR);
  const __m512 rest = _mm512_fnmadd_ps(whole, from_bits(0x3f317218), x);
  __m512i power = _mm512_cvtps_epi32(_mm512_sub_ps(whole, one));
  power = _mm512_slli_epi32(_mm512_add_epi32(power, _mm512_set1_epi32(127)), 23);
  power = _mm512_mask_mov_epi32(power, tiny, _mm512_setzero_si512());
  const __m512 half = _mm512_mul_ps(exp_of_rest(rest), _mm512_castsi512_ps(power));
  return _mm512_mul_ps(half, _mm512_set1_ps(2.0f));
}

// 1 / (1 + e^-x), by the symmetry that oneDNN uses.
FXQ_INLINE __m512 onednn_logistic(__m512 x) {
  const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  const __m512 e = onednn_exp(_mm512_or_ps(x, sign));
  const __m512 low = _mm512_div_ps(e, _mm512_add_ps(e, one));
  return _mm512_mask_mov_ps(_mm512_sub_ps(one, low), negative, low);
}

// x / (1 + e^-x) of oneDNN, for results that become bytes: where e^-|x| is too small for a normal
// number it is 2^-126 here, which no sum of a byte's size can show.
FXQ_INLINE __m512 onednn_silu_for_bytes(__m512 x) {
  const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
  const __m512 down = _mm512_max_ps(_mm512_or_ps(x, sign), from_bits(0xc2aeac50));
  const __m512 scaled = _mm512_fmadd_ps(down, from_bits(0x3fb8aa3b), _mm512_set1_ps(0.5f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_FLOOR);
  const __m512 rest = _mm512_fnmadd_ps(whole, from_bits(0x3f317218), down);
  const __m512 e = _mm512_scalef_ps(exp_of_rest(rest), whole);
  const __m512 low = _mm512_div_ps(e, _mm512_add_ps(e, one));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  return _mm512_mul_ps(_mm512_mask_mov_ps(_mm512_sub_ps(one, low), negative, low), x);
}

// Polynomials for erf(x / sqrt(2)) of oneDNN 3: [degree][interval], four intervals an octave.
alignas(64) constexpr uint32_t kErf[6][32] = {
    {0xa6f2cb94, 0x32827792, 0x3381cc0c, 0x34523d4a, 0x351ac44d, 0x35f36d88, 0x36ee8229,
     0x37b8a3bb, 0x3867a213, 0x3940033b, 0x3a2a5a1d, 0x3ae35863, 0x3b7828f2, 0x3c08b14b,
     0x3c515ed3, 0xbb503236, 0xbd8d8e5e, 0xbe8abcd9, 0xbf0c19a2, 0xbeccb328, 0x3e176ced,
     0x3f470d99, 0x3f7abb28, 0x3f800000, 0, 0, 0, 0, 0, 0, 0, 0},
    {0x3f4c422a, 0x3f4c421f, 0x3f4c4207, 0x3f4c41cb, 0x3f4c413b, 0x3f4c3fad, 0x3f4c3a2f,
     0x3f4c2d40, 0x3f4c146a, 0x3f4bc341, 0x3f4ad08c, 0x3f48f8cf, 0x3f45fac7, 0x3f404e07,
     0x3f3b980f, 0x3f48dff3, 0x3f78b21b, 0x3fbb0704, 0x40019c32, 0x3fe536d6, 0x3f81331e,
     0x3e6c8684, 0x3c98f936, 0, 0x3f800000, 0, 0, 0, 0, 0, 0, 0},
    {0xb62173f4, 0x3735e4cf, 0x37f2ff89, 0x388c23be, 0x3917535c, 0x39ab2ab0, 0x3a60fadb,
     0x3af9b960, 0x3b6e5491, 0x3c0a4ec5, 0x3ca5aa8c, 0x3d2138d9, 0x3d8737d4, 0x3ddfb660,
     0x3e0f27ab, 0x3d94004b, 0xbe0efdeb, 0xbf1d96c3, 0xbf89db58, 0xbf6d9897, 0xbef69fb8,
     0xbdc4f8a8, 0xbbde6422, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {0xbe081a19, 0xbe084570, 0xbe08639b, 0xbe089837, 0xbe08f409, 0xbe09ab95, 0xbe0b66d0,
     0xbe0e400a, 0xbe124df8, 0xbe1bde02, 0xbe2f19c9, 0xbe4931bf, 0xbe685fbc, 0xbe89c95f,
     0xbe96cbca, 0xbe8044aa, 0xbe0550f2, 0x3dcfd6a1, 0x3e94c826, 0x3e79345f, 0x3decec91,
     0x3ca46568, 0x3aa1e00a, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {0xba3d61db, 0x39f097a3, 0x3a5845dc, 0x3ab1fa35, 0x3b0cefb8, 0x3b653ab6, 0x3bcae527,
     0x3c221712, 0x3c6c5840, 0x3cc0a703, 0x3d1dcc19, 0x3d63656d, 0x3d955907, 0x3dbf9910,
     0x3dd53f69, 0x3db7dcef, 0x3d639ebe, 0xba6ede48, 0xbd22be69, 0xbd041cf1, 0xbc64f5ab,
     0xbb097a32, 0xb8ebf380, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {0x3cb7d80c, 0x3c9b6050, 0x3c978d11, 0x3c92e850, 0x3c8d058b, 0x3c848454, 0x3c6cd623,
     0x3c4c824b, 0x3c2a7935, 0x3be0b390, 0x3b0651ac, 0xbb232f53, 0xbbd42fa0, 0xbc2c5366,
     0xbc492c9e, 0xbc2a7aa6, 0xbbd55d04, 0xba823a76, 0x3b102aa8, 0x3ae25a7e, 0x3a31f792,
     0x38b84375, 0x3689bb5a, 0, 0, 0, 0, 0, 0, 0, 0, 0},
};

// x * (1 + erf(x / sqrt(2))) / 2 of oneDNN's elementwise kernels (oneDNN 3, f32 on AVX512).
FXQ_INLINE __m512 onednn_gelu(__m512 x) {
  const __m512 sign = _mm512_set1_ps(-0.0f);
  const __m512 size = _mm512_andnot_ps(sign, x);
  const __m512i bias = _mm512_set1_epi32(static_cast<int>(0xc21fffff));
  __m512i interval = _mm512_srai_epi32(_mm512_add_epi32(_mm512_castps_si512(size), bias), 21);
  interval = _mm512_max_epi32(interval, _mm512_set1_epi32(1));
  interval = _mm512_min_epi32(interval, _mm512_set1_epi32(24));
  const __mmask16 beyond = _mm512_cmp_ps_mask(from_bits(0x40b15cee), size, _CMP_LT_OS);
  interval = _mm512_mask_mov_epi32(interval, beyond, _mm512_set1_epi32(23));
  const auto coefficient = [&](int degree) {
    return _mm512_permutex2var_ps(_mm512_load_ps(kErf[degree]), interval,
                                  _mm512_load_ps(kErf[degree] + 16));
  };
  __m512 erf = coefficient(5);
  for (int degree = 4; degree >= 0; degree--)
    erf = _mm512_fmadd_ps(erf, size, coefficient(degree));
  erf = _mm512_xor_ps(erf, _mm512_and_ps(sign, x));
  const __m512 both = _mm512_mul_ps(x, _mm512_add_ps(erf, _mm512_set1_ps(1.0f)));
  return _mm512_mul_ps(both, _mm512_set1_ps(0.5f));
}

}  // namespace fxq
