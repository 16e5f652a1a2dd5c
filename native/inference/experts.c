/* The routed experts and their router, and the whole feed-forward block of an MoE layer, in one call each. */
#include "inference/feed_forward.h"

int npuq_moe_gate(npuq_pool *pool, const npuq_weights *router, const float *bias, const void *x, int32_t dtype,
                  int64_t tokens, int64_t k, int32_t sigmoid, int64_t groups, int64_t top_groups, int32_t select_two,
                  int32_t renormalize, float scaling, float *weights, int32_t *ids) {
    if (tokens < 0) return NPUQ_BAD_SIZE;
    pool_begin(pool);
    float *logits = pool_workspace(pool, (size_t)(tokens * router->outputs) * sizeof *logits);
    int status = NPUQ_NO_MEMORY;
    if (logits != NULL) {
        status = npuq_matmul(pool, router, x, dtype, NULL, NULL, tokens, logits, NPUQ_F32);
    }
    if (status == NPUQ_OK) {
        status = npuq_gating_top_k(pool, logits, bias, tokens, router->outputs, k, sigmoid, groups, top_groups,
                                   select_two, renormalize, scaling, weights, ids);
    }
    pool_end(pool);
    return status;
}

struct experts {
    const npuq_weights *gate_up, *down;
    int dtype;
    size_t copies;
    int64_t middle_rows;
    /* In the workspace: the copies of the tokens (codes or rows), their places, and their outputs. */
    struct codes codes;
    void *rows, *out;
    int32_t *row_index;
    int64_t *group_rows;
    struct middle middle;
};

static void lay_out_copies(struct experts *experts, struct space *space) {
    const npuq_weights *gate_up = experts->gate_up, *down = experts->down;
    size_t size = size_of(experts->dtype), cols = (size_t)gate_up->cols, copies = experts->copies;
    if (is_integer(gate_up->dtype)) experts->codes = take_codes(space, copies, cols);
    else experts->rows = take(space, copies * cols * size);
    experts->middle = take_middle(space, (size_t)experts->middle_rows, (size_t)down->cols, experts->dtype, is_integer(down->dtype));
}

static void lay_out_experts(struct experts *experts, struct space *space) {
    experts->row_index = take(space, experts->copies * sizeof(int32_t));
    experts->group_rows = take(space, (size_t)experts->gate_up->groups * sizeof(int64_t));
    lay_out_copies(experts, space);
    experts->out = take(space, experts->copies * (size_t)experts->down->outputs * size_of(experts->dtype));
}

/* The experts at [group, group + groups), `counts` rows each: `rows` in all, from row `first` on. */
static int run_experts(npuq_pool *pool, const struct experts *experts, int64_t group, int64_t groups,
                       const int64_t *counts, int64_t first, int64_t rows) {
    npuq_weights gate_up = *experts->gate_up, down = *experts->down;
    gate_up.part += group * gate_up.parts;
    down.part += group * down.parts;
    gate_up.groups = down.groups = groups;
    size_t cols = (size_t)gate_up.cols, size = size_of(experts->dtype);
    char *out = (char *)experts->out + (size_t)(first * down.outputs) * size;
    bool integer = is_integer(gate_up.dtype);
    const void *x = integer ? (const void *)(experts->codes.code + (size_t)first * cols)
                            : (const char *)experts->rows + (size_t)first * cols * size;
    const float *scale = integer ? experts->codes.scale + first : NULL;
    int status = npuq_matmul(pool, &gate_up, x, integer ? NPUQ_I8 : experts->dtype, scale, counts, rows,
                             experts->middle.gate_up, experts->dtype);
    if (status != NPUQ_OK) return status;
    return bring_down(pool, &down, &experts->middle, experts->dtype, counts, rows, out);
}

/* All experts, as many of them at a time as the middle holds the rows of: all at once for a few tokens, and one with
 * more rows than that in several turns. */
static int run_all_experts(npuq_pool *pool, const struct experts *experts) {
    int64_t first = 0, all = experts->gate_up->groups, most = experts->middle_rows, taken = 0;
    const int64_t *counts = experts->group_rows;
    for (int64_t group = 0; group < all;) {
        int64_t groups = 1, left = counts[group] - taken, rows = left < most ? left : most;
        bool whole = taken == 0 && rows == left; /* only whole experts share a turn */
        while (whole && group + groups < all && rows + counts[group + groups] <= most) {
            rows += counts[group + groups++];
        }
        if (rows > 0) {
            int status = run_experts(pool, experts, group, groups, groups == 1 ? &rows : counts + group, first, rows);
            if (status != NPUQ_OK) return status;
        }
        first += rows;
        taken = rows < left ? taken + rows : 0;
        group += taken > 0 ? 0 : groups;
    }
    return NPUQ_OK;
}

int npuq_moe_experts(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                     int32_t dtype, const float *weights, const int32_t *ids, int64_t tokens, int64_t k,
                     const void *skip, void *out) {
    if (!computes(dtype) || tokens < 0 || k < 1 || tokens > INT32_MAX / k || !halves_fit(gate_up, down)) {
        return NPUQ_BAD_SIZE;
    }
    struct experts experts = {.gate_up = gate_up, .down = down, .dtype = dtype, .copies = (size_t)(tokens * k)};
    int64_t most = middle_rows(gate_up, dtype);
    experts.middle_rows = most < tokens * k ? most : tokens * k;
    struct space space = {0};
    pool_begin(pool);
    lay_out_experts(&experts, &space);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    if (status == NPUQ_OK) {
        lay_out_experts(&experts, &space);
        status = npuq_init_routing(pool, x, dtype, gate_up->cols, ids, tokens, k, gate_up->groups, 0, gate_up->groups,
                                   experts.row_index, experts.group_rows, experts.rows, experts.codes.code, experts.codes.scale);
    }
    if (status == NPUQ_OK) status = run_all_experts(pool, &experts);
    if (status == NPUQ_OK) {
        status = npuq_finalize_routing(pool, experts.out, dtype, down->outputs, weights, experts.row_index, tokens, k,
                                       skip, out);
    }
    pool_end(pool);
    return status;
}

int npuq_expert_rows(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                     int32_t dtype, const int32_t *ids, int64_t tokens, int64_t k, int64_t experts, int64_t first,
                     int32_t *row_index, int64_t *group_rows, void *out) {
    if (!computes(dtype) || tokens < 0 || k < 1 || tokens > INT32_MAX / k || !halves_fit(gate_up, down)) {
        return NPUQ_BAD_SIZE;
    }
    int64_t own = gate_up->groups, rows = 0;
    for (int64_t copy = 0; copy < tokens * k; copy++) rows += ids[copy] >= first && ids[copy] < first + own;
    int64_t most = middle_rows(gate_up, dtype);
    struct experts mine = {.gate_up = gate_up, .down = down, .dtype = dtype, .copies = (size_t)rows,
                           .middle_rows = most < rows ? most : rows};
    struct space space = {0};
    pool_begin(pool);
    lay_out_copies(&mine, &space);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    if (status == NPUQ_OK) {
        lay_out_copies(&mine, &space);
        status = npuq_init_routing(pool, x, dtype, gate_up->cols, ids, tokens, k, experts, first, own, row_index,
                                   group_rows, mine.rows, mine.codes.code, mine.codes.scale);
    }
    if (status == NPUQ_OK) {
        mine.group_rows = group_rows + first;
        mine.out = out;
        status = run_all_experts(pool, &mine);
    }
    pool_end(pool);
    return status;
}

static bool moe_fits(const npuq_moe *moe) {
    const npuq_weights *gate_up = moe->gate_up, *shared = moe->shared_gate_up;
    if (moe->router->outputs != gate_up->groups || moe->router->cols != gate_up->cols || moe->k < 1) return false;
    if (shared == NULL || moe->shared_down == NULL) return shared == NULL && moe->shared_down == NULL;
    return shared->cols == gate_up->cols && moe->shared_down->outputs == moe->down->outputs;
}

int npuq_moe_layer(npuq_pool *pool, const npuq_moe *moe, const void *x, int32_t dtype, int64_t tokens, void *out) {
    if (!computes(dtype) || tokens < 0 || !moe_fits(moe)) return NPUQ_BAD_SIZE;
    size_t copies = (size_t)(tokens * moe->k), shared_bytes = (size_t)(tokens * moe->down->outputs) * size_of(dtype);
    struct space space = {0};
    pool_begin(pool);
    space.used = 2 * (copies * sizeof(float) + ALIGNMENT) + shared_bytes;
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    float *weights = NULL;
    int32_t *ids = NULL;
    void *shared = NULL;
    if (status == NPUQ_OK) {
        weights = take(&space, copies * sizeof *weights);
        ids = take(&space, copies * sizeof *ids);
        if (moe->shared_down != NULL) {
            shared = take(&space, shared_bytes);
            status = npuq_mlp(pool, moe->shared_gate_up, moe->shared_down, x, dtype, tokens, shared);
        }
    }
    if (status == NPUQ_OK) {
        status = npuq_moe_gate(pool, moe->router, moe->bias, x, dtype, tokens, moe->k, moe->sigmoid, moe->groups,
                               moe->top_groups, moe->select_two, moe->renormalize, moe->scaling, weights, ids);
    }
    if (status == NPUQ_OK) {
        status = npuq_moe_experts(pool, moe->gate_up, moe->down, x, dtype, weights, ids, tokens, moe->k, shared, out);
    }
    pool_end(pool);
    return status;
}
