/* Looks rows of embedding tables up and moves them, on all cores; recsys/parallel/kernels.py calls it.

   Built with GNU's OpenMP it shares the threads that torch's wheels have. No sum depends on their number: the gradients
   of a row are added up in the order of its ids. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define VERSION 1 /* changes with what the loops take or do, here and in kernels.py */
#define MOST_THREADS 128
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)
#define AHEAD 8 /* entries between a row's prefetch and its use */

enum kind { SGD, MOMENTUM, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL };

/* Tables of one memory of floats. Feature f looks up rows of `width[f]` floats, the first of `count[f]` at float
   `begin[f]`, for the columns from `column[f]` on of an output row of `total` floats. */
struct tables {
    int64_t features, total;
    const int64_t *begin, *count, *width, *column;
    const float *weights;
};

/* Neighbouring tables as one matrix: row r at `weights + r * width`, its states at `first + r * first_width` and
   `second + r * width`. Feature f's row 0 is row `base[f]`; its gradient's columns begin at `column + f * width`. */
struct group {
    int64_t features, width, first_width, rows, column;
    const int64_t *base;
    float *weights, *first, *second;
    const float *l2; /* what multiplies weights and joins their gradient, by column; NULL: nothing */
};

/* What moves the columns from `start` to `stop`; names and formulas are those of recsys/optim.py. */
struct rule {
    int64_t kind, start, stop, nesterov;
    double rate, momentum, beta1, beta2, eps, l1, l2, l2_shrinkage, beta, power;
};

static void prefetch(const float *row, int64_t width)
{
    for (int64_t at = 0; at < width; at += 16)
        __builtin_prefetch(row + at);
    __builtin_prefetch(row + width - 1);
}

/* Sums of rows into `out` [size, total]: feature f's ids of output row b stand between `offsets[f * size + b]` and the
   next offset. Returns -1, or the place of an id that its table has not. */
int64_t look_up(const struct tables *t, const int64_t *ids, const int64_t *offsets, int64_t size, float *out)
{
    int64_t bad = -1;
#pragma omp parallel for schedule(static) reduction(max : bad)
    for (int64_t b = 0; b < size; b++) {
        for (int64_t f = 0; f < t->features && b + 1 < size; f++) {
            int64_t next = offsets[f * size + b + 1];
            if (next < offsets[f * size + b + 2] && (uint64_t)ids[next] < (uint64_t)t->count[f])
                prefetch(t->weights + t->begin[f] + ids[next] * t->width[f], t->width[f]);
        }
        for (int64_t f = 0; f < t->features; f++) {
            const int64_t *end = offsets + f * size + b + 1;
            int64_t width = t->width[f];
            float *to = out + b * t->total + t->column[f];
            if (end[-1] == end[0])
                memset(to, 0, width * sizeof(float));
            for (int64_t i = end[-1]; i < end[0]; i++) {
                if ((uint64_t)ids[i] >= (uint64_t)t->count[f]) {
                    bad = i;
                    continue;
                }
                const float *row = t->weights + t->begin[f] + ids[i] * width;
                if (i == end[-1])
                    memcpy(to, row, width * sizeof(float));
                else
                    for (int64_t c = 0; c < width; c++)
                        to[c] += row[c];
            }
        }
    }
    return bad;
}

static void move_part(const struct rule r, float *restrict w, const float *restrict g, float *restrict first,
                      float *restrict second, int64_t one_state)
{
    const int64_t from = r.start, to = r.stop;
    const float rate = r.rate, momentum = r.momentum, eps = r.eps;
    switch ((enum kind)r.kind) {
    case SGD:
        for (int64_t c = from; c < to; c++)
            w[c] -= rate * g[c];
        break;
    case MOMENTUM:
        for (int64_t c = from; c < to; c++) {
            first[c] = first[c] * momentum + g[c];
            w[c] -= rate * (r.nesterov ? g[c] + momentum * first[c] : first[c]);
        }
        break;
    case ADAGRAD:
        for (int64_t c = from; c < to; c++) {
            first[c] += g[c] * g[c];
            w[c] -= rate * g[c] / (sqrtf(first[c]) + eps);
        }
        break;
    case ROWWISE_ADAGRAD: {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = from; c < to; c++)
            squares += g[c] * g[c];
        float mean = squares / (float)(to - from), sum = first[one_state ? 0 : from] + mean;
        for (int64_t c = one_state ? 0 : from; c < (one_state ? 1 : to); c++)
            first[c] = sum;
        float step = rate / (sqrtf(sum) + eps);
        for (int64_t c = from; c < to; c++)
            w[c] -= step * g[c];
        break;
    }
    case ADAM: {
        const float beta2 = r.beta2, new1 = 1 - r.beta1, new2 = 1 - r.beta2;
        for (int64_t c = from; c < to; c++) {
            first[c] += new1 * (g[c] - first[c]);
            second[c] = second[c] * beta2 + new2 * g[c] * g[c];
            w[c] -= rate * first[c] / (sqrtf(second[c]) + eps);
        }
        break;
    }
    case FTRL: {
        const float power = r.power, shrinkage = 2 * r.l2_shrinkage, l1 = r.l1, l2 = 2 * r.l2, beta = r.beta;
        for (int64_t c = from; c < to; c++) {
            float added = first[c] + g[c] * g[c];
            float before = power == 0.5f ? sqrtf(first[c]) : powf(first[c], power);
            float after = power == 0.5f ? sqrtf(added) : powf(added, power);
            float linear = second[c] + g[c] + shrinkage * w[c] - (after - before) / rate * w[c];
            float slope = (after + beta) / rate + l2;
            float kept = fminf(fmaxf(linear, -l1), l1);
            w[c] = slope > 0 ? (kept - linear) / slope : 0;
            first[c] = added;
            second[c] = linear;
        }
        break;
    }
    }
}

/* Sorts by the upper 32 bits, of which `bits` are used; equal ones keep their order. Returns where the result lies. */
static uint64_t *sorted(uint64_t *entries, uint64_t *spare, int64_t count, int bits)
{
    for (int shift = 32; shift < 32 + bits; shift += DIGIT_BITS) {
        uint32_t ends[DIGITS] = {0}, before = 0;
        for (int64_t i = 0; i < count; i++)
            ends[entries[i] >> shift & (DIGITS - 1)]++;
        for (int digit = 0; digit < DIGITS; digit++) {
            uint32_t here = ends[digit];
            ends[digit] = before;
            before += here;
        }
        for (int64_t i = 0; i < count; i++)
            spare[ends[entries[i] >> shift & (DIGITS - 1)]++] = entries[i];
        uint64_t *other = entries;
        entries = spare, spare = other;
    }
    return entries;
}

/* Moves each row of sorted entries (row << 32 | where its gradient begins) once, by the sum of its gradients. */
static void move_sorted(const struct group *g, const struct rule *rules, int64_t parts, const uint64_t *entries,
                        int64_t count, const float *gradient)
{
    const int64_t width = g->width;
    float sum[width];
    for (int64_t i = 0; i < count;) {
        const int64_t row = entries[i] >> 32;
        float *weights = g->weights + row * width;
        memset(sum, 0, sizeof(sum));
        for (; i < count && (int64_t)(entries[i] >> 32) == row; i++) {
            if (i + AHEAD < count) {
                const int64_t next = entries[i + AHEAD] >> 32;
                prefetch(gradient + (uint32_t)entries[i + AHEAD], width);
                if (next != (int64_t)(entries[i + AHEAD - 1] >> 32)) {
                    prefetch(g->weights + next * width, width);
                    if (g->first)
                        prefetch(g->first + next * g->first_width, g->first_width);
                    if (g->second)
                        prefetch(g->second + next * width, width);
                }
            }
            const float *own = gradient + (uint32_t)entries[i];
            for (int64_t c = 0; c < width; c++)
                sum[c] += own[c];
        }
        for (int64_t c = 0; g->l2 && c < width; c++)
            sum[c] += g->l2[c] * weights[c];
        for (int64_t part = 0; part < parts; part++)
            move_part(rules[part], weights, sum, g->first ? g->first + row * g->first_width : NULL,
                      g->second ? g->second + row * width : NULL, g->first_width == 1 && width > 1);
    }
}

/* One step of a group by the gradient [size, stride] of what was looked up. `ids` and `offsets` are as in `look_up`, the
   first offset that of the group's first feature. `scratch` holds two numbers for each id of the group. */
void move(const struct group *g, const struct rule *rules, int64_t parts, const int64_t *ids, const int64_t *offsets,
          int64_t size, const float *gradient, int64_t stride, uint64_t *scratch)
{
    const int64_t bags = g->features * size, total = offsets[bags] - offsets[0];
    const int threads = omp_get_max_threads() < MOST_THREADS ? omp_get_max_threads() : MOST_THREADS;
    const int bits = g->rows > 1 ? 64 - __builtin_clzll(g->rows - 1) : 0;
    if (total == 0)
        return;
    int64_t counts[MOST_THREADS][MOST_THREADS]; /* of entries that one thread found, another one's rows */
#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t first = bags * me / all, last = bags * (me + 1) / all;
        int64_t place[MOST_THREADS], begin = 0, count = 0;
        memset(counts[me], 0, sizeof(counts[me]));
        /* First counts, then writes, what this thread's share of the bags has for each thread. */
        for (int writes = 0; writes < 2; writes++) {
            for (int64_t f = first / size; f * size < last; f++) {
                const int64_t low = f * size > first ? f * size : first;
                const int64_t high = (f + 1) * size < last ? (f + 1) * size : last;
                for (int64_t bag = low; bag < high; bag++)
                    for (int64_t i = offsets[bag]; i < offsets[bag + 1]; i++) {
                        const uint32_t row = (uint32_t)(ids[i] + g->base[f]);
                        const int owner = (int)((uint64_t)(row * 2654435761u) * (uint64_t)all >> 32);
                        const uint64_t from = (uint64_t)((bag - f * size) * stride + g->column + f * g->width);
                        if (writes)
                            scratch[place[owner]++] = (uint64_t)row << 32 | from;
                        else
                            counts[me][owner]++;
                    }
            }
#pragma omp barrier
            int64_t end = 0;
            for (int owner = 0; !writes && owner < all; owner++)
                for (int finder = 0; finder < all; finder++) {
                    if (finder == me)
                        place[owner] = end;
                    if (owner == me && finder == 0)
                        begin = end;
                    if (owner == me)
                        count += counts[finder][owner];
                    end += counts[finder][owner];
                }
        }
        const uint64_t *own = sorted(scratch + begin, scratch + total + begin, count, bits);
        move_sorted(g, rules, parts, own, count, gradient);
    }
}

/* What the caller has to agree with. */
int64_t version(void)
{
    return VERSION;
}
