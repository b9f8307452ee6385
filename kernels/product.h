/* What products by packed weights on the CPU share: 64 rows of W, expanded into the first-level
   cache, times every row of x with AVX-512's dot product of bf16 pairs, sums in fp32. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifndef __AVX512BF16__
#error "needs AVX-512 with products of bf16 pairs"
#endif

#define ROWS 64   /* of W in a block: four registers of sums for a row of x */
#define GROUP 128 /* most input channels expanded at once: 16 KB */
#define COUNT 6   /* rows of x at once: 24 registers of sums */
#define CHUNK 256 /* rows of x whose sums are kept at once: 64 KB */
#define INLINE static inline __attribute__((always_inline))

/* sums [count][ROWS] += scale (x [count][2 steps] times pairs [steps][4][16]); no scale: 1.
   k from row to row of x */
INLINE void multiply(const int count, const uint16_t *x, long k, const __m512i *pairs, long steps,
                     const __m512 *scale, float *sums) {
  __m512 sum[COUNT][4];
#pragma GCC unroll 6
  for (int i = 0; i < count; i++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++)
      sum[i][c] = scale ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * ROWS + c * 16);
  for (long s = 0; s < steps; s++, pairs += 4)
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) {
      int32_t pair;
      memcpy(&pair, x + i * k + 2 * s, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], both, (__m512bh)pairs[c]);
    }
#pragma GCC unroll 6
  for (int i = 0; i < count; i++)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      float *at = sums + i * ROWS + c * 16;
      _mm512_storeu_ps(at, scale ? _mm512_fmadd_ps(sum[i][c], scale[c], _mm512_loadu_ps(at)) : sum[i][c]);
    }
}

INLINE void multiply_all(long m, const uint16_t *x, long k, const __m512i *pairs, long steps,
                         const __m512 *scale, float *sums) {
  for (; m >= COUNT; m -= COUNT, x += COUNT * k, sums += COUNT * ROWS)
    multiply(COUNT, x, k, pairs, steps, scale, sums);
  switch (m) {
    case 5: multiply(5, x, k, pairs, steps, scale, sums); break;
    case 4: multiply(4, x, k, pairs, steps, scale, sums); break;
    case 3: multiply(3, x, k, pairs, steps, scale, sums); break;
    case 2: multiply(2, x, k, pairs, steps, scale, sums); break;
    case 1: multiply(1, x, k, pairs, steps, scale, sums); break;
  }
}
