/* Context pooling on a processor: every tile of query cells reads the disc of pixels that its supports reach.
 *
 * Maps are (pixels, channels), one map per image and group. Weights factorize: a = gy[row] gx[column] w[pixel], kept
 * unnormalized until the end of a tile. Their products with the features take one of two forms: dense.h where the
 * queries of a tile read much the same keys, quads.h where they do not.
 */
#include "products.h"
#include "shared.h"

#define MAX_SPREAD 60.0f /* of the logits in a map: beyond, products of factors leave the range of fp32 */
#define TALL 24.0f       /* beyond, weights are normalized before they meet features of any size */

/* exp(l - middle) for logits that lie middle to both sides: the rounding of the difference, up to a millionth, is made
 * up for. */
INLINE vf exp_from(vf l, float middle) {
    const vf below = l - middle, back = below - l;
    const vf e = vexp(below);
    return e + e * ((l - (below - back)) - (middle + back));
}

static Facts read_logits(const float *l, int64_t n, float *pixel) {
    float high = -INFINITY, low = INFINITY;
    int finite = 1;
    for (int64_t i = 0; i < n; ++i) {
        high = l[i] > high ? l[i] : high;
        low = l[i] < low ? l[i] : low;
        finite &= (l[i] - l[i] == 0);
    }
    const Facts facts = {high, !finite, !finite || !(high - low <= MAX_SPREAD), high - low > TALL};
    if (facts.wide) return facts;
    float middle = 0.5f * (high + low);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) *(vf *)(pixel + i) = exp_from(*(const vf *)(l + i), middle);
    for (vf rest = splat(middle); i < n; ++i) {
        rest[0] = l[i];
        pixel[i] = exp_from(rest, middle)[0];
    }
    return facts;
}

/* What every thread does first: memory for its tile, a share of the maps' logits, and of the maps to fold. Returns 0
 * without memory. */
static int begin(Tile *t, const Shape *p, int backward, const float *x, const float *logits, float *pixel, float *folded,
                 Facts *facts, int *failed) {
    const int64_t n = p->height * p->width, shares = p->maps / p->shared;
    const Shape q = folded_shape(p);
    const int ok = open_tile(t, p->shared > 1 ? &q : p, backward);
    if (!ok) {
#pragma omp atomic write
        *failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t m = 0; m < p->maps; ++m) facts[m] = read_logits(logits + m * n, n, pixel + m * n);
    if (p->shared == 1) return ok;
#pragma omp for schedule(static)
    for (int64_t share = 0; share < shares; ++share)
        if (can_fold(p, facts + share * p->shared))
            fold(p, pixel + share * p->shared * n, x + first_channel(p, share, p->x_image, 1),
                 folded + share * n * q.channels, folded + shares * n * q.channels + share * n);
    return ok;
}

/* Weights of map m in a tile that make_tile has made, not normalized; sets their sums and returns whether to go by
 * lists. */
static int weigh(Tile *t, const Shape *p, const Facts *facts, int64_t m, const float *logits, const float *pixel,
                 vf *total) {
    const int64_t n = p->height * p->width;
    if (p->shared > 1) {
        memcpy(t->segments, t->all, t->all_count * sizeof(Segment));
        t->segment_count = t->all_count;
        t->key_count = t->all_keys;
    }
    *total = make_weights(t, p, logits + m * n, pixel + m * n, facts[m].wide);
    return is_narrow(t, p, trim(t, p, total));
}

/* Output of map m in a tile. */
static void pool_tile(Tile *t, const Shape *p, const Facts *facts, int64_t m, const float *logits, const float *pixel,
                      const float *in, float *out) {
    const int64_t c = p->channels;
    vf total;
    const int narrow = weigh(t, p, facts, m, logits, pixel, &total);
    vf inverse = 1.0f / total;
    if (facts[m].tall) {
        for (int k = 0; k < t->key_count; ++k) t->weights[k] *= inverse;
        inverse = splat(1);
    }
    sum_features(t, p, in, narrow);
    if (narrow)
        for (int q = 0; q < LANES; ++q)
            for (int64_t k = 0; k < c; ++k) t->rows[q * t->row + k] *= inverse[q];
    else
        for (int64_t k = 0; k < c; ++k) t->columns[k] *= inverse;
    store_output(t, p, out, narrow);
}

/* Gradients of map m from a tile; returns its part of dsigma by query, without the factor sigma^-3. */
static vf differentiate_tile(Tile *t, const Shape *p, const Facts *facts, int64_t m, const float *logits,
                             const float *pixel, const float *in, const float *dy, float *din, float *dl) {
    vf total;
    const int narrow = weigh(t, p, facts, m, logits, pixel, &total);
    vf inverse = 1.0f / total;
    for (int q = 0; q < LANES; ++q)
        if (t->index[q] < 0) inverse[q] = 0;
    load_gradient(t, p, dy, !narrow);
    for (int k = 0; k < t->key_count; ++k) t->weights[k] *= inverse;
    spread_gradients(t, p, in, din, narrow);
    vf mean = splat(0), dscale = splat(0);
    for (int k = 0; k < t->key_count; ++k) mean += t->weights[k] * t->dots[k];
    for (int i = 0, k = 0; i < t->segment_count; ++i) {
        const Segment s = t->segments[i];
        const vf off_y = offset2(t->center_y, t->near_y, s.y);
        float *to = dl + (int64_t)s.y * p->width;
        for (int at = s.x0; at < s.x1; at += LANES) {
            vf u[LANES];
            const int some = s.x1 - at < LANES ? s.x1 - at : LANES;
            for (int j = 0; j < LANES; ++j) u[j] = splat(0);
            for (int j = 0; j < some; ++j, ++k) {
                u[j] = t->weights[k] * (t->dots[k] - mean);
                dscale += u[j] * (off_y + offset2(t->center_x, t->near_x, at + j));
            }
            const vf sums = add_lanes(u);
            add_some(to + at, sums, some);
        }
    }
    return dscale;
}

int cpool_forward(const Shape *p, const float *x, const float *logits, const float *sigma, float *pixel,
                  float *folded, float *y) {
    const int64_t n = p->height * p->width, no = p->out_height * p->out_width, c = p->channels;
    const int64_t shares = p->maps / p->shared, width = folded_width(p);
    const float *common = folded + shares * n * width;
    const int rows = (int)((p->out_height + TILE_H - 1) / TILE_H), cols = (int)((p->out_width + TILE_W - 1) / TILE_W);
    Facts *facts = malloc(sizeof(Facts) * p->maps);
    int failed = !facts;
    if (failed) return 1;
#pragma omp parallel num_threads(p->threads)
    {
        FLUSH_SUBNORMALS;
        Tile tile, *t = &tile;
        const int ok = begin(t, p, 0, x, logits, pixel, folded, facts, &failed);
#pragma omp for schedule(dynamic) nowait
        for (int64_t job = 0; job < shares * rows; ++job) {
            const int64_t share = job / rows, first = share * p->shared;
            for (int tx = 0; ok && tx < cols; ++tx) {
                make_tile(t, p, (int)(job % rows), tx, sigma + share * no, logits + first * n, facts + first);
                if (can_fold(p, facts + first)) {
                    pool_share(t, p, pixel + first * n, common + share * n, folded + share * n * width,
                               y + first_channel(p, share, p->y_image, p->y_channel));
                    continue;
                }
                for (int64_t m = first; m < first + p->shared; ++m) {
                    const int64_t b = m / p->groups, g = m % p->groups;
                    pool_tile(t, p, facts, m, logits, pixel, x + b * p->x_image + g * c,
                              y + b * p->y_image + g * c * p->y_channel);
                }
            }
        }
        if (ok) free(t->memory);
        RESTORE_SUBNORMALS;
    }
    free(facts);
    return failed;
}

/* dx (bands, images, pixels, groups * channels) and dlogits (bands, maps, pixels) are sums of each band, zero at first,
 * as is dfolded. dsigma lacks its factor sigma^-3. */
int cpool_backward(const Shape *p, const float *grad, const float *x, const float *logits, const float *sigma,
                   float *pixel, float *folded, float *dfolded, float *dx, float *dlogits, float *dsigma) {
    const int64_t n = p->height * p->width, no = p->out_height * p->out_width, c = p->channels;
    const int64_t images = p->maps / p->groups, shares = p->maps / p->shared;
    /* Threads stay apart: in dx, pixels of neighboring groups lie in the same lines of the cache. */
    const int64_t threads = p->threads, each = (shares + threads - 1) / threads;
    const int64_t width = folded_width(p), band_size = shares * n * width;
    const float *common = folded + shares * n * width;
    const int rows = (int)((p->out_height + TILE_H - 1) / TILE_H), cols = (int)((p->out_width + TILE_W - 1) / TILE_W);
    Facts *facts = malloc(sizeof(Facts) * p->maps);
    int failed = !facts;
    if (failed) return 1;
#pragma omp parallel num_threads(p->threads)
    {
        FLUSH_SUBNORMALS;
        Tile tile, *t = &tile;
        const int ok = begin(t, p, 1, x, logits, pixel, folded, facts, &failed);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < threads * each * p->bands; ++job) {
            const int64_t place = job / p->bands, band = job % p->bands;
            const int64_t share = place % threads * each + place / threads, first = share * p->shared;
            if (share >= shares) continue;
            const int from = (int)(rows * band / p->bands), to = (int)(rows * (band + 1) / p->bands);
            for (int at = from * cols; ok && at < to * cols; ++at) {
                make_tile(t, p, at / cols, at % cols, sigma + share * no, logits + first * n, facts + first);
                vf dscale = splat(0);
                if (can_fold(p, facts + first))
                    dscale = differentiate_share(
                        t, p, pixel + first * n, common + share * n, folded + share * n * width,
                        grad + first_channel(p, share, p->y_image, p->y_channel),
                        dfolded + band * band_size + share * n * width);
                else for (int64_t m = first; m < first + p->shared; ++m) {
                    const int64_t b = m / p->groups, g = m % p->groups;
                    dscale += differentiate_tile(
                        t, p, facts, m, logits, pixel, x + b * p->x_image + g * c,
                        grad + b * p->y_image + g * c * p->y_channel,
                        dx + (band * images + b) * p->dx_image + g * c, dlogits + (band * p->maps + m) * n);
                }
                for (int q = 0; q < LANES; ++q)
                    if (t->index[q] >= 0) dsigma[share * no + t->index[q]] = dscale[q];
            }
        }
#pragma omp for schedule(static)
        for (int64_t share = 0; share < shares; ++share)
            if (can_fold(p, facts + share * p->shared))
                unfold(p, folded + share * n * width, dfolded + share * n * width, band_size,
                       x + first_channel(p, share, p->x_image, 1), dx + first_channel(p, share, p->dx_image, 1),
                       dlogits + share * p->shared * n);
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
