#pragma once
#include <complex>

#include "vectors.h"

// A diagonal linear time-invariant system with few inputs and outputs, step by step:
//     x_t = lam x_{t-1} + B u_t,  y_t = Re(C x_t) + D u_t,  lam = exp(log_radius + i phase)
// u (batch, length, p), y (batch, length, q), B (n, p), C (q, n), D (p) with q = p, or none; states (batch, 2, n), real
// and imaginary parts.
//
// Lanes run over the sequences of a batch: every coefficient is then one number for all lanes, and there are no sums over
// lanes. A tile is as many sequences as there are lanes; it goes through time in chunks that stay in the first-level
// cache, and in a chunk through the states four at a time, which stay in registers; up to three states of no effect fill
// the last block. The forward pass keeps the states before every chunk, the backward pass runs each chunk again from there.
//
// A rounded lam would turn a slow state a little too far at every step: in single precision by 1e-4 after some thousand
// steps. At the end of a chunk the states are turned back by what the exact power of lam differs from the rounded one's.

namespace {

constexpr int lti_chunk = 16, S = 4;  // steps of a chunk, states of a block

template <class T> struct Lti {
    int64_t batch, length, p, q, n;
    const T *u, *log_radius, *phase, *B_re, *B_im, *C_re, *C_im, *D;
    int64_t chunks() const { return (length + lti_chunk - 1) / lti_chunk; }
    int64_t tiles() const { return (batch + W<T> - 1) / W<T>; }
    int64_t blocks() const { return (n + S - 1) / S; }
};

// The coefficients in the order of their use: for every block S real parts, then S imaginary parts (of C their negatives,
// as y = Re C Re x - Im C Im x has them); lam (blocks, 2 S), B (blocks, p, 2 S), C (blocks, q, 2 S).
template <class T> struct Coefficients {
    std::vector<T> lam, drift, B, C;

    explicit Coefficients(const Lti<T>& s)
        : lam(size_t(2 * S * s.blocks())), drift(lam), B(lam.size() * size_t(s.p)), C(lam.size() * size_t(s.q)) {
        for (int64_t i = 0; i < s.n; ++i) {
            const int64_t block = i / S, k = i % S;
            const std::complex<double> exponent(s.log_radius[i], s.phase[i]), exact = std::exp(exponent);
            const std::complex<double> rounded(T(exact.real()), T(exact.imag()));
            // (exact / rounded)^chunk, by 1 + x = exp(x) for the tiny x. A fast state has no drift to speak of, and its
            // x may be large, where a denormal lam has few digits: it would spoil what has just been written.
            const auto turn = std::abs(rounded) < 0.5 ? 1. : std::exp(double(lti_chunk) * (exact / rounded - 1.));
            put(lam, block, k, rounded.real(), rounded.imag());
            put(drift, block, k, turn.real(), turn.imag());
            for (int64_t j = 0; j < s.p; ++j) put(B, block * s.p + j, k, s.B_re[i * s.p + j], s.B_im[i * s.p + j]);
            for (int64_t j = 0; j < s.q; ++j) put(C, block * s.q + j, k, s.C_re[j * s.n + i], -s.C_im[j * s.n + i]);
        }
    }

    static void put(std::vector<T>& into, int64_t row, int64_t k, double re, double im) {
        into[row * 2 * S + k] = T(re), into[row * 2 * S + S + k] = T(im);
    }
};

// The states of one tile to lanes (blocks, 2 S) and back. states (batch, 2, n).
template <class T> void states_to_lanes(const Lti<T>& s, int64_t tile, const T* states, Vec<T>* lanes) {
    std::fill(lanes, lanes + 2 * S * s.blocks(), Vec<T>{});
    for (int64_t b = tile * W<T>; states && b < std::min(s.batch, (tile + 1) * W<T>); ++b)
        for (int64_t i = 0; i < s.n; ++i)
            for (int part = 0; part < 2; ++part)
                lanes[i / S * 2 * S + part * S + i % S][b % W<T>] = states[(2 * b + part) * s.n + i];
}
template <class T> void states_from_lanes(const Lti<T>& s, int64_t tile, const Vec<T>* lanes, T* states) {
    for (int64_t b = tile * W<T>; b < std::min(s.batch, (tile + 1) * W<T>); ++b)
        for (int64_t i = 0; i < s.n; ++i)
            for (int part = 0; part < 2; ++part)
                states[(2 * b + part) * s.n + i] = lanes[i / S * 2 * S + part * S + i % S][b % W<T>];
}

// One step of S states: x = lam x + B u.
template <class T>
inline void advance(const T* lam, const T* B, int64_t p, const Vec<T>* u, Vec<T>* re, Vec<T>* im) {
    using V = Vec<T>;
    V a[S] = {}, b[S] = {};
    for (int64_t j = 0; j < p; ++j, B += 2 * S)
        for (int k = 0; k < S; ++k) a[k] += u[j] * B[k], b[k] += u[j] * B[S + k];
    for (int k = 0; k < S; ++k) {  // last, so that a step waits for the one before it in two operations only
        a[k] += re[k] * lam[k] - im[k] * lam[S + k];
        b[k] += im[k] * lam[k] + re[k] * lam[S + k];
        re[k] = a[k], im[k] = b[k];
    }
}

// v_j += sum_k M_jk x_k over 2 S numbers, for Rows j, in sums that do not wait for each other. The sums are local: v might
// be a part of M for all the compiler knows, and would be stored before each reading of M.
template <class T, int Rows>
inline void accumulate(Vec<T>* v, const T* M, const Vec<T>* re, const Vec<T>* im) {
    Vec<T> a[Rows], b[Rows] = {};
    for (int j = 0; j < Rows; ++j) a[j] = v[j];
    for (int k = 0; k < S; ++k)
        for (int j = 0; j < Rows; ++j) a[j] += re[k] * M[j * 2 * S + k], b[j] += im[k] * M[j * 2 * S + S + k];
    for (int j = 0; j < Rows; ++j) v[j] = a[j] + b[j];
}
template <class T> inline void accumulate(Vec<T>* v, const T* M, int64_t count, const Vec<T>* re, const Vec<T>* im) {
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) accumulate<T, 2>(v + j, M + j * 2 * S, re, im);
    if (j < count) accumulate<T, 1>(v + j, M + j * 2 * S, re, im);
}

// What the kernels need of one block.
template <class T> struct Block {
    const T *lam, *drift, *B, *C;
    int64_t p, q;
    Block(const Lti<T>& s, const Coefficients<T>& c, int64_t i)
        : lam(c.lam.data() + 2 * S * i), drift(c.drift.data() + 2 * S * i), B(c.B.data() + 2 * S * s.p * i),
          C(c.C.data() + 2 * S * s.q * i), p(s.p), q(s.q) {}
};

template <class T>
void lti_forward_block(const Block<T>& c, int steps, const Vec<T>* u, Vec<T>* y, Vec<T>* state) {
    Vec<T> re[S], im[S];
    for (int k = 0; k < S; ++k) re[k] = state[k], im[k] = state[S + k];
    for (int t = 0; t < steps; ++t, u += c.p, y += c.q) {
        advance<T>(c.lam, c.B, c.p, u, re, im);
        accumulate<T>(y, c.C, c.q, re, im);
    }
    for (int k = 0; k < S; ++k) {
        state[k] = re[k] * c.drift[k] - im[k] * c.drift[S + k];
        state[S + k] = im[k] * c.drift[k] + re[k] * c.drift[S + k];
    }
}

template <class T>
void lti_forward(Lti<T> s, const T* initial, T* y, T* checkpoints, T* last, int threads) {
    using V = Vec<T>;
    const Coefficients<T> c(s);
    const int64_t states = 2 * S * s.blocks();
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        std::vector<V> scratch(size_t(lti_chunk * (s.p + s.q) + 2 * W<T> + states));
        V *in = scratch.data(), *out = in + lti_chunk * s.p + W<T>, *state = out + lti_chunk * s.q + W<T>;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < s.tiles(); ++tile) {
            const int64_t b = tile * W<T>, some = std::min<int64_t>(W<T>, s.batch - b);
            states_to_lanes(s, tile, initial, state);
            for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
                const int64_t begin = chunk * lti_chunk;
                const int steps = int(std::min<int64_t>(lti_chunk, s.length - begin));
                if (checkpoints)
                    std::memcpy(checkpoints + (tile * s.chunks() + chunk) * states * W<T>, state, size_t(states) * sizeof(V));
                to_lanes(s.u + (b * s.length + begin) * s.p, s.length * s.p, some, steps * s.p, in);
                for (int64_t i = 0; i < steps * s.q; ++i) out[i] = s.D ? in[i] * s.D[i % s.q] : V{};
                for (int64_t i = 0; i < s.blocks(); ++i)
                    lti_forward_block<T>(Block<T>(s, c, i), steps, in, out, state + 2 * S * i);
                from_lanes(out, steps * s.q, some, y + (b * s.length + begin) * s.q, s.length * s.q);
            }
            states_from_lanes(s, tile, state, last);
        }
    }
}

// sums (columns, 2 S) += sum over steps of rows (steps, 2 S) times columns (steps, columns): S rows and three columns at a
// time, which together with what they read fit into sixteen registers.
template <class T, int Columns>
inline void add_products(const Vec<T>* rows, const Vec<T>* columns, int64_t stride, int steps, Vec<T>* sums) {
    Vec<T> sum[Columns][S];
    for (int j = 0; j < Columns; ++j)
        for (int k = 0; k < S; ++k) sum[j][k] = sums[j * 2 * S + k];
    for (int t = 0; t < steps; ++t, rows += 2 * S, columns += stride)
        for (int j = 0; j < Columns; ++j)
            for (int k = 0; k < S; ++k) sum[j][k] += rows[k] * columns[j];
    for (int j = 0; j < Columns; ++j)
        for (int k = 0; k < S; ++k) sums[j * 2 * S + k] = sum[j][k];
}
template <class T>
inline void add_products(const Vec<T>* rows, const Vec<T>* columns, int64_t count, int steps, Vec<T>* sums) {
    for (int half = 0; half < 2; ++half, rows += S, sums += S) {
        int64_t j = 0;
        for (; j + 3 <= count; j += 3) add_products<T, 3>(rows, columns + j, count, steps, sums + j * 2 * S);
        for (; j < count; ++j) add_products<T, 1>(rows, columns + j, count, steps, sums + j * 2 * S);
    }
}

// What a chunk's backward pass works on: inputs, gradients of outputs and inputs (steps, p or q), and for one block the
// states (steps + 1, 2 S) from the one before the chunk on, and their adjoints (steps, 2 S).
template <class T> struct ChunkWork {
    Vec<T> *in, *grad_y, *grad_u, *states, *adjoints;
};

// `adjoint` is the gradient of the state after the chunk, and becomes that of the state before it.
template <class T>
void lti_backward_block(const Block<T>& c, int steps, const ChunkWork<T>& w, Vec<T>* adjoint, Vec<T>* sum_lam,
                        Vec<T>* sum_B, Vec<T>* sum_C) {
    using V = Vec<T>;
    const T *lam = c.lam, *B = c.B, *C = c.C;
    const int64_t p = c.p, q = c.q;
    V re[S], im[S], to_re[S], to_im[S];
    for (int k = 0; k < S; ++k) re[k] = w.states[k], im[k] = w.states[S + k];
    for (int t = 0; t < steps; ++t) {
        advance<T>(lam, B, p, w.in + t * p, re, im);
        for (int k = 0; k < S; ++k) w.states[(t + 1) * 2 * S + k] = re[k], w.states[(t + 1) * 2 * S + S + k] = im[k];
    }
    for (int k = 0; k < S; ++k) {
        re[k] = adjoint[k] * c.drift[k] + adjoint[S + k] * c.drift[S + k];
        im[k] = adjoint[S + k] * c.drift[k] - adjoint[k] * c.drift[S + k];
        to_re[k] = sum_lam[k], to_im[k] = sum_lam[S + k];
    }
    for (int t = steps - 1; t >= 0; --t) {
        const V *grad_y = w.grad_y + t * q, *before = w.states + t * 2 * S;
        V a[S] = {}, b[S] = {};
        for (int64_t j = 0; j < q; ++j)
            for (int k = 0; k < S; ++k) a[k] += grad_y[j] * C[j * 2 * S + k], b[k] += grad_y[j] * C[j * 2 * S + S + k];
        for (int k = 0; k < S; ++k) {
            a[k] += re[k], b[k] += im[k];
            w.adjoints[t * 2 * S + k] = a[k], w.adjoints[t * 2 * S + S + k] = b[k];
            to_re[k] += a[k] * before[k] + b[k] * before[S + k];
            to_im[k] += b[k] * before[k] - a[k] * before[S + k];
            re[k] = a[k] * lam[k] + b[k] * lam[S + k];  // conj(lam)
            im[k] = b[k] * lam[k] - a[k] * lam[S + k];
        }
        accumulate<T>(w.grad_u + t * p, B, p, a, b);
    }
    for (int k = 0; k < S; ++k) adjoint[k] = re[k], adjoint[S + k] = im[k], sum_lam[k] = to_re[k], sum_lam[S + k] = to_im[k];
    add_products<T>(w.adjoints, w.in, p, steps, sum_B);
    add_products<T>(w.states + 2 * S, w.grad_y, q, steps, sum_C);
}

// Gradients of the parameters are summed over the sequences of each of `parts` ranges of tiles: grad_lam (parts, 2, n),
// of log radius and phase; grad_B (parts, 2, n, p), grad_C (parts, 2, q, n), grad_D (parts, p).
template <class T>
void lti_backward(Lti<T> s, const T* checkpoints, const T* grad_y, const T* grad_last, T* grad_u, T* grad_initial,
                  T* grad_lam, T* grad_B, T* grad_C, T* grad_D, int64_t parts, int threads) {
    using V = Vec<T>;
    const Coefficients<T> c(s);
    const int64_t p = s.p, q = s.q, n = s.n, states = 2 * S * s.blocks();
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        std::vector<V> scratch(size_t(lti_chunk * (2 * p + q + 4 * S) + 2 * S + 3 * W<T> + states));
        ChunkWork<T> w;
        w.in = scratch.data(), w.grad_u = w.in + lti_chunk * p + W<T>, w.grad_y = w.grad_u + lti_chunk * p + W<T>;
        w.states = w.grad_y + lti_chunk * q + W<T>, w.adjoints = w.states + (lti_chunk + 1) * 2 * S;
        V* adjoint = w.adjoints + lti_chunk * 2 * S;
        std::vector<V> sums(size_t(states * (1 + p + q) + p));
        V *sum_lam = sums.data(), *sum_B = sum_lam + states, *sum_C = sum_B + states * p, *sum_D = sum_C + states * q;
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            std::fill(sums.begin(), sums.end(), V{});
            for (int64_t tile = s.tiles() * part / parts; tile < s.tiles() * (part + 1) / parts; ++tile) {
                const int64_t b = tile * W<T>, some = std::min<int64_t>(W<T>, s.batch - b);
                states_to_lanes(s, tile, grad_last, adjoint);
                for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk) {
                    const int64_t begin = chunk * lti_chunk;
                    const int steps = int(std::min<int64_t>(lti_chunk, s.length - begin));
                    to_lanes(s.u + (b * s.length + begin) * p, s.length * p, some, steps * p, w.in);
                    to_lanes(grad_y + (b * s.length + begin) * q, s.length * q, some, steps * q, w.grad_y);
                    for (int64_t i = 0; i < steps * p; ++i) {
                        w.grad_u[i] = s.D ? w.grad_y[i] * s.D[i % p] : V{};
                        if (s.D) sum_D[i % p] += w.grad_y[i] * w.in[i];
                    }
                    const T* kept = checkpoints + (tile * s.chunks() + chunk) * states * W<T>;
                    for (int64_t i = 0; i < s.blocks(); ++i) {
                        std::memcpy(w.states, kept + 2 * S * i * W<T>, 2 * S * sizeof(V));
                        lti_backward_block<T>(Block<T>(s, c, i), steps, w, adjoint + 2 * S * i, sum_lam + 2 * S * i,
                                              sum_B + 2 * S * p * i, sum_C + 2 * S * q * i);
                    }
                    from_lanes(w.grad_u, steps * p, some, grad_u + (b * s.length + begin) * p, s.length * p);
                }
                states_from_lanes(s, tile, adjoint, grad_initial);
            }
            // Sums over the lanes of state i: real part, imaginary part.
            const auto total = [](const V* sums, int64_t row, int64_t k, int part) {
                return sum_lanes<T>(sums[row * 2 * S + part * S + k]);
            };
            for (int64_t i = 0; i < n; ++i) {
                const int64_t block = i / S, k = i % S;
                const T re = total(sum_lam, block, k, 0), im = total(sum_lam, block, k, 1);
                const T lam_re = c.lam[block * 2 * S + k], lam_im = c.lam[block * 2 * S + S + k];
                grad_lam[2 * part * n + i] = re * lam_re + im * lam_im;  // d lam = lam (d log_radius + i d phase)
                grad_lam[(2 * part + 1) * n + i] = im * lam_re - re * lam_im;
                for (int side = 0; side < 2; ++side) {
                    for (int64_t j = 0; j < p; ++j)
                        grad_B[((2 * part + side) * n + i) * p + j] = total(sum_B, block * p + j, k, side);
                    for (int64_t j = 0; j < q; ++j)
                        grad_C[((2 * part + side) * q + j) * n + i] = (side ? -1 : 1) * total(sum_C, block * q + j, k, side);
                }
            }
            for (int64_t j = 0; s.D && j < p; ++j) grad_D[part * p + j] = sum_lanes<T>(sum_D[j]);
        }
    }
}

}  // namespace

#define LTI(T, SUFFIX)                                                                                                  \
    extern "C" void lti_forward_##SUFFIX(int64_t batch, int64_t length, int64_t p, int64_t q, int64_t n, const T* u,    \
                                         const T* log_radius, const T* phase, const T* B_re, const T* B_im,             \
                                         const T* C_re, const T* C_im, const T* D, const T* initial, T* y,              \
                                         T* checkpoints, T* last, int threads) {                                        \
        lti_forward<T>({batch, length, p, q, n, u, log_radius, phase, B_re, B_im, C_re, C_im, D}, initial, y,           \
                       checkpoints, last, threads);                                                                     \
    }                                                                                                                   \
    extern "C" void lti_backward_##SUFFIX(int64_t batch, int64_t length, int64_t p, int64_t q, int64_t n, const T* u,   \
                                          const T* log_radius, const T* phase, const T* B_re, const T* B_im,            \
                                          const T* C_re, const T* C_im, const T* D, const T* checkpoints,               \
                                          const T* grad_y, const T* grad_last, T* grad_u, T* grad_initial, T* grad_lam, \
                                          T* grad_B, T* grad_C, T* grad_D, int64_t parts, int threads) {                \
        lti_backward<T>({batch, length, p, q, n, u, log_radius, phase, B_re, B_im, C_re, C_im, D}, checkpoints, grad_y, \
                        grad_last, grad_u, grad_initial, grad_lam, grad_B, grad_C, grad_D, parts, threads);             \
    }

LTI(float, f32)
LTI(double, f64)
