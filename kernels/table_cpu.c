/* y = x W^T on the CPU: x bf16, every weight looked up in a table of bf16 numbers by its code.

   32 input channels of a row of W fill a register of bf16; one byte permute of words (vpermw)
   looks them up, by the low five bits of words whose other bits are the codes of later channels:
   a code costs a shift and a permute, no mask. Tables are made for a row and a group of channels
   from what the format stores, in fp32, and rounded once. Few rows of x are multiplied at once;
   for more, 64 rows of W by 128 channels are expanded into the first-level cache, with pairs of
   channels turned into product.h's order. Compiled by kernels/native.py, once for each
   FORM of codes that is met; see table_cpu.py. */
#include "inputs.h"
#include "product.h"

enum { ABSENT = 3 };                                       /* a type of parameters: there are none */
enum { PLAIN, DOUBLE, SHIFT, BILEVEL, SUMS, BLOCKS, NONE, ZEROS }; /* what makes tables: table_cpu.py */
enum { WHOLE8 = 8, E4M3 = 9 };                             /* forms of codes that no table takes */
enum { KEPT4 = 14, KEPT_BF16 = 15, KEPT_FP16 = 16, KEPT_FP32 = 17 }; /* of pruned rows: codes, numbers */
#define PRUNED (FORM >= KEPT4)

#define STEP 128 /* channels expanded at once for many rows of x */
#define AHEAD 2  /* blocks of a row fetched before they are needed */
#define FEW 2    /* rows of x multiplied without expanding W in memory */

typedef struct {
  const uint8_t *words;          /* [n][padded channels] codes, in blocks as layout says; of pruned
                                    rows those that are kept, row after row, with 64 bytes to spare */
  const uint32_t *where;         /* [n][padded / 32] bits: which channels a pruned row keeps */
  const int64_t *starts;         /* [n + 1] its first */
  const void *scale, *more, *low; /* parameters of a kind */
  const void *fourth;
  const float *levels;           /* [32] */
  const float *row_scale;        /* [n], or [1] if row_step is 0; may be null */
  const float *token_scale;      /* [m], may be null */
  const int32_t *order;          /* [padded] which channel of x is meant, k: none; may be null */
  const int32_t *ptr;            /* [tiles + 1] outliers of ROWS rows by STEP channels; may be null */
  const uint16_t *place;         /* row in the tile times STEP, plus channel */
  const uint16_t *delta;         /* fp16, what is added */
  int32_t *groups_at;            /* [padded / STEP][10] room: which groups channels belong to */
  long n, k, padded, row_bytes, group, groups, row_step, extra;
} Weights;

/* ---- parameters: scale and offset of groups, or tables of sums -------------------------------- */

INLINE float half(uint16_t bits) { return _cvtsh_ss(bits); }

INLINE float number(const void *from, long at, long type) {
  if (type == FP32) return ((const float *)from)[at];
  const uint16_t bits = ((const uint16_t *)from)[at];
  if (type == FP16) return half(bits);
  const uint32_t wide = (uint32_t)bits << 16;
  float found;
  memcpy(&found, &wide, 4);
  return found;
}

/* 16 numbers from `at` on, 0 where none are */
INLINE __m512 numbers(const void *from, long at, long type, __mmask16 there) {
  if (type == FP32) return _mm512_maskz_loadu_ps(there, (const float *)from + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(there, (const uint16_t *)from + at);
  return type == FP16 ? _mm512_cvtph_ps(bits) : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

INLINE __m512i bytes_at(const void *from, long at, __mmask16 there) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, (const uint8_t *)from + at));
}

typedef struct {
  __m512 scale, less;
} Sixteen;

/* scale and less of 16 groups of a row; w = level scale + less */
INLINE Sixteen decode(const Weights *w, long row, long first, __mmask16 there) {
  const long at = row * w->groups + first;
  __m512 scale = _mm512_setzero_ps(), less = scale;
  switch (KIND) {
    case PLAIN:
      scale = numbers(w->scale, at, TYPE, there);
      if (MORE_TYPE != ABSENT) less = numbers(w->more, at, MORE_TYPE, there);
      break;
    case ZEROS: /* whole zero points, in bytes */
      scale = numbers(w->scale, at, TYPE, there);
      less = _mm512_cvtepi32_ps(bytes_at(w->more, at, there));
      less = _mm512_fnmadd_ps(scale, less, _mm512_setzero_ps());
      break;
    case SHIFT: { /* powers of two, two to a byte */
      const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m512i odd = _mm512_add_epi32(lane, _mm512_set1_epi32(first & 1));
      const __m512i pairs = bytes_at(w->scale, row * ((w->groups + 1) / 2) + first / 2, there);
      const __m512i both = _mm512_permutexvar_epi32(_mm512_srli_epi32(odd, 1), pairs);
      const __m512i by = _mm512_slli_epi32(_mm512_and_si512(odd, _mm512_set1_epi32(1)), 2);
      const __m512i shift = _mm512_and_si512(_mm512_srlv_epi32(both, by), _mm512_set1_epi32(15));
      scale = _mm512_cvtepi32_ps(_mm512_sllv_epi32(_mm512_set1_epi32(1), shift));
      break;
    }
    case BILEVEL: { /* two codes of 4 bits in a byte; ends [rows in sets of 2^extra][4][groups] */
      const __m512i code = bytes_at(w->scale, at, there);
      const long end = (row >> w->extra) * 4 * w->groups + first;
      const __m512 low = _mm512_cvtepi32_ps(_mm512_and_si512(code, _mm512_set1_epi32(15)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_srli_epi32(code, 4));
      scale = _mm512_fmadd_ps(low, numbers(w->more, end + w->groups, MORE_TYPE, there),
                              numbers(w->more, end, MORE_TYPE, there));
      less = _mm512_fmadd_ps(high, numbers(w->more, end + 3 * w->groups, MORE_TYPE, there),
                             numbers(w->more, end + 2 * w->groups, MORE_TYPE, there));
      less = _mm512_fnmadd_ps(scale, less, _mm512_setzero_ps());
      break;
    }
    case BLOCKS: { /* GGUF: 2^extra sub-blocks share d and its offset, a step's all do; integers are their own */
      const __m512i whole = bytes_at(w->low, at, there);
      const __m512i own = TYPE == 1 ? _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24)
                                    : _mm512_sub_epi32(whole, _mm512_set1_epi32(TYPE));
      const float d = half(((const uint16_t *)w->scale)[at >> w->extra]);
      scale = _mm512_mul_ps(_mm512_set1_ps(d), _mm512_cvtepi32_ps(own));
      if (MORE_TYPE != ABSENT) {
        const float zero_d = -half(((const uint16_t *)w->more)[at >> w->extra]);
        less = _mm512_mul_ps(_mm512_set1_ps(zero_d), _mm512_cvtepi32_ps(bytes_at(w->fourth, at, there)));
      }
      break;
    }
  }
  const Sixteen both = {scale, less};
  return both;
}

/* a scale of 8 bits: low[code] second + offset; 256 of them share a second */
INLINE float doubled(const Weights *w, long at) {
  const float *second = w->more, *level = w->low;
  const long block = at / 256 < w->extra ? at / 256 : w->extra - 1;
  const float s = level[((const uint8_t *)w->scale)[at]] * second[block] + *(const float *)w->fourth;
  return s > 0 ? s : 0;
}

/* the 16 levels of one group of a row that are sums of +- its scales */
INLINE __m512 sums_of(const Weights *w, long row, long group) {
  const long at = row * w->groups + group;
  __m512 t = _mm512_set1_ps(MORE_TYPE == ABSENT ? 0 : number(w->more, at, MORE_TYPE));
  for (long b = 0; b < FORM; b++) {
    const __m512 alpha = _mm512_set1_ps(number(w->scale, at * FORM + b, TYPE));
    static const __mmask16 one[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00}; /* codes with bit b */
    t = _mm512_add_ps(t, _mm512_mask_sub_ps(alpha, (__mmask16)~one[b], _mm512_setzero_ps(), alpha));
  }
  return t;
}

INLINE __m512i joined(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

typedef struct { /* of STEP channels */
  int32_t first, there, lane[STEP / 16]; /* first group; bits of 16 that there are; of every 16 channels, less first */
} Groups;

static void find_groups(const Weights *w, Groups *to) {
  long g = 0, left = w->group;
  for (long start = 0; start < w->padded; start += STEP, to++)
    for (int i = 0; i < STEP / 16; i++) {
      if (!i) to->first = (int32_t)g, to->there = first_of(w->groups - g);
      to->lane[i] = (int32_t)g - to->first;
      left -= 16;
      if (!left && g < w->groups - 1) left = w->group, g++; /* past the last, x is 0 */
    }
}

/* levels of group `lane` of sixteen, 16 of them from `at` on */
INLINE __m512 levels_of(const Weights *w, long row, long first, const Sixteen *own, int32_t lane, long at) {
  if (KIND == SUMS) return sums_of(w, row, first + lane);
  const __m512i all = _mm512_set1_epi32(lane);
  const __m512 level = _mm512_loadu_ps(w->levels + at);
  if (KIND == DOUBLE)
    return _mm512_mul_ps(level, _mm512_set1_ps(doubled(w, row * w->groups + first + lane)));
  const __m512 scale = _mm512_permutexvar_ps(all, own->scale);
  if (MORE_TYPE == ABSENT && KIND != ZEROS) return _mm512_mul_ps(level, scale);
  return _mm512_fmadd_ps(level, scale, _mm512_permutexvar_ps(all, own->less));
}

/* What the chunks of 32 channels of a step of a row need: tables for channels 0-15 and 16-31 of each,
   or, of forms without a table, scales of the two. Groups are multiples of 16. */
INLINE void tables(const Weights *w, long row, const Groups *groups, __m512i *out) {
  if (KIND == NONE) return;
  const long first = groups->first;
  const int32_t *lane = groups->lane;
  if (KIND == SHIFT && w->group == 16) { /* a byte is a chunk's: shifts add to exponents */
    const __m512 plain = _mm512_loadu_ps(w->levels);
    const __m512i levels = joined(plain, plain), half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __mmask32 some = _mm512_test_epi16_mask(levels, levels);
    const int8_t *shifts = (const int8_t *)w->scale + row * ((w->groups + 1) / 2) + first / 2;
    for (int c = 0; c < STEP / 32; c++) {
      const __m512i own = _mm512_srlv_epi16(_mm512_set1_epi8(shifts[lane[2 * c] / 2]), half);
      const __m512i up = _mm512_slli_epi16(_mm512_and_si512(own, _mm512_set1_epi16(15)), 7);
      out[c] = _mm512_mask_add_epi16(levels, some, levels, up);
    }
    return;
  }
  const Sixteen own = decode(w, row, first, (__mmask16)groups->there);
  for (int c = 0; c < STEP / 32; c++) {
    const int32_t low = lane[2 * c], high = lane[2 * c + 1];
    if (FORM == WHOLE8 || FORM == 6 || FORM == E4M3) {
      const __m512i lanes = _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
      out[c] = (__m512i)_mm512_permutexvar_ps(lanes, own.scale);
    } else if (c && lane[2 * c - 2] == high) {
      out[c] = out[c - 1];
    } else {
      const __m512 t = levels_of(w, row, first, &own, low, 0);
      if (FORM == 5) out[c] = joined(t, levels_of(w, row, first, &own, low, 16));
      else out[c] = joined(t, high == low ? t : levels_of(w, row, first, &own, high, 0));
    }
  }
}

/* ---- codes to weights ------------------------------------------------------------------------ */

INLINE __m512i from(const uint8_t *at) { return _mm512_loadu_si512(at); }

INLINE __m512i chosen(const int mask, __m512i a, __m512i b) { /* a where mask has ones, else b */
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16((short)mask), a, b, 0xca);
}

/* 32 whole numbers in bf16 times scales of pairs of them; the order stays */
INLINE __m512i scaled(__m512i v, __m512 scale) {
  const __m512 even = _mm512_mul_ps((__m512)_mm512_slli_epi32(v, 16), scale);
  const __m512 odd = _mm512_mul_ps((__m512)_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)), scale);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, joined(even, odd));
}

/* 32 successive whole numbers in bf16 */
INLINE __m512i below(int first) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  return joined(_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_set1_epi32(16))));
}

/* 32 codes, 16 and 16, less the middle, times scales of the two halves */
INLINE __m512i whole(__m512i first, __m512i second, int middle, __m512 scale) {
  const __m512i by = _mm512_set1_epi32(middle);
  const __m512 a = _mm512_shuffle_f32x4(scale, scale, 0x00), b = _mm512_shuffle_f32x4(scale, scale, 0xaa);
  return joined(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(first, by)), a),
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(second, by)), b));
}

/* 32 e4m3 numbers in bf16: 4 exponent bits move, the bias becomes 127; subnormals by a table */
INLINE __m512i from_e4m3(__m512i c) {
  const __m512i small = _mm512_castsi128_si512(_mm_set_epi16(
      0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0)); /* 0 to 7 times 2^-9 */
  const __m512i size = _mm512_and_si512(c, _mm512_set1_epi16(0x7f));
  __m512i v = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
  v = _mm512_mask_permutexvar_epi16(v, _mm512_testn_epi16_mask(c, _mm512_set1_epi16(0x78)), c, small);
  return chosen(0x7fff, v, _mm512_slli_epi16(c, 8));
}

/* Chunk j (a literal) of the block at `at`: 32 bf16 weights. aux: its tables or scales.
   The second plane of 3, 5 and 6 bits is turned so that its bits come to their places. */
INLINE __m512i chunk(const int form, const uint8_t *at, const int j, __m512i aux) {
  const __m512i six[2] = {below(-32), below(0)}; /* whole numbers that 6 bits are codes of */
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
#define SHIFTED(offset, bits, f) _mm512_srli_epi16(from(at + (offset)), (bits) * (f))
#define TURNED(offset, by) _mm512_shrdi_epi16(from(at + (offset)), from(at + (offset)), ((by) + 16) % 16)
  switch (form) {
    case 1: return _mm512_permutexvar_epi16(chosen(15, SHIFTED(0, 1, j), half), aux);
    case 2: return _mm512_permutexvar_epi16(chosen(15, SHIFTED(0, 2, j), half), aux);
    case 3: return _mm512_permutexvar_epi16(
          chosen(15, chosen(3, SHIFTED(64 * (j / 8), 2, j % 8), TURNED(128, j - 2)), half), aux);
    case 4: return _mm512_permutexvar_epi16(chosen(15, SHIFTED(0, 4, j), half), aux);
    case 5: return _mm512_permutexvar_epi16(
          chosen(15, SHIFTED(64 * (j / 4), 4, j % 4), TURNED(256, j - 4)), aux);
    case 6: {
      const __m512i code = chosen(15, SHIFTED(64 * (j / 4), 4, j % 4), TURNED(128, 2 * j - 4));
      return scaled(_mm512_permutex2var_epi16(six[0], code, six[1]), (__m512)aux);
    }
    case WHOLE8: {
      const __m128i *own = (const __m128i *)(at + 32 * j);
      return whole(_mm512_cvtepu8_epi32(_mm_loadu_si128(own)), _mm512_cvtepu8_epi32(_mm_loadu_si128(own + 1)),
                   128, (__m512)aux);
    }
    default: return from_e4m3(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(at + 32 * j))));
  }
}

/* fp16 numbers rounded to bf16, halves to even: the exponent moves; where one is subnormal, by fp32,
   whose conversions take twice as long as all the rest */
INLINE __m512i from_fp16(__m512i v) {
  const __m512i one = _mm512_set1_epi16(1), size = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
  if (_mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, one), _mm512_set1_epi16(0x3ff)))
    return joined(_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1)));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(size, 3), one);
  const __m512i near = _mm512_srli_epi16(_mm512_add_epi16(size, _mm512_add_epi16(odd, _mm512_set1_epi16(3))), 3);
  const __mmask32 some = _mm512_test_epi16_mask(size, size);
  return chosen(0x7fff, _mm512_mask_add_epi16(near, some, near, _mm512_set1_epi16((127 - 15) << 7)), v);
}

INLINE long kept_bytes(const int form, int64_t count) {
  return form == KEPT4 ? count / 2 : form == KEPT_FP32 ? count * 4 : count * 2;
}

/* in a register: expanding from memory is many times slower */
INLINE __m512i loaded(const uint8_t *at) {
  __m512i v = from(at);
  __asm__("" : "+v"(v));
  return v;
}

/* The next 32 channels of a pruned row, `at` counts what it has kept before. */
INLINE __m512i pruned(const int form, const Weights *w, int64_t *at, uint32_t where, __m512i table) {
  const uint8_t *from_here = w->words + kept_bytes(form, *at);
  const int odd = *at & 1;
  *at += __builtin_popcount(where);
  if (form == KEPT4) { /* two codes to a byte; a word has those of a byte and of the next */
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from_here));
    const __m256i next = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(from_here + 1)));
    const __m256i both = _mm256_srl_epi16(_mm256_or_si256(bytes, _mm256_slli_epi16(next, 8)), _mm_cvtsi32_si128(4 * odd));
    const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7,
                                           6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    __m512i code = _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(both));
    code = _mm512_srlv_epi16(code, _mm512_set1_epi32(4 << 16));
    code = chosen(15, _mm512_maskz_expand_epi16(where, code), half);
    return _mm512_maskz_permutexvar_epi16(where, code, table);
  }
  if (form == KEPT_FP32) {
    const __m512 low = _mm512_maskz_expand_ps((__mmask16)where, (__m512)loaded(from_here));
    const uint8_t *rest = from_here + 4 * __builtin_popcount(where & 0xffff);
    return joined(low, _mm512_maskz_expand_ps((__mmask16)(where >> 16), (__m512)loaded(rest)));
  }
  const __m512i v = _mm512_maskz_expand_epi16(where, loaded(from_here));
  return form == KEPT_BF16 ? v : from_fp16(v);
}

/* chunks and bytes of a block; every form has its own */
INLINE int chunks_of(const int form) {
  return form == 1 || form == 3 || form == 5 ? 16 : form == 2 || form == 6 ? 8 : 4;
}
INLINE int bytes_of(const int form) {
  return form == 1 ? 64 : form == 2 ? 64 : form == 3 ? 192 : form == 4 ? 64 : form == 5 ? 320 : form == 6 ? 192 : 128;
}

/* ---- few rows of x --------------------------------------------------------------------------- */

#define FOUR(DO, j) DO(j) DO((j) + 1) DO((j) + 2) DO((j) + 3)

/* y [count] of one row of W; x [count][padded] */
INLINE void one_row(const Weights *w, const int form, const int scaling, const int count, long row,
                    const uint16_t *x, float *y) {
  enum { APART = 4 }; /* sums of a row of x, so that one need not wait for another */
  const int per = chunks_of(form);
  const Groups *groups = (const Groups *)w->groups_at;
  __m512 sum[FEW * APART];
  __m512i aux[16] = {0};
#pragma GCC unroll 8
  for (int i = 0; i < FEW * APART; i++) sum[i] = _mm512_setzero_ps();
  const uint8_t *at = w->words + row * w->row_bytes;
  const uint32_t *where = PRUNED ? w->where + row * (w->padded / 32) : 0;
  int64_t kept = PRUNED ? w->starts[row] : 0;
  for (long start = 0; start < w->padded; start += 32 * per, at += bytes_of(form)) {
    for (int c = 0; c < per; c += STEP / 32) tables(w, row, groups++, aux + c);
#define ADD(j)                                                                                 \
  {                                                                                            \
    __m512i v = PRUNED ? pruned(form, w, &kept, where[start / 32 + (j)], aux[j]) : chunk(form, at, (j), aux[j]); \
    if (scaling) v = scaled(v, (__m512)aux[j]);                                                \
    _Pragma("GCC unroll 2") for (int i = 0; i < count; i++) {                                  \
      const __m512bh own = (__m512bh)_mm512_loadu_si512(x + start + i * w->padded + 32 * (j)); \
      sum[i * APART + (j) % APART] = _mm512_dpbf16_ps(sum[i * APART + (j) % APART], (__m512bh)v, own); \
    }                                                                                          \
  }
    FOUR(ADD, 0)
    if (per > 4) { FOUR(ADD, 4) }
    if (per > 8) { FOUR(ADD, 8) FOUR(ADD, 12) }
  }
#pragma GCC unroll 2
  for (int i = 0; i < count; i++) {
    __m512 all = sum[i * APART];
#pragma GCC unroll 3
    for (int j = 1; j < APART; j++) all = _mm512_add_ps(all, sum[i * APART + j]);
    y[i] = _mm512_reduce_add_ps(all);
  }
}

INLINE float wide(uint16_t bits) {
  const uint32_t b = (uint32_t)bits << 16;
  float v;
  memcpy(&v, &b, 4);
  return v;
}

INLINE uint16_t narrow(float v) {
  return (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v)), 0);
}

INLINE void few_rows(const Weights *w, const int form, const int scaling, const int count,
                     const uint16_t *x, uint16_t *y) {
#pragma omp for schedule(static)
  for (long row = 0; row < w->n; row += ROWS) {
    float sum[ROWS][FEW];
    const long rows = w->n - row < ROWS ? w->n - row : ROWS, steps = w->padded / STEP;
    for (long r = 0; r < rows; r++) one_row(w, form, scaling, count, row + r, x, sum[r]);
    for (long s = 0; w->ptr && s < steps; s++) {
      const int32_t *tile = w->ptr + row / ROWS * steps + s;
      for (int32_t p = tile[0]; p < tile[1]; p++)
        for (int i = 0; i < count; i++)
          sum[w->place[p] / STEP][i] += half(w->delta[p]) * wide(x[i * w->padded + s * STEP + w->place[p] % STEP]);
    }
    for (long r = 0; r < rows; r++) {
      const float scale = w->row_scale ? w->row_scale[(row + r) * w->row_step] : 1;
      for (int i = 0; i < count; i++)
        y[i * w->n + row + r] = narrow(sum[r][i] * scale * (w->token_scale ? w->token_scale[i] : 1));
    }
  }
}

INLINE void few(const Weights *w, const int form, const int scaling, long m, const uint16_t *x,
                uint16_t *y) {
  if (m == 1) few_rows(w, form, scaling, 1, x, y);
  if (m == 2) few_rows(w, form, scaling, 2, x, y);
}

/* ---- many rows of x -------------------------------------------------------------------------- */

/* v [16 rows][16 pairs] -> to [16 pairs][4][16 rows], of which this is one of the four */
INLINE void turned(const __m512i *v, __m512i *to) {
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd), d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    to[4 * j] = _mm512_shuffle_i32x4(a, b, 0x88);
    to[4 * (4 + j)] = _mm512_shuffle_i32x4(c, d, 0x88);
    to[4 * (8 + j)] = _mm512_shuffle_i32x4(a, b, 0xdd);
    to[4 * (12 + j)] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

/* [16 rows][chunks] -> their share of pairs [16 chunks][4][16] */
static __attribute__((noinline)) void turn(__m512i rows[16][STEP / 32], __m512i *pairs) {
  for (int j = 0; j < STEP / 32; j++) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) v[r] = rows[r][j];
    turned(v, pairs + j * 64);
  }
}

/* 64 rows of W by STEP channels -> pairs [64][4][16]; part (a literal): which chunks of a block */
INLINE void expand_part(const Weights *w, const int form, const int scaling, const int part,
                        long row, long start, int64_t *kept, __m512i *pairs) {
  const long block = start / (32 * chunks_of(form)) * bytes_of(form);
  const Groups *groups = (const Groups *)w->groups_at + start / STEP;
  __m512i held[16][STEP / 32]; /* tables, then weights */
  for (int r = 0; r < ROWS; r++) {
    const long own = row + r < w->n ? row + r : w->n - 1;
    const uint8_t *at = w->words + own * w->row_bytes + block;
    __m512i *aux = held[r % 16];
    const uint32_t *where = PRUNED ? w->where + (own * w->padded + start) / 32 : 0;
    if (part == 0 && !PRUNED) /* rows lie a power of two apart, where nothing fetches ahead by itself */
      for (int byte = 0; byte < bytes_of(form); byte += 64)
        _mm_prefetch((const char *)at + AHEAD * bytes_of(form) + byte, _MM_HINT_T1);
    if (PRUNED) { /* three steps ahead, half of them kept */
      const uint8_t *later = w->words + kept_bytes(form, kept[r] + 3 * STEP / 2);
      for (long byte = 0; byte < kept_bytes(form, STEP / 2) + 63; byte += 64) _mm_prefetch((const char *)later + byte, _MM_HINT_T0);
      _mm_prefetch((const char *)(where + 3 * STEP / 32), _MM_HINT_T0);
    }
    tables(w, own, groups, aux);
#define EXPAND(j)                                          \
  {                                                        \
    __m512i v = PRUNED ? pruned(form, w, kept + r, where[j], aux[j]) : chunk(form, at, 4 * part + (j), aux[j]); \
    aux[j] = scaling ? scaled(v, (__m512)aux[j]) : v;      \
  }
    FOUR(EXPAND, 0)
    if (r % 16 == 15) turn(held, pairs + r / 16);
  }
}

INLINE void expand(const Weights *w, const int form, const int scaling, long row, long start,
                   int64_t *kept, __m512i *pairs) {
  switch (start / STEP % (chunks_of(form) / 4)) {
    case 0: expand_part(w, form, scaling, 0, row, start, kept, pairs); break;
    case 1: if (chunks_of(form) > 4) expand_part(w, form, scaling, 1, row, start, kept, pairs); break;
    case 2: if (chunks_of(form) > 8) expand_part(w, form, scaling, 2, row, start, kept, pairs); break;
    case 3: if (chunks_of(form) > 8) expand_part(w, form, scaling, 3, row, start, kept, pairs); break;
  }
}

/* product.h's, compiled once and not for every form */
static __attribute__((noinline)) void multiply_step(long m, const uint16_t *x, const __m512i *pairs,
                                                    float *sums) {
  const After plain = {0};
  multiply_all(PAIRS, m, (const uint8_t *)x, STEP * sizeof *x, pairs, STEP / 2, &plain, sums);
}

/* x [steps][m][STEP] */
INLINE void many(const Weights *w, const int form, const int scaling, long m, const uint16_t *x,
                 uint16_t *y) {
#pragma omp for collapse(2) schedule(static)
  for (long first = 0; first < m; first += CHUNK)
    for (long row = 0; row < w->n; row += ROWS) {
      const long count = m - first < CHUNK ? m - first : CHUNK;
      float sums[CHUNK * ROWS];
      __m512i pairs[STEP / 2 * 4];
      int64_t kept[ROWS]; /* of pruned rows, before the step */
      for (long r = 0; PRUNED && r < ROWS; r++) kept[r] = w->starts[row + r < w->n ? row + r : w->n - 1];
      memset(sums, 0, count * ROWS * sizeof(float));
      for (long start = 0; start < w->padded; start += STEP) {
        expand(w, form, scaling, row, start, kept, pairs);
        const int32_t *tile = w->ptr ? w->ptr + (row / ROWS * w->padded + start) / STEP : 0;
        for (int32_t p = tile ? tile[0] : 0; tile && p < tile[1]; p++) {
          const long r = w->place[p] / STEP, c = w->place[p] % STEP;
          uint16_t *v = (uint16_t *)pairs + (c / 2 * ROWS + r) * 2 + c % 2;
          *v = narrow(wide(*v) + half(w->delta[p]));
        }
        multiply_step(count, x + start * m + first * STEP, pairs, sums);
      }
      for (int c = 0; c < ROWS && row + c < w->n; c += 16) {
        const __mmask16 there = w->n - row - c < 16 ? (__mmask16)((1 << (w->n - row - c)) - 1) : 0xffff;
        __m512 scale = _mm512_set1_ps(1);
        if (w->row_scale)
          scale = w->row_step ? _mm512_maskz_loadu_ps(there, w->row_scale + row + c) : _mm512_set1_ps(*w->row_scale);
        for (long i = 0; i < count; i++) {
          __m512 s = _mm512_mul_ps(_mm512_loadu_ps(sums + i * ROWS + c), scale);
          if (w->token_scale) s = _mm512_mul_ps(s, _mm512_set1_ps(w->token_scale[first + i]));
          _mm256_mask_storeu_epi16(y + (first + i) * w->n + row + c, there, (__m256i)_mm512_cvtneps_pbh(s));
        }
      }
    }
}

/* x [m][k] -> [padded / step][m][step], in `order`, 0 where there is no channel */
static __attribute__((noinline)) void arrange(const Weights *w, const uint16_t *x, long m, long step, uint16_t *to) {
#pragma omp for collapse(2) schedule(static)
  for (long start = 0; start < w->padded; start += step)
    for (long i = 0; i < m; i++) {
      uint16_t *here = to + start * m + i * step;
      const long there = w->k - start < 0 ? 0 : w->k - start < step ? w->k - start : step;
      if (w->order)
        for (long j = 0; j < step; j++) here[j] = w->order[start + j] < w->k ? x[i * w->k + w->order[start + j]] : 0;
      else {
        memcpy(here, x + i * w->k + start, there * 2);
        memset(here + there, 0, (step - there) * 2);
      }
    }
}

/* x [m][k] bf16, spare [m][padded] -> y [m][n] bf16 */
void table_product(const Weights *w, const uint16_t *x, uint16_t *spare, long m, uint16_t *y,
                   int threads) {
  const int direct = m <= FEW;
  find_groups(w, (Groups *)w->groups_at);
#pragma omp parallel num_threads(threads)
  {
    arrange(w, x, m, direct ? w->padded : STEP, spare);
#define RUN(scaling)                                \
  if (direct) few(w, FORM, scaling, m, spare, y);   \
  else many(w, FORM, scaling, m, spare, y);
    if (FORM == E4M3 && KIND != NONE) {
      RUN(FORM == E4M3)
    } else {
      RUN(0)
    }
  }
}
