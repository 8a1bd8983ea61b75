// One decoding step of SparQ attention on the CPU, or of dense attention. The method is sparq.py's; see sparq_cpu.py.
//
//     score   r rows of K^T, a block of slots at a time --> p = exp2(logit - the block's maximum), for each head of the group
//     rank    blocks are brought to one maximum and summed over the group --> integers in the order of the ranks
//     select  bound from group maxima --> the few candidates above it --> radix threshold --> indices, ascending
//     attend  the selected rows of K and V, softmax, reallocation to the mean of V
//
// A unit is one (row of the batch, KV head). Threads take whole units, so that its 4 g S bytes of p stay in their cache; what
// does not divide among them is split over blocks of slots. Blocks do not depend on the number of threads, and so no bit does.
// Where rows share a prefix, a head's units follow one another: its K^T, K and V come from memory once, then from the cache.
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "sparq_cpu_attend.h"

struct Step {  // sparq_cpu.py's: a token a row, at `slot`; tensors but for new_keys, new_values and fresh are the cache's, dense
    void *keys, *keys_t, *values;  // keys_t: null where there is none
    const void *new_keys, *new_values;
    double *total;
    int64_t *count;
    bool *valid;
    const bool *fresh;  // which rows' tokens are valid; null: all
    int64_t rows, kv_heads, d, capacity, slot;
    int64_t new_keys_row, new_keys_head, new_values_row, new_values_head, fresh_row;
};

namespace {

constexpr int64_t FEW = 1 << 18;  // multiplications that one thread does sooner than it wakes another

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
        longest = std::max(longest, own_slots(job, row));
    Memory count{nullptr};
    Unit<T>().lay_out(count, job, longest);
    const int64_t units = job.rows * job.kv_heads, work = units * job.group * job.d * (job.prefix + longest);
    const int64_t threads = work <= FEW ? 1 : std::max<int64_t>(1, job.threads), rest = units % threads;
    const auto begin = [&job](Unit<T> &unit, int64_t number) {
        if (job.prefix)
            unit.begin(job, number % job.rows, number / job.rows);
        else
            unit.begin(job, number / job.kv_heads, number % job.kv_heads);
    };
    const int64_t logits_bytes = job.group * (BLOCK + SKEW) * sizeof(float);
    char *base = scratch.grow(threads * (count.used + logits_bytes));
    if (!base)
        return 1;
    auto *shared = rest ? new (std::nothrow) Unit<T>[rest] : nullptr;
    if (rest && !shared)
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
            begin(unit, number);
            for (int64_t block = 0; block < unit.blocks; block++)
                unit.score(block, logits);
            unit.normalise();
            for (int64_t block = 0; block < unit.blocks; block++)
                unit.rank(block);
            finish(unit);
        }
        if (rest) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < rest; i++)
                begin(shared[i], units - rest + i);
            const int64_t most_blocks = blocks_of(job.prefix) + blocks_of(longest);
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
                finish(shared[i]);
        }
    }
    delete[] shared;
    return 0;
}

template <class T> void append(const Step &s) {
    for (int64_t row = 0; row < s.rows; row++)
        for (int64_t head = 0; head < s.kv_heads; head++) {
            const int64_t place = (row * s.kv_heads + head) * s.capacity * s.d;
            const T *key = (const T *)s.new_keys + row * s.new_keys_row + head * s.new_keys_head;
            const T *from = (const T *)s.new_values + row * s.new_values_row + head * s.new_values_head;
            std::memcpy((T *)s.keys + place + s.slot * s.d, key, s.d * sizeof(T));
            std::memcpy((T *)s.values + place + s.slot * s.d, from, s.d * sizeof(T));
            for (int64_t c = 0; s.keys_t && c < s.d; c++)
                ((T *)s.keys_t)[place + c * s.capacity + s.slot] = key[c];
        }
}

// The token's value goes into the sum of the valid ones, or it is cleared; mean, where given, is their mean.
template <class T> void settle(const Step &s, float *mean) {
    for (int64_t row = 0; row < s.rows; row++) {
        const bool is_valid = !s.fresh || s.fresh[row * s.fresh_row];
        s.valid[row * s.capacity + s.slot] = is_valid;
        s.count[row] += is_valid;
        const double share = 1.0 / std::max<int64_t>(1, s.count[row]);
        for (int64_t unit = row * s.kv_heads; unit < (row + 1) * s.kv_heads; unit++) {
            T *key = (T *)s.keys + (unit * s.capacity + s.slot) * s.d, *from = (T *)s.values + (unit * s.capacity + s.slot) * s.d;
            double *total = s.total + unit * s.d;
            if (is_valid)
                for (int64_t c = 0; c < s.d; c++)
                    total[c] += value(from[c]);
            else {
                std::fill_n(key, s.d, T{}), std::fill_n(from, s.d, T{});
                for (int64_t c = 0; s.keys_t && c < s.d; c++)
                    ((T *)s.keys_t)[(unit * s.d + c) * s.capacity + s.slot] = T{};
            }
            for (int64_t c = 0; mean && c < s.d; c++)
                mean[unit * s.d + c] = (float)(total[c] * share);
        }
    }
}

template <class T> int step(const Step &s, const Job &job) {
    settle<T>(s, job.length > job.dense_up_to ? job.mean : nullptr);
    return decode<T>(job);
}

}  // namespace

extern "C" {
int sparq_decode_float32(const Job *job) { return decode<float>(*job); }
int sparq_decode_bfloat16(const Job *job) { return decode<bf16>(*job); }
void sparq_append_float32(const Step *step) { append<float>(*step); }
void sparq_append_bfloat16(const Step *step) { append<bf16>(*step); }
int sparq_step_float32(const Step *s, const Job *job) { return step<float>(*s, *job); }
int sparq_step_bfloat16(const Step *s, const Job *job) { return step<bf16>(*s, *job); }
}
