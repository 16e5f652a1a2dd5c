/* The cutting of a product into tasks, and their order. */
#ifndef NPUQ_INFERENCE_PRODUCTS_TASKS_H
#define NPUQ_INFERENCE_PRODUCTS_TASKS_H

#include "npuq.h"

/* A task is some rows of one stored weight, for all the tokens of its group. */
struct task {
    int32_t group, part;
    int64_t first, rows; /* rows of the part */
    int64_t column;      /* of the output */
    int64_t token, tokens;
};

/* A group that has tokens: those at [token, token + tokens). */
struct active {
    int64_t token, tokens;
    int32_t group;
};

/* Lists groups that have tokens, the fewest first; returns their number. group_rows as in npuq_matmul. */
size_t list_active(int64_t groups, const int64_t *group_rows, int64_t m, struct active *active);

/* Tasks of up to `step` rows each, in the order of the groups. */
size_t count_tasks(const npuq_weights *weights, const struct active *active, size_t groups, size_t step);
void list_tasks(const npuq_weights *weights, const struct active *active, size_t groups, int64_t step, struct task *task);

/* Tasks of few tokens wait for memory, tasks of many for arithmetic: taken by turns, some threads do the one while
 * others do the other. `sorted` by tokens; both ends pass in equal time. */
void mix_tasks(const struct task *sorted, size_t count, struct task *mixed);

#endif
