/* The window of scales that can hold the optimum, for int4 codes.
 *
 * States of the whole row are evaluated at chosen scales (planes.h). Between two neighbouring ones no state is better
 * than interval_bound; intervals whose bound is below the best state seen are dropped, the others halved until they are
 * narrow.
 *
 * A rounding that is in doubt by z (of |w|, and of κ at most) passes all breakpoints above h + z and none below h − z, so
 * that an interval is bounded with its ends moved out by z. A state whose own h lies within z of a mark, say above it,
 * lies in the interval above but for breakpoints of the one below that it has passed, worth at most z a unit of that
 * one's B in A; or in the one below but for what it has not passed of the one above, worth at most 2z a unit. So 2z times
 * an interval's own B is allowed for: of two that are dropped, one then covers it. Beside an interval that is kept, the
 * window reaches z beyond the mark. */
#ifndef NPUQ_KERNELS_BRACKET_H
#define NPUQ_KERNELS_BRACKET_H

#include "exact.h"
#include "planes.h"

enum { MOST_MARKS = 160 };

/* How far a window's ends should be apart: thresholds lie farther (15 : 13), so that a code changes once at most. */
#define NARROW_RATIO 1.12
/* Width, relative, below which an interval stays as it is. */
#define NARROW 0.02
/* Marks whose A² / B is this much below the best need not be exact. */
#define ROUGH_GAP 5e-4

/* Marks by falling h. */
struct bracket {
    const struct planes *planes;
    double norm; /* Σ w² */
    size_t count;
    double best, best_h; /* A² / B of the best mark, and where it is */
    struct mark marks[MOST_MARKS];
};

/* Half scales [lo, hi] that may hold the optimum; marks so far outside of them that what is in doubt there is none of
 * the window's: `above`, exact, and how codes are rounded below. `open`: there is no end below, but for the last code of
 * every weight. */
struct window {
    double hi, lo;
    struct mark above;
    double below_h;
    struct rounding below;
    int open;
};

/* Room for a mark at half scale h. */
static struct mark *insert_mark(struct bracket *bracket, double h) {
    size_t at = bracket->count;
    while (at > 0 && bracket->marks[at - 1].h < h) at--;
    struct mark *place = &bracket->marks[at];
    memmove(place + 1, place, (bracket->count++ - at) * sizeof *place);
    place->h = h;
    return place;
}

static void add_mark(struct bracket *bracket, double h) {
    const struct rounding rounding = rounding_at(&h);
    struct mark *mark = insert_mark(bracket, h);
    mark->rounding = rounding;
    evaluate(bracket->planes, mark);
    if (mark->score > bracket->best) bracket->best = mark->score, bracket->best_h = mark->h;
}

INLINE double gap_of(const struct bracket *bracket, const struct mark *mark) { return 1 - mark->score / bracket->best; }

/* A mark far from the best one, or near it: `gap` is its neighbour's. */
static void march(struct bracket *bracket, double gap, double h) {
    if (gap <= ROUGH_GAP) {
        add_mark(bracket, h);
        return;
    }
    const struct rounding rounding = rounding_at(&h);
    struct mark *mark = insert_mark(bracket, h);
    mark->rounding = rounding;
    evaluate_roughly(bracket->planes, mark);
}

/* Whether any state between marks i and i + 1 may have a larger A² / B than the best mark. */
static int is_open(const struct bracket *bracket, size_t i) {
    const struct mark *hi = &bracket->marks[i], *lo = &bracket->marks[i + 1];
    double more = 2 * PLANE_DOUBT * (double)(lo->b - hi->b);
    struct state high = {(double)hi->a + more, (double)hi->b}, low = {(double)lo->a + more, (double)lo->b};
    return interval_bound(high, low, hi->h + PLANE_DOUBT, lo->h - PLANE_DOUBT) >= bracket->best * COARSE_SLACK;
}

/* Halves every open interval until it is narrow; those that remain lie between the marks `first` and `last`. */
static void refine(struct bracket *bracket, double narrow, size_t *first, size_t *last) {
    *first = *last = 0;
    for (size_t i = 0; i + 1 < bracket->count;) {
        double hi = bracket->marks[i].h, lo = bracket->marks[i + 1].h;
        if (!is_open(bracket, i)) {
            i++;
            continue;
        }
        /* Marks must be farther apart than their doubts, and may lie 2^-14 beside the h that was asked for. */
        if (hi - lo > fmax(narrow * lo, 8 * PLANE_DOUBT + lo / 2048) && bracket->count < MOST_MARKS) {
            add_mark(bracket, sqrt(hi * lo));
            continue;
        }
        if (*last == 0) *first = i;
        *last = ++i;
    }
}

/* The window between two marks: z beyond them (see above), and 1 more for float32's sake. `closed`: nothing is better
 * below the last one. */
static struct window window_between(const struct bracket *bracket, const struct mark *high, const struct mark *low,
                                    int closed) {
    struct window window = {high->h + PLANE_DOUBT + 1, low->h - PLANE_DOUBT - 1, *high, 0, {0, 1}, !closed};
    if (high->rounding.inverse > 0) { /* not the mark that closes the list, above which is nothing */
        double h = high->h + 4 * PLANE_DOUBT;
        window.above.rounding = rounding_at(&h);
        window.above.h = h;
        evaluate(bracket->planes, &window.above);
    }
    /* rounding_at may return up to 2^-14 more. */
    window.below_h = low->h * (1 - 0x1p-13) - 4 * PLANE_DOUBT;
    window.below = rounding_at(&window.below_h);
    if (!closed) window.lo = 0;
    return window;
}

#define FIRST_STEP 0.012
#define LEAST_STEP 0.02

/* Steps away from the best mark at which an interval's bound just stays below it: for Gaussian weights and doubts as
 * they are in rows of some thousands, a multiple of the gap's root. */
static double step_up(double gap) { return fmin(1, fmax(LEAST_STEP, 2.0 * sqrt(fmax(gap, 0)))); }
static double step_down(double gap) { return fmin(1, fmax(LEAST_STEP, 2.4 * sqrt(fmax(gap, 0)))); }

/* Where Σ w² of what is rounded to zero, for Gaussian weights, is more than the optimum's error. */
#define ZEROED_RATIO 2.25

/* Marks upwards from the best until nothing above them can be better. Returns 1 if that was shown at the last mark
 * itself, 0 if the marks reach to where every code is 0. */
static int march_up(struct bracket *bracket, double largest) {
    double tried = 0;
    while (bracket->count < MOST_MARKS / 2) {
        const double top = bracket->marks[0].h, gap = gap_of(bracket, &bracket->marks[0]);
        if (top > fmax(tried, 0.99 * ZEROED_RATIO * bracket->best_h)) {
            double zeroed = zeroed_norm(bracket->planes, top - PLANE_DOUBT);
            if (bracket->norm - zeroed < bracket->best * COARSE_SLACK) return 1;
            tried = 1.15 * top;
        }
        double next = top * (1 + step_up(gap)) + 4 * PLANE_DOUBT, end = ZEROED_RATIO * bracket->best_h;
        if (top < end && next > 0.8 * end) next = end;
        if (next >= largest - 4 * PLANE_DOUBT) break;
        march(bracket, gap, next);
    }
    return 0;
}

/* Marks downwards from the best until clipping rules out all that is below; 0 if that was not reached. */
static int march_down(struct bracket *bracket) {
    while (bracket->count < 3 * MOST_MARKS / 4) {
        const struct mark *last = &bracket->marks[bracket->count - 1];
        const double low = last->h, gap = gap_of(bracket, last);
        if (low < 0.85 * bracket->best_h) {
            double clipped = clipped_norm(bracket->planes, low + PLANE_DOUBT);
            if (bracket->norm - clipped < bracket->best * COARSE_SLACK) return 1;
        }
        double next = low / (1 + step_down(gap)) - 4 * PLANE_DOUBT;
        if (next < PLANE_LEAST) return 0;
        march(bracket, gap, next);
    }
    return 0;
}

/* The window for a whole row whose largest magnitude is `largest`; `guess` is a half scale to begin at. */
static struct window bracket_row(struct bracket *bracket, double norm, const struct planes *planes, double largest,
                                 double guess) {
    bracket->planes = planes;
    bracket->norm = norm;
    bracket->count = 0;
    bracket->best = 0;
    const double most = largest / 2;
    add_mark(bracket, fmin(fmax(guess, PLANE_LEAST), most));
    /* A / B is the best scale for the codes at hand; the optimum lies some four times as far. */
    const struct mark *only = &bracket->marks[0];
    double drift = (double)only->a / (2 * only->h * (double)only->b) - 1;
    if (fabs(drift) > 0.002 && fabs(drift) < 0.1) {
        add_mark(bracket, fmin(fmax(only->h * (1 + 4 * drift), PLANE_LEAST), most));
    }
    /* Climb until the best mark has a neighbour on each side. */
    for (double step = FIRST_STEP; bracket->count < MOST_MARKS / 4; step *= 1.5) {
        const double top = bracket->marks[0].h, low = bracket->marks[bracket->count - 1].h;
        double up = top * (1 + step) + 4 * PLANE_DOUBT, down = low / (1 + step) - 4 * PLANE_DOUBT;
        if (top == bracket->best_h && up < largest - 4 * PLANE_DOUBT) add_mark(bracket, up);
        else if (low == bracket->best_h && down > PLANE_LEAST) add_mark(bracket, down);
        else break;
    }
    int closed = march_down(bracket);
    if (!march_up(bracket, largest)) { /* the state in which every code is 0 closes the list */
        struct mark *zero = insert_mark(bracket, largest + 4 * PLANE_DOUBT);
        *zero = (struct mark){.h = zero->h, .rounding = {0, 1}};
    }
    size_t first, last;
    refine(bracket, NARROW, &first, &last);
    if (closed && bracket->marks[first].h > NARROW_RATIO * bracket->marks[last].h) {
        refine(bracket, NARROW / 2, &first, &last);
    }
    if (!closed) last = bracket->count - 1;
    return window_between(bracket, &bracket->marks[first], &bracket->marks[last], closed);
}

#endif
