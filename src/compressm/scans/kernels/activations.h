#pragma once
#include "vectors.h"

namespace {

// Activations with dropout, in one pass over memory. Whether an element is dropped is a hash of its index and a seed:
// the backward pass draws the same numbers again, and no mask is stored.

// The finalizer of MurmurHash3 (A. Appleby, public domain), after which each bit has affected every bit; `key` enters
// in the middle, for without it two seeds would give the same sequence, shifted.
template <class Words> inline Words mixed(Words x, uint32_t key) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13) ^ key) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

struct Dropout {
    uint32_t offset, key, threshold;
    double keep;

    Dropout(int64_t seed, double probability)
        : threshold(uint32_t(probability * 4294967296.)), keep(1 / (1 - probability)) {
        uint64_t x = uint64_t(seed) + 0x9e3779b97f4a7c15u;  // SplitMix64 (S. Vigna, public domain): seeds may be close
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        x ^= x >> 31;
        offset = uint32_t(x), key = uint32_t(x >> 32);
    }

    template <class T> inline typename Vectors<T>::words words(int64_t index) const {
        const uint32_t first = uint32_t(index) + offset;
        typename Vectors<T>::words count;
        for (int i = 0; i < W<T>; ++i) count[i] = uint32_t(i);
        return mixed(count + first, key + mixed(uint32_t(index >> 32), 0));
    }
    template <class T> inline Vec<T> kept(typename Vectors<T>::words words) const {
        const auto whether = __builtin_convertvector(words >= threshold, typename Vectors<T>::integers);
        return whether ? Vec<T>{} + T(keep) : Vec<T>{};
    }

    // What to multiply the elements from `index` on with: 0 or 1 / (1 - probability).
    template <class T> inline Vec<T> factors(int64_t index) const {
        return threshold ? kept<T>(words<T>(index)) : Vec<T>{} + T(1);
    }
    // Two of them by one hash: whatever interval the hash lies in, its multiples by an odd number near the golden
    // section of 2^32 are spread evenly.
    template <class T> inline void pair(int64_t index, Vec<T>& first, Vec<T>& second) const {
        first = second = Vec<T>{} + T(1);
        if (!threshold) return;
        const auto hash = words<T>(index);
        first = kept<T>(hash);
        second = kept<T>(hash * 0x9e3779b1u);
    }
};

// GELU in its tanh form, x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) (Hendrycks, Gimpel 2016).
template <class T> struct Gelu {
    static constexpr T linear = T(1.5957691216057307), cubic = T(1.5957691216057307 * 0.044715);
    Vec<T> x, square, s;
    inline explicit Gelu(Vec<T> x) : x(x), square(x * x), s(sigmoid<T>(x * (linear + cubic * square))) {}
    inline Vec<T> value() const { return x * s; }
    inline Vec<T> slope() const { return s + x * s * (T(1) - s) * (linear + T(3) * cubic * square); }
};

// GELU, then dropout. With `grad` the result is the gradient.
template <class T>
void gelu(int64_t count, const T* x, const T* grad, T* out, Dropout dropout, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < (count + w - 1) / w; ++i) {
        const int64_t at = i * w, some = std::min<int64_t>(w, count - at);
        const Gelu<T> gelu(load_some(x + at, some));
        const Vec<T> result = grad ? gelu.slope() * load_some(grad + at, some) : gelu.value();
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
        gelu<T>(count, x, grad, out, {seed, probability}, threads);                                           \
    }                                                                                                                   \
    extern "C" void glu_##SUFFIX(int64_t rows, int64_t d, const T* u, const T* v, const T* grad, T* out, int64_t seed,  \
                                 double probability, int threads) {                                                     \
        glu<T>(rows, d, u, v, grad, out, {seed, probability}, threads);                                       \
    }
ACTIVATIONS(float, f32)
ACTIVATIONS(double, f64)
