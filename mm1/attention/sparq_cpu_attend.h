#pragma once
// Exact attention of one unit to the tokens that it chose, or to all it has, and the reallocation to the mean of V.
#include "sparq_cpu_unit.h"

namespace {

constexpr int AHEAD = 8;  // selected rows of K that are being fetched

// N vectors of the output from channel c on.
template <class T, int G, int N>
void weigh(const Unit<T> &u, int64_t first, int64_t c, int64_t d, const float *total, const float *share) {
    Vec y[G][N] = {};
    const int64_t k = u.k, width = std::min<int64_t>(N * LANES, d - c);
    for (int64_t i = 0; i < k; i++) {
        const T *row = u.value_of(u.selected[i]) + c;
        for (int v = 0; v < N; v++) {
            const Vec x = N > 1 || width == LANES ? load(row + v * LANES) : load(row, width);
            for (int h = 0; h < G; h++)
                y[h][v] += x * u.weights[h * k + i];
        }
    }
    for (int h = 0; h < G; h++) {
        float line[N * LANES];
        const float factor = share[h] / total[h], rest = 1 - share[h];
        for (int v = 0; v < N; v++)
            store(line + v * LANES, y[h][v] * factor);
        for (int64_t i = 0; rest > 0 && i < width; i++)
            line[i] += rest * u.mean[c + i];
        T *to = u.out + (first + h) * d + c;
        for (int64_t i = 0; i < width; i++)
            put(to + i, line[i]);
    }
}

// The heads from `first` on.
template <class T, int G> void attend(const Unit<T> &u, int64_t first) {
    const Job &j = *u.job;
    const int64_t d = j.d, k = u.k, whole = d / LANES * LANES;
    const float *query[G];
    float peak[G], total[G], share[G];
    for (int h = 0; h < G; h++) {
        float *copy = u.padded + h * (d + LANES);
        const T *from = u.q + (first + h) * j.q_head;
        const float factor = (float)j.scale * LOG2E;
        for (int64_t c = 0; c < d; c++)
            copy[c] = value(from[c]) * factor;
        std::fill(copy + d, copy + d + LANES, 0.0f);
        query[h] = copy;
        peak[h] = -INFINITY, total[h] = 0, share[h] = 0;
    }
    for (int64_t i = 0; i < k; i++) {
        const T *row = u.key(u.selected[i]);
        if (first == 0) {
            const T *soon = u.key(u.selected[std::min(i + AHEAD, k - 1)]), *v = u.value_of(u.selected[i]);
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
            u.weights[h * k + i] = logit;
            peak[h] = std::max(peak[h], logit);
        }
    }
    for (int h = 0; h < G; h++) {
        float *w = u.weights + h * k;
        for (int64_t i = 0; i < k; i += LANES) {
            const int64_t some = std::min<int64_t>(LANES, k - i);
            float part[LANES];
            for (int64_t l = 0; l < LANES; l++)
                part[l] = l < some ? w[i + l] - peak[h] : 0.0f;
            store(part, exp2(load(part)));
            for (int64_t l = 0; l < some; l++)
                total[h] += w[i + l] = part[l];
        }
        if (!j.reallocate || !u.blocks) {
            share[h] = 1;
            continue;
        }
        const float *mass = u.p + (first + h) * u.stride, *factor = u.factors + (first + h) * u.blocks;
        for (int64_t i = 0; i < k; i++)
            share[h] += mass[u.selected[i]] * factor[u.selected[i] / BLOCK];
        share[h] = std::min(share[h], 1.0f);
    }
    int64_t c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES)
        weigh<T, G, 4>(u, first, c, d, total, share);
    for (; c < d; c += LANES)
        weigh<T, G, 1>(u, first, c, d, total, share);
}

// Selects and attends; a row that is not sparse attends to all it has, or is left out where there is a prefix.
template <class T> void finish(Unit<T> &u) {
    const Job &j = *u.job;
    if (u.blocks)
        u.select();
    else if (j.prefix)
        return;
    else
        std::iota(u.selected, u.selected + u.n, 0);
    if (u.n == 0) {
        for (int64_t i = 0; i < j.group * j.d; i++)
            put(u.out + i, 0.0f);
        return;
    }
    for (int64_t h = 0; h < j.group; h += HEADS)
        switch (std::min<int64_t>(HEADS, j.group - h)) {
        case 1: attend<T, 1>(u, h); break;
        case 2: attend<T, 2>(u, h); break;
        case 3: attend<T, 3>(u, h); break;
        default: attend<T, 4>(u, h);
        }
}

}  // namespace
