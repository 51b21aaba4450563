/* Products over a list of keys for each quad of queries, with channels in the lanes and the weights broadcast. */
#pragma once
#include "tile.h"

#define QUAD_BLOCK (LANES == 16 ? 6 : 3)    /* vectors of channels of four queries kept in registers */
#define SPREAD_BLOCK (LANES == 16 ? 12 : 6) /* of two keys */

/* Whether lists by quad, with channels in the lanes, take less work than every key for every query. */
static int is_narrow(const Tile *t, const Shape *p, int64_t read) {
    return may_list(p) && 5 * read < 4 * QUADS * (int64_t)t->key_count;
}

static void list_keys(Tile *t, const Shape *p, int i0, int i1, int k) {
    for (int j = 0; j < QUADS; ++j) {
        Entry *to = t->entries + j * t->list_size;
        int key = k, n = 0;
        for (int i = i0; i < i1; ++i) {
            const Segment s = t->segments[i];
            const Span span = t->spans[i][j];
            const int row = s.y * (int)p->width;
            for (int x = span.x0; x < span.x1; ++x) to[n++] = (Entry){key + x - s.x0, row + x};
            key += s.x1 - s.x0;
        }
        t->entry_count[j] = n;
    }
}

/* rows[q] += sum over the keys of a quad of weight * feature, for n vectors of channels from c0. */
INLINE void pool_list(Tile *t, const float *x, int64_t pixel, int c0, int n) {
    for (int j = 0; j < QUADS; ++j) {
        const Entry *at = t->entries + j * t->list_size, *end = at + t->entry_count[j];
        const float *weights = (const float *)t->weights + lane_of(j, 0);
        vf acc[4][QUAD_BLOCK];
        for (int i = 0; i < 4; ++i)
            for (int v = 0; v < n; ++v) acc[i][v] = splat(0);
        for (; at < end; ++at) {
            const float *a = weights + (int64_t)at->key * LANES, *f = x + at->pixel * pixel + c0;
#pragma GCC unroll 6
            for (int v = 0; v < n; ++v) {
                const vf feature = *(const vf *)(f + v * LANES);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) acc[i][v] += a[i % 2 + i / 2 * TILE_W] * feature;
            }
        }
        for (int i = 0; i < 4; ++i) {
            vf *row = (vf *)(t->rows + lane_of(j, i) * t->row + c0);
            for (int v = 0; v < n; ++v) row[v] += acc[i][v];
        }
    }
}

/* dots[key] += sum over n vectors of channels from c0 of feature * rows. */
INLINE void dot_list(Tile *t, const float *x, int64_t pixel, int c0, int n) {
    enum { KEYS = LANES / 4 };
    for (int j = 0; j < QUADS; ++j) {
        const Entry *at = t->entries + j * t->list_size;
        const int count = t->entry_count[j];
        float *dots = (float *)t->dots + lane_of(j, 0);
        vf g[4][QUAD_BLOCK];
        for (int i = 0; i < 4; ++i)
            for (int v = 0; v < n; ++v) g[i][v] = *(const vf *)(t->rows + lane_of(j, i) * t->row + c0 + v * LANES);
        for (int e = 0; e < count; e += KEYS, at += KEYS) {
            vf part[LANES];
#pragma GCC unroll 4
            for (int k = 0; k < KEYS; ++k) {
                const float *f = x + at[e + k < count ? k : 0].pixel * pixel + c0;
                vf sum[4];
#pragma GCC unroll 6
                for (int v = 0; v < n; ++v) {
                    const vf feature = *(const vf *)(f + v * LANES);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) sum[i] = v ? sum[i] + g[i][v] * feature : g[i][v] * feature;
                }
                for (int i = 0; i < 4; ++i) part[4 * k + i] = sum[i];
            }
            const vf sums = add_lanes(part);
            for (int k = 0; k < KEYS && e + k < count; ++k)
                for (int i = 0; i < 4; ++i) dots[(int64_t)at[k].key * LANES + i % 2 + i / 2 * TILE_W] += sums[4 * k + i];
        }
    }
}

/* dx[key] += sum over the quads that read it of weight * rows, for n vectors of channels from c0 and `keys` keys. */
INLINE void spread_keys(Tile *t, float *f, int64_t pixel, int c0, int n, const Span *spans, int x, int k,
                        int keys) {
    const float *weights = (const float *)(t->weights + k);
    vf acc[2][SPREAD_BLOCK];
    for (int m = 0; m < keys; ++m)
        for (int v = 0; v < n; ++v) acc[m][v] = splat(0); /* a tile apart, for less rounding */
    for (int j = 0; j < QUADS; ++j) {
        if (x + keys <= spans[j].x0 || x >= spans[j].x1) continue;
        const float *a = weights + lane_of(j, 0), *rows = t->rows + lane_of(j, 0) * t->row + c0;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int lane = i % 2 + i / 2 * TILE_W;
#pragma GCC unroll 12
            for (int v = 0; v < n; ++v) {
                const vf row = *(const vf *)(rows + lane * t->row + v * LANES);
#pragma GCC unroll 2
                for (int m = 0; m < keys; ++m) acc[m][v] += a[m * LANES + lane] * row;
            }
        }
    }
    for (int m = 0; m < keys; ++m)
        for (int v = 0; v < n; ++v) *(vf *)(f + m * pixel + v * LANES) += acc[m][v];
}

INLINE void spread_list(Tile *t, const Shape *p, float *dx, int64_t pixel, int c0, int n, int i0, int i1, int k) {
    for (int i = i0; i < i1; ++i) {
        const Segment s = t->segments[i];
        float *f = dx + ((int64_t)s.y * p->width + s.x0) * pixel + c0;
        int x = s.x0;
        for (; x + 2 <= s.x1; x += 2, f += 2 * pixel, k += 2) spread_keys(t, f, pixel, c0, n, t->spans[i], x, k, 2);
        if (x < s.x1) spread_keys(t, f, pixel, c0, n, t->spans[i], x, k++, 1);
    }
}

/* Runs a function over all vectors of channels, in blocks of sizes known to the compiler. */
#define OVER_VECTORS(most, call)                                                  \
    do {                                                                          \
        int c = 0, left = (int)p->channels / LANES;                               \
        for (; left >= (most); left -= (most), c += (most) * LANES) call((most)); \
        if ((most) > 6 && left >= 6) { call(6); c += 6 * LANES; left -= 6; }      \
        if ((most) > 4 && left >= 4) { call(4); c += 4 * LANES; left -= 4; }      \
        if (left >= 2) { call(2); c += 2 * LANES; left -= 2; }                    \
        if (left) call(1);                                                        \
    } while (0)

static void pool_lists(Tile *t, const Shape *p, const float *x, int64_t pixel) {
#define CALL(n) pool_list(t, x, pixel, c, n)
    OVER_VECTORS(QUAD_BLOCK, CALL);
#undef CALL
}

static void dot_lists(Tile *t, const Shape *p, const float *x, int64_t pixel) {
#define CALL(n) dot_list(t, x, pixel, c, n)
    OVER_VECTORS(QUAD_BLOCK, CALL);
#undef CALL
}

static void spread_lists(Tile *t, const Shape *p, float *dx, int64_t pixel, int i0, int i1, int k) {
#define CALL(n) spread_list(t, p, dx, pixel, c, n, i0, i1, k)
    OVER_VECTORS(SPREAD_BLOCK, CALL);
#undef CALL
}
