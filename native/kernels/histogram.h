/* The window of scales that can hold the optimum, for int8 codes.
 *
 * The state (A, B) of a short row is summed weight by weight. Magnitudes of longer ones go into bins of equal relative
 * width, so that the state at any scale is a few look-ups, known up to the contents of one bin a level. Both sides of
 * that doubt are states of some codes; the bound over an interval of scales holds with its ends moved out by a bin's
 * width. */
#ifndef NPUQ_KERNELS_HISTOGRAM_H
#define NPUQ_KERNELS_HISTOGRAM_H

#include "exact.h"
#include "planes.h"

enum {
    COUNT_SHIFT = 42, /* a bin holds count << 42 | sum: sums of 2^17 magnitudes of 2^23 stay below */
    MOST_INTERVALS = 1024,
    SHORT_ROW = 512, /* a state by look-ups costs as much as one of so many weights */
    SUBDIVISIONS = 8,
};

/* Scratch: bins in pairs (all weights, negative ones), and the bin of each weight. */
struct histogram_scratch {
    uint64_t *bins;
    uint32_t *index;
    struct interval intervals[MOST_INTERVALS];
};

#define SUM_MASK ((1ull << COUNT_SHIFT) - 1)

struct histogram {
    const struct optimal_row *row;
    const uint64_t *bins; /* NULL for short rows */
    uint32_t shift, base, count;
    float lowest; /* the lower edge of bin 0's successor: below it nothing is told apart */
    double width; /* relative */
};

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Bins of 2^(23 − shift) an octave, over `octaves` below 2^23. */
static struct histogram fill_bins(const struct optimal_row *row, struct histogram_scratch *scratch) {
    if (row->n <= SHORT_ROW) return (struct histogram){.row = row, .width = 2 * EDGE_DOUBT};
    const uint32_t shift = 13, octaves = 11;
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
    return (struct histogram){row, bins, shift, base, count, lowest, ldexp(1.01, (int)shift - FIXED_BITS)};
}

INLINE uint32_t bin_of(const struct histogram *histogram, float threshold) {
    uint32_t bin = (float_bits(threshold) >> histogram->shift) - histogram->base;
    return bin < histogram->count ? bin : histogram->count;
}

/* The state of a short row's codes at half scale h. */
static struct state short_state(const struct optimal_row *row, double h) {
    const vf inverse = vf_set((float)(0.5 / h)), last = vf_set((float)(INT8_LEVELS - 1));
    vl a = {0};
    vi b = {0};
    for (size_t i = 0; i < row->n; i += VW) { /* arrays are padded to whole vectors of zeros */
        vi fixed = vi_load(row->fixed + i), sign = fixed >> 31;
        vi code = window_codes(vf_load(row->magnitude + i), inverse, last - vi_float(sign));
        a = vl_dot(a, (fixed ^ sign) - sign, code);
        b += code * code;
    }
    return (struct state){(double)vl_total(a), (double)vi_total(b)};
}

/* The states when every breakpoint surely (possibly) at or above half scale h has been passed. */
static void states_at(const struct histogram *histogram, double h, struct state *sure, struct state *possible) {
    if (histogram->bins == NULL) {
        *sure = short_state(histogram->row, h * (1 + EDGE_DOUBT));
        *possible = short_state(histogram->row, h * (1 - EDGE_DOUBT));
        return;
    }
    uint64_t a = 0, b = 0, more_a = 0, more_b = 0;
    uint32_t above[INT8_LEVELS], from[INT8_LEVELS];
    const float half = (float)h;
    /* Levels whose threshold no weight reaches have passed nothing. */
    const double reached = (0x1p23 * 1.0001 / h + 1) / 2;
    const int levels = reached < INT8_LEVELS ? (int)reached : INT8_LEVELS;
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
        const uint32_t negative = m + 1 == INT8_LEVELS, odd = 2 * (uint32_t)m + 1;
        uint64_t one = histogram->bins[above[m] + negative], other = histogram->bins[from[m] + negative];
        a += one & SUM_MASK;
        b += (one >> COUNT_SHIFT) * odd;
        more_a += other & SUM_MASK;
        more_b += (other >> COUNT_SHIFT) * odd;
    }
    *sure = (struct state){(double)a, (double)b};
    *possible = (struct state){(double)more_a, (double)more_b};
}

/* A lower bound of the error that clipping alone makes at half scale h: Σ (|w| − c·s)² ≥ (Σ|w| − n·c·s)² / n. */
static double clipped_error(const struct histogram *histogram, double largest, double h) {
    double limit = 2 * h * INT8_LEVELS;
    if (limit >= largest) return 0;
    if (histogram->bins == NULL) return (largest - limit) * (largest - limit);
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
                                   struct histogram_scratch *scratch, double *floor_score) {
    struct cut cut = {histogram, scratch->intervals, 0, 0};
    /* Coarse steps where optima never lie, above 1.5 times the min-max scale; then fine ones, whose bound has a slack
     * of half their square: small beside the error that the codes leave (0.01 %). */
    double turn = largest * 0.75 / (INT8_LEVELS - 1), h = largest;
    const double coarse_step = 1 / 1.1, fine_step = 1 / 1.01;
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
        if (clipped_error(histogram, largest, h) > row->norm - cut.best * COARSE_SLACK) break;
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

#endif
