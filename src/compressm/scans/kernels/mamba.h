#pragma once
#include "vectors.h"

namespace {

// silu(bias + sum_k taps_k u_{t-k}) per channel: a causal depthwise convolution. u (batch, length, d) with rows `stride`
// apart; taps (k, d), the present step's first; bias d. since (batch, length): how many steps of its sequence lie before
// each, if a row holds several; otherwise null.
template <class T> struct Convolution {
    int64_t batch, length, d, stride, width;
    const T *u, *taps, *bias;
    const int64_t* since;
    int64_t reach(int64_t b, int64_t t) const { return std::min(width - 1, since ? since[b * length + t] : t); }
    inline Vec<T> before(int64_t b, int64_t t, int64_t i, int64_t some) const {
        Vec<T> sum = load_some(bias + i, some);
        const T* at = u + (b * length + t) * stride + i;
        for (int64_t k = 0, most = reach(b, t); k <= most; ++k)
            sum += load_some(taps + k * d + i, some) * load_some(at - k * stride, some);
        return sum;
    }
};

template <class T> void convolution_forward(Convolution<T> c, T* out, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < c.batch * c.length; ++row)
        for (int64_t i = 0; i < c.d; i += w) {
            const int64_t some = std::min<int64_t>(w, c.d - i);
            const Vec<T> v = c.before(row / c.length, row % c.length, i, some);
            store_some(out + row * c.d + i, v * sigmoid<T>(v), some);
        }
}

// grad_u (batch, length, d); grad_taps (batch, width + 1, d), to be summed: the taps, then the bias.
template <class T>
void convolution_backward(Convolution<T> c, const T* grad, T* grad_u, T* grad_taps, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t tiles = (c.d + w - 1) / w;
#pragma omp parallel num_threads(threads)
    {
        std::vector<V> scratch(size_t(c.length + c.width + 1));
        V *inner = scratch.data(), *sums = inner + c.length;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < c.batch * tiles; ++task) {
            const int64_t b = task / tiles, i = task % tiles * w, some = std::min<int64_t>(w, c.d - i);
            std::fill(sums, sums + c.width + 1, V{});
            for (int64_t t = 0; t < c.length; ++t) {
                const V v = c.before(b, t, i, some), s = sigmoid<T>(v);
                inner[t] = load_some(grad + (b * c.length + t) * c.d + i, some) * (s + v * s * (T(1) - s));
                sums[c.width] += inner[t];
                for (int64_t k = 0, most = c.reach(b, t); k <= most; ++k)
                    sums[k] += inner[t] * load_some(c.u + (b * c.length + t - k) * c.stride + i, some);
            }
            for (int64_t t = 0; t < c.length; ++t) {
                V sum{};
                for (int64_t k = 0; k < c.width && t + k < c.length && k <= c.reach(b, t + k); ++k)
                    sum += load_some(c.taps + k * c.d + i, some) * inner[t + k];
                store_some(grad_u + (b * c.length + t) * c.d + i, sum, some);
            }
            for (int64_t k = 0; k <= c.width; ++k) store_some(grad_taps + (b * (c.width + 1) + k) * c.d + i, sums[k], some);
        }
    }
}

// out = (y + D u) silu(z). y, u (rows, d); rows of z are `stride` apart.
template <class T> struct Gate {
    int64_t rows, d, stride;
    const T *y, *u, *D, *z;
};

template <class T> void gate_forward(Gate<T> g, T* out, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < g.rows; ++row)
        for (int64_t i = 0; i < g.d; i += w) {
            const int64_t some = std::min<int64_t>(w, g.d - i), at = row * g.d + i;
            const Vec<T> z = load_some(g.z + row * g.stride + i, some);
            const Vec<T> sum = load_some(g.y + at, some) + load_some(g.D + i, some) * load_some(g.u + at, some);
            store_some(out + at, sum * z * sigmoid<T>(z), some);
        }
}

// grad_y, grad_u, grad_z (rows, d); grad_D (parts, d), to be summed.
template <class T>
void gate_backward(Gate<T> g, const T* grad, T* grad_y, T* grad_u, T* grad_z, T* grad_D, int64_t parts, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t row = g.rows * part / parts; row < g.rows * (part + 1) / parts; ++row)
            for (int64_t i = 0; i < g.d; i += w) {
                const int64_t some = std::min<int64_t>(w, g.d - i), at = row * g.d + i;
                const Vec<T> z = load_some(g.z + row * g.stride + i, some), s = sigmoid<T>(z);
                const Vec<T> u = load_some(g.u + at, some), D = load_some(g.D + i, some), incoming = load_some(grad + at, some);
                const Vec<T> inner = incoming * z * s;
                store_some(grad_y + at, inner, some);
                store_some(grad_u + at, inner * D, some);
                store_some(grad_z + at, incoming * (load_some(g.y + at, some) + D * u) * (s + z * s * (T(1) - s)), some);
                T* sum = grad_D + part * g.d + i;
                store_some(sum, load_some(sum, some) + inner * u, some);
            }
}

// delta = softplus(dt weight + bias) with few columns in dt, for which a library's matrix product is slow: dt is read in
// rows of a distance, weight is (K, d).
template <class T> struct StepSizes {
    int64_t rows, d, stride;
    const T *dt, *weight, *bias;

    template <int K> Vec<T> before(int64_t row, int64_t i, int64_t some) const {
        Vec<T> x = load_some(bias + i, some);
        for (int k = 0; k < K; ++k) x += dt[row * stride + k] * load_some(weight + k * d + i, some);
        return x;
    }
};

// max(x, 0) + log(1 + t), t = exp(-|x|), by log(1 + t) = 2 artanh(t / (2 + t)), whose series keeps small values exact.
template <class T> inline Vec<T> softplus(Vec<T> x) {
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;
    const Vec<T> t = exp2<T>((x < 0 ? x : -x) * T(1.4426950408889634074));
    const Vec<T> s = t / (T(2) + t), square = s * s;
    Vec<T> sum = Vec<T>{} + T(1) / T(2 * terms - 1);
    for (int k = terms - 2; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
    return (x < 0 ? Vec<T>{} : x) + T(2) * s * sum;  // NaN is not below 0, and stays
}

template <class T, int K> void step_sizes_forward(StepSizes<T> s, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t i = 0; i < s.d; i += W<T>) {
            const int64_t some = std::min<int64_t>(W<T>, s.d - i);
            store_some(out + row * s.d + i, softplus<T>(s.template before<K>(row, i, some)), some);
        }
}

// grad_dt (rows, K); sums (parts, K + 1, d), to be summed: gradients of the weight and, last, of the bias.
template <class T, int K>
void step_sizes_backward(StepSizes<T> s, const T* grad, T* grad_dt, T* sums, int64_t parts, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t row = s.rows * part / parts; row < s.rows * (part + 1) / parts; ++row) {
            Vec<T> to_dt[K] = {};
            for (int64_t i = 0; i < s.d; i += W<T>) {
                const int64_t some = std::min<int64_t>(W<T>, s.d - i);
                const Vec<T> inner = load_some(grad + row * s.d + i, some) * sigmoid<T>(s.template before<K>(row, i, some));
                T* sum = sums + part * (K + 1) * s.d + i;
                for (int k = 0; k < K; ++k, sum += s.d) {
                    to_dt[k] += inner * load_some(s.weight + k * s.d + i, some);
                    store_some(sum, load_some(sum, some) + inner * s.dt[row * s.stride + k], some);
                }
                store_some(sum, load_some(sum, some) + inner, some);
            }
            for (int k = 0; k < K; ++k) grad_dt[row * K + k] = sum_lanes<T>(to_dt[k]);
        }
}

// Calls back with the number of columns as a constant; the callers keep to 1 to 8.
template <int K = 1, class Function> void with_columns(int64_t columns, Function function) {
    if (columns == K)
        function(std::integral_constant<int, K>());
    else if constexpr (K < 8)
        with_columns<K + 1>(columns, function);
}

}  // namespace

#define MAMBA(T, SUFFIX)                                                                                                \
    extern "C" void convolution_forward_##SUFFIX(int64_t batch, int64_t length, int64_t d, int64_t stride,              \
                                                 int64_t width, const T* u, const T* taps, const T* bias,               \
                                                 const int64_t* since, T* out, int threads) {                           \
        convolution_forward<T>({batch, length, d, stride, width, u, taps, bias, since}, out, threads);                  \
    }                                                                                                                   \
    extern "C" void convolution_backward_##SUFFIX(int64_t batch, int64_t length, int64_t d, int64_t stride,             \
                                                  int64_t width, const T* u, const T* taps, const T* bias,              \
                                                  const int64_t* since, const T* grad, T* grad_u, T* grad_taps,         \
                                                  int threads) {                                                        \
        convolution_backward<T>({batch, length, d, stride, width, u, taps, bias, since}, grad, grad_u, grad_taps,       \
                                threads);                                                                               \
    }                                                                                                                   \
    extern "C" void gate_forward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, const T* y, const T* u, const T* D,  \
                                          const T* z, T* out, int threads) {                                            \
        gate_forward<T>({rows, d, stride, y, u, D, z}, out, threads);                                                   \
    }                                                                                                                   \
    extern "C" void gate_backward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, const T* y, const T* u, const T* D, \
                                           const T* z, const T* grad, T* grad_y, T* grad_u, T* grad_z, T* grad_D,       \
                                           int64_t parts, int threads) {                                                \
        gate_backward<T>({rows, d, stride, y, u, D, z}, grad, grad_y, grad_u, grad_z, grad_D, parts, threads);          \
    }
MAMBA(float, f32)
MAMBA(double, f64)

#define STEP_SIZES(T, SUFFIX)                                                                                           \
    extern "C" void step_sizes_forward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, int64_t columns, const T* dt,  \
                                                const T* weight, const T* bias, T* out, int threads) {                  \
        with_columns(columns, [&](auto k) { step_sizes_forward<T, k>({rows, d, stride, dt, weight, bias}, out, threads); }); \
    }                                                                                                                   \
    extern "C" void step_sizes_backward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, int64_t columns, const T* dt, \
                                                 const T* weight, const T* bias, const T* grad, T* grad_dt, T* sums,    \
                                                 int64_t parts, int threads) {                                          \
        with_columns(columns, [&](auto k) {                                                                             \
            step_sizes_backward<T, k>({rows, d, stride, dt, weight, bias}, grad, grad_dt, sums, parts, threads);        \
        });                                                                                                             \
    }
STEP_SIZES(float, f32)
STEP_SIZES(double, f64)
