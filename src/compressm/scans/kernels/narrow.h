#pragma once
#include "activations.h"

namespace {

// The parts of a block that act on every time step alone, for few channels. A row is shorter than a vector there, and a
// library's matrix product pays for its generality: lanes run over rows, W of them at a time, a "group". Its d columns
// are d vectors; groups are numbered through, so that what is drawn for an element does not depend on the threads.

// The D columns of W rows, D a power of two: each round moves the lowest bit of an element's position to the top.
template <class T, int D> inline void transpose(const T* rows, Vec<T>* columns) {
    Vec<T> v[D], next[D];
    for (int k = 0; k < D; ++k) v[k] = load(rows + k * W<T>);
    for (int round = 1; round < D; round *= 2) {
        for (int k = 0; k < D / 2; ++k) {
            next[k] = even<T>(v[2 * k], v[2 * k + 1]);
            next[D / 2 + k] = odd<T>(v[2 * k], v[2 * k + 1]);
        }
        for (int k = 0; k < D; ++k) v[k] = next[k];
    }
    for (int k = 0; k < D; ++k) columns[k] = v[k];
}
template <class T, int D> inline void transpose_back(const Vec<T>* columns, Vec<T>* flat) {
    Vec<T> v[D], next[D];
    for (int k = 0; k < D; ++k) v[k] = columns[k];
    for (int round = 1; round < D; round *= 2) {
        for (int k = 0; k < D / 2; ++k) {
            next[2 * k] = zip_low<T>(v[k], v[D / 2 + k]);
            next[2 * k + 1] = zip_high<T>(v[k], v[D / 2 + k]);
        }
        for (int k = 0; k < D; ++k) v[k] = next[k];
    }
    for (int k = 0; k < D; ++k) flat[k] = v[k];
}

// `some` rows of length d, at most W, to columns; missing rows are zero.
template <class T> inline void to_columns(const T* rows, int64_t d, int64_t some, Vec<T>* columns) {
    if (some == W<T>) switch (d) {
        case 1: return transpose<T, 1>(rows, columns);
        case 2: return transpose<T, 2>(rows, columns);
        case 4: return transpose<T, 4>(rows, columns);
        case 8: return transpose<T, 8>(rows, columns);
        case 16: return transpose<T, 16>(rows, columns);
    }
    else std::fill(columns, columns + d, Vec<T>{});
    T* to = reinterpret_cast<T*>(columns);
    for (int64_t row = 0; row < some; ++row)
        for (int64_t k = 0; k < d; ++k) to[k * W<T> + row] = rows[row * d + k];
}

// Columns to W rows that follow each other, in d vectors.
template <class T> inline void to_rows(const Vec<T>* columns, int64_t d, Vec<T>* flat) {
    switch (d) {
        case 1: return transpose_back<T, 1>(columns, flat);
        case 2: return transpose_back<T, 2>(columns, flat);
        case 4: return transpose_back<T, 4>(columns, flat);
        case 8: return transpose_back<T, 8>(columns, flat);
        case 16: return transpose_back<T, 16>(columns, flat);
    }
    const T* from = reinterpret_cast<const T*>(columns);
    T* to = reinterpret_cast<T*>(flat);
    for (int64_t k = 0; k < d; ++k)
        for (int64_t row = 0; row < W<T>; ++row) to[row * d + k] = from[k * W<T> + row];
}

// out_j += sum_k weight[j * across + k * along] in_k, for `rows` columns out and `count` columns in.
template <class T, int N> inline void product(const T* weight, int64_t across, int64_t along, int64_t count,
                                              const Vec<T>* in, Vec<T>* out) {
    Vec<T> sum[N];
    for (int j = 0; j < N; ++j) sum[j] = out[j];
    for (int64_t k = 0; k < count; ++k)
        for (int j = 0; j < N; ++j) sum[j] += weight[j * across + k * along] * in[k];
    for (int j = 0; j < N; ++j) out[j] = sum[j];
}
template <class T> inline void product(const T* weight, int64_t across, int64_t along, int64_t rows, int64_t count,
                                       const Vec<T>* in, Vec<T>* out) {
    int64_t j = 0;
    for (; j + 8 <= rows; j += 8) product<T, 8>(weight + j * across, across, along, count, in, out + j);
    for (; j + 2 <= rows; j += 2) product<T, 2>(weight + j * across, across, along, count, in, out + j);
    for (; j < rows; ++j) product<T, 1>(weight + j * across, across, along, count, in, out + j);
}

// sum_jk += left_j right_k over `groups` groups, whose columns are `left_step` and `right_step` vectors apart.
template <class T, int M, int N>
inline void outer(int64_t groups, const Vec<T>* left, int64_t left_step, const Vec<T>* right, int64_t right_step,
                  Vec<T>* sums, int64_t d) {
    Vec<T> sum[M][N];
    for (int j = 0; j < M; ++j)
        for (int k = 0; k < N; ++k) sum[j][k] = sums[j * d + k];
    for (int64_t g = 0; g < groups; ++g)
        for (int j = 0; j < M; ++j)
            for (int k = 0; k < N; ++k) sum[j][k] += left[g * left_step + j] * right[g * right_step + k];
    for (int j = 0; j < M; ++j)
        for (int k = 0; k < N; ++k) sums[j * d + k] = sum[j][k];
}
template <class T, int M>
inline void outer_rows(int64_t groups, const Vec<T>* left, int64_t left_step, const Vec<T>* right, int64_t right_step,
                       Vec<T>* sums, int64_t d) {
    int64_t k = 0;
    for (; k + 8 <= d; k += 8) outer<T, M, 8>(groups, left, left_step, right + k, right_step, sums + k, d);
    for (; k < d; ++k) outer<T, M, 1>(groups, left, left_step, right + k, right_step, sums + k, d);
}
template <class T>
inline void outer(int64_t groups, int64_t rows, const Vec<T>* left, const Vec<T>* right, Vec<T>* sums, int64_t d) {
    int64_t j = 0;
    for (; j + 2 <= rows; j += 2) outer_rows<T, 2>(groups, left + j, rows, right, d, sums + j * d, d);
    for (; j < rows; ++j) outer_rows<T, 1>(groups, left + j, rows, right, d, sums + j * d, d);
}

// Lanes and parts summed in a fixed order.
template <class T> inline void reduce(const std::vector<Vec<T>>& sums, int64_t parts, int64_t size, int64_t from,
                                      int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) {
        Vec<T> sum{};
        for (int64_t part = 0; part < parts; ++part) sum += sums[size_t(part * size + from + i)];
        out[i] = sum_lanes<T>(sum);
    }
}

// out = u + dropout(a sigmoid(b)), (a, b) = weight dropout(GELU(x)) + bias. x, u (rows, d); weight (2 d, d).
template <class T> struct Tail {
    int64_t rows, d;
    const T *x, *weight, *bias;
    Dropout dropout;
    // Columns of one group: z after GELU and dropout; its derivative to x; v = (a, b); the factors of the second dropout.
    inline void group(int64_t g, int64_t some, Vec<T>* z, Vec<T>* slope_z, Vec<T>* v, Vec<T>* factor) const {
        to_columns(x + g * W<T> * d, d, some, z);
        for (int64_t k = 0; k < d; ++k) {
            Vec<T> first;
            dropout.pair<T>((g * d + k) * W<T>, first, factor[k]);
            const Gelu<T> gelu(z[k]);
            if (slope_z) slope_z[k] = gelu.slope() * first;
            z[k] = gelu.value() * first;
        }
        for (int64_t j = 0; j < 2 * d; ++j) v[j] = Vec<T>{} + bias[j];
        product<T>(weight, d, 1, 2 * d, d, z, v);
    }
};

template <class T> void tail_forward(Tail<T> t, const T* u, T* out, int threads) {
    constexpr int w = W<T>;
    const int64_t d = t.d;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Vec<T>> scratch(size_t(4 * d));
        Vec<T> *z = scratch.data(), *v = z + d, *factor = v + 2 * d;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < (t.rows + w - 1) / w; ++g) {
            const int64_t some = std::min<int64_t>(w, t.rows - g * w), at = g * w * d;
            t.group(g, some, z, nullptr, v, factor);
            for (int64_t j = 0; j < d; ++j) v[j] *= sigmoid<T>(v[d + j]) * factor[j];
            to_rows<T>(v, d, z);
            for (int64_t i = 0; i < some * d; i += w)
                store_some(out + at + i, load_some(u + at + i, some * d - i) + z[i / w], some * d - i);
        }
    }
}

// grad_x (rows, d); grad_weight, grad_bias. A few groups at a time, so that sums for the weight stay in registers.
template <class T>
void tail_backward(Tail<T> t, const T* grad, T* grad_x, T* grad_weight, T* grad_bias, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t d = t.d, groups = (t.rows + w - 1) / w, together = d <= 16 ? 8 : 4, size = 2 * d * d + 2 * d;
    std::vector<V> all(size_t(threads * size));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        std::vector<V> scratch(size_t(together * 3 * d + 3 * d));
        V *zs = scratch.data(), *vs = zs + together * d, *slope = vs + together * 2 * d, *factor = slope + d;
        V *to_z = factor + d, *sums = all.data() + part * size, *bias_sums = sums + 2 * d * d;
        const int64_t last = groups * (part + 1) / threads;
        for (int64_t first = groups * part / threads; first < last; first += together) {
            const int64_t here = std::min(together, last - first);
            for (int64_t g = 0; g < here; ++g) {
                const int64_t at = (first + g) * w, some = std::min<int64_t>(w, t.rows - at);
                V *v = vs + g * 2 * d;
                t.group(first + g, some, zs + g * d, slope, v, factor);
                to_columns(grad + at * d, d, some, to_z);
                for (int64_t j = 0; j < d; ++j) {
                    const V s = sigmoid<T>(v[d + j]), incoming = to_z[j] * factor[j] * s;
                    v[d + j] = incoming * v[j] * (T(1) - s);
                    v[j] = incoming;
                    bias_sums[j] += v[j];
                    bias_sums[d + j] += v[d + j];
                }
                std::fill(to_z, to_z + d, V{});
                product<T>(t.weight, 1, d, d, 2 * d, v, to_z);
                for (int64_t k = 0; k < d; ++k) to_z[k] *= slope[k];
                to_rows<T>(to_z, d, slope);
                for (int64_t i = 0; i < some * d; i += w) store_some(grad_x + at * d + i, slope[i / w], some * d - i);
            }
            outer<T>(here, 2 * d, vs, zs, sums, d);
        }
    }
    reduce<T>(all, threads, size, 0, 2 * d * d, grad_weight);
    reduce<T>(all, threads, size, 2 * d * d, 2 * d, grad_bias);
}

// out = weight x + bias: x (rows, p), weight (q, p), out (rows, q).
template <class T>
void linear_forward(int64_t rows, int64_t p, int64_t q, const T* x, const T* weight, const T* bias, T* out, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Vec<T>> scratch(size_t(p + 2 * q));
        Vec<T> *in = scratch.data(), *result = in + p, *flat = result + q;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < (rows + w - 1) / w; ++g) {
            const int64_t some = std::min<int64_t>(w, rows - g * w);
            to_columns(x + g * w * p, p, some, in);
            for (int64_t j = 0; j < q; ++j) result[j] = Vec<T>{} + bias[j];
            product<T>(weight, p, 1, q, p, in, result);
            to_rows<T>(result, q, flat);
            for (int64_t i = 0; i < some * q; i += w) store_some(out + g * w * q + i, flat[i / w], some * q - i);
        }
    }
}

// grad_x may be null.
template <class T>
void linear_backward(int64_t rows, int64_t p, int64_t q, const T* x, const T* weight, const T* grad, T* grad_x,
                     T* grad_weight, T* grad_bias, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t groups = (rows + w - 1) / w, together = 8, size = p * q + q;
    std::vector<V> all(size_t(threads * size));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; ++part) {
        std::vector<V> scratch(size_t(together * (p + q) + 2 * p));
        V *in = scratch.data(), *incoming = in + together * p, *to_x = incoming + together * q, *flat = to_x + p;
        V *sums = all.data() + part * size, *bias_sums = sums + p * q;
        const int64_t last = groups * (part + 1) / threads;
        for (int64_t first = groups * part / threads; first < last; first += together) {
            const int64_t here = std::min(together, last - first);
            for (int64_t g = 0; g < here; ++g) {
                const int64_t at = (first + g) * w, some = std::min<int64_t>(w, rows - at);
                V* columns = incoming + g * q;
                to_columns(x + at * p, p, some, in + g * p);
                to_columns(grad + at * q, q, some, columns);
                for (int64_t j = 0; j < q; ++j) bias_sums[j] += columns[j];
                if (!grad_x) continue;
                std::fill(to_x, to_x + p, V{});
                product<T>(weight, 1, p, p, q, columns, to_x);
                to_rows<T>(to_x, p, flat);
                for (int64_t i = 0; i < some * p; i += w) store_some(grad_x + at * p + i, flat[i / w], some * p - i);
            }
            outer<T>(here, q, incoming, in, sums, p);
        }
    }
    reduce<T>(all, threads, size, 0, p * q, grad_weight);
    reduce<T>(all, threads, size, p * q, q, grad_bias);
}

}  // namespace

#define NARROW(T, SUFFIX)                                                                                               \
    extern "C" void tail_forward_##SUFFIX(int64_t rows, int64_t d, const T* x, const T* weight, const T* bias,          \
                                          const T* u, T* out, int64_t seed, double probability, int threads) {          \
        tail_forward<T>({rows, d, x, weight, bias, {seed, probability}}, u, out, threads);                              \
    }                                                                                                                   \
    extern "C" void tail_backward_##SUFFIX(int64_t rows, int64_t d, const T* x, const T* weight, const T* bias,         \
                                           const T* grad, T* grad_x, T* grad_weight, T* grad_bias, int64_t seed,        \
                                           double probability, int threads) {                                           \
        tail_backward<T>({rows, d, x, weight, bias, {seed, probability}}, grad, grad_x, grad_weight, grad_bias, threads); \
    }                                                                                                                   \
    extern "C" void linear_forward_##SUFFIX(int64_t rows, int64_t p, int64_t q, const T* x, const T* weight,            \
                                            const T* bias, T* out, int threads) {                                       \
        linear_forward<T>(rows, p, q, x, weight, bias, out, threads);                                                   \
    }                                                                                                                   \
    extern "C" void linear_backward_##SUFFIX(int64_t rows, int64_t p, int64_t q, const T* x, const T* weight,           \
                                             const T* grad, T* grad_x, T* grad_weight, T* grad_bias, int threads) {     \
        linear_backward<T>(rows, p, q, x, weight, grad, grad_x, grad_weight, grad_bias, threads);                       \
    }
NARROW(float, f32)
NARROW(double, f64)
