/* int8 by small squared error: the scale of quant/int8_scale.py, whose docstring explains the search. It needs the
 * states of the whole row at some twenty scales, and no branch depends on a single weight.
 *
 * Every step on scales is one float64 operation at a time, in the order of the torch version; the sums are integers. */
#ifndef NPUQ_CONVERT_MSE_INT8_MSE_H
#define NPUQ_CONVERT_MSE_INT8_MSE_H

#include "convert/mse/mse_breakpoints.h"
#include "convert/magnitude_planes.h"

enum {
    SCALE_CODE = 127, /* the largest weight's at the min-max scale */
    MOST_DOWN = 160,
    MOST_GRID = 400,
    REFINEMENTS = 4,
    PEER_ROUNDS = 50,
    MOST_NODES = MOST_GRID + REFINEMENTS + 4 * PEER_ROUNDS,
    LOW_BITS = 9, /* fixed = 512 · high + low, each in 16 bits */
    INT8_PART = 128 * PLANE_STEP, /* 2^8 products of 2^14 and 2^7 fit 32 bits */
};

#define GRID_STEP 0.3
#define MOST_STEP 0.05
#define LUCK 8.0
#define HIGHEST 2.0
#define LOWEST (1.0 / 128)
#define NARROWEST 0.125
#define LEAP 1.8
#define DOUBT 1e-6

/* A row w in floats and in fixed point, zero-padded (w to a multiple of 64). The two halves of the fixed point are in the
 * order in which vs_pack leaves weights. */
struct int8_row {
    const float *w;
    int16_t *high, *low;
    size_t n, padded;
    double unit, norm; /* fixed = w · unit; Σ fixed² */
};

/* A scale, the error Σ (w − s·q)² there and its slope, and the sums A and B of its codes; the least error to be expected
 * before the next node, and where. */
struct node {
    double scale, error, slope;
    int64_t a, b;
    double valley, valley_scale;
};

/* Nodes by rising scale. */
struct int8_search {
    const struct int8_row *row;
    struct exact_state best;
    size_t count;
    struct node nodes[MOST_NODES];
};

/* Fills `padded`, `high`, `low` and `norm`, which is 2^63 at most. */
static void split_row(struct int8_row *row) {
    const float unit = (float)row->unit;
    row->padded = (row->n + 2 * PLANE_STEP - 1) / (2 * PLANE_STEP) * (2 * PLANE_STEP);
    vl even = {0}, odd = {0};
    for (size_t i = 0; i < row->padded; i += PLANE_STEP) {
        vi first = vf_round(vf_load(row->w + i) * unit), second = vf_round(vf_load(row->w + i + VW) * unit);
        vs high = vs_pack(first >> LOW_BITS, second >> LOW_BITS);
        vs low = vs_pack(first & ((1 << LOW_BITS) - 1), second & ((1 << LOW_BITS) - 1));
        memcpy(row->high + i, &high, sizeof high);
        memcpy(row->low + i, &low, sizeof low);
        vl_squares(first, &even, &odd);
        vl_squares(second, &even, &odd);
    }
    row->norm = (double)((uint64_t)vl_total(even) + (uint64_t)vl_total(odd));
}

INLINE void int8_add(const struct int8_row *row, size_t i, vf inverse, struct plane_sums *sums) {
    vi first = vf_round(vf_load(row->w + i) * inverse), second = vf_round(vf_load(row->w + i + VW) * inverse);
    vs code = vs_max(vs_min(vs_pack(first, second), vs_set(127)), vs_set(-128));
    sums->high = vs_dot(sums->high, vs_load(row->high + i), code);
    sums->low = vs_dot(sums->low, vs_load(row->low + i), code);
    sums->squares = vs_dot(sums->squares, code, code);
}

/* A = Σ fixed·q and B = Σ q² for codes q rounded as round_codes does. */
static struct exact_state int8_state(const struct int8_row *row, float reciprocal) {
    const vf inverse = vf_set(reciprocal);
    int64_t a = 0, b = 0;
    for (size_t part = 0; part < row->padded; part += INT8_PART) {
        size_t end = part + INT8_PART < row->padded ? part + INT8_PART : row->padded;
        struct plane_sums even = {{0}, {0}, {0}}, odd = even; /* two sets: additions wait for each other */
        for (size_t i = part; i < end; i += 2 * PLANE_STEP) {
            int8_add(row, i, inverse, &even);
            int8_add(row, i + PLANE_STEP, inverse, &odd);
        }
        a += vi_total(even.high + odd.high) * (1 << LOW_BITS) + vi_total(even.low + odd.low);
        b += vi_total(even.squares + odd.squares);
    }
    return (struct exact_state){a, b, 0};
}

INLINE double best_error(const struct int8_search *search) { return search->row->norm - search->best.score; }

/* The scale of least error for a node's codes: where the iterative search goes from there. */
INLINE double next_scale(const struct node *node) { return (double)node->a / (double)node->b; }

/* The place of a node at that scale, evaluated unless it is there. */
static size_t visit(struct int8_search *search, double scale) {
    size_t at = search->count;
    while (at > 0 && search->nodes[at - 1].scale >= scale) at--;
    struct node *place = &search->nodes[at];
    if (at < search->count && place->scale == scale) return at;
    memmove(place + 1, place, (search->count++ - at) * sizeof *place);
    const struct exact_state state = int8_state(search->row, (float)(1.0 / scale * search->row->unit));
    const double a = (double)state.a, b = (double)state.b;
    const double error = search->row->norm - 2 * scale * a + scale * scale * b;
    *place = (struct node){scale, error, 2 * (scale * b - a), state.a, state.b, INFINITY, 0};
    offer(&search->best, state.a, state.b);
    return at;
}

/* Nodes from min-max downwards until clipping costs more than lucky rounding can win back, and upwards until coarser
 * codes do. */
static void visit_grid(struct int8_search *search, double minmax, double step) {
    const double n = (double)search->row->n, spread = fmin(1, LUCK / sqrt(n));
    double scale = minmax * (1 - DOUBT);
    visit(search, scale);
    visit(search, minmax * (1 + DOUBT));
    while (search->count < MOST_DOWN && scale > LOWEST * minmax) {
        scale = scale / (1 + step);
        double error = search->nodes[visit(search, scale)].error;
        if (error - best_error(search) > spread * n * scale * scale / 12) break;
    }
    for (scale = minmax * (1 + step); search->count < MOST_GRID; scale = scale * (1 + step)) {
        if (scale > HIGHEST * minmax || (1 - spread) * n * scale * scale / 12 > best_error(search)) break;
        visit(search, scale);
    }
}

/* Finds the least error that the cubic through two neighbours' errors and slopes has between them; infinite where there is
 * no valley, or they are too near each other. */
static void expect_valley(struct node *left, double narrowest) {
    const struct node *right = left + 1;
    const double width = right->scale - left->scale, rise = right->error - left->error;
    left->valley = INFINITY;
    if (left->slope >= 0 || right->slope <= 0 || width < narrowest) return;
    const double m1 = left->slope * width, m2 = right->slope * width;
    const double c2 = 3 * rise - 2 * m1 - m2, c3 = m1 + m2 - 2 * rise;
    const double t = -m1 / (c2 + sqrt(fmax(c2 * c2 - 3 * c3 * m1, 0)));
    if (!(t > 0 && t < 1)) return;
    left->valley = left->error + t * (m1 + t * (c2 + t * c3));
    left->valley_scale = left->scale + t * width;
}

/* Visits the deepest valley expected between two neighbouring nodes, REFINEMENTS times. */
static void refine_grid(struct int8_search *search, double narrowest) {
    struct node *nodes = search->nodes;
    for (size_t i = 0; i + 1 < search->count; i++) expect_valley(&nodes[i], narrowest);
    for (int round = 0; round < REFINEMENTS; round++) {
        size_t deepest = 0;
        for (size_t i = 1; i + 1 < search->count; i++) {
            if (nodes[i].valley < nodes[deepest].valley) deepest = i;
        }
        if (isinf(nodes[deepest].valley)) return;
        const size_t count = search->count;
        visit(search, nodes[deepest].valley_scale);
        if (search->count == count) return; /* one of its ends */
        expect_valley(&nodes[deepest], narrowest);
        expect_valley(&nodes[deepest + 1], narrowest);
    }
}

/* True where every state between two nodes has at least the best error seen. */
static int is_ruled_out(const struct int8_search *search, const struct node *x, const struct node *y) {
    const struct node *lo = x->scale < y->scale ? x : y, *hi = x->scale < y->scale ? y : x;
    const struct state high = {(double)hi->a, (double)hi->b}, low = {(double)lo->a, (double)lo->b};
    return interval_bound(high, low, hi->scale / 2 * (1 + DOUBT), lo->scale / 2 * (1 - DOUBT)) <= search->best.score;
}

/* Follows the iterative search from beside min-max, one way, until it cannot find anything better than the best node.
 * States between two nodes are leapt over where they are ruled out. */
static void follow_iteration(struct int8_search *search, double minmax, const int sign) {
    size_t at = visit(search, minmax * (1 + sign * DOUBT));
    for (int round = 0; round < PEER_ROUNDS;) {
        const struct node here = search->nodes[at];
        const double ahead = (next_scale(&here) - here.scale) * sign;
        if (ahead <= -DOUBT / 2 * here.scale) return; /* it turns round before it gets here */
        const size_t neighbour = at + (size_t)sign; /* wraps below 0 */
        const int last = neighbour >= search->count;
        if (!last && is_ruled_out(search, &here, &search->nodes[neighbour])) {
            at = neighbour;
            continue;
        }
        round++;
        const double step = fmax(ahead, DOUBT * here.scale), more = fmax(here.error - best_error(search), 0);
        const double leap = LEAP * sqrt(more / search->row->norm) * here.scale;
        if (leap > step && (last || leap < (search->nodes[neighbour].scale - here.scale) * sign)) {
            const size_t to = visit(search, here.scale + sign * leap);
            if (is_ruled_out(search, &here, &search->nodes[to])) {
                at = to;
                continue;
            }
        }
        at = visit(search, here.scale + sign * step);
    }
}

/* The best state found of a row whose largest magnitude is `largest` > 0 in fixed point. */
static struct exact_state search_int8(const struct int8_row *row, double largest, struct int8_search *search) {
    const double minmax = largest / SCALE_CODE;
    const double step = fmin(GRID_STEP * minmax / sqrt(row->norm / (double)row->n), MOST_STEP);
    search->row = row;
    search->count = 0;
    search->best = (struct exact_state){0, 0, 0};
    visit_grid(search, minmax, step);
    refine_grid(search, NARROWEST * step * minmax);
    follow_iteration(search, minmax, -1);
    follow_iteration(search, minmax, 1);
    return search->best;
}

#endif
