/* Bicubic, antialiased resize of interleaved RGB bytes with the bits of torch's uint8 kernel. See resize.py.
 *
 *     LANES rows --transpose--> (pair of pixels, channel) x LANES --horizontal--> ring of row pairs --vertical--> window
 *
 * Both passes are the same product: a pair of 16-bit weights times a pair of 16-bit values, summed into 32 bits in every lane
 * (pmaddwd). Transposing a block of rows first makes the lanes of the horizontal pass rows, so that it needs no shuffle per tap.
 * Its result is stored as pairs of rows, which is what the vertical pass multiplies. Only as many rows as one output row needs
 * are kept, so everything but the picture itself stays in the cache.
 *
 * A pair whose second half lies outside the picture has weight 0 there: what is read does not count, but must be readable. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && !defined(PORTABLE)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && !defined(PORTABLE)
#define SIMD
enum { LANES = 16 };
typedef __m512i vec;
#define OP(name) _mm512_##name
#define QUARTERS(p, at) \
    _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(LOAD16((p)[0] + (at))), \
        LOAD16((p)[4] + (at)), 1), LOAD16((p)[8] + (at)), 2), LOAD16((p)[12] + (at)), 3)
#define SAME16(v) _mm512_broadcast_i32x4(v)
#define AND(a, b) _mm512_and_si512(a, b)
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define STORE_LANE(p, v, lane) _mm_storeu_si128((__m128i *)(p), _mm512_extracti32x4_epi32(v, lane))
#define SHUFFLE(a, b, how) _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), how))
#define IN_ORDER(v) _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v)
#ifdef __AVX512VNNI__
#define DOT(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#endif

#elif defined(__AVX2__) && !defined(PORTABLE)
#define SIMD
enum { LANES = 8 };
typedef __m256i vec;
#define OP(name) _mm256_##name
#define QUARTERS(p, at) _mm256_inserti128_si256(_mm256_castsi128_si256(LOAD16((p)[0] + (at))), LOAD16((p)[4] + (at)), 1)
#define SAME16(v) _mm256_broadcastsi128_si256(v)
#define AND(a, b) _mm256_and_si256(a, b)
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define STORE_LANE(p, v, lane) _mm_storeu_si128((__m128i *)(p), _mm256_extracti128_si256(v, lane))
#define SHUFFLE(a, b, how) _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), how))
#define IN_ORDER(v) _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
#ifdef __AVXVNNI__
#define DOT(sum, a, b) _mm256_dpwssd_avx_epi32(sum, a, b)
#endif

#else
enum { LANES = 16 };
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { PAD = 64, LOADED = 16, NARROW = 8 };
/* PAD: columns of the ring are a multiple of it. LOADED: bytes of one load, of which 12 (four pixels) count. NARROW: in a
 * narrower picture a load at the end of a row may reach past the next row. */

/* ---- Weights --------------------------------------------------------------------------------------------------------------- */

/* A table is int32: precision, pairs per entry, then per output (first pair, number of pairs), then int16 weights. */
static int most_pairs(int in, int out)
{
    double scale = (double)in / out;
    return (int)ceil(2 * (scale > 1 ? scale : 1)) + 1;
}

size_t table_bytes(int in, int out)
{
    return sizeof(int32_t) * (2 + (size_t)out * (2 + most_pairs(in, out)));
}

static const int16_t *table_weights(const int32_t *table, int out) { return (const int16_t *)(table + 2 + 2 * (size_t)out); }

/* Keys's cubic with a = -1/2. */
static double cubic(double x)
{
    x = fabs(x);
    if (x < 1)
        return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/* The normalised weights of one output, its first input and their number. */
static int taps(int in, int out, int at, double *w, int most, int *first)
{
    double scale = (double)in / out, wide = scale >= 1 ? scale : 1, inverse = scale >= 1 ? 1 / scale : 1;
    double support = 2 * wide, centre = scale * (at + 0.5), total = 0;
    int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
    from = from > 0 ? from : 0;
    to = to < in ? to : in;
    int n = to - from < most ? to - from : most;
    for (int i = 0; i < n; i++)
        total += w[i] = cubic((i + from - centre + 0.5) * inverse);
    for (int i = 0; i < n; i++)
        w[i] /= total;
    *first = from;
    return n;
}

/* buffer: room for 2 * most_pairs(in, out) * out doubles. A side that stays has the weight 1, which rounds nothing. */
void make_table(int in, int out, int32_t *table, double *buffer)
{
    int pairs = most_pairs(in, out), width = 2 * pairs, most = 2 * (pairs - 1) + 1, precision = 0;
    int32_t *bounds = table + 2;
    int16_t *weights = (int16_t *)(bounds + 2 * (size_t)out);
    double largest = 0;
    for (int at = 0; at < out; at++) {
        int first = at, n = 1;
        double *w = buffer + (size_t)at * width;
        if (in == out)
            w[0] = 1;
        else
            n = taps(in, out, at, w, most, &first);
        for (int i = 0; i < n; i++)
            largest = w[i] > largest ? w[i] : largest;
        bounds[2 * at] = first;
        bounds[2 * at + 1] = n;
    }
    while (precision < 22 && (int)(0.5 + largest * (1 << (precision + 1))) < 1 << 15)
        precision++;
    table[0] = precision;
    table[1] = pairs;
    memset(weights, 0, sizeof(int16_t) * (size_t)out * width);
    for (int at = 0; at < out; at++) {
        int first = bounds[2 * at], n = bounds[2 * at + 1];
        const double *w = buffer + (size_t)at * width;
        int16_t *rounded = weights + (size_t)at * width + (first & 1);
        for (int i = 0; i < n; i++)
            rounded[i] = (int16_t)(w[i] < 0 ? -0.5 + w[i] * (1 << precision) : 0.5 + w[i] * (1 << precision));
        bounds[2 * at] = first / 2;
        bounds[2 * at + 1] = (first + n + 1) / 2 - first / 2;
    }
}

/* ---- Passes ---------------------------------------------------------------------------------------------------------------- */

#ifdef SIMD
#define LOAD16(p) _mm_loadu_si128((const __m128i *)(p))
#ifndef DOT
#define DOT(sum, a, b) OP(add_epi32)(sum, OP(madd_epi16)(a, b))
#endif

static inline vec both(const int16_t *pair)
{
    int32_t value;
    memcpy(&value, pair, 4);
    return OP(set1_epi32)(value);
}

/* rows[LANES] -> lanes[pair of pixels][channel]: 16-bit values (pixel, next pixel) of every row. */
static void transpose(const uint8_t *const *rows, int width, vec *lanes)
{
    /* four pixels -> per channel the bytes 0 2 1 3, of which a mask leaves the pair 0 1 and a shift the pair 2 3 */
    const vec gather = SAME16(_mm_setr_epi8(0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11, -1, -1, -1, -1));
    const vec low = OP(set1_epi16)(255);
    for (int x = 0; x < width; x += 4, lanes += 6) {
        size_t at = 3 * (size_t)x;
        vec a = OP(shuffle_epi8)(QUARTERS(rows, at), gather), b = OP(shuffle_epi8)(QUARTERS(rows + 1, at), gather);
        vec c = OP(shuffle_epi8)(QUARTERS(rows + 2, at), gather), d = OP(shuffle_epi8)(QUARTERS(rows + 3, at), gather);
        vec ab = OP(unpacklo_epi32)(a, b), cd = OP(unpacklo_epi32)(c, d);
        vec red = OP(unpacklo_epi64)(ab, cd), green = OP(unpackhi_epi64)(ab, cd);
        vec blue = OP(unpacklo_epi64)(OP(unpackhi_epi32)(a, b), OP(unpackhi_epi32)(c, d));
        lanes[0] = AND(red, low), lanes[1] = AND(green, low), lanes[2] = AND(blue, low);
        lanes[3] = OP(srli_epi16)(red, 8), lanes[4] = OP(srli_epi16)(green, 8), lanes[5] = OP(srli_epi16)(blue, 8);
    }
}

/* rows[LANES] -> to[LANES / 2]: 16-bit values (row, next row) of every output column. */
static void horizontal(const uint8_t *const *rows, int width, int out, const int32_t *table, vec *lanes, int16_t *const *to)
{
    const int32_t *bounds = table + 2;
    const int16_t *weights = table_weights(table, out);
    const int pairs = table[1];
    const __m128i shift = _mm_cvtsi32_si128(table[0]);
    const vec half = OP(set1_epi32)(1 << table[0] >> 1), top = OP(set1_epi16)(255);
    transpose(rows, width, lanes);
    for (int x = 0; x < out; x += 4) {
        vec sums[12];
        for (int i = 0; i < 4; i++) {
            int at = x + i < out ? x + i : out - 1;
            const vec *in = lanes + 3 * (size_t)bounds[2 * at];
            const int16_t *w = weights + 2 * (size_t)pairs * at;
            vec red = half, green = half, blue = half;
            for (int n = bounds[2 * at + 1]; n > 0; n--, in += 3, w += 2) {
                vec pair = both(w);
                red = DOT(red, in[0], pair), green = DOT(green, in[1], pair), blue = DOT(blue, in[2], pair);
            }
            sums[3 * i] = OP(sra_epi32)(red, shift);
            sums[3 * i + 1] = OP(sra_epi32)(green, shift);
            sums[3 * i + 2] = OP(sra_epi32)(blue, shift);
        }
        for (int i = 0; i < 3; i++) { /* four columns of LANES rows -> row pairs of four columns */
            const vec *s = sums + 4 * i;
            vec ab = OP(min_epu16)(OP(packus_epi32)(s[0], s[1]), top), cd = OP(min_epu16)(OP(packus_epi32)(s[2], s[3]), top);
            vec even = SHUFFLE(ab, cd, 0x88), odd = SHUFFLE(ab, cd, 0xdd);
            size_t column = 2 * (3 * (size_t)x + 4 * i);
            STORE_LANE(to[0] + column, even, 0);
            STORE_LANE(to[1] + column, odd, 0);
            STORE_LANE(to[2] + column, even, 1);
            STORE_LANE(to[3] + column, odd, 1);
#ifdef __AVX512BW__
            STORE_LANE(to[4] + column, even, 2);
            STORE_LANE(to[5] + column, odd, 2);
            STORE_LANE(to[6] + column, even, 3);
            STORE_LANE(to[7] + column, odd, 3);
#endif
        }
    }
}

/* rows[n] pairs of rows -> one row of bytes. */
static void vertical(const int16_t *const *rows, int n, const int16_t *w, int precision, int bytes, uint8_t *to)
{
    const __m128i shift = _mm_cvtsi32_si128(precision);
    const vec half = OP(set1_epi32)(1 << precision >> 1);
    for (int x = 0; x < bytes; x += 4 * LANES) {
        vec a = half, b = half, c = half, d = half;
        for (int k = 0; k < n; k++) {
            const int16_t *in = rows[k] + 2 * (size_t)x;
            vec pair = both(w + 2 * k);
            a = DOT(a, LOAD(in), pair), b = DOT(b, LOAD(in + 2 * LANES), pair);
            c = DOT(c, LOAD(in + 4 * LANES), pair), d = DOT(d, LOAD(in + 6 * LANES), pair);
        }
        a = OP(packs_epi32)(OP(sra_epi32)(a, shift), OP(sra_epi32)(b, shift));
        c = OP(packs_epi32)(OP(sra_epi32)(c, shift), OP(sra_epi32)(d, shift));
        vec done = IN_ORDER(OP(packus_epi16)(a, c));
        if (x + 4 * LANES <= bytes)
            STORE(to + x, done);
        else
            memcpy(to + x, &done, bytes - x);
    }
}

#else
typedef int32_t vec[LANES];

static inline int clamped(int32_t sum, int precision)
{
    sum >>= precision;
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

static void horizontal(const uint8_t *const *rows, int width, int out, const int32_t *table, vec *lanes, int16_t *const *to)
{
    const int32_t *bounds = table + 2;
    const int16_t *weights = table_weights(table, out);
    const int pairs = table[1], precision = table[0];
    (void)width, (void)lanes;
    for (int row = 0; row < LANES; row++)
        for (int x = 0; x < out; x++) {
            const uint8_t *in = rows[row] + 6 * (size_t)bounds[2 * x];
            const int16_t *w = weights + 2 * (size_t)pairs * x;
            int32_t red = 1 << precision >> 1, green = red, blue = red;
            for (int n = 2 * bounds[2 * x + 1]; n > 0; n--, in += 3, w++)
                red += in[0] * *w, green += in[1] * *w, blue += in[2] * *w;
            int16_t *result = to[row / 2] + 6 * (size_t)x + row % 2;
            result[0] = (int16_t)clamped(red, precision);
            result[2] = (int16_t)clamped(green, precision);
            result[4] = (int16_t)clamped(blue, precision);
        }
}

static void vertical(const int16_t *const *rows, int n, const int16_t *w, int precision, int bytes, uint8_t *to)
{
    for (int x = 0; x < bytes; x += PAD) { /* a fixed number of columns, so that compilers vectorise it; the ring is as wide */
        int32_t sums[PAD];
        for (int i = 0; i < PAD; i++)
            sums[i] = 1 << precision >> 1;
        for (int k = 0; k < n; k++)
            for (int i = 0; i < PAD; i++)
                sums[i] += rows[k][2 * (x + i)] * w[2 * k] + rows[k][2 * (x + i) + 1] * w[2 * k + 1];
        for (int i = 0; i < PAD && x + i < bytes; i++)
            to[x + i] = (uint8_t)clamped(sums[i], precision);
    }
}
#endif

/* ---- Whole ----------------------------------------------------------------------------------------------------------------- */

static size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }
static size_t lanes_bytes(int width) { return ((size_t)width + 3) / 4 * 6 * sizeof(vec); }
static size_t copy_bytes(int width) { return align(3 * (size_t)width + 3 * 4 + LOADED); }
static size_t ring_columns(int out) { return (3 * (size_t)out + 12 + PAD - 1) / PAD * PAD; }
static size_t ring_rows(int in, int out) { return (size_t)most_pairs(in, out) + LANES / 2; }

size_t scratch_bytes(int width, int height, int out_width, int out_height)
{
    size_t rows = ring_rows(height, out_height);
    return 64 + lanes_bytes(width) + NARROW * copy_bytes(width) + rows * ring_columns(out_width) * 4
        + align(most_pairs(height, out_height) * sizeof(void *));
}

void resize(const uint8_t *pixels, int width, int height, uint8_t *target, int out_width, int out_height, ptrdiff_t stride,
            const int32_t *across, const int32_t *down, uint8_t *scratch)
{
    const size_t line = 3 * (size_t)width, columns = ring_columns(out_width), kept = ring_rows(height, out_height);
    const int16_t *weights = table_weights(down, out_height);
    const int pairs = down[1];
    /* rows from here on are read from copies: behind the last row of the picture nothing may be read */
    const int copied = width >= NARROW ? height - 1 : height > NARROW ? height - NARROW : 0;
    scratch = (uint8_t *)align((size_t)scratch);
    vec *lanes = (vec *)scratch;
    uint8_t *copies = scratch + lanes_bytes(width);
    int16_t *ring = (int16_t *)(copies + NARROW * copy_bytes(width));
    const int16_t **needed = (const int16_t **)(ring + 2 * kept * columns);
    for (int y = copied; y < height; y++)
        memcpy(copies + (y - copied) * copy_bytes(width), pixels + y * line, line);

    for (int y = 0, done = 0; done < out_height; y += LANES) {
        const uint8_t *rows[LANES];
        int16_t *to[LANES / 2];
        for (int i = 0; i < LANES; i++) {
            int at = y + i < height ? y + i : height - 1;
            rows[i] = at < copied ? pixels + at * line : copies + (at - copied) * copy_bytes(width);
        }
        for (int i = 0; i < LANES / 2; i++)
            to[i] = ring + ((size_t)y / 2 + i) % kept * 2 * columns;
        horizontal(rows, width, out_width, across, lanes, to);
        for (; done < out_height; done++) {
            int first = down[2 + 2 * done], n = down[3 + 2 * done];
            if (2 * (first + n) > y + LANES)
                break;
            for (int k = 0; k < n; k++)
                needed[k] = ring + ((size_t)first + k) % kept * 2 * columns;
            vertical(needed, n, weights + 2 * (size_t)pairs * done, down[0], 3 * out_width, target + done * stride);
        }
    }
}

#ifdef __cplusplus
}
#endif
