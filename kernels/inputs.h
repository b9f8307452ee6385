/* What rounding of a product's inputs on the CPU shares: rows of bf16 or fp32, their range, and the
   scale that is stored. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifndef __AVX512BF16__
#error "needs AVX-512"
#endif

#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

enum { FP32, FP16, BF16 };

typedef struct {
  float smallest, most;
  long type;
} Kept;

INLINE __mmask16 first_of(long count) { return count >= 16 ? 0xffff : (__mmask16)((1 << count) - 1); }

/* 16 numbers from `at` on, 0 past `left` of them and where `keep` says so */
INLINE __m512 read(const void *x, long type, long at, long left, const uint8_t *keep) {
  const __mmask16 there = first_of(left);
  const __m512 v = type == FP32 ? _mm512_maskz_loadu_ps(there, (const float *)x + at)
                                : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                                      there, (const uint16_t *)x + at)), 16);
  if (!keep) return v;
  const __m512i kept = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, keep));
  return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(kept, kept), v);
}

static const float NOTHING = __builtin_nanf("");

/* lowest and highest of a row and 0; NaN if there is one */
INLINE void range(const void *x, long type, long row, long k, const uint8_t *keep, float *low, float *high) {
  __m512 least = _mm512_setzero_ps(), most = least;
  __mmask16 wrong = 0;
  for (long j = 0; j < k; j += 16) {
    const __m512 v = read(x, type, row * k + j, k - j, keep ? keep + j : 0);
    wrong |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    least = _mm512_min_ps(least, v);
    most = _mm512_max_ps(most, v);
  }
  *low = wrong ? NOTHING : _mm512_reduce_min_ps(least);
  *high = wrong ? NOTHING : _mm512_reduce_max_ps(most);
}

/* a scale as it is stored, never 0 and never infinite */
INLINE float stored(float scale, const Kept *kept) {
  scale = scale < kept->smallest ? kept->smallest : scale > kept->most ? kept->most : scale;
  if (kept->type == FP16) return _cvtsh_ss(_cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT));
  if (kept->type == FP32) return scale;
  uint32_t bits; /* bf16, halves to even, subnormals kept, as PyTorch rounds */
  memcpy(&bits, &scale, 4);
  bits = scale == scale ? (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u : bits;
  memcpy(&scale, &bits, 4);
  return scale;
}

/* values [m] become all the lowest (side -1) or the highest (1) of them; NaN wins */
INLINE void shared(float *values, long m, float side) {
  if (!m) return;
  float all = values[0];
  for (long i = 1; i < m; i++) all = side * values[i] <= side * all ? all : values[i];
  for (long i = 0; i < m; i++) values[i] = all;
}
