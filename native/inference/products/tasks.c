/* Cuts a product into tasks, and alternates tasks that wait for memory with tasks that compute. */
#include "inference/products/tasks.h"

/* A weight's products with so many tokens take as long as reading it. */
enum { STREAMED_TOKENS = 3 };

size_t list_active(int64_t groups, const int64_t *group_rows, int64_t m, struct active *active) {
    size_t count = 0;
    int64_t token = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t tokens = group_rows == NULL ? m : group_rows[g];
        if (tokens == 0) continue;
        size_t place = count++;
        for (; place > 0 && active[place - 1].tokens > tokens; place--) active[place] = active[place - 1];
        active[place] = (struct active){token, tokens, (int32_t)g};
        token += tokens;
    }
    return count;
}

size_t count_tasks(const npuq_weights *weights, const struct active *active, size_t groups, size_t step) {
    size_t count = 0;
    for (size_t a = 0; a < groups; a++) {
        for (int64_t p = 0; p < weights->parts; p++) {
            count += ((size_t)weights->part[active[a].group * weights->parts + p].rows + step - 1) / step;
        }
    }
    return count;
}

void list_tasks(const npuq_weights *weights, const struct active *active, size_t groups, int64_t step,
                struct task *task) {
    for (size_t a = 0; a < groups; a++) {
        const struct active *of = &active[a];
        int64_t column = 0;
        for (int64_t p = 0; p < weights->parts; p++) {
            const int64_t rows = weights->part[of->group * weights->parts + p].rows;
            for (int64_t first = 0; first < rows; first += step) {
                const int64_t some = rows - first < step ? rows - first : step;
                *task++ = (struct task){of->group, (int32_t)p, first, some, column + first, of->token, of->tokens};
            }
            column += rows;
        }
    }
}

void mix_tasks(const struct task *sorted, size_t count, struct task *mixed) {
    int64_t few = 0, many = 0;
    for (size_t first = 0, last = count; first < last;) {
        const struct task *task = few <= many ? &sorted[first++] : &sorted[--last];
        const int64_t cost = task->rows * (task->tokens < STREAMED_TOKENS ? STREAMED_TOKENS : task->tokens);
        if (few <= many) few += cost;
        else many += cost;
        *mixed++ = *task;
    }
}
