#pragma once
#include "vectors.h"

namespace {

// Matrix products of tiles that lie in the first-level caches, from which the kernels with matrix-valued states are made.
//
// All tiles are row-major; "row" arguments are the distances between rows, in numbers. Any size is allowed. Whole vectors
// are fastest: whoever has room for them in every row should pass a width that is a multiple of the lanes.
//
//   add_product(m, n, k, rows(a, a_row), b, b_row, c, c_row)          c (m, n) += a (m, k) b (k, n)
//   add_product(m, n, k, columns(a, a_row), b, b_row, c, c_row)       c (m, n) += a^T b, with a (k, m)
//   set_product(...)                                                  the same, with = in place of +=
//   transpose_tile(k, n, b, b_row, out, out_row)                      out (n, k) = b^T; then a b^T is one of the above

// The left factor: its element (i, k) is at[i * row + k * column].
template <class T> struct Left {
    const T* at;
    int64_t row, column;
};
template <class T> inline Left<T> rows(const T* at, int64_t row) { return {at, row, 1}; }
template <class T> inline Left<T> columns(const T* at, int64_t row) { return {at, 1, row}; }

// What of a product is computed. In blocks of `block_rows` rows: elements beside the diagonal, but within its block, are
// visited, so a triangular factor has zeros there, and a triangular result has numbers there.
//   lower: element (i, k) of the left factor is zero for k > i
//   upper: it is zero for k < i
//   lower_result: only elements (i, j), j <= i, of the result are needed
enum class Part { all, lower, upper, lower_result };

constexpr int block_rows = 6;

// A block of R rows and V vectors of the result stays in registers. The last vector has `last` numbers.
template <class T, int R, int V, bool add>
__attribute__((noinline)) void product_block(int64_t k, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                                             int64_t last) {
    using Vector = Vec<T>;
    Vector sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            sums[r][v] = !add ? Vector{} : v < V - 1 ? load(c + r * c_row + v * W<T>)
                                                     : load_some(c + r * c_row + v * W<T>, last);
    const T* left[R];
    for (int r = 0; r < R; ++r) left[r] = a.at + r * a.row;
    for (int64_t i = 0; i < k; ++i, b += b_row) {
        Vector right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + v * W<T>);
        for (int r = 0; r < R; ++r) {
            const T factor = left[r][i * a.column];
            for (int v = 0; v < V; ++v) sums[r][v] += factor * right[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            T* to = c + r * c_row + v * W<T>;
            if (v < V - 1) store(to, sums[r][v]);
            else store_some(to, sums[r][v], last);
        }
}

template <class T, int V, bool add>
inline void product_rows(int64_t rows, int64_t k, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t last) {
    static_assert(block_rows == 6, "one case for each number of rows");
    switch (rows) {
        case 1: return product_block<T, 1, V, add>(k, a, b, b_row, c, c_row, last);
        case 2: return product_block<T, 2, V, add>(k, a, b, b_row, c, c_row, last);
        case 3: return product_block<T, 3, V, add>(k, a, b, b_row, c, c_row, last);
        case 4: return product_block<T, 4, V, add>(k, a, b, b_row, c, c_row, last);
        case 5: return product_block<T, 5, V, add>(k, a, b, b_row, c, c_row, last);
        default: return product_block<T, 6, V, add>(k, a, b, b_row, c, c_row, last);
    }
}

// V vectors of columns, from column `j0`; `last` numbers in the last of them.
template <class T, int V, bool add, Part part>
inline void product_columns(int64_t m, int64_t k, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t j0,
                            int64_t last) {
    for (int64_t i0 = 0; i0 < m; i0 += block_rows) {
        const int64_t rows = std::min<int64_t>(block_rows, m - i0);
        if (part == Part::lower_result && j0 >= i0 + rows) continue;
        const int64_t begin = part == Part::upper ? std::min(i0, k) : 0;
        const int64_t end = part == Part::lower ? std::min(i0 + rows, k) : k;
        const Left<T> block{a.at + i0 * a.row + begin * a.column, a.row, a.column};
        product_rows<T, V, add>(rows, end - begin, block, b + begin * b_row, b_row, c + i0 * c_row, c_row, last);
    }
}

template <class T, bool add, Part part>
inline void product(int64_t m, int64_t n, int64_t k, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
    constexpr int w = W<T>;
    int64_t j = 0;
    for (; j + 2 * w <= n; j += 2 * w) product_columns<T, 2, add, part>(m, k, a, b + j, b_row, c + j, c_row, j, w);
    for (; j + w <= n; j += w) product_columns<T, 1, add, part>(m, k, a, b + j, b_row, c + j, c_row, j, w);
    if (j == n) return;
    // Columns that fill no vector: they are copied into whole ones, since b may end behind them.
    std::vector<Vec<T>> padded(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) padded[i] = load_some(b + i * b_row + j, n - j);
    product_columns<T, 1, add, part>(m, k, a, reinterpret_cast<const T*>(padded.data()), w, c + j, c_row, j, n - j);
}

template <Part part = Part::all, class T>
inline void add_product(int64_t m, int64_t n, int64_t k, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
    product<T, true, part>(m, n, k, a, b, b_row, c, c_row);
}
template <Part part = Part::all, class T>
inline void set_product(int64_t m, int64_t n, int64_t k, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
    product<T, false, part>(m, n, k, a, b, b_row, c, c_row);
}

// out (columns, rows) = in (rows, columns) transposed.
template <class T>
inline void transpose_tile(int64_t rows, int64_t columns, const T* in, int64_t in_row, T* out, int64_t out_row) {
    constexpr int w = W<T>;
    for (int64_t i = 0; i < rows; i += w)
        for (int64_t j = 0; j < columns; j += w) {
            Vec<T> square[w];
            const int64_t high = std::min<int64_t>(w, rows - i), wide = std::min<int64_t>(w, columns - j);
            for (int64_t r = 0; r < w; ++r) square[r] = r < high ? load_some(in + (i + r) * in_row + j, wide) : Vec<T>{};
            transpose<T>(square);
            for (int64_t r = 0; r < wide; ++r) store_some(out + (j + r) * out_row + i, square[r], high);
        }
}

}  // namespace
