/* int4 `mse` of FP8 rows by their magnitudes (kernels/distinct.h) beside the same rows weight by weight, for one level:
 * the same bits, and rows of all usual kinds are really taken that way. */
#include <stdio.h>

#include "kernels/convert.h"

static uint32_t state = 4321;

static double draw(void) { return (double)((state = state * 1664525u + 1013904223u) >> 8) / 0x1p24; }

static double gaussian(void) { return sqrt(-2 * log(draw() + 0x1p-25)) * cos(6.283185307179586 * draw()); }

/* The FP8 code of the magnitude next below. */
static uint8_t encode(double w) {
    uint8_t code = 0;
    while (code < FP8_NAN - 1 && fp8_magnitudes[code + 1] <= fabs(w)) code++;
    return (uint8_t)(code | (w < 0 ? 128 : 0));
}

enum kind { NORMAL, WIDE, EQUAL, LARGE, UNEVEN, OUTLIERS, SUBNORMAL, KINDS };
static const char *names[KINDS] = {"normal", "wide", "equal", "large", "uneven", "outliers", "subnormal"};

static double weight(enum kind kind) {
    double w = gaussian();
    if (kind == WIDE) return w * fabs(w) * 60; /* 4 parts */
    if (kind == EQUAL) return w < 0 ? -104 : 104;
    if (kind == LARGE) return w * 400; /* many at ±448 */
    if (kind == OUTLIERS) return draw() < 0.002 ? 448 : w;
    if (kind == SUBNORMAL) return w * 0x1p-7;
    return w * 107;
}

/* How many of 24 rows were taken by their magnitudes; exits where one differs. */
static int check(enum kind kind, size_t n, size_t block) {
    enum { MOST = 4096 };
    static uint8_t x[MOST];
    static float scale[MOST / LEAST_SEGMENT + 1], w[MOST + 64];
    static int8_t codes[2][MOST + 64];
    void *memory = aligned_alloc(64, (convert_scratch(n) + 63) / 64 * 64);
    if (memory == NULL) exit(2);
    memset(memory, 0, convert_scratch(n));
    int taken = 0;
    for (int row = 0; row < 24; row++) {
        for (size_t b = 0; b * block < n; b++) scale[b] = kind == UNEVEN ? (float)exp2(8 * draw() - 20) : (float)(0.8 + 0.4 * draw());
        if (kind == UNEVEN) scale[0] = 0x1p-12f;
        for (size_t i = 0; i < n; i++) x[i] = encode(weight(kind));
        for (size_t i = 0; row % 4 == 1 && i < block && i < n; i++) x[n - 1 - i] = 0;
        struct converted got = {.codes = codes[0]}, expected = {.codes = codes[1]};
        const int status = convert_fp8(x, n, scale, block, 4, 1, memory, &got);
        if (status == NOT_IN_TABLES) continue;
        taken++;
        memset(w, 0, sizeof w);
        const float largest = decode_row(x, NPUQ_F8E4M3, n, scale, block, w);
        if (status != NPUQ_OK || convert_row(w, n, largest, 4, 1, memory, &expected) != NPUQ_OK) exit(2);
        if (memcmp(codes[0], codes[1], n) || got.scale != expected.scale || got.error != expected.error ||
            got.norm != expected.norm) {
            fprintf(stderr, "%s, %zu in blocks of %zu, row %d: scale %.9g for %.9g, error %.17g for %.17g\n", names[kind], n,
                    block, row, (double)got.scale, (double)expected.scale, got.error, expected.error);
            exit(1);
        }
    }
    convert_release(memory);
    free(memory);
    return taken;
}

int main(void) {
    static const size_t shapes[][2] = {{2048, 128}, {4096, 128}, {1000, 100}, {333, 64}, {700, 256}, {64, 64}};
    for (int kind = 0; kind < KINDS; kind++) {
        int taken = 0, all = 0;
        for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++, all += 24) {
            taken += check((enum kind)kind, shapes[shape][0], shapes[shape][1]);
        }
        printf("%s %d of %d\n", names[kind], taken, all);
    }
    return 0;
}
