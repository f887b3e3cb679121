// Loops over n floats of a row in place, for vectors of kLanes. What lies behind the n-th is neither read nor written.
#pragma once

#include <algorithm>

#include "row_loops.hpp"

namespace fusechat::loss {

// The last n < kLanes elements, padded with −∞.
template <class F>
FUSECHAT_INLINE void load_rest(F &v, const float *z, std::int64_t n) {
    v = F{} + kMinusInfinity;
    float lanes[sizeof(F) / sizeof(float)];
    store(lanes, v);
    std::copy_n(z, n, lanes);
    load(v, lanes);
}

template <class F>
FUSECHAT_INLINE void store_rest(float *z, const F &v, std::int64_t n) {
    float lanes[sizeof(F) / sizeof(float)];
    store(lanes, v);
    std::copy_n(lanes, n, z);
}

// Returns the maximum of n logits, which are z or are widened into it.
template <int kLanes, bool kCopy, class T>
FUSECHAT_INLINE float read_block(const T *logits, std::int64_t n, float *z) {
    using Floats = typename Vectors<kLanes>::Floats;
    Floats top = Floats{} + kMinusInfinity, v;
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        widen(v, logits + i);
        if constexpr (kCopy) store(z + i, v);
        top = v > top ? v : top;
    }
    if (whole < n) {
        for (std::int64_t i = whole; kCopy && i < n; ++i) z[i] = widen_one(logits[i]);
        load_rest(v, z + whole, n - whole);
        top = v > top ? v : top;
    }
    return max_lanes(top);
}

template <int kLanes>
FUSECHAT_INLINE float max_block(const float *z, std::int64_t n) {
    using Floats = typename Vectors<kLanes>::Floats;
    Floats top = Floats{} + kMinusInfinity, v;
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        load(v, z + i);
        top = v > top ? v : top;
    }
    load_rest(v, z + whole, n - whole);
    top = v > top ? v : top;
    return max_lanes(top);
}

// Σ (z − shift) over what is not −∞, and how many that are.
template <int kLanes>
FUSECHAT_INLINE double sum_block(const float *z, std::int64_t n, float shift, std::int64_t &n_finite) {
    using Floats = typename Vectors<kLanes>::Floats;
    Floats sum = {}, count = {}, v;
    for (std::int64_t i = 0; i < n; i += kLanes) {
        if (i + kLanes <= n) load(v, z + i);
        else load_rest(v, z + i, n - i);
        sum += v == kMinusInfinity ? Floats{} : v - shift;
        count += v == kMinusInfinity ? Floats{} : Floats{} + 1.0F;
    }
    n_finite = static_cast<std::int64_t>(add_lanes(count));
    return add_lanes(sum);
}

// Softcaps z; the derivatives go to `slope` where it is given.
template <int kLanes>
FUSECHAT_INLINE void softcap_block(float *z, std::int64_t n, float cap, float *slope) {
    typename Vectors<kLanes>::Floats v, derivative;
    for (std::int64_t i = 0; i < n; i += kLanes) {
        const bool whole = i + kLanes <= n;
        if (whole) load(v, z + i);
        else load_rest(v, z + i, n - i);
        softcap_lanes(v, derivative, cap);
        if (whole) store(z + i, v);
        else store_rest(z + i, v, n - i);
        if (slope != nullptr) store(slope + i, derivative);
    }
}

// Of a vector of tokens; by a loop, for GCC 12 converts vectors of bytes one by one.
template <class Words>
FUSECHAT_INLINE void load_cells(const std::uint8_t *cell_of, Words &cells) {
    constexpr int kLanes = sizeof(Words) / sizeof(std::uint32_t);
    std::uint32_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = cell_of[lane];
    load(cells, lanes);
}

// The exponentials of a vector of logits, added to `sum` where the tokens have no cell.
template <bool kCells, class F>
FUSECHAT_INLINE void exp_lanes(F &v, float shift, float inverse_tau, const std::uint8_t *cell_of, F &sum) {
    v -= shift;
    exp_bounded(v, inverse_tau, v);
    if constexpr (kCells) {
        typename Like<F>::Words cells;
        load_cells(cell_of, cells);
        sum += cells == 0U ? v : F{};
    } else {
        sum += v;
    }
}

// e = exp((z − shift) · inverse_tau), which may stand where z does; returns the sum over tokens without a cell.
template <int kLanes, bool kCells>
FUSECHAT_INLINE double exp_block(const float *z, std::int64_t n, float shift, float inverse_tau, const std::uint8_t *cell_of, float *e) {
    typename Vectors<kLanes>::Floats sum = {}, v;
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        load(v, z + i);
        exp_lanes<kCells>(v, shift, inverse_tau, cell_of + i, sum);
        store(e + i, v);
    }
    if (whole < n) {
        std::uint8_t cells[kLanes] = {};
        if constexpr (kCells) std::copy(cell_of + whole, cell_of + n, cells);
        load_rest(v, z + whole, n - whole);
        exp_lanes<kCells>(v, shift, inverse_tau, cells, sum);
        store_rest(e + whole, v, n - whole);
    }
    return add_lanes(sum);
}

}  // namespace fusechat::loss
