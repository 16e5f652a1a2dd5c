/* The error of int4 codes by min-max, from weights in fixed point of ERROR_BITS, x: int16 instructions on pairs of
 * neighbours give Σ x², A = Σ x·q and B = Σ q² exactly. x is off by half a unit at most, which is below 2^-11 of a scale. */
#ifndef NPUQ_CONVERT_MINMAX_ERROR_H
#define NPUQ_CONVERT_MINMAX_ERROR_H

#include "convert/int_codes.h"

/* int4: Σ x², A and B. A weight and its code have one sign: A needs none, and 2^17 times 2^14 times 7 over four lanes fit. */
struct error_sums {
    struct lane_sums norm;
    vu a;
    vi b;
};

/* The same of a part; a variable of its own, since what codes are stored to might be anything's bytes. */
struct error_part {
    vu squares[2]; /* 5 times 2^29 in a lane at most: a part, and the step that is a row's rest */
    vu a;
    vs b;
};

/* `code_squares`: each lane's of both. */
INLINE void add_to_part(struct error_part *part, vs x, vs y, vs code_x, vs code_y, vs code_squares) {
    part->squares[0] = vu_dot(part->squares[0], x, x);
    part->squares[1] = vu_dot(part->squares[1], y, y);
    part->a = vu_dot(vu_dot(part->a, x, code_x), y, code_y);
    part->b += code_squares;
}

INLINE void add_part(struct error_sums *sums, const struct error_part *part) {
    add_lanes(&sums->norm, part->squares[0]);
    add_lanes(&sums->norm, part->squares[1]);
    sums->a += part->a;
    sums->b = vs_dot(sums->b, part->b, vs_set(1));
}

INLINE struct error_sums join_errors(struct error_sums a, struct error_sums b) {
    return (struct error_sums){join_lanes(a.norm, b.norm), a.a + b.a, a.b + b.b};
}

INLINE void account_error(struct converted *out, const struct error_sums *sums, int exponent) {
    struct lane_sums a = {{0}, {0}};
    add_lanes(&a, sums->a);
    const struct exact_state state = {(int64_t)total_lanes(&a), vi_total(sums->b), 0};
    account_in(out, (double)total_lanes(&sums->norm), state, exponent, ERROR_BITS);
}

#endif
