/* Packs two rows of int4 codes into one of bytes, and sums them for scale_bias. */
#ifndef NPUQ_CONVERT_INT4_PACK_H
#define NPUQ_CONVERT_INT4_PACK_H

#include "common/vectors_int16.h"

/* Codes in a vector. */
enum { PACK_STEP = 2 * PLANE_STEP };

/* From `+ PACK_STEP − count` on, the first `count` bytes are kept. */
static const uint8_t pack_kept[2 * PACK_STEP] = {
#define EIGHT 255, 255, 255, 255, 255, 255, 255, 255
#if defined(NPUQ_LEVEL_AVX512)
    EIGHT, EIGHT, EIGHT, EIGHT,
#endif
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
    EIGHT, EIGHT,
#endif
    EIGHT, EIGHT,
#undef EIGHT
};

/* Σ of bytes without a sign, below 128. */
INLINE vl vs_sum_bytes(vl acc, vs bytes) {
#if defined(NPUQ_LEVEL_AVX512)
    return _mm512_add_epi64(acc, _mm512_sad_epu8((__m512i)bytes, _mm512_setzero_si512()));
#elif defined(NPUQ_LEVEL_AVX2)
    return _mm256_add_epi64(acc, _mm256_sad_epu8((__m256i)bytes, _mm256_setzero_si256()));
#else
    return vl_add(acc, vs_dot((vi){0}, (bytes & 255) + (bytes >> 8), vs_set(1)));
#endif
}

/* Packs a vector of codes of each row and adds up what is `kept` of them. */
INLINE void pack_step(const int8_t *even, const int8_t *odd, vs kept, int8_t *out, vl sums[2]) {
    const vs low = vs_load((const int16_t *)even), high = vs_load((const int16_t *)odd), nibble = vs_set(0x0F0F);
    /* code + 8 is a nibble with its sign flipped */
    sums[0] = vs_sum_bytes(sums[0], (low ^ vs_set(0x0808)) & (nibble & kept));
    sums[1] = vs_sum_bytes(sums[1], (high ^ vs_set(0x0808)) & (nibble & kept));
    const vs packed = (low & nibble) | ((high << 4) & ~nibble);
    memcpy(out, &packed, sizeof packed);
}

static void pack_rows(const int8_t *even, const int8_t *odd, size_t n, size_t columns, int8_t *out, int32_t *sums) {
    const size_t slice = n / columns;
    for (size_t c = 0; c < columns; c++) {
        size_t i = slice * c;
        const size_t end = i + slice, rest = slice % PACK_STEP;
        const vs kept = vs_load((const int16_t *)(pack_kept + PACK_STEP - rest));
        vl sum[2] = {{0}, {0}};
        for (; i + PACK_STEP <= end; i += PACK_STEP) pack_step(even + i, odd + i, vs_set(-1), out + i, sum);
        if (rest > 0 && i + PACK_STEP <= n) { /* what follows is packed again, to the same */
            pack_step(even + i, odd + i, kept, out + i, sum);
        } else if (rest > 0) {
            int8_t lane[3][PACK_STEP] = {{0}};
            memcpy(lane[0], even + i, rest);
            memcpy(lane[1], odd + i, rest);
            pack_step(lane[0], lane[1], kept, lane[2], sum);
            memcpy(out + i, lane[2], rest);
        }
        for (size_t row = 0; row < 2; row++) sums[row * columns + c] = (int32_t)vl_total(sum[row]) - 8 * (int32_t)slice;
    }
}

#endif
