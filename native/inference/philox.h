/* Random numbers of a draw: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the stream of
 * numpy.random.Philox. Token id has word id % 4 of the counter value (id / 4 + 1, 0, 0, position). */
#ifndef NPUQ_INFERENCE_PHILOX_H
#define NPUQ_INFERENCE_PHILOX_H

#include <stdint.h>

enum { PHILOX_WORDS = 4, PHILOX_ROUNDS = 10 };

static inline void philox(uint64_t block, uint64_t position, uint64_t seed, uint64_t choice, uint64_t out[PHILOX_WORDS]) {
    uint64_t a = block + 1, b = 0, c = 0, d = position;
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        const unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93u * a;
        const unsigned __int128 second = (unsigned __int128)0xCA5A826395121157u * c;
        a = (uint64_t)(second >> 64) ^ b ^ seed;
        b = (uint64_t)second;
        c = (uint64_t)(first >> 64) ^ d ^ choice;
        d = (uint64_t)first;
        seed += 0x9E3779B97F4A7C15u;
        choice += 0xBB67AE8584CAA73Bu;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

#endif
