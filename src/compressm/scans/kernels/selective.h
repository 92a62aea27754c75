#pragma once
#include "vectors.h"

namespace {

// Selective scan: h_t = 2^(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t
// u, delta, y (batch, length, d); A (n, d), times log2(e); B, C (batch, length, n); states (batch, n, d).
// d is a multiple of the lanes. The forward pass keeps the state before every chunk of `chunk` steps; the backward pass
// runs each chunk again from there.

constexpr int chunk = 32;

template <class T> struct Selective {
    int64_t batch, length, d, n;
    const T *u, *delta, *A, *B, *C, *initial;
    int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

template <class T, int N>
inline void forward_states(const Selective<T>& s, int64_t b, int64_t begin, int steps, int64_t d0, int64_t n0,
                           const Vec<T>* delta, const Vec<T>* input, T* state, Vec<T>* y) {
    using V = Vec<T>;
    V h[N], A[N];
    for (int k = 0; k < N; ++k) {
        h[k] = load(state + (n0 + k) * s.d + d0);
        A[k] = load(s.A + (n0 + k) * s.d + d0);
    }
    const T* B = s.B + (b * s.length + begin) * s.n + n0;
    const T* C = s.C + (b * s.length + begin) * s.n + n0;
    for (int t = 0; t < steps; ++t, B += s.n, C += s.n) {
        V sum = y[t];
        for (int k = 0; k < N; ++k) {
            h[k] = exp2<T>(delta[t] * A[k]) * h[k] + input[t] * B[k];
            sum += h[k] * C[k];
        }
        y[t] = sum;
    }
    for (int k = 0; k < N; ++k) store(state + (n0 + k) * s.d + d0, h[k]);
}

template <class T>
void selective_forward(Selective<T> s, T* y, T* checkpoints, T* state, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t tiles = s.d / w;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        V delta[chunk], input[chunk], out[chunk];
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.batch * tiles; ++task) {
            const int64_t b = task / tiles, d0 = task % tiles * w;
            T* h = state + b * s.n * s.d;
            for (int64_t i = 0; i < s.n; ++i) store(h + i * s.d + d0, s.initial ? load(s.initial + (b * s.n + i) * s.d + d0) : V{});
            for (int64_t c = 0; c < s.chunks(); ++c) {
                const int64_t begin = c * chunk;
                const int steps = int(std::min<int64_t>(chunk, s.length - begin));
                if (checkpoints)
                    for (int64_t i = 0; i < s.n; ++i)
                        store(checkpoints + ((b * s.chunks() + c) * s.n + i) * s.d + d0, load(h + i * s.d + d0));
                for (int t = 0; t < steps; ++t) {
                    const int64_t at = (b * s.length + begin + t) * s.d + d0;
                    delta[t] = load(s.delta + at);
                    input[t] = delta[t] * load(s.u + at);
                    out[t] = V{};
                }
                int64_t i = 0;
                for (; i + 4 <= s.n; i += 4) forward_states<T, 4>(s, b, begin, steps, d0, i, delta, input, h, out);
                for (; i < s.n; ++i) forward_states<T, 1>(s, b, begin, steps, d0, i, delta, input, h, out);
                for (int t = 0; t < steps; ++t) store(y + (b * s.length + begin + t) * s.d + d0, out[t]);
            }
        }
    }
}

// One chunk, N states, one tile of channels. `carry` holds a_{t+1} g_{t+1} from the chunk after, and receives the one
// for the chunk before; sums over channels are left in lanes.
template <class T, int N>
inline void backward_states(const Selective<T>& s, int64_t b, int64_t begin, int steps, int64_t d0, int64_t n0,
                            const Vec<T>* delta, const Vec<T>* input, const Vec<T>* grad_y, const T* checkpoint, T* carry,
                            T* grad_A, Vec<T>* grad_input, Vec<T>* grad_log, Vec<T> (*grad_B)[4], Vec<T> (*grad_C)[4]) {
    using V = Vec<T>;
    V A[N], h[N], decay[chunk][N], decayed[chunk][N];
    for (int k = 0; k < N; ++k) {
        h[k] = load(checkpoint + (n0 + k) * s.d + d0);
        A[k] = load(s.A + (n0 + k) * s.d + d0);
    }
    const T* B = s.B + (b * s.length + begin) * s.n + n0;
    const T* C = s.C + (b * s.length + begin) * s.n + n0;
    for (int t = 0; t < steps; ++t)
        for (int k = 0; k < N; ++k) {
            decay[t][k] = exp2<T>(delta[t] * A[k]);
            decayed[t][k] = decay[t][k] * h[k];
            h[k] = decayed[t][k] + input[t] * B[t * s.n + k];
        }
    V g[N], sum_A[N];
    for (int k = 0; k < N; ++k) {
        g[k] = load(carry + (n0 + k) * s.d + d0);
        sum_A[k] = load(grad_A + (n0 + k) * s.d + d0);
    }
    for (int t = steps - 1; t >= 0; --t) {
        V to_input = grad_input[t], to_log = grad_log[t];
        for (int k = 0; k < N; ++k) {
            const V state = decayed[t][k] + input[t] * B[t * s.n + k];
            grad_C[t][k] += grad_y[t] * state;
            g[k] += grad_y[t] * C[t * s.n + k];
            grad_B[t][k] += g[k] * input[t];
            to_input += g[k] * B[t * s.n + k];
            const V to_exponent = g[k] * decayed[t][k];
            sum_A[k] += to_exponent * delta[t];
            to_log += to_exponent * A[k];
            g[k] *= decay[t][k];
        }
        grad_input[t] = to_input;
        grad_log[t] = to_log;
    }
    for (int k = 0; k < N; ++k) {
        store(carry + (n0 + k) * s.d + d0, g[k]);
        store(grad_A + (n0 + k) * s.d + d0, sum_A[k]);
    }
}

// grad_u, grad_delta (batch, length, d); grad_A (batch, n, d), to be summed, with respect to A itself (not times log2 e);
// grad_B, grad_C (groups, batch, length, n), to be summed; carry (batch, n, d): in: gradient of the last state, out: of
// the initial one. Channels are split into `groups`, so that a single sequence keeps several threads busy.
template <class T>
void selective_backward(Selective<T> s, const T* checkpoints, const T* grad_y, T* grad_u, T* grad_delta, T* grad_A,
                        T* grad_B, T* grad_C, T* carry, int64_t groups, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t tiles = s.d / w;
    const T ln2 = T(0.693147180559945309417);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const int64_t widest = (tiles + groups - 1) / groups;
        std::vector<V> scratch(size_t(widest) * chunk * 5);
        V sum_B[chunk][4], sum_C[chunk][4];
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.batch * groups; ++task) {
            const int64_t b = task / groups, group = task % groups;
            const int64_t first = tiles * group / groups, last = tiles * (group + 1) / groups;
            for (int64_t c = s.chunks() - 1; c >= 0; --c) {
                const int64_t begin = c * chunk;
                const int steps = int(std::min<int64_t>(chunk, s.length - begin));
                const T* checkpoint = checkpoints + (b * s.chunks() + c) * s.n * s.d;
                for (int64_t tile = first; tile < last; ++tile) {
                    V* of_tile = scratch.data() + (tile - first) * chunk * 5;
                    for (int t = 0; t < steps; ++t) {
                        const int64_t at = (b * s.length + begin + t) * s.d + tile * w;
                        of_tile[t] = load(s.delta + at);
                        of_tile[chunk + t] = of_tile[t] * load(s.u + at);
                        of_tile[2 * chunk + t] = load(grad_y + at);
                        of_tile[3 * chunk + t] = of_tile[4 * chunk + t] = V{};
                    }
                }
                for (int64_t i = 0; i < s.n;) {
                    const int width = i + 4 <= s.n ? 4 : 1;
                    for (int t = 0; t < steps; ++t)
                        for (int k = 0; k < width; ++k) sum_B[t][k] = sum_C[t][k] = V{};
                    for (int64_t tile = first; tile < last; ++tile) {
                        V* of_tile = scratch.data() + (tile - first) * chunk * 5;
                        auto run = width == 4 ? backward_states<T, 4> : backward_states<T, 1>;
                        run(s, b, begin, steps, tile * w, i, of_tile, of_tile + chunk, of_tile + 2 * chunk, checkpoint,
                            carry + b * s.n * s.d, grad_A + b * s.n * s.d, of_tile + 3 * chunk, of_tile + 4 * chunk, sum_B, sum_C);
                    }
                    for (int t = 0; t < steps; ++t)
                        for (int k = 0; k < width; ++k) {
                            const int64_t at = ((group * s.batch + b) * s.length + begin + t) * s.n + i + k;
                            grad_B[at] = sum_lanes<T>(sum_B[t][k]);
                            grad_C[at] = sum_lanes<T>(sum_C[t][k]);
                        }
                    i += width;
                }
                for (int64_t tile = first; tile < last; ++tile) {
                    const V* of_tile = scratch.data() + (tile - first) * chunk * 5;
                    for (int t = 0; t < steps; ++t) {
                        const int64_t at = (b * s.length + begin + t) * s.d + tile * w;
                        store(grad_u + at, of_tile[3 * chunk + t] * of_tile[t]);
                        store(grad_delta + at, of_tile[3 * chunk + t] * load(s.u + at) + of_tile[4 * chunk + t] * ln2);
                    }
                }
            }
        }
    }
}

}  // namespace

#define SELECTIVE(T, SUFFIX)                                                                                            \
    extern "C" void selective_forward_##SUFFIX(int64_t batch, int64_t length, int64_t d, int64_t n, const T* u,         \
                                               const T* delta, const T* A, const T* B, const T* C, const T* initial,    \
                                               T* y, T* checkpoints, T* state, int threads) {                           \
        selective_forward<T>({batch, length, d, n, u, delta, A, B, C, initial}, y, checkpoints, state, threads);        \
    }                                                                                                                   \
    extern "C" void selective_backward_##SUFFIX(                                                                        \
        int64_t batch, int64_t length, int64_t d, int64_t n, const T* u, const T* delta, const T* A, const T* B,        \
        const T* C, const T* checkpoints, const T* grad_y, T* grad_u, T* grad_delta, T* grad_A, T* grad_B, T* grad_C,   \
        T* carry, int64_t groups, int threads) {                                                                        \
        selective_backward<T>({batch, length, d, n, u, delta, A, B, C, nullptr}, checkpoints, grad_y, grad_u,           \
                              grad_delta, grad_A, grad_B, grad_C, carry, groups, threads);                              \
    }
SELECTIVE(float, f32)
SELECTIVE(double, f64)
