/* Products over every key for every query, with the queries in the lanes and the features broadcast from memory. */
#pragma once
#include "tile.h"

#define BLOCK (LANES == 16 ? 24 : 8) /* channels of a product kept in registers */
#define DOT_KEYS (LANES == 16 ? 6 : 4) /* whose dot products are made at once */
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

/* Pixels of the keys of a chunk. */
static void place_keys(Tile *t, const Shape *p, int i0, int i1) {
    int n = 0;
    for (int i = i0; i < i1; ++i) {
        const Segment s = t->segments[i];
        for (int x = s.x0; x < s.x1; ++x) t->places[n++] = s.y * (int)p->width + x;
    }
}

/* dots[key] becomes the sum over n channels of feature * g, added to what it was if asked to, for `keys` keys, whose sums
 * do not wait for one another. */
INLINE void dot_keys(vf *dots, const float *x, const int *places, int64_t pixel, const vf *g, int n, int keys,
                     int add) {
    vf a[DOT_KEYS];
    const float *f[DOT_KEYS];
    for (int j = 0; j < keys; ++j) {
        a[j] = add ? dots[j] : splat(0);
        f[j] = x + places[j] * pixel;
    }
#pragma GCC unroll 24
    for (int c = 0; c < n; ++c)
#pragma GCC unroll 6
        for (int j = 0; j < keys; ++j) a[j] += g[c] * f[j][c];
    for (int j = 0; j < keys; ++j) dots[j] = a[j];
}

INLINE void dot_block(Tile *t, const float *x, int64_t pixel, int c0, int n, int count, int k) {
    vf g[BLOCK];
    for (int c = 0; c < n; ++c) g[c] = t->columns[c0 + c];
    int at = 0;
    for (; at + DOT_KEYS <= count; at += DOT_KEYS)
        dot_keys(t->dots + k + at, x + c0, t->places + at, pixel, g, n, DOT_KEYS, c0 > 0);
    for (; at < count; ++at) dot_keys(t->dots + k + at, x + c0, t->places + at, pixel, g, n, 1, c0 > 0);
}

/* dx[key] += sum over queries of weight * rows, for `keys` keys and n vectors of channels from c0, of which the last
 * has `some` lanes. */
INLINE void spread_keys_all(Tile *t, float *dx, const int *places, int64_t pixel, int c0, int n, int some, int k,
                            int keys) {
    vf acc[4][4];
    float *f[4];
    const float *a = (const float *)(t->weights + k), *rows = t->rows + c0;
    for (int j = 0; j < keys; ++j) {
        f[j] = dx + places[j] * pixel + c0;
        for (int v = 0; v < n; ++v) acc[j][v] = splat(0); /* a tile apart, for less rounding */
    }
#pragma GCC unroll 4
    for (int q = 0; q < LANES; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < n; ++v) {
            const vf r = *(const vf *)(rows + q * t->row + v * LANES);
#pragma GCC unroll 4
            for (int j = 0; j < keys; ++j) acc[j][v] += r * a[j * LANES + q];
        }
    }
    for (int j = 0; j < keys; ++j) {
        for (int v = 0; v < n - 1; ++v) *(vf *)(f[j] + v * LANES) += acc[j][v];
        add_some(f[j] + (n - 1) * LANES, acc[j][n - 1], some);
    }
}

INLINE void spread_block(Tile *t, float *dx, int64_t pixel, int c0, int n, int some, int count, int k) {
    int at = 0;
    for (; at + 4 <= count; at += 4) spread_keys_all(t, dx, t->places + at, pixel, c0, n, some, k + at, 4);
    for (; at < count; ++at) spread_keys_all(t, dx, t->places + at, pixel, c0, n, some, k + at, 1);
}

/* Runs a block function over all channels, with block sizes known to the compiler. */
#define TAKE(n, call)                              \
    if ((n) < BLOCK && left >= (n)) {              \
        call((n) < BLOCK ? (n) : BLOCK);           \
        c += (n);                                  \
        left -= (n);                               \
    }
#define OVER_CHANNELS(call)                                           \
    do {                                                              \
        int c = 0, left = (int)p->channels;                           \
        for (; left >= BLOCK; left -= BLOCK, c += BLOCK) call(BLOCK); \
        TAKE(16, call)                                                \
        TAKE(12, call)                                                \
        TAKE(8, call)                                                 \
        TAKE(6, call)                                                 \
        TAKE(4, call)                                                 \
        TAKE(3, call)                                                 \
        TAKE(2, call)                                                 \
        TAKE(1, call)                                                 \
    } while (0)

static void pool_all(Tile *t, const Shape *p, const float *x, int64_t pixel, int i0, int i1, int k) {
#define CALL(n) pool_block(t, p, x, pixel, c, n, i0, i1, k)
    OVER_CHANNELS(CALL);
#undef CALL
}

static void dot_all(Tile *t, const Shape *p, const float *x, int64_t pixel, int count, int k) {
#define CALL(n) dot_block(t, x, pixel, c, n, count, k)
    OVER_CHANNELS(CALL);
#undef CALL
}

static void spread_all(Tile *t, const Shape *p, float *dx, int64_t pixel, int count, int k) {
    int c = 0, left = (int)p->channels / LANES;
    const int rest = (int)p->channels % LANES;
    for (; left >= 4; left -= 4, c += 4 * LANES) spread_block(t, dx, pixel, c, 4, LANES, count, k);
    if (rest) {
        if (left == 3) spread_block(t, dx, pixel, c, 4, rest, count, k);
        else if (left == 2) spread_block(t, dx, pixel, c, 3, rest, count, k);
        else if (left) spread_block(t, dx, pixel, c, 2, rest, count, k);
        else spread_block(t, dx, pixel, c, 1, rest, count, k);
        return;
    }
    if (left >= 2) { spread_block(t, dx, pixel, c, 2, LANES, count, k); c += 2 * LANES; left -= 2; }
    if (left) spread_block(t, dx, pixel, c, 1, LANES, count, k);
}
