/* y = act(x) W^T on the CPU, both in whole numbers of a byte: x rounded row by row to unsigned
   bytes, W in signed ones or in half bytes, sums of up to 512 channels exact in 32 bits, then fp32.
   Compiled by kernels/native.py; weights and grids are packed by byte_cpu.py. */
#include "inputs.h"
#include "product.h"

#define STEP 512 /* most channels summed in 32 bits: such sums are below 2^24, exact in fp32 */
#define HIGH 128 /* bytes of x are so much above their whole number */

typedef struct {
  const uint8_t *q;     /* [n / 64][k / 4][64][4] signed bytes; of 4 bits [n / 64][k / 8][64][4],
                           code + 8 of channel 8 j + i and 8 j + 4 + i in byte i's halves */
  const float *scale;   /* [groups][n] w = q scale + offset */
  const float *offset;  /* [groups][n], may be null */
  const float *row_sum; /* [n] sum of w, null if x has no zero point */
  long n, k, group, bits;
} Weights;

typedef struct { /* the grid of x: kernels/integers.py */
  const uint8_t *keep; /* [k] 0: such a channel is 0; may be null */
  float top, middle, steps; /* codes 0 to top; steps 0: asymmetric, else peak / scale */
  Kept kept;                /* how scales are stored */
  long per_tensor, inverse; /* inverse: x times steps / peak, not x / scale */
} Grid;

typedef struct { /* x rounded */
  uint8_t *codes; /* [steps][m][step] */
  float *scale;   /* [m] */
  float *zero;    /* [m] less the middle */
  float *sums;    /* [groups][m] sums of groups, null if W has no offset */
} Rounded;

/* x [m][k] -> codes, scale and zero point of every row, sums of its groups */
static void round_rows(const void *x, long type, const Grid *grid, long m, long k, long padded,
                       long group, const Rounded *to) {
#pragma omp for schedule(static)
  for (long i = 0; i < m; i++) range(x, type, i, k, grid->keep, to->zero + i, to->scale + i);
  if (grid->per_tensor) {
#pragma omp single
    {
      shared(to->zero, m, -1);
      shared(to->scale, m, 1);
    }
  }
#pragma omp for schedule(static)
  for (long i = 0; i < m; i++) {
    float low = to->zero[i], high = to->scale[i], scale, zero, times = 0;
    if (low == 0 && high == 0) low = -1, high = 1;
    if (grid->steps != 0) {
      const float peak = -low > high || low != low ? -low : high;
      scale = grid->inverse ? peak / grid->steps : stored(peak / grid->steps, &grid->kept);
      times = grid->steps / peak;
      zero = grid->middle;
    } else {
      scale = stored((high - low) / grid->top, &grid->kept);
      zero = __builtin_roundevenf(-low / scale);
      zero = zero < 0 ? 0 : zero > grid->top ? grid->top : zero;
    }
    to->scale[i] = scale;
    to->zero[i] = zero - grid->middle;
    const __m512 by = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(times), at = _mm512_set1_ps(zero);
    const __m512 top = _mm512_set1_ps(grid->top);
    const __m512i middle = _mm512_set1_epi32((int)grid->middle);
    const __m512i lift = _mm512_sub_epi32(_mm512_set1_epi32(HIGH), middle);
    uint8_t *codes = to->codes;
    float *sums = to->sums ? to->sums + i : 0;
    for (long start = 0, step; start < padded; start += step, codes += m * step) {
      step = step_at(start, group, STEP);
      if (sums && start % group == 0) *sums = 0;
      for (long j = start; j < start + step; j += 16) {
        const long inside = start + step - j, left = k - j < 0 ? 0 : k - j < inside ? k - j : inside;
        const __m512 v = read(x, type, i * k + j, left, grid->keep ? grid->keep + j : 0);
        __m512 c = grid->inverse ? _mm512_mul_ps(v, inverse) : _mm512_div_ps(v, by);
        c = _mm512_add_ps(_mm512_roundscale_ps(c, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), at);
        c = _mm512_min_ps(_mm512_max_ps(c, _mm512_setzero_ps()), top);
        const __m512i whole = _mm512_cvtps_epi32(c);
        _mm_mask_storeu_epi8(codes + i * step + j - start, first_of(inside),
                             _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, lift)));
        if (sums)
          *sums += (float)_mm512_mask_reduce_add_epi32(first_of(left), _mm512_sub_epi32(whole, middle));
      }
      if (sums && (start + step) % group == 0) sums += m;
    }
  }
}

/* half bytes of channels [channels / 8][4][64] -> signed bytes [channels / 4][4][64] */
INLINE void whole4(const uint8_t *codes, long channels, __m512i *to) {
  const __m512i low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(8);
  for (long j = 0; j < channels; j += 8, codes += 256, to += 8)
    for (int c = 0; c < 4; c++) {
      const __m512i both = _mm512_loadu_si512(codes + 64 * c);
      to[c] = _mm512_sub_epi8(_mm512_and_si512(both, low), middle);
      to[4 + c] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), middle);
    }
}

/* what x's bytes are too high by, times W [steps][4][64] -> sums to begin with */
INLINE void lowered(const __m512i *w, long steps, __m512i *start) {
  const __m512i high = _mm512_set1_epi8((char)HIGH);
  for (int c = 0; c < 4; c++) start[c] = _mm512_setzero_si512();
  for (long s = 0; s < steps; s++, w += 4)
    for (int c = 0; c < 4; c++) start[c] = _mm512_dpbusd_epi32(start[c], high, w[c]);
  for (int c = 0; c < 4; c++) start[c] = _mm512_sub_epi32(_mm512_setzero_si512(), start[c]);
}

/* sums of row i of x -> y [m][n] in x's type, bf16 or fp32 */
INLINE void store(const Weights *w, const Rounded *x, const float *beside, long type, long row, long i, long n,
                  const float *sums, void *y) {
  const __m512 scale = _mm512_set1_ps(x->scale[i]), zero = _mm512_set1_ps(-x->zero[i]);
  for (long c = row; c < row + ROWS && c < n; c += 16) {
    const __mmask16 there = first_of(n - c);
    __m512 all = _mm512_loadu_ps(sums + c - row);
    if (w->row_sum) all = _mm512_fmadd_ps(zero, _mm512_loadu_ps(w->row_sum + c), all);
    all = _mm512_mul_ps(all, scale);
    if (beside) all = _mm512_add_ps(all, _mm512_maskz_loadu_ps(there, beside + i * n + c));
    if (type == FP32) _mm512_mask_storeu_ps((float *)y + i * n + c, there, all);
    else _mm256_mask_storeu_epi16((uint16_t *)y + i * n + c, there, (__m256i)_mm512_cvtneps_pbh(all));
  }
}

/* x [m][k] bf16 or fp32, `rounded` room for what it becomes, beside [m][n] what y has more, may
   be null -> y [m][n] in x's type. w->n is a multiple of 64, w->k the padded k, a
   multiple of the group; group a multiple of 4, of 8 for 4 bits. */
void byte_product(const Weights *w, const Grid *grid, const Rounded *rounded, const void *x, long type,
                  const float *beside, long m, long n, long k, void *y, int threads) {
#pragma omp parallel num_threads(threads)
  {
    round_rows(x, type, grid, m, k, w->k, w->group, rounded);
#pragma omp for collapse(2) schedule(static)
    for (long first = 0; first < m; first += CHUNK)
      for (long row = 0; row < w->n; row += ROWS) {
        const long count = m - first < CHUNK ? m - first : CHUNK;
        float sums[CHUNK * ROWS];
        __m512i wide[STEP / 4 * 4];
        memset(sums, 0, count * ROWS * sizeof(float));
        for (long start = 0, step; start < w->k; start += step) {
          const long group = start / w->group, at = group * w->n + row;
          const uint8_t *q = w->q + (row * w->k + start * ROWS) * w->bits / 8;
          __m512 scale[4], offset[4];
          step = step_at(start, w->group, STEP);
          for (int c = 0; c < 4; c++) scale[c] = _mm512_loadu_ps(w->scale + at + 16 * c);
          __m512i start32[4];
          After after = {scale, 0, 0, start32, q + step * ROWS * w->bits / 8, step * ROWS * w->bits / 8};
          if (w->offset && (start + step) % w->group == 0) { /* once a group */
            for (int c = 0; c < 4; c++) offset[c] = _mm512_loadu_ps(w->offset + at + 16 * c);
            after.offset = offset;
            after.x_sums = rounded->sums + group * m + first;
          }
          if (w->bits == 4) whole4(q, step, wide);
          const __m512i *whole = w->bits == 4 ? wide : (const __m512i *)q;
          lowered(whole, step / 4, start32);
          multiply_all(BYTES, count, rounded->codes + start * m + first * step, step, whole, step / 4,
                       &after, sums);
        }
        for (long i = 0; i < count; i++)
          store(w, rounded, beside, type, row, first + i, n, sums + i * ROWS, y);
      }
  }
}
