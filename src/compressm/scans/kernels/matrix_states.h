#pragma once
#include "products.h"

namespace {

// What the kernels share whose state is a matrix per head, S (n, p): gated linear attention and the delta rule.
//
// A head of a sequence is one task, done by one thread, chunk by chunk; all of a chunk stays in the first two caches.
// The forward pass keeps the state before every `kept_chunks` chunks. The backward pass computes those between again.

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

// Sequences (batch, length, heads, m), contiguous; states (batch, heads, p, n); kept states (batch, heads, kept, n, p).
struct Heads {
    int64_t batch, length, heads, p, n;
    int64_t kept() const { return (length + kept_steps - 1) / kept_steps; }
    int64_t chunks() const { return (length + chunk_steps - 1) / chunk_steps; }
};

// One head of one sequence.
struct Head {
    Heads of;
    int64_t sequence, head;
    Head(const Heads& of, int64_t task) : of(of), sequence(task / of.heads), head(task % of.heads) {}
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
};

template <class T> inline void copy_rows(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, size_t(columns) * sizeof(T));
}

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

}  // namespace
