#pragma once
#include "vectors.h"

namespace {

// Batch norm over the rows of (rows, d). Nothing is transposed: W rows are d vectors that follow each other, a
// "period", in which a lane always holds the same channel. Sums over a few periods are added up in double precision.
template <class T> struct Periods {
    int64_t rows, d, parts;
    static constexpr int64_t together = 16;

    // totals[s * d + channel] = sum over rows of the s-th of N terms; term(position within the period, index, out) for
    // a vector, and the same for one element.
    template <int N, class Vector, class Scalar> void sums(double* totals, Vector vector, Scalar scalar) const {
        constexpr int w = W<T>;
        const int64_t periods = rows / w, size = d * w;
        std::vector<double> all(size_t(parts * N * size));
#pragma omp parallel for schedule(static) num_threads(parts)
        for (int64_t part = 0; part < parts; ++part) {
            std::vector<Vec<T>> scratch(size_t(N * d));
            double* total = all.data() + part * N * size;
            const int64_t last = periods * (part + 1) / parts;
            for (int64_t first = periods * part / parts; first < last; first += together) {
                std::fill(scratch.begin(), scratch.end(), Vec<T>{});
                for (int64_t period = first; period < std::min(first + together, last); ++period)
                    for (int64_t k = 0; k < d; ++k) {
                        Vec<T> terms[N];
                        vector(k * w, period * size + k * w, terms);
                        for (int s = 0; s < N; ++s) scratch[size_t(s * d + k)] += terms[s];
                    }
                const T* sum = reinterpret_cast<const T*>(scratch.data());
                for (int64_t i = 0; i < N * size; ++i) total[i] += double(sum[i]);
            }
        }
        std::fill(totals, totals + N * d, 0.);
        for (int64_t part = 0; part < parts; ++part)
            for (int s = 0; s < N; ++s)
                for (int64_t i = 0; i < size; ++i) totals[s * d + i % d] += all[size_t((part * N + s) * size + i)];
        for (int64_t i = periods * size; i < rows * d; ++i) {
            T terms[N];
            scalar(i % d, i, terms);
            for (int s = 0; s < N; ++s) totals[s * d + i % d] += double(terms[s]);
        }
    }

    // out = function(position within the period, index, number of elements), from the end: what the sums read last may
    // still be in the cache.
    template <class Function> void map(T* out, Function function) const {
        constexpr int w = W<T>;
        const int64_t size = d * w, periods = (rows + w - 1) / w;
#pragma omp parallel for schedule(static) num_threads(parts)
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t period = periods * (part + 1) / parts - 1; period >= periods * part / parts; --period) {
                const int64_t end = std::min(size, rows * d - period * size);
                for (int64_t k = 0; k < end; k += w)
                    store_some(out + period * size + k, function(k, period * size + k, end - k), end - k);
            }
    }

    // d values, repeated over a period; aligned, as a load across two cache lines costs two.
    struct Repeated {
        std::vector<Vec<T>> all;
        template <class S> Repeated(const S* values, int64_t d) : all(static_cast<size_t>(d)) {
            for (int64_t i = 0; i < d * W<T>; ++i) reinterpret_cast<T*>(all.data())[i] = T(values[i % d]);
        }
        const T* data() const { return reinterpret_cast<const T*>(all.data()); }
    };
    template <class S> Repeated repeated(const S* values) const { return {values, d}; }
};

// out = (x - mean) / sqrt(var + eps) * weight + bias, the variance divided by `rows`. statistics (2, d): mean and
// 1 / sqrt(var + eps). The running statistics move by `momentum`, towards the variance divided by `rows - 1`.
template <class T>
void batch_norm_forward(Periods<T> p, const T* x, const T* weight, const T* bias, T* running_mean, T* running_var,
                        double momentum, double eps, T* statistics, T* out) {
    const int64_t d = p.d;
    std::vector<double> mean(static_cast<size_t>(d)), squares(static_cast<size_t>(d)), scales(static_cast<size_t>(d));
    p.template sums<1>(
        mean.data(), [=](int64_t, int64_t i, Vec<T>* term) { term[0] = load(x + i); },
        [=](int64_t, int64_t i, T* term) { term[0] = x[i]; });
    for (auto& sum : mean) sum /= double(p.rows);
    const auto center = p.repeated(mean.data());
    const T* middle = center.data();
    p.template sums<1>(
        squares.data(),
        [=](int64_t k, int64_t i, Vec<T>* term) {
            const Vec<T> off = load(x + i) - load(middle + k);
            term[0] = off * off;
        },
        [=](int64_t k, int64_t i, T* term) { term[0] = (x[i] - middle[k]) * (x[i] - middle[k]); });
    for (int64_t c = 0; c < d; ++c) {
        const double m = mean[size_t(c)], square = squares[size_t(c)];
        const double inverse = 1 / std::sqrt(square / double(p.rows) + eps);
        statistics[c] = T(m), statistics[d + c] = T(inverse);
        scales[size_t(c)] = inverse * double(weight[c]);
        running_mean[c] = T((1 - momentum) * double(running_mean[c]) + momentum * m);
        running_var[c] = T((1 - momentum) * double(running_var[c]) + momentum * square / double(p.rows - 1));
    }
    const auto scale = p.repeated(scales.data()), shift = p.repeated(bias);
    p.map(out, [&](int64_t k, int64_t i, int64_t some) {
        return (load_some(x + i, some) - load(middle + k)) * load(scale.data() + k) + load(shift.data() + k);
    });
}

// grad_x = weight r (g - mean(g) - y mean(g y)), y = (x - mean) r, r = 1 / sqrt(var + eps); plus `passed`, the gradient
// of another use of x, where it is not null.
template <class T>
void batch_norm_backward(Periods<T> p, const T* x, const T* weight, const T* statistics, const T* grad, const T* passed,
                         T* grad_x, T* grad_weight, T* grad_bias) {
    const int64_t d = p.d;
    std::vector<double> sums(static_cast<size_t>(2 * d)), factors(static_cast<size_t>(3 * d));
    const auto center = p.repeated(statistics);
    const T* middle = center.data();
    p.template sums<2>(
        sums.data(),
        [=](int64_t k, int64_t i, Vec<T>* term) {
            term[0] = load(grad + i);
            term[1] = term[0] * (load(x + i) - load(middle + k));
        },
        [=](int64_t k, int64_t i, T* term) { term[0] = grad[i], term[1] = grad[i] * (x[i] - middle[k]); });
    for (int64_t c = 0; c < d; ++c) {
        const double inverse = double(statistics[d + c]), n = double(p.rows);
        const double to_bias = sums[size_t(c)], to_weight = sums[size_t(d + c)] * inverse;
        grad_bias[c] = T(to_bias), grad_weight[c] = T(to_weight);
        const double slope = double(weight[c]) * inverse;
        factors[size_t(c)] = slope;
        factors[size_t(d + c)] = -slope * inverse * to_weight / n;
        factors[size_t(2 * d + c)] = -slope * to_bias / n;
    }
    const auto first = p.repeated(factors.data()), second = p.repeated(factors.data() + d);
    const auto third = p.repeated(factors.data() + 2 * d);
    p.map(grad_x, [&](int64_t k, int64_t i, int64_t some) {
        const Vec<T> off = load_some(x + i, some) - load(middle + k);
        const Vec<T> own = load_some(grad + i, some) * load(first.data() + k) + off * load(second.data() + k) +
                           load(third.data() + k);
        return passed ? own + load_some(passed + i, some) : own;
    });
}

}  // namespace

#define BATCH_NORM(T, SUFFIX)                                                                                           \
    extern "C" void batch_norm_forward_##SUFFIX(int64_t rows, int64_t d, const T* x, const T* weight, const T* bias,    \
                                                T* running_mean, T* running_var, double momentum, double eps,           \
                                                T* statistics, T* out, int threads) {                                   \
        batch_norm_forward<T>({rows, d, threads}, x, weight, bias, running_mean, running_var, momentum, eps,            \
                              statistics, out);                                                                         \
    }                                                                                                                   \
    extern "C" void batch_norm_backward_##SUFFIX(int64_t rows, int64_t d, const T* x, const T* weight,                  \
                                                 const T* statistics, const T* grad, const T* passed, T* grad_x,        \
                                                 T* grad_weight, T* grad_bias, int threads) {                           \
        batch_norm_backward<T>({rows, d, threads}, x, weight, statistics, grad, passed, grad_x, grad_weight, grad_bias); \
    }
BATCH_NORM(float, f32)
BATCH_NORM(double, f64)
