/* Products of the weights of a tile with features, in the form that takes less work. */
#pragma once
#include "dense.h"
#include "quads.h"

/* Weighted sums of the features over the keys: in rows by query where narrow, else in columns. */
static void sum_features(Tile *t, const Shape *p, const float *in, int narrow) {
    memset(narrow ? (vf *)t->rows : t->columns, 0, t->row * sizeof(vf));
    for (int i = 0, k = 0, keys; i < t->segment_count; k += keys) {
        int end = next_chunk(t, i, narrow ? NARROW_CHUNK : CHUNK, &keys);
        if (narrow) {
            list_keys(t, p, i, end, k);
            pool_lists(t, p, in, p->x_pixel);
        } else {
            pool_all(t, p, in, p->x_pixel, i, end, k);
        }
        i = end;
    }
}

/* From the gradient in rows and columns: its products with the features, and what each key gets of it. */
static void spread_gradients(Tile *t, const Shape *p, const float *in, float *din, int narrow) {
    if (narrow) memset(t->dots, 0, t->key_count * sizeof(vf)); /* quads add to those that they read */
    for (int i = 0, k = 0, keys; i < t->segment_count; k += keys) {
        int end = next_chunk(t, i, narrow ? NARROW_CHUNK : CHUNK, &keys);
        if (narrow) {
            list_keys(t, p, i, end, k);
            dot_lists(t, p, in, p->x_pixel);
            spread_lists(t, p, din, p->dx_pixel, i, end, k);
        } else {
            place_keys(t, p, i, end);
            dot_all(t, p, in, p->x_pixel, keys, k);
            spread_all(t, p, din, p->dx_pixel, keys, k);
        }
        i = end;
    }
}
