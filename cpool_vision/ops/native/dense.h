/* Products over every key for every query, with the queries in the lanes and the features broadcast from memory. */
#pragma once
#include "tile.h"

#define BLOCK (LANES == 16 ? 24 : 8) /* channels of a product kept in registers */
#define CHUNK 128 /* keys whose weights stay in the cache while all channels read them */

/* columns[c] += sum over keys of weight * feature. */
INLINE void pool_block(Tile *t, const Shape *p, const float *x, int64_t pixel, int c0, int n, int i0, int i1, int k) {
    vf acc[BLOCK];
    for (int c = 0; c < n; ++c) acc[c] = splat(0); /* a chunk apart, for less rounding */
    for (int i = i0; i < i1; ++i) {
        const Segment s = t->segments[i];
        const float *f = x + ((int64_t)s.y * p->width + s.x0) * pixel + c0;
        for (int at = s.x0; at < s.x1; ++at, f += pixel) {
            const vf a = t->weights[k++];
#pragma GCC unroll 24
            for (int c = 0; c < n; ++c) acc[c] += a * f[c];
        }
    }
    for (int c = 0; c < n; ++c) t->columns[c0 + c] += acc[c];
}

/* dots[key] += sum over channels of feature * columns. */
INLINE void dot_block(Tile *t, const Shape *p, const float *x, int64_t pixel, int c0, int n, int i0, int i1, int k) {
    vf g[BLOCK];
    for (int c = 0; c < n; ++c) g[c] = t->columns[c0 + c];
    for (int i = i0; i < i1; ++i) {
        const Segment s = t->segments[i];
        const float *f = x + ((int64_t)s.y * p->width + s.x0) * pixel + c0;
        int at = s.x0;
        for (; at + 4 <= s.x1; at += 4, f += 4 * pixel, k += 4) {
            vf a0 = t->dots[k], a1 = t->dots[k + 1], a2 = t->dots[k + 2], a3 = t->dots[k + 3];
#pragma GCC unroll 24
            for (int c = 0; c < n; ++c) {
                a0 += g[c] * f[c];
                a1 += g[c] * f[pixel + c];
                a2 += g[c] * f[2 * pixel + c];
                a3 += g[c] * f[3 * pixel + c];
            }
            t->dots[k] = a0; t->dots[k + 1] = a1; t->dots[k + 2] = a2; t->dots[k + 3] = a3;
        }
        for (; at < s.x1; ++at, f += pixel, ++k) {
            vf a = t->dots[k];
#pragma GCC unroll 24
            for (int c = 0; c < n; ++c) a += g[c] * f[c];
            t->dots[k] = a;
        }
    }
}

/* dx[key] += sum over queries of weight * rows, for n vectors of channels from c0. */
INLINE void spread_block(Tile *t, const Shape *p, float *dx, int64_t pixel, int c0, int n, int i0, int i1, int k) {
    const float *rows = t->rows + c0;
    const int64_t stride = p->channels;
    for (int i = i0; i < i1; ++i) {
        const Segment s = t->segments[i];
        float *f = dx + ((int64_t)s.y * p->width + s.x0) * pixel + c0;
        int at = s.x0;
        for (; at + 4 <= s.x1; at += 4, f += 4 * pixel, k += 4) {
            vf acc[4][4];
            const float *a = (const float *)(t->weights + k);
            for (int j = 0; j < 4; ++j)
                for (int v = 0; v < n; ++v) acc[j][v] = *(vf *)(f + j * pixel + v * LANES);
#pragma GCC unroll 4
            for (int q = 0; q < LANES; ++q) {
#pragma GCC unroll 4
                for (int v = 0; v < n; ++v) {
                    const vf r = *(const vf *)(rows + q * stride + v * LANES);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) acc[j][v] += r * a[j * LANES + q];
                }
            }
            for (int j = 0; j < 4; ++j)
                for (int v = 0; v < n; ++v) *(vf *)(f + j * pixel + v * LANES) = acc[j][v];
        }
        for (; at < s.x1; ++at, f += pixel, ++k) {
            const float *a = (const float *)(t->weights + k);
            for (int v = 0; v < n; ++v) {
                vf acc = *(vf *)(f + v * LANES);
#pragma GCC unroll 16
                for (int q = 0; q < LANES; ++q) acc += *(const vf *)(rows + q * stride + v * LANES) * a[q];
                *(vf *)(f + v * LANES) = acc;
            }
        }
    }
}

static void spread_rest(Tile *t, const Shape *p, float *dx, int64_t pixel, int c0, int i0, int i1, int k) {
    for (int i = i0; i < i1; ++i) {
        const Segment s = t->segments[i];
        float *f = dx + ((int64_t)s.y * p->width + s.x0) * pixel;
        for (int at = s.x0; at < s.x1; ++at, f += pixel, ++k) {
            const float *a = (const float *)(t->weights + k);
            for (int64_t c = c0; c < p->channels; ++c) {
                float sum = f[c];
                for (int q = 0; q < LANES; ++q) sum += a[q] * t->rows[q * p->channels + c];
                f[c] = sum;
            }
        }
    }
}

/* Runs a block function over all channels, with block sizes known to the compiler. */
#define OVER_CHANNELS(function, data)                                                             \
    do {                                                                                          \
        int c = 0, left = (int)p->channels;                                                       \
        for (; left >= BLOCK; left -= BLOCK, c += BLOCK) function(t, p, data, pixel, c, BLOCK, i0, i1, k); \
        if (BLOCK > 16 && left >= 16) { function(t, p, data, pixel, c, 16 < BLOCK ? 16 : BLOCK, i0, i1, k); c += 16; left -= 16; } \
        if (left >= 8) { function(t, p, data, pixel, c, 8, i0, i1, k); c += 8; left -= 8; }       \
        if (left >= 4) { function(t, p, data, pixel, c, 4, i0, i1, k); c += 4; left -= 4; }       \
        for (; left > 0; --left, ++c) function(t, p, data, pixel, c, 1, i0, i1, k);               \
    } while (0)

static void pool_all(Tile *t, const Shape *p, const float *x, int64_t pixel, int i0, int i1, int k) {
    OVER_CHANNELS(pool_block, x);
}

static void dot_all(Tile *t, const Shape *p, const float *x, int64_t pixel, int i0, int i1, int k) {
    OVER_CHANNELS(dot_block, x);
}

static void spread_all(Tile *t, const Shape *p, float *dx, int64_t pixel, int i0, int i1, int k) {
    int c = 0, left = (int)p->channels / LANES;
    for (; left >= 4; left -= 4, c += 4 * LANES) spread_block(t, p, dx, pixel, c, 4, i0, i1, k);
    if (left >= 2) { spread_block(t, p, dx, pixel, c, 2, i0, i1, k); c += 2 * LANES; left -= 2; }
    if (left) { spread_block(t, p, dx, pixel, c, 1, i0, i1, k); c += LANES; }
    if (c < p->channels) spread_rest(t, p, dx, pixel, c, i0, i1, k);
}
