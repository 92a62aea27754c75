#pragma once
#include "fft.h"
#include "products.h"

namespace {

// The impulse response of a diagonal system, K_t = Re(C lam^t B) for t < length, to which D is added at t = 0, and the
// gradients of the system from that of K. log_radius, phase (n), B (n, p), C (q, n), D (p) with q = p, or none,
// K (length, q, p).
//
// With t = m a + b the response is one product of real matrices, of "observe", C lam^(m a) for all a, and "reach",
// lam^b B for all b, which have a row for each output and a (input and b). Both are computed for W states at a time, so
// that lanes run over states; a row then has real parts, then imaginary parts (of "observe" their negatives, as
// Re(x y) = Re x Re y - Im x Im y has them).
//
// Powers are multiplied up in double precision: in single precision a slow state would turn too far.

template <class T> struct Response {
    int64_t length, p, q, n, m;
    const T *log_radius, *phase, *B_re, *B_im, *C_re, *C_im;
    int64_t starts() const { return (length + m - 1) / m; }
    int64_t rows() const { return starts() * q; }
    int64_t columns() const { return m * p; }
    int64_t blocks() const { return (n + W<T> - 1) / W<T>; }
    int64_t lanes(int64_t block) const { return std::min<int64_t>(W<T>, n - block * W<T>); }
};

template <class T> struct StateBlock {
    const Response<T>& s;
    Buffer<T> memory;
    Complex<T> *fine, *coarse, *B, *C, *reach, *observe;  // lam^b, lam^(m a), the matrices, and their products

    explicit StateBlock(const Response<T>& s)
        : s(s), memory((s.m + s.starts() + s.p + W<T> + s.q + s.columns() + s.rows()) * 2 * W<T>) {
        fine = reinterpret_cast<Complex<T>*>(static_cast<T*>(memory));
        coarse = fine + s.m, B = coarse + s.starts(), C = B + s.p + W<T>, reach = C + s.q, observe = reach + s.columns();
    }

    void fill(int64_t block) const {
        const int64_t first = block * W<T>, lanes = s.lanes(block);
        double step[2][W<T>] = {};
        for (int64_t i = 0; i < lanes; ++i) {
            const double radius = std::exp(double(s.log_radius[first + i])), phase = double(s.phase[first + i]);
            step[0][i] = radius * std::cos(phase), step[1][i] = radius * std::sin(phase);
        }
        powers(step, s.m, fine);  // and the step becomes lam^m
        powers(step, s.starts(), coarse);
        Vec<T> parts[2 * W<T>];
        for (int64_t j = 0; j < s.p; j += W<T>) {
            const int64_t some = std::min<int64_t>(W<T>, s.p - j);
            to_lanes(s.B_re + first * s.p + j, s.p, lanes, some, parts);
            to_lanes(s.B_im + first * s.p + j, s.p, lanes, some, parts + W<T>);
            for (int64_t k = 0; k < some; ++k) B[j + k] = {parts[k], parts[W<T> + k]};
        }
        for (int64_t i = 0; i < s.q; ++i)
            C[i] = {load_some(s.C_re + i * s.n + first, lanes), load_some(s.C_im + i * s.n + first, lanes)};
        for (int64_t b = 0; b < s.m; ++b)
            for (int64_t j = 0; j < s.p; ++j) reach[b * s.p + j] = product(fine[b], B[j]);
        for (int64_t a = 0; a < s.starts(); ++a)
            for (int64_t i = 0; i < s.q; ++i) {
                const Complex<T> x = product(coarse[a], C[i]);
                observe[a * s.q + i] = {x.re, -x.im};
            }
    }

    static Complex<T> product(Complex<T> x, Complex<T> y) {
        return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
    }
    static void powers(double (&step)[2][W<T>], int64_t count, Complex<T>* out) {
        double re[W<T>], im[W<T>] = {};
        std::fill(re, re + W<T>, 1.);
        for (int64_t j = 0; j < count; ++j)
            for (int i = 0; i < W<T>; ++i) {
                out[j].re[i] = T(re[i]), out[j].im[i] = T(im[i]);
                const double next = re[i] * step[0][i] - im[i] * step[1][i];
                im[i] = re[i] * step[1][i] + im[i] * step[0][i], re[i] = next;
            }
        for (int i = 0; i < W<T>; ++i) step[0][i] = re[i], step[1][i] = im[i];
    }
};

// One row of the product, (m, p) for one output and one a, in K.
template <class T, class Body> void steps_of_row(const Response<T>& s, int64_t row, Body body) {
    const int64_t first = row / s.q * s.m, output = row % s.q;
    for (int64_t b = 0; b < std::min(s.m, s.length - first); ++b) body(((first + b) * s.q + output) * s.p, b * s.p);
}

template <class T> void impulse_forward(Response<T> s, const T* D, T* impulse, int threads) {
    constexpr int64_t together = 8 * block_rows, deep = 8 * W<T>;  // what is read of `reach` at a time fits into L1
    const int64_t n = s.n, columns = s.columns(), rows = s.rows();
    const Buffer<T> observe(rows * 2 * n + W<T>), reach(columns * 2 * n + W<T>);  // (rows, 2 n), (2 n, columns)
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const StateBlock<T> states(s);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < s.blocks(); ++block) {
            states.fill(block);
            const int64_t at = 2 * block * W<T>, lanes = s.lanes(block);
            for (int64_t row = 0; row < rows; ++row) {
                store_some(observe + row * 2 * n + at, states.observe[row].re, lanes);
                store_some(observe + row * 2 * n + at + lanes, states.observe[row].im, lanes);
            }
            const T* parts = reinterpret_cast<const T*>(states.reach);
            for (int part = 0; part < 2; ++part)
                transpose_tile(columns, lanes, parts + part * W<T>, 2 * W<T>, reach + (at + part * lanes) * columns,
                               columns);
        }
        const Buffer<T> tile(together * columns + W<T>);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += together) {
            const int64_t some = std::min(together, rows - first);
            std::fill(tile + 0, tile + some * columns, T(0));
            for (int64_t k = 0; k < 2 * n; k += deep)
                add_product(some, columns, std::min(deep, 2 * n - k), ::rows(observe + first * 2 * n + k, 2 * n),
                            reach + k * columns, columns, tile + 0, columns);
            for (int64_t row = 0; row < some; ++row)
                steps_of_row(s, first + row, [&](int64_t there, int64_t here) {
                    std::copy(tile + row * columns + here, tile + row * columns + here + s.p, impulse + there);
                });
        }
    }
    for (int64_t i = 0; D && i < s.p; ++i) impulse[i * s.p + i] += D[i];
}

// The gradient of x, `count` numbers, and of log lam (log radius, phase) from that of x lam^(stride j) for all j.
template <class T>
void factors_backward(int64_t count, int64_t powers, int64_t stride, const Complex<T>* x, const Complex<T>* power,
                      const Complex<T>* grad, Complex<T>* grad_x, Complex<T>& to_lam) {
    for (int64_t i = 0; i < count; ++i) {
        Complex<T> sum{}, moment{};
        for (int64_t j = 0; j < powers; ++j) {
            const Complex<T> g = grad[j * count + i], w = power[j];
            const Complex<T> term{g.re * w.re + g.im * w.im, g.im * w.re - g.re * w.im};  // g conj(w)
            sum = sum + term;
            moment.re += T(stride * j) * term.re, moment.im += T(stride * j) * term.im;
        }
        grad_x[i] = sum;
        to_lam.re += moment.re * x[i].re + moment.im * x[i].im;
        to_lam.im += moment.im * x[i].re - moment.re * x[i].im;
    }
}

// Every block of states has a thread to itself, and its gradients do not depend on how many there are.
template <class T>
void impulse_backward(Response<T> s, const T* grad, T* grad_log_radius, T* grad_phase, T* grad_B_re, T* grad_B_im,
                      T* grad_C_re, T* grad_C_im, T* grad_D, int threads) {
    constexpr int64_t wide = 2 * W<T>;
    const int64_t columns = s.columns(), rows = s.rows();
    const Buffer<T> all(rows * columns + W<T>);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            std::fill(all + row * columns, all + (row + 1) * columns, T(0));
            steps_of_row(s, row, [&](int64_t there, int64_t here) {
                std::copy(grad + there, grad + there + s.p, all + row * columns + here);
            });
        }
        const StateBlock<T> states(s);
        const Buffer<T> memory((rows + columns + s.q + s.p + W<T>) * wide);
        auto* to_observe = reinterpret_cast<Complex<T>*>(static_cast<T*>(memory));
        Complex<T> *to_reach = to_observe + rows, *to_C = to_reach + columns, *to_B = to_C + s.q;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < s.blocks(); ++block) {
            states.fill(block);
            set_product(rows, wide, columns, ::rows<T>(all, columns), reinterpret_cast<const T*>(states.reach), wide,
                        reinterpret_cast<T*>(to_observe), wide);
            set_product(columns, wide, rows, ::columns<T>(all, columns), reinterpret_cast<const T*>(states.observe),
                        wide, reinterpret_cast<T*>(to_reach), wide);
            for (int64_t row = 0; row < rows; ++row) to_observe[row].im = -to_observe[row].im;
            Complex<T> to_lam{};
            factors_backward<T>(s.q, s.starts(), s.m, states.C, states.coarse, to_observe, to_C, to_lam);
            factors_backward<T>(s.p, s.m, 1, states.B, states.fine, to_reach, to_B, to_lam);
            const int64_t first = block * W<T>, lanes = s.lanes(block);
            store_some(grad_log_radius + first, to_lam.re, lanes), store_some(grad_phase + first, to_lam.im, lanes);
            for (int64_t i = 0; i < s.q; ++i) {
                store_some(grad_C_re + i * s.n + first, to_C[i].re, lanes);
                store_some(grad_C_im + i * s.n + first, to_C[i].im, lanes);
            }
            for (int64_t j = 0; j < s.p; ++j)
                for (int64_t i = 0; i < lanes; ++i) {
                    grad_B_re[(first + i) * s.p + j] = to_B[j].re[i];
                    grad_B_im[(first + i) * s.p + j] = to_B[j].im[i];
                }
        }
    }
    for (int64_t i = 0; grad_D && i < s.p; ++i) grad_D[i] = grad[i * s.p + i];
}

}  // namespace

#define IMPULSE(T, SUFFIX)                                                                                              \
    extern "C" void impulse_forward_##SUFFIX(int64_t length, int64_t p, int64_t q, int64_t n, int64_t m,                \
                                             const T* log_radius, const T* phase, const T* B_re, const T* B_im,         \
                                             const T* C_re, const T* C_im, const T* D, T* impulse, int threads) {       \
        impulse_forward<T>({length, p, q, n, m, log_radius, phase, B_re, B_im, C_re, C_im}, D, impulse, threads);       \
    }                                                                                                                   \
    extern "C" void impulse_backward_##SUFFIX(int64_t length, int64_t p, int64_t q, int64_t n, int64_t m,               \
                                              const T* log_radius, const T* phase, const T* B_re, const T* B_im,        \
                                              const T* C_re, const T* C_im, const T* grad, T* grad_log_radius,          \
                                              T* grad_phase, T* grad_B_re, T* grad_B_im, T* grad_C_re, T* grad_C_im,    \
                                              T* grad_D, int threads) {                                                 \
        impulse_backward<T>({length, p, q, n, m, log_radius, phase, B_re, B_im, C_re, C_im}, grad, grad_log_radius,     \
                            grad_phase, grad_B_re, grad_B_im, grad_C_re, grad_C_im, grad_D, threads);                   \
    }
IMPULSE(float, f32)
IMPULSE(double, f64)
