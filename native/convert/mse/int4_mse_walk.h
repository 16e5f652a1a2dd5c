/* int4 by least squared error, second step: a walk over the window of scales. It finds the weights that change their code
 * inside the window, and the best state. */
#ifndef NPUQ_CONVERT_MSE_INT4_MSE_WALK_H
#define NPUQ_CONVERT_MSE_INT4_MSE_WALK_H

#include "convert/mse/int4_mse_window.h"

/* How far its ends may be apart at most: |w| / 2h in the middle is within 0.47 of m − ½. */
#define WALKED_RATIO 1.125
/* A window is cut into so many parts at a time, until so few changes are left or so many rounds are over. */
enum { WINDOW_PARTS = 16, FEW_CHANGES = 12, MOST_ROUNDS = 5 };

/* Room for a row's changes: a bit and a place for each weight; then of each change |w|, 2m − 1, how many weights make it
 * (of a row in tables), and κ as a float. */
struct changes {
    uint64_t *words;
    uint32_t *places;
    int32_t *magnitude, *odd, *times;
    float *kappa;
};

/* The input of a walk: the state above the window, its ends in κ, and a score that some state reaches. */
struct walk {
    int64_t a, b, top, highest, lowest;
    double floor_score;
};

/* The places of the weights whose codes differ between the two ends of a window, in `places`; how many. `words`: a bit
 * for each weight. */
static size_t changed_places(const struct planes *planes, struct window window, uint64_t *words, uint32_t *places) {
    const struct factors above = factors_of(window.above), below = factors_of(window.below);
    for (size_t i = 0; i < planes->n; i += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64; k += PLANE_STEP) {
            vs w = vs_load(planes->high + i + k);
            word |= (uint64_t)vs_bits(plane_codes(w, above) != plane_codes(w, below)) << k;
        }
        words[i / 64] = window.open ? ~0ull : word;
    }
    size_t found = 0;
    for (size_t i = 0; i < planes->n; i += 64) {
        uint64_t word = words[i / 64];
        size_t count = (size_t)__builtin_popcountll(word);
        for (size_t k = 0; k < count || k < 8; k++) { /* always eight: how many there are cannot be predicted */
            places[found + k] = (uint32_t)i + (uint32_t)__builtin_ctzll(word | 1ull << 63);
            word &= word - 1;
        }
        found += count;
    }
    return found;
}

INLINE struct breakpoint breakpoint_of(uint32_t magnitude, int m, uint32_t times) {
    static const double inverse[9] = {0,         0x1p17,      0x1p17 / 3,  0x1p17 / 5, 0x1p17 / 7,
                                      0x1p17 / 9, 0x1p17 / 11, 0x1p17 / 13, 0x1p17 / 15};
    return (struct breakpoint){kappa_of(magnitude, inverse[m]), magnitude * times, (2 * (uint32_t)m - 1) * times, 0};
}

/* Every breakpoint of a window of the row w · unit. NPUQ_NO_MEMORY if they do not fit. */
static int window_breakpoints(const struct planes *planes, struct window window, const float *w, float unit,
                              const uint32_t *places, size_t changed, struct walk_scratch *scratch, size_t *count) {
    if (reserve_breakpoints(scratch, 8 * changed) != NPUQ_OK) return NPUQ_NO_MEMORY;
    struct breakpoint *out = scratch->breakpoints;
    for (size_t p = 0; p < changed; p++) {
        const int32_t fixed = (int32_t)rintf(w[places[p]] * unit);
        const uint32_t magnitude = (uint32_t)abs(fixed);
        const int high = planes->high[places[p]], last = fixed < 0 ? 8 : fixed > 0 ? 7 : 0;
        const int end = window.open ? last : abs(code_at(high, window.below));
        for (int m = abs(code_at(high, window.above)) + 1; m <= end; m++) *out++ = breakpoint_of(magnitude, m, 1);
    }
    *count = (size_t)(out - scratch->breakpoints);
    return NPUQ_OK;
}

/* The code changes in a narrow window. The float of κ, |w| / (2m − 1) correctly rounded, never falls as κ grows and is
 * equal where κ is: all changes at or above some float make a state. */
static void find_changes(const float *w, float unit, struct window window, size_t count, const struct changes *changes) {
    const float in_codes = (float)(1 / (window.above_h + window.below_h));
    float *value = changes->kappa;
    for (size_t p = 0; p < count; p++) value[p] = w[changes->places[p]];
    memset(value + count, 0, (VW - 1) * sizeof *value);
    for (size_t p = 0; p < count; p += VW) { /* zeros behind the last have κ = 0 */
        vi whole = vf_round(vf_load(value + p) * unit), size = (whole ^ (whole >> 31)) - (whole >> 31);
        vf magnitude = vi_float(size);
        vi code = vf_truncate(magnitude * in_codes + 1.0f), odd = code + code - 1; /* |w| / 2h is within ½ of m − ½ */
        vf_store(changes->kappa + p, magnitude / vi_float(odd));
        memcpy(changes->magnitude + p, &size, sizeof size);
        memcpy(changes->odd + p, &odd, sizeof odd);
    }
}

/* The sums of a window's changes part by part, of those above it first and of those below it last. */
struct part_sums {
    double a[WINDOW_PARTS + 2], b[WINDOW_PARTS + 2];
};

/* Adds up the changes by parts, and writes which one each is in. It never falls as κ does: what is in some part and all
 * above it is a state. */
INLINE void sum_parts(const struct changes *changes, size_t count, double high, double low, struct part_sums *sums,
                      const int counted) {
    const vf from = vf_set((float)high), by = vf_set((float)(WINDOW_PARTS / (high - low)));
    memset(sums, 0, sizeof *sums);
    for (size_t p = 0; p < count; p += VW) {
        const vf at = vf_min(vf_max((from - vf_load(changes->kappa + p)) * by + 1.0f, vf_set(0)), vf_set(WINDOW_PARTS + 1));
        const vi part = vf_truncate(at);
        memcpy(changes->places + p, &part, sizeof part);
    }
    for (size_t p = 0; p < count; p++) {
        const int64_t times = counted ? changes->times[p] : 1;
        sums->a[changes->places[p]] += (double)(changes->magnitude[p] * times);
        sums->b[changes->places[p]] += (double)(changes->odd[p] * times);
    }
}

/* Keeps the changes of the parts from first to last - 1, and zeros behind them; how many. */
INLINE size_t keep_changes(const struct changes *changes, size_t count, int first, int last, const int counted) {
    size_t kept = 0;
    for (size_t p = 0; p < count; p++) {
        const int part = (int)changes->places[p];
        changes->kappa[kept] = changes->kappa[p];
        changes->magnitude[kept] = changes->magnitude[p];
        changes->odd[kept] = changes->odd[p];
        if (counted) changes->times[kept] = changes->times[p];
        kept += part >= first && part < last;
    }
    memset(changes->kappa + kept, 0, (VW - 1) * sizeof *changes->kappa);
    return kept;
}

/* Half scales, and the states there, of which some part between them may hold a better one: as interval_bound, without
 * its divisions (see find_open). *last is 0 where none may. */
INLINE void open_parts(const double *edge, const double *a, const double *b, double enough, int *first, int *last) {
    double open[WINDOW_PARTS];
    for (int j = 0; j < WINDOW_PARTS; j++) {
        const double hi = edge[j] * (1 + 1e-6), lo = edge[j + 1] * (1 - 1e-6), alpha = a[j + 1] - a[j], beta = b[j + 1] - b[j];
        const double crossing = larger(0, smaller((alpha - beta * lo) / (hi - lo), beta)), kink = a[j] + crossing * hi;
        open[j] = kink * kink - enough * (b[j] + crossing);
    }
    *first = WINDOW_PARTS;
    *last = 0;
    for (int j = 0; j < WINDOW_PARTS; j++) {
        if (open[j] < 0) continue;
        *first = j < *first ? j : *first;
        *last = j + 1;
    }
}

/* As search_window, of a narrow window's changes: the window is cut in parts, those that no better state can lie in are
 * dropped, and so on until few changes are left to walk. */
INLINE int walk_narrow(const struct walk *walk, size_t count, const struct changes *changes,
                       struct walk_scratch *scratch, struct exact_state *best, const int counted) {
    double high = (double)walk->highest / (1 << KAPPA_BITS), low = (double)walk->lowest / (1 << KAPPA_BITS);
    int64_t above_a = walk->a, above_b = walk->b;
    for (int round = 0; count > FEW_CHANGES && round < MOST_ROUNDS; round++) {
        struct part_sums sums;
        double edge[WINDOW_PARTS + 1], a[WINDOW_PARTS + 1], b[WINDOW_PARTS + 1], score[WINDOW_PARTS + 1];
        sum_parts(changes, count, high, low, &sums, counted);
        double at_a = (double)above_a, at_b = (double)above_b;
        for (int j = 0; j <= WINDOW_PARTS; j++) {
            edge[j] = high - (high - low) / WINDOW_PARTS * j;
            a[j] = at_a += sums.a[j];
            b[j] = at_b += sums.b[j];
        }
        for (int j = 0; j <= WINDOW_PARTS; j++) score[j] = b[j] > 0 ? a[j] * a[j] / b[j] : 0;
        for (int j = 0; j <= WINDOW_PARTS; j++) {
            if (score[j] >= best->score) offer(best, (int64_t)a[j], (int64_t)b[j]);
        }
        int first, last;
        open_parts(edge, a, b, larger(best->score * FINE_SLACK, walk->floor_score), &first, &last);
        if (last == 0) return NPUQ_OK; /* no state inside is better than those at the edges */
        high = edge[first];
        low = edge[last];
        above_a = (int64_t)a[first];
        above_b = (int64_t)b[first];
        count = keep_changes(changes, count, first + 1, last + 1, counted);
    }
    if (reserve_breakpoints(scratch, count) != NPUQ_OK) return NPUQ_NO_MEMORY;
    for (size_t p = 0; p < count; p++) {
        const uint32_t times = counted ? (uint32_t)changes->times[p] : 1;
        scratch->breakpoints[p] = breakpoint_of((uint32_t)changes->magnitude[p], (changes->odd[p] + 1) / 2, times);
    }
    walk_list(scratch->breakpoints, count, above_a, above_b, walk->highest, walk->lowest, best);
    return NPUQ_OK;
}

/* The places of a pair of segments' magnitudes at or above the thresholds at a window's two ends, at most the table's
 * length: [segment][end][threshold]. Bit m + 16 · segment of what is returned: those of threshold m differ. */
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
INLINE uint32_t window_places(const struct tables *tables, size_t pair, const struct thresholds *ends, uint8_t place[32]) {
    const __m256i length = _mm256_set1_epi8((char)(tables->parts * TABLE_PART));
    const __m256i at = _mm256_min_epu8(threshold_places(tables, pair, ends), length);
    _mm256_storeu_si256((__m256i *)place, at);
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(at, _mm256_srli_si256(at, 8))) & 0x00FF00FF;
}
#else
struct thresholds {
    float h[2];
};
INLINE struct thresholds thresholds_at(float first, float second) { return (struct thresholds){{first, second}}; }
INLINE uint32_t window_places(const struct tables *tables, size_t pair, const struct thresholds *ends, uint8_t place[32]) {
    const int length = tables->parts * TABLE_PART;
    uint32_t differ = 0;
    for (size_t s = 0; s < 2 && 2 * pair + s < tables->segments; s++) {
        for (int end = 0; end < 2; end++) {
            int32_t at[8];
            thresholds_of(tables, 2 * pair + s, ends->h[end], at);
            for (int m = 0; m < 8; m++) {
                const int32_t here = at[m] < 0 ? 0 : at[m] > length ? length : at[m];
                place[16 * s + 8 * end + m] = (uint8_t)here;
                differ |= (uint32_t)(end == 1 && here != place[16 * s + m]) << (16 * s + m);
            }
        }
    }
    return differ;
}
#endif

/* What changes in a narrow window of a row in tables: what lies between the thresholds at its two ends, and has not got its
 * code in the state above, which was rounded: what is at a threshold there may be on either side of it. Of each, |w| in
 * `kappa`, 2m − 1 and how many weights make it; how many there are. */
static size_t table_changes(const struct tables *tables, struct window window, const struct changes *changes) {
    const struct thresholds ends = thresholds_at((float)(window.above_h * (1 + 0x1p-18)), (float)window.below_h);
    const float inverse = inverse_at(tables, window.above_h);
    size_t found = 0;
    for (size_t pair = 0; 2 * pair < tables->segments; pair++) {
        uint8_t place[32];
        uint32_t differ = window_places(tables, pair, &ends, place);
        for (; differ != 0; differ &= differ - 1) {
            const int bit = __builtin_ctz(differ), m = bit % 16;
            const size_t s = 2 * pair + (size_t)(bit / 16);
            const struct segment *segment = &tables->segments_at[s];
            const uint8_t *count = tables->counts + s * COUNT_BYTES + (m == 7 ? NEGATIVE_COUNTS - TOP_PART * TABLE_PART : 0);
            for (int j = place[bit + 8]; j < place[bit]; j++) {
                const float w = fp8_magnitudes[segment->first + j] * segment->scale;
                changes->kappa[found] = w;
                changes->odd[found] = 2 * m + 1;
                changes->times[found] = count[j];
                found += (count[j] > 0) & (rintf(w * inverse) <= (float)m); /* as exact_tables rounds */
            }
        }
    }
    return found;
}

/* Puts κ in the place of |w|, and |w| in fixed point beside it; zeros behind the last have κ = 0. */
static void order_changes(const struct changes *changes, size_t count, float unit) {
    memset(changes->kappa + count, 0, (VW - 1) * sizeof *changes->kappa);
    for (size_t p = 0; p < count; p += VW) {
        const vi size = vf_round(vf_load(changes->kappa + p) * unit);
        memcpy(changes->magnitude + p, &size, sizeof size);
        vf_store(changes->kappa + p, vi_float(size) / vi_float(vi_load(changes->odd + p)));
    }
}

/* True for a window so narrow that no weight passes two thresholds in it. */
INLINE int is_narrow(struct window window) { return !window.open && window.above_h < WALKED_RATIO * window.below_h; }

/* The best state of a window of the row w · unit, a narrow one where the row is in tables (w is not looked at then).
 * NPUQ_NO_MEMORY if its breakpoints do not fit. */
static int walk_row(const struct searched *row, const float *w, float unit, struct window window, double known,
                    const struct changes *changes, struct walk_scratch *scratch, struct exact_state *best) {
    const double kappa = 1 << KAPPA_BITS;
    const struct walk walk = {
        .a = window.state.a,
        .b = window.state.b,
        .top = (int64_t)((window.above_h + row->doubt) * kappa) + 1,
        .highest = (int64_t)(window.hi * kappa),
        .lowest = (int64_t)(window.lo * kappa),
        .floor_score = known * COARSE_SLACK,
    };
    *best = (struct exact_state){0, 0, 0};
    if (row->tables != NULL) {
        const size_t changed = table_changes(row->tables, window, changes);
        order_changes(changes, changed, unit);
        return walk_narrow(&walk, changed, changes, scratch, best, 1);
    }
    const size_t changed = changed_places(row->planes, window, changes->words, changes->places);
    if (is_narrow(window)) {
        find_changes(w, unit, window, changed, changes);
        return walk_narrow(&walk, changed, changes, scratch, best, 0);
    }
    size_t count;
    const int status = window_breakpoints(row->planes, window, w, unit, changes->places, changed, scratch, &count);
    if (status != NPUQ_OK) return status;
    return search_window(scratch, count, walk.a, walk.b, walk.top, walk.highest, walk.lowest, walk.floor_score, best);
}

#endif
