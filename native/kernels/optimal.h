/* The scale of least squared error of one row, the same exact optimum as quant/optimal_scale.py (read its first lines
 * for the mathematics), by other means:
 *
 * 1. Magnitudes go into bins of equal relative width, so that the state (A, B) at any scale is a few look-ups, known up
 *    to the contents of one bin a level. Both sides of that doubt are states of some codes; the bound over an interval
 *    of scales holds with its ends moved out by a bin's width. What is left is a window of a few percent.
 * 2. The breakpoints inside the window, exact integers κ, go into narrow bins in order of κ. Running sums give the exact
 *    state at every edge; the few bins whose bound reaches the best are sorted and walked.
 *
 * The result is a comparison of float64 A² / B over exact integer states, so it is the torch version's. */
#ifndef NPUQ_KERNELS_OPTIMAL_H
#define NPUQ_KERNELS_OPTIMAL_H

#include <stdlib.h>

#include "../levels.h"
#include "simd.h"

enum {
    FIXED_BITS = 23,
    KAPPA_BITS = 17, /* κ = ⌊|w| · 2^17 / (2m − 1)⌋: half a scale */
    COUNT_SHIFT = 42, /* a bin holds count << 42 | sum: sums of 2^17 magnitudes of 2^23 stay below */
    MOST_INTERVALS = 1024,
    SUBDIVISIONS = 8,
    MOST_LEVELS = 128,
    WINDOW_BINS = 512,
};

#define SUM_MASK ((1ull << COUNT_SHIFT) - 1)
/* Float32 thresholds may miss a bin's edge by this. */
#define EDGE_DOUBT 1e-6f
/* States of step 1 are compared with this tolerance, those of step 2 exactly (1e-12 covers float64's rounding). */
#define COARSE_SLACK (1 - 1e-9)
#define FINE_SLACK (1 - 1e-12)

struct breakpoint {
    int64_t kappa;
    uint32_t magnitude, odd, next;
};

struct window_bin {
    uint64_t a;
    uint32_t b, count, first;
};

struct interval {
    double hi, lo, bound; /* half scales, in the fixed unit */
};

/* Scratch of a search, allocated once for many rows. */
struct optimal_scratch {
    uint64_t *bins; /* pairs: all weights, negative ones */
    uint32_t *index;
    struct breakpoint *breakpoints;
    size_t capacity;
    struct window_bin window[WINDOW_BINS + 2];
    struct interval intervals[MOST_INTERVALS];
    struct breakpoint *sorted;
};

/* The row in fixed point: values, their magnitudes as floats (exact), and what to search. */
struct optimal_row {
    const int32_t *fixed;
    const float *magnitude;
    size_t n;
    int levels;
    double norm; /* Σ fixed² */
};

struct state {
    double a, b;
};

struct histogram {
    const uint64_t *bins;
    uint32_t shift, base, count;
    float lowest; /* the lower edge of bin 0's successor: below it nothing is told apart */
    int levels;
    double width; /* relative */
};

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Bins of 2^(23 − shift) an octave, over `octaves` below 2^23. */
static struct histogram fill_bins(const struct optimal_row *row, struct optimal_scratch *scratch) {
    uint32_t shift = row->levels > 8 ? 13 : row->n < 4096 ? 16 : 15, octaves = row->levels > 8 ? 11 : 7;
    float lowest = ldexpf(1, FIXED_BITS - (int)octaves);
    uint32_t base = (float_bits(lowest) >> shift) - 1;
    uint32_t count = (float_bits(0x1p23f) >> shift) - base + 1;
    uint64_t *bins = scratch->bins;
    memset(bins, 0, 2 * ((size_t)count + 1) * sizeof *bins);
    for (size_t i = 0; i < row->n; i += VW) { /* arrays are padded to whole vectors */
        vi bin = ((vi)vf_load(row->magnitude + i) >> (int32_t)shift) - (int32_t)base;
        bin &= bin > 0;
        bin = bin + bin - (vi_load(row->fixed + i) < 0);
        memcpy(scratch->index + i, &bin, sizeof bin);
    }
    for (size_t i = 0; i < row->n; i++) {
        bins[scratch->index[i]] += (1ull << COUNT_SHIFT) + (uint64_t)(uint32_t)abs(row->fixed[i]);
    }
    uint64_t all = 0, negative = 0;
    for (uint32_t bin = count; bin-- > 0;) {
        negative += bins[2 * bin + 1];
        all += bins[2 * bin] + bins[2 * bin + 1];
        bins[2 * bin] = all;
        bins[2 * bin + 1] = negative;
    }
    return (struct histogram){bins, shift, base, count, lowest, row->levels, ldexp(1.01, (int)shift - FIXED_BITS)};
}

INLINE uint32_t bin_of(const struct histogram *histogram, float threshold) {
    uint32_t bin = (float_bits(threshold) >> histogram->shift) - histogram->base;
    return bin < histogram->count ? bin : histogram->count;
}

/* The states when every breakpoint surely (possibly) at or above half scale h has been passed. */
static void states_at(const struct histogram *histogram, double h, struct state *sure, struct state *possible) {
    uint64_t a = 0, b = 0, more_a = 0, more_b = 0;
    uint32_t above[MOST_LEVELS], from[MOST_LEVELS];
    const float half = (float)h;
    /* Levels whose threshold no weight reaches have passed nothing. */
    const double reached = (0x1p23 * 1.0001 / h + 1) / 2;
    const int levels = reached < histogram->levels ? (int)reached : histogram->levels;
    for (int m = 0; m < levels; m++) {
        float threshold = (float)(2 * m + 1) * half, up = threshold * (1 + EDGE_DOUBT), down = threshold * (1 - EDGE_DOUBT);
        uint32_t up_bits, down_bits;
        memcpy(&up_bits, &up, sizeof up);
        memcpy(&down_bits, &down, sizeof down);
        uint32_t bin = (up_bits >> histogram->shift) - histogram->base + 1;
        above[m] = 2 * (bin < histogram->count ? bin : histogram->count);
        bin = (down_bits >> histogram->shift) - histogram->base;
        from[m] = 2 * (bin < histogram->count ? bin : histogram->count);
    }
    for (int m = 0; m < levels; m++) {
        const uint32_t negative = m + 1 == histogram->levels, odd = 2 * (uint32_t)m + 1;
        uint64_t one = histogram->bins[above[m] + negative], other = histogram->bins[from[m] + negative];
        a += one & SUM_MASK;
        b += (one >> COUNT_SHIFT) * odd;
        more_a += other & SUM_MASK;
        more_b += (other >> COUNT_SHIFT) * odd;
    }
    *sure = (struct state){(double)a, (double)b};
    *possible = (struct state){(double)more_a, (double)more_b};
}

INLINE double score_of(struct state state) { return state.b > 0 ? state.a * state.a / state.b : 0; }

/* The largest A² / B of any state between half scales hi and lo. */
static double interval_bound(struct state high, struct state low, double hi, double lo) {
    double alpha = low.a - high.a, beta = low.b - high.b;
    double crossing = (alpha - beta * lo) / (hi - lo);
    crossing = crossing < 0 ? 0 : crossing > beta ? beta : crossing;
    double kink = score_of((struct state){high.a + crossing * hi, high.b + crossing});
    double ends = fmax(score_of(high), score_of(low));
    return fmax(kink, ends);
}

/* A lower bound of the error that clipping alone makes at half scale h: Σ (|w| − c·s)² ≥ (Σ|w| − n·c·s)² / n. */
static double clipped_error(const struct histogram *histogram, double h) {
    double limit = 2 * h * histogram->levels;
    if (limit >= 0x1p23) return 0;
    uint64_t above = histogram->bins[2 * (bin_of(histogram, (float)limit * (1 + EDGE_DOUBT)) + 1)];
    double count = (double)(above >> COUNT_SHIFT), excess = (double)(above & SUM_MASK) - limit * count;
    return count > 0 && excess > 0 ? excess * excess / count : 0;
}

/* Cuts [lo, hi] at `steps` places of equal ratio or distance; appends the pieces, and raises `best`. */
struct cut {
    const struct histogram *histogram;
    struct interval *list;
    size_t count;
    double best;
};

static void add_interval(struct cut *cut, double hi, struct state sure, double lo, struct state possible) {
    double width = cut->histogram->width;
    double bound = interval_bound(sure, possible, hi * (1 + width), lo * (1 - width));
    cut->list[cut->count++] = (struct interval){hi, lo, bound};
}

/* The window of half scales that holds the optimum; its lower end is 0 where nothing was ruled out below. */
static struct interval find_window(const struct optimal_row *row, const struct histogram *histogram, float largest,
                                   struct optimal_scratch *scratch, double *floor_score) {
    struct cut cut = {histogram, scratch->intervals, 0, 0};
    /* Coarse steps where optima never lie, above 1.5 times the min-max scale; then fine ones, whose bound has a slack
     * of half their square: small beside the error that the codes leave (1 % for int4, 0.01 % for int8). */
    double turn = largest * 0.75 / (row->levels - 1), h = largest;
    const double coarse_step = row->levels > 8 ? 1 / 1.1 : 1 / 1.2, fine_step = row->levels > 8 ? 1 / 1.01 : 1 / 1.05;
    struct state sure, possible, next;
    int open = 0; /* the search ran out of resolution before clipping ruled the rest out */
    states_at(histogram, h, &sure, &possible);
    for (;;) {
        double lower = h * (h > turn ? coarse_step : fine_step);
        if (lower * (1 - 2 * EDGE_DOUBT) < histogram->lowest || cut.count >= MOST_INTERVALS / 4) {
            open = 1;
            break;
        }
        states_at(histogram, lower, &next, &possible);
        cut.best = fmax(cut.best, score_of(next));
        add_interval(&cut, h, sure, lower, possible);
        h = lower;
        sure = next;
        if (clipped_error(histogram, h) > row->norm - cut.best * COARSE_SLACK) break;
    }
    struct interval window = {0, open ? 0 : largest, 0};
    if (open) window.hi = h;
    size_t coarse = cut.count;
    for (size_t i = 0; i < coarse && cut.count + SUBDIVISIONS <= MOST_INTERVALS; i++) {
        struct interval whole = cut.list[i];
        if (whole.bound < cut.best * COARSE_SLACK) continue;
        double upper = whole.hi;
        states_at(histogram, upper, &sure, &possible);
        for (int part = 1; part <= SUBDIVISIONS; part++) {
            double lower = part == SUBDIVISIONS ? whole.lo : whole.hi - (whole.hi - whole.lo) * part / SUBDIVISIONS;
            states_at(histogram, lower, &next, &possible);
            cut.best = fmax(cut.best, score_of(next));
            add_interval(&cut, upper, sure, lower, possible);
            upper = lower;
            sure = next;
        }
        cut.list[i].bound = -1; /* its parts stand for it */
    }
    for (size_t i = 0; i < cut.count; i++) {
        if (cut.list[i].bound < cut.best * COARSE_SLACK) continue;
        window.hi = fmax(window.hi, cut.list[i].hi);
        window.lo = fmin(window.lo, cut.list[i].lo);
    }
    *floor_score = cut.best * COARSE_SLACK;
    return window;
}

INLINE int64_t kappa_of(uint32_t magnitude, const double inverse) {
    /* Fractions are multiples of 1 / 255 at least: the doubt of the product is far less than what is added. */
    return (int64_t)((double)magnitude * inverse + 0.002);
}

struct exact_state {
    int64_t a, b;
    double score;
};

static void offer(struct exact_state *best, int64_t a, int64_t b) {
    double real = (double)a, score = b > 0 ? real * real / (double)b : 0;
    if (score > best->score || (score == best->score && b < best->b)) *best = (struct exact_state){a, b, score};
}

/* Codes at a scale as this level's floats round them. Where they are in doubt (within 1e-6 of the window's ends) no
 * state is offered. */
INLINE vi window_codes(vf magnitude, vf inverse, vf limit) {
    return vf_truncate(vf_min(vf_fma(magnitude, inverse, vf_set(0.5f)), limit));
}

/* Collects every breakpoint between the two scales and sums the state above them. NPUQ_NO_MEMORY if they do not fit. */
static int collect(const struct optimal_row *row, float inverse_hi, float inverse_lo, struct optimal_scratch *scratch,
                   size_t *count, int64_t *a, int64_t *b) {
    double inverse[MOST_LEVELS + 1]; /* 2^17 / (2m − 1) */
    for (int m = 1; m <= row->levels; m++) inverse[m] = (double)(1 << KAPPA_BITS) / (2 * m - 1);
    size_t found = 0;
    int64_t sum_a = 0, sum_b = 0;
    const float levels = (float)row->levels;
    for (size_t first = 0; first < row->n; first += 256) {
        size_t n = row->n - first < 256 ? row->n - first : 256;
        int32_t high[256], low[256];
        vi changed = {0};
        for (size_t i = 0; i < n; i += VW) {
            /* Arrays are padded to whole vectors of zeros, whose code is 0 at any scale. */
            vf magnitude = vf_load(row->magnitude + first + i);
            vf limit = vi_float((vi_load(row->fixed + first + i) < 0) & 1) + (levels - 1);
            vi above = window_codes(magnitude, vf_set(inverse_hi), limit);
            vi below = window_codes(magnitude, vf_set(inverse_lo), limit);
            memcpy(high + i, &above, sizeof above);
            memcpy(low + i, &below, sizeof below);
            changed -= above != below;
        }
        uint32_t any = 0, squares = 0;
        for (int lane = 0; lane < VW; lane++) any += (uint32_t)changed[lane];
        for (size_t i = 0; i < n; i++) squares += (uint32_t)(high[i] * high[i]);
        if (row->levels <= 8) { /* 64 products of 2^26 stay below 2^32 */
            for (size_t part = 0; part < n; part += 32) {
                uint32_t sum = 0;
                for (size_t i = part; i < part + 32 && i < n; i++) {
                    sum += (uint32_t)abs(row->fixed[first + i]) * (uint32_t)high[i];
                }
                sum_a += sum;
            }
        } else {
            for (size_t i = 0; i < n; i++) sum_a += (int64_t)abs(row->fixed[first + i]) * high[i];
        }
        sum_b += squares;
        if (any == 0) continue;
        if (found + (size_t)any * (size_t)row->levels > scratch->capacity) {
            size_t capacity = 2 * (found + (size_t)any * (size_t)row->levels);
            struct breakpoint *larger = realloc(scratch->breakpoints, capacity * sizeof *larger);
            if (larger == NULL) return NPUQ_NO_MEMORY;
            scratch->breakpoints = larger;
            scratch->capacity = capacity;
        }
        uint8_t place[256];
        uint32_t places = 0;
        for (size_t i = 0; i < n; i++) { /* branch-free: which differ cannot be predicted */
            place[places] = (uint8_t)i;
            places += high[i] != low[i];
        }
        for (uint32_t p = 0; p < places; p++) {
            uint32_t i = place[p], magnitude = (uint32_t)abs(row->fixed[first + i]);
            for (int32_t m = high[i] + 1; m <= low[i]; m++) {
                uint32_t odd = 2 * (uint32_t)m - 1;
                scratch->breakpoints[found++] =
                    (struct breakpoint){kappa_of(magnitude, inverse[m]), magnitude, odd, 0};
            }
        }
    }
    *count = found;
    *a = sum_a;
    *b = sum_b;
    return NPUQ_OK;
}

static int by_falling_kappa(const void *left, const void *right) {
    int64_t a = ((const struct breakpoint *)left)->kappa, b = ((const struct breakpoint *)right)->kappa;
    return (a < b) - (a > b);
}

static void sort_breakpoints(struct breakpoint *list, size_t n) {
    if (n > 64) {
        qsort(list, n, sizeof *list, by_falling_kappa);
        return;
    }
    for (size_t i = 1; i < n; i++) {
        struct breakpoint now = list[i];
        size_t j = i;
        for (; j > 0 && list[j - 1].kappa < now.kappa; j--) list[j] = list[j - 1];
        list[j] = now;
    }
}

/* Offers every state of one bin that lies inside [lowest, highest]. NPUQ_NO_MEMORY if the list cannot be held. */
static int walk_bin(const struct breakpoint *all, const struct window_bin *bin, int64_t a, int64_t b, int64_t highest,
                    int64_t lowest, struct exact_state *best) {
    struct breakpoint few[64], *list = bin->count > 64 ? malloc(bin->count * sizeof *list) : few;
    if (list == NULL) return NPUQ_NO_MEMORY;
    size_t n = 0;
    for (uint32_t at = bin->first; at != 0; at = all[at - 1].next) list[n++] = all[at - 1];
    sort_breakpoints(list, n);
    for (size_t i = 0; i < n; i++) {
        a += list[i].magnitude;
        b += list[i].odd;
        /* Those of equal κ climb together. */
        int complete = i + 1 == n || list[i + 1].kappa != list[i].kappa;
        if (complete && list[i].kappa <= highest && list[i].kappa >= lowest) offer(best, a, b);
    }
    if (list != few) free(list);
    return NPUQ_OK;
}

/* Step 2. `breakpoints` lie roughly between highest and lowest; (a, b) is the state above them. */
static int search_window(struct optimal_scratch *scratch, size_t count, int64_t a, int64_t b, int64_t highest,
                         int64_t lowest, double floor_score, struct exact_state *best) {
    struct breakpoint *all = scratch->breakpoints;
    struct window_bin *bins = scratch->window;
    int shift = 0;
    int64_t most = count / 2 + 16 < WINDOW_BINS ? (int64_t)count / 2 + 16 : WINDOW_BINS; /* two breakpoints a bin */
    while (((highest - lowest) >> shift) >= most) shift++;
    size_t used = (size_t)((highest - lowest) >> shift) + 1;
    memset(bins, 0, used * sizeof *bins);
    for (size_t i = 0; i < count; i++) {
        int64_t kappa = all[i].kappa > highest ? highest : all[i].kappa < lowest ? lowest : all[i].kappa;
        struct window_bin *bin = &bins[(highest - kappa) >> shift];
        bin->a += all[i].magnitude;
        bin->b += all[i].odd;
        bin->count++;
        all[i].next = bin->first;
        bin->first = (uint32_t)i + 1;
    }
    /* States at the edges first: a good best drops more bins. The last bin may hold breakpoints below `lowest`. */
    int64_t at = a, bt = b;
    for (size_t j = 0; j + 1 < used; j++) {
        at += (int64_t)bins[j].a;
        bt += bins[j].b;
        double real = (double)at;
        if (real * real >= best->score * FINE_SLACK * (double)bt) offer(best, at, bt);
    }
    double enough = fmax(best->score * FINE_SLACK, floor_score);
    for (size_t j = 0; j < used; j++) {
        double top = (double)(highest - ((int64_t)j << shift) + 1) * 0x1p-17 * (j == 0 ? 1.0001 : 1);
        double reach = (double)a + bins[j].b * top; /* no breakpoint here climbs by more than this a unit of B */
        if (bins[j].count > 0 && reach * reach >= enough * (double)(b + bins[j].b)) {
            if (walk_bin(all, &bins[j], a, b, highest, lowest, best) != NPUQ_OK) return NPUQ_NO_MEMORY;
            enough = fmax(best->score * FINE_SLACK, enough);
        }
        a += (int64_t)bins[j].a;
        b += bins[j].b;
    }
    return NPUQ_OK;
}

/* The best state of a row whose largest magnitude is `largest` > 0. */
static int optimal_state(const struct optimal_row *row, float largest, struct optimal_scratch *scratch,
                         struct exact_state *best) {
    double floor_score;
    struct histogram histogram = fill_bins(row, scratch);
    struct interval window = find_window(row, &histogram, largest, scratch, &floor_score);
    /* A little more than the window is collected, so that floats that round the wrong way do no harm inside it. */
    const double doubt = 1e-5;
    int64_t highest = (int64_t)ceil(window.hi * (1 << KAPPA_BITS)), lowest = (int64_t)(window.lo * (1 << KAPPA_BITS));
    float inverse_lo = lowest > 0 ? (float)(0.5 / (window.lo * (1 - doubt))) : 1e30f;
    size_t count;
    int64_t a, b;
    *best = (struct exact_state){0, 0, 0};
    if (collect(row, (float)(0.5 / (window.hi * (1 + doubt))), inverse_lo, scratch, &count, &a, &b) != NPUQ_OK) {
        return NPUQ_NO_MEMORY;
    }
    return search_window(scratch, count, a, b, highest, lowest, floor_score, best);
}

#endif
