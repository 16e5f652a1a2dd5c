/* The error of int4 codes by min-max, told by weights of TOLD_BITS, x in int16: Σ x², A = Σ x·q and B = Σ q² are then
 * instructions on pairs of neighbours, and exact. A weight is half a unit beside its x at most, which is below 2^-11 of a
 * scale. */
#ifndef NPUQ_KERNELS_TOLD_H
#define NPUQ_KERNELS_TOLD_H

#include "codes.h"

/* int4: Σ x², A and B. A weight and its code have one sign: A needs none, and 2^17 times 2^14 times 7 over four lanes fit. */
struct told {
    struct lane_sums norm;
    vu a;
    vi b;
};

/* The same of a part; a variable of its own, since what codes are stored to might be anything's bytes. */
struct told_part {
    vu squares[2]; /* 5 times 2^29 in a lane at most: a part, and the step that is a row's rest */
    vu a;
    vs b;
};

/* `code_squares`: each lane's of both. */
INLINE void tell(struct told_part *part, vs x, vs y, vs code_x, vs code_y, vs code_squares) {
    part->squares[0] = vu_dot(part->squares[0], x, x);
    part->squares[1] = vu_dot(part->squares[1], y, y);
    part->a = vu_dot(vu_dot(part->a, x, code_x), y, code_y);
    part->b += code_squares;
}

INLINE void add_part(struct told *told, const struct told_part *part) {
    add_lanes(&told->norm, part->squares[0]);
    add_lanes(&told->norm, part->squares[1]);
    told->a += part->a;
    told->b = vs_dot(told->b, part->b, vs_set(1));
}

INLINE struct told both(struct told a, struct told b) {
    return (struct told){join_lanes(a.norm, b.norm), a.a + b.a, a.b + b.b};
}

INLINE void account_told(struct converted *out, const struct told *told, int exponent) {
    struct lane_sums a = {{0}, {0}};
    add_lanes(&a, told->a);
    const struct exact_state state = {(int64_t)total_lanes(&a), vi_total(told->b), 0};
    account_in(out, (double)total_lanes(&told->norm), state, exponent, TOLD_BITS);
}

#endif
