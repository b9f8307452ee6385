/* What products by packed weights on the CPU share: 64 rows of W, expanded into the first-level
   cache, times every row of x with AVX-512's dot products, of bf16 pairs or of four bytes. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if !defined __AVX512BF16__ || !defined __AVX512VNNI__ || !defined __AVX512VBMI__
#error "needs AVX-512 with products of bf16 pairs and of bytes, and permutes of bytes"
#endif

#define ROWS 64   /* of W in a block: four registers of sums for a row of x */
#define COUNT 6   /* rows of x at once: 24 registers of sums */
#define CHUNK 256 /* rows of x whose sums are kept at once: 64 KB */
#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

enum { PAIRS, BYTES }; /* bf16 by bf16 into fp32; unsigned bytes of x by signed ones into 32 bits */

/* what becomes of the product of a group: times scale, plus offset times the sum of x's group */
typedef struct {
  const __m512 *scale;  /* [4] of 16 rows; null: the product is added as it is */
  const __m512 *offset; /* [4], may be null */
  const float *x_sums;  /* of the first row of x, then of the others */
  const __m512i *start; /* [4] of kind BYTES: what sums begin with */
  const void *next;     /* fetched from memory meanwhile */
  long next_bytes;
} After;

/* 16 sums of row i of x += a group's product; more (a literal): there is an offset */
INLINE void add(const int more, __m512 product, const After *after, long i, int c, float *sums) {
  __m512 all = _mm512_fmadd_ps(product, after->scale[c], _mm512_loadu_ps(sums));
  if (more)
    all = _mm512_fmadd_ps(_mm512_set1_ps(after->x_sums[i]), after->offset[c], all);
  _mm512_storeu_ps(sums, all);
}

/* DO for every register of sums; a branch inside would keep them in memory */
#define EACH(count, DO)                                        \
  _Pragma("GCC unroll 6") for (int i = 0; i < (count); i++)    \
    _Pragma("GCC unroll 4") for (int c = 0; c < 4; c++) DO;

/* sums [count][ROWS] fp32 += x [count][steps] times w [steps][4][16], in words of 4 bytes, then
   `after`; without a scale sums go on in order. k: bytes from row to row of x */
INLINE void multiply(const int kind, const int count, const uint8_t *x, long k, const __m512i *w,
                     long steps, const After *after, float *sums) {
  __m512 sum[COUNT][4]; /* of kind PAIRS */
  __m512i whole[COUNT][4]; /* of kind BYTES; conversions between the two would spill registers */
  EACH(count, whole[i][c] = kind == BYTES ? after->start[c] : _mm512_setzero_si512())
  EACH(count, sum[i][c] = after->scale ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * ROWS + c * 16))
  for (long s = 0; s < steps; s++, w += 4)
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) {
      int32_t word;
      memcpy(&word, x + i * k + 4 * s, 4);
      const __m512i own = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++)
        if (kind == PAIRS) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], (__m512bh)own, (__m512bh)w[c]);
        else whole[i][c] = _mm512_dpbusd_epi32(whole[i][c], own, w[c]);
    }
  if (kind == BYTES) EACH(count, sum[i][c] = _mm512_cvtepi32_ps(whole[i][c]))
  if (!after->scale) EACH(count, _mm512_storeu_ps(sums + i * ROWS + c * 16, sum[i][c]))
  else if (after->offset) EACH(count, add(1, sum[i][c], after, i, c, sums + i * ROWS + c * 16))
  else EACH(count, add(0, sum[i][c], after, i, c, sums + i * ROWS + c * 16))
}

/* the same for m rows of x */
INLINE void multiply_all(const int kind, long m, const uint8_t *x, long k, const __m512i *w,
                         long steps, const After *after, float *sums) {
  After now = *after;
  const long share = now.next_bytes / (m / COUNT + 1) + 64;
  const char *next = now.next, *end = next + now.next_bytes;
  for (; m > 0; m -= COUNT, x += COUNT * k, sums += COUNT * ROWS) {
    for (long line = 0; line < share && next < end; line += 64, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    switch (m) {
      case 5: multiply(kind, 5, x, k, w, steps, &now, sums); break;
      case 4: multiply(kind, 4, x, k, w, steps, &now, sums); break;
      case 3: multiply(kind, 3, x, k, w, steps, &now, sums); break;
      case 2: multiply(kind, 2, x, k, w, steps, &now, sums); break;
      case 1: multiply(kind, 1, x, k, w, steps, &now, sums); break;
      default: multiply(kind, COUNT, x, k, w, steps, &now, sums);
    }
    if (now.offset) now.x_sums += COUNT;
  }
}

/* channels from start to the end of its group, at most `most` */
INLINE long step_at(long start, long group, long most) {
  const long rest = group - start % group;
  return rest < most ? rest : most;
}
