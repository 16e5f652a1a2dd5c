/* The window of scales that can hold the optimum, for int4 codes, and the few weights whose code changes inside it.
 *
 * States are evaluated at chosen scales, first of the whole row in int16 (planes.h), then of the weights that are left
 * in float32. Between two neighbouring scales no state is better than interval_bound; intervals whose bound is below the
 * best state seen are dropped, the others halved until they are narrow.
 *
 * A rounding that is in doubt by z (of |w| or of κ) passes all breakpoints above h + z and none below h − z, so that an
 * interval is bounded with its ends moved out by z. A state whose own h lies within z of an end differs from the end's
 * only by breakpoints within z of it: by at most 2z times the interval's B more in A than the two lines say. */
#ifndef NPUQ_KERNELS_BRACKET_H
#define NPUQ_KERNELS_BRACKET_H

#include "exact.h"
#include "planes.h"

/* PART: products of 2^23 and 8 of which 16 fit a 32-bit lane. */
enum { MOST_MARKS = 160, ACTIVE_PARTS = 12, PART = 16 * VW };

/* Widths, relative, below which intervals stay as they are. */
#define WHOLE_ROW_WIDTH 0.012
#define ACTIVE_WIDTH 0.003
/* Marks whose A² / B is this much below the best need not be exact. */
#define ROUGH_GAP 8e-4
/* How far from a threshold float32 rounding may go wrong, and how much wider a window is collected on its account. */
#define ROUNDING_DOUBT 1e-6
#define WINDOW_DOUBT 1e-5

/* Weights whose code changes in the window, and the sums of all others. */
struct active_row {
    struct optimal_row row;
    int64_t a, b;
};

/* Marks by falling h. `planes` or `active` is what is evaluated. */
struct bracket {
    const struct planes *planes;
    const struct active_row *active;
    size_t count;
    double best, best_h; /* A² / B of the best mark, and where it is */
    struct mark marks[MOST_MARKS];
};

/* Stores the lanes that `keep` selects, packed, with room behind them for a whole vector; how many. */
INLINE size_t vi_compress(vi keep, vi v, int32_t *out) {
#if defined(NPUQ_LEVEL_AVX512)
    __mmask16 mask = _mm512_movepi32_mask((__m512i)keep);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, (__m512i)v));
    return (size_t)__builtin_popcount(mask);
#else
    int32_t lane[VW], flag[VW];
    size_t kept = 0;
    memcpy(lane, &v, sizeof v);
    memcpy(flag, &keep, sizeof keep);
    for (int i = 0; i < VW; i++) {
        out[kept] = lane[i];
        kept += flag[i] != 0;
    }
    return kept;
#endif
}

static struct mark active_mark(const struct active_row *active, double h) {
    const struct optimal_row *row = &active->row;
    struct mark mark = {h, active->a, active->b};
    const vf inverse = vf_set((float)(0.5 / h));
    vl sum = {0};
    vi b = {0};
    for (size_t part = 0; part < row->n; part += PART) {
        size_t end = part + PART < row->n ? part + PART : row->n;
        vi a = {0};
        for (size_t i = part; i < end; i += VW) {
            vi fixed = vi_load(row->fixed + i);
            vf limit = vi_float(7 - (fixed >> 31));
            vi code = window_codes(vf_load(row->magnitude + i), inverse, limit);
            a += (fixed ^ (fixed >> 31)) * code - (fixed >> 31) * code; /* |w| · q */
            b += code * code;
        }
        sum = vl_add(sum, a);
    }
    mark.a += vl_total(sum);
    mark.b += vi_total(b);
    return mark;
}

INLINE double mark_score(struct mark mark) { return score_of((struct state){(double)mark.a, (double)mark.b}); }

INLINE double mark_doubt(const struct bracket *bracket, double h) {
    return bracket->planes != NULL ? PLANE_DOUBT : h * ROUNDING_DOUBT;
}

/* Puts a mark at its place. */
static void insert_mark(struct bracket *bracket, struct mark mark) {
    
    size_t at = bracket->count++;
    for (; at > 0 && bracket->marks[at - 1].h < mark.h; at--) bracket->marks[at] = bracket->marks[at - 1];
    bracket->marks[at] = mark;
}

static void add_mark(struct bracket *bracket, double h) {
    struct mark mark = bracket->planes != NULL ? plane_mark(bracket->planes, h) : active_mark(bracket->active, h);
    insert_mark(bracket, mark);
    if (mark_score(mark) > bracket->best) bracket->best = mark_score(mark), bracket->best_h = mark.h;
}

/* A mark far from the best one, or near it: `from` is its neighbour. */
static void march(struct bracket *bracket, struct mark from, double h) {
    if (1 - mark_score(from) / bracket->best > ROUGH_GAP) insert_mark(bracket, rough_mark(bracket->planes, h));
    else add_mark(bracket, h);
}

/* No state between marks i and i + 1 has a larger A² / B. */
static double bound_below(const struct bracket *bracket, size_t i) {
    struct mark hi = bracket->marks[i], lo = bracket->marks[i + 1];
    double z = mark_doubt(bracket, hi.h), more = 2 * z * (double)(lo.b - hi.b);
    struct state high = {(double)hi.a + more, (double)hi.b}, low = {(double)lo.a + more, (double)lo.b};
    return interval_bound(high, low, hi.h + z, lo.h - z);
}

/* Halves every interval that may hold the optimum until it is narrower than `width`; the hull of those that remain. */
static struct interval refine(struct bracket *bracket, double width) {
    struct interval window = {0, bracket->marks[0].h, 0};
    for (size_t i = 0; i + 1 < bracket->count;) {
        double hi = bracket->marks[i].h, lo = bracket->marks[i + 1].h, z = mark_doubt(bracket, hi);
        /* Marks must be farther apart than their doubts, and may lie 2^-14 beside the h that was asked for. */
        int wide = hi - lo > fmax(width * lo, 8 * z + lo / 2048) && bracket->count < MOST_MARKS;
        int open = bound_below(bracket, i) >= bracket->best * COARSE_SLACK;
        if (open && wide) {
            add_mark(bracket, sqrt(hi * lo));
            continue;
        }
        if (open) {
            window.hi = fmax(window.hi, hi + z);
            window.lo = lo - z;
        }
        i++;
    }
    return window;
}

/* A step away from the best mark at which, for Gaussian weights, an interval's bound just stays below it. */
static double step_from(const struct bracket *bracket, struct mark mark) {
    double gap = 1 - mark_score(mark) / bracket->best;
    return fmin(1, fmax(0.01, 1.25 * sqrt(2 * gap)));
}

/* Σ w² of the weights below half scale h, which are zeros at this scale and every larger one; a lower bound. */
static double zeroed_norm(const struct optimal_row *row, double h) {
    vf sum = vf_set(0), limit = vf_set((float)(h * (1 - ROUNDING_DOUBT)));
    for (size_t i = 0; i < row->n; i += VW) {
        vf w = vf_load(row->magnitude + i);
        w = (vf)((vi)w & (vi)(w < limit));
        sum = vf_fma(w, w, sum);
    }
    return (double)vf_sum(sum) * (1 - 1e-2); /* 2^17 / VW additions of 2^-24 */
}

/* Marks upwards from the best until nothing above them can be better. Returns 1 if that was shown at the last mark
 * itself, 0 if the marks reach to where every code is 0. */
static int march_up(struct bracket *bracket, const struct optimal_row *row, double largest) {
    double tried = 0;
    while (bracket->count < MOST_MARKS / 2) {
        struct mark top = bracket->marks[0];
        if (top.h > fmax(tried, 2.2 * bracket->best_h)) {
            if (row->norm - zeroed_norm(row, top.h - PLANE_DOUBT) < bracket->best * COARSE_SLACK) return 1;
            tried = 1.15 * top.h;
        }
        double next = top.h * (1 + step_from(bracket, top)) + 4 * PLANE_DOUBT;
        if (next >= largest - 4 * PLANE_DOUBT) break;
        march(bracket, top, next);
    }
    return 0;
}

/* Marks downwards from the best until nothing below them can be better; 0 if that was not reached. `all` is A when
 * every code is its last. */
static int march_down(struct bracket *bracket, const struct optimal_row *row, double largest, double all) {
    while (bracket->count < 3 * MOST_MARKS / 4) {
        struct mark low = bracket->marks[bracket->count - 1];
        /* The largest weight alone, if it is clipped at 8 scales. */
        double clipped = largest - 16 * (low.h + PLANE_DOUBT);
        if (clipped > 0 && row->norm - clipped * clipped < bracket->best * COARSE_SLACK) return 1;
        double above = bracket->count > 1 ? (double)(low.b - bracket->marks[bracket->count - 2].b) : 0;
        double a = (double)low.a + 2 * PLANE_DOUBT * above, rest = fmax(0, all - a);
        /* A grows by `rest` at most, and by no more than h a unit of B. */
        struct state kink = {a + rest, (double)low.b + rest / (low.h + PLANE_DOUBT)};
        double most = fmax(score_of(kink), score_of((struct state){a, (double)low.b}));
        if (bracket->count > 1 && most < bracket->best * COARSE_SLACK) return 1;
        double next = low.h / (1 + step_from(bracket, low)) - 4 * PLANE_DOUBT;
        if (next < PLANE_LEAST) return 0;
        march(bracket, low, next);
    }
    return 0;
}

/* The window for a whole row. `guess` is a half scale to begin at, `all` as above. */
static struct interval bracket_row(struct bracket *bracket, const struct optimal_row *row, const struct planes *planes,
                                   double largest, double guess, double all) {
    *bracket = (struct bracket){.planes = planes, .count = 0};
    if (largest < 4 * PLANE_LEAST) return (struct interval){largest, 0, 0};
    add_mark(bracket, fmin(fmax(guess, PLANE_LEAST), largest / 2));
    /* A / B is the best scale for the codes at hand; the optimum lies some four times as far. */
    double drift = (double)bracket->marks[0].a / (2 * bracket->marks[0].h * (double)bracket->marks[0].b) - 1;
    if (fabs(drift) > 0.003 && fabs(drift) < 0.1) add_mark(bracket, fmin(fmax(bracket->marks[0].h * (1 + 4 * drift), PLANE_LEAST), largest / 2));
    /* Climb until the best mark has a neighbour on each side. */
    for (double step = 0.03; bracket->count < MOST_MARKS / 4; step *= 1.3) {
        struct mark top = bracket->marks[0], low = bracket->marks[bracket->count - 1];
        double up = top.h * (1 + step) + 4 * PLANE_DOUBT, down = low.h / (1 + step) - 4 * PLANE_DOUBT;
        if (mark_score(top) == bracket->best && up < largest - 4 * PLANE_DOUBT) add_mark(bracket, up);
        else if (mark_score(low) == bracket->best && down > PLANE_LEAST) add_mark(bracket, down);
        else break;
    }
    int below = march_down(bracket, row, largest, all), above = march_up(bracket, row, largest);
    if (!above) { /* the state in which every code is 0 closes the list */
        memmove(bracket->marks + 1, bracket->marks, bracket->count * sizeof *bracket->marks);
        bracket->marks[0] = (struct mark){largest + 4 * PLANE_DOUBT, 0, 0};
        bracket->count++;
    }
    if (bracket->count < 2) return (struct interval){largest, 0, 0};
    struct interval window = refine(bracket, WHOLE_ROW_WIDTH);
    if (!below) window.lo = 0;
    return window;
}

/* Keeps the weights whose code differs between the two scales and sums the others. The arrays of `out` have room for the
 * whole row. */
static void keep_active(const struct optimal_row *row, float inverse_hi, float inverse_lo, int32_t *fixed,
                        float *magnitude, struct active_row *out) {
    size_t kept = 0;
    vl sum = {0};
    vi b = {0};
    for (size_t part = 0; part < row->n; part += PART) {
        size_t end = part + PART < row->n ? part + PART : row->n;
        vi a = {0};
        for (size_t i = part; i < end; i += VW) {
            vi w = vi_load(row->fixed + i), sign = w >> 31;
            vf size = vf_load(row->magnitude + i), limit = vi_float(7 - sign);
            vi code = window_codes(size, vf_set(inverse_hi), limit);
            vi same = code == window_codes(size, vf_set(inverse_lo), limit);
            code &= same;
            a += ((w ^ sign) - sign) * code;
            b += code * code;
            kept += vi_compress(~same, w, fixed + kept);
        }
        sum = vl_add(sum, a);
    }
    out->a = vl_total(sum);
    out->b = vi_total(b);
    size_t padded = (kept + VW - 1) / VW * VW;
    memset(fixed + kept, 0, (padded - kept) * sizeof *fixed);
    for (size_t i = 0; i < padded; i += VW) vf_store(magnitude + i, vf_abs(vi_float(vi_load(fixed + i))));
    out->row = (struct optimal_row){fixed, magnitude, padded, row->levels, 0};
}

/* A narrower window, from the weights that can still decide. */
static struct interval bracket_active(struct bracket *bracket, const struct active_row *active, struct interval window,
                                      double best) {
    *bracket = (struct bracket){.active = active, .best = best};
    /* The ends' own doubt lies outside of the window. */
    double hi = window.hi * (1 + 4 * ROUNDING_DOUBT), step = (hi - window.lo * (1 - 4 * ROUNDING_DOUBT)) / ACTIVE_PARTS;
    if (step < 1024 * ROUNDING_DOUBT * hi) return window;
    for (int part = 0; part <= ACTIVE_PARTS; part++) add_mark(bracket, hi - part * step);
    return refine(bracket, ACTIVE_WIDTH);
}

#endif
