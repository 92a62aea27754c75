// The scans' inner loops for CPUs. Built on first use by native.py; a plain C interface, called through ctypes.
//
// Everything is written on short vectors (64 bytes) of the compiler's vector extension, which GCC and Clang turn into
// the machine's own instructions. Lanes run over channels or states, never over time.

#include <cstdint>
#include <cstring>
#include <algorithm>
#include <type_traits>
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

template <class T> struct Vectors;
template <> struct Vectors<float> {
    typedef float vector __attribute__((vector_size(64)));
    typedef float unaligned __attribute__((vector_size(64), aligned(4)));
    typedef int32_t integers __attribute__((vector_size(64)));
    static constexpr int lanes = 16, mantissa = 23;
    static constexpr float magic = 12582912.f, limit = 126.f;  // 1.5 * 2^23: adding it rounds to an integer
};
template <> struct Vectors<double> {
    typedef double vector __attribute__((vector_size(64)));
    typedef double unaligned __attribute__((vector_size(64), aligned(8)));
    typedef int64_t integers __attribute__((vector_size(64)));
    static constexpr int lanes = 8, mantissa = 52;
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

// ---------------------------------------------------------------------------------------------------------------------
// Selective scan: h_t = 2^(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t
// u, delta, y (batch, length, d); A (n, d), times log2(e); B, C (batch, length, n); states (batch, n, d).
// d is a multiple of the lanes. The forward pass keeps the state before every chunk of `chunk` steps; the backward pass
// runs each chunk again from there.

constexpr int chunk = 32;

template <class T> struct Selective {
    int64_t batch, length, d, n;
    const T *u, *delta, *A, *B, *C, *initial;
    int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

template <class T, int N>
inline void forward_states(const Selective<T>& s, int64_t b, int64_t begin, int steps, int64_t d0, int64_t n0,
                           const Vec<T>* delta, const Vec<T>* input, T* state, Vec<T>* y) {
    using V = Vec<T>;
    V h[N], A[N];
    for (int k = 0; k < N; ++k) {
        h[k] = load(state + (n0 + k) * s.d + d0);
        A[k] = load(s.A + (n0 + k) * s.d + d0);
    }
    const T* B = s.B + (b * s.length + begin) * s.n + n0;
    const T* C = s.C + (b * s.length + begin) * s.n + n0;
    for (int t = 0; t < steps; ++t, B += s.n, C += s.n) {
        V sum = y[t];
        for (int k = 0; k < N; ++k) {
            h[k] = exp2<T>(delta[t] * A[k]) * h[k] + input[t] * B[k];
            sum += h[k] * C[k];
        }
        y[t] = sum;
    }
    for (int k = 0; k < N; ++k) store(state + (n0 + k) * s.d + d0, h[k]);
}

template <class T>
void selective_forward(Selective<T> s, T* y, T* checkpoints, T* state, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t tiles = s.d / w;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        V delta[chunk], input[chunk], out[chunk];
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.batch * tiles; ++task) {
            const int64_t b = task / tiles, d0 = task % tiles * w;
            T* h = state + b * s.n * s.d;
            for (int64_t i = 0; i < s.n; ++i) store(h + i * s.d + d0, s.initial ? load(s.initial + (b * s.n + i) * s.d + d0) : V{});
            for (int64_t c = 0; c < s.chunks(); ++c) {
                const int64_t begin = c * chunk;
                const int steps = int(std::min<int64_t>(chunk, s.length - begin));
                if (checkpoints)
                    for (int64_t i = 0; i < s.n; ++i)
                        store(checkpoints + ((b * s.chunks() + c) * s.n + i) * s.d + d0, load(h + i * s.d + d0));
                for (int t = 0; t < steps; ++t) {
                    const int64_t at = (b * s.length + begin + t) * s.d + d0;
                    delta[t] = load(s.delta + at);
                    input[t] = delta[t] * load(s.u + at);
                    out[t] = V{};
                }
                int64_t i = 0;
                for (; i + 4 <= s.n; i += 4) forward_states<T, 4>(s, b, begin, steps, d0, i, delta, input, h, out);
                for (; i < s.n; ++i) forward_states<T, 1>(s, b, begin, steps, d0, i, delta, input, h, out);
                for (int t = 0; t < steps; ++t) store(y + (b * s.length + begin + t) * s.d + d0, out[t]);
            }
        }
    }
}

// One chunk, N states, one tile of channels. `carry` holds a_{t+1} g_{t+1} from the chunk after, and receives the one
// for the chunk before; sums over channels are left in lanes.
template <class T, int N>
inline void backward_states(const Selective<T>& s, int64_t b, int64_t begin, int steps, int64_t d0, int64_t n0,
                            const Vec<T>* delta, const Vec<T>* input, const Vec<T>* grad_y, const T* checkpoint, T* carry,
                            T* grad_A, Vec<T>* grad_input, Vec<T>* grad_log, Vec<T> (*grad_B)[4], Vec<T> (*grad_C)[4]) {
    using V = Vec<T>;
    V A[N], h[N], decay[chunk][N], decayed[chunk][N];
    for (int k = 0; k < N; ++k) {
        h[k] = load(checkpoint + (n0 + k) * s.d + d0);
        A[k] = load(s.A + (n0 + k) * s.d + d0);
    }
    const T* B = s.B + (b * s.length + begin) * s.n + n0;
    const T* C = s.C + (b * s.length + begin) * s.n + n0;
    for (int t = 0; t < steps; ++t)
        for (int k = 0; k < N; ++k) {
            decay[t][k] = exp2<T>(delta[t] * A[k]);
            decayed[t][k] = decay[t][k] * h[k];
            h[k] = decayed[t][k] + input[t] * B[t * s.n + k];
        }
    V g[N], sum_A[N];
    for (int k = 0; k < N; ++k) {
        g[k] = load(carry + (n0 + k) * s.d + d0);
        sum_A[k] = load(grad_A + (n0 + k) * s.d + d0);
    }
    for (int t = steps - 1; t >= 0; --t) {
        V to_input = grad_input[t], to_log = grad_log[t];
        for (int k = 0; k < N; ++k) {
            const V state = decayed[t][k] + input[t] * B[t * s.n + k];
            grad_C[t][k] += grad_y[t] * state;
            g[k] += grad_y[t] * C[t * s.n + k];
            grad_B[t][k] += g[k] * input[t];
            to_input += g[k] * B[t * s.n + k];
            const V to_exponent = g[k] * decayed[t][k];
            sum_A[k] += to_exponent * delta[t];
            to_log += to_exponent * A[k];
            g[k] *= decay[t][k];
        }
        grad_input[t] = to_input;
        grad_log[t] = to_log;
    }
    for (int k = 0; k < N; ++k) {
        store(carry + (n0 + k) * s.d + d0, g[k]);
        store(grad_A + (n0 + k) * s.d + d0, sum_A[k]);
    }
}

template <class T> inline T sum_lanes(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < W<T>; ++i) total += v[i];
    return total;
}

// grad_u, grad_delta (batch, length, d); grad_A (batch, n, d), to be summed, with respect to A itself (not times log2 e);
// grad_B, grad_C (groups, batch, length, n), to be summed; carry (batch, n, d): in: gradient of the last state, out: of
// the initial one. Channels are split into `groups`, so that a single sequence keeps several threads busy.
template <class T>
void selective_backward(Selective<T> s, const T* checkpoints, const T* grad_y, T* grad_u, T* grad_delta, T* grad_A,
                        T* grad_B, T* grad_C, T* carry, int64_t groups, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t tiles = s.d / w;
    const T ln2 = T(0.693147180559945309417);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals guard;
        const int64_t widest = (tiles + groups - 1) / groups;
        std::vector<V> scratch(size_t(widest) * chunk * 5);
        V sum_B[chunk][4], sum_C[chunk][4];
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.batch * groups; ++task) {
            const int64_t b = task / groups, group = task % groups;
            const int64_t first = tiles * group / groups, last = tiles * (group + 1) / groups;
            for (int64_t c = s.chunks() - 1; c >= 0; --c) {
                const int64_t begin = c * chunk;
                const int steps = int(std::min<int64_t>(chunk, s.length - begin));
                const T* checkpoint = checkpoints + (b * s.chunks() + c) * s.n * s.d;
                for (int64_t tile = first; tile < last; ++tile) {
                    V* of_tile = scratch.data() + (tile - first) * chunk * 5;
                    for (int t = 0; t < steps; ++t) {
                        const int64_t at = (b * s.length + begin + t) * s.d + tile * w;
                        of_tile[t] = load(s.delta + at);
                        of_tile[chunk + t] = of_tile[t] * load(s.u + at);
                        of_tile[2 * chunk + t] = load(grad_y + at);
                        of_tile[3 * chunk + t] = of_tile[4 * chunk + t] = V{};
                    }
                }
                for (int64_t i = 0; i < s.n;) {
                    const int width = i + 4 <= s.n ? 4 : 1;
                    for (int t = 0; t < steps; ++t)
                        for (int k = 0; k < width; ++k) sum_B[t][k] = sum_C[t][k] = V{};
                    for (int64_t tile = first; tile < last; ++tile) {
                        V* of_tile = scratch.data() + (tile - first) * chunk * 5;
                        auto run = width == 4 ? backward_states<T, 4> : backward_states<T, 1>;
                        run(s, b, begin, steps, tile * w, i, of_tile, of_tile + chunk, of_tile + 2 * chunk, checkpoint,
                            carry + b * s.n * s.d, grad_A + b * s.n * s.d, of_tile + 3 * chunk, of_tile + 4 * chunk, sum_B, sum_C);
                    }
                    for (int t = 0; t < steps; ++t)
                        for (int k = 0; k < width; ++k) {
                            const int64_t at = ((group * s.batch + b) * s.length + begin + t) * s.n + i + k;
                            grad_B[at] = sum_lanes<T>(sum_B[t][k]);
                            grad_C[at] = sum_lanes<T>(sum_C[t][k]);
                        }
                    i += width;
                }
                for (int64_t tile = first; tile < last; ++tile) {
                    const V* of_tile = scratch.data() + (tile - first) * chunk * 5;
                    for (int t = 0; t < steps; ++t) {
                        const int64_t at = (b * s.length + begin + t) * s.d + tile * w;
                        store(grad_u + at, of_tile[3 * chunk + t] * of_tile[t]);
                        store(grad_delta + at, of_tile[3 * chunk + t] * load(s.u + at) + of_tile[4 * chunk + t] * ln2);
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
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

// ---------------------------------------------------------------------------------------------------------------------
// Activations with dropout, in one pass over memory. Whether an element is dropped is a hash of its index and a seed:
// the backward pass draws the same numbers again, and no mask is stored.

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

template <class T> inline Vec<T> sigmoid(Vec<T> x) { return T(1) / (T(1) + exp2<T>(x * T(-1.4426950408889634074))); }

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

// silu(bias + sum_k taps_k u_{t-k}) per channel: a causal depthwise convolution. u (batch, length, d) with rows `stride`
// apart; taps (k, d), the present step's first; bias d.
template <class T> struct Convolution {
    int64_t batch, length, d, stride, width;
    const T *u, *taps, *bias;
    inline Vec<T> before(int64_t b, int64_t t, int64_t i, int64_t some) const {
        Vec<T> sum = load_some(bias + i, some);
        const T* at = u + (b * length + t) * stride + i;
        for (int64_t k = 0; k < width && k <= t; ++k)
            sum += load_some(taps + k * d + i, some) * load_some(at - k * stride, some);
        return sum;
    }
};

template <class T> void convolution_forward(Convolution<T> c, T* out, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < c.batch * c.length; ++row)
        for (int64_t i = 0; i < c.d; i += w) {
            const int64_t some = std::min<int64_t>(w, c.d - i);
            const Vec<T> v = c.before(row / c.length, row % c.length, i, some);
            store_some(out + row * c.d + i, v * sigmoid<T>(v), some);
        }
}

// grad_u (batch, length, d); grad_taps (batch, width + 1, d), to be summed: the taps, then the bias.
template <class T>
void convolution_backward(Convolution<T> c, const T* grad, T* grad_u, T* grad_taps, int threads) {
    using V = Vec<T>;
    constexpr int w = W<T>;
    const int64_t tiles = (c.d + w - 1) / w;
#pragma omp parallel num_threads(threads)
    {
        std::vector<V> scratch(size_t(c.length + c.width + 1));
        V *inner = scratch.data(), *sums = inner + c.length;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < c.batch * tiles; ++task) {
            const int64_t b = task / tiles, i = task % tiles * w, some = std::min<int64_t>(w, c.d - i);
            std::fill(sums, sums + c.width + 1, V{});
            for (int64_t t = 0; t < c.length; ++t) {
                const V v = c.before(b, t, i, some), s = sigmoid<T>(v);
                inner[t] = load_some(grad + (b * c.length + t) * c.d + i, some) * (s + v * s * (T(1) - s));
                sums[c.width] += inner[t];
                for (int64_t k = 0; k < c.width && k <= t; ++k)
                    sums[k] += inner[t] * load_some(c.u + (b * c.length + t - k) * c.stride + i, some);
            }
            for (int64_t t = 0; t < c.length; ++t) {
                V sum{};
                for (int64_t k = 0; k < c.width && t + k < c.length; ++k)
                    sum += load_some(c.taps + k * c.d + i, some) * inner[t + k];
                store_some(grad_u + (b * c.length + t) * c.d + i, sum, some);
            }
            for (int64_t k = 0; k <= c.width; ++k) store_some(grad_taps + (b * (c.width + 1) + k) * c.d + i, sums[k], some);
        }
    }
}

// out = (y + D u) silu(z). y, u (rows, d); rows of z are `stride` apart.
template <class T> struct Gate {
    int64_t rows, d, stride;
    const T *y, *u, *D, *z;
};

template <class T> void gate_forward(Gate<T> g, T* out, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < g.rows; ++row)
        for (int64_t i = 0; i < g.d; i += w) {
            const int64_t some = std::min<int64_t>(w, g.d - i), at = row * g.d + i;
            const Vec<T> z = load_some(g.z + row * g.stride + i, some);
            const Vec<T> sum = load_some(g.y + at, some) + load_some(g.D + i, some) * load_some(g.u + at, some);
            store_some(out + at, sum * z * sigmoid<T>(z), some);
        }
}

// grad_y, grad_u, grad_z (rows, d); grad_D (parts, d), to be summed.
template <class T>
void gate_backward(Gate<T> g, const T* grad, T* grad_y, T* grad_u, T* grad_z, T* grad_D, int64_t parts, int threads) {
    constexpr int w = W<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t row = g.rows * part / parts; row < g.rows * (part + 1) / parts; ++row)
            for (int64_t i = 0; i < g.d; i += w) {
                const int64_t some = std::min<int64_t>(w, g.d - i), at = row * g.d + i;
                const Vec<T> z = load_some(g.z + row * g.stride + i, some), s = sigmoid<T>(z);
                const Vec<T> u = load_some(g.u + at, some), D = load_some(g.D + i, some), incoming = load_some(grad + at, some);
                const Vec<T> inner = incoming * z * s;
                store_some(grad_y + at, inner, some);
                store_some(grad_u + at, inner * D, some);
                store_some(grad_z + at, incoming * (load_some(g.y + at, some) + D * u) * (s + z * s * (T(1) - s)), some);
                T* sum = grad_D + part * g.d + i;
                store_some(sum, load_some(sum, some) + inner * u, some);
            }
}

// delta = softplus(dt weight + bias) with few columns in dt, for which a library's matrix product is slow: dt is read in
// rows of a distance, weight is (K, d).
template <class T> struct StepSizes {
    int64_t rows, d, stride;
    const T *dt, *weight, *bias;

    template <int K> Vec<T> before(int64_t row, int64_t i, int64_t some) const {
        Vec<T> x = load_some(bias + i, some);
        for (int k = 0; k < K; ++k) x += dt[row * stride + k] * load_some(weight + k * d + i, some);
        return x;
    }
};

// max(x, 0) + log(1 + t), t = exp(-|x|), by log(1 + t) = 2 artanh(t / (2 + t)), whose series keeps small values exact.
template <class T> inline Vec<T> softplus(Vec<T> x) {
    constexpr int terms = sizeof(T) == 4 ? 8 : 17;
    const Vec<T> t = exp2<T>((x < 0 ? x : -x) * T(1.4426950408889634074));
    const Vec<T> s = t / (T(2) + t), square = s * s;
    Vec<T> sum = Vec<T>{} + T(1) / T(2 * terms - 1);
    for (int k = terms - 2; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
    return (x < 0 ? Vec<T>{} : x) + T(2) * s * sum;  // NaN is not below 0, and stays
}

template <class T, int K> void step_sizes_forward(StepSizes<T> s, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t i = 0; i < s.d; i += W<T>) {
            const int64_t some = std::min<int64_t>(W<T>, s.d - i);
            store_some(out + row * s.d + i, softplus<T>(s.template before<K>(row, i, some)), some);
        }
}

// grad_dt (rows, K); sums (parts, K + 1, d), to be summed: gradients of the weight and, last, of the bias.
template <class T, int K>
void step_sizes_backward(StepSizes<T> s, const T* grad, T* grad_dt, T* sums, int64_t parts, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t row = s.rows * part / parts; row < s.rows * (part + 1) / parts; ++row) {
            Vec<T> to_dt[K] = {};
            for (int64_t i = 0; i < s.d; i += W<T>) {
                const int64_t some = std::min<int64_t>(W<T>, s.d - i);
                const Vec<T> inner = load_some(grad + row * s.d + i, some) * sigmoid<T>(s.template before<K>(row, i, some));
                T* sum = sums + part * (K + 1) * s.d + i;
                for (int k = 0; k < K; ++k, sum += s.d) {
                    to_dt[k] += inner * load_some(s.weight + k * s.d + i, some);
                    store_some(sum, load_some(sum, some) + inner * s.dt[row * s.stride + k], some);
                }
                store_some(sum, load_some(sum, some) + inner, some);
            }
            for (int k = 0; k < K; ++k) grad_dt[row * K + k] = sum_lanes<T>(to_dt[k]);
        }
}

// Calls back with the number of columns as a constant; the callers keep to 1 to 8.
template <int K = 1, class Function> void with_columns(int64_t columns, Function function) {
    if (columns == K)
        function(std::integral_constant<int, K>());
    else if constexpr (K < 8)
        with_columns<K + 1>(columns, function);
}

}  // namespace

#define MAMBA(T, SUFFIX)                                                                                                \
    extern "C" void convolution_forward_##SUFFIX(int64_t batch, int64_t length, int64_t d, int64_t stride,              \
                                                 int64_t width, const T* u, const T* taps, const T* bias, T* out,       \
                                                 int threads) {                                                         \
        convolution_forward<T>({batch, length, d, stride, width, u, taps, bias}, out, threads);                         \
    }                                                                                                                   \
    extern "C" void convolution_backward_##SUFFIX(int64_t batch, int64_t length, int64_t d, int64_t stride,             \
                                                  int64_t width, const T* u, const T* taps, const T* bias,              \
                                                  const T* grad, T* grad_u, T* grad_taps, int threads) {                \
        convolution_backward<T>({batch, length, d, stride, width, u, taps, bias}, grad, grad_u, grad_taps, threads);    \
    }                                                                                                                   \
    extern "C" void gate_forward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, const T* y, const T* u, const T* D,  \
                                          const T* z, T* out, int threads) {                                            \
        gate_forward<T>({rows, d, stride, y, u, D, z}, out, threads);                                                   \
    }                                                                                                                   \
    extern "C" void gate_backward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, const T* y, const T* u, const T* D, \
                                           const T* z, const T* grad, T* grad_y, T* grad_u, T* grad_z, T* grad_D,       \
                                           int64_t parts, int threads) {                                                \
        gate_backward<T>({rows, d, stride, y, u, D, z}, grad, grad_y, grad_u, grad_z, grad_D, parts, threads);          \
    }

#define STEP_SIZES(T, SUFFIX)                                                                                           \
    extern "C" void step_sizes_forward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, int64_t columns, const T* dt,  \
                                                const T* weight, const T* bias, T* out, int threads) {                  \
        with_columns(columns, [&](auto k) { step_sizes_forward<T, k>({rows, d, stride, dt, weight, bias}, out, threads); }); \
    }                                                                                                                   \
    extern "C" void step_sizes_backward_##SUFFIX(int64_t rows, int64_t d, int64_t stride, int64_t columns, const T* dt, \
                                                 const T* weight, const T* bias, const T* grad, T* grad_dt, T* sums,    \
                                                 int64_t parts, int threads) {                                          \
        with_columns(columns, [&](auto k) {                                                                             \
            step_sizes_backward<T, k>({rows, d, stride, dt, weight, bias}, grad, grad_dt, sums, parts, threads);        \
        });                                                                                                             \
    }

#define ACTIVATIONS(T, SUFFIX)                                                                                          \
    extern "C" void gelu_##SUFFIX(int64_t count, const T* x, const T* grad, T* out, int64_t seed, double probability,   \
                                  int threads) {                                                                        \
        gelu<T>(count, x, grad, out, {uint64_t(seed), probability}, threads);                                           \
    }                                                                                                                   \
    extern "C" void glu_##SUFFIX(int64_t rows, int64_t d, const T* u, const T* v, const T* grad, T* out, int64_t seed,  \
                                 double probability, int threads) {                                                     \
        glu<T>(rows, d, u, v, grad, out, {uint64_t(seed), probability}, threads);                                       \
    }

#define SELECTIVE(T, SUFFIX)                                                                                            \
    extern "C" void selective_forward_##SUFFIX(int64_t batch, int64_t length, int64_t d, int64_t n, const T* u,         \
                                               const T* delta, const T* A, const T* B, const T* C, const T* initial,    \
                                               T* y, T* checkpoints, T* state, int threads) {                           \
        selective_forward<T>({batch, length, d, n, u, delta, A, B, C, initial}, y, checkpoints, state, threads);        \
    }                                                                                                                   \
    extern "C" void selective_backward_##SUFFIX(                                                                        \
        int64_t batch, int64_t length, int64_t d, int64_t n, const T* u, const T* delta, const T* A, const T* B,        \
        const T* C, const T* checkpoints, const T* grad_y, T* grad_u, T* grad_delta, T* grad_A, T* grad_B, T* grad_C,   \
        T* carry, int64_t groups, int threads) {                                                                        \
        selective_backward<T>({batch, length, d, n, u, delta, A, B, C, nullptr}, checkpoints, grad_y, grad_u,           \
                              grad_delta, grad_A, grad_B, grad_C, carry, groups, threads);                              \
    }

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

SELECTIVE(float, f32)
SELECTIVE(double, f64)
CHAIN(float, f32)
CHAIN(double, f64)
ACTIVATIONS(float, f32)
ACTIVATIONS(double, f64)
MAMBA(float, f32)
MAMBA(double, f64)
STEP_SIZES(float, f32)
STEP_SIZES(double, f64)
