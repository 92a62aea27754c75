#pragma once
#include "vectors.h"

namespace {

// 2^e; zero below and infinite above the exponents of normal numbers.
template <class T> inline Vec<T> power_of_two(typename Vectors<T>::integers e) {
    using Integers = typename Vectors<T>::integers;
    constexpr int bias = int(Vectors<T>::limit) + 1;
    const Integers low = Integers{} - bias, high = Integers{} + (bias + 1);
    e = e < low ? low : e;
    e = e > high ? high : e;
    return (Vec<T>)((e + bias) << Vectors<T>::mantissa);
}

// Decays between the steps of a chunk. The sum of logarithms up to a step, to the base 2, is an integer and a fraction in
// [-1/2, 1/2]. Differences of the integers are exact and those of the fractions small: however much a strong decay adds to
// the sums, the decays between later steps keep all their digits. Logarithms below -800 are taken for -800, where exp is
// zero even in double precision.
template <class T> struct Decays {
    using Integers = typename Vectors<T>::integers;
    static constexpr int longest = 128;
    Vec<T> up[longest / W<T>], down[longest / W<T>];  // 2^fraction, 2^-fraction
    Integers exponent[longest / W<T>];
    Vec<T> from_start[longest / W<T>], to_end[longest / W<T>], delta[longest / W<T>], delta_to_end[longest / W<T>];
    T total;

    void set(const T* log_decay, const T* factors, int64_t stride, int64_t steps) {
        constexpr int w = W<T>;
        const double magic = 6755399441055744.;  // 1.5 * 2^52: adding it rounds to an integer
        double sum = 0;
        T fraction[w];
        for (int64_t v = 0; v * w < steps; ++v) {
            for (int i = 0; i < w; ++i) {
                const int64_t t = v * w + i;
                const double log = t < steps ? double(log_decay[t * stride]) : 0.;
                sum += (log < -800. ? -800. : log) * 1.4426950408889634074;
                const double shifted = sum + magic;
                int64_t bits;
                std::memcpy(&bits, &shifted, 8);
                exponent[v][i] = int32_t(bits);
                fraction[i] = T(sum - (shifted - magic));
                delta[v][i] = factors && t < steps ? factors[t * stride] : T(1);
            }
            up[v] = exp2_fraction(load(fraction));
            down[v] = exp2_fraction(-load(fraction));
            from_start[v] = up[v] * power_of_two<T>(exponent[v]);
        }
        const int64_t last = steps - 1;
        for (int64_t v = 0; v * w < steps; ++v) to_end[v] = to(last, v), delta_to_end[v] = to_end[v] * delta[v];
        total = from_start[last / w][last % w];
    }
    // From the steps of vector v to step i; wanted only where they are not later.
    Vec<T> to(int64_t i, int64_t v) const {
        return (number(up, i) * down[v]) * power_of_two<T>(number(exponent, i) - exponent[v]);
    }
    template <class V> static auto number(const V* vectors, int64_t i) { return vectors[i / W<T>][i % W<T>]; }
};

}  // namespace
