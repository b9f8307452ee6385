/* y = x W^T on the CPU: x bf16, W in 4 or 8 bit codes with a scale and an offset per group.

   For few rows of x codes of 4 bits become whole numbers in registers, and the group's scale and
   offset meet the sums. Else 64 rows of W by one group of input channels are expanded into the
   first-level cache and multiplied by every row of x. Compiled by kernels/native.py. */
#include "../product.h"

#define GROUP 128 /* most input channels expanded at once: 16 KB */
#define SINGLE 2048 /* groups of a row whose sums are kept on the stack */
#define AHEAD 4096 /* bytes of codes fetched before they are needed */
#define FEW 4     /* rows of x multiplied by codes in registers at once */

/* 16 fp32 of channel j and of j + 1 -> 16 pairs of bf16 */
INLINE __m512i paired(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* fp32 128 + code, for codes below 16: they are the last bits of a bf16 mantissa */
INLINE __m512 above_128(__m512i code) {
  return (__m512)_mm512_or_si512(_mm512_slli_epi32(code, 16), _mm512_set1_epi32(0x43000000));
}

INLINE __m512i bytes(const void *from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}

/* codes [channels][32] bytes, row r in the low half of byte r, row 32 + r in the high half;
   w = (128 + code) scale + less -> pairs [channels / 2][4][16] of bf16 */
INLINE void expand4(const uint8_t *codes, long channels, const __m512 *scale, const __m512 *less,
                    __m512i *pairs) {
  const __m512i low = _mm512_set1_epi32(15);
  for (long j = 0; j < channels; j += 2, codes += 64, pairs += 4)
    for (int c = 0; c < 2; c++) {
      const __m512i a = bytes(codes + 16 * c), b = bytes(codes + 32 + 16 * c);
      const __m512 a0 = above_128(_mm512_and_si512(a, low)), a1 = above_128(_mm512_srli_epi32(a, 4));
      const __m512 b0 = above_128(_mm512_and_si512(b, low)), b1 = above_128(_mm512_srli_epi32(b, 4));
      pairs[c] = paired(_mm512_fmadd_ps(a0, scale[c], less[c]), _mm512_fmadd_ps(b0, scale[c], less[c]));
      pairs[c + 2] = paired(_mm512_fmadd_ps(a1, scale[c + 2], less[c + 2]),
                            _mm512_fmadd_ps(b1, scale[c + 2], less[c + 2]));
    }
}

/* sums [count][ROWS] += x [count][channels] times the same codes, then `after`: no W in memory.
   code - 8 is looked up: bytes come to words in the order of pairs, and the table is there twice,
   so that the bit above a code does not matter. k: channels from row to row of x */
INLINE void multiply4(const int count, const int fetch, const uint16_t *x, long k,
                      const uint8_t *codes, long channels, const After *after, float *sums) {
  const __m512i table = _mm512_set4_epi64(0x40e040c040a04080, 0x404040003f800000, (long long)0xbf80c000c040c080,
                                          (long long)0xc0a0c0c0c0e0c100);
  const __m512i place = _mm512_set_epi16( /* word 2 r: byte r, word 2 r + 1: byte 32 + r */
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
      34, 2, 33, 1, 32, 0);
  const __m512i next = _mm512_add_epi16(place, _mm512_set1_epi16(16));
  __m512 sum[FEW][4];
  EACH(count, sum[i][c] = _mm512_setzero_ps())
  for (long j = 0; j < channels; j += 2, codes += 64) {
    const __m512i both = _mm512_loadu_si512(codes);
    if (fetch) _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
    const __m512i a = _mm512_permutexvar_epi8(place, both), b = _mm512_permutexvar_epi8(next, both);
    const __m512i w[4] = {_mm512_permutexvar_epi16(a, table), _mm512_permutexvar_epi16(b, table),
                          _mm512_permutexvar_epi16(_mm512_srli_epi16(a, 4), table),
                          _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), table)};
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      int32_t pair;
      memcpy(&pair, x + i * k + j, 4);
      const __m512i own = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], (__m512bh)own, (__m512bh)w[c]);
    }
  }
  EACH(count, add(1, sum[i][c], after, i, c, sums + i * ROWS + c * 16))
}

INLINE void multiply4_all(long m, const uint16_t *x, long k, const uint8_t *codes, long channels,
                          const After *after, float *sums) {
  After now = *after;
  for (int fetch = 1; m > 0; m -= FEW, x += FEW * k, sums += FEW * ROWS, now.x_sums += FEW, fetch = 0)
    switch (m) {
      case 1: multiply4(1, fetch, x, k, codes, channels, &now, sums); break;
      case 2: multiply4(2, fetch, x, k, codes, channels, &now, sums); break;
      case 3: multiply4(3, fetch, x, k, codes, channels, &now, sums); break;
      default: multiply4(4, fetch, x, k, codes, channels, &now, sums);
    }
}

/* codes [channels][64] -> pairs of code + shift, whole numbers to 255, exact in bf16 */
INLINE void expand8(const int8_t *codes, long channels, const __m512 *shift, __m512i *pairs) {
  for (long j = 0; j < channels; j += 2, codes += 128, pairs += 4)
    for (int c = 0; c < 4; c++) {
      const __m512i a = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * c)));
      const __m512i b = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + 64 + 16 * c)));
      pairs[c] = paired(_mm512_add_ps(_mm512_cvtepi32_ps(a), shift[c]),
                        _mm512_add_ps(_mm512_cvtepi32_ps(b), shift[c]));
    }
}

/* sums [count][ROWS] -> y [count][ROWS] bf16, n from row to row of y */
INLINE void store(long count, const float *sums, uint16_t *y, long n) {
  for (long i = 0; i < count; i++)
    for (int c = 0; c < ROWS; c += 16)
      _mm256_storeu_si256((__m256i *)(y + i * n + c),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + i * ROWS + c)));
}

/* x [m][k] -> [steps][m][step]: rows a power of two apart would fight for the same cache lines.
   A step is at most GROUP channels of one group. */
static void arrange(const uint16_t *x, long m, long k, long group, uint16_t *to) {
  for (long start = 0, step; start < k; start += step) {
    step = step_at(start, group, GROUP);
    for (long i = 0; i < m; i++, to += step) memcpy(to, x + i * k + start, step * sizeof *to);
  }
}

/* sums of groups of x [m][k] -> [groups][m] */
static void sum_groups(const uint16_t *x, long m, long k, long group, float *to) {
  for (long start = 0; start < k; start += group)
    for (long i = 0; i < m; i++, to++) {
      __m512 low = _mm512_setzero_ps(), high = low;
      for (long j = start; j < start + group; j += 32) {
        const __m512i v = _mm512_loadu_si512(x + i * k + j);
        low = _mm512_add_ps(low, (__m512)_mm512_slli_epi32(v, 16));
        high = _mm512_add_ps(high, (__m512)_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
      }
      *to = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    }
}

/* x [m][k] bf16, m k more of it in spare; q [n / 64][k][32] bytes; offsets [k / group][n][2] bf16,
   scale and offset of w = (code - 8) scale + offset; y [m][n] bf16. n is a multiple of 64, k of
   group, group of 32 and at most GROUP. few: scales meet sums, and spare has room for floats
   [k / group][m] behind x; a single row of up to SINGLE groups needs none. */
void product4(const uint16_t *x, uint16_t *spare, const uint8_t *q, const uint16_t *offsets,
              int few, long m, long n, long k, long group, uint16_t *y, int threads) {
  float single[SINGLE], *x_sums = !few ? 0 : spare ? (float *)(spare + m * k) : single;
  const long step = x_sums || k % GROUP ? group : GROUP; /* groups that are expanded at once */
  if (m > 1) arrange(x, m, k, step, spare);
  const uint16_t *rows = m > 1 ? spare : x; /* one row is arranged as it is */
  if (x_sums) sum_groups(x, m, k, group, x_sums);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (long first = 0; first < m; first += CHUNK)
    for (long row = 0; row < n; row += ROWS) {
      const long count = m - first < CHUNK ? m - first : CHUNK;
      float sums[CHUNK * ROWS];
      __m512i pairs[GROUP / 2 * 4];
      memset(sums, 0, count * ROWS * sizeof(float));
      for (long start = 0; start < k; start += step) {
        const uint8_t *codes = q + (row / ROWS * k + start) * 32;
        const uint16_t *own = rows + start * m + first * step;
        for (long at = 0; at < step; at += group) {
          const uint16_t *here = offsets + ((start + at) / group * n + row) * 2;
          __m512 scale[4], more[4];
          for (int c = 0; c < 4; c++) {
            const __m512i both = _mm512_loadu_si512(here + 32 * c);
            more[c] = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
            scale[c] = (__m512)_mm512_slli_epi32(both, 16);
            _mm_prefetch((const char *)(here + n * 2 + 32 * c), _MM_HINT_T0); /* no neighbours of these */
          }
          if (x_sums) {
            const After after = {scale, more, x_sums + start / group * m + first, 0, 0, 0};
            multiply4_all(count, own, group, codes, group, &after, sums);
          } else {
            for (int c = 0; c < 4; c++) more[c] = _mm512_fnmadd_ps(_mm512_set1_ps(136), scale[c], more[c]);
            expand4(codes + at * 32, group, scale, more, pairs + at / 2 * 4);
          }
        }
        if (x_sums) continue;
        const After after = {0, 0, 0, 0, codes + step * 32, step * 32};
        multiply_all(PAIRS, count, (const uint8_t *)own, 2 * step, pairs, step / 2, &after, sums);
      }
      store(count, sums, y + first * n + row, n);
    }
}

/* x [m][k] bf16; q [n / 64][k][64] bytes; scale and shift [k / group][n], w = (code + shift) scale,
   shift may be null; y [m][n] bf16; spare as above. n is a multiple of 64, k of group, group of 2. */
void product8(const uint16_t *x, uint16_t *spare, const int8_t *q, const float *scale,
              const float *shift, long m, long n, long k, long group, uint16_t *y, int threads) {
  arrange(x, m, k, group, spare);
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (long first = 0; first < m; first += CHUNK)
    for (long row = 0; row < n; row += ROWS) {
      const long count = m - first < CHUNK ? m - first : CHUNK;
      float sums[CHUNK * ROWS];
      __m512i pairs[GROUP / 2 * 4];
      memset(sums, 0, count * ROWS * sizeof(float));
      for (long start = 0, step; start < k; start += step) {
        const long at = start / group * n + row;
        const int8_t *codes = q + (row / ROWS * k + start) * ROWS;
        __m512 scales[4], shifts[4];
        step = step_at(start, group, GROUP);
        const After after = {scales, 0, 0, 0, codes + step * ROWS, step * ROWS};
        for (int c = 0; c < 4; c++) {
          scales[c] = _mm512_loadu_ps(scale + at + 16 * c);
          shifts[c] = shift ? _mm512_loadu_ps(shift + at + 16 * c) : _mm512_setzero_ps();
        }
        expand8(codes, step, shifts, pairs);
        multiply_all(PAIRS, count, (const uint8_t *)(spare + start * m + first * step), 2 * step,
                     pairs, step / 2, &after, sums);
      }
      store(count, sums, y + first * n + row, n);
    }
}
