/* int4 `mse` of FP8 rows by their magnitudes (convert/fp8/fp8_int4_mse.h) beside the same rows weight by weight, for one level:
 * the same bits, and rows of all usual kinds are really taken that way. */
#include <stdio.h>

#include "convert/quantize_row.h"

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

enum { MOST = 4096 };
static uint8_t x[MOST];
static float scale[MOST / LEAST_SEGMENT + 1];

/* Whether the row was taken by its magnitudes; exits where it differs. *best is its scale. */
static int compare(const char *name, size_t n, size_t block, void *memory, float *best) {
    static float w[MOST + 64];
    static int8_t codes[2][MOST + 64];
    struct converted got = {.codes = codes[0]}, expected = {.codes = codes[1]};
    const int status = convert_stored(x, NPUQ_F8E4M3, n, scale, block, 4, 1, memory, &got);
    memset(w, 0, sizeof w);
    const float largest = decode_row(x, NPUQ_F8E4M3, n, scale, block, w);
    if (convert_row(w, n, largest, 4, 1, memory, &expected) != NPUQ_OK) exit(2);
    *best = expected.scale;
    if (status == NOT_IN_TABLES) return 0;
    if (status != NPUQ_OK) exit(2);
    if (memcmp(codes[0], codes[1], n) || got.scale != expected.scale || got.error != expected.error ||
        got.norm != expected.norm) {
        fprintf(stderr, "%s, %zu in blocks of %zu: scale %.9g for %.9g, error %.17g for %.17g\n", name, n, block,
                (double)got.scale, (double)expected.scale, got.error, expected.error);
        exit(1);
    }
    return 1;
}

static void *new_memory(size_t n) {
    void *memory = aligned_alloc(64, (convert_scratch(n) + 63) / 64 * 64);
    if (memory == NULL) exit(2);
    memset(memory, 0, convert_scratch(n));
    return memory;
}

static void draw_row(enum kind kind, int row, size_t n, size_t block) {
    for (size_t b = 0; b * block < n; b++) {
        scale[b] = kind == UNEVEN ? (float)exp2(8 * draw() - 20) : (float)(0.8 + 0.4 * draw());
    }
    if (kind == UNEVEN) scale[0] = 0x1p-12f;
    for (size_t i = 0; i < n; i++) x[i] = encode(weight(kind));
    if (row % 4 == 1) {
        for (size_t i = 0; i < block && i < n; i++) x[n - 1 - i] = 0;
    } else if (row % 4 == 2 && n > block) { /* zeros of both signs in a block whose scale says nothing */
        for (size_t i = 0; i < block; i++) x[i] = i % 3 ? 0 : 128;
        scale[0] = row % 8 == 2 ? 1e30f : 1e-38f;
    }
}

/* How many of 24 rows were taken by their magnitudes. */
static int check(enum kind kind, size_t n, size_t block) {
    void *memory = new_memory(n);
    int taken = 0;
    for (int row = 0; row < 24; row++) {
        float best;
        draw_row(kind, row, n, block);
        taken += compare(names[kind], n, block, memory, &best);
    }
    convert_release(memory);
    free(memory);
    return taken;
}

static float ulps_from(float value, int count) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits += count;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rows with one block's scale such that one of its magnitudes is within some ulp of a threshold of the best scale, or at a
 * tenth of a per cent or so from it, where the search may have its window's ends. How many were taken. */
static int check_thresholds(int rows) {
    enum { N = 512, BLOCK = 128 };
    void *memory = new_memory(N);
    int taken = 0;
    for (int row = 0; row < rows; row++) {
        float best;
        draw_row(NORMAL, 0, N, BLOCK);
        compare("thresholds", N, BLOCK, memory, &best);
        const size_t b = (size_t)(row % (N / BLOCK));
        const uint8_t magnitude = x[b * BLOCK + (size_t)(draw() * BLOCK)] & 127;
        for (int turn = 0; turn < 4; turn++) { /* the best scale moves with the block's */
            const double h = (double)best / 2, codes = (double)fp8_magnitudes[magnitude] * (double)scale[b] / (2 * h);
            const int m = codes < 0.5 ? 1 : codes > 7.5 ? 8 : (int)(codes + 1);
            if (magnitude < 60) break;
            const float at = (float)((2 * m - 1) * h / (double)fp8_magnitudes[magnitude]);
            scale[b] = at;
            compare("thresholds", N, BLOCK, memory, &best);
            for (int near = -24; near <= 24; near += 3) {
                float other;
                scale[b] = ulps_from(at, near);
                taken += compare("thresholds", N, BLOCK, memory, &other);
                scale[b] = at * (1 + (float)near * 0x1p-12f);
                taken += compare("thresholds", N, BLOCK, memory, &other);
            }
            scale[b] = at;
        }
    }
    convert_release(memory);
    free(memory);
    return taken;
}

/* Where a magnitude is so near the threshold above the window that two ways to round take it for different codes. */
static void check_window_end(void) {
    static const char *const row =
        "e86af970e567706b42716565df6455e5e272686c5170e82aea5bdcf1e86ef57616caece8f1c26e4cebeeddebe2ed676c"
        "e9eb68654e734771f0e2566c73657a66f1c1e2f150f0646ee4646c6360e5e962ddf1656d686cd1f1e8d2c86372f075dd"
        "e4dd6f6d6973646aeff15be6d170eae766716aed67f4f0ea5d6dacf05868ec70";
    for (int i = 0; i < 128; i++) {
        unsigned byte;
        if (sscanf(row + 2 * i, "%2x", &byte) != 1) exit(2);
        x[i] = (uint8_t)byte;
    }
    for (int32_t bits = 0x3f95b700; bits < 0x3f95b750; bits++) {
        float best;
        void *memory = new_memory(128);
        memcpy(scale, &bits, sizeof bits);
        if (!compare("window's end", 128, 128, memory, &best)) exit(2);
        convert_release(memory);
        free(memory);
    }
}

/* A block of the least magnitudes only, below the first that a table may begin at. */
static void check_low_block(void) {
    void *memory = new_memory(1024);
    float best;
    for (int i = 0; i < 1024; i++) x[i] = i < 960 ? encode((i % 64 - 31.5) * 3) : i % 2 ? 0x81 : 0x01;
    for (int b = 0; b < 16; b++) scale[b] = b < 15 ? 1 : 405.725342f;
    if (!compare("low block", 1024, 64, memory, &best)) exit(2);
    convert_release(memory);
    free(memory);
}

int main(void) {
    static const size_t shapes[][2] = {{2048, 128}, {4096, 128}, {1000, 100}, {333, 64}, {700, 256}, {64, 64}};
    check_window_end();
    check_low_block();
    for (int kind = 0; kind < KINDS; kind++) {
        int taken = 0, all = 0;
        for (size_t shape = 0; shape < sizeof shapes / sizeof *shapes; shape++, all += 24) {
            taken += check((enum kind)kind, shapes[shape][0], shapes[shape][1]);
        }
        printf("%s %d of %d\n", names[kind], taken, all);
    }
    printf("thresholds %d\n", check_thresholds(60));
    return 0;
}
