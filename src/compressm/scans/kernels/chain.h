#pragma once
#include "vectors.h"

namespace {

// Chain of complex diagonal states: s_m = lam s_{m-1} + v_m. v, states (batch, m, 2, n): real parts, imaginary parts.
// Memory is read and written once, in order; every task owns a range of the states of one sequence.

template <class T> struct Range {
    int64_t b, from, to;
    Range(int64_t task, int64_t groups, int64_t n) : b(task / groups) {
        const int64_t group = task % groups;
        from = n * group / groups, to = n * (group + 1) / groups;
    }
};

template <class T>
void chain_forward(int64_t batch, int64_t length, int64_t n, const T* v, const T* lam, const T* initial, T* states,
                   int64_t groups, int threads) {
    const T *lam_re = lam, *lam_im = lam + n;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * groups; ++task) {
            const Range<T> own(task, groups, n);
            const T* before = initial + own.b * 2 * n;
            for (int64_t m = 0; m < length; ++m) {
                const T* in = v + (own.b * length + m) * 2 * n;
                T* __restrict__ out = states + (own.b * length + m) * 2 * n;
#pragma GCC ivdep
                for (int64_t i = own.from; i < own.to; ++i) {
                    const T re = before[i], im = before[n + i];
                    out[i] = in[i] + lam_re[i] * re - lam_im[i] * im;
                    out[n + i] = in[n + i] + lam_re[i] * im + lam_im[i] * re;
                }
                before = out;
            }
        }
    }
}

// adjoint_m = grad_m + conj(lam) adjoint_{m+1}; grad_lam (batch, 2, n), to be summed: sum_m adjoint_m conj(s_{m-1}).
template <class T>
void chain_backward(int64_t batch, int64_t length, int64_t n, const T* grad, const T* lam, const T* initial,
                    const T* states, T* adjoint, T* grad_lam, int64_t groups, int threads) {
    const T *lam_re = lam, *lam_im = lam + n;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const std::vector<T> nothing(2 * n, T(0));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * groups; ++task) {
            const Range<T> own(task, groups, n);
            T* __restrict__ sum = grad_lam + own.b * 2 * n;
            const T* after = nothing.data();
            for (int64_t m = length - 1; m >= 0; --m) {
                const T* in = grad + (own.b * length + m) * 2 * n;
                const T* state = m ? states + (own.b * length + m - 1) * 2 * n : initial + own.b * 2 * n;
                T* __restrict__ out = adjoint + (own.b * length + m) * 2 * n;
#pragma GCC ivdep
                for (int64_t i = own.from; i < own.to; ++i) {
                    const T re = in[i] + lam_re[i] * after[i] + lam_im[i] * after[n + i];
                    const T im = in[n + i] + lam_re[i] * after[n + i] - lam_im[i] * after[i];
                    out[i] = re;
                    out[n + i] = im;
                    sum[i] += re * state[i] + im * state[n + i];
                    sum[n + i] += im * state[i] - re * state[n + i];
                }
                after = out;
            }
        }
    }
}

}  // namespace

#define CHAIN(T, SUFFIX)                                                                                                \
    extern "C" void chain_forward_##SUFFIX(int64_t batch, int64_t length, int64_t n, const T* v, const T* lam,          \
                                           const T* initial, T* states, int64_t groups, int threads) {                  \
        chain_forward<T>(batch, length, n, v, lam, initial, states, groups, threads);                                   \
    }                                                                                                                   \
    extern "C" void chain_backward_##SUFFIX(int64_t batch, int64_t length, int64_t n, const T* grad, const T* lam,      \
                                            const T* initial, const T* states, T* adjoint, T* grad_lam,                 \
                                            int64_t groups, int threads) {                                              \
        chain_backward<T>(batch, length, n, grad, lam, initial, states, adjoint, grad_lam, groups, threads);            \
    }
CHAIN(float, f32)
CHAIN(double, f64)
