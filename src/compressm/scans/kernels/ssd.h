#pragma once
#include "products.h"

namespace {

// The scan with one decay per head: S_t = exp(l_t) S_{t-1} + delta_t B_t x_t^T,  y_t = C_t^T S_t + D x_t, with S (n, p).
//
// In chunks of `steps`, by matrix products of tiles: inside a chunk y_i = sum_{j <= i} (C_i . B_j) d_ij delta_j x_j with
// d_ij = exp(l_{j+1} + ... + l_i), and the state before the chunk adds d_i C_i^T S. A task is one sequence and some heads
// of one group, whose scores C_i . B_j are computed once. The forward pass keeps the state before every chunk.
//
// x, y (batch, length, heads, p); l, delta (batch, length, heads); B, C (batch, length, groups, n); D (heads).
// x, B and C may be views: their last two axes are contiguous, and the first two have any strides.

template <class T> struct Timed {
    const T* at;
    int64_t batch, time;
    const T* step(int64_t b, int64_t t) const { return at + b * batch + t * time; }
};

template <class T> struct Ssd {
    int64_t batch, length, heads, groups, p, n, steps, parts;
    Timed<T> x, B, C;
    const T *log_decay, *delta, *D;
    static int64_t whole(int64_t count) { return (count + W<T> - 1) / W<T> * W<T>; }
    int64_t chunks() const { return (length + steps - 1) / steps; }
    int64_t tasks() const { return batch * groups * parts; }
    int64_t at(int64_t b, int64_t t, int64_t h) const { return (b * length + t) * heads + h; }
    int64_t state(int64_t b, int64_t h) const { return (b * heads + h) * n * p; }
    int64_t checkpoint(int64_t b, int64_t c, int64_t h) const { return ((b * chunks() + c) * heads + h) * n * p; }
};

// One of the tasks: sequence b, heads [first, last) of a group.
struct SsdTask {
    int64_t b, group, part, first, last;
    template <class T> SsdTask(const Ssd<T>& s, int64_t task) {
        const int64_t per_group = s.heads / s.groups;
        part = task % s.parts, group = task / s.parts % s.groups, b = task / s.parts / s.groups;
        first = group * per_group + per_group * part / s.parts;
        last = group * per_group + per_group * (part + 1) / s.parts;
    }
};

// Aligned scratch memory, handed out in pieces.
template <class T> struct Arena {
    std::vector<Vec<T>> memory;
    size_t used = 0;
    explicit Arena(int64_t numbers) : memory(size_t(numbers / W<T>)) {}
    T* take(int64_t numbers) {
        T* piece = reinterpret_cast<T*>(memory.data() + used);
        used += size_t(numbers / W<T>);
        return piece;
    }
};

// 2^e; zero below and infinite above the exponents of normal numbers.
template <class T> inline Vec<T> power_of_two(typename Vectors<T>::integers e) {
    using Integers = typename Vectors<T>::integers;
    constexpr int bias = int(Vectors<T>::limit) + 1;
    const Integers low = Integers{} - bias, high = Integers{} + (bias + 1);
    e = e < low ? low : e;
    e = e > high ? high : e;
    return (Vec<T>)((e + bias) << Vectors<T>::mantissa);
}

// Decays between the steps of a chunk. The sum of logarithms up to a step, to the base 2, is an integer and a fraction in
// [-1/2, 1/2]. Differences of the integers are exact and those of the fractions small: however much a strong decay adds to
// the sums, the decays between later steps keep all their digits. Logarithms below -800 are taken for -800, where exp is
// zero even in double precision.
template <class T> struct Decays {
    using Integers = typename Vectors<T>::integers;
    static constexpr int longest = 128;
    Vec<T> up[longest / W<T>], down[longest / W<T>];  // 2^fraction, 2^-fraction
    Integers exponent[longest / W<T>];
    Vec<T> from_start[longest / W<T>], to_end[longest / W<T>];
    T total;

    void set(const T* log_decay, int64_t stride, int64_t steps) {
        constexpr int w = W<T>;
        const double magic = 6755399441055744.;  // 1.5 * 2^52: adding it rounds to an integer
        double sum = 0;
        T fraction[w];
        for (int64_t v = 0; v * w < steps; ++v) {
            for (int i = 0; i < w; ++i) {
                const int64_t t = v * w + i;
                const double log = t < steps ? double(log_decay[t * stride]) : 0.;
                sum += (log < -800. ? -800. : log) * 1.4426950408889634074;
                const double shifted = sum + magic;
                int64_t bits;
                std::memcpy(&bits, &shifted, 8);
                exponent[v][i] = int32_t(bits);
                fraction[i] = T(sum - (shifted - magic));
            }
            up[v] = exp2_fraction(load(fraction));
            down[v] = exp2_fraction(-load(fraction));
            from_start[v] = up[v] * power_of_two<T>(exponent[v]);
        }
        const int64_t last = steps - 1;
        for (int64_t v = 0; v * w < steps; ++v)
            to_end[v] = (up[last / w][last % w] * down[v]) * power_of_two<T>(exponent[last / w][last % w] - exponent[v]);
        total = from_start[last / w][last % w];
    }
    // From the steps of vector v to step i, not later than it.
    Vec<T> to(int64_t i, int64_t v) const {
        return (number(up, i) * down[v]) * power_of_two<T>(number(exponent, i) - exponent[v]);
    }
    template <class V> static auto number(const V* vectors, int64_t i) { return vectors[i / W<T>][i % W<T>]; }
};

// Lane numbers, to mask what lies above a diagonal.
template <class T> inline typename Vectors<T>::integers lane_numbers() {
    typename Vectors<T>::integers lane;
    for (int i = 0; i < W<T>; ++i) lane[i] = i;
    return lane;
}

// `count` rows of `width` numbers to a tile, filled up with zeros to `high` rows and whole vectors.
template <class T>
inline void load_tile(const T* in, int64_t stride, int64_t count, int64_t high, int64_t width, T* out) {
    const int64_t row = Ssd<T>::whole(width);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; j += W<T>) store(out + i * row + j, load_some(in + i * stride + j, width - j));
    std::fill(out + count * row, out + high * row, T(0));
}
template <class T> inline void store_tile(const T* tile, int64_t count, int64_t width, T* out, int64_t stride) {
    const int64_t row = Ssd<T>::whole(width);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; j += W<T>) store_some(out + i * stride + j, load(tile + i * row + j), width - j);
}

template <class T> inline T dot(const T* a, const T* b, int64_t count) {
    Vec<T> sum{};
    for (int64_t j = 0; j < count; j += W<T>) sum += load(a + j) * load(b + j);
    return sum_lanes<T>(sum);
}

// The mixing matrix of a head, scores times decays, in the rows' blocks below the diagonal.
template <class T>
inline void mix(const T* scores, const Decays<T>& decays, int64_t steps, int64_t wide, T* mixing) {
    constexpr int w = W<T>;
    const auto lane = lane_numbers<T>();
    for (int64_t i = 0; i < steps; ++i) {
        const int64_t end = std::min(wide, Ssd<T>::whole((i / block_rows + 1) * block_rows));
        T* to = mixing + i * wide;
        int64_t v = 0;
        for (; v <= i / w; ++v) {
            const Vec<T> mixed = load(scores + i * wide + v * w) * decays.to(i, v);
            store(to + v * w, lane + int(v * w) <= int(i) ? mixed : Vec<T>{});
        }
        for (; v * w < end; ++v) store(to + v * w, Vec<T>{});
    }
}

template <class T> struct SsdForward {
    const Ssd<T>& s;
    const int64_t P, N, Q;
    Arena<T> arena;
    T *B, *C, *B_transposed, *scores, *mixing, *x, *y, *states;
    Decays<T> decays;

    static int64_t widest_part(const Ssd<T>& s) { return (s.heads / s.groups + s.parts - 1) / s.parts; }
    explicit SsdForward(const Ssd<T>& s)
        : s(s), P(s.whole(s.p)), N(s.whole(s.n)), Q(s.whole(s.steps)),
          arena(3 * Q * N + 2 * Q * Q + 2 * Q * P + widest_part(s) * s.n * P) {
        B = arena.take(Q * N), C = arena.take(Q * N), B_transposed = arena.take(Q * N);
        scores = arena.take(Q * Q), mixing = arena.take(Q * Q);
        x = arena.take(Q * P), y = arena.take(Q * P), states = arena.take(widest_part(s) * s.n * P);
    }

    void run(const SsdTask& task, const T* initial, T* out, T* checkpoints, T* last) {
        std::fill(states, states + widest_part(s) * s.n * P, T(0));
        for (int64_t h = task.first; h < task.last && initial; ++h)
            transpose_tile(s.p, s.n, initial + s.state(task.b, h), s.n, state(task, h), P);
        for (int64_t c = 0; c < s.chunks(); ++c) {
            const int64_t begin = c * s.steps, steps = std::min(s.steps, s.length - begin), wide = s.whole(steps);
            load_tile(s.B.step(task.b, begin) + task.group * s.n, s.B.time, steps, wide, s.n, B);
            load_tile(s.C.step(task.b, begin) + task.group * s.n, s.C.time, steps, wide, s.n, C);
            transpose_tile(wide, s.n, B, N, B_transposed, wide);
            set_product<Part::lower_result>(steps, wide, s.n, rows(C, N), B_transposed, wide, scores, wide);
            for (int64_t h = task.first; h < task.last; ++h) {
                if (checkpoints) store_tile(state(task, h), s.n, s.p, checkpoints + s.checkpoint(task.b, c, h), s.p);
                chunk(task.b, h, begin, steps, state(task, h), out);
            }
        }
        for (int64_t h = task.first; h < task.last; ++h)
            transpose_tile(s.n, s.p, state(task, h), P, last + s.state(task.b, h), s.n);
    }
    T* state(const SsdTask& task, int64_t h) const { return states + (h - task.first) * s.n * P; }

    void chunk(int64_t b, int64_t h, int64_t begin, int64_t steps, T* S, T* out) {
        const int64_t wide = s.whole(steps);
        decays.set(s.log_decay + s.at(b, begin, h), s.heads, steps);
        load_tile(s.x.step(b, begin) + h * s.p, s.x.time, steps, wide, s.p, x);
        set_product(steps, P, s.n, rows(C, N), S, P, y, P);
        for (int64_t i = 0; i < steps; ++i) {
            const T decay = decays.number(decays.from_start, i), through = s.D ? s.D[h] : T(0);
            const T delta = s.delta ? s.delta[s.at(b, begin + i, h)] : T(1);
            for (int64_t j = i * P; j < (i + 1) * P; j += W<T>) {
                const Vec<T> input = load(x + j);
                store(y + j, s.D ? decay * load(y + j) + through * input : decay * load(y + j));
                store(x + j, delta * input);
            }
        }
        mix(scores, decays, steps, wide, mixing);
        add_product<Part::lower>(steps, P, steps, rows(mixing, wide), x, P, y, P);
        store_tile(y, steps, s.p, out + s.at(b, begin, h) * s.p, s.heads * s.p);
        scale_rows(x, decays.to_end, steps, P);
        for (int64_t j = 0; j < s.n * P; j += W<T>) store(S + j, decays.total * load(S + j));
        add_product(s.n, P, steps, columns(B, N), x, P, S, P);
    }

    static void scale_rows(T* tile, const Vec<T>* factors, int64_t count, int64_t row) {
        for (int64_t i = 0; i < count; ++i) {
            const T factor = Decays<T>::number(factors, i);
            for (int64_t j = i * row; j < (i + 1) * row; j += W<T>) store(tile + j, factor * load(tile + j));
        }
    }
};

template <class T>
void ssd_forward(const Ssd<T>& s, const T* initial, T* y, T* checkpoints, T* last, int threads) {
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        SsdForward<T> forward(s);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.tasks(); ++task) forward.run(SsdTask(s, task), initial, y, checkpoints, last);
    }
}

// The gradients that a backward pass writes; those of B and C by part of a group, and that of D by sequence, to be summed.
template <class T> struct SsdGradients {
    T *x, *log_decay, *delta, *B, *C, *D, *initial;
};

template <class T> struct SsdBackward {
    const Ssd<T>& s;
    const SsdGradients<T>& grad;
    const int64_t P, N, Q;
    Arena<T> arena;
    T *B, *C, *B_transposed, *scores, *mixing, *grad_mixing, *grad_scores, *grad_B, *grad_C, *read;
    T *x, *input, *input_transposed, *grad_y, *grad_input, *S, *square, *carries, *crossing, *written, *taken;
    Decays<T> decays;

    SsdBackward(const Ssd<T>& s, const SsdGradients<T>& grad)
        : s(s), grad(grad), P(s.whole(s.p)), N(s.whole(s.n)), Q(s.whole(s.steps)),
          arena(6 * Q * N + 4 * Q * Q + 5 * Q * P + s.n * P + s.p * N + SsdForward<T>::widest_part(s) * s.n * P + 3 * Q) {
        for (T** tile : {&B, &C, &B_transposed, &grad_B, &grad_C, &read}) *tile = arena.take(Q * N);
        for (T** tile : {&scores, &mixing, &grad_mixing, &grad_scores}) *tile = arena.take(Q * Q);
        for (T** tile : {&x, &input, &input_transposed, &grad_y, &grad_input}) *tile = arena.take(Q * P);
        S = arena.take(s.n * P), square = arena.take(s.p * N);
        carries = arena.take(SsdForward<T>::widest_part(s) * s.n * P);
        for (T** row : {&crossing, &written, &taken}) *row = arena.take(Q);
    }

    // `last`: the gradient of the last states.
    void run(const SsdTask& task, const T* checkpoints, const T* grad_out, const T* last) {
        std::fill(carries, carries + SsdForward<T>::widest_part(s) * s.n * P, T(0));
        for (int64_t h = task.first; h < task.last; ++h) {
            transpose_tile(s.p, s.n, last + s.state(task.b, h), s.n, carry(task, h), P);
            if (s.D) grad.D[task.b * s.heads + h] = 0;
        }
        for (int64_t c = s.chunks() - 1; c >= 0; --c) {
            const int64_t begin = c * s.steps, steps = std::min(s.steps, s.length - begin), wide = s.whole(steps);
            load_tile(s.B.step(task.b, begin) + task.group * s.n, s.B.time, steps, wide, s.n, B);
            load_tile(s.C.step(task.b, begin) + task.group * s.n, s.C.time, steps, wide, s.n, C);
            transpose_tile(wide, s.n, B, N, B_transposed, wide);
            set_product<Part::lower_result>(steps, wide, s.n, rows(C, N), B_transposed, wide, scores, wide);
            for (T* sum : {grad_B, grad_C}) std::fill(sum, sum + steps * N, T(0));
            std::fill(grad_scores, grad_scores + steps * wide, T(0));
            for (int64_t h = task.first; h < task.last; ++h)
                chunk(task.b, h, begin, steps, checkpoints + s.checkpoint(task.b, c, h), grad_out, carry(task, h));
            add_product<Part::lower>(steps, N, steps, rows(grad_scores, wide), B, N, grad_C, N);
            add_product<Part::upper>(steps, N, steps, columns(grad_scores, wide), C, N, grad_B, N);
            const int64_t at = (((task.part * s.batch + task.b) * s.length + begin) * s.groups + task.group) * s.n;
            store_tile(grad_B, steps, s.n, grad.B + at, s.groups * s.n);
            store_tile(grad_C, steps, s.n, grad.C + at, s.groups * s.n);
        }
        for (int64_t h = task.first; h < task.last; ++h)
            transpose_tile(s.n, s.p, carry(task, h), P, grad.initial + s.state(task.b, h), s.n);
    }
    T* carry(const SsdTask& task, int64_t h) const { return carries + (h - task.first) * s.n * P; }

    // One head in one chunk. `carry`: the gradient of the state after the chunk; it becomes that of the state before.
    void chunk(int64_t b, int64_t h, int64_t begin, int64_t steps, const T* before, const T* grad_out, T* carry) {
        const int64_t wide = s.whole(steps);
        decays.set(s.log_decay + s.at(b, begin, h), s.heads, steps);
        load_tile(s.x.step(b, begin) + h * s.p, s.x.time, steps, wide, s.p, x);
        load_tile(grad_out + s.at(b, begin, h) * s.p, s.heads * s.p, steps, wide, s.p, grad_y);
        load_tile(before, s.p, s.n, s.n, s.p, S);
        for (int64_t i = 0; i < wide; ++i) {
            const T delta = s.delta && i < steps ? s.delta[s.at(b, begin + i, h)] : T(1);
            for (int64_t j = i * P; j < (i + 1) * P; j += W<T>) store(input + j, delta * load(x + j));
        }
        transpose_tile(wide, s.p, input, P, input_transposed, wide);
        set_product<Part::lower_result>(steps, wide, s.p, rows(grad_y, P), input_transposed, wide, grad_mixing, wide);
        mix_backward(steps, wide);
        through_written(steps, carry);
        add_product<Part::upper>(steps, P, steps, columns(mixing, wide), grad_y, P, grad_input, P);
        write_inputs(b, h, begin, steps);
        const T kept = through_read(steps, carry);
        T before_now = 0, after = kept;
        for (int64_t i = 0; i < steps; ++i) after += taken[i];
        for (int64_t i = 0; i < steps; ++i) {
            grad.log_decay[s.at(b, begin + i, h)] = crossing[i] + before_now + after;
            before_now += written[i];
            after -= taken[i];
        }
    }

    // From the mixing matrix to the scores and the decays. crossing[t]: the sum over all pairs of steps that t lies between.
    void mix_backward(int64_t steps, int64_t wide) {
        constexpr int w = W<T>;
        const auto lane = lane_numbers<T>();
        T* columns_below = read;  // scratch: sums over the rows from i on
        std::fill(columns_below, columns_below + wide, T(0));
        for (int64_t i = steps - 1; i >= 0; --i) {
            const int64_t end = std::min(wide, Ssd<T>::whole((i / block_rows + 1) * block_rows));
            const int64_t row = i * wide;
            Vec<T> sum{};
            int64_t v = 0;
            for (; v <= i / w; ++v) {
                const auto at = lane + int(v * w);
                const Vec<T> decay = decays.to(i, v), through = load(grad_mixing + row + v * w) * decay;
                const Vec<T> mixed = load(scores + row + v * w) * decay;
                const Vec<T> to_scores = at <= int(i) ? through : Vec<T>{};
                store(mixing + row + v * w, at <= int(i) ? mixed : Vec<T>{});
                store(grad_scores + row + v * w, load(grad_scores + row + v * w) + to_scores);
                const Vec<T> below = load(columns_below + v * w) + to_scores * load(scores + row + v * w);
                store(columns_below + v * w, below);
                sum += at < int(i) ? below : Vec<T>{};
            }
            for (; v * w < end; ++v) store(mixing + row + v * w, Vec<T>{});
            crossing[i] = sum_lanes<T>(sum);
        }
    }

    // What a step has written to the state after the chunk. written[j]: its share in the gradient of that state's decays.
    void through_written(int64_t steps, const T* carry) {
        set_product(steps, P, s.n, rows(B, N), carry, P, grad_input, P);
        SsdForward<T>::scale_rows(grad_input, decays.to_end, steps, P);
        for (int64_t j = 0; j < steps; ++j) written[j] = dot(input + j * P, grad_input + j * P, P);
        transpose_tile(s.n, s.p, carry, P, square, N);
        SsdForward<T>::scale_rows(input, decays.to_end, steps, P);
        add_product(steps, N, s.p, rows(input, P), square, N, grad_B, N);
    }

    // What a step has read of the state before the chunk. taken[i]: its share in the gradient of the decays until it.
    T through_read(int64_t steps, T* carry) {
        SsdForward<T>::scale_rows(grad_y, decays.from_start, steps, P);
        transpose_tile(s.n, s.p, S, P, square, N);
        set_product(steps, N, s.p, rows(grad_y, P), square, N, read, N);
        for (int64_t i = 0; i < steps; ++i) taken[i] = dot(read + i * N, C + i * N, N);
        for (int64_t j = 0; j < steps * N; j += W<T>) store(grad_C + j, load(grad_C + j) + load(read + j));
        Vec<T> kept{};
        for (int64_t j = 0; j < s.n * P; j += W<T>) {
            const Vec<T> passed = decays.total * load(carry + j);
            kept += passed * load(S + j);
            store(carry + j, passed);
        }
        add_product(s.n, P, steps, columns(C, N), grad_y, P, carry, P);
        return sum_lanes<T>(kept);
    }

    void write_inputs(int64_t b, int64_t h, int64_t begin, int64_t steps) {
        T to_D = 0;
        for (int64_t i = 0; i < steps; ++i) {
            const int64_t at = s.at(b, begin + i, h), row = i * P;
            const T delta = s.delta ? s.delta[at] : T(1), through = s.D ? s.D[h] : T(0);
            if (s.delta) grad.delta[at] = dot(x + row, grad_input + row, P);
            if (s.D) to_D += dot(x + row, grad_y + row, P);
            for (int64_t j = 0; j < s.p; j += W<T>) {
                const Vec<T> scaled = delta * load(grad_input + row + j);
                store_some(grad.x + at * s.p + j, s.D ? scaled + through * load(grad_y + row + j) : scaled, s.p - j);
            }
        }
        if (s.D) grad.D[b * s.heads + h] += to_D;
    }
};

template <class T>
void ssd_backward(const Ssd<T>& s, const T* checkpoints, const T* grad_y, const T* last, const SsdGradients<T>& grad,
                  int threads) {
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        SsdBackward<T> backward(s, grad);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.tasks(); ++task) backward.run(SsdTask(s, task), checkpoints, grad_y, last);
    }
}

}  // namespace

#define SSD_ARGUMENTS(T)                                                                                                \
    int64_t batch, int64_t length, int64_t heads, int64_t groups, int64_t p, int64_t n, int64_t steps, int64_t parts,   \
        const T *x, int64_t x_batch, int64_t x_time, const T *B, int64_t B_batch, int64_t B_time, const T *C,           \
        int64_t C_batch, int64_t C_time, const T *log_decay, const T *delta, const T *D
#define SSD_VALUE                                                                                                       \
    {batch, length, heads, groups, p, n, steps, parts, {x, x_batch, x_time}, {B, B_batch, B_time},                      \
     {C, C_batch, C_time}, log_decay, delta, D}
#define SSD(T, SUFFIX)                                                                                                  \
    extern "C" void ssd_forward_##SUFFIX(SSD_ARGUMENTS(T), const T* initial, T* y, T* checkpoints, T* last,             \
                                         int threads) {                                                                 \
        ssd_forward<T>(SSD_VALUE, initial, y, checkpoints, last, threads);                                              \
    }                                                                                                                   \
    extern "C" void ssd_backward_##SUFFIX(SSD_ARGUMENTS(T), const T* checkpoints, const T* grad_y, const T* last,       \
                                          T* grad_x, T* grad_log_decay, T* grad_delta, T* grad_B, T* grad_C, T* grad_D, \
                                          T* grad_initial, int threads) {                                               \
        ssd_backward<T>(SSD_VALUE, checkpoints, grad_y, last,                                                           \
                        {grad_x, grad_log_decay, grad_delta, grad_B, grad_C, grad_D, grad_initial}, threads);           \
    }
SSD(float, f32)
SSD(double, f64)
