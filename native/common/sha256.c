/* SHA-256 of one stream, or of two at once, by the SHA instructions of x86 (SHA-NI) and Armv8 (SHA2).
 *
 * Each round waits for the one before, and an instruction has a latency of four cycles, in which two could begin: any
 * implementation of one stream leaves half of the unit idle. Two independent streams fill it. setup.py compiles this file
 * with the flags of those instructions; `npuq_sha256_usable` (levels.c) is the only function that may run without them.
 * There is no portable form: OpenSSL's is as fast as one stream can be.
 */
#include "common/levels.h"
#include "npuq.h"

#if defined(__x86_64__) || defined(__aarch64__)
#include <string.h>

enum { BLOCK = 64, QUARTERS = 4 };

static const uint32_t constants[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

/* A stream in registers: its state in the order that the instructions want, and the last 16 words of the schedule in
 * four quarters, of which the oldest is replaced by the next. */
#if defined(__x86_64__)
#include <immintrin.h>

struct lane {
    __m128i abef, cdgh, words[QUARTERS];
};

static inline void load_state(struct lane *lane, const uint32_t *state) {
    __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
    __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
    lane->abef = _mm_alignr_epi8(cdab, efgh, 8);
    lane->cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
}

static inline void store_state(const struct lane *lane, uint32_t *state) {
    __m128i feba = _mm_shuffle_epi32(lane->abef, 0x1B), dchg = _mm_shuffle_epi32(lane->cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

static inline void add_state(struct lane *lane, const struct lane *before) {
    lane->abef = _mm_add_epi32(lane->abef, before->abef);
    lane->cdgh = _mm_add_epi32(lane->cdgh, before->cdgh);
}

static inline void read_words(struct lane *lane, int quarter, const uint8_t *data) {
    const __m128i swap = _mm_set_epi64x(0x0C0D0E0F08090A0B, 0x0405060700010203);
    lane->words[quarter] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)data), swap);
}

static inline void next_words(struct lane *lane, int quarter) {
    __m128i last = lane->words[(quarter + 3) % QUARTERS];
    __m128i sum = _mm_sha256msg1_epu32(lane->words[quarter], lane->words[(quarter + 1) % QUARTERS]);
    sum = _mm_add_epi32(sum, _mm_alignr_epi8(last, lane->words[(quarter + 2) % QUARTERS], 4));
    lane->words[quarter] = _mm_sha256msg2_epu32(sum, last);
}

static inline void four_rounds(struct lane *lane, int quarter, const uint32_t *constant) {
    __m128i sum = _mm_add_epi32(lane->words[quarter], _mm_load_si128((const __m128i *)constant));
    lane->cdgh = _mm_sha256rnds2_epu32(lane->cdgh, lane->abef, sum);
    lane->abef = _mm_sha256rnds2_epu32(lane->abef, lane->cdgh, _mm_shuffle_epi32(sum, 0x0E));
}

/* A caller should not leave the upper halves of wide registers in use; where one did, each instruction here would wait
 * for them. */
static inline void clean_registers(void) {
    if (level_has_avx()) __asm__ volatile("vzeroupper");
}
#else
#include <arm_neon.h>

struct lane {
    uint32x4_t abcd, efgh, words[QUARTERS];
};

static inline void load_state(struct lane *lane, const uint32_t *state) {
    lane->abcd = vld1q_u32(state);
    lane->efgh = vld1q_u32(state + 4);
}

static inline void store_state(const struct lane *lane, uint32_t *state) {
    vst1q_u32(state, lane->abcd);
    vst1q_u32(state + 4, lane->efgh);
}

static inline void add_state(struct lane *lane, const struct lane *before) {
    lane->abcd = vaddq_u32(lane->abcd, before->abcd);
    lane->efgh = vaddq_u32(lane->efgh, before->efgh);
}

static inline void read_words(struct lane *lane, int quarter, const uint8_t *data) {
    lane->words[quarter] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data)));
}

static inline void next_words(struct lane *lane, int quarter) {
    uint32x4_t sum = vsha256su0q_u32(lane->words[quarter], lane->words[(quarter + 1) % QUARTERS]);
    lane->words[quarter] =
        vsha256su1q_u32(sum, lane->words[(quarter + 2) % QUARTERS], lane->words[(quarter + 3) % QUARTERS]);
}

static inline void four_rounds(struct lane *lane, int quarter, const uint32_t *constant) {
    uint32x4_t sum = vaddq_u32(lane->words[quarter], vld1q_u32(constant)), abcd = lane->abcd;
    lane->abcd = vsha256hq_u32(abcd, lane->efgh, sum);
    lane->efgh = vsha256h2q_u32(lane->efgh, abcd, sum);
}

static inline void clean_registers(void) {}
#endif

static inline void step(struct lane *lane, int group, const uint8_t *block) {
    if (group < QUARTERS) {
        read_words(lane, group, block + 16 * group);
    } else {
        next_words(lane, group % QUARTERS);
    }
    four_rounds(lane, group % QUARTERS, constants + 4 * group);
}

static void hash_blocks(uint32_t *state, const uint8_t *data, size_t blocks) {
    struct lane lane;
    load_state(&lane, state);
    for (; blocks; blocks--, data += BLOCK) {
        struct lane before = lane;
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) step(&lane, group, data);
        add_state(&lane, &before);
    }
    store_state(&lane, state);
}

static void hash_blocks_of_two(uint32_t *const state[2], const uint8_t *const data[2], size_t blocks) {
    const uint8_t *x = data[0], *y = data[1];
    struct lane a, b;
    load_state(&a, state[0]);
    load_state(&b, state[1]);
    for (; blocks; blocks--, x += BLOCK, y += BLOCK) {
        struct lane a_before = a, b_before = b;
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            step(&a, group, x);
            step(&b, group, y);
        }
        add_state(&a, &a_before);
        add_state(&b, &b_before);
    }
    store_state(&a, state[0]);
    store_state(&b, state[1]);
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Fill the waiting block, and hash it once it is full; returns the number of bytes taken. */
static size_t fill(npuq_sha256 *stream, const uint8_t *data, size_t n) {
    size_t have = stream->nbytes % BLOCK, taken = have ? least(n, BLOCK - have) : 0;
    if (taken == 0) return 0;
    memcpy(stream->waiting + have, data, taken);
    stream->nbytes += taken;
    if (have + taken == BLOCK) hash_blocks(stream->state, stream->waiting, 1);
    return taken;
}

static void keep(npuq_sha256 *stream, const uint8_t *data, size_t n) {
    if (n) memcpy(stream->waiting, data, n);
    stream->nbytes += n;
}

void npuq_sha256_begin(npuq_sha256 *stream) {
    memset(stream, 0, sizeof *stream);
    memcpy(stream->state, initial, sizeof initial);
}

void npuq_sha256_add(npuq_sha256 *stream, const void *data, int64_t n) {
    clean_registers();
    const uint8_t *bytes = data;
    size_t left = (size_t)n, filled = fill(stream, bytes, left), blocks = (left - filled) / BLOCK;
    if (blocks) hash_blocks(stream->state, bytes + filled, blocks);
    stream->nbytes += blocks * BLOCK;
    filled += blocks * BLOCK;
    keep(stream, bytes + filled, left - filled);
}

void npuq_sha256_add_two(npuq_sha256 *const stream[2], const void *const data[2], const int64_t n[2]) {
    const uint8_t *bytes[2];
    size_t left[2];
    clean_registers();
    for (int i = 0; i < 2; i++) {
        size_t filled = fill(stream[i], data[i], (size_t)n[i]);
        bytes[i] = (const uint8_t *)data[i] + filled;
        left[i] = (size_t)n[i] - filled;
    }
    size_t blocks = least(left[0] / BLOCK, left[1] / BLOCK);
    hash_blocks_of_two((uint32_t *const[2]){stream[0]->state, stream[1]->state}, bytes, blocks);
    for (int i = 0; i < 2; i++) {
        stream[i]->nbytes += blocks * BLOCK;
        npuq_sha256_add(stream[i], bytes[i] + blocks * BLOCK, (int64_t)(left[i] - blocks * BLOCK));
    }
}

void npuq_sha256_end(const npuq_sha256 *stream, uint8_t *digest) {
    npuq_sha256 last = *stream;
    static const uint8_t padding[BLOCK] = {0x80};
    uint8_t bits[8];
    for (int i = 0; i < 8; i++) bits[i] = (uint8_t)(stream->nbytes * 8 >> (56 - 8 * i));
    size_t have = stream->nbytes % BLOCK;
    npuq_sha256_add(&last, padding, (int64_t)(have < 56 ? 56 - have : 120 - have));
    npuq_sha256_add(&last, bits, sizeof bits);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(last.state[i / 4] >> (24 - 8 * (i % 4)));
}
#endif
