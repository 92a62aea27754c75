#pragma once
// What all kernels are written in: short vectors.
//
// Everything is written on vectors of the compiler's extension, as long as the machine's registers, which GCC and Clang
// turn into its own instructions. Lanes run over sequences, channels or states, never over time.

#include <cstdint>
#include <cstring>
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// States that nothing feeds decay into denormal numbers, which cost a hundred cycles each: they are taken for zero.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved));
        asm volatile("msr fpcr, %0" ::"r"(saved | (1ull << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else  // SSE, NEON
constexpr int vector_bytes = 16;
#endif

template <class T> struct Vectors;
template <> struct Vectors<float> {
    typedef float vector __attribute__((vector_size(vector_bytes)));
    typedef float unaligned __attribute__((vector_size(vector_bytes), aligned(4)));
    typedef int32_t integers __attribute__((vector_size(vector_bytes)));
    typedef uint32_t words __attribute__((vector_size(vector_bytes)));
    static constexpr int lanes = vector_bytes / 4, mantissa = 23;
    static constexpr float magic = 12582912.f, limit = 126.f;  // 1.5 * 2^23: adding it rounds to an integer
};
template <> struct Vectors<double> {
    typedef double vector __attribute__((vector_size(vector_bytes)));
    typedef double unaligned __attribute__((vector_size(vector_bytes), aligned(8)));
    typedef int64_t integers __attribute__((vector_size(vector_bytes)));
    typedef uint32_t words __attribute__((vector_size(vector_bytes / 2)));  // as many
    static constexpr int lanes = vector_bytes / 8, mantissa = 52;
    static constexpr double magic = 6755399441055744., limit = 1022.;
};

template <class T> using Vec = typename Vectors<T>::vector;
template <class T> constexpr int W = Vectors<T>::lanes;

template <class T> inline Vec<T> load(const T* p) { return *reinterpret_cast<const typename Vectors<T>::unaligned*>(p); }
template <class T> inline void store(T* p, Vec<T> v) { *reinterpret_cast<typename Vectors<T>::unaligned*>(p) = v; }

// 2^f = 1 + f q(f) on [-1/2, 1/2]; q by weighted least squares towards the minimax error: 9e-8 relative in float,
// 4e-18 in double. With 1 split off, 2^f - 1 is accurate relative to f: slow decays do not drift.
inline Vec<float> exp2_fraction(Vec<float> f) {
    Vec<float> q = f * 1.3265039627599396e-3f + 9.6715133543622474e-3f;
    q = q * f + 5.5507330147671077e-2f;
    q = q * f + 2.4022242073554509e-1f;
    q = q * f + 6.9314697788405234e-1f;
    return q * f + 1.f;
}
inline Vec<double> exp2_fraction(Vec<double> f) {
    Vec<double> q = f * 4.434842248991773178e-10 + 7.073782908814065097e-9;
    q = q * f + 1.0178199130515271399e-7;
    q = q * f + 1.3215435284146252039e-6;
    q = q * f + 1.5252733494110769197e-5;
    q = q * f + 1.5403530457108721099e-4;
    q = q * f + 1.3333558146773684165e-3;
    q = q * f + 9.6181291075941224668e-3;
    q = q * f + 5.5504108664820086711e-2;
    q = q * f + 2.4022650695910131255e-1;
    q = q * f + 6.9314718055994532577e-1;
    return q * f + 1.;
}

// 2^x for x within the exponents of normal numbers, clamped to them otherwise.
template <class T> inline Vec<T> exp2(Vec<T> x) {
    using V = Vec<T>;
    const V limit = V{} + Vectors<T>::limit, magic = V{} + Vectors<T>::magic;
    x = x < -limit ? -limit : x;
    x = x > limit ? limit : x;
    const V shifted = x + magic;
    const V fraction = x - (shifted - magic);
    const auto exponent = (typename Vectors<T>::integers)shifted << Vectors<T>::mantissa;
    return (V)((typename Vectors<T>::integers)exp2_fraction(fraction) + exponent);
}

template <class T> inline T sum_lanes(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < W<T>; ++i) total += v[i];
    return total;
}

template <class T> inline Vec<T> load_some(const T* p, int64_t count) {
    if (count >= W<T>) return load(p);
    Vec<T> v{};
    std::memcpy(&v, p, size_t(count) * sizeof(T));
    return v;
}
template <class T> inline void store_some(T* p, Vec<T> v, int64_t count) {
    if (count >= W<T>) return store(p, v);
    std::memcpy(p, &v, size_t(count) * sizeof(T));
}

// 1 / x for normal numbers with normal inverses, and NaN for NaN. Division is the slowest of all vector instructions: in
// float an estimate to 14 bits and one step of Newton's method, where the machine has one, are as good but for the last.
inline Vec<double> inverse(Vec<double> x) { return 1. / x; }
inline Vec<float> inverse(Vec<float> x) {
#if defined(__AVX512F__)
    const Vec<float> estimate = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return estimate + estimate * (1.f - x * estimate);
#else
    return 1.f / x;
#endif
}

template <class T> inline Vec<T> sigmoid(Vec<T> x) {
    return inverse(T(1) + exp2<T>(x * T(-1.4426950408889634074)));
}

// Lane i of the result is lane index(i) of (a, b), one after the other.
template <class T, class Index, size_t... I>
inline Vec<T> shuffled(Vec<T> a, Vec<T> b, Index, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Index::at(I)...);
#else
    return __builtin_shuffle(a, b, typename Vectors<T>::integers{Index::at(I)...});
#endif
}
template <class T, class Index> inline Vec<T> shuffled(Vec<T> a, Vec<T> b, Index index) {
    return shuffled<T>(a, b, index, std::make_index_sequence<W<T>>());
}
// The lower (upper) halves of two vectors, element by element in turn; the inverse: their even (odd) elements.
template <int w, bool upper> struct Zip {
    static constexpr int at(int i) { return i % 2 * w + i / 2 + (upper ? w / 2 : 0); }
};
template <int w, bool odd> struct Pick {
    static constexpr int at(int i) { return 2 * i + odd; }
};
template <int w> struct SwapHalves {
    static constexpr int at(int i) { return (i + w / 2) % w; }
};
template <class T> inline Vec<T> zip_low(Vec<T> a, Vec<T> b) { return shuffled<T>(a, b, Zip<W<T>, false>()); }
template <class T> inline Vec<T> zip_high(Vec<T> a, Vec<T> b) { return shuffled<T>(a, b, Zip<W<T>, true>()); }
template <class T> inline Vec<T> even(Vec<T> a, Vec<T> b) { return shuffled<T>(a, b, Pick<W<T>, false>()); }
template <class T> inline Vec<T> odd(Vec<T> a, Vec<T> b) { return shuffled<T>(a, b, Pick<W<T>, true>()); }
template <class T> inline Vec<T> swap_halves(Vec<T> a) { return shuffled<T>(a, a, SwapHalves<W<T>>()); }

// A square of lanes, transposed in place. Each round moves one bit of the row's number to the lane's and back.
template <class T> inline __attribute__((always_inline)) void transpose(Vec<T>* rows) {
#pragma GCC unroll 4
    for (int round = 1; round < W<T>; round *= 2) {
        Vec<T> next[W<T>];
#pragma GCC unroll 8
        for (int i = 0; i < W<T> / 2; ++i) {
            next[2 * i] = zip_low<T>(rows[i], rows[i + W<T> / 2]);
            next[2 * i + 1] = zip_high<T>(rows[i], rows[i + W<T> / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W<T>; ++i) rows[i] = next[i];
    }
}

// `count` numbers of each of `some` sequences, whose beginnings are `stride` apart, to vectors over the sequences, zero
// where there is no sequence; and back. Writes up to a multiple of the lanes: `out` has room for as many.
template <class T> inline void to_lanes(const T* in, int64_t stride, int64_t some, int64_t count, Vec<T>* out) {
    constexpr int w = W<T>;
    for (int64_t i = 0; i < count; i += w) {
        for (int64_t b = 0; b < w; ++b) out[i + b] = b < some ? load_some(in + b * stride + i, count - i) : Vec<T>{};
        transpose<T>(out + i);
    }
}
template <class T> inline void from_lanes(const Vec<T>* in, int64_t count, int64_t some, T* out, int64_t stride) {
    constexpr int w = W<T>;
    for (int64_t i = 0; i < count; i += w) {
        Vec<T> rows[w];
        std::copy(in + i, in + i + w, rows);
        transpose<T>(rows);
        for (int64_t b = 0; b < some; ++b) store_some(out + b * stride + i, rows[b], count - i);
    }
}

}  // namespace
