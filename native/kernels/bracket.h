/* The window of scales that can hold the optimum, for int4 codes.
 *
 * States of the whole row are evaluated at chosen scales (planes.h, table_sums.h). Between two neighbouring ones no state
 * is better than interval_bound; intervals whose bound is below the best state seen are dropped, the others halved until
 * they are narrow.
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
#include "table_sums.h"

enum { MOST_MARKS = 160 };

/* How far a window's ends should be apart: thresholds lie farther (15 : 13), so that a code changes once at most. */
#define NARROW_RATIO 1.12
/* Marks whose A² / B is this much below the best need not be exact. */
#define ROUGH_GAP 5e-4

/* What is searched: a row in planes, or else in tables. States are known up to `doubt` of the half scale. `narrow` is the
 * relative width below which an interval stays as it is. */
struct searched {
    const struct planes *planes;
    const struct tables *tables;
    double weights, least, doubt, narrow;
};

/* The state at half scale h: A = Σ |w|·q and B = Σ q² of the whole row, for codes q that were found at h. */
struct mark {
    double h, score, bound; /* A² / B; the most between this mark and the next one below */
    int64_t a, b;
    struct rounding rounding; /* of planes */
    int rough;                /* A is an upper bound */
};

/* Marks by falling h. */
struct bracket {
    const struct searched *row;
    double norm; /* Σ w² */
    size_t count;
    double best, best_h; /* A² / B of the best mark, and where it is */
    struct mark marks[MOST_MARKS];
};

/* The states at half scales h, or very little beside them. Those of planes may be rough, without the lower one. */
static void evaluate(const struct searched *row, const double *h, const int *rough, int count, struct mark *marks) {
    if (row->tables != NULL) {
        const double both[2] = {h[0], h[count - 1]};
        const struct state_pair sums = sum_tables(row->tables, both);
        for (int i = 0; i < count; i++) marks[i] = (struct mark){.h = h[i], .a = sums.a[i], .b = sums.b[i]};
    }
    for (int i = 0; i < count; i++) {
        struct mark *mark = &marks[i];
        if (row->planes != NULL) {
            *mark = (struct mark){.h = h[i], .rough = rough[i]};
            mark->rounding = rounding_at(&mark->h);
            const struct state_sums sums = rough[i] ? sum_planes(row->planes, mark->rounding, 0)
                                                    : sum_planes(row->planes, mark->rounding, 1);
            mark->a = sums.a;
            mark->b = sums.b;
            /* |low| ≤ 128, and Σ |q| ≤ √(n · Σ q²). */
            if (rough[i]) mark->a += (int64_t)(PLANE_DOUBT * sqrt(row->weights * (double)mark->b)) + 1;
        }
        mark->score = mark->b > 0 ? (double)mark->a * (double)mark->a / (double)mark->b : 0;
    }
}

static double clipped_norm(const struct searched *row, double h) {
    return row->tables != NULL ? clipped_tables(row->tables, h) : clipped_planes(row->planes, h);
}

static double zeroed_norm(const struct searched *row, double h) {
    return row->tables != NULL ? zeroed_tables(row->tables, h) : zeroed_planes(row->planes, h);
}

/* The most that any state between a mark and the next one below may reach. */
INLINE double bound_below(const struct bracket *bracket, const struct mark *hi, const struct mark *lo) {
    const double doubt = bracket->row->doubt, more = 2 * doubt * (double)(lo->b - hi->b);
    struct state high = {(double)hi->a + more, (double)hi->b}, low = {(double)lo->a + more, (double)lo->b};
    return interval_bound(high, low, hi->h + doubt, lo->h - doubt);
}

static void insert_mark(struct bracket *bracket, const struct mark *mark) {
    size_t at = bracket->count++;
    struct mark *marks = bracket->marks;
    for (; at > 0 && marks[at - 1].h < mark->h; at--) marks[at] = marks[at - 1];
    marks[at] = *mark;
    if (at > 0) marks[at - 1].bound = bound_below(bracket, &marks[at - 1], &marks[at]);
    if (at + 1 < bracket->count) marks[at].bound = bound_below(bracket, &marks[at], &marks[at + 1]);
    if (!mark->rough && mark->score > bracket->best) bracket->best = mark->score, bracket->best_h = mark->h;
}

/* Adds one or two marks. */
static void add_marks(struct bracket *bracket, const double *h, const int *rough, int count) {
    struct mark marks[2];
    evaluate(bracket->row, h, rough, count, marks);
    for (int i = 0; i < count; i++) insert_mark(bracket, &marks[i]);
}

static void add_mark(struct bracket *bracket, double h) { add_marks(bracket, &h, (const int[]){0}, 1); }

INLINE double gap_of(const struct bracket *bracket, const struct mark *mark) { return 1 - mark->score / bracket->best; }

/* Whether any state between marks i and i + 1 may have a larger A² / B than the best mark. */
INLINE int is_open(const struct bracket *bracket, size_t i) {
    return bracket->marks[i].bound >= bracket->best * COARSE_SLACK;
}

/* Halves every open interval until it is narrow; those that remain lie between the marks `first` and `last`. */
static void refine(struct bracket *bracket, double narrow, size_t *first, size_t *last) {
    for (int more = 1; more;) {
        double middle[2];
        int wide = 0;
        *first = *last = 0;
        for (size_t i = 0; i + 1 < bracket->count; i++) {
            if (!is_open(bracket, i)) continue;
            const double hi = bracket->marks[i].h, lo = bracket->marks[i + 1].h;
            /* Marks must be farther apart than their doubts, and may lie 2^-14 beside the h that was asked for. */
            if (wide < 2 && hi - lo > larger(narrow * lo, 8 * bracket->row->doubt + lo / 2048)) {
                middle[wide++] = sqrt(hi * lo);
            }
            if (*last == 0) *first = i;
            *last = i + 1;
        }
        more = wide > 0 && bracket->count + 2 <= MOST_MARKS;
        if (more) add_marks(bracket, middle, (const int[]){0, 0}, wide);
    }
}

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

/* The window between two marks: z beyond them (see above), and 1 more for float32's sake. `closed`: nothing is better
 * below the last one. */
static struct window window_between(const struct bracket *bracket, const struct mark *high, const struct mark *low,
                                    int closed) {
    const double doubt = bracket->row->doubt;
    struct window window = {high->h + doubt + 1, low->h - doubt - 1, *high, 0, {0, 1}, !closed};
    if (high->b > 0) { /* not the mark that closes the list, above which is nothing */
        const double h = high->h + 4 * doubt;
        evaluate(bracket->row, &h, (const int[]){0}, 1, &window.above);
    }
    /* rounding_at may return up to 2^-14 more. */
    window.below_h = low->h * (1 - 0x1p-13) - 4 * doubt;
    if (bracket->row->planes != NULL) window.below = rounding_at(&window.below_h);
    if (!closed) window.lo = 0;
    return window;
}

#define FIRST_STEP 0.012
#define LEAST_STEP 0.02

/* Steps away from the best mark at which an interval's bound just stays below it: for Gaussian weights and doubts as
 * they are in rows of some thousands, a multiple of the gap's root. */
static double step_up(double gap) { return smaller(1, larger(LEAST_STEP, 2.0 * sqrt(larger(gap, 0)))); }
static double step_down(double gap) { return smaller(1, larger(LEAST_STEP, 2.4 * sqrt(larger(gap, 0)))); }

/* Where Σ w² of what is rounded to zero, for Gaussian weights, is more than the optimum's error. */
#define ZEROED_RATIO 2.25

/* Where clipping, of Gaussian weights, makes more error than the optimum has. */
#define CLIPPED_RATIO 0.75

/* How far the marks have come on one side. */
enum side { GOING, CLOSED, ENDED };

/* The next mark above all, in *next, until nothing above them can be better. ENDED where every code is 0. */
static enum side look_up_from(struct bracket *bracket, double largest, double *tried, double *next) {
    const double top = bracket->marks[0].h, gap = gap_of(bracket, &bracket->marks[0]);
    const double step = 4 * bracket->row->doubt, end = ZEROED_RATIO * bracket->best_h;
    if (top > larger(*tried, 0.99 * end)) {
        double zeroed = zeroed_norm(bracket->row, top - bracket->row->doubt);
        if (bracket->norm - zeroed < bracket->best * COARSE_SLACK) return CLOSED;
        *tried = 1.15 * top;
    }
    *next = top * (1 + step_up(gap)) + step;
    if (top < end && *next > 0.8 * end) *next = end;
    return *next >= largest - step ? ENDED : GOING;
}

/* The next mark below all, until clipping rules out all that is below. ENDED if that was not reached. */
static enum side look_down_from(struct bracket *bracket, double *next) {
    const struct mark *last = &bracket->marks[bracket->count - 1];
    const double low = last->h, gap = gap_of(bracket, last), least = bracket->row->least, doubt = bracket->row->doubt;
    if (low < CLIPPED_RATIO * bracket->best_h) {
        double clipped = clipped_norm(bracket->row, low + doubt);
        if (bracket->norm - clipped < bracket->best * COARSE_SLACK) return CLOSED;
    }
    *next = larger(low / (1 + step_down(gap)) - 4 * doubt, least);
    return low < 1.01 * least + 8 * doubt ? ENDED : GOING;
}

/* Marks on both sides of the best, a pair at a time. */
static void march(struct bracket *bracket, double largest, enum side *up, enum side *down) {
    double tried = 0;
    *up = *down = GOING;
    for (;;) {
        double h[2];
        int rough[2], count = 0;
        const double gap_up = gap_of(bracket, &bracket->marks[0]);
        const double gap_down = gap_of(bracket, &bracket->marks[bracket->count - 1]);
        if (*up == GOING) *up = look_up_from(bracket, largest, &tried, &h[count]);
        if (*up == GOING) rough[count++] = gap_up > ROUGH_GAP;
        if (*down == GOING) *down = look_down_from(bracket, &h[count]);
        if (*down == GOING) rough[count++] = gap_down > ROUGH_GAP;
        if (count == 0) return;
        if (bracket->count + 2 > 3 * MOST_MARKS / 4) break;
        add_marks(bracket, h, rough, count);
    }
    if (*up == GOING) *up = ENDED;
    if (*down == GOING) *down = ENDED;
}

/* Marks about the optimum: a guess and its neighbour, then where the best scale for the codes at hand, A / B, would be
 * that scale itself, and on until the best mark has a neighbour on each side. */
static void climb(struct bracket *bracket, double guess, double largest) {
    const double least = bracket->row->least, doubt = bracket->row->doubt, most = largest / 2;
    const double first = smaller(larger(guess, least), most);
    const double pair[2] = {smaller(first * (1 + FIRST_STEP) + 4 * doubt, most), first};
    const int count = pair[0] > first ? 2 : 1;
    add_marks(bracket, pair + 2 - count, (const int[]){0, 0}, count);
    if (count == 2) {
        double drift[2];
        for (int i = 0; i < 2; i++) {
            const struct mark *mark = &bracket->marks[i];
            drift[i] = mark->b > 0 ? (double)mark->a / (2 * (double)mark->b) - mark->h : 0;
        }
        const double slope = (drift[1] - drift[0]) / (bracket->marks[0].h - bracket->marks[1].h);
        const double to = bracket->marks[1].h + drift[1] / (slope > 0.1 ? slope : 0.25);
        if (fabs(to / first - 1) < 0.2) {
            const double around[2] = {to * (1 + FIRST_STEP / 2), to / (1 + FIRST_STEP / 2)};
            if (around[1] > least && around[0] < most) add_marks(bracket, around, (const int[]){0, 0}, 2);
        }
    }
    for (double step = FIRST_STEP; bracket->count < MOST_MARKS / 4; step *= 1.5) {
        const double top = bracket->marks[0].h, low = bracket->marks[bracket->count - 1].h;
        double up = top * (1 + step) + 4 * doubt, down = low / (1 + step) - 4 * doubt;
        if (top == bracket->best_h && up < largest - 4 * doubt) add_mark(bracket, up);
        else if (low == bracket->best_h && down > least) add_mark(bracket, down);
        else break;
    }
}

/* The window for a whole row whose largest magnitude is `largest`; `guess` is a half scale to begin at. */
static struct window bracket_row(struct bracket *bracket, double norm, const struct searched *row, double largest,
                                 double guess) {
    bracket->row = row;
    bracket->norm = norm;
    bracket->count = 0;
    bracket->best = 0;
    enum side up, down;
    climb(bracket, guess, largest);
    march(bracket, largest, &up, &down);
    if (up != CLOSED) { /* the state in which every code is 0 closes the list */
        insert_mark(bracket, &(struct mark){.h = largest + 4 * row->doubt, .rounding = {0, 1}});
    }
    const int closed = down == CLOSED;
    size_t first, last;
    refine(bracket, row->narrow, &first, &last);
    if (closed && bracket->marks[first].h > NARROW_RATIO * bracket->marks[last].h) {
        refine(bracket, row->narrow / 2, &first, &last);
    }
    if (!closed) last = bracket->count - 1;
    return window_between(bracket, &bracket->marks[first], &bracket->marks[last], closed);
}

#endif
