#pragma once
#include "matrix_states.h"

namespace {

// Gated linear attention: S_t = diag(a_t) S_{t-1} + k_t x_t^T,  y_t = S_t^T q_t, with a decay for every row of S (n, p).
// In a chunk that begins with the state S, with g_i the decays over 0..i and k_j(i) the key of step j decayed over j+1..i:
//     y_i = S^T (g_i q_i) + sum_{j<=i} M_ij x_j,   M_ij = q_i . k_j(i)
// The k_j(i) are carried from step to step instead of being taken apart into factors for i and for j, which would leave
// the range of numbers where a decay is strong (Yang et al., Gated Linear Attention Transformers with Hardware-Efficient
// Training, 2024, section 4).

template <class T> struct Gla : Heads {
    const T *x, *log_decay, *k, *q;
};

// A chunk of a head: the arguments, and what both passes make of them.
template <class T> struct GlaChunk {
    static constexpr int w = W<T>;
    const Gla<T>& s;
    Tile<T> x, a, k, q, reading, storing, decayed, M;
    Tile<double> whole;  // the decays over the chunk

    explicit GlaChunk(const Gla<T>& s)
        : s(s), x(chunk_steps, s.p), a(chunk_steps, s.n), k(chunk_steps, s.n), q(chunk_steps, s.n), reading(chunk_steps, s.n),
          storing(chunk_steps, s.n), decayed(chunk_steps, s.n), M(chunk_steps, chunk_steps), whole(1, s.n) {}

    // Values and keys, and the keys decayed up to the end of the chunk.
    void take_keys(const Head& head, int64_t chunk) {
        head.take(s.x, chunk, s.p, x.row(0), x.width);
        head.take(s.k, chunk, s.n, k.row(0), k.width);
        head.take(s.log_decay, chunk, s.n, a.row(0), a.width);
        double* totals = whole.row(0);
        std::fill(totals, totals + whole.width, 0.);
        for (int64_t t = 0; t < chunk_steps; ++t)
            for (int64_t i = 0; i < s.n; ++i) totals[i] += double(a.row(t)[i]);
        exp_in_place(totals, whole.width);
        exp_in_place(a.row(0), chunk_steps * a.width);
        for (int64_t i = 0; i < a.width; i += w) {
            Vec<T> to_end = Vec<T>{} + T(1);
            for (int64_t t = chunk_steps - 1; t >= 0; to_end *= load(a.row(t--) + i))
                store(storing.row(t) + i, to_end * load(k.row(t) + i));
        }
    }
    void take_queries(const Head& head, int64_t chunk) {
        head.take(s.q, chunk, s.n, q.row(0), q.width);
        for (int64_t i = 0; i < a.width; i += w) {
            Vec<T> since = Vec<T>{} + T(1);
            for (int64_t t = 0; t < chunk_steps; ++t) {
                since *= load(a.row(t) + i);
                store(reading.row(t) + i, since * load(q.row(t) + i));
            }
        }
    }

    // M; and if wanted the gradient of the queries through it, of which `P` holds that of M without its diagonal. Blocks
    // of as many steps j as there are lanes; steps from i on among them are still zero.
    template <bool backward> void mix(const Tile<T>* P, Tile<T>* grad_q) {
        std::fill(decayed.numbers.begin(), decayed.numbers.end(), Vec<T>{});
        for (int64_t i = 0; i < chunk_steps; ++i) {
            if (backward) std::fill(grad_q->row(i), grad_q->row(i) + a.width, T(0));
            for (int64_t block = 0; block < i; block += w) mix_block<backward>(i, block, P, grad_q);
            copy_rows(1, a.width, k.row(i), 0, decayed.row(i), 0);
            M.row(i)[i] = dot(q.row(i), k.row(i), a.width);
        }
    }
    template <bool backward> void mix_block(int64_t i, int64_t block, const Tile<T>* P, Tile<T>* grad_q) {
        Vec<T> scores[w] = {};
        for (int64_t at = 0; at < a.width; at += w) {
            const Vec<T> decay = load(a.row(i) + at), query = load(q.row(i) + at);
            Vec<T> to_query[2] = {};
            T* key = decayed.row(block) + at;
#pragma GCC unroll 16
            for (int r = 0; r < w; ++r, key += a.width) {
                const Vec<T> now = decay * load(key);
                store(key, now);
                scores[r] += query * now;
                if (backward) to_query[r % 2] += P->row(i)[block + r] * now;
            }
            if (backward) store(grad_q->row(i) + at, load(grad_q->row(i) + at) + to_query[0] + to_query[1]);
        }
        transpose<T>(scores);
        Vec<T> total = scores[0];
        for (int r = 1; r < w; ++r) total += scores[r];
        store(M.row(i) + block, total);
    }
    void decay(Tile<T>& state) const {
        for (int64_t i = 0; i < s.n; ++i) Decay<T>(whole.row(0)[i]).apply(state.row(i), state.width);
    }

    // From the state before the chunk to the one after it.
    void advance(Tile<T>& state) const {
        decay(state);
        add_product(s.n, state.width, chunk_steps, columns(storing.row(0), storing.width), x.row(0), x.width, state.row(0),
                    state.width);
    }
};

template <class T> struct GlaForward {
    struct Arguments {
        Gla<T> s;
        T* y;
    };
    const Arguments& given;
    GlaChunk<T> c;
    Tile<T> out;

    explicit GlaForward(const Arguments& given) : given(given), c(given.s), out(chunk_steps, given.s.p) {}

    void chunk(const Head& head, int64_t chunk, Tile<T>& state) {
        const int64_t width = state.width;
        c.take_keys(head, chunk);
        c.take_queries(head, chunk);
        c.template mix<false>(nullptr, nullptr);
        set_product(chunk_steps, width, c.s.n, rows(c.reading.row(0), c.reading.width), state.row(0), width, out.row(0), width);
        add_product<Part::lower>(chunk_steps, width, chunk_steps, rows(c.M.row(0), c.M.width), c.x.row(0), width, out.row(0),
                                 width);
        head.give(out.row(0), width, chunk, c.s.p, given.y);
        c.advance(state);
    }
};

template <class T> struct GlaBackward {
    struct Arguments {
        Gla<T> s;
        const T* grad_y;
        T *x, *log_decay, *k, *q;  // their gradients
    };
    static constexpr int w = W<T>;
    const Arguments& to;
    const Gla<T>& s;
    GlaChunk<T> c;
    Tile<T> grad_y, grad_x, state_t, grad_state_t, values, P, read, to_q, to_k, to_decay;
    T diagonal[chunk_steps];

    explicit GlaBackward(const Arguments& to)
        : to(to), s(to.s), c(s), grad_y(chunk_steps, s.p),
          grad_x(chunk_steps, s.p), state_t(s.p, s.n), grad_state_t(s.p, s.n), values(s.p, chunk_steps),
          P(chunk_steps, chunk_steps), read(chunk_steps, s.n), to_q(chunk_steps, s.n), to_k(chunk_steps, s.n),
          to_decay(chunk_steps, s.n) {}

    void advance(const Head& head, int64_t chunk, Tile<T>& state) {
        c.take_keys(head, chunk);
        c.advance(state);
    }
    void chunk(const Head& head, int64_t chunk, const Tile<T>& state, Tile<T>& grad_state) {
        c.take_keys(head, chunk);
        c.take_queries(head, chunk);
        head.take(to.grad_y, chunk, s.p, grad_y.row(0), grad_y.width);
        scores();
        c.template mix<true>(&P, &to_q);
        values_and_states(state, grad_state);
        through_keys();
        finish();
        head.give(grad_x.row(0), grad_x.width, chunk, s.p, to.x);
        head.give(to_q.row(0), to_q.width, chunk, s.n, to.q);
        head.give(to_k.row(0), to_k.width, chunk, s.n, to.k);
        head.give(to_decay.row(0), to_decay.width, chunk, s.n, to.log_decay);
        c.decay(grad_state);
        add_product(s.n, grad_state.width, chunk_steps, columns(c.reading.row(0), c.reading.width), grad_y.row(0),
                    grad_y.width, grad_state.row(0), grad_state.width);
    }

    // The gradient of M. Its diagonal has no decay in it, and is kept apart.
    void scores() {
        transpose_tile(chunk_steps, s.p, c.x.row(0), c.x.width, values.row(0), values.width);
        set_product(chunk_steps, chunk_steps, s.p, rows(grad_y.row(0), grad_y.width), values.row(0), values.width, P.row(0),
                    P.width);
        for (int64_t i = 0; i < chunk_steps; ++i) {
            diagonal[i] = P.row(i)[i];
            for (int64_t j = i; j < chunk_steps; ++j) P.row(i)[j] = 0;
        }
    }

    // What the values get; what queries get through the state before the chunk (`read`), and keys through the one after
    // it (`to_k`, before their decay to the end); and what the decay of the state before the chunk gets.
    void values_and_states(const Tile<T>& state, const Tile<T>& grad_state) {
        const int64_t width = grad_state.width;
        set_product(chunk_steps, width, s.n, rows(c.storing.row(0), c.storing.width), grad_state.row(0), width, grad_x.row(0),
                    width);
        add_product<Part::upper>(chunk_steps, width, chunk_steps, columns(c.M.row(0), c.M.width), grad_y.row(0), width,
                                 grad_x.row(0), width);
        transpose_tile(s.n, s.p, state.row(0), width, state_t.row(0), state_t.width);
        set_product(chunk_steps, read.width, s.p, rows(grad_y.row(0), width), state_t.row(0), state_t.width, read.row(0),
                    read.width);
        transpose_tile(s.n, s.p, grad_state.row(0), width, grad_state_t.row(0), grad_state_t.width);
        set_product(chunk_steps, to_k.width, s.p, rows(c.x.row(0), width), grad_state_t.row(0), grad_state_t.width,
                    to_k.row(0), to_k.width);
        for (int64_t at = 0; at < read.width; at += w) {
            Vec<T> whole = Vec<T>{} + T(1), kept{};
            for (int64_t t = 0; t < chunk_steps; ++t) whole *= load(c.a.row(t) + at);
            for (int64_t i = 0; i < s.p; ++i) kept += load(state_t.row(i) + at) * load(grad_state_t.row(i) + at);
            store(to_decay.row(0) + at, whole * kept);
        }
    }

    // From the last step back: the gradient Z_j(i) of k_j(i), which becomes that of k_j at i = j. The decays of step t
    // get sum_{j<t} Z_j(t) k_j(t) (`inner`), which follows from step to step since
    //     Z_j(t) k_j(t) = Z_j(t+1) k_j(t+1) + P_tj q_t k_j(t);
    // and, for what is read from the state before the chunk, the sum over i >= t of g_i q_i times its gradient.
    void through_keys() {
        for (int64_t at = 0; at < read.width; at += w) {
            Vec<T> inner{}, outer = load(to_decay.row(0) + at);
            for (int64_t j = 0; j + 1 < chunk_steps; ++j) inner += load(to_k.row(j) + at) * load(c.decayed.row(j) + at);
            for (int64_t t = chunk_steps - 1; t >= 0; --t) {
                const Vec<T> query = load(c.q.row(t) + at), decay = load(c.a.row(t) + at);
                for (int64_t j = 0; j < t; ++j) {
                    T* of_key = to_k.row(j) + at;
                    store(of_key, decay * (load(of_key) + P.row(t)[j] * query));
                }
                if (t + 1 < chunk_steps) inner -= load(to_k.row(t) + at) * load(c.k.row(t) + at);
                inner += query * load(to_q.row(t) + at);
                outer += load(read.row(t) + at) * load(c.reading.row(t) + at);
                store(to_decay.row(t) + at, inner + outer);
            }
        }
    }

    // What is left of the queries' and keys' gradients: through the state before the chunk, and through M's diagonal.
    void finish() {
        for (int64_t at = 0; at < read.width; at += w) {
            Vec<T> since = Vec<T>{} + T(1);
            for (int64_t t = 0; t < chunk_steps; ++t) {
                since *= load(c.a.row(t) + at);
                T *of_query = to_q.row(t) + at, *of_key = to_k.row(t) + at;
                store(of_query, load(of_query) + since * load(read.row(t) + at) + diagonal[t] * load(c.k.row(t) + at));
                store(of_key, load(of_key) + diagonal[t] * load(c.q.row(t) + at));
            }
        }
    }
};

}  // namespace

#define GLA(T, SUFFIX)                                                                                                  \
    extern "C" void gla_forward_##SUFFIX(int64_t batch, int64_t length, int64_t heads, int64_t p, int64_t n, const T* x, \
                                         const T* log_decay, const T* k, const T* q, const T* initial, T* y, T* last,   \
                                         T* kept, int threads) {                                                        \
        const Gla<T> s{{batch, length, heads, p, n}, x, log_decay, k, q};                                               \
        run_forward<GlaForward<T>>(s, typename GlaForward<T>::Arguments{s, y}, initial, last, kept, threads);           \
    }                                                                                                                   \
    extern "C" void gla_backward_##SUFFIX(int64_t batch, int64_t length, int64_t heads, int64_t p, int64_t n,           \
                                          const T* x, const T* log_decay, const T* k, const T* q, const T* kept,        \
                                          const T* grad_y, T* grad_x, T* grad_log_decay, T* grad_k, T* grad_q,          \
                                          T* carry, int threads) {                                                      \
        const Gla<T> s{{batch, length, heads, p, n}, x, log_decay, k, q};                                               \
        const typename GlaBackward<T>::Arguments to{s, grad_y, grad_x, grad_log_decay, grad_k, grad_q};                 \
        run_backward<GlaBackward<T>>(s, to, kept, carry, threads);                                                      \
    }
GLA(float, f32)
GLA(double, f64)
