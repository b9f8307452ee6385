/* Inputs rounded to E4M3 numbers or to SDR integers, both exact in bf16, with a scale per row: what
   table_cpu.c multiplies. Compiled by kernels/native.py. */
#include "inputs.h"

typedef struct { /* of SDR: whole numbers to peak, cut to codes low to top times 2^shift */
  float peak, low, top;
  long bits, group;
} Cut;

/* scales of rows of x [m][k]: peak over most, 1 over most if all is 0 */
static void row_scales(const void *x, long type, long m, long k, float most, const Kept *kept,
                       long per_tensor, float *scale) {
#pragma omp for schedule(static)
  for (long i = 0; i < m; i++) {
    float low, high;
    range(x, type, i, k, 0, &low, &high);
    scale[i] = -low > high ? -low : high; /* NaN: both are */
  }
#pragma omp single
  {
    if (per_tensor) shared(scale, m, 1);
    for (long i = 0; i < m; i++) scale[i] = stored((scale[i] == 0 ? 1 : scale[i]) / most, kept);
  }
}

INLINE void write(__m512 v, long left, uint16_t *to) {
  _mm256_mask_storeu_epi16(to, first_of(left), (__m256i)_mm512_cvtneps_pbh(v));
}

/* the nearest E4M3 number, halves to even; v within its range */
INLINE __m512 e4m3(__m512 v) {
  const __m512i sign = _mm512_and_si512((__m512i)v, _mm512_set1_epi32((int)0x80000000));
  const __m512i size = _mm512_andnot_si512(_mm512_set1_epi32((int)0x80000000), (__m512i)v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(size, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i normal = _mm512_and_si512(up, _mm512_set1_epi32((int)0xfff00000)); /* 3 bits stay */
  const __m512 shift = _mm512_set1_ps(16384); /* a unit there is 2^-9, that of subnormals */
  const __m512 small = _mm512_sub_ps(_mm512_add_ps((__m512)size, shift), shift);
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)size, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
  return (__m512)_mm512_or_si512(sign, _mm512_mask_mov_epi32(normal, below, (__m512i)small));
}

/* x [m][k] bf16 or fp32 -> values [m][k] bf16 and scale [m] */
void round_e4m3(const void *x, long type, long m, long k, const Kept *kept, long per_tensor,
                uint16_t *values, float *scale, int threads) {
  const __m512 most = _mm512_set1_ps(448), least = _mm512_set1_ps(-448);
#pragma omp parallel num_threads(threads)
  {
    row_scales(x, type, m, k, 448, kept, per_tensor, scale);
#pragma omp for schedule(static)
    for (long i = 0; i < m; i++)
      for (long j = 0; j < k; j += 16) {
        const __m512 v = _mm512_div_ps(read(x, type, i * k + j, k - j, 0), _mm512_set1_ps(scale[i]));
        write(e4m3(_mm512_min_ps(_mm512_max_ps(v, least), most)), k - j, values + i * k + j);
      }
  }
}

/* 16 whole numbers of x */
INLINE __m512 whole(const void *x, long type, long at, long left, __m512 scale, float peak) {
  const __m512 v = _mm512_div_ps(read(x, type, at, left, 0), scale);
  const __m512 q = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_min_ps(_mm512_max_ps(q, _mm512_set1_ps(-peak)), _mm512_set1_ps(peak));
}

/* the same in SDR: kernels/sdr/activations.py */
void round_sdr(const void *x, long type, long m, long k, const Cut *cut, const Kept *kept,
               long per_tensor, uint16_t *values, float *scale, int threads) {
  const __m512 low = _mm512_set1_ps(cut->low), top = _mm512_set1_ps(cut->top);
#pragma omp parallel num_threads(threads)
  {
    row_scales(x, type, m, k, cut->peak, kept, per_tensor, scale);
#pragma omp for schedule(static)
    for (long i = 0; i < m; i++)
      for (long start = 0; start < k; start += cut->group) {
        const long stop = start + cut->group < k ? start + cut->group : k;
        const __m512 by = _mm512_set1_ps(scale[i]);
        __m512 most = _mm512_setzero_ps();
        for (long j = start; j < stop; j += 16)
          most = _mm512_max_ps(most, _mm512_abs_ps(whole(x, type, i * k + j, stop - j, by, cut->peak)));
        const unsigned peak = (unsigned)_mm512_reduce_max_ps(most);
        const long width = peak ? 32 - __builtin_clz(peak) : 0;
        const long shift = width + 1 > cut->bits ? width + 1 - cut->bits : 0;
        const __m512 up = _mm512_set1_ps((float)(1 << shift)), down = _mm512_set1_ps(1.0f / (float)(1 << shift));
        for (long j = start; j < stop; j += 16) {
          const __m512 v = _mm512_mul_ps(whole(x, type, i * k + j, stop - j, by, cut->peak), down);
          const __m512 c = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          write(_mm512_mul_ps(_mm512_min_ps(_mm512_max_ps(c, low), top), up), stop - j, values + i * k + j);
        }
      }
  }
}
