/* Coordinate descent on the codes of rows: most codes stay, so that a move costs one row of the Hessian, and the others
 * nothing. Each gradient is a chain of fused multiply-adds in the order of the moves, whatever the blocks. */
#ifndef NPUQ_CALIBRATE_DESCENT_H
#define NPUQ_CALIBRATE_DESCENT_H

#include "calibrate/float_product.h"
#include "common/levels.h"

/* Columns of one piece of a gradient that moves are added to in registers. */
enum { PIECE_VECTORS = 64 / VW, PIECE = 64 };

/* One row's moves within the block: the column in the block, and the change of the error w − s·q there. */
struct code_moves {
    size_t count;
    uint16_t *place;
    float *change;
};

/* gradient [n] += Σ change · hessian row, move after move. */
INLINE void add_moves(const float *hessian, size_t ldh, struct code_moves moves, size_t n, float *gradient) {
    if (n == PIECE) {
        vf sum[PIECE_VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < PIECE_VECTORS; v++) sum[v] = vf_load(gradient + v * VW);
        for (size_t t = 0; t < moves.count; t++) {
            const float *from = hessian + moves.place[t] * ldh;
            const vf change = vf_set(moves.change[t]);
#pragma GCC unroll 16
            for (int v = 0; v < PIECE_VECTORS; v++) sum[v] = chain_fma(change, vf_load(from + v * VW), sum[v]);
        }
#pragma GCC unroll 16
        for (int v = 0; v < PIECE_VECTORS; v++) vf_store(gradient + v * VW, sum[v]);
        return;
    }
    for (size_t t = 0; t < moves.count; t++) {
        const float *from = hessian + moves.place[t] * ldh;
        const vf change = vf_set(moves.change[t]);
        size_t i = 0;
        for (; i + VW <= n; i += VW) vf_store(gradient + i, chain_fma(change, vf_load(from + i), vf_load(gradient + i)));
        if (i == n) continue;
        const vf last = chain_fma(change, vf_load_part(from + i, n - i), vf_load_part(gradient + i, n - i));
        vf_store_part(gradient + i, last, n - i);
    }
}

/* The best code of a column whose gradient, over its curvature, is `wanted` steps. */
INLINE int best_code(int code, float wanted, int bits) {
    const float bound = (float)(1 << (bits - 1)), best = (float)code + wanted;
    if (!(best > -bound)) return -(1 << (bits - 1)); /* a NaN too */
    if (best > bound - 1) return (1 << (bits - 1)) - 1;
    return (int)rintf(best);
}

/* One row's columns [first, end), from the last to the first: its moves, and its gradient within the block. */
static size_t descend_block(const struct descent *task, size_t row, size_t first, size_t end, struct code_moves moves) {
    float *gradient = task->gradient + row * task->columns;
    int8_t *codes = task->codes + row * task->columns;
    const float scale = task->scale[row], inverse = 1.0f / scale;
    for (size_t j = end; j-- > first;) {
        const float wanted = gradient[j] * task->inverse_diagonal[j] * inverse;
        if (wanted <= 0.5f && wanted >= -0.5f) continue;
        const int best = best_code(codes[j], wanted, task->bits);
        if (best == codes[j]) continue;
        const float change = (float)(codes[j] - best) * scale;
        const size_t place = j - first;
        const struct code_moves one = {1, (uint16_t[]){(uint16_t)place}, (float[]){change}};
        codes[j] = (int8_t)best;
        moves.place[moves.count] = (uint16_t)place, moves.change[moves.count] = change, moves.count++;
        add_moves(task->hessian + first * task->columns + first, task->columns, one, end - first, gradient + first);
    }
    return moves.count;
}

static struct code_moves moves_of(const struct descent *task, size_t row) {
    return (struct code_moves){task->count[row], task->place + row * DESCENT_BLOCK, task->change + row * DESCENT_BLOCK};
}

/* Adds the moves of the block at `first` to columns [start, end) of all rows. */
static void spread_moves(const struct descent *task, size_t first, size_t start, size_t end) {
    for (size_t c = start; c < end; c += PIECE) {
        const size_t n = end - c < PIECE ? end - c : PIECE;
        for (size_t row = 0; row < task->rows; row++) {
            const struct code_moves moves = moves_of(task, row);
            if (moves.count == 0) continue;
            const float *from = task->hessian + first * task->columns + c;
            add_moves(from, task->columns, moves, n, task->gradient + row * task->columns + c);
        }
    }
}

/* One sweep over all columns of all rows. Returns the number of moves. */
static size_t descend(const struct descent *task) {
    size_t end = task->columns, all = 0;
    while (end > 0) {
        const size_t first = (end - 1) / DESCENT_BLOCK * DESCENT_BLOCK;
        for (size_t row = 0; row < task->rows; row++) {
            struct code_moves moves = moves_of(task, row);
            moves.count = 0;
            all += task->count[row] = descend_block(task, row, first, end, moves);
        }
        spread_moves(task, first, 0, first);
        spread_moves(task, first, end, task->columns);
        end = first;
    }
    return all;
}

#endif
