#pragma once
#include "products.h"

namespace {

// What the kernels share whose state is a matrix per head, S (n, p): gated linear attention and the delta rule.
//
// Some heads of a sequence are one task, done by one thread, chunk by chunk; all of a chunk stays in the first two caches.
// The heads of a step lie side by side in memory: those of a chunk are done one after the other, while the addresses of
// its pages are known to the processor. The forward pass keeps the state before every `kept_chunks` chunks. The backward
// pass computes those between again.

constexpr int64_t chunk_steps = 16, kept_chunks = 4, kept_steps = chunk_steps * kept_chunks;

// A matrix whose rows are whole vectors; zero at first.
template <class T> struct Tile {
    int64_t width;
    std::vector<Vec<T>> numbers;
    Tile(int64_t rows, int64_t columns)
        : width((columns + W<T> - 1) / W<T> * W<T>), numbers(size_t(rows * (width / W<T>)), Vec<T>{}) {}
    T* row(int64_t i) { return reinterpret_cast<T*>(numbers.data()) + i * width; }
    const T* row(int64_t i) const { return reinterpret_cast<const T*>(numbers.data()) + i * width; }
};

template <class T> inline void copy_rows(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, size_t(columns) * sizeof(T));
}

// Sequences (batch, length, heads, m), contiguous; states (batch, heads, p, n); kept states (batch, heads, kept, n, p).
struct Heads {
    int64_t batch, length, heads, p, n;
    int64_t kept() const { return (length + kept_steps - 1) / kept_steps; }
    int64_t chunks() const { return (length + chunk_steps - 1) / chunk_steps; }
};

// One head of one sequence.
struct Head {
    const Heads& of;
    int64_t sequence, head;
    int64_t steps(int64_t chunk) const { return std::min(chunk_steps, of.length - chunk * chunk_steps); }
    // Where the chunk begins in sequences of m numbers.
    int64_t at(int64_t chunk, int64_t m) const {
        return ((sequence * of.length + chunk * chunk_steps) * of.heads + head) * m;
    }
    int64_t state() const { return (sequence * of.heads + head) * of.p * of.n; }
    int64_t kept(int64_t group) const { return ((sequence * of.heads + head) * of.kept() + group) * of.p * of.n; }

    // The steps that a chunk lacks at the end are zero.
    template <class T> void take(const T* from, int64_t chunk, int64_t m, T* to, int64_t width) const {
        const int64_t some = steps(chunk);
        from += at(chunk, m);
        for (int64_t t = 0; t < chunk_steps; ++t, from += of.heads * m, to += width) {
            const int64_t count = t < some ? m : 0;
            for (int64_t i = 0; i < width; i += W<T>) store(to + i, i < count ? load_some(from + i, count - i) : Vec<T>{});
        }
    }
    template <class T> void give(const T* from, int64_t width, int64_t chunk, int64_t m, T* to) const {
        to += at(chunk, m);
        for (int64_t t = 0; t < steps(chunk); ++t, to += of.heads * m, from += width)
            for (int64_t i = 0; i < m; i += W<T>) store_some(to + i, load(from + i), m - i);
    }

    // States are transposed while they are computed with, and so are those that are kept.
    template <class T> void take_state(const T* from, Tile<T>& tile) const {
        transpose_tile(of.p, of.n, from + state(), of.n, tile.row(0), tile.width);
    }
    template <class T> void give_state(const Tile<T>& tile, T* to) const {
        transpose_tile(of.n, of.p, tile.row(0), tile.width, to + state(), of.n);
    }
    template <class T> void keep_state(const Tile<T>& tile, T* kept_states, int64_t group) const {
        copy_rows(of.n, of.p, tile.row(0), tile.width, kept_states + kept(group), of.p);
    }
    template <class T> void kept_state(const T* kept_states, int64_t group, Tile<T>& tile) const {
        copy_rows(of.n, of.p, kept_states + kept(group), of.p, tile.row(0), tile.width);
    }
};

template <class T> inline void scale_row(T* to, const T* from, T factor, int64_t width) {
    for (int64_t i = 0; i < width; i += W<T>) store(to + i, factor * load(from + i));
}

template <class T> inline Vec<T> multiply_lanes(const T* a, const T* b, int64_t width) {
    Vec<T> sum{};
    for (int64_t i = 0; i < width; i += W<T>) sum += load(a + i) * load(b + i);
    return sum;
}
template <class T> inline T dot(const T* a, const T* b, int64_t width) { return sum_lanes<T>(multiply_lanes(a, b, width)); }

// A decay by which rows of states are multiplied. Where it is slow, what it takes away is known to more digits than what it
// leaves: rounding 1 - 1e-7 at every chunk would add up over a long sequence.
template <class T> struct Decay {
    T keeps, takes;
    bool slow;
    explicit Decay(double keeps = 1.) : keeps(T(keeps)), takes(T(1. - keeps)), slow(keeps > 0.5) {}
    void apply(T* row, int64_t width) const {
        if (slow && takes == 0) return;
        for (int64_t i = 0; i < width; i += W<T>) {
            const Vec<T> v = load(row + i);
            store(row + i, slow ? v - takes * v : keeps * v);
        }
    }
};

// exp of `count` numbers, a multiple of the lanes.
template <class T> inline void exp_in_place(T* x, int64_t count) {
    for (int64_t i = 0; i < count; i += W<T>) store(x + i, exp2<T>(load(x + i) * T(1.4426950408889634074)));
}

// How many heads a task has: as many as have room in the second cache with their states, if enough tasks are left.
template <class T> int64_t heads_of_task(const Heads& s, int64_t states, int threads) {
    const int64_t room = (int64_t(1) << 18) / (states * s.n * s.p * int64_t(sizeof(T)) + 1);
    const int64_t busy = s.batch * s.heads / (4 * threads);
    return std::max<int64_t>(1, std::min({room, busy, s.heads}));
}

// One of the tasks: heads [first, last) of a sequence.
struct HeadsTask {
    int64_t sequence, first, last;
    HeadsTask(const Heads& s, int64_t together, int64_t task) {
        const int64_t tasks = count(s, together) / s.batch;
        sequence = task / tasks, first = task % tasks * together, last = std::min(first + together, s.heads);
    }
    static int64_t count(const Heads& s, int64_t together) { return s.batch * ((s.heads + together - 1) / together); }
    template <class Function> void each_head(const Heads& s, Function function) const {
        for (int64_t h = first; h < last; ++h) function(Head{s, sequence, h}, size_t(h - first));
    }
};

// All heads forward. `Pass` is made of `arguments`; its `chunk(head, number, state)` computes a chunk, and takes the state
// (n, p) from before the chunk to after it.
template <class Pass, class Arguments, class T>
void run_forward(const Heads& s, const Arguments& arguments, const T* initial, T* last, T* kept, int threads) {
    const int64_t together = heads_of_task<T>(s, 1, threads);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        Pass pass(arguments);
        std::vector<Tile<T>> states(size_t(together), Tile<T>(s.n, s.p));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < HeadsTask::count(s, together); ++i) {
            const HeadsTask task(s, together, i);
            task.each_head(s, [&](const Head& head, size_t h) { head.take_state(initial, states[h]); });
            for (int64_t chunk = 0; chunk < s.chunks(); ++chunk)
                task.each_head(s, [&](const Head& head, size_t h) {
                    if (kept && chunk % kept_chunks == 0) head.keep_state(states[h], kept, chunk / kept_chunks);
                    pass.chunk(head, chunk, states[h]);
                });
            task.each_head(s, [&](const Head& head, size_t h) { head.give_state(states[h], last); });
        }
    }
}

// All heads backward. `Pass` has `advance(head, number, state)`, which takes the state from before a chunk to after it, and
// `chunk(head, number, state, gradient)`, which computes a chunk's gradients from the state before it, and takes the
// state's gradient from after the chunk to before it. carry (batch, heads, p, n): in: gradient of the last state, out: of
// the initial one.
template <class Pass, class Arguments, class T>
void run_backward(const Heads& s, const Arguments& arguments, const T* kept, T* carry, int threads) {
    const int64_t together = heads_of_task<T>(s, kept_chunks + 1, threads);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        Pass pass(arguments);
        std::vector<Tile<T>> gradients(size_t(together), Tile<T>(s.n, s.p));
        std::vector<std::vector<Tile<T>>> states(kept_chunks, gradients);  // before each chunk between two kept states
#pragma omp for schedule(static)
        for (int64_t i = 0; i < HeadsTask::count(s, together); ++i) {
            const HeadsTask task(s, together, i);
            task.each_head(s, [&](const Head& head, size_t h) { head.take_state(carry, gradients[h]); });
            for (int64_t group = s.kept() - 1; group >= 0; --group) {
                const int64_t first = group * kept_chunks, some = std::min(kept_chunks, s.chunks() - first);
                task.each_head(s, [&](const Head& head, size_t h) { head.kept_state(kept, group, states[0][h]); });
                for (int64_t c = 1; c < some; ++c)
                    task.each_head(s, [&](const Head& head, size_t h) {
                        states[size_t(c)][h].numbers = states[size_t(c - 1)][h].numbers;
                        pass.advance(head, first + c - 1, states[size_t(c)][h]);
                    });
                for (int64_t c = some - 1; c >= 0; --c)
                    task.each_head(s, [&](const Head& head, size_t h) {
                        pass.chunk(head, first + c, states[size_t(c)][h], gradients[h]);
                    });
            }
            task.each_head(s, [&](const Head& head, size_t h) { head.give_state(gradients[h], carry); });
        }
    }
}

}  // namespace
