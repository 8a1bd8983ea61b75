#pragma once
// One (row of the batch, key-value head) of a step: the scores of its tokens and the k that it attends to.
//
// Its tokens lie in one part of a cache, or in two: a prefix that all rows share, then the row's own. A token's *position* is its
// slot in the first part, or `split` + its slot in the second; split is a multiple of BLOCK, so that no block has slots of both.
#include <new>
#include <numeric>

#include "sparq_cpu_vectors.h"

struct Job {  // sparq_cpu.py's; strides count elements
    const void *q, *keys, *keys_t, *values;
    float *mean;
    void *out;
    const int64_t *start, *stop;  // null: all rows have the slots from 0 to `length`
    const void *prefix_keys, *prefix_keys_t, *prefix_values;
    int64_t length, prefix;  // the prefix's tokens; 0: there is none
    int64_t rows, kv_heads, group, d, r, k, local, reallocate, rank_logits;
    int64_t q_row, q_head, keys_row, keys_head, keys_slot, keys_t_row, keys_t_head, keys_t_channel;
    int64_t values_row, values_head, values_slot, mean_row, mean_head;
    int64_t prefix_keys_head, prefix_keys_slot, prefix_keys_t_head, prefix_keys_t_channel, prefix_values_head, prefix_values_slot;
    int64_t threads;
    int64_t dense_up_to;  // rows of so many tokens are attended to whole; left out where there is a prefix
    double scale;
};

namespace {

constexpr int64_t BLOCK = 1024;   // slots: the logits of four heads and four channels of K^T fit the L1 cache together
constexpr int CHANNELS = 4;       // read at once: their queries stay in registers
constexpr int HEADS = 4;          // of a group at once
constexpr int64_t SKEW = 80;      // floats between rows of scratch memory, whose lines would else fall into a few sets of L1
constexpr int32_t LEAST = INT32_MIN;
constexpr float LOG2E = 1.44269504088896340736f;

struct Memory {  // hands out aligned pieces; with no base it only counts
    char *at;
    size_t used = 0;
    template <class T> T *take(int64_t count) {
        T *p = (T *)(at + used);
        used += (count * sizeof(T) + 63) / 64 * 64 + 64;
        return at ? p : nullptr;
    }
};

inline int64_t blocks_of(int64_t slots) { return (slots + BLOCK - 1) / BLOCK; }
inline int64_t first_slot(const Job &j, int64_t row) { return j.start ? j.start[row] : 0; }
inline int64_t own_slots(const Job &j, int64_t row) {
    return std::max<int64_t>(0, (j.stop ? j.stop[row] : j.length) - first_slot(j, row));
}

template <class T> struct Part {
    const T *keys, *keys_t, *values;
    int64_t keys_slot, keys_t_channel, values_slot, n, free;  // free: slots that are not among the latest tokens
};

template <class T> struct Unit {
    const Job *job;
    const T *q;
    const float *mean;
    T *out;
    Part<T> parts[2];
    int64_t n, blocks, split, stride, k, local, spread;  // spread: vectors of a group with one maximum; 1: no groups
    float *p, *peaks, *sums, *factors, *queries, *weights, *padded;
    int32_t *ranks, *maxima, *at, *rank_at, *selected;
    int64_t *channels;

    // longest: of the rows' own slots
    void lay_out(Memory &memory, const Job &j, int64_t longest) {
        const int64_t g = j.group, all = j.prefix + longest;
        const int64_t b = all > j.dense_up_to ? blocks_of(j.prefix) + blocks_of(longest) : 0;
        const int64_t padded_n = b * BLOCK, most_k = std::max(j.k, std::min(all, j.dense_up_to));
        const int64_t r4 = (j.r + CHANNELS - 1) / CHANNELS * CHANNELS;
        p = memory.take<float>(g * (padded_n + SKEW));
        peaks = memory.take<float>(g * b), sums = memory.take<float>(g * b), factors = memory.take<float>(g * b);
        queries = memory.take<float>(g * r4), weights = memory.take<float>(g * most_k);
        padded = memory.take<float>(g * (j.d + LANES));
        ranks = memory.take<int32_t>(padded_n), maxima = memory.take<int32_t>(padded_n);
        at = memory.take<int32_t>(padded_n), rank_at = memory.take<int32_t>(padded_n), selected = memory.take<int32_t>(most_k);
        channels = memory.take<int64_t>(std::max(r4, j.d));
    }

    void begin(const Job &j, int64_t row, int64_t head) {
        const int64_t first = first_slot(j, row), own = own_slots(j, row);
        job = &j;
        q = (const T *)j.q + row * j.q_row + head * j.group * j.q_head;
        mean = j.mean + row * j.mean_row + head * j.mean_head;
        out = (T *)j.out + (row * j.kv_heads + head) * j.group * j.d;
        const Part<T> mine{(const T *)j.keys + row * j.keys_row + head * j.keys_head + first * j.keys_slot,
                           (const T *)j.keys_t + row * j.keys_t_row + head * j.keys_t_head + first,
                           (const T *)j.values + row * j.values_row + head * j.values_head + first * j.values_slot,
                           j.keys_slot, j.keys_t_channel, j.values_slot, own, own};
        parts[0] = parts[1] = mine, parts[1].n = 0, split = INT64_MAX;
        if (j.prefix) {
            parts[0] = {(const T *)j.prefix_keys + head * j.prefix_keys_head,
                        (const T *)j.prefix_keys_t + head * j.prefix_keys_t_head,
                        (const T *)j.prefix_values + head * j.prefix_values_head,
                        j.prefix_keys_slot, j.prefix_keys_t_channel, j.prefix_values_slot, j.prefix, j.prefix};
            parts[1] = mine, split = blocks_of(j.prefix) * BLOCK;
        }
        n = j.prefix + own;
        blocks = n > j.dense_up_to ? blocks_of(parts[0].n) + blocks_of(parts[1].n) : 0;
        k = blocks ? j.k : n, local = j.local;
        parts[1].free = std::max<int64_t>(0, parts[1].n - local);
        parts[0].free = parts[0].n - std::max<int64_t>(0, local - parts[1].n);
        stride = blocks * BLOCK + SKEW;
        for (spread = BLOCK / LANES; spread > 1 && n / spread < 4 * k; spread /= 2)
            ;
        if (blocks)
            pick_channels();
    }

    const T *key(int64_t position) const {
        return position < split ? parts[0].keys + position * parts[0].keys_slot
                                : parts[1].keys + (position - split) * parts[1].keys_slot;
    }

    const T *value_of(int64_t position) const {
        return position < split ? parts[0].values + position * parts[0].values_slot
                                : parts[1].values + (position - split) * parts[1].values_slot;
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
    template <int G, bool FIRST>
    static void multiply(const T *const *in, const T *const *next, const float *queries, int64_t group, int64_t slots,
                         float *logits) {
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
        const int64_t from = block * BLOCK, group = j.group;  // a position; `in_part` is its slot
        const Part<T> &part = parts[from >= split];
        const int64_t in_part = from >= split ? from - split : from, slots = std::min(BLOCK, part.n - in_part);
        for (int64_t c = 0; c < j.r; c += CHANNELS) {
            const bool last = c + CHANNELS >= j.r;
            const T *in[CHANNELS], *next[CHANNELS];
            for (int i = 0; i < CHANNELS; i++) {
                in[i] = part.keys_t + channels[c + i] * part.keys_t_channel + in_part;
                next[i] = part.keys_t + channels[last ? i : c + CHANNELS + i] * part.keys_t_channel + in_part;
                next[i] += last ? BLOCK : 0;
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
        const int64_t from = block * BLOCK, group = job->group;
        const int64_t free = from >= split ? split + parts[1].free : parts[0].free;
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
            for (int part = 0; part < 2; part++) {
                const int64_t from = part ? split : 0, end = from + parts[part].free;
                for (int64_t s = from; s < end; s += LANES)
                    for (uint32_t bits = at_least(ranks + s, bound); bits; bits &= bits - 1) {
                        const int64_t position = s + __builtin_ctz(bits);
                        if (position < end)
                            at[candidates] = (int32_t)position, rank_at[candidates++] = ranks[position];
                    }
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
        for (; count < k; count++) {
            const int64_t token = free + count - wanted;
            selected[count] = (int32_t)(token < parts[0].n ? token : split + token - parts[0].n);
        }
    }
};

}  // namespace
