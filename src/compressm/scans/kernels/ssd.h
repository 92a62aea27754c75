#pragma once
#include "decays.h"
#include "products.h"

namespace {

// The scan with one decay per head: S_t = exp(l_t) S_{t-1} + delta_t B_t x_t^T,  y_t = C_t^T S_t + D x_t, with S (n, p).
//
// In chunks of `steps`, by matrix products of tiles: inside a chunk y_i = sum_{j <= i} (C_i . B_j) d_ij delta_j x_j with
// d_ij = exp(l_{j+1} + ... + l_i), and the state before the chunk adds d_i C_i^T S. Decays, delta and D are multiplied
// into the small factors of these products (D is on the diagonal of the first), never into x, y or their gradients. A
// task is one sequence and some heads of one group, whose scores C_i . B_j are computed once. The forward pass keeps the
// state before every chunk.
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
    int64_t most_heads() const { return (heads / groups + parts - 1) / parts; }  // of a task
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

// Lane numbers, to mask what lies above a diagonal.
template <class T> inline typename Vectors<T>::integers lane_numbers() {
    typename Vectors<T>::integers lane;
    for (int i = 0; i < W<T>; ++i) lane[i] = i;
    return lane;
}

// `count` rows of `width` numbers to a tile, whose rows are filled up with zeros to whole vectors; and back.
template <class T> inline void load_tile(const T* in, int64_t stride, int64_t count, int64_t width, T* out) {
    const int64_t row = Ssd<T>::whole(width);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; j += W<T>) store(out + i * row + j, load_some(in + i * stride + j, width - j));
}
template <class T> inline void store_tile(const T* tile, int64_t count, int64_t width, T* out, int64_t stride) {
    const int64_t row = Ssd<T>::whole(width);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; j += W<T>) store_some(out + i * stride + j, load(tile + i * row + j), width - j);
}

// The rows of a tile times factors.
template <class T> inline void scale_rows(const T* tile, const Vec<T>* factors, int64_t count, int64_t row, T* out) {
    for (int64_t i = 0; i < count; ++i) {
        const T factor = factors[i / W<T>][i % W<T>];
        for (int64_t j = i * row; j < (i + 1) * row; j += W<T>) store(out + j, factor * load(tile + j));
    }
}

// What the steps of a chunk write and read, of one group: B, C and their scores.
template <class T> struct SsdVectors {
    const int64_t N;
    T *B, *C, *scores, *transposed;

    SsdVectors(const Ssd<T>& s, Arena<T>& arena) : N(s.whole(s.n)) {
        const int64_t Q = s.whole(s.steps);
        B = arena.take(Q * N), C = arena.take(Q * N), scores = arena.take(Q * Q), transposed = arena.take(Q * N);
    }
    void set(const Ssd<T>& s, const SsdTask& task, int64_t begin, int64_t steps) {
        const int64_t wide = s.whole(steps), at = task.group * s.n;
        const T* from = s.B.step(task.b, begin) + at;
        load_tile(from, s.B.time, steps, s.n, B);
        load_tile(s.C.step(task.b, begin) + at, s.C.time, steps, s.n, C);
        transpose_tile(steps, s.n, from, s.B.time, transposed, wide);
        set_product<Part::lower_result>(steps, wide, s.n, rows(C, N), transposed, wide, scores, wide);
    }
};

template <class T> struct SsdForward {
    const Ssd<T>& s;
    const int64_t P, N, Q;
    Arena<T> arena;
    SsdVectors<T> vectors;
    T *written, *read, *mixing, *x, *y, *states;
    Decays<T> decays;

    explicit SsdForward(const Ssd<T>& s)
        : s(s), P(s.whole(s.p)), N(s.whole(s.n)), Q(s.whole(s.steps)),
          arena(5 * Q * N + 2 * Q * Q + 2 * Q * P + s.most_heads() * s.n * P), vectors(s, arena) {
        written = arena.take(Q * N), read = arena.take(Q * N), mixing = arena.take(Q * Q);
        x = arena.take(Q * P), y = arena.take(Q * P), states = arena.take(s.most_heads() * s.n * P);
    }

    void run(const SsdTask& task, const T* initial, T* out, T* checkpoints, T* last) {
        std::fill(states, states + s.most_heads() * s.n * P, T(0));
        for (int64_t h = task.first; h < task.last && initial; ++h)
            transpose_tile(s.p, s.n, initial + s.state(task.b, h), s.n, state(task, h), P);
        for (int64_t c = 0; c < s.chunks(); ++c) {
            const int64_t begin = c * s.steps, steps = std::min(s.steps, s.length - begin);
            vectors.set(s, task, begin, steps);
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
        const int64_t wide = s.whole(steps), at = s.at(b, begin, h);
        decays.set(s.log_decay + at, s.delta ? s.delta + at : nullptr, s.heads, steps);
        load_tile(s.x.step(b, begin) + h * s.p, s.x.time, steps, s.p, x);
        scale_rows(vectors.C, decays.from_start, steps, N, read);
        set_product(steps, P, s.n, rows(read, N), S, P, y, P);
        mix(steps, wide, s.D ? s.D[h] : T(0));
        add_product<Part::lower>(steps, P, steps, rows(mixing, wide), x, P, y, P);
        store_tile(y, steps, s.p, out + at * s.p, s.heads * s.p);
        scale_rows(vectors.B, decays.delta_to_end, steps, N, written);
        for (int64_t j = 0; j < s.n * P; j += W<T>) store(S + j, decays.total * load(S + j));
        add_product(s.n, P, steps, columns(written, N), x, P, S, P);
    }

    // The mixing matrix of a head: scores times decays and delta, and D on the diagonal, in the rows' blocks below it.
    void mix(int64_t steps, int64_t wide, T D) {
        constexpr int w = W<T>;
        const auto lane = lane_numbers<T>();
        for (int64_t i = 0; i < steps; ++i) {
            const int64_t end = std::min(wide, s.whole((i / block_rows + 1) * block_rows)), row = i * wide;
            int64_t v = 0;
            for (; v <= i / w; ++v) {
                const Vec<T> mixed = load(vectors.scores + row + v * w) * (decays.to(i, v) * decays.delta[v]);
                store(mixing + row + v * w, lane + int(v * w) <= int(i) ? mixed : Vec<T>{});
            }
            for (; v * w < end; ++v) store(mixing + row + v * w, Vec<T>{});
            mixing[row + i] += D;
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
    SsdVectors<T> vectors;
    T *written, *read, *product, *grad_B, *grad_C, *mixing, *grad_mixing, *grad_scores, *x_transposed, *grad_y, *grad_x;
    T *square, *carries, *crossing, *below, *to_written, *to_read;
    Decays<T> decays;

    SsdBackward(const Ssd<T>& s, const SsdGradients<T>& grad)
        : s(s), grad(grad), P(s.whole(s.p)), N(s.whole(s.n)), Q(s.whole(s.steps)),
          arena(8 * Q * N + 4 * Q * Q + 3 * Q * P + P * N + s.most_heads() * s.n * P + 4 * Q), vectors(s, arena) {
        for (T** tile : {&written, &read, &product, &grad_B, &grad_C}) *tile = arena.take(Q * N);
        for (T** tile : {&mixing, &grad_mixing, &grad_scores}) *tile = arena.take(Q * Q);
        for (T** tile : {&x_transposed, &grad_y, &grad_x}) *tile = arena.take(Q * P);
        square = arena.take(P * N), carries = arena.take(s.most_heads() * s.n * P);
        for (T** row : {&crossing, &below, &to_written, &to_read}) *row = arena.take(Q);
    }

    // `last`: the gradient of the last states.
    void run(const SsdTask& task, const T* checkpoints, const T* grad_out, const T* last) {
        std::fill(carries, carries + s.most_heads() * s.n * P, T(0));
        for (int64_t h = task.first; h < task.last; ++h) {
            transpose_tile(s.p, s.n, last + s.state(task.b, h), s.n, carry(task, h), P);
            if (s.D) grad.D[task.b * s.heads + h] = 0;
        }
        for (int64_t c = s.chunks() - 1; c >= 0; --c) {
            const int64_t begin = c * s.steps, steps = std::min(s.steps, s.length - begin), wide = s.whole(steps);
            vectors.set(s, task, begin, steps);
            for (T* sum : {grad_B, grad_C}) std::fill(sum, sum + steps * N, T(0));
            std::fill(grad_scores, grad_scores + steps * wide, T(0));
            for (int64_t h = task.first; h < task.last; ++h)
                chunk(task.b, h, begin, steps, checkpoints + s.checkpoint(task.b, c, h), grad_out, carry(task, h));
            add_product<Part::lower>(steps, N, steps, rows(grad_scores, wide), vectors.B, N, grad_C, N);
            add_product<Part::upper>(steps, N, steps, columns(grad_scores, wide), vectors.C, N, grad_B, N);
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
        const int64_t wide = s.whole(steps), at = s.at(b, begin, h);
        decays.set(s.log_decay + at, s.delta ? s.delta + at : nullptr, s.heads, steps);
        transpose_tile(steps, s.p, s.x.step(b, begin) + h * s.p, s.x.time, x_transposed, wide);
        load_tile(grad_out + at * s.p, s.heads * s.p, steps, s.p, grad_y);
        set_product<Part::lower_result>(steps, wide, s.p, rows(grad_y, P), x_transposed, wide, grad_mixing, wide);
        double to_D = 0;
        for (int64_t i = 0; i < steps; ++i) to_D += grad_mixing[i * wide + i];
        if (s.D) grad.D[b * s.heads + h] += T(to_D);
        mix(steps, wide, s.D ? s.D[h] : T(0));
        through_written(steps, wide, carry);
        add_product<Part::upper>(steps, P, steps, columns(mixing, wide), grad_y, P, grad_x, P);
        store_tile(grad_x, steps, s.p, grad.x + at * s.p, s.heads * s.p);
        write_factors(at, steps, through_read(steps, before, carry));
    }

    // The mixing matrix again, and from its gradient those of scores, decays and delta. crossing[t]: the sum over all pairs
    // of steps that t lies between; below[j]: over all steps from j on. No terms cancel in these sums.
    void mix(int64_t steps, int64_t wide, T D) {
        constexpr int w = W<T>;
        const auto lane = lane_numbers<T>();
        std::fill(below, below + wide, T(0));
        for (int64_t i = steps - 1; i >= 0; --i) {
            const int64_t end = std::min(wide, s.whole((i / block_rows + 1) * block_rows)), row = i * wide;
            Vec<T> sum{};
            int64_t v = 0;
            for (; v <= i / w; ++v) {
                const auto step = lane + int(v * w);
                const Vec<T> decay = decays.to(i, v), delta = decays.delta[v], score = load(vectors.scores + row + v * w);
                const Vec<T> mixed = score * (decay * delta), through = load(grad_mixing + row + v * w) * decay;
                const Vec<T> to_score = step <= int(i) ? through : Vec<T>{};
                const Vec<T> column = load(below + v * w) + (step <= int(i) ? to_score * score : Vec<T>{});
                store(mixing + row + v * w, step <= int(i) ? mixed : Vec<T>{});
                store(grad_scores + row + v * w, load(grad_scores + row + v * w) + to_score * delta);
                store(below + v * w, column);
                sum += step < int(i) ? column * delta : Vec<T>{};
            }
            for (; v * w < end; ++v) store(mixing + row + v * w, Vec<T>{});
            mixing[row + i] += D;
            crossing[i] = sum_lanes<T>(sum);
        }
    }

    // What the steps have written to the state after the chunk. to_written[j]: the gradient of delta_j by that way.
    void through_written(int64_t steps, int64_t wide, const T* carry) {
        scale_rows(vectors.B, decays.delta_to_end, steps, N, written);
        set_product(steps, P, s.n, rows(written, N), carry, P, grad_x, P);
        transpose_tile(s.n, s.p, carry, P, square, N);
        set_product(steps, N, s.p, columns(x_transposed, wide), square, N, product, N);
        add_rows(vectors.B, decays.delta_to_end, steps, grad_B, to_written);
        for (int64_t j = 0; j < steps; ++j) to_written[j] *= decays.number(decays.to_end, j);
    }

    // What the steps have read of the state before the chunk. to_read[i]: the gradient of the decays until i by that way.
    // Returns the gradient of the chunk's decay by way of the states alone.
    T through_read(int64_t steps, const T* before, T* carry) {
        transpose_tile(s.n, s.p, before, s.p, square, N);
        set_product(steps, N, s.p, rows(grad_y, P), square, N, product, N);
        add_rows(vectors.C, decays.from_start, steps, grad_C, to_read);
        for (int64_t i = 0; i < steps; ++i) to_read[i] *= decays.number(decays.from_start, i);
        Vec<T> kept{};
        for (int64_t k = 0; k < s.n; ++k)
            for (int64_t j = 0; j < s.p; j += W<T>) {
                const Vec<T> passed = decays.total * load(carry + k * P + j);
                kept += passed * load_some(before + k * s.p + j, s.p - j);
                store(carry + k * P + j, passed);
            }
        scale_rows(vectors.C, decays.from_start, steps, N, read);
        add_product(s.n, P, steps, columns(read, N), grad_y, P, carry, P);
        return sum_lanes<T>(kept);
    }

    // Adds the rows of `product`, times factors, to `sum`; dots[i]: row i times row i of `with`.
    void add_rows(const T* with, const Vec<T>* factors, int64_t steps, T* sum, T* dots) const {
        for (int64_t i = 0; i < steps; ++i) {
            const T factor = decays.number(factors, i);
            Vec<T> dot{};
            for (int64_t j = i * N; j < (i + 1) * N; j += W<T>) {
                const Vec<T> row = load(product + j);
                dot += row * load(with + j);
                store(sum + j, load(sum + j) + factor * row);
            }
            dots[i] = sum_lanes<T>(dot);
        }
    }

    void write_factors(int64_t at, int64_t steps, T kept) {
        T earlier = 0, later = kept;
        for (int64_t i = 0; i < steps; ++i) later += to_read[i];
        for (int64_t i = 0; i < steps; ++i) {
            grad.log_decay[at + i * s.heads] = crossing[i] + earlier + later;
            if (s.delta) grad.delta[at + i * s.heads] = below[i] + to_written[i];
            earlier += to_written[i] * decays.number(decays.delta, i);
            later -= to_read[i];
        }
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
