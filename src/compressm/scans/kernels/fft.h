#pragma once
#include <memory>

#include "vectors.h"

namespace {

// Causal convolution of real sequences, y_k = sum_j K_j u_{k-j} for k < length, by right-angle Fourier transforms:
//
//     U_k = sum_t u_t w^{t (k + 1/4)},   w = exp(-2 pi i / size),   size >= length
//
// multiplies polynomials modulo x^size - i. What passes the end comes back times i: the real part of the product is
// the convolution, with half the points that zero padding would take and with no symmetry between frequencies, so
// that each frequency is on its own.
//
// Lanes are sequences of the batch (or entries of K): a transform is plain arithmetic on vectors. size = n1 n2,
// t = n2 t1 + t2, k = k1 + n1 k2: n2 columns are transformed (n1 points each, t1 to k1), twiddled, then n1 rows (n2
// points each, t2 to k2). A row is one block of memory for all channels; its frequencies are multiplied by their
// matrices as soon as they are there, and go back the same way. An inverse transform is the forward one of numbers
// whose real and imaginary parts are swapped.
//
// Complex vectors: the real parts of all lanes, then the imaginary parts.

template <class T> struct Complex {
    Vec<T> re, im;
};
template <class T> inline Complex<T> operator+(Complex<T> a, Complex<T> b) { return {a.re + b.re, a.im + b.im}; }
template <class T> inline Complex<T> operator-(Complex<T> a, Complex<T> b) { return {a.re - b.re, a.im - b.im}; }
template <class T> inline Complex<T> times(Complex<T> a, T re, T im) {
    return {a.re * re - a.im * im, a.re * im + a.im * re};
}
template <class T> inline Complex<T> minus_i(Complex<T> a) { return {a.im, -a.re}; }
template <class T> inline Complex<T> load_complex(const T* p) { return {load(p), load(p + W<T>)}; }
template <class T> inline void store_complex(T* p, Complex<T> z) { store(p, z.re), store(p + W<T>, z.im); }

// The transform of R numbers in registers.
template <int R, class T> inline __attribute__((always_inline)) void butterfly(Complex<T>* a) {
    if constexpr (R == 2) {
        const Complex<T> sum = a[0] + a[1];
        a[1] = a[0] - a[1], a[0] = sum;
    } else if constexpr (R == 3) {
        constexpr T s = T(0.86602540378443864676);
        const Complex<T> sum = a[1] + a[2], d = minus_i<T>(a[1] - a[2]);
        const Complex<T> middle{a[0].re - T(0.5) * sum.re, a[0].im - T(0.5) * sum.im};
        a[0] = a[0] + sum;
        a[1] = {middle.re + s * d.re, middle.im + s * d.im};
        a[2] = {middle.re - s * d.re, middle.im - s * d.im};
    } else if constexpr (R == 4) {
        const Complex<T> even = a[0] + a[2], even_ = a[0] - a[2], odd = a[1] + a[3], odd_ = minus_i<T>(a[1] - a[3]);
        a[0] = even + odd, a[1] = even_ + odd_, a[2] = even - odd, a[3] = even_ - odd_;
    } else if constexpr (R == 5) {
        constexpr T c1 = T(0.30901699437494742410), c2 = T(-0.80901699437494742410);
        constexpr T s1 = T(0.95105651629515357212), s2 = T(0.58778525229247312917);
        const Complex<T> sum1 = a[1] + a[4], sum2 = a[2] + a[3];
        const Complex<T> d1 = minus_i<T>(a[1] - a[4]), d2 = minus_i<T>(a[2] - a[3]);
        const Complex<T> even1{a[0].re + c1 * sum1.re + c2 * sum2.re, a[0].im + c1 * sum1.im + c2 * sum2.im};
        const Complex<T> even2{a[0].re + c2 * sum1.re + c1 * sum2.re, a[0].im + c2 * sum1.im + c1 * sum2.im};
        const Complex<T> odd1{s1 * d1.re + s2 * d2.re, s1 * d1.im + s2 * d2.im};
        const Complex<T> odd2{s2 * d1.re - s1 * d2.re, s2 * d1.im - s1 * d2.im};
        a[0] = a[0] + sum1 + sum2;
        a[1] = even1 + odd1, a[2] = even2 + odd2, a[3] = even2 - odd2, a[4] = even1 - odd1;
    } else if constexpr (R == 8) {
        constexpr T h = T(0.70710678118654752440);
        Complex<T> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
        butterfly<4, T>(even), butterfly<4, T>(odd);
        odd[1] = {h * (odd[1].re + odd[1].im), h * (odd[1].im - odd[1].re)};
        odd[2] = minus_i<T>(odd[2]);
        odd[3] = {h * (odd[3].im - odd[3].re), -h * (odd[3].re + odd[3].im)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) a[j] = even[j] + odd[j], a[j + 4] = even[j] - odd[j];
    }
}

// Where the points of a transform lie. Several transforms (columns of a buffer) are done side by side.
template <class T> struct Strided {
    T* data;
    int64_t stride;
    T* at(int64_t point, int64_t column) const { return data + (point * stride + column) * 2 * W<T>; }
    Complex<T> get(int64_t point, int64_t column) const { return load_complex<T>(at(point, column)); }
    void put(int64_t point, int64_t column, Complex<T> z) const { store_complex(at(point, column), z); }
};
// Multiplied by factors[point * step + offsets[column]] on the way.
template <class T> struct Twiddled {
    Strided<T> to;
    const T* factors;
    int64_t step;
    const int64_t* offsets;
    void put(int64_t point, int64_t column, Complex<T> z) const {
        const T* w = factors + 2 * (point * step + offsets[column]);
        to.put(point, column, times(z, w[0], w[1]));
    }
};
// Real numbers, W columns wide: multiplied by w^{t/4} when read; when written (parts swapped), the real part of that.
template <class T> struct Real {
    T* data;
    const T* factors;
    T* at(int64_t point, int64_t column) const { return data + (point * W<T> + column) * W<T>; }
    Complex<T> get(int64_t point, int64_t column) const {
        const Vec<T> x = load(at(point, column));
        return {x * factors[2 * point], x * factors[2 * point + 1]};
    }
    void put(int64_t point, int64_t column, Complex<T> z) const {
        store(at(point, column), z.re * factors[2 * point + 1] + z.im * factors[2 * point]);
    }
};

// One pass of Stockham's algorithm: m groups of s butterflies. The last one has no factors.
template <int R, bool last, class T, class In, class Out>
__attribute__((noinline)) void pass(int64_t m, int64_t s, const T* factors, int64_t columns, In in, Out out) {
    for (int64_t group = 0; group < m; ++group, factors += 2 * (R - 1)) {
        for (int64_t i = 0; i < s; ++i) {
            for (int64_t column = 0; column < columns; ++column) {
                Complex<T> a[R];
#pragma GCC unroll 8
                for (int j = 0; j < R; ++j) a[j] = in.get(i + s * (group + m * j), column);
                butterfly<R, T>(a);
                out.put(i + s * R * group, column, a[0]);
#pragma GCC unroll 8
                for (int j = 1; j < R; ++j) {
                    const Complex<T> z = last ? a[j] : times(a[j], factors[2 * j - 2], factors[2 * j - 1]);
                    out.put(i + s * (R * group + j), column, z);
                }
            }
        }
    }
}

template <class Body> void with_radix(int64_t radix, Body body) {
    switch (radix) {
        case 1: return body(std::integral_constant<int, 1>{});
        case 2: return body(std::integral_constant<int, 2>{});
        case 3: return body(std::integral_constant<int, 3>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 5: return body(std::integral_constant<int, 5>{});
        default: return body(std::integral_constant<int, 8>{});
    }
}

constexpr int64_t side_by_side = 4;  // columns at a time, so that a transform's passes stay in the first cache

template <class T> struct Factors {
    int64_t size, count;
    const int64_t* radices;
    const T* factors;  // of every pass but the last, (m, R - 1) complex numbers each

    template <class In, class Out> void transform(int64_t columns, In in, Out out, T* scratch) const {
        Strided<T> a{scratch, side_by_side}, b{scratch + size * side_by_side * 2 * W<T>, side_by_side};
        const T* w = factors;
        int64_t s = radices[0], m = size / s;
        with_radix(s, [&](auto R) { pass<R, false>(m, int64_t(1), w, columns, in, a); });
        for (int64_t i = 1; i + 1 < count; ++i) {
            w += 2 * m * (radices[i - 1] - 1), m /= radices[i];
            with_radix(radices[i], [&](auto R) { pass<R, false>(m, s, w, columns, a, b); });
            s *= radices[i];
            std::swap(a, b);
        }
        with_radix(radices[count - 1], [&](auto R) { pass<R, true>(int64_t(1), s, w, columns, a, out); });
    }
    int64_t numbers() const {
        int64_t total = 0, m = size;
        for (int64_t i = 0; i + 1 < count; ++i) m /= radices[i], total += 2 * m * (radices[i] - 1);
        return total;
    }
};

// shape: n1, n2, then for each how many radices (at least two) and which. tables: w^{t/4} for the starts of columns,
// the same over size, the twiddles w^{t2 (k1 + 1/4)} (n1, n2), the factors inside columns, those inside rows.
template <class T> struct Plan {
    int64_t n1, n2;
    const T *turn, *turn_back, *twiddles;
    Factors<T> columns, rows;

    Plan(const int64_t* shape, const T* tables) : n1(shape[0]), n2(shape[1]) {
        turn = tables, turn_back = turn + 2 * n1, twiddles = turn_back + 2 * n1;
        columns = {n1, shape[2], shape + 3, twiddles + 2 * n1 * n2};
        rows = {n2, shape[3 + shape[2]], shape + 4 + shape[2], columns.factors + columns.numbers()};
    }
    int64_t scratch() const { return std::max(n1, n2) * side_by_side * 4 * W<T>; }

    // Columns first .. first + count of (t2, channel), read from x (n1, W), to all rows of z.
    void columns_forward(T* x, int64_t first, int64_t count, int64_t channels, Strided<T> z, T* scratch) const {
        for (int64_t c = 0; c < count; c += side_by_side) {
            int64_t t2[side_by_side];
            for (int64_t i = 0; i < side_by_side; ++i) t2[i] = (first + c + i) / channels;
            const Strided<T> to{z.at(0, first + c), z.stride};
            columns.transform(std::min(side_by_side, count - c), Real<T>{x + c * W<T>, turn},
                              Twiddled<T>{to, twiddles, n2, t2}, scratch);
        }
    }
    void columns_back(T* x, int64_t first, int64_t count, Strided<T> z, T* scratch) const {
        for (int64_t c = 0; c < count; c += side_by_side)
            columns.transform(std::min(side_by_side, count - c), Strided<T>{z.at(0, first + c), z.stride},
                              Real<T>{x + c * W<T>, turn_back}, scratch);
    }
    // One row, (n2, channels).
    void row_forward(T* in, int64_t channels, T* out, T* scratch) const {
        for (int64_t c = 0; c < channels; c += side_by_side)
            rows.transform(std::min(side_by_side, channels - c), Strided<T>{in + c * 2 * W<T>, channels},
                           Strided<T>{out + c * 2 * W<T>, channels}, scratch);
    }
    void row_back(int64_t k1, T* in, int64_t channels, T* out, T* scratch) const {
        const int64_t none[side_by_side] = {};
        for (int64_t c = 0; c < channels; c += side_by_side) {
            const Strided<T> to{out + c * 2 * W<T>, channels};
            rows.transform(std::min(side_by_side, channels - c), Strided<T>{in + c * 2 * W<T>, channels},
                           Twiddled<T>{to, twiddles + 2 * k1 * n2, 1, none}, scratch);
        }
    }
};

template <class T> struct Buffer {  // aligned, and not filled
    std::unique_ptr<Vec<T>[]> vectors;
    explicit Buffer(int64_t numbers) : vectors(new Vec<T>[numbers / W<T>]) {}
    operator T*() const { return reinterpret_cast<T*>(vectors.get()); }
};

}  // namespace
