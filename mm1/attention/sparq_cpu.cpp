// One decoding step of SparQ attention on the CPU, or of dense attention. The method is sparq.py's; see sparq_cpu.py.
//
//     score   r rows of K^T, a block of slots at a time --> p = exp2(logit - the block's maximum), for each head of the group
//     rank    blocks are brought to one maximum and summed over the group --> integers in the order of the ranks
//     select  bound from group maxima --> the few candidates above it --> radix threshold --> indices, ascending
//     attend  the selected rows of K and V, softmax, reallocation to the mean of V
//
// A unit is one (row of the batch, KV head). Threads take whole units, so that its 4 g S bytes of p stay in their cache; what does
// not divide among them is split over blocks of slots. Blocks do not depend on the number of threads, and so no bit does.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) && !defined(PORTABLE)
#include <immintrin.h>
#endif

struct Job {  // as sparq_cpu.py packs it; strides count elements
    const void *q, *keys, *keys_t, *values;
    const float *mean;
    void *out;
    const int64_t *start, *stop;
    int64_t rows, kv_heads, group, d, r, k, local, reallocate, rank_logits;
    int64_t q_row, q_head, keys_row, keys_head, keys_slot, keys_t_row, keys_t_head, keys_t_channel;
    int64_t values_row, values_head, values_slot, mean_row, mean_head, threads;
    int64_t dense_up_to;  // slots: shorter rows are left out
    int64_t dense;        // attend to all slots
    double scale;
};

namespace {

#if defined(__AVX512F__) && !defined(PORTABLE)
constexpr int LANES = 16;
#elif defined(__AVX2__) && !defined(PORTABLE)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int64_t BLOCK = 1024;   // slots: the logits of four heads and four channels of K^T fit the L1 cache together
constexpr int CHANNELS = 4;       // read at once: their queries stay in registers
constexpr int HEADS = 4;          // of a group at once
constexpr int AHEAD = 8;          // selected rows of K that are being fetched
constexpr int64_t SKEW = 80;      // floats between rows of scratch memory, whose lines would else fall into the same few sets of L1
constexpr int32_t LEAST = INT32_MIN;
constexpr float LOG2E = 1.44269504088896340736f;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct bf16 {
    uint16_t bits;
};

// ---- Vectors ---------------------------------------------------------------------------------------------------------------

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

// ---- A unit ----------------------------------------------------------------------------------------------------------------

struct Memory {  // hands out aligned pieces; with no base it only counts
    char *at;
    size_t used = 0;
    template <class T> T *take(int64_t count) {
        T *p = (T *)(at + used);
        used += (count * sizeof(T) + 63) / 64 * 64 + 64;
        return at ? p : nullptr;
    }
};

template <class T> struct Unit {
    const Job *job;
    const T *q, *keys, *keys_t, *values;
    const float *mean;
    T *out;
    int64_t n, blocks, stride, k, local, spread;  // spread: vectors of slots a group maximum is taken over; 1: none is taken
    float *p, *peaks, *sums, *factors, *queries, *tau, *weights, *padded;
    int32_t *ranks, *maxima, *at, *rank_at, *selected;
    int64_t *channels;

    void lay_out(Memory &memory, const Job &j, int64_t longest) {
        const int64_t g = j.group, b = j.dense ? 0 : (longest + BLOCK - 1) / BLOCK, padded_n = b * BLOCK;
        const int64_t most_k = j.dense ? longest : j.k;
        const int64_t r4 = (j.r + CHANNELS - 1) / CHANNELS * CHANNELS;
        p = memory.take<float>(g * (padded_n + SKEW));
        peaks = memory.take<float>(g * b), sums = memory.take<float>(g * b), factors = memory.take<float>(g * b);
        queries = memory.take<float>(g * r4), tau = memory.take<float>(g), weights = memory.take<float>(g * most_k);
        padded = memory.take<float>(g * (j.d + LANES));
        ranks = memory.take<int32_t>(padded_n), maxima = memory.take<int32_t>(padded_n);
        at = memory.take<int32_t>(padded_n), rank_at = memory.take<int32_t>(padded_n), selected = memory.take<int32_t>(most_k);
        channels = memory.take<int64_t>(std::max(r4, j.d));
    }

    void begin(const Job &j, int64_t number) {
        const int64_t row = number / j.kv_heads, head = number % j.kv_heads, first = j.start[row];
        job = &j;
        q = (const T *)j.q + row * j.q_row + head * j.group * j.q_head;
        keys = (const T *)j.keys + row * j.keys_row + head * j.keys_head + first * j.keys_slot;
        keys_t = (const T *)j.keys_t + row * j.keys_t_row + head * j.keys_t_head + first;
        values = (const T *)j.values + row * j.values_row + head * j.values_head + first * j.values_slot;
        mean = j.mean + row * j.mean_row + head * j.mean_head;
        out = (T *)j.out + number * j.group * j.d;
        n = j.stop[row] - first;
        k = j.dense ? n : j.k, local = j.local;
        blocks = !j.dense && n > j.dense_up_to ? (n + BLOCK - 1) / BLOCK : 0;
        stride = blocks * BLOCK + SKEW;
        for (spread = BLOCK / LANES; spread > 1 && n / spread < 4 * k; spread /= 2)
            ;
        if (blocks)
            pick_channels();
    }

    // The r channels with the largest |q| summed over the group; queries[channel][head] hold q / tau in units of log 2.
    void pick_channels() {
        const Job &j = *job;
        float *size = padded;  // not in use yet
        for (int64_t c = 0; c < j.d; c++) {
            size[c] = 0;
            for (int64_t h = 0; h < j.group; h++)
                size[c] += std::fabs(value(q[h * j.q_head + c]));
            channels[c] = c;
        }
        auto before = [size](int64_t a, int64_t b) { return size[a] != size[b] ? size[a] > size[b] : a < b; };
        std::nth_element(channels, channels + j.r - 1, channels + j.d, before);
        std::sort(channels, channels + j.r);
        for (int64_t h = 0; h < j.group; h++) {
            float whole = 0, part = 0;
            for (int64_t c = 0; c < j.d; c++)
                whole += std::fabs(value(q[h * j.q_head + c]));
            for (int64_t c = 0; c < j.r; c++)
                part += std::fabs(value(q[h * j.q_head + channels[c]]));
            const float sharpness = whole > 0 ? (float)j.scale / std::sqrt(part / whole) : 0.0f;
            for (int64_t c = 0; c < j.r; c++)
                queries[c * j.group + h] = part > 0 ? value(q[h * j.q_head + channels[c]]) * sharpness * LOG2E : 0.0f;
        }
        for (int64_t c = j.r; c % CHANNELS; c++) {  // the last ones again, with weight 0
            channels[c] = channels[j.r - 1];
            std::fill_n(queries + c * j.group, j.group, 0.0f);
        }
    }

    // logits = or += CHANNELS rows of K^T times their queries, for G heads.
    template <int G, bool FIRST> static void multiply(const T *const *in, const T *const *next, const float *queries, int64_t group,
                                                      int64_t slots, float *logits) {
        Vec weight[CHANNELS][G];
        const T *row[CHANNELS], *soon[CHANNELS];  // copies, which no store to the logits can alias
        for (int c = 0; c < CHANNELS; c++) {
            row[c] = in[c], soon[c] = next[c];
            for (int h = 0; h < G; h++)
                weight[c][h] = all(queries[c * group + h]);
        }
        auto step = [&](int64_t s, const Vec *x) {
            for (int h = 0; h < G; h++) {
                Vec y = FIRST ? x[0] * weight[0][h] : x[0] * weight[0][h] + load(logits + h * (BLOCK + SKEW) + s);
                for (int c = 1; c < CHANNELS; c++)
                    y += x[c] * weight[c][h];
                store(logits + h * (BLOCK + SKEW) + s, y);
            }
        };
        constexpr int64_t LINE = std::max<int64_t>(LANES, 64 / sizeof(T));
        int64_t s = 0;
        for (; s + LINE <= slots; s += LINE) {
            for (int c = 0; c < CHANNELS; c++)
                __builtin_prefetch(soon[c] + s);
            for (int64_t i = 0; i < LINE; i += LANES) {
                Vec x[CHANNELS];
                for (int c = 0; c < CHANNELS; c++)
                    x[c] = load(row[c] + s + i);
                step(s + i, x);
            }
        }
        for (; s < slots; s += LANES) {
            Vec x[CHANNELS];
            for (int c = 0; c < CHANNELS; c++)
                x[c] = s + LANES <= slots ? load(row[c] + s) : load(row[c] + s, slots - s);
            step(s, x);
        }
    }

    template <bool FIRST> static void multiply(const T *const *in, const T *const *next, const float *queries, int64_t group,
                                               int64_t slots, float *logits) {
        for (int64_t h = 0; h < group; h += HEADS) {
            float *to = logits + h * (BLOCK + SKEW);
            switch (std::min<int64_t>(HEADS, group - h)) {
            case 1: multiply<1, FIRST>(in, next, queries + h, group, slots, to); break;
            case 2: multiply<2, FIRST>(in, next, queries + h, group, slots, to); break;
            case 3: multiply<3, FIRST>(in, next, queries + h, group, slots, to); break;
            default: multiply<4, FIRST>(in, next, queries + h, group, slots, to);
            }
        }
    }

    // p, its maximum and its sum over a block, by way of logits (group, BLOCK + SKEW): memory of the thread, not of the unit.
    void score(int64_t block, float *logits) {
        const Job &j = *job;
        const int64_t from = block * BLOCK, slots = std::min(BLOCK, n - from), group = j.group;
        for (int64_t c = 0; c < j.r; c += CHANNELS) {
            const bool last = c + CHANNELS >= j.r;
            const T *in[CHANNELS], *next[CHANNELS];
            for (int i = 0; i < CHANNELS; i++) {
                in[i] = keys_t + channels[c + i] * j.keys_t_channel + from;
                next[i] = keys_t + channels[last ? i : c + CHANNELS + i] * j.keys_t_channel + from + (last ? BLOCK : 0);
            }
            const float *w = queries + c * group;
            if (c == 0)
                multiply<true>(in, next, w, group, slots, logits);
            else
                multiply<false>(in, next, w, group, slots, logits);
        }
        if (j.rank_logits)
            for (int64_t s = 0; s < slots; s += LANES) {
                Vec total{};
                for (int64_t h = 0; h < group; h++)
                    total += load(logits + h * (BLOCK + SKEW) + s);
                Ints rank = ordered(total);
                std::memcpy(ranks + from + s, &rank, sizeof rank);
            }
        const int64_t end = (slots + LANES - 1) / LANES * LANES;
        for (int64_t h = 0; h < group; h++) {
            float *logit = logits + h * (BLOCK + SKEW), *to = p + h * stride + from;
            for (int64_t s = slots; s < end; s++)
                logit[s] = -INFINITY;
            Vec peak = all(-INFINITY), total{};
            for (int64_t s = 0; s < end; s += LANES) {
                Vec x = load(logit + s);
                peak = x > peak ? x : peak;
            }
            const float m = most(peak);
            for (int64_t s = 0; s < end; s += LANES) {
                Vec x = exp2(load(logit + s) - m);
                total += x;
                store(to + s, x);
            }
            peaks[h * blocks + block] = m;
            sums[h * blocks + block] = sum(total);
        }
    }

    // factors[head][block]: p times its factor is the softmax over all slots.
    void normalise() {
        if (!blocks)
            return;
        for (int64_t h = 0; h < job->group; h++) {
            const float *peak = peaks + h * blocks, m = *std::max_element(peak, peak + blocks);
            float total = 0;
            for (int64_t b = 0; b < blocks; b++)
                total += sums[h * blocks + b] * std::exp2(peak[b] - m);
            for (int64_t b = 0; b < blocks; b++)
                factors[h * blocks + b] = std::exp2(peak[b] - m) / total;
        }
    }

    // Ranks of a block, LEAST where the slot is local (it is taken anyway) or none, and the maxima of its groups.
    void rank(int64_t block) {
        const int64_t from = block * BLOCK, group = job->group, free = n - local;
        const int64_t slots = std::max<int64_t>(0, std::min(BLOCK, free - from));
        if (!job->rank_logits)
            for (int64_t s = 0; s < slots; s += LANES) {
                Vec total{};
                for (int64_t h = 0; h < group; h++)
                    total += load(p + h * stride + from + s) * factors[h * blocks + block];
                std::memcpy(ranks + from + s, &total, sizeof total);  // not negative: its bits are in order
            }
        std::fill(ranks + from + slots, ranks + from + BLOCK, LEAST);
        if (spread == 1)
            return;
        for (int64_t s = 0; s < BLOCK; s += spread * LANES) {
            Ints best;
            std::memcpy(&best, ranks + from + s, sizeof best);
            for (int64_t i = 1; i < spread; i++) {
                Ints x;
                std::memcpy(&x, ranks + from + s + i * LANES, sizeof x);
                best = x > best ? x : best;
            }
            std::memcpy(maxima + (from + s) / spread, &best, sizeof best);
        }
    }

    void select() {
        const int64_t free = n - local, wanted = k - local;
        int64_t count = 0;
        if (wanted) {
            // at least `wanted` ranks reach the bound, for as many groups have their maximum there, and hardly more do
            const int32_t bound = spread > 1 ? kth_largest(maxima, blocks * BLOCK / spread, wanted) : LEAST;
            int64_t candidates = 0;
            for (int64_t s = 0; s < free; s += LANES)
                for (uint32_t bits = at_least(ranks + s, bound); bits; bits &= bits - 1) {
                    const int64_t slot = s + __builtin_ctz(bits);
                    if (slot < free)
                        at[candidates] = (int32_t)slot, rank_at[candidates++] = ranks[slot];
                }
            std::copy(rank_at, rank_at + candidates, maxima);
            const int32_t threshold = kth_largest(maxima, candidates, wanted);
            int64_t ties = wanted;
            for (int64_t i = 0; i < candidates; i++)
                ties -= rank_at[i] > threshold;
            for (int64_t i = 0; i < candidates; i++)  // of equal ranks the first slots
                if (rank_at[i] > threshold || (rank_at[i] == threshold && ties-- > 0))
                    selected[count++] = at[i];
        }
        while (count < k)
            selected[count] = (int32_t)(free + count - wanted), count++;
    }

    template <int G> void attend(int64_t first) {
        const Job &j = *job;
        const int64_t d = j.d, whole = d / LANES * LANES;
        const float *query[G];
        float peak[G], total[G], share[G];
        for (int h = 0; h < G; h++) {
            float *copy = padded + h * (d + LANES);
            for (int64_t c = 0; c < d; c++)
                copy[c] = value(q[(first + h) * j.q_head + c]) * (float)j.scale * LOG2E;
            std::fill(copy + d, copy + d + LANES, 0.0f);
            query[h] = copy;
            peak[h] = -INFINITY, total[h] = 0, share[h] = 0;
        }
        for (int64_t i = 0; i < k; i++) {
            const T *row = keys + selected[i] * j.keys_slot;
            if (first == 0) {
                const T *soon = keys + selected[std::min(i + AHEAD, k - 1)] * j.keys_slot, *v = values + selected[i] * j.values_slot;
                for (int64_t c = 0; c < d; c += 64 / sizeof(T))
                    __builtin_prefetch(soon + c), __builtin_prefetch(v + c);
            }
            Vec dot[G] = {};
            for (int64_t c = 0; c < whole; c += LANES) {
                const Vec x = load(row + c);
                for (int h = 0; h < G; h++)
                    dot[h] += x * load(query[h] + c);
            }
            if (whole < d) {
                const Vec x = load(row + whole, d - whole);
                for (int h = 0; h < G; h++)
                    dot[h] += x * load(query[h] + whole);
            }
            for (int h = 0; h < G; h++) {
                const float logit = sum(dot[h]);
                weights[h * k + i] = logit;
                peak[h] = std::max(peak[h], logit);
            }
        }
        for (int h = 0; h < G; h++) {
            float *w = weights + h * k;
            for (int64_t i = 0; i < k; i += LANES) {
                const int64_t some = std::min<int64_t>(LANES, k - i);
                float part[LANES];
                for (int64_t l = 0; l < LANES; l++)
                    part[l] = l < some ? w[i + l] - peak[h] : 0.0f;
                store(part, exp2(load(part)));
                for (int64_t l = 0; l < some; l++)
                    total[h] += w[i + l] = part[l];
            }
            if (!j.reallocate) {
                share[h] = 1;
                continue;
            }
            const float *mass = p + (first + h) * stride, *factor = factors + (first + h) * blocks;
            for (int64_t i = 0; i < k; i++)
                share[h] += mass[selected[i]] * factor[selected[i] / BLOCK];
            share[h] = std::min(share[h], 1.0f);
        }
        int64_t c = 0;
        for (; c + 4 * LANES <= d; c += 4 * LANES)
            weigh<G, 4>(first, c, d, total, share);
        for (; c < d; c += LANES)
            weigh<G, 1>(first, c, d, total, share);
    }

    // N vectors of the output from channel c on.
    template <int G, int N> void weigh(int64_t first, int64_t c, int64_t d, const float *total, const float *share) {
        Vec y[G][N] = {};
        const int64_t width = std::min<int64_t>(N * LANES, d - c);
        for (int64_t i = 0; i < k; i++) {
            const T *row = values + selected[i] * job->values_slot + c;
            for (int v = 0; v < N; v++) {
                const Vec x = N > 1 || width == LANES ? load(row + v * LANES) : load(row, width);
                for (int h = 0; h < G; h++)
                    y[h][v] += x * weights[h * k + i];
            }
        }
        for (int h = 0; h < G; h++)
            for (int64_t i = 0; i < width; i++) {
                float x = y[h][i / LANES][i % LANES] * (share[h] / total[h]);
                if (share[h] < 1)
                    x += (1 - share[h]) * mean[c + i];
                put(out + (first + h) * d + c + i, x);
            }
    }

    void finish() {
        if (job->dense && n <= 0) {
            for (int64_t i = 0; i < job->group * job->d; i++)
                put(out + i, 0.0f);
            return;
        }
        if (job->dense)
            std::iota(selected, selected + n, 0);
        else if (blocks)
            select();
        else
            return;
        for (int64_t h = 0; h < job->group; h += HEADS)
            switch (std::min<int64_t>(HEADS, job->group - h)) {
            case 1: attend<1>(h); break;
            case 2: attend<2>(h); break;
            case 3: attend<3>(h); break;
            default: attend<4>(h);
            }
    }
};

// ---- Whole -----------------------------------------------------------------------------------------------------------------

struct Scratch {  // kept from call to call: fresh pages would cost more than the arithmetic
    char *base = nullptr;
    size_t size = 0;
    char *grow(size_t bytes) {
        if (bytes > size) {
            std::free(base);
            size = (bytes + 4095) / 4096 * 4096;
            base = (char *)std::aligned_alloc(4096, size);
            if (!base)
                size = 0;
        }
        return base;
    }
    ~Scratch() { std::free(base); }
};

thread_local Scratch scratch;

int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class T> int decode(const Job &job) {
    int64_t longest = 1;
    for (int64_t row = 0; row < job.rows; row++)
        longest = std::max(longest, job.stop[row] - job.start[row]);
    Memory count{nullptr};
    Unit<T>().lay_out(count, job, longest);
    const int64_t units = job.rows * job.kv_heads, threads = std::max<int64_t>(1, job.threads), rest = units % threads;
    const int64_t logits_bytes = job.group * (BLOCK + SKEW) * sizeof(float);
    char *base = scratch.grow(threads * (count.used + logits_bytes));
    if (!base)
        return 1;
    auto *shared = new (std::nothrow) Unit<T>[rest + 1];
    if (!shared)
        return 1;
    for (int64_t i = 0; i < rest; i++) {
        Memory memory{base + i * count.used};
        shared[i].lay_out(memory, job, longest);
    }
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        float *logits = (float *)(base + threads * count.used + thread_number() * logits_bytes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < units - rest; number++) {
            Memory memory{base + thread_number() * count.used};
            Unit<T> unit;
            unit.lay_out(memory, job, longest);
            unit.begin(job, number);
            for (int64_t block = 0; block < unit.blocks; block++)
                unit.score(block, logits);
            unit.normalise();
            for (int64_t block = 0; block < unit.blocks; block++)
                unit.rank(block);
            unit.finish();
        }
        if (rest) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < rest; i++)
                shared[i].begin(job, units - rest + i);
            const int64_t most_blocks = (longest + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < rest * most_blocks; i++)
                if (i % most_blocks < shared[i / most_blocks].blocks)
                    shared[i / most_blocks].score(i % most_blocks, logits);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < rest; i++)
                shared[i].normalise();
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < rest * most_blocks; i++)
                if (i % most_blocks < shared[i / most_blocks].blocks)
                    shared[i / most_blocks].rank(i % most_blocks);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < rest; i++)
                shared[i].finish();
        }
    }
    delete[] shared;
    return 0;
}

}  // namespace

extern "C" {
int sparq_decode_float32(const Job *job) { return decode<float>(*job); }
int sparq_decode_bfloat16(const Job *job) { return decode<bf16>(*job); }
}
