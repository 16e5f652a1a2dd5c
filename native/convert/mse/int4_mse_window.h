/* int4 by least squared error, first step: the window of scales that can hold the optimum.
 *
 * States of the whole row are evaluated at chosen scales (magnitude_planes.h, fp8_table_sums.h). Between two neighbouring
 * scales no state is better than interval_bound. Intervals whose bound is below the best state seen are dropped, the
 * others are halved until they are narrow.
 *
 * A rounding that is in doubt by z (of |w|, and of κ at most) passes all breakpoints above h + z and none below h − z, so
 * that an interval is bounded with its ends moved out by z. A state whose own h lies within z of a mark, say above it,
 * lies in the interval above but for breakpoints of the one below that it has passed, worth at most z a unit of that
 * one's B in A; or in the one below but for what it has not passed of the one above, worth at most 2z a unit. So 2z times
 * an interval's own B is allowed for: of two that are dropped, one then covers it. Beside an interval that is kept, the
 * window reaches z beyond the mark.
 *
 * Where a mark's A is only known within limits, its upper one goes into bounds and its lower one into the best state's. */
#ifndef NPUQ_CONVERT_MSE_INT4_MSE_WINDOW_H
#define NPUQ_CONVERT_MSE_INT4_MSE_WINDOW_H

#include "convert/mse/mse_breakpoints.h"
#include "convert/magnitude_planes.h"
#include "convert/fp8/fp8_table_sums.h"

enum { MOST_MARKS = 160 };

/* The wanted distance of a window's ends: less than that of thresholds (15 : 13), so that a code changes at most once. */
#define NARROW_RATIO 1.12
/* Marks whose A² / B is this much below the best need not be exact. */
#define ROUGH_GAP 5e-4

/* The searched row: in planes, or else in tables. States are known up to `doubt` of the half scale. `narrow` is the
 * relative width below which an interval stays as it is. */
struct searched {
    const struct planes *planes;
    const struct tables *tables;
    double weights, least, doubt, narrow;
};

/* The state at half scale h: A = Σ |w|·q and B = Σ q² of the whole row, for codes q that were found at h. */
struct mark {
    double h, score; /* A² / B at least */
    double a, b;
    double most_a; /* A at most, where it is not known exactly */
};

/* Marks by falling h. */
struct bracket {
    const struct searched *row;
    double norm; /* Σ w² */
    size_t count;
    double best, best_h; /* A² / B of the best mark, and where it is */
    struct mark marks[MOST_MARKS];
    double open[MOST_MARKS]; /* ≥ 0 where a state between this mark and the next one below may be better than the best */
};

/* A mark whose A may be that far off. */
INLINE struct mark mark_of(double h, double a, double b, double off) {
    const double least = a - off;
    return (struct mark){h, b > 0 && least > 0 ? least * least / b : 0, a, b, a + off};
}

/* The states at half scales h, or very little beside them. Those of planes may be rough, without the lower one. */
static void evaluate(const struct searched *row, const double *h, const int *rough, int count, struct mark *marks) {
    for (int i = 0; row->tables != NULL && i < count; i += SCALES_AT_ONCE) {
        const int some = count - i < SCALES_AT_ONCE ? count - i : SCALES_AT_ONCE;
        double scales[SCALES_AT_ONCE];
        struct state_pair sums[SCALES_AT_ONCE / 2];
        for (int k = 0; k < SCALES_AT_ONCE; k++) scales[k] = h[k < some ? i + k : i];
        sum_tables(row->tables, scales, some, sums);
        for (int k = 0; k < some; k++) {
            const double a = sums[k / 2].a[k % 2], b = (double)sums[k / 2].b[k % 2];
            /* Σ |q| ≤ Σ (3 + q² / 3) / 2 */
            const double off = 2 * SUM_DOUBT * a + WEIGHT_DOUBT / 2 * (3 * row->weights + b * (1. / 3));
            marks[i + k] = mark_of(h[i + k], a, b, off);
        }
    }
    for (int i = 0; row->planes != NULL && i < count; i++) {
        double at = h[i];
        const struct rounding rounding = rounding_at(&at);
        const struct state_sums sums = rough[i] ? sum_planes(row->planes, rounding, 0) : sum_planes(row->planes, rounding, 1);
        const double b = (double)sums.b;
        marks[i] = mark_of(at, (double)sums.a, b, rough[i] ? PLANE_DOUBT * sqrt(row->weights * b) + 1 : 0); /* |low| ≤ 128 */
    }
}

static double clipped_norm(const struct searched *row, double h) {
    return row->tables != NULL ? clipped_tables(row->tables, h) : clipped_planes(row->planes, h);
}

static double zeroed_norm(const struct searched *row, double h) {
    return row->tables != NULL ? zeroed_tables(row->tables, h) : zeroed_planes(row->planes, h);
}

INLINE void note_best(struct bracket *bracket, const struct mark *mark) {
    if (mark->score > bracket->best) bracket->best = mark->score, bracket->best_h = mark->h;
}

static void insert_mark(struct bracket *bracket, const struct mark *mark) {
    size_t at = bracket->count++;
    struct mark *marks = bracket->marks;
    for (; at > 0 && marks[at - 1].h < mark->h; at--) marks[at] = marks[at - 1];
    marks[at] = *mark;
    note_best(bracket, mark);
}

enum { MARKS_AT_ONCE = 8 };

static void add_marks(struct bracket *bracket, const double *h, const int *rough, int count) {
    struct mark marks[MARKS_AT_ONCE];
    evaluate(bracket->row, h, rough, count, marks);
    for (int i = 0; i < count; i++) insert_mark(bracket, &marks[i]);
}

static void add_mark(struct bracket *bracket, double h) { add_marks(bracket, &h, (const int[]){0}, 1); }

INLINE double gap_of(const struct bracket *bracket, const struct mark *mark) { return 1 - mark->score / bracket->best; }

/* Finds out which of the intervals [first, last) are open: whether any state between marks i and i + 1 may have a larger
 * A² / B than the best mark. That is interval_bound, without its divisions: A² − best · B says the same. */
static void find_open(struct bracket *bracket, size_t first, size_t last) {
    double h[MOST_MARKS], a[MOST_MARKS], b[MOST_MARKS];
    const double doubt = bracket->row->doubt, enough = bracket->best * COARSE_SLACK;
    for (size_t i = first; i <= last; i++) {
        h[i] = bracket->marks[i].h;
        a[i] = bracket->marks[i].most_a;
        b[i] = bracket->marks[i].b;
    }
    for (size_t i = first; i < last; i++) {
        const double hi = h[i] + doubt, lo = h[i + 1] - doubt, alpha = a[i + 1] - a[i], beta = b[i + 1] - b[i];
        const double more = 2 * doubt * beta, passed = (alpha - beta * lo) / (hi - lo);
        const double crossing = larger(0, smaller(passed, beta));
        const double high = a[i] + more, low = a[i + 1] + more, kink = high + crossing * hi;
        const double ends = larger(high * high - enough * b[i], low * low - enough * b[i + 1]);
        bracket->open[i] = larger(kink * kink - enough * (b[i] + crossing), ends);
    }
}

/* Halves every open interval until it is narrow; those that remain lie between the marks `first` and `last`. */
static void refine(struct bracket *bracket, double narrow, size_t *first, size_t *last) {
    size_t from = 0, to = bracket->count - 1;
    for (int more = 1; more;) {
        static const int exact[MARKS_AT_ONCE] = {0};
        double middle[MARKS_AT_ONCE];
        int wide = 0;
        find_open(bracket, from, to);
        *first = *last = 0;
        for (size_t i = from; i < to; i++) {
            if (bracket->open[i] < 0) continue;
            const double hi = bracket->marks[i].h, lo = bracket->marks[i + 1].h;
            /* Marks must be farther apart than their doubts, and may lie 2^-14 beside the h that was asked for. */
            if (wide < MARKS_AT_ONCE && hi - lo > larger(narrow * lo, 8 * bracket->row->doubt + lo / 2048)) {
                middle[wide++] = (hi + lo) / 2;
            }
            if (*last == 0) *first = i;
            *last = i + 1;
        }
        more = wide > 0 && bracket->count + MARKS_AT_ONCE <= MOST_MARKS;
        if (!more) return;
        add_marks(bracket, middle, exact, wide);
        from = *first; /* dropped intervals stay dropped, since the best only grows */
        to = *last + (size_t)wide;
    }
}

/* Half scales [lo, hi] that may hold the optimum; half scales so far outside of them that what is in doubt there is none of
 * the window's, with the exact state above, and how planes are rounded at both. `open`: there is no end below, but for the
 * last code of every weight. */
struct window {
    double hi, lo, above_h, below_h;
    struct exact_state state;
    struct rounding above, below;
    int open;
};

/* The exact state of the codes at half scale *h, or very little beside it, and how planes are rounded there. */
static struct exact_state state_at(const struct searched *row, double *h, struct rounding *rounding) {
    if (row->tables != NULL) return exact_tables(row->tables, inverse_at(row->tables, *h), NULL);
    *rounding = rounding_at(h);
    const struct state_sums sums = sum_planes(row->planes, *rounding, 1);
    return (struct exact_state){sums.a, sums.b, 0};
}

/* The window between two marks: z beyond them (see above), and 1 more for float32's sake. `closed`: nothing is better
 * below the last one. */
static struct window window_between(const struct bracket *bracket, const struct mark *high, const struct mark *low,
                                    int closed) {
    const double doubt = bracket->row->doubt;
    struct window window = {.hi = high->h + doubt + 1, .lo = closed ? low->h - doubt - 1 : 0, .above_h = high->h,
                            .above = {0, 1}, .below = {0, 1}, .open = !closed};
    if (high->b > 0) { /* not the mark that closes the list, above which is nothing */
        window.above_h += 4 * doubt;
        window.state = state_at(bracket->row, &window.above_h, &window.above);
    }
    /* rounding_at may return up to 2^-14 more. */
    window.below_h = low->h * (1 - 0x1p-13) - 4 * doubt;
    if (bracket->row->planes != NULL) window.below = rounding_at(&window.below_h);
    return window;
}

#define FIRST_STEP 0.012
#define LEAST_STEP 0.02

/* Steps away from the best mark at which an interval's bound just stays below it: for Gaussian weights and doubts as
 * they are in rows of some thousands, a multiple of the gap's root. */
static double step_up(double gap) { return smaller(1, larger(LEAST_STEP, 2.0 * sqrt(larger(gap, 0)))); }
static double step_down(double gap) { return smaller(1, larger(LEAST_STEP, 2.4 * sqrt(larger(gap, 0)))); }

/* Above this, Σ w² of the weights rounded to zero exceeds the optimum's error, for Gaussian weights. */
#define ZEROED_RATIO 2.25

/* Where clipping, of Gaussian weights, makes more error than the optimum has. */
#define CLIPPED_RATIO 0.75

/* The progress of the marks on one side. */
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
            drift[i] = mark->b > 0 ? mark->a / (2 * mark->b) - mark->h : 0;
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

/* How far apart marks are that rule out everything else for Gaussian weights: multiples of how far the last one is from
 * the best; and the first ones, relative. */
#define SCOUT_UP 0.6
#define SCOUT_DOWN 0.7
#define SCOUT_LEAST 0.012
enum { MOST_SCOUTS = 32 };

/* Marks on both sides at once, of a row whose states cost little: what follows looks at each before it chooses the next. */
static void scout(struct bracket *bracket, double largest) {
    double h[MOST_SCOUTS];
    struct mark marks[MOST_SCOUTS];
    const double best = bracket->best_h, doubt = bracket->row->doubt, least = bracket->row->least;
    const double end = smaller(ZEROED_RATIO * best, largest - 4 * doubt), low_end = larger(0.98 * CLIPPED_RATIO * best, least);
    int count = 0;
    for (double at = bracket->marks[0].h; count < MOST_SCOUTS / 2 && at < end; h[count++] = at) {
        at += larger(SCOUT_UP * (at - best), SCOUT_LEAST * best) + 4 * doubt;
        if (at > 0.85 * end) at = end;
    }
    const int up = count;
    for (double at = bracket->marks[bracket->count - 1].h; count < MOST_SCOUTS && at > low_end; h[count++] = at) {
        at -= larger(SCOUT_DOWN * (best - at), SCOUT_LEAST * best) + 4 * doubt;
        if (at < 1.1 * low_end) at = low_end;
    }
    evaluate(bracket->row, h, NULL, count, marks);
    memmove(bracket->marks + up, bracket->marks, bracket->count * sizeof *marks);
    for (int i = 0; i < up; i++) bracket->marks[up - 1 - i] = marks[i];
    memcpy(bracket->marks + up + bracket->count, marks + up, (size_t)(count - up) * sizeof *marks);
    bracket->count += (size_t)count;
    for (int i = 0; i < count; i++) note_best(bracket, &marks[i]);
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
    if (row->tables != NULL) scout(bracket, largest);
    march(bracket, largest, &up, &down);
    if (up != CLOSED) { /* the state in which every code is 0 closes the list */
        insert_mark(bracket, &(struct mark){.h = largest + 4 * row->doubt});
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
