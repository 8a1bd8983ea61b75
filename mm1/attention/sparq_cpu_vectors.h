#pragma once
// Vectors of floats for sparq_cpu.cpp: loads and stores of float32 and bfloat16, sums and maxima across lanes, 2^x, integers in
// the order of floats, and the k-th largest of them. AVX-512, AVX2, or (-DPORTABLE, and other machines) the compiler's vectors.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__) && !defined(PORTABLE)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && !defined(PORTABLE)
constexpr int LANES = 16;
#elif defined(__AVX2__) && !defined(PORTABLE)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct bf16 {
    uint16_t bits;
};



inline Vec load(const float *p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const bf16 *p) {
#if defined(__AVX512F__) && !defined(PORTABLE)  // which gcc makes of the general form in two halves
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#endif
    typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
    Half h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Ints) << 16);
}

template <class T> inline Vec load(const T *p, int64_t n) {  // n < LANES values, then zeros: what lies behind is not read
    T part[LANES] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load(part);
}

inline void store(float *p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec all(float x) { return x - Vec{}; }

inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

inline void put(float *p, float x) { *p = x; }
inline void put(bf16 *p, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The lanes in order, from lane BY on and round.
template <int BY, int... I> inline Vec turned(Vec v, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(v, v, (I + BY) % LANES...);
#else
    return __builtin_shuffle(v, Ints{(I + BY) % LANES...});
#endif
}

// f(f(lane, lane), ...) of all lanes, for an f whose order does not matter.
template <int HALF = LANES / 2, class F> inline float across(Vec v, F f) {
    if constexpr (HALF == 0)
        return v[0];
    else
        return across<HALF / 2>(f(v, turned<HALF>(v, std::make_integer_sequence<int, LANES>{})), f);
}

inline float sum(Vec v) {
    return across(v, [](Vec a, Vec b) { return a + b; });
}

inline float most(Vec v) {
    return across(v, [](Vec a, Vec b) { return a > b ? a : b; });
}

// 2^x for x <= 0, relative error below 2e-7; below -126 it stays 2^-126.
inline Vec exp2(Vec x) {
    const float magic = 12582912;  // 1.5 x 2^23: adding it rounds to an integer, in the low bits
    x = x < -126.0f ? all(-126.0f) : x;
    Vec shifted = x + magic;
    Vec f = x - (shifted - magic);
    Vec y = f * 1.52527338e-5f + 1.54035304e-4f;  // ln(2)^n / n!
    y = y * f + 1.33335581e-3f;
    y = y * f + 9.61812911e-3f;
    y = y * f + 5.55041087e-2f;
    y = y * f + 2.40226507e-1f;
    y = y * f + 6.93147181e-1f;
    y = y * f + 1.0f;
    return y * (Vec)(((Ints)shifted << 23) + (127 << 23));  // magic's own low bits are zero
}

// Bit i: p[i] >= bound.
inline uint32_t at_least(const int32_t *p, int32_t bound) {
#if defined(__AVX512F__) && !defined(PORTABLE)
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(bound));
#elif defined(__AVX2__) && !defined(PORTABLE)
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), _mm256_loadu_si256((const __m256i *)p));
    return ~_mm256_movemask_ps(_mm256_castsi256_ps(below)) & 0xff;
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++)
        bits |= (uint32_t)(p[i] >= bound) << i;
    return bits;
#endif
}

// Integers in the order of the floats.
inline Ints ordered(Vec v) { return (Ints)v ^ ((Ints)v >> 31 & INT32_MAX); }

// The k-th largest of n values, 1 <= k <= n, by their digits from the top. Uses up a.
int32_t kth_largest(int32_t *a, int64_t n, int64_t k) {
    static constexpr int SHIFTS[] = {21, 10, 0}, DIGITS = 2048;
    int32_t counts[DIGITS];
    for (int shift : SHIFTS) {
        auto digit = [shift](int32_t x) { return ((uint32_t)x ^ 0x80000000u) >> shift & (DIGITS - 1); };
        std::memset(counts, 0, sizeof counts);
        for (int64_t i = 0; i < n; i++)
            counts[digit(a[i])]++;
        uint32_t chosen = DIGITS - 1;
        for (; counts[chosen] < k; chosen--)
            k -= counts[chosen];
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t x = a[i];
            a[kept] = x;
            kept += digit(x) == chosen;
        }
        n = kept;
    }
    return a[0];
}

}  // namespace
