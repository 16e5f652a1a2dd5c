/* The levels in this library, and those that this CPU can run. */
#include "common/levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

extern const struct kernels kernels_portable;
#if defined(__x86_64__)
extern const struct kernels kernels_avx2, kernels_avx512vnni, kernels_avx512bf16;
#elif defined(__aarch64__)
extern const struct kernels kernels_neon_dotprod, kernels_neon_i8mm;
#endif

static const struct kernels *const levels[] = {
    &kernels_portable,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx512vnni,
#if !defined(NPUQ_WITHOUT_AVX512BF16) /* the compiler is too old for it */
    &kernels_avx512bf16,
#endif
#elif defined(__aarch64__)
    &kernels_neon_dotprod,
    &kernels_neon_i8mm,
#endif
};

enum { LEVELS = sizeof levels / sizeof *levels };

#if defined(__x86_64__)
/* CPUID and XGETBV (Intel SDM, volume 1, 13.3 and volume 2, CPUID): not every compiler's run-time library fills the
 * tables behind __builtin_cpu_supports. */
struct cpu {
    unsigned ecx1, ebx7, ecx7; /* of leaves 1 and 7 */
    unsigned eax7_1;           /* of leaf 7's part 1 */
    unsigned saved;            /* registers that the operating system saves: bits of XCR0 */
};

static struct cpu read_cpu(void) {
    struct cpu cpu = {0};
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) cpu.ecx1 = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        cpu.ebx7 = b, cpu.ecx7 = c;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.eax7_1 = a; /* part 0 has the number of parts */
    }
    if (cpu.ecx1 >> 27 & 1) { /* OSXSAVE */
        __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        cpu.saved = a;
    }
    return cpu;
}

static int has(unsigned word, unsigned bits) { return (word & bits) == bits; }

static int has_avx(struct cpu cpu) {
    enum { AVX = 1u << 28, XMM_YMM = 0x6 };
    return has(cpu.saved, XMM_YMM) && has(cpu.ecx1, AVX);
}

#if !defined(NPUQ_EVERY_LEVEL)
static int has_avx2(struct cpu cpu) {
    enum { FMA = 1u << 12, F16C = 1u << 29, AVX2 = 1u << 5 };
    return has_avx(cpu) && has(cpu.ecx1, FMA | F16C) && has(cpu.ebx7, AVX2);
}

static int has_avx512vnni(struct cpu cpu) {
    enum { VNNI = 1u << 11, MASKS_AND_ZMM = 0xe0 };
    const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    return has_avx2(cpu) && has(cpu.saved, MASKS_AND_ZMM) && has(cpu.ebx7, f_dq_bw_vl) && has(cpu.ecx7, VNNI);
}

static int has_avx512bf16(struct cpu cpu) {
    enum { BF16 = 1u << 5, VBMI = 1u << 1 }; /* every CPU with AMX or of AMD's has both; Cooper Lake has no VBMI */
    return has_avx512vnni(cpu) && has(cpu.eax7_1, BF16) && has(cpu.ecx7, VBMI);
}
#endif

int level_has_avx(void) {
    enum { UNKNOWN, NO, YES };
    static _Atomic int known; /* under a hypervisor each CPUID takes a microsecond or more */
    if (known == UNKNOWN) known = has_avx(read_cpu()) ? YES : NO;
    return known == YES;
}
#endif

int npuq_abi_version(void) { return NPUQ_ABI_VERSION; }

int npuq_level_count(void) { return LEVELS; }

const char *npuq_level_name(int level) { return level >= 0 && level < LEVELS ? levels[level]->name : NULL; }

int npuq_level_usable(int level) {
#if defined(NPUQ_EVERY_LEVEL) /* tests, with the instructions of a level emulated */
    return level >= 0 && level < LEVELS;
#elif defined(__x86_64__)
    if (level == 1) return has_avx2(read_cpu());
    if (level == 2) return has_avx512vnni(read_cpu());
    if (level == 3 && level < LEVELS) return has_avx512bf16(read_cpu());
#elif defined(__aarch64__)
    enum { ASIMDDP = 1 << 20, I8MM = 1 << 13 }; /* of the Linux ABI's HWCAP and HWCAP2; older headers lack the names */
    int dotprod = (getauxval(AT_HWCAP) & ASIMDDP) != 0;
    if (level == 1) return dotprod;
    if (level == 2) return dotprod && (getauxval(AT_HWCAP2) & I8MM) != 0;
#endif
    return level == 0;
}

int npuq_sha256_usable(void) {
#if defined(NPUQ_EVERY_LEVEL)
    return 1;
#elif defined(__x86_64__)
    enum { SSE41 = 1u << 19, SHA = 1u << 29 };
    struct cpu cpu = read_cpu();
    return has(cpu.ecx1, SSE41) && has(cpu.ebx7, SHA);
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
