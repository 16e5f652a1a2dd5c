/* The levels in this library, and those that this CPU can run. */
#include "common/levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

extern const struct kernels kernels_portable;
#if defined(__x86_64__)
extern const struct kernels kernels_avx2, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const struct kernels kernels_neon_dotprod, kernels_neon_i8mm;
#endif

static const struct kernels *const levels[] = {
    &kernels_portable,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx512vnni,
#elif defined(__aarch64__)
    &kernels_neon_dotprod,
    &kernels_neon_i8mm,
#endif
};

enum { LEVELS = sizeof levels / sizeof *levels };

int npuq_abi_version(void) { return NPUQ_ABI_VERSION; }

int npuq_level_count(void) { return LEVELS; }

const char *npuq_level_name(int level) { return level >= 0 && level < LEVELS ? levels[level]->name : NULL; }

int npuq_level_usable(int level) {
#if defined(__x86_64__)
    /* The compiler's run-time check also asks the operating system (XGETBV) whether it saves the wide registers. */
    __builtin_cpu_init();
    if (level == 1) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    }
    if (level == 2) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
               __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    }
#elif defined(__aarch64__)
    enum { ASIMDDP = 1 << 20, I8MM = 1 << 13 }; /* of the Linux ABI's HWCAP and HWCAP2; older headers lack the names */
    int dotprod = (getauxval(AT_HWCAP) & ASIMDDP) != 0;
    if (level == 1) return dotprod;
    if (level == 2) return dotprod && (getauxval(AT_HWCAP2) & I8MM) != 0;
#endif
    return level == 0;
}

int npuq_sha256_usable(void) {
#if defined(__x86_64__)
    /* Older compilers lack its name in their run-time check: leaf 7, bit 29 of EBX. */
    unsigned a, b, c, d;
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
#elif defined(__aarch64__)
    enum { SHA2 = 1 << 6 };
    return (getauxval(AT_HWCAP) & SHA2) != 0;
#else
    return 0;
#endif
}

int level_best(void) {
    int best = LEVELS - 1;
    while (!npuq_level_usable(best)) best--;
    return best;
}

const struct kernels *level_kernels(int level) { return levels[level]; }
