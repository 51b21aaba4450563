/* Groups that share supports, pooled at once: one map of masks for all of them.
 *
 * With weights w_g of the groups, the largest of a pixel w, and u_g = w_g / w at most 1, a share's pools are
 * sum(A u_g x_g) / sum(A u_g), where A = mask w is the same for all its groups. The features u_g x_g and, behind them, the
 * u_g themselves are made once a map and pooled like those of one group.
 */
#pragma once
#include "products.h"

#define RATIOS 16 /* room for the u_g of a pixel, in multiples of it */

/* Floats of a folded pixel. */
INLINE int64_t folded_width(const Shape *p) {
    return p->shared * p->channels + (p->shared + RATIOS - 1) / RATIOS * RATIOS;
}

/* A folded share as a map of one group, and its channels alone as the groups' own maps hold them. */
INLINE Shape folded_shape(const Shape *p) {
    Shape q = *p;
    q.channels = q.x_pixel = q.dx_pixel = folded_width(p);
    return q;
}

INLINE Shape share_shape(const Shape *p) {
    Shape q = *p;
    q.channels = p->shared * p->channels;
    return q;
}

/* Where the channels of a share begin, of maps with such strides. */
INLINE int64_t first_channel(const Shape *p, int64_t share, int64_t image, int64_t channel) {
    const int64_t shares = p->groups / p->shared;
    return share / shares * image + share % shares * p->shared * p->channels * channel;
}

/* Whether weights of all groups may meet features before they are normalised. */
INLINE int can_fold(const Shape *p, const Facts *facts) {
    if (p->shared == 1) return 0;
    for (int64_t g = 0; g < p->shared; ++g)
        if (facts[g].wide || facts[g].tall) return 0;
    return 1;
}

/* `pixel` holds the weights of the groups, one map after the other. */
static void fold(const Shape *p, const float *pixel, const float *x, float *folded, float *common) {
    const int64_t n = p->height * p->width, c = p->channels, ratios = p->shared * c, width = folded_width(p);
    for (int64_t j = 0; j < n; ++j, x += p->x_pixel, folded += width) {
        float most = pixel[j];
        for (int64_t g = 1; g < p->shared; ++g) most = fmaxf(most, pixel[g * n + j]);
        common[j] = most;
        memset(folded + ratios, 0, (width - ratios) * sizeof(float));
        for (int64_t g = 0; g < p->shared; ++g) {
            const float u = pixel[g * n + j] / most;
            for (int64_t k = 0; k < c; ++k) folded[g * c + k] = x[g * c + k] * u;
            folded[ratios + g] = u;
        }
    }
}

/* Weights A in a tile that make_tile has made; returns whether to go by lists. */
static int weigh_share(Tile *t, const Shape *q, const float *pixel, const float *common) {
    const int64_t n = q->height * q->width;
    make_weights(t, q, NULL, common, 0);
    vf least = splat(INFINITY); /* the nearest pixel alone weighs so much in every group's sum */
    for (int i = 0; i < LANES; ++i)
        for (int64_t g = 0; g < q->shared; ++g)
            least[i] = fminf(least[i], pixel[g * n + (int64_t)t->near_y[i] * q->width + (int64_t)t->near_x[i]]);
    return is_narrow(t, q, trim(t, q, &least));
}

static void pool_share(Tile *t, const Shape *p, const float *pixel, const float *common, const float *folded, float *out) {
    const Shape q = folded_shape(p), own = share_shape(p);
    const int64_t c = p->channels, ratios = own.channels;
    const int narrow = weigh_share(t, &q, pixel, common);
    sum_features(t, &q, folded, narrow);
    if (narrow)
        for (int i = 0; i < LANES; ++i)
            for (int64_t g = 0; g < p->shared; ++g) {
                const float *from = t->rows + i * t->row;
                const float inverse = 1 / from[ratios + g];
                for (int64_t k = g * c; k < (g + 1) * c; ++k) t->rows[i * t->row + k] = from[k] * inverse;
            }
    else
        for (int64_t g = 0; g < p->shared; ++g) {
            const vf inverse = 1 / t->columns[ratios + g];
            for (int64_t k = g * c; k < (g + 1) * c; ++k) t->columns[k] *= inverse;
        }
    store_output(t, &own, out, narrow);
}

/* Gradients of the folded map from a tile; returns its part of dsigma by query, without the factor sigma^-3. */
static vf differentiate_share(Tile *t, const Shape *p, const float *pixel, const float *common, const float *folded,
                              const float *dy, float *dfolded) {
    const Shape q = folded_shape(p), own = share_shape(p);
    const int64_t c = p->channels, ratios = own.channels;
    const int narrow = weigh_share(t, &q, pixel, common);
    sum_features(t, &q, folded, narrow);
    if (narrow) to_columns(t);
    vf *sums = t->columns;
    t->columns = t->spare;
    t->spare = sums;
    load_gradient(t, &own, dy, 1);
    memset(t->columns + ratios, 0, (q.channels - ratios) * sizeof(vf));
    for (int64_t g = 0; g < p->shared; ++g) {
        vf inverse = 1 / sums[ratios + g], mean = splat(0);
        for (int i = 0; i < LANES; ++i)
            if (t->index[i] < 0) inverse[i] = 0;
        for (int64_t k = g * c; k < (g + 1) * c; ++k) {
            t->columns[k] *= inverse;
            mean += t->columns[k] * sums[k];
        }
        t->columns[ratios + g] = -mean * inverse;
    }
    to_rows(t);
    spread_gradients(t, &q, folded, dfolded, narrow);
    vf dscale = splat(0);
    for (int i = 0, k = 0; i < t->segment_count; ++i) {
        const Segment s = t->segments[i];
        const vf off_y = offset2(t->center_y, t->near_y, s.y);
        for (int x = s.x0; x < s.x1; ++x, ++k)
            dscale += t->weights[k] * t->dots[k] * (off_y + offset2(t->center_x, t->near_x, x));
    }
    return dscale;
}

/* Gradients of a share's features and logits from those of its folded map, summed over bands that lie `band` apart. */
static void unfold(const Shape *p, const float *folded, const float *dfolded, int64_t band, const float *x, float *dx,
                   float *dlogits) {
    const int64_t n = p->height * p->width, c = p->channels, ratios = p->shared * c, width = folded_width(p);
    for (int64_t j = 0; j < n; ++j, x += p->x_pixel, dx += p->dx_pixel, folded += width, dfolded += width)
        for (int64_t g = 0; g < p->shared; ++g) {
            const float u = folded[ratios + g];
            float sum = 0;
            for (int64_t b = 0; b < p->bands; ++b) {
                const float *from = dfolded + b * band;
                sum += from[ratios + g];
                for (int64_t k = g * c; k < (g + 1) * c; ++k) {
                    sum += from[k] * x[k];
                    dx[k] += from[k] * u;
                }
            }
            dlogits[g * n + j] = sum * u;
        }
}
