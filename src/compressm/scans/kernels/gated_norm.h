#pragma once
#include "vectors.h"

namespace {

// Numbers that are stored as another type than they are computed in: the upper half of a float.
struct BFloat16 {
    uint16_t bits;
};
typedef uint16_t HalfWords __attribute__((vector_size(vector_bytes / 2)));

inline Vec<float> load_some(const BFloat16* p, int64_t count) {
    HalfWords bits{};
    if (count >= W<float>) std::memcpy(&bits, p, sizeof bits);
    else std::memcpy(&bits, p, size_t(count) * sizeof(BFloat16));
    return (Vec<float>)(__builtin_convertvector(bits, typename Vectors<float>::words) << 16);
}
// Rounds to the nearest, and ties to even; NaN stays NaN.
inline void store_some(BFloat16* p, Vec<float> v, int64_t count) {
    const auto words = (typename Vectors<float>::words)v;
    const auto rounded = v == v ? words + 0x7fffu + ((words >> 16) & 1u) : words | 0x400000u;
    const HalfWords bits = __builtin_convertvector(rounded >> 16, HalfWords);
    if (count >= W<float>) std::memcpy(p, &bits, sizeof bits);
    else std::memcpy(p, &bits, size_t(count) * sizeof(BFloat16));
}

// (outer, inner, d) numbers, of which the last d lie side by side; the rows are counted through.
template <class S> struct Rows {
    const S* first;
    int64_t inner, over_outer, over_inner;
    const S* at(int64_t row) const { return first + row / inner * over_outer + row % inner * over_inner; }
};

// The root mean square norm n(v) = v / sqrt(mean(v^2) + eps) over each of `groups` parts of a row, `width` numbers wide:
// out = weight n(x silu(z)), or, if the gate comes last, out = weight n(x) silu(z). weight and out (rows, groups * width).
// T is what is computed in, S what x, z, out and the gradients are stored as.
template <class T, class S> struct GatedNorm {
    int64_t rows, groups, width;
    T eps;
    Rows<S> x, z;
    const T* weight;

    T inverse_rms(Vec<T> squares) const { return T(1) / std::sqrt(sum_lanes<T>(squares) / T(width) + eps); }

    // Calls back with the beginning of each vector of a group and how many numbers it has, a constant where it is full.
    template <class Function> void each_vector(Function function) const {
        int64_t i = 0;
        for (; i + W<T> <= width; i += W<T>) function(i, std::integral_constant<int64_t, W<T>>());
        if (i < width) function(i, width - i);
    }

    // One group of a row. `gated`, as long as the group, is scratch.
    template <bool gate_last> void forward(const S* x, const S* z, const T* weight, T* gated, S* out) const {
        Vec<T> squares{};
        each_vector([&](int64_t i, auto some) {
            Vec<T> v = load_some(x + i, some);
            if constexpr (!gate_last) {
                const Vec<T> gate = load_some(z + i, some);
                store(gated + i, v *= gate * sigmoid<T>(gate));
            }
            squares += v * v;
        });
        const T scale = inverse_rms(squares);
        each_vector([&](int64_t i, auto some) {
            Vec<T> v;
            if constexpr (gate_last) {
                const Vec<T> gate = load_some(z + i, some);
                v = load_some(x + i, some) * gate * sigmoid<T>(gate);
            } else {
                v = load(gated + i);
            }
            store_some(out + i, load_some(weight + i, some) * (v * scale), some);
        });
    }

    // grad_x and grad_z of one group of a row; its part is added to grad_weight. `sigmoids` is scratch. With v what is
    // normalised and `to_norm` the gradient of n(v), that of v is (to_norm - n(v) mean(to_norm n(v))) / rms.
    template <bool gate_last>
    void backward(const S* x, const S* z, const T* weight, const S* grad, T* sigmoids, S* grad_x, S* grad_z,
                  T* grad_weight) const {
        Vec<T> squares{}, products{};
        each_vector([&](int64_t i, auto some) {
            const Vec<T> gate = load_some(z + i, some), s = sigmoid<T>(gate), factor = gate * s;
            Vec<T> v = load_some(x + i, some), to_norm = load_some(grad + i, some) * load_some(weight + i, some);
            (gate_last ? to_norm : v) *= factor;
            squares += v * v;
            products += to_norm * v;
            store(sigmoids + i, s);
        });
        const T scale = inverse_rms(squares), mean = sum_lanes<T>(products) * scale / T(width);
        each_vector([&](int64_t i, auto some) {
            const Vec<T> gate = load_some(z + i, some), s = load(sigmoids + i), factor = gate * s;
            const Vec<T> slope = s + factor * (T(1) - s), from = load_some(x + i, some);
            const Vec<T> incoming = load_some(grad + i, some), to_out = incoming * load_some(weight + i, some);
            const Vec<T> normed = (gate_last ? from : from * factor) * scale;
            const Vec<T> to_v = ((gate_last ? to_out * factor : to_out) - normed * mean) * scale;
            store_some(grad_x + i, gate_last ? to_v : to_v * factor, some);
            store_some(grad_z + i, (gate_last ? to_out * normed : to_v * from) * slope, some);
            const Vec<T> to_weight = incoming * (gate_last ? normed * factor : normed);
            store_some(grad_weight + i, load_some(grad_weight + i, some) + to_weight, some);
        });
    }
};

template <bool gate_last, class T, class S> void gated_norm(GatedNorm<T, S> norm, S* out, int threads) {
    const int64_t d = norm.groups * norm.width;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        std::vector<T> scratch(size_t(norm.width + W<T>));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < norm.rows; ++row)
            for (int64_t i = 0; i < d; i += norm.width)
                norm.template forward<gate_last>(norm.x.at(row) + i, norm.z.at(row) + i, norm.weight + i, scratch.data(),
                                                 out + row * d + i);
    }
}

// grad_weight (parts, d), all zero; the sum is left in its first row. The parts do not depend on the threads: as many
// threads as there may be, the sums are the same bit by bit.
template <bool gate_last, class T, class S>
void gated_norm_backward(GatedNorm<T, S> norm, Rows<S> grad, S* grad_x, S* grad_z, T* grad_weight, int64_t parts,
                         int threads) {
    const int64_t d = norm.groups * norm.width;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        std::vector<T> scratch(size_t(norm.width + W<T>));
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t row = norm.rows * part / parts; row < norm.rows * (part + 1) / parts; ++row)
                for (int64_t i = 0; i < d; i += norm.width)
                    norm.template backward<gate_last>(norm.x.at(row) + i, norm.z.at(row) + i, norm.weight + i,
                                                      grad.at(row) + i, scratch.data(), grad_x + row * d + i,
                                                      grad_z + row * d + i, grad_weight + part * d + i);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < d; i += W<T>) {
            Vec<T> sum{};
            for (int64_t part = 0; part < parts; ++part) sum += load_some(grad_weight + part * d + i, d - i);
            store_some(grad_weight + i, sum, d - i);
        }
    }
}

}  // namespace

#define GATED_NORM(T, S, SUFFIX)                                                                                        \
    extern "C" void norm_forward_##SUFFIX(                                                                              \
        int64_t gate_last, int64_t rows, int64_t groups, int64_t width, double eps, const S* x, int64_t x_inner,        \
        int64_t x_over_outer, int64_t x_over_inner, const S* z, int64_t z_inner, int64_t z_over_outer,                  \
        int64_t z_over_inner, const T* weight, S* out, int threads) {                                                   \
        const GatedNorm<T, S> norm{rows, groups, width, T(eps), {x, x_inner, x_over_outer, x_over_inner},               \
                                   {z, z_inner, z_over_outer, z_over_inner}, weight};                                   \
        (gate_last ? gated_norm<true, T, S> : gated_norm<false, T, S>)(norm, out, threads);                             \
    }                                                                                                                   \
    extern "C" void norm_backward_##SUFFIX(                                                                             \
        int64_t gate_last, int64_t rows, int64_t groups, int64_t width, double eps, const S* x, int64_t x_inner,        \
        int64_t x_over_outer, int64_t x_over_inner, const S* z, int64_t z_inner, int64_t z_over_outer,                  \
        int64_t z_over_inner, const T* weight, const S* grad, int64_t grad_inner, int64_t grad_over_outer,              \
        int64_t grad_over_inner, S* grad_x, S* grad_z, T* grad_weight, int64_t parts, int threads) {                    \
        const GatedNorm<T, S> norm{rows, groups, width, T(eps), {x, x_inner, x_over_outer, x_over_inner},               \
                                   {z, z_inner, z_over_outer, z_over_inner}, weight};                                   \
        (gate_last ? gated_norm_backward<true, T, S> : gated_norm_backward<false, T, S>)(                               \
            norm, {grad, grad_inner, grad_over_outer, grad_over_inner}, grad_x, grad_z, grad_weight, parts, threads);   \
    }
GATED_NORM(float, float, f32)
GATED_NORM(double, double, f64)
GATED_NORM(float, BFloat16, bf16)
