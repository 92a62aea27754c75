#pragma once
#include "vectors.h"

namespace {

// Activations with dropout, in one pass over memory. Whether an element is dropped is a hash of its index and a seed:
// the backward pass draws the same numbers again, and no mask is stored.

inline uint32_t mixed(uint32_t x) {  // finalizer of MurmurHash3 (A. Appleby, public domain): each bit affects every bit
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

struct Dropout {
    uint64_t seed;
    double probability;
    // What to multiply the elements from `index` on with: 0 or 1 / (1 - probability).
    template <class T> inline Vec<T> factors(int64_t index) const {
        Vec<T> factor{};
        if (probability == 0) return factor + T(1);
        const uint32_t low = uint32_t(seed) + mixed(uint32_t(index >> 32)), high = uint32_t(seed >> 32);
        const uint32_t threshold = uint32_t(probability * 4294967296.);
        const T keep = T(1 / (1 - probability));
        for (int i = 0; i < W<T>; ++i)
            factor[i] = mixed(mixed(uint32_t(index) + uint32_t(i) + low) ^ high) >= threshold ? keep : T(0);
        return factor;
    }
};

// GELU in its tanh form, x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks, Gimpel 2016), then dropout. With `grad`
// the result is the gradient.
template <class T>
void gelu(int64_t count, const T* x, const T* grad, T* out, Dropout dropout, int threads) {
    constexpr int w = W<T>;
    const T slope = T(1.5957691216057307), cubic = T(0.044715);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < (count + w - 1) / w; ++i) {
        const int64_t at = i * w, some = std::min<int64_t>(w, count - at);
        const Vec<T> v = load_some(x + at, some), square = v * v;
        const Vec<T> s = sigmoid<T>(v * (slope + slope * cubic * square));
        Vec<T> result = grad ? s + v * s * (T(1) - s) * (slope + T(3) * slope * cubic * square) : v * s;
        if (grad) result *= load_some(grad + at, some);
        store_some(out + at, result * dropout.factors<T>(at), some);
    }
}

// out = u + dropout(a sigmoid(b)), where a row of v is (a, b). With `grad` instead the gradient with respect to v.
// Rows may be shorter than a vector: the halves of some rows at a time are laid one after the other first.
template <class T>
void glu(int64_t rows, int64_t d, const T* u, const T* v, const T* grad, T* out, Dropout dropout, int threads) {
    constexpr int w = W<T>;
    const int64_t block = std::max<int64_t>(1, 512 / d), blocks = (rows + block - 1) / block;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> halves(2 * size_t(block * d + w));
        T *__restrict__ a = halves.data(), *__restrict__ b = a + block * d + w;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks; ++task) {
            const int64_t first = task * block, here = std::min(block, rows - first), count = here * d;
            for (int64_t row = 0; row < here; ++row) {
                const T* __restrict__ from = v + (first + row) * 2 * d;
                for (int64_t i = 0; i < d; ++i) a[row * d + i] = from[i], b[row * d + i] = from[d + i];
            }
            for (int64_t i = 0; i < count; i += w) {
                const int64_t some = std::min<int64_t>(w, count - i), at = first * d + i;
                const Vec<T> left = load(a + i), s = sigmoid<T>(load(b + i)), factor = dropout.factors<T>(at);
                if (grad) {
                    const Vec<T> g = load_some(grad + at, some) * factor;
                    store(a + i, g * s);
                    store(b + i, g * left * s * (T(1) - s));
                } else {
                    store_some(out + at, load_some(u + at, some) + left * s * factor, some);
                }
            }
            if (grad)
                for (int64_t row = 0; row < here; ++row) {
                    T* __restrict__ to = out + (first + row) * 2 * d;
                    for (int64_t i = 0; i < d; ++i) to[i] = a[row * d + i], to[d + i] = b[row * d + i];
                }
        }
    }
}

}  // namespace

#define ACTIVATIONS(T, SUFFIX)                                                                                          \
    extern "C" void gelu_##SUFFIX(int64_t count, const T* x, const T* grad, T* out, int64_t seed, double probability,   \
                                  int threads) {                                                                        \
        gelu<T>(count, x, grad, out, {uint64_t(seed), probability}, threads);                                           \
    }                                                                                                                   \
    extern "C" void glu_##SUFFIX(int64_t rows, int64_t d, const T* u, const T* v, const T* grad, T* out, int64_t seed,  \
                                 double probability, int threads) {                                                     \
        glu<T>(rows, d, u, v, grad, out, {uint64_t(seed), probability}, threads);                                       \
    }
ACTIVATIONS(float, f32)
ACTIVATIONS(double, f64)
