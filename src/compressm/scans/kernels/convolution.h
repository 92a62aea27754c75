#pragma once
#include "fft.h"

namespace {

// Several channels: y_k = sum_j K_j u_{k-j}, K (length, q, p), by the transforms of fft.h. Per frequency the transform
// of K is a complex (q, p) matrix ("transfer"), kept as (size, 2, q, p), real parts, then imaginary parts.
//
// A tile is W sequences. All threads share one tile: in turn columns, rows and columns are spread over them. So every
// frequency belongs to one thread, and no result depends on how many there are.

// Lanes are sequences, data (lanes, length, channels): columns are numbered t2 channels + channel.
template <class T> struct Sequences {
    T* data;
    int64_t lanes, numbers, width;  // length * channels, n2 * channels

    Sequences(const T* data, int64_t tile, int64_t batch, int64_t length, int64_t channels, int64_t n2)
        : data(const_cast<T*>(data) + tile * W<T> * length * channels),
          lanes(std::min<int64_t>(W<T>, batch - tile * W<T>)), numbers(length * channels), width(n2 * channels) {}

    int64_t blocks() const { return (width + W<T> - 1) / W<T>; }
    int64_t columns(int64_t block) const { return std::min<int64_t>(W<T>, width - block * W<T>); }

    void gather(int64_t block, int64_t n1, T* x) const {
        for (int64_t t1 = 0; t1 < n1; ++t1) {
            const int64_t at = t1 * width + block * W<T>, count = numbers - at;
            Vec<T> rows[W<T>] = {};
            if (count >= W<T> && lanes == W<T>) {
#pragma GCC unroll 16
                for (int b = 0; b < W<T>; ++b) rows[b] = load(data + b * numbers + at);
                transpose<T>(rows);
            } else if (count > 0) {
                for (int64_t b = 0; b < lanes; ++b) rows[b] = load_some(data + b * numbers + at, count);
                transpose<T>(rows);
            }
#pragma GCC unroll 16
            for (int i = 0; i < W<T>; ++i) store(x + (t1 * W<T> + i) * W<T>, rows[i]);
        }
    }
    void scatter(int64_t block, int64_t n1, const T* x) const {
        for (int64_t t1 = 0; t1 < n1; ++t1) {
            const int64_t at = t1 * width + block * W<T>, count = std::min(numbers - at, columns(block));
            if (count <= 0) break;
            Vec<T> rows[W<T>];
#pragma GCC unroll 16
            for (int i = 0; i < W<T>; ++i) rows[i] = load(x + (t1 * W<T> + i) * W<T>);
            transpose<T>(rows);
            for (int64_t b = 0; b < lanes; ++b) store_some(data + b * numbers + at, rows[b], count);
        }
    }
};

// Inputs to twiddled columns, and twiddled columns to outputs.
template <class T>
void columns_in(const Plan<T>& plan, Sequences<T> u, int64_t channels, Strided<T> z, T* x, T* scratch) {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < u.blocks(); ++block) {
        u.gather(block, plan.n1, x);
        plan.columns_forward(x, block * W<T>, u.columns(block), channels, z, scratch);
    }
}
template <class T> void columns_out(const Plan<T>& plan, Sequences<T> y, Strided<T> z, T* x, T* scratch) {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < y.blocks(); ++block) {
        plan.columns_back(x, block * W<T>, y.columns(block), z, scratch);
        y.scatter(block, plan.n1, x);
    }
}

// out_o = sum_i M_oi in_i, parts of out swapped; M the matrix at re, im with the given strides, or its conjugate.
template <int outputs, bool conjugate, class T>
void product(int64_t inputs, const T* re, const T* im, int64_t over_out, int64_t over_in, const T* in, T* out) {
    Complex<T> sum[outputs] = {};
    for (int64_t i = 0; i < inputs; ++i) {
        const Complex<T> z = load_complex(in + i * 2 * W<T>);
#pragma GCC unroll 8
        for (int o = 0; o < outputs; ++o) {
            const T a = re[o * over_out + i * over_in], b = im[o * over_out + i * over_in];
            sum[o].re += a * z.re, sum[o].im += a * z.im;
            if constexpr (conjugate) sum[o].re += b * z.im, sum[o].im -= b * z.re;
            else sum[o].re -= b * z.im, sum[o].im += b * z.re;
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) store_complex(out + o * 2 * W<T>, Complex<T>{sum[o].im, sum[o].re});
}

// The forward pass multiplies by the (q, p) matrices, the backward pass by their conjugate transposes.
template <bool adjoint, class T>
void apply(int64_t n2, int64_t p, int64_t q, const T* transfer, const T* in, T* out) {
    const int64_t inputs = adjoint ? q : p, outputs = adjoint ? p : q;
    const int64_t over_out = adjoint ? 1 : p, over_in = adjoint ? p : 1;
    for (int64_t k2 = 0; k2 < n2; ++k2) {
        const T *re = transfer + k2 * 2 * q * p, *im = re + q * p;
        const T* from = in + k2 * inputs * 2 * W<T>;
        T* to = out + k2 * outputs * 2 * W<T>;
        int64_t o = 0;
        const auto some = [&](auto count) {
            for (; o + count <= outputs; o += count)
                product<count, adjoint>(inputs, re + o * over_out, im + o * over_out, over_out, over_in, from,
                                        to + o * 2 * W<T>);
        };
        some(std::integral_constant<int, 8>{});
        some(std::integral_constant<int, 4>{});
        some(std::integral_constant<int, 1>{});
    }
}

// to_transfer += sum over lanes of y conj(u)'. W/2 channels of u are transposed, so that a vector holds all of them
// for one sequence, real parts and then imaginary parts, and lanes need not be summed.
template <class T>
void correlate(int64_t n2, int64_t p, int64_t q, int64_t lanes, const T* u, const T* y, T* to_transfer) {
    constexpr int64_t half = W<T> / 2;
    Vec<T> sign;
    for (int i = 0; i < W<T>; ++i) sign[i] = i < half ? T(1) : T(-1);
    for (int64_t k2 = 0; k2 < n2; ++k2, u += p * 2 * W<T>, y += q * 2 * W<T>, to_transfer += 2 * q * p) {
        for (int64_t c = 0; c < p; c += half) {
            const int64_t channels = std::min(half, p - c);
            Vec<T> straight[W<T>] = {}, crossed[W<T>];
            for (int64_t i = 0; i < channels; ++i) {
                straight[i] = load(u + (c + i) * 2 * W<T>);
                straight[half + i] = load(u + (c + i) * 2 * W<T> + W<T>);
            }
            transpose<T>(straight);
#pragma GCC unroll 16
            for (int b = 0; b < W<T>; ++b) crossed[b] = swap_halves<T>(straight[b]), straight[b] *= sign;
            const auto add = [&](auto count, int64_t o) {
                constexpr int rows = decltype(count)::value;
                Vec<T> sum[rows] = {};
                for (int64_t b = 0; b < lanes; ++b) {
#pragma GCC unroll 8
                    for (int r = 0; r < rows; ++r) {
                        const T* from = y + (o + r) * 2 * W<T> + b;
                        sum[r] += from[0] * straight[b];
                        sum[r] += from[W<T>] * crossed[b];
                    }
                }
                for (int r = 0; r < rows; ++r) {
                    T parts[W<T>];
                    store(parts, sum[r]);
                    T *re = to_transfer + (o + r) * p + c, *im = re + q * p;
                    if (channels == half) {
                        for (int64_t i = 0; i < half; ++i) re[i] += parts[i];
                        for (int64_t i = 0; i < half; ++i) im[i] += parts[half + i];
                    } else {
                        for (int64_t i = 0; i < channels; ++i) re[i] += parts[i], im[i] += parts[half + i];
                    }
                }
            };
            int64_t o = 0;
            for (; o + 8 <= q; o += 8) add(std::integral_constant<int, 8>{}, o);
            for (; o < q; ++o) add(std::integral_constant<int, 1>{}, o);
        }
    }
}

// Room for one more complex vector keeps the rows from meeting in the same lines of the cache.
inline int64_t row_stride(int64_t n2, int64_t channels) { return n2 * channels + 1; }

template <class T>
void convolve(int64_t batch, int64_t length, int64_t p, int64_t q, const int64_t* shape, const T* tables, const T* u,
              const T* transfer, T* y, int threads) {
    const Plan<T> plan(shape, tables);
    const int64_t n2 = plan.n2, stride = row_stride(n2, std::max(p, q));
    const Buffer<T> all(plan.n1 * stride * 2 * W<T>);
    const Strided<T> z{all, stride};
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const Buffer<T> x(plan.n1 * W<T> * W<T>), scratch(plan.scratch());
        const Buffer<T> in(n2 * p * 2 * W<T>), out(n2 * q * 2 * W<T>);
        for (int64_t tile = 0; tile * W<T> < batch; ++tile) {
            columns_in<T>(plan, {u, tile, batch, length, p, n2}, p, z, x, scratch);
#pragma omp for schedule(static)
            for (int64_t k1 = 0; k1 < plan.n1; ++k1) {
                plan.row_forward(z.at(k1, 0), p, in, scratch);
                apply<false, T>(n2, p, q, transfer + k1 * n2 * 2 * q * p, in, out);
                plan.row_back(k1, out, q, z.at(k1, 0), scratch);
            }
            columns_out<T>(plan, {y, tile, batch, length, q, n2}, z, x, scratch);
        }
    }
}

// grad (batch, length, q) of y to grad_u, and added to to_transfer. The inputs' transforms are computed once more:
// that takes no longer than reading them would.
template <class T>
void convolve_backward(int64_t batch, int64_t length, int64_t p, int64_t q, const int64_t* shape, const T* tables,
                       const T* u, const T* transfer, const T* grad, T* grad_u, T* to_transfer, int threads) {
    const Plan<T> plan(shape, tables);
    const int64_t n2 = plan.n2, stride = row_stride(n2, p), grad_stride = row_stride(n2, std::max(p, q));
    const Buffer<T> all(plan.n1 * stride * 2 * W<T>), grad_all(plan.n1 * grad_stride * 2 * W<T>);
    const Strided<T> z{all, stride}, g{grad_all, grad_stride};
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const Buffer<T> x(plan.n1 * W<T> * W<T>), scratch(plan.scratch());
        const Buffer<T> in(n2 * p * 2 * W<T>), out(n2 * q * 2 * W<T>);
        for (int64_t tile = 0; tile * W<T> < batch; ++tile) {
            const Sequences<T> inputs(u, tile, batch, length, p, n2), outputs(grad, tile, batch, length, q, n2);
            columns_in<T>(plan, inputs, p, z, x, scratch);
            columns_in<T>(plan, outputs, q, g, x, scratch);
#pragma omp for schedule(static)
            for (int64_t k1 = 0; k1 < plan.n1; ++k1) {
                const int64_t at = k1 * n2 * 2 * q * p;
                plan.row_forward(z.at(k1, 0), p, in, scratch);
                plan.row_forward(g.at(k1, 0), q, out, scratch);
                correlate<T>(n2, p, q, inputs.lanes, in, out, to_transfer + at);
                apply<true, T>(n2, p, q, transfer + at, out, in);
                plan.row_back(k1, in, p, g.at(k1, 0), scratch);
            }
            columns_out<T>(plan, {grad_u, tile, batch, length, p, n2}, g, x, scratch);
        }
    }
}

// impulse (length, entries) to transfer (size, 2, entries), or (back) the other way round. Lanes are entries, so that
// nothing is transposed.
template <bool back, class T>
void transfer(int64_t length, int64_t entries, const int64_t* shape, const T* tables, T* impulse, T* transfer,
              int threads) {
    const Plan<T> plan(shape, tables);
    const int64_t n1 = plan.n1, n2 = plan.n2, stride = row_stride(n2, 1);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const Buffer<T> x(n1 * W<T> * W<T>), scratch(plan.scratch()), row(n2 * 2 * W<T>), all(n1 * stride * 2 * W<T>);
        const Strided<T> z{all, stride};
#pragma omp for schedule(static)
        for (int64_t entry = 0; entry < entries; entry += W<T>) {
            const int64_t lanes = entries - entry;
            const auto rows = [&] {
                for (int64_t k1 = 0; k1 < n1; ++k1) {
                    if constexpr (!back) plan.row_forward(z.at(k1, 0), 1, row, scratch);
                    for (int64_t k2 = 0; k2 < n2; ++k2) {
                        T *re = transfer + (k1 * n2 + k2) * 2 * entries + entry, *im = re + entries;
                        T* here = row + k2 * 2 * W<T>;
                        if constexpr (back) {  // parts swapped
                            store(here, load_some(im, lanes)), store(here + W<T>, load_some(re, lanes));
                        } else {
                            store_some(re, load(here), lanes), store_some(im, load(here + W<T>), lanes);
                        }
                    }
                    if constexpr (back) plan.row_back(k1, row, 1, z.at(k1, 0), scratch);
                }
            };
            if constexpr (back) rows();
            for (int64_t first = 0; first < n2; first += W<T>) {
                const int64_t count = std::min<int64_t>(W<T>, n2 - first);
                if constexpr (back) plan.columns_back(x, first, count, z, scratch);
                for (int64_t t1 = 0; t1 < n1; ++t1) {
                    for (int64_t i = 0; i < count; ++i) {
                        const int64_t t = t1 * n2 + first + i;
                        T *here = x + (t1 * W<T> + i) * W<T>, *there = impulse + t * entries + entry;
                        if constexpr (back) {
                            if (t < length) store_some(there, load(here), lanes);
                        } else {
                            store(here, t < length ? load_some(there, lanes) : Vec<T>{});
                        }
                    }
                }
                if constexpr (!back) plan.columns_forward(x, first, count, 1, z, scratch);
            }
            if constexpr (!back) rows();
        }
    }
}

}  // namespace

#define CONVOLUTION(T, SUFFIX)                                                                                          \
    extern "C" void convolve_##SUFFIX(int64_t batch, int64_t length, int64_t p, int64_t q, const int64_t* shape,        \
                                      const T* tables, const T* u, const T* transfer, T* y, int threads) {              \
        convolve<T>(batch, length, p, q, shape, tables, u, transfer, y, threads);                                       \
    }                                                                                                                   \
    extern "C" void convolve_backward_##SUFFIX(                                                                         \
        int64_t batch, int64_t length, int64_t p, int64_t q, const int64_t* shape, const T* tables, const T* u,         \
        const T* transfer, const T* grad, T* grad_u, T* to_transfer, int threads) {                                     \
        convolve_backward<T>(batch, length, p, q, shape, tables, u, transfer, grad, grad_u, to_transfer, threads);      \
    }                                                                                                                   \
    extern "C" void impulse_to_transfer_##SUFFIX(int64_t length, int64_t entries, const int64_t* shape,                 \
                                                 const T* tables, T* impulse, T* to, int threads) {                     \
        transfer<false, T>(length, entries, shape, tables, impulse, to, threads);                                       \
    }                                                                                                                   \
    extern "C" void transfer_to_impulse_##SUFFIX(int64_t length, int64_t entries, const int64_t* shape,                 \
                                                 const T* tables, T* impulse, T* from, int threads) {                   \
        transfer<true, T>(length, entries, shape, tables, impulse, from, threads);                                      \
    }
CONVOLUTION(float, f32)
CONVOLUTION(double, f64)
