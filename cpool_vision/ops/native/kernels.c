/* Context pooling on a processor: every tile of query cells reads the disc of pixels that its supports reach.
 *
 * Maps are (pixels, channels), one map per image and group. The queries of a tile fill the lanes of a vector, so that
 * a pair costs one multiply-add per channel and product, with the feature broadcast from memory. Weights factorise:
 * a = gy[row] gx[column] w[pixel], kept unnormalised until the end of a tile.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define TILE_W 4
#define BLOCK 24 /* channels of a product kept in registers */
#else
#define LANES 8
#define TILE_W 4
#define BLOCK 8
#endif
#define TILE_H (LANES / TILE_W)
#define CHUNK 128 /* keys whose weights stay in the cache while all channels read them */
#define MIN_EXPONENT -80.0f
#define MAX_SPREAD 60.0f /* of the logits in a map: beyond, products of factors leave the range of fp32 */

#if defined(__x86_64__)
#include <xmmintrin.h>
/* Subnormal weights are too small to matter, and slow. */
#define FLUSH_SUBNORMALS unsigned int saved_csr = _mm_getcsr(); _mm_setcsr(saved_csr | 0x8040)
#define RESTORE_SUBNORMALS _mm_setcsr(saved_csr)
#else
#define FLUSH_SUBNORMALS
#define RESTORE_SUBNORMALS
#endif

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t maps, groups, channels; /* channels of one group */
    int64_t height, width, out_height, out_width, stride;
    int64_t x_image, x_pixel;            /* strides of the features, whose channels are adjacent */
    int64_t y_image, y_pixel, y_channel; /* strides of the output, or of its gradient */
    int64_t bands; /* of query rows per map, each with gradients of its own in the backward pass */
    int64_t threads;
    float tolerance; /* share of a query's weight that may be left out */
} Shape;

typedef struct {
    int y, x0, x1; /* keys of one row */
} Segment;

typedef struct {
    vf *gy, *gx;         /* factors by row and column; logarithms where the spread is wide */
    vf *weights, *dots;  /* by key of the tile */
    Segment *segments;
    float *rows;         /* (LANES, channels): output or its gradient */
    vf *columns;         /* (channels, LANES): the same, queries in lanes */
    float scale[LANES], centre_y[LANES], centre_x[LANES], near_y[LANES], near_x[LANES], radius2[LANES];
    int index[LANES];    /* of the query, -1 for lanes without one */
    int segment_count, key_count;
    int y0, y1, x0, x1;
    void *memory;
} Tile;

INLINE vf splat(float a) { return a - (vf){0}; }

INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }

/* False where either is NaN. */
INLINE int all_at_most(vf a, vf b) {
    const vi m = a <= b;
    int every = -1;
    for (int q = 0; q < LANES; ++q) every &= m[q];
    return every;
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
    vi bits = ((vi)shifted << 23);
    vf result = (vf)((vi)p + bits);
    return pick(tiny, splat(0), pick(x != x, x, result));
}

/* Squared distance to the farthest key that must be read: the tail of the lattice sum beyond radius R is at most
 * exp(-R^2 s) pi ((1 + a / R) / s + 4 a R) with a = sqrt(1/2), since a disc holds between pi (R -+ a)^2 points. */
static float reach2(float s, float excess, float near2, float diagonal, float tolerance) {
    float r = diagonal;
    if (!(s > 0) || !(excess < 1e30f)) return INFINITY;
    for (int k = 0; k < 2; ++k) {
        float bound = 3.14159274f * ((1 + 0.70710678f / r) / s + 2.82842712f * r);
        float r2 = near2 + (excess + logf(fmaxf(bound, 1.0f) / tolerance)) / s;
        r = fminf(sqrtf(fmaxf(r2, 1.0f)), r);
    }
    return r < diagonal ? r * r : INFINITY;
}

static int make_tile(Tile *t, const Shape *p, int ty, int tx, const float *sigma, const float *logits, float top,
                     int whole) {
    const int h = (int)p->height, w = (int)p->width;
    const float diagonal = sqrtf((float)(h * h + w * w)) + 2;
    t->y0 = h; t->y1 = 0; t->x0 = w; t->x1 = 0;
    int first = -1;
    for (int q = 0; q < LANES; ++q) {
        int qy = ty * TILE_H + q / TILE_W, qx = tx * TILE_W + q % TILE_W;
        int inside = qy < p->out_height && qx < p->out_width;
        t->index[q] = inside ? qy * (int)p->out_width + qx : -1;
        if (!inside) continue;
        if (first < 0) first = q;
        float sig = sigma[t->index[q]];
        float s = 0.5f / (sig * sig);
        t->scale[q] = s < 1e30f ? s : (s != s ? s : 1e30f);
        t->centre_y[q] = qy * (float)p->stride + 0.5f * (p->stride - 1);
        t->centre_x[q] = qx * (float)p->stride + 0.5f * (p->stride - 1);
        int ny = (int)t->centre_y[q] < h ? (int)t->centre_y[q] : h - 1;
        int nx = (int)t->centre_x[q] < w ? (int)t->centre_x[q] : w - 1;
        float oy = t->centre_y[q] - ny, ox = t->centre_x[q] - nx;
        t->near_y[q] = oy * oy;
        t->near_x[q] = ox * ox;
        t->radius2[q] = whole ? INFINITY : reach2(t->scale[q], top - logits[ny * w + nx], oy * oy + ox * ox, diagonal,
                                                  0.125f * p->tolerance);
    }
    for (int q = 0; q < LANES; ++q) {
        if (t->index[q] >= 0) continue; /* lanes without a query repeat one */
        t->scale[q] = t->scale[first]; t->radius2[q] = t->radius2[first];
        t->centre_y[q] = t->centre_y[first]; t->centre_x[q] = t->centre_x[first];
        t->near_y[q] = t->near_y[first]; t->near_x[q] = t->near_x[first];
    }
    int count = 0, keys = 0;
    float most = 0;
    for (int q = 0; q < LANES; ++q) most = fmaxf(most, t->radius2[q]);
    float reach = sqrtf(most);
    int from = 0, to = h;
    if (reach < diagonal) {
        from = (int)fmaxf(0, t->centre_y[first] - reach - 1);
        to = (int)fminf(h, t->centre_y[first] + (TILE_H - 1) * (float)p->stride + reach + 2);
    }
    for (int y = from; y < to; ++y) {
        int x0 = w, x1 = 0;
        for (int q = 0; q < LANES; ++q) {
            float dy = y - t->centre_y[q], left = t->radius2[q] - dy * dy;
            if (!(left >= 0)) continue;
            if (left > diagonal * diagonal) { x0 = 0; x1 = w; continue; }
            float half = sqrtf(left);
            int a = (int)ceilf(t->centre_x[q] - half), b = (int)floorf(t->centre_x[q] + half) + 1;
            if (a < x0) x0 = a;
            if (b > x1) x1 = b;
        }
        if (x0 < 0) x0 = 0;
        if (x1 > w) x1 = w;
        if (x0 >= x1) continue;
        t->segments[count++] = (Segment){y, x0, x1};
        keys += x1 - x0;
        if (y < t->y0) t->y0 = y;
        if (y + 1 > t->y1) t->y1 = y + 1;
        if (x0 < t->x0) t->x0 = x0;
        if (x1 > t->x1) t->x1 = x1;
    }
    t->segment_count = count;
    t->key_count = keys;
    return keys;
}

INLINE vf offset2(const float *centre, const float *nearest, int at) {
    vf c, n;
    memcpy(&c, centre, sizeof c);
    memcpy(&n, nearest, sizeof n);
    vf d = (float)at - c;
    return d * d - n;
}

/* Weights of every key, not normalised; returns their sums. */
static vf make_weights(Tile *t, const Shape *p, const float *logits, const float *pixel, int wide) {
    const int w = (int)p->width;
    vf scale, total = splat(0);
    memcpy(&scale, t->scale, sizeof scale);
    for (int y = t->y0; y < t->y1; ++y) {
        vf e = -offset2(t->centre_y, t->near_y, y) * scale;
        t->gy[y] = wide ? e : vexp(e);
    }
    for (int x = t->x0; x < t->x1; ++x) {
        vf e = -offset2(t->centre_x, t->near_x, x) * scale;
        t->gx[x] = wide ? e : vexp(e);
    }
    vf *out = t->weights;
    if (!wide) {
        for (int i = 0; i < t->segment_count; ++i) {
            const Segment s = t->segments[i];
            const vf gy = t->gy[s.y];
            const float *row = pixel + (int64_t)s.y * w;
            vf sum = splat(0); /* by row, for less rounding */
            for (int x = s.x0; x < s.x1; ++x) {
                vf a = t->gx[x] * gy * row[x];
                sum += a;
                *out++ = a;
            }
            total += sum;
        }
        return total;
    }
    vf top = splat(-INFINITY);
    for (int i = 0; i < t->segment_count; ++i) {
        const Segment s = t->segments[i];
        const vf gy = t->gy[s.y];
        const float *row = logits + (int64_t)s.y * w;
        for (int x = s.x0; x < s.x1; ++x) {
            vf a = t->gx[x] + gy + row[x];
            top = vmax(top, a);
            *out++ = a;
        }
    }
    for (int k = 0; k < t->key_count; ++k) {
        t->weights[k] = vexp(t->weights[k] - top);
        total += t->weights[k];
    }
    return total;
}

/* Leaves out keys at the ends of rows that, all together, weigh at most an eighth of the tolerance in every query;
 * reach2, which knows no more of the logits than the largest, leaves out as much. Returns the sums of what is kept.
 * Far pixels count most in dsigma: cuts that spend the whole tolerance would exceed its error bound. */
static vf trim(Tile *t, const Shape *p, vf total) {
    const vf least = total * (0.125f * p->tolerance / t->key_count);
    vf dropped = splat(0);
    const vf *from = t->weights;
    vf *to = t->weights;
    int count = 0;
    for (int i = 0; i < t->segment_count; ++i) {
        Segment s = t->segments[i];
        const int n = s.x1 - s.x0;
        int a = 0, b = n;
        while (a < b && all_at_most(from[a], least)) dropped += from[a++];
        while (b > a && all_at_most(from[b - 1], least)) dropped += from[--b];
        if (a < b) {
            memmove(to, from + a, (b - a) * sizeof(vf));
            to += b - a;
            t->segments[count++] = (Segment){s.y, s.x0 + a, s.x0 + b};
        }
        from += n;
    }
    t->segment_count = count;
    t->key_count = (int)(to - t->weights);
    return total - dropped;
}

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

/* Queries of full tiles lie TILE_W to a row of memory where pixels are adjacent. */
static int in_rows(const Tile *t, const Shape *p) {
    for (int q = 0; q < LANES; ++q)
        if (t->index[q] < 0) return 0;
    return p->y_pixel == 1;
}

static void store_output(const Tile *t, const Shape *p, float *y) {
    const float *columns = (const float *)t->columns;
    if (in_rows(t, p)) {
        for (int64_t k = 0; k < p->channels; ++k)
            for (int r = 0; r < TILE_H; ++r)
                memcpy(y + k * p->y_channel + t->index[r * TILE_W], columns + k * LANES + r * TILE_W, TILE_W * sizeof(float));
        return;
    }
    for (int q = 0; q < LANES; ++q) {
        if (t->index[q] < 0) continue;
        float *to = y + t->index[q] * p->y_pixel;
        for (int64_t k = 0; k < p->channels; ++k) to[k * p->y_channel] = columns[k * LANES + q];
    }
}

/* The gradient of the queries, both by query and by channel; zero in lanes without one. */
static void load_gradient(Tile *t, const Shape *p, const float *dy) {
    const int64_t c = p->channels;
    float *columns = (float *)t->columns;
    if (in_rows(t, p)) {
        for (int64_t k = 0; k < c; ++k)
            for (int r = 0; r < TILE_H; ++r)
                memcpy(columns + k * LANES + r * TILE_W, dy + k * p->y_channel + t->index[r * TILE_W], TILE_W * sizeof(float));
        for (int q = 0; q < LANES; ++q)
            for (int64_t k = 0; k < c; ++k) t->rows[q * c + k] = columns[k * LANES + q];
        return;
    }
    for (int q = 0; q < LANES; ++q) {
        float *row = t->rows + q * c;
        if (t->index[q] < 0) memset(row, 0, c * sizeof(float));
        else for (int64_t k = 0; k < c; ++k) row[k] = dy[t->index[q] * p->y_pixel + k * p->y_channel];
        for (int64_t k = 0; k < c; ++k) columns[k * LANES + q] = row[k];
    }
}

static int open_tile(Tile *t, const Shape *p, int backward) {
    size_t keys = (size_t)(p->height * p->width), line = (size_t)(p->height + p->width);
    size_t vectors = keys * (backward ? 2 : 1) + line + 2 * p->channels;
    size_t bytes = vectors * sizeof(vf) + p->height * sizeof(Segment) + 128;
    t->memory = malloc(bytes);
    if (!t->memory) return 0;
    vf *at = (vf *)(((uintptr_t)t->memory + 63) & ~(uintptr_t)63);
    t->gy = at; at += p->height;
    t->gx = at; at += p->width;
    t->weights = at; at += keys;
    t->dots = at; at += backward ? keys : 0;
    t->columns = at; at += p->channels;
    t->rows = (float *)at; at += p->channels;
    t->segments = (Segment *)at;
    return 1;
}

/* Segments from i that hold about CHUNK keys. */
static int next_chunk(const Tile *t, int i, int *keys) {
    int n = 0;
    do { n += t->segments[i].x1 - t->segments[i].x0; ++i; } while (i < t->segment_count && n < CHUNK);
    *keys = n;
    return i;
}

/* Largest logit, and whether windows and factors may be used. */
static void read_logits(const float *l, int64_t n, float *pixel, float *top, int *whole, int *wide) {
    float high = -INFINITY, low = INFINITY;
    int finite = 1;
    for (int64_t i = 0; i < n; ++i) {
        high = l[i] > high ? l[i] : high;
        low = l[i] < low ? l[i] : low;
        finite &= (l[i] - l[i] == 0);
    }
    *top = high;
    *whole = !finite;
    *wide = !finite || !(high - low <= MAX_SPREAD);
    if (*wide) return;
    float middle = 0.5f * (high + low);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        *(vf *)(pixel + i) = vexp(*(const vf *)(l + i) - middle);
    }
    for (; i < n; ++i) pixel[i] = expf(l[i] - middle);
}

typedef struct {
    float top;
    int whole, wide;
} Facts;

int cpool_forward(const Shape *p, const float *x, const float *logits, const float *sigma, float *pixel, float *y) {
    const int64_t n = p->height * p->width, no = p->out_height * p->out_width, c = p->channels;
    const int rows = (int)((p->out_height + TILE_H - 1) / TILE_H), cols = (int)((p->out_width + TILE_W - 1) / TILE_W);
    Facts *facts = malloc(sizeof(Facts) * p->maps);
    int failed = !facts;
    if (failed) return 1;
#pragma omp parallel num_threads(p->threads)
    {
        FLUSH_SUBNORMALS;
        Tile tile, *t = &tile;
        int ok = open_tile(t, p, 0);
        if (!ok) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p->maps; ++m)
            read_logits(logits + m * n, n, pixel + m * n, &facts[m].top, &facts[m].whole, &facts[m].wide);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < p->maps * rows; ++job) {
            if (!ok) continue;
            const int64_t m = job / rows, b = m / p->groups, g = m % p->groups;
            const Facts *f = &facts[m];
            const float *in = x + b * p->x_image + g * c;
            float *out = y + b * p->y_image + g * c * p->y_channel;
            for (int tx = 0; tx < cols; ++tx) {
                make_tile(t, p, (int)(job % rows), tx, sigma + m * no, logits + m * n, f->top, f->whole);
                const vf total = trim(t, p, make_weights(t, p, logits + m * n, pixel + m * n, f->wide));
                for (int64_t k = 0; k < c; ++k) t->columns[k] = splat(0);
                for (int i = 0, k = 0, keys; i < t->segment_count; k += keys) {
                    int end = next_chunk(t, i, &keys);
                    pool_all(t, p, in, p->x_pixel, i, end, k);
                    i = end;
                }
                const vf inverse = 1.0f / total;
                for (int64_t k = 0; k < c; ++k) t->columns[k] *= inverse;
                store_output(t, p, out);
            }
        }
        if (ok) free(t->memory);
        RESTORE_SUBNORMALS;
    }
    free(facts);
    return failed;
}

/* dx (bands, images, pixels, groups * channels) and dlogits (bands, maps, pixels) are sums of each band, zero at first.
 * dsigma lacks its factor sigma^-3. */
int cpool_backward(const Shape *p, const float *grad, const float *x, const float *logits, const float *sigma,
                   float *pixel, float *dx, float *dlogits, float *dsigma) {
    const int64_t n = p->height * p->width, no = p->out_height * p->out_width, c = p->channels;
    const int64_t stride = p->groups * c, images = p->maps / p->groups;
    const int rows = (int)((p->out_height + TILE_H - 1) / TILE_H), cols = (int)((p->out_width + TILE_W - 1) / TILE_W);
    Facts *facts = malloc(sizeof(Facts) * p->maps);
    int failed = !facts;
    if (failed) return 1;
#pragma omp parallel num_threads(p->threads)
    {
        FLUSH_SUBNORMALS;
        Tile tile, *t = &tile;
        int ok = open_tile(t, p, 1);
        if (!ok) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p->maps; ++m)
            read_logits(logits + m * n, n, pixel + m * n, &facts[m].top, &facts[m].whole, &facts[m].wide);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < p->maps * p->bands; ++job) {
            if (!ok) continue;
            const int64_t m = job / p->bands, band = job % p->bands, b = m / p->groups, g = m % p->groups;
            const Facts *f = &facts[m];
            const float *in = x + b * p->x_image + g * c, *dy = grad + b * p->y_image + g * c * p->y_channel;
            float *din = dx + (band * images + b) * n * stride + g * c;
            float *dl = dlogits + (band * p->maps + m) * n;
            for (int ty = (int)(rows * band / p->bands); ty < rows * (band + 1) / p->bands; ++ty)
                for (int tx = 0; tx < cols; ++tx) {
                    make_tile(t, p, ty, tx, sigma + m * no, logits + m * n, f->top, f->whole);
                    const vf total = trim(t, p, make_weights(t, p, logits + m * n, pixel + m * n, f->wide));
                    vf inverse = 1.0f / total;
                    for (int q = 0; q < LANES; ++q)
                        if (t->index[q] < 0) inverse[q] = 0;
                    load_gradient(t, p, dy);
                    for (int k = 0; k < t->key_count; ++k) {
                        t->weights[k] *= inverse;
                        t->dots[k] = splat(0);
                    }
                    for (int i = 0, k = 0, keys; i < t->segment_count; k += keys) {
                        int end = next_chunk(t, i, &keys);
                        dot_all(t, p, in, p->x_pixel, i, end, k);
                        spread_all(t, p, din, stride, i, end, k);
                        i = end;
                    }
                    vf mean = splat(0), dscale = splat(0);
                    for (int k = 0; k < t->key_count; ++k) mean += t->weights[k] * t->dots[k];
                    for (int i = 0, k = 0; i < t->segment_count; ++i) {
                        const Segment s = t->segments[i];
                        const vf off_y = offset2(t->centre_y, t->near_y, s.y);
                        for (int at = s.x0; at < s.x1; ++at, ++k) {
                            const vf u = t->weights[k] * (t->dots[k] - mean);
                            dscale += u * (off_y + offset2(t->centre_x, t->near_x, at));
                            float sum = 0;
                            for (int q = 0; q < LANES; ++q) sum += u[q];
                            dl[(int64_t)s.y * p->width + at] += sum;
                        }
                    }
                    for (int q = 0; q < LANES; ++q)
                        if (t->index[q] >= 0) dsigma[m * no + t->index[q]] = dscale[q];
                }
        }
        if (ok) free(t->memory);
        RESTORE_SUBNORMALS;
    }
    free(facts);
    return failed;
}

/* out[c, r] = in[r, c] for every image. */
void cpool_transpose(int64_t images, int64_t rows, int64_t cols, int64_t threads, const float *in, float *out) {
    enum { SIDE = 16 };
    const int64_t down = (rows + SIDE - 1) / SIDE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t job = 0; job < images * down; ++job) {
        const float *a = in + job / down * rows * cols;
        float *b = out + job / down * rows * cols;
        const int64_t r0 = job % down * SIDE, n = rows - r0 < SIDE ? rows - r0 : SIDE;
        for (int64_t c0 = 0; c0 < cols; c0 += SIDE) {
            const int64_t m = cols - c0 < SIDE ? cols - c0 : SIDE;
            if (n == SIDE && m == SIDE) {
                float block[SIDE][SIDE];
                for (int r = 0; r < SIDE; ++r)
                    for (int c = 0; c < SIDE; ++c) block[c][r] = a[(r0 + r) * cols + c0 + c];
                for (int c = 0; c < SIDE; ++c) memcpy(b + (c0 + c) * rows + r0, block[c], sizeof block[c]);
            } else {
                for (int64_t r = r0; r < r0 + n; ++r)
                    for (int64_t c = c0; c < c0 + m; ++c) b[c * rows + r] = a[r * cols + c];
            }
        }
    }
}
