#pragma once
#include "matrix_states.h"

namespace {

// The delta rule: S_t = a_t S_{t-1} + k_t u_t^T,  u_t = beta_t w_t,  w_t = v_t - a_t S_{t-1}^T k_t,  y_t = S_t^T q_t
// In a chunk that begins with the state S, with D_ij the decay over j+1..i and g_i that over 0..i, the w solve
//     w_i + sum_{j<i} A_ij beta_j w_j = v_i - g_i S^T k_i,   A_ij = D_ij k_i . k_j (j < i)
//     y_i = g_i S^T q_i + sum_{j<=i} M_ij u_j,               M_ij = D_ij q_i . k_j (j <= i)
// (Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024). The w are kept for the backward pass.

template <class T> struct Delta : Heads {
    const T *log_decay, *beta, *k, *q;
};

// The decays of a chunk, as products in double precision: they stay exact however strong and however slow they are.
template <class T> struct ChunkDecays {
    T between[chunk_steps][chunk_steps], since[chunk_steps];  // D, g
    Decay<T> whole;
    T to_end(int64_t step) const { return between[chunk_steps - 1][step]; }

    void compute(const Head& head, int64_t chunk, const T* log_decay) {
        double decays[chunk_steps] = {}, row[chunk_steps] = {}, start = 1.;
        const int64_t first = head.at(chunk, 1);
        for (int64_t i = 0; i < head.steps(chunk); ++i) decays[i] = double(log_decay[first + i * head.of.heads]);
        exp_in_place(decays, chunk_steps);
        for (int64_t i = 0; i < chunk_steps; ++i) {
            for (int64_t j = 0; j < chunk_steps; ++j) row[j] *= decays[i];
            row[i] = 1.;
            since[i] = T(start *= decays[i]);
            for (int64_t j = 0; j < chunk_steps; ++j) between[i][j] = T(row[j]);
        }
        whole = Decay<T>(start);
    }
};

// w_i -= sum_j c_ij w_j for one step after the other, over the steps before it (or after it, from the last one back).
template <class T, int V, bool forward> inline void substitute_columns(const T* c, T* w, int64_t width) {
    for (int64_t at = 1; at < chunk_steps; ++at) {
        const int64_t i = forward ? at : chunk_steps - 1 - at;
        Vec<T> sums[V];
        for (int v = 0; v < V; ++v) sums[v] = load(w + i * width + v * W<T>);
        for (int64_t j = forward ? 0 : i + 1; j < (forward ? i : chunk_steps); ++j)
            for (int v = 0; v < V; ++v) sums[v] -= c[i * chunk_steps + j] * load(w + j * width + v * W<T>);
        for (int v = 0; v < V; ++v) store(w + i * width + v * W<T>, sums[v]);
    }
}
template <class T, bool forward> inline void substitute(const T* c, Tile<T>& w) {
    int64_t at = 0;
    for (; at + 4 * W<T> <= w.width; at += 4 * W<T>) substitute_columns<T, 4, forward>(c, w.row(0) + at, w.width);
    for (; at < w.width; at += W<T>) substitute_columns<T, 1, forward>(c, w.row(0) + at, w.width);
}

// A chunk of a head: the arguments, and the matrices that both passes make of them.
template <class T> struct DeltaChunk {
    const Delta<T>& s;
    ChunkDecays<T> decays;
    T beta[chunk_steps];
    Tile<T> k, q, keys, A, M, reading, storing, w, u;  // reading: q, then -k, decayed since the start (2 chunks of rows)

    explicit DeltaChunk(const Delta<T>& s)
        : s(s), k(chunk_steps, s.n), q(chunk_steps, s.n), keys(s.n, chunk_steps), A(chunk_steps, chunk_steps),
          M(chunk_steps, chunk_steps), reading(2 * chunk_steps, s.n), storing(chunk_steps, s.n), w(chunk_steps, s.p),
          u(chunk_steps, s.p) {}

    void take_keys(const Head& head, int64_t chunk) {
        decays.compute(head, chunk, s.log_decay);
        head.take(s.k, chunk, s.n, k.row(0), k.width);
        for (int64_t i = 0; i < chunk_steps; ++i) {
            beta[i] = i < head.steps(chunk) ? s.beta[head.at(chunk, 1) + i * s.heads] : T(0);
            scale_row(storing.row(i), k.row(i), decays.to_end(i), k.width);
        }
    }
    void take_queries(const Head& head, int64_t chunk) {
        head.take(s.q, chunk, s.n, q.row(0), q.width);
        for (int64_t i = 0; i < chunk_steps; ++i) {
            scale_row(reading.row(i), q.row(i), decays.since[i], q.width);
            scale_row(reading.row(chunk_steps + i), k.row(i), -decays.since[i], k.width);
        }
        transpose_tile(chunk_steps, s.n, k.row(0), k.width, keys.row(0), keys.width);
        set_product(chunk_steps, chunk_steps, s.n, rows(k.row(0), k.width), keys.row(0), keys.width, A.row(0), A.width);
        set_product(chunk_steps, chunk_steps, s.n, rows(q.row(0), q.width), keys.row(0), keys.width, M.row(0), M.width);
        for (int64_t i = 0; i < chunk_steps; ++i)
            for (int64_t j = 0; j < chunk_steps; ++j) {
                A.row(i)[j] = j < i ? A.row(i)[j] * decays.between[i][j] : T(0);
                M.row(i)[j] = j <= i ? M.row(i)[j] * decays.between[i][j] : T(0);
            }
    }
    void write() {
        for (int64_t i = 0; i < chunk_steps; ++i) scale_row(u.row(i), w.row(i), beta[i], w.width);
    }
    // From the state before the chunk to the one after it.
    void advance(Tile<T>& state) const {
        for (int64_t i = 0; i < s.n; ++i) decays.whole.apply(state.row(i), state.width);
        add_product(s.n, state.width, chunk_steps, columns(storing.row(0), storing.width), u.row(0), u.width, state.row(0),
                    state.width);
    }
};

template <class T> struct DeltaForward {
    struct Arguments {
        Delta<T> s;
        const T* v;
        T *y, *written;
    };
    const Arguments& given;
    DeltaChunk<T> c;
    Tile<T> out;

    explicit DeltaForward(const Arguments& given) : given(given), c(given.s), out(chunk_steps, given.s.p) {}

    void chunk(const Head& head, int64_t chunk, Tile<T>& state) {
        const int64_t width = state.width, n = c.s.n, p = c.s.p;
        T system[chunk_steps * chunk_steps];
        c.take_keys(head, chunk);
        c.take_queries(head, chunk);
        head.take(given.v, chunk, p, c.w.row(0), width);
        add_product(chunk_steps, width, n, rows(c.reading.row(chunk_steps), c.k.width), state.row(0), width, c.w.row(0), width);
        for (int64_t i = 0; i < chunk_steps; ++i)
            for (int64_t j = 0; j < chunk_steps; ++j) system[i * chunk_steps + j] = c.A.row(i)[j] * c.beta[j];
        substitute<T, true>(system, c.w);
        c.write();
        set_product(chunk_steps, width, n, rows(c.reading.row(0), c.q.width), state.row(0), width, out.row(0), width);
        add_product<Part::lower>(chunk_steps, width, chunk_steps, rows(c.M.row(0), c.M.width), c.u.row(0), width, out.row(0),
                                 width);
        head.give(out.row(0), width, chunk, p, given.y);
        if (given.written) head.give(c.w.row(0), width, chunk, p, given.written);
        c.advance(state);
    }
};

// The backward pass of a chunk. `z` is the gradient of v, and so of -g_i S^T k_i.
template <class T> struct DeltaBackward {
    struct Arguments {
        Delta<T> s;
        const T *written, *grad_y;
        T *v, *log_decay, *beta, *k, *q;  // their gradients
    };
    const Arguments& to;
    const Delta<T>& s;
    DeltaChunk<T> c;
    Tile<T> incoming, gradient, transposed, values, products, read, stored, mixing, among, sum;
    T to_between[chunk_steps][chunk_steps], to_read[chunk_steps], to_store[chunk_steps];

    explicit DeltaBackward(const Arguments& to)
        : to(to), s(to.s), c(s), incoming(2 * chunk_steps, s.p),
          gradient(chunk_steps, s.p), transposed(s.p, s.n), values(s.p, chunk_steps), products(2 * chunk_steps, chunk_steps),
          read(2 * chunk_steps, s.n), stored(chunk_steps, s.n), mixing(chunk_steps, chunk_steps),
          among(chunk_steps, chunk_steps), sum(chunk_steps, s.n) {}

    // `incoming`: the gradient of y, then z.
    void solve(const Head& head, int64_t chunk, const Tile<T>& grad_state) {
        const int64_t width = grad_state.width;
        T system[chunk_steps * chunk_steps];
        head.take(to.grad_y, chunk, s.p, incoming.row(0), width);
        set_product(chunk_steps, width, s.n, rows(c.storing.row(0), c.storing.width), grad_state.row(0), width,
                    gradient.row(0), width);
        add_product<Part::upper>(chunk_steps, width, chunk_steps, columns(c.M.row(0), c.M.width), incoming.row(0), width,
                                 gradient.row(0), width);
        for (int64_t i = 0; i < chunk_steps; ++i)
            for (int64_t j = 0; j < chunk_steps; ++j) system[j * chunk_steps + i] = c.A.row(i)[j] * c.beta[i];
        substitute<T, false>(system, gradient);
        for (int64_t i = 0; i < chunk_steps; ++i) {
            if (i < head.steps(chunk)) to.beta[head.at(chunk, 1) + i * s.heads] = dot(c.w.row(i), gradient.row(i), width);
            scale_row(incoming.row(chunk_steps + i), gradient.row(i), c.beta[i], width);
        }
        head.give(incoming.row(chunk_steps), width, chunk, s.p, to.v);
    }

    // Through the state before the chunk, and through what the chunk adds to the one after it.
    void through_states(const Tile<T>& state, const Tile<T>& grad_state) {
        transpose_tile(s.n, s.p, state.row(0), state.width, transposed.row(0), transposed.width);
        set_product(2 * chunk_steps, read.width, s.p, rows(incoming.row(0), incoming.width), transposed.row(0),
                    transposed.width, read.row(0), read.width);
        transpose_tile(s.n, s.p, grad_state.row(0), state.width, transposed.row(0), transposed.width);
        set_product(chunk_steps, stored.width, s.p, rows(c.u.row(0), c.u.width), transposed.row(0), transposed.width,
                    stored.row(0), stored.width);
        for (int64_t i = 0; i < chunk_steps; ++i) {
            scale_row(read.row(i), read.row(i), c.decays.since[i], read.width);
            scale_row(read.row(chunk_steps + i), read.row(chunk_steps + i), -c.decays.since[i], read.width);
            scale_row(stored.row(i), stored.row(i), c.decays.to_end(i), stored.width);
            to_read[i] = dot(c.q.row(i), read.row(i), read.width) + dot(c.k.row(i), read.row(chunk_steps + i), read.width);
            to_store[i] = dot(c.k.row(i), stored.row(i), stored.width);
        }
    }

    // Through the chunk's triangles.
    void inside() {
        transpose_tile(chunk_steps, s.p, c.u.row(0), c.u.width, values.row(0), values.width);
        set_product(2 * chunk_steps, chunk_steps, s.p, rows(incoming.row(0), incoming.width), values.row(0), values.width,
                    products.row(0), products.width);
        for (int64_t i = 0; i < chunk_steps; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                const T to_M = products.row(i)[j], to_A = j < i ? -products.row(chunk_steps + i)[j] : T(0);
                to_between[i][j] = j < i ? to_M * c.M.row(i)[j] + to_A * c.A.row(i)[j] : T(0);
                mixing.row(i)[j] = to_M * c.decays.between[i][j];
                among.row(i)[j] = among.row(j)[i] = to_A * c.decays.between[i][j];
            }
    }

    void give_keys(const Head& head, int64_t chunk) {
        const int64_t width = c.k.width;
        copy_rows(chunk_steps, width, read.row(0), width, sum.row(0), width);
        add_product<Part::lower>(chunk_steps, width, chunk_steps, rows(mixing.row(0), mixing.width), c.k.row(0), width,
                                 sum.row(0), width);
        head.give(sum.row(0), width, chunk, s.n, to.q);
        for (int64_t i = 0; i < chunk_steps * width; i += W<T>)
            store(sum.row(0) + i, load(read.row(chunk_steps) + i) + load(stored.row(0) + i));
        add_product<Part::upper>(chunk_steps, width, chunk_steps, columns(mixing.row(0), mixing.width), c.q.row(0), width,
                                 sum.row(0), width);
        add_product(chunk_steps, width, chunk_steps, rows(among.row(0), among.width), c.k.row(0), width, sum.row(0), width);
        head.give(sum.row(0), width, chunk, s.n, to.k);
    }

    // The decay of step t is in every D_ij with j < t <= i, in g_i with i >= t, and in what steps before t store. No two
    // of the sums' terms cancel by construction, so the gradients of strong decays keep their digits.
    void give_decays(const Head& head, int64_t chunk, const Tile<T>& state, const Tile<T>& grad_state) const {
        Vec<T> lanes{};
        for (int64_t i = 0; i < s.n; ++i) lanes += multiply_lanes(state.row(i), grad_state.row(i), state.width);
        T sums[chunk_steps] = {}, read_later = 0, stored_before = sum_lanes<T>(lanes) * c.decays.since[chunk_steps - 1];
        for (int64_t i = 1; i < chunk_steps; ++i) {
            T before = 0;
            for (int64_t t = 1; t <= i; ++t) sums[t] += before += to_between[i][t - 1];
        }
        for (int64_t t = chunk_steps - 1; t >= 0; --t) sums[t] += read_later += to_read[t];
        for (int64_t t = 0; t < chunk_steps; stored_before += to_store[t++]) sums[t] += stored_before;
        for (int64_t t = 0; t < head.steps(chunk); ++t) to.log_decay[head.at(chunk, 1) + t * s.heads] = sums[t];
    }

    void chunk(const Head& head, int64_t chunk, const Tile<T>& state, Tile<T>& grad_state) {
        take(head, chunk);
        c.take_queries(head, chunk);
        solve(head, chunk, grad_state);
        through_states(state, grad_state);
        inside();
        give_keys(head, chunk);
        give_decays(head, chunk, state, grad_state);
        for (int64_t i = 0; i < s.n; ++i) c.decays.whole.apply(grad_state.row(i), grad_state.width);
        add_product(s.n, grad_state.width, 2 * chunk_steps, columns(c.reading.row(0), c.reading.width), incoming.row(0),
                    incoming.width, grad_state.row(0), grad_state.width);
    }
    void advance(const Head& head, int64_t chunk, Tile<T>& state) {
        take(head, chunk);
        c.advance(state);
    }
    void take(const Head& head, int64_t chunk) {
        c.take_keys(head, chunk);
        head.take(to.written, chunk, s.p, c.w.row(0), c.w.width);
        c.write();
    }
};

}  // namespace

#define DELTA(T, SUFFIX)                                                                                                \
    extern "C" void delta_forward_##SUFFIX(int64_t batch, int64_t length, int64_t heads, int64_t p, int64_t n,          \
                                           const T* v, const T* log_decay, const T* beta, const T* k, const T* q,       \
                                           const T* initial, T* y, T* last, T* kept, T* written, int threads) {         \
        const Delta<T> s{{batch, length, heads, p, n}, log_decay, beta, k, q};                                          \
        const typename DeltaForward<T>::Arguments given{s, v, y, written};                                              \
        run_forward<DeltaForward<T>>(s, given, initial, last, kept, threads);                                           \
    }                                                                                                                   \
    extern "C" void delta_backward_##SUFFIX(int64_t batch, int64_t length, int64_t heads, int64_t p, int64_t n,         \
                                            const T* log_decay, const T* beta, const T* k, const T* q, const T* kept,   \
                                            const T* written, const T* grad_y, T* grad_v, T* grad_log_decay,            \
                                            T* grad_beta, T* grad_k, T* grad_q, T* carry, int threads) {                \
        const Delta<T> s{{batch, length, heads, p, n}, log_decay, beta, k, q};                                          \
        const typename DeltaBackward<T>::Arguments to{s, written, grad_y, grad_v, grad_log_decay, grad_beta, grad_k,    \
                                                      grad_q};                                                          \
        run_backward<DeltaBackward<T>>(s, to, kept, carry, threads);                                                    \
    }
DELTA(float, f32)
DELTA(double, f64)
