/* A tile of queries: what it reads, what that weighs, and its share of the output and the gradient. */
#pragma once
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define TILE_W 4
#define TILE_H (LANES / TILE_W)
#define QUADS (LANES / 4) /* of 2 x 2 queries */
#define NARROW_CHUNK 512  /* keys whose weights stay in the cache where every quad has a list of its own */

typedef struct {
    int64_t maps, groups, channels; /* channels of one group */
    int64_t height, width, out_height, out_width, stride;
    int64_t x_image, x_pixel;            /* strides of the features, whose channels are adjacent */
    int64_t dx_image, dx_pixel;          /* strides of their gradient, the same */
    int64_t y_image, y_pixel, y_channel; /* strides of the output, or of its gradient */
    int64_t bands; /* of query rows per map, each with gradients of its own in the backward pass */
    int64_t shared; /* neighboring groups that have their supports in common */
    int64_t threads;
    float tolerance; /* share of a query's weight that may be left out */
} Shape;

typedef struct {
    int y, x0, x1; /* keys of one row */
} Segment;

typedef struct {
    int x0, x1;
} Span;

typedef struct {
    int key, pixel;
} Entry;

typedef struct {
    vf *gy, *gx;         /* factors by row and column; logarithms where the spread is wide */
    vf *weights, *dots;  /* by key of the tile */
    Segment *segments;
    Span (*spans)[QUADS]; /* by segment: keys that weigh something in a quad */
    Entry *entries;      /* (QUADS, list_size): keys of each quad in a chunk */
    int64_t list_size;
    int entry_count[QUADS];
    int *places;         /* by key of a chunk: its pixel */
    int64_t row;         /* channels, rounded up to whole vectors */
    float *rows;         /* (LANES, row): output or its gradient */
    vf *columns;         /* (row, LANES): the same, queries in lanes */
    vf *spare;           /* of the same size, where groups share supports */
    vf scale, center_y, center_x, near_y, near_x;
    vf tolerance;        /* share of a query's weight that reach2 and trim may each leave out */
    int64_t index[LANES]; /* of the query, -1 for lanes without one */
    int segment_count, key_count;
    Segment *all;         /* the segments before trim, where groups share them */
    int all_count, all_keys, factors; /* of what kind the factors are: 0 none yet, 1 as they are, 2 logarithms */
    int y0, y1, x0, x1;
    void *memory;
} Tile;

/* Of one map: the largest logit, whether every key must be read, whether products of factors and pixels leave the
 * range of fp32 unless taken as logarithms, and whether they may with large features unless normalized first. */
typedef struct {
    float top;
    int whole, wide, tall;
} Facts;

/* Squared distance to the farthest key that must be read: the tail of the lattice sum beyond radius R is at most
 * exp(-R^2 s) pi ((1 + a / R) / s + 4 a R) with a = sqrt(1/2), since a disc holds between pi (R -+ a)^2 points. */
INLINE vf reach2(vf s, vf excess, vf near2, float diagonal, vf tolerance) {
    vf r = splat(diagonal);
    for (int k = 0; k < 2; ++k) {
        const vf bound = 3.14159274f * ((1 + 0.70710678f / r) / s + 2.82842712f * r);
        const vf r2 = near2 + (excess + log_bound(vmax(bound, splat(1)) / tolerance)) / s;
        r = vmin(vsqrt(vmax(r2, splat(1))), r);
    }
    const vi usable = (s > 0) & (excess < 1e30f) & (r < diagonal);
    return pick(usable, r * r * 1.000001f, splat(INFINITY)); /* the nearest key is never lost to rounding */
}

/* What the groups that share supports read: their facts and logits start at those of the first. */
static void make_tile(Tile *t, const Shape *p, int ty, int tx, const float *sigma, const float *logits,
                      const Facts *facts) {
    const int h = (int)p->height, w = (int)p->width;
    const int64_t n = p->height * p->width;
    const float diagonal = sqrtf((float)h * h + (float)w * w) + 2;
    vf cy, cx, ny, nx, sig, excess = splat(0);
    int whole = 0;
    for (int64_t g = 0; g < p->shared; ++g) whole |= facts[g].whole;
    t->y0 = h; t->y1 = 0; t->x0 = w; t->x1 = 0;
    for (int q = 0; q < LANES; ++q) {
        int qy = ty * TILE_H + q / TILE_W, qx = tx * TILE_W + q % TILE_W;
        const int inside = qy < p->out_height && qx < p->out_width;
        t->index[q] = inside ? qy * p->out_width + qx : -1;
        if (!inside) qy = ty * TILE_H, qx = tx * TILE_W; /* lanes without a query repeat the first */
        const float y = qy * (float)p->stride + 0.5f * (p->stride - 1), x = qx * (float)p->stride + 0.5f * (p->stride - 1);
        const int iy = y < h ? (int)y : h - 1, ix = x < w ? (int)x : w - 1;
        cy[q] = y; cx[q] = x; ny[q] = iy; nx[q] = ix;
        sig[q] = sigma[qy * p->out_width + qx];
        for (int64_t g = 0; g < p->shared; ++g) {
            const float over = facts[g].top - logits[g * n + (int64_t)iy * w + ix];
            excess[q] = over > excess[q] || over != over ? over : excess[q];
        }
    }
    const vf s = 0.5f / (sig * sig);
    const vf scale = pick((s < 1e30f) | (s != s), s, splat(1e30f));
    const vf near_y = (cy - ny) * (cy - ny), near_x = (cx - nx) * (cx - nx);
    const vf small = vmin(sig, splat(1)); /* what is left out is multiplied by sigma^-3 in dsigma */
    const vf tolerance = 0.125f * p->tolerance * small * small * small;
    const vf r2 = whole ? splat(INFINITY) : reach2(scale, excess, near_y + near_x, diagonal, tolerance);
    t->tolerance = tolerance; t->scale = scale; t->center_y = cy; t->center_x = cx; t->near_y = ny; t->near_x = nx;
    float most = 0;
    for (int q = 0; q < LANES; ++q) most = fmaxf(most, r2[q]);
    const float reach = sqrtf(most);
    int from = 0, to = h, count = 0, keys = 0;
    if (reach < diagonal) {
        from = (int)fmaxf(0, cy[0] - reach - 1);
        to = (int)fminf(h, cy[0] + (TILE_H - 1) * (float)p->stride + reach + 2);
    }
    for (int y = from; y < to; ++y) {
        const vf dy = (float)y - cy, left = r2 - dy * dy;
        const vf half = vsqrt(vmax(left, splat(0)));
        const vf a = vmin(vmax(cx - half, splat(0)), splat(w)), b = vmin(cx + half, splat(w - 1));
        vi low = __builtin_convertvector(a, vi), high = __builtin_convertvector(b, vi) + 1;
        low -= __builtin_convertvector(low, vf) < a;
        const vi read = left >= 0;
        low = (read & low) | (~read & w);
        high &= read;
        const int x0 = least_of(low), x1 = -least_of(-high);
        if (x0 >= x1) continue;
        t->segments[count++] = (Segment){y, x0, x1};
        keys += x1 - x0;
        if (y < t->y0) t->y0 = y;
        if (y + 1 > t->y1) t->y1 = y + 1;
        if (x0 < t->x0) t->x0 = x0;
        if (x1 > t->x1) t->x1 = x1;
    }
    t->segment_count = t->all_count = count;
    t->key_count = t->all_keys = keys;
    t->factors = 0;
    if (p->shared > 1) memcpy(t->all, t->segments, count * sizeof(Segment));
}

/* Squared distance less that of the nearest pixel, without loss where both are large. */
INLINE vf offset2(vf center, vf nearest, int at) {
    return ((float)at - nearest) * (((float)at - center) + (nearest - center));
}

static void make_factors(Tile *t, int wide) {
    if (t->factors == 1 + wide) return;
    t->factors = 1 + wide;
    for (int y = t->y0; y < t->y1; ++y) {
        const vf e = -offset2(t->center_y, t->near_y, y) * t->scale;
        t->gy[y] = wide ? e : vexp(e);
    }
    for (int x = t->x0; x < t->x1; ++x) {
        const vf e = -offset2(t->center_x, t->near_x, x) * t->scale;
        t->gx[x] = wide ? e : vexp(e);
    }
}

/* Weights of every key, not normalized; returns their sums. */
static vf make_weights(Tile *t, const Shape *p, const float *logits, const float *pixel, int wide) {
    const int w = (int)p->width;
    vf total = splat(0);
    make_factors(t, wide);
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

/* Whether products may go by lists of the keys of each quad: their vectors hold channels. */
INLINE int may_list(const Shape *p) { return p->channels % LANES == 0; }

/* Lane of query i in quad j. */
INLINE int lane_of(int j, int i) {
    return j % (TILE_W / 2) * 2 + j / (TILE_W / 2) * 2 * TILE_W + i % 2 + i / 2 * TILE_W;
}

/* Of one row of keys, zeroes those at the ends that weigh at most `least`, query by query, and sets the spans that are
 * left of it; returns how many keys they hold. */
static int64_t trim_queries(const Tile *t, Segment s, vf *weights, Span *spans, vf least, vf *dropped) {
    const int n = s.x1 - s.x0;
    int64_t read = 0;
    vi first = (vi){0} + s.x0, last = (vi){0} + s.x1;
    vi out = ~(vi){0};
    for (int k = 0; k < n; ++k) {
        out &= weights[k] <= least;
        if (!any_of(out)) break;
        *dropped += pick(out, weights[k], splat(0));
        weights[k] = pick(out, splat(0), weights[k]);
        first -= out;
    }
    out = ~out;
    for (int k = n - 1; k >= 0; --k) {
        out &= weights[k] <= least;
        if (!any_of(out)) break;
        *dropped += pick(out, weights[k], splat(0));
        weights[k] = pick(out, splat(0), weights[k]);
        last += out;
    }
    for (int j = 0; j < QUADS; ++j) {
        spans[j] = (Span){s.x1, 0};
        for (int i = 0; i < 4; ++i) {
            const int q = lane_of(j, i);
            if (t->index[q] < 0 || first[q] >= last[q]) continue;
            spans[j].x0 = first[q] < spans[j].x0 ? first[q] : spans[j].x0;
            spans[j].x1 = last[q] > spans[j].x1 ? last[q] : spans[j].x1;
        }
        if (spans[j].x1 > spans[j].x0) read += spans[j].x1 - spans[j].x0;
    }
    return read;
}

/* Leaves out pairs at the ends of rows that, all together, weigh at most t->tolerance in every query;
 * reach2, which knows no more of the logits than the largest, leaves out as much. Takes them off the sums.
 * Far pixels count most in dsigma: cuts that spend the whole tolerance would exceed its error bound.
 * Returns how many keys the quads read, where that matters. */
static int64_t trim(Tile *t, const Shape *p, vf *total) {
    const vf least = *total * t->tolerance / (float)t->key_count;
    const vf own_least = 0.125f * least; /* unlike the ends of rows, where most queries leave out far less */
    vf dropped = splat(0);
    int64_t read = 0;
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
            if (to != from + a) memmove(to, from + a, (b - a) * sizeof(vf));
            s = (Segment){s.y, s.x0 + a, s.x0 + b};
            if (may_list(p)) read += trim_queries(t, s, to, t->spans[count], own_least, &dropped);
            to += b - a;
            t->segments[count++] = s;
        }
        from += n;
    }
    t->segment_count = count;
    t->key_count = (int)(to - t->weights);
    *total -= dropped;
    return read;
}

/* Rows of queries from columns of channels, and back. */
static void to_rows(Tile *t) {
    const float *columns = (const float *)t->columns;
    for (int64_t k = 0; k < t->row; k += LANES) transpose_lanes(columns + k * LANES, LANES, t->rows + k, t->row);
}

static void to_columns(Tile *t) {
    float *columns = (float *)t->columns;
    for (int64_t k = 0; k < t->row; k += LANES) transpose_lanes(t->rows + k, t->row, columns + k * LANES, LANES);
}

/* Whether the queries lie TILE_W to a row of memory: those of full tiles, where pixels are adjacent. */
static int in_rows(const Tile *t, const Shape *p) {
    for (int q = 0; q < LANES; ++q)
        if (t->index[q] < 0) return 0;
    return p->y_pixel == 1;
}

static void store_output(Tile *t, const Shape *p, float *y, int from_rows) {
    if (in_rows(t, p)) {
        if (from_rows) to_columns(t);
        const float *columns = (const float *)t->columns;
        for (int64_t k = 0; k < p->channels; ++k)
            for (int r = 0; r < TILE_H; ++r)
                memcpy(y + k * p->y_channel + t->index[r * TILE_W], columns + k * LANES + r * TILE_W, TILE_W * sizeof(float));
        return;
    }
    if (!from_rows) to_rows(t);
    for (int q = 0; q < LANES; ++q) {
        if (t->index[q] < 0) continue;
        const float *row = t->rows + q * t->row;
        float *to = y + t->index[q] * p->y_pixel;
        if (p->y_channel == 1) memcpy(to, row, p->channels * sizeof(float));
        else for (int64_t k = 0; k < p->channels; ++k) to[k * p->y_channel] = row[k];
    }
}

/* The gradient of the queries by query, and by channel if asked to; zero in lanes without one. */
static void load_gradient(Tile *t, const Shape *p, const float *dy, int by_channel) {
    const int64_t c = p->channels;
    if (in_rows(t, p)) {
        float *columns = (float *)t->columns;
        for (int64_t k = 0; k < c; ++k)
            for (int r = 0; r < TILE_H; ++r)
                memcpy(columns + k * LANES + r * TILE_W, dy + k * p->y_channel + t->index[r * TILE_W], TILE_W * sizeof(float));
        to_rows(t);
        return;
    }
    for (int q = 0; q < LANES; ++q) {
        float *row = t->rows + q * t->row;
        if (t->index[q] < 0) {
            memset(row, 0, c * sizeof(float));
            continue;
        }
        const float *from = dy + t->index[q] * p->y_pixel;
        if (p->y_channel == 1) memcpy(row, from, c * sizeof(float));
        else for (int64_t k = 0; k < c; ++k) row[k] = from[k * p->y_channel];
    }
    if (by_channel) to_columns(t);
}

static int open_tile(Tile *t, const Shape *p, int backward) {
    size_t keys = (size_t)(p->height * p->width), line = (size_t)(p->height + p->width);
    const size_t segments = p->height * (sizeof(Segment) * 2 + sizeof(Span[QUADS]));
    const size_t list = (size_t)(NARROW_CHUNK + p->width + LANES), lists = QUADS * list;
    const size_t row = (size_t)(p->channels + LANES - 1) / LANES * LANES;
    size_t vectors = keys * (backward ? 2 : 1) + line + (p->shared > 1 ? 3 : 2) * row;
    size_t bytes = vectors * sizeof(vf) + lists * sizeof(Entry) + segments + keys * sizeof(int) + 128;
    t->memory = malloc(bytes);
    if (!t->memory) return 0;
    vf *at = (vf *)(((uintptr_t)t->memory + 63) & ~(uintptr_t)63);
    t->gy = at; at += p->height;
    t->gx = at; at += p->width;
    t->weights = at; at += keys;
    t->dots = at; at += backward ? keys : 0;
    t->row = (int64_t)row;
    t->columns = at; at += row;
    t->rows = (float *)at; at += row;
    t->spare = at; at += p->shared > 1 ? row : 0;
    memset(t->columns, 0, (size_t)((char *)at - (char *)t->columns)); /* what lies behind the channels is never set */
    t->list_size = (int64_t)list;
    t->entries = (Entry *)at;
    t->spans = (Span(*)[QUADS])(t->entries + lists);
    t->segments = (Segment *)(t->spans + p->height);
    t->all = t->segments + p->height;
    t->places = (int *)(t->all + p->height);
    return 1;
}

/* Segments from i that hold about as many keys as are wanted. */
static int next_chunk(const Tile *t, int i, int wanted, int *keys) {
    int n = 0;
    do { n += t->segments[i].x1 - t->segments[i].x0; ++i; } while (i < t->segment_count && n < wanted);
    *keys = n;
    return i;
}
