/* The router's choice, and the way of a token's rows to its experts and back. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"

struct gating {
    npuq_pool *pool;
    const float *logits, *bias;
    size_t experts, k, groups, top_groups;
    int sigmoid, select_two, renormalize;
    float scaling, *weights;
    int32_t *ids;
};

static void score_experts(const struct gating *gating, const float *logit, float *score) {
    size_t n = gating->experts;
    if (gating->sigmoid) {
        for (size_t e = 0; e < n; e++) score[e] = 1.0f / (1.0f + expf(-logit[e]));
        return;
    }
    float largest = logit[0], total = 0;
    for (size_t e = 1; e < n; e++) largest = logit[e] > largest ? logit[e] : largest;
    for (size_t e = 0; e < n; e++) total += score[e] = expf(logit[e] - largest);
    for (size_t e = 0; e < n; e++) score[e] /= total;
}

/* The lowest index among the largest values; a NaN is larger than any number, as in a sort. Taken ones are marked. */
static size_t take_largest(const float *value, unsigned char *taken, size_t n) {
    size_t best = n;
    for (size_t i = 0; i < n; i++) {
        if (taken[i]) continue;
        int nan = value[i] != value[i];
        if (best == n || (nan ? value[best] == value[best] : value[i] > value[best])) best = i;
    }
    taken[best] = 1;
    return best;
}

static float group_score(const float *choice, size_t n, int select_two) {
    float first = -INFINITY, second = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        if (choice[i] > first || choice[i] != choice[i]) {
            second = first;
            first = choice[i];
        } else if (choice[i] > second) {
            second = choice[i];
        }
    }
    return select_two ? first + second : first;
}

static void gating_task(const void *context, size_t token, int thread) {
    const struct gating *gating = context;
    size_t n = gating->experts, k = gating->k, size = n / gating->groups;
    float *score = pool_thread_scratch(gating->pool, thread), *choice = score + n, *group = choice + n;
    unsigned char *taken = (unsigned char *)(group + gating->groups), *kept = taken + n;
    score_experts(gating, gating->logits + token * n, score);
    for (size_t e = 0; e < n; e++) choice[e] = gating->bias == NULL ? score[e] : score[e] + gating->bias[e];
    if (gating->groups > 1) {
        for (size_t g = 0; g < gating->groups; g++) {
            group[g] = group_score(choice + g * size, size, gating->select_two);
        }
        memset(kept, 0, gating->groups);
        for (size_t i = 0; i < gating->top_groups; i++) take_largest(group, kept, gating->groups);
        for (size_t e = 0; e < n; e++) choice[e] = kept[e / size] ? choice[e] : -INFINITY;
    }
    memset(taken, 0, n);
    float *weight = gating->weights + token * k, total = 0;
    for (size_t j = 0; j < k; j++) {
        size_t e = take_largest(choice, taken, n);
        gating->ids[token * k + j] = (int32_t)e;
        total += weight[j] = score[e];
    }
    for (size_t j = 0; j < k; j++) {
        if (gating->renormalize) weight[j] /= total + 1e-20f;
        weight[j] *= gating->scaling;
    }
}

int npuq_gating_top_k(npuq_pool *pool, const float *logits, const float *bias, int64_t tokens, int64_t experts,
                      int64_t k, int32_t sigmoid, int64_t groups, int64_t top_groups, int32_t select_two,
                      int32_t renormalize, float scaling, float *weights, int32_t *ids) {
    if (tokens < 0 || k < 1 || k > experts || groups < 1 || experts % groups || top_groups < 1 || top_groups > groups) {
        return NPUQ_BAD_SIZE;
    }
    struct gating gating = {pool, logits, bias, (size_t)experts, (size_t)k, (size_t)groups, (size_t)top_groups,
                            sigmoid, select_two, renormalize, scaling, weights, ids};
    size_t floats = 2 * gating.experts + gating.groups;
    pool_begin(pool);
    int status = pool_scratch(pool, floats * sizeof(float) + gating.experts + gating.groups, 0);
    if (status == NPUQ_OK) pool_run(pool, gating_task, &gating, (size_t)tokens);
    pool_end(pool);
    return status;
}

struct routing {
    npuq_pool *pool;
    const struct kernels *kernels;
    const char *x;
    int dtype;
    size_t cols, k;
    int32_t begin, end; /* the places whose rows are written */
    const int32_t *row_index;
    char *out;
    int8_t *codes;
    float *scale;
};

/* One token: quantized once, copied to each of its places. */
static void expand_task(const void *context, size_t token, int thread) {
    const struct routing *routing = context;
    size_t n = routing->cols, k = routing->k, bytes = n * size_of(routing->dtype);
    const char *x = routing->x + token * bytes;
    const int32_t *place = routing->row_index + token * k;
    const int8_t *codes = NULL;
    float scale = 0;
    for (size_t j = 0; j < k; j++) {
        if (place[j] < routing->begin || place[j] >= routing->end) continue;
        size_t row = (size_t)(place[j] - routing->begin);
        if (routing->codes == NULL) {
            memcpy(routing->out + row * bytes, x, bytes);
        } else if (codes == NULL) {
            float *wide = pool_thread_scratch(routing->pool, thread);
            routing->kernels->to_float(x, routing->dtype, n, wide);
            routing->kernels->quant_row_divide(wide, n, 1, routing->codes + row * n, routing->scale + row);
            codes = routing->codes + row * n;
            scale = routing->scale[row];
        } else {
            memcpy(routing->codes + row * n, codes, n);
            routing->scale[row] = scale;
        }
    }
}

int npuq_init_routing(npuq_pool *pool, const void *x, int32_t dtype, int64_t cols, const int32_t *ids, int64_t tokens,
                      int64_t k, int64_t experts, int64_t first, int64_t own, int32_t *row_index, int64_t *group_rows,
                      void *out, int8_t *codes, float *scale) {
    if (!computes(dtype) || cols < 0 || tokens < 0 || k < 1 || tokens > INT32_MAX / k) return NPUQ_BAD_SIZE;
    if (first < 0 || own < 0 || first > experts - own) return NPUQ_BAD_SIZE;
    if (!all_below(ids, tokens * k, experts)) return NPUQ_BAD_INDEX;
    size_t copies = (size_t)(tokens * k);
    struct routing routing = {.pool = pool, .kernels = pool_kernels(pool), .x = x, .dtype = dtype,
                              .cols = (size_t)cols, .k = (size_t)k, .row_index = row_index, .out = out,
                              .codes = codes, .scale = scale};
    pool_begin(pool);
    int status = pool_scratch(pool, routing.cols * sizeof(float), (size_t)experts * sizeof(int32_t));
    if (status == NPUQ_OK) {
        /* A counting sort: stable, linear. */
        int32_t *next = pool_shared_scratch(pool), start = 0;
        memset(group_rows, 0, (size_t)experts * sizeof *group_rows);
        for (size_t f = 0; f < copies; f++) group_rows[ids[f]]++;
        for (int64_t e = 0; e < experts; e++) {
            next[e] = start;
            if (e == first) routing.begin = start;
            start += (int32_t)group_rows[e];
            if (e == first + own - 1) routing.end = start;
        }
        for (size_t f = 0; f < copies; f++) row_index[f] = next[ids[f]]++;
        pool_run(pool, expand_task, &routing, (size_t)tokens);
    }
    pool_end(pool);
    return status;
}

struct finalize {
    npuq_pool *pool;
    const struct kernels *kernels;
    const char *rows, *skip;
    int dtype;
    size_t cols, k;
    const float *weights;
    const int32_t *row_index;
    char *out;
};

static void finalize_task(const void *context, size_t token, int thread) {
    const struct finalize *finalize = context;
    const struct kernels *kernels = finalize->kernels;
    size_t n = finalize->cols, bytes = n * size_of(finalize->dtype);
    float *sum = pool_thread_scratch(finalize->pool, thread), *row = sum + n;
    if (finalize->skip == NULL) memset(sum, 0, n * sizeof *sum);
    else kernels->to_float(finalize->skip + token * bytes, finalize->dtype, n, sum);
    for (size_t j = 0; j < finalize->k; j++) {
        float weight = finalize->weights[token * finalize->k + j];
        if (finalize->dtype == NPUQ_BF16) { /* the operator takes its weights in the rows' dtype */
            uint16_t rounded;
            kernels->from_float(&weight, 1, &rounded, NPUQ_BF16);
            kernels->to_float(&rounded, NPUQ_BF16, 1, &weight);
        }
        size_t place = (size_t)finalize->row_index[token * finalize->k + j];
        kernels->to_float(finalize->rows + place * bytes, finalize->dtype, n, row);
        kernels->scale_add_row(weight, row, n, sum);
    }
    kernels->from_float(sum, n, finalize->out + token * bytes, finalize->dtype);
}

int npuq_finalize_routing(npuq_pool *pool, const void *rows, int32_t dtype, int64_t cols, const float *weights,
                          const int32_t *row_index, int64_t tokens, int64_t k, const void *skip, void *out) {
    if (!computes(dtype) || cols < 0 || tokens < 0 || k < 1) return NPUQ_BAD_SIZE;
    if (!all_below(row_index, tokens * k, tokens * k)) return NPUQ_BAD_INDEX;
    struct finalize finalize = {pool, pool_kernels(pool), rows, skip, dtype, (size_t)cols, (size_t)k, weights,
                                row_index, out};
    pool_begin(pool);
    int status = pool_scratch(pool, 2 * finalize.cols * sizeof(float), 0);
    if (status == NPUQ_OK) pool_run(pool, finalize_task, &finalize, (size_t)tokens);
    pool_end(pool);
    return status;
}
