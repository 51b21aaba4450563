/* Vectors of the machine's width in GNU C, for gcc and clang. */
#pragma once
#include <math.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define MIN_EXPONENT -80.0f

#if defined(__x86_64__)
/* Subnormal weights are too small to matter, and slow. */
#define FLUSH_SUBNORMALS unsigned int saved_csr = _mm_getcsr(); _mm_setcsr(saved_csr | 0x8040)
#define RESTORE_SUBNORMALS _mm_setcsr(saved_csr)
#else
#define FLUSH_SUBNORMALS
#define RESTORE_SUBNORMALS
#endif

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float a) { return a - (vf){0}; }

INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }

INLINE vf vmin(vf a, vf b) { return pick(a < b, a, b); }

/* Whether any lane of a comparison holds. */
INLINE int any_of(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int some = 0;
    for (int q = 0; q < LANES; ++q) some |= mask[q];
    return some;
#endif
}

INLINE vf vsqrt(vf a) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)a); /* the loop would go by half vectors through memory */
#endif
    for (int q = 0; q < LANES; ++q) a[q] = sqrtf(a[q]);
    return a;
}

/* False where either is NaN. */
INLINE int all_at_most(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ) == 0xffff;
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)) == 0xff;
#else
    const vi m = a <= b;
    int every = -1;
    for (int q = 0; q < LANES; ++q) every &= m[q];
    return every;
#endif
}

/* Natural logarithm of a positive normal number, at most 0.06 too large, never too small. */
INLINE vf log_bound(vf x) {
    const vi bits = (vi)x;
    const vf exponent = __builtin_convertvector((bits >> 23) - 127, vf);
    const vf mantissa = (vf)((bits & 0x7fffff) | 0x3f800000);
    return (exponent + (mantissa - 0.9139f)) * 0.69314722f;
}

INLINE vf vexp(vf x) {
    /* Of x <= 80; below MIN_EXPONENT zero. Degree 6 on half an octave either side: 1 ulp. NaN stays NaN. */
    vi tiny = x < splat(MIN_EXPONENT);
    vf z = pick(tiny, splat(0), x);
    vf shifted = z * 1.44269504f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = z - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    vf p = splat(1.38144661e-3f);
    p = p * r + 8.36878084e-3f;
    p = p * r + 4.16683927e-2f;
    p = p * r + 1.66665196e-1f;
    p = p * r + 4.9999994e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf result = (vf)((vu)p + ((vu)shifted << 23)); /* the exponent of a power of 2; unsigned, for it may wrap */
    return pick(tiny, splat(0), pick(x != x, x, result));
}

/* The first n lanes, fewer than all, from memory that ends behind them; the others are zero. And back. */
INLINE vf load_some(const float *from, int n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
#else
    vf v = splat(0);
    for (int q = 0; q < n; ++q) v[q] = from[q];
    return v;
#endif
}

INLINE void store_some(float *to, vf v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int q = 0; q < n; ++q) to[q] = v[q];
#endif
}

/* Adds the first n lanes, or all, to memory that ends behind them. */
INLINE void add_some(float *to, vf v, int n) {
    if (n == LANES) *(vf *)to += v;
    else store_some(to, load_some(to, n) + v, n);
}

/* Lanes with the bit `d` of their number clear and set, of a and b in turn: the two halves of a butterfly of rows. */
#define LOW(i, d) ((i) & (d) ? LANES + (i) - (d) : (i))
#define HIGH(i, d) ((i) & (d) ? LANES + (i) : (i) + (d))
#if LANES == 16
#define INDICES(f, d) f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d), \
    f(8, d), f(9, d), f(10, d), f(11, d), f(12, d), f(13, d), f(14, d), f(15, d)
#else
#define INDICES(f, d) f(0, d), f(1, d), f(2, d), f(3, d), f(4, d), f(5, d), f(6, d), f(7, d)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, f, d) __builtin_shufflevector(a, b, INDICES(f, d))
#else
#define SHUFFLE(a, b, f, d) __builtin_shuffle(a, b, (vi){INDICES(f, d)})
#endif

/* Lane i becomes the sum over the lanes of v[i]. */
#define ADD_PAIRS(v, n, d)                             \
    for (int j = 0; j < (n); ++j) {                    \
        const vf a = v[2 * j], b = v[2 * j + 1];       \
        v[j] = SHUFFLE(a, b, LOW, d) + SHUFFLE(a, b, HIGH, d); \
    }
INLINE vf add_lanes(vf *v) {
    ADD_PAIRS(v, LANES / 2, 1);
    ADD_PAIRS(v, LANES / 4, 2);
    ADD_PAIRS(v, LANES / 8, 4);
#if LANES == 16
    ADD_PAIRS(v, 1, 8);
#endif
    return v[0];
}

#define SWAP_BLOCKS(v, d)                            \
    for (int j = 0; j < LANES; ++j)                  \
        if (!(j & (d))) {                            \
            const vf a = v[j], b = v[j + (d)];       \
            v[j] = SHUFFLE(a, b, LOW, d);            \
            v[j + (d)] = SHUFFLE(a, b, HIGH, d);     \
        }
/* to[i, j] = from[j, i] for all lanes i and j. */
INLINE void transpose_lanes(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    vf v[LANES];
    for (int j = 0; j < LANES; ++j) v[j] = *(const vf *)(from + j * from_stride);
    SWAP_BLOCKS(v, 1);
    SWAP_BLOCKS(v, 2);
    SWAP_BLOCKS(v, 4);
#if LANES == 16
    SWAP_BLOCKS(v, 8);
#endif
    for (int j = 0; j < LANES; ++j) *(vf *)(to + j * to_stride) = v[j];
}

INLINE int least_of(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_epi32((__m512i)v);
#endif
    int low = v[0];
    for (int q = 1; q < LANES; ++q) low = v[q] < low ? v[q] : low;
    return low;
}
