#include "row_loops.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace fusechat::loss {
namespace {

FUSECHAT_INLINE float max_lanes(const Floats &v) {
    float top = v[0];
    for (int lane = 1; lane < kLanes; ++lane) top = v[lane] > top ? v[lane] : top;
    return top;
}

FUSECHAT_INLINE double add_lanes(const Floats &v) {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

// cap · tanh(z / cap) and its derivative, from w = exp(2|z| / cap) − 1 so that no digit cancels: tanh = w / (w + 2).
FUSECHAT_INLINE void softcap_lanes(Floats &z, Floats &slope, float cap) {
    Floats x = z < 0.0F ? -z : z;
    x *= 2.0F / cap;
    x = x > 80.0F ? Floats{} + 80.0F : x;
    Floats power, rest;
    exp_parts(x, power, rest);
    const Floats w = (power - 1.0F) + power * rest;
    const Floats capped = cap * (w / (w + 2.0F));
    slope = 4.0F * ((w + 1.0F) / ((w + 2.0F) * (w + 2.0F)));
    z = z < 0.0F ? -capped : capped;
}

// Widens a block into z, padded with −∞; returns its maximum.
template <class T>
FUSECHAT_INLINE float load_block(const T *logits, std::int64_t n, float *z) {
    Floats top = Floats{} + kMinusInfinity, v;
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        widen(v, logits + i);
        store(z + i, v);
        top = v > top ? v : top;
    }
    if (whole < n) {
        T remainder[kLanes] = {};
        std::copy(logits + whole, logits + n, remainder);
        widen(v, remainder);
        for (std::int64_t lane = n - whole; lane < kLanes; ++lane) v[lane] = kMinusInfinity;
        store(z + whole, v);
        top = v > top ? v : top;
    }
    return max_lanes(top);
}

FUSECHAT_INLINE float max_block(const float *z, std::int64_t n) {
    Floats top = Floats{} + kMinusInfinity, v;
    for (std::int64_t i = 0; i < n; i += kLanes) {
        load(v, z + i);
        top = v > top ? v : top;
    }
    return max_lanes(top);
}

FUSECHAT_INLINE double sum_block(const float *z, std::int64_t n, float shift) {
    Floats sum = {}, v;
    for (std::int64_t i = 0; i < n; i += kLanes) {
        load(v, z + i);
        sum += v == kMinusInfinity ? Floats{} : v - shift;
    }
    return add_lanes(sum);
}

// `ahead` is what will be read next: memory works while the exponentials are computed.
template <bool kUnitTau, class T>
FUSECHAT_INLINE double exp_block(const float *z, std::int64_t n, float shift, float inverse_tau, float *e, const T *ahead) {
    Floats sum = {}, v;
    for (std::int64_t i = 0; i < n; i += kLanes) {
        __builtin_prefetch(ahead + i);
        load(v, z + i);
        v -= shift;
        if constexpr (!kUnitTau) v *= inverse_tau;
        exp_negative(v, v);
        store(e + i, v);
        sum += v;
    }
    return add_lanes(sum);
}

template <class T>
FUSECHAT_INLINE double exp_block_at(const float *z, std::int64_t n, float shift, float inverse_tau, float *e, const T *ahead) {
    return inverse_tau == 1.0F ? exp_block<true>(z, n, shift, 1.0F, e, ahead)
                               : exp_block<false>(z, n, shift, inverse_tau, e, ahead);
}

// Holes become −∞ in z: they are summed as cells, never with the tail.
FUSECHAT_INLINE void punch_holes(const RowScratch &row, std::int64_t begin, std::int64_t n, float *z) {
    for (std::int64_t word = begin / 64; word < (begin + n + 63) / 64; ++word) {
        for (std::uint64_t bits = row.holes[word]; bits != 0; bits &= bits - 1) {
            z[word * 64 + std::countr_zero(bits) - begin] = kMinusInfinity;
        }
    }
}

template <class T>
FUSECHAT_INLINE void scan_row_body(const T *logits, std::int64_t n, const ScanOptions &options, RowScratch &row) {
    static_assert(kBlock % 64 == 0, "a block must not share a word of holes with its neighbour");
    alignas(64) float z[kBlock];
    float shift = kMinusInfinity;
    float base = 0;  // what logits are summed relative to, so that large ones keep their digits
    double sum = 0, sum_hard = 0, sum_all = 0, sum_rest = 0;
    const auto rescale = [](double sum, float from, float to, float scale) {
        return sum == 0.0 ? 0.0 : sum * std::exp((static_cast<double>(from) - to) * scale);
    };
    for (std::int64_t begin = 0, block = 0; begin < n; begin += kBlock, ++block) {
        const std::int64_t count = std::min(kBlock, n - begin), n_lanes = padded(count);
        float top = load_block(logits + begin, count, z);
        if (options.softcap != 0.0F) {
            Floats v, slope;
            for (std::int64_t i = 0; i < n_lanes; i += kLanes) {
                load(v, z + i);
                softcap_lanes(v, slope, options.softcap);
                store(z + i, v);
                store(&row.slope[begin + i], slope);
            }
            std::fill(z + count, z + n_lanes, kMinusInfinity);
            top = max_block(z, n_lanes);
        }
        if (begin == 0) base = std::isfinite(top) ? top : 0.0F;
        if (options.wants_sums) sum_all += sum_block(z, n_lanes, base);
        punch_holes(row, begin, count, z);
        if (options.wants_sums) sum_rest += sum_block(z, n_lanes, base);
        if (options.skip_holes) top = max_block(z, n_lanes);
        if (top > shift) {
            sum = rescale(sum, shift, top, options.inverse_tau);
            sum_hard = rescale(sum_hard, shift, top, 1.0F);
            shift = top;
        }
        if (shift == kMinusInfinity) {
            // Nothing but −∞ so far: the exponentials are 0, and a finite shift keeps them from being −∞ + ∞.
            row.shift[block] = std::numeric_limits<float>::lowest();
            sum += 0.0 * sum_block(z, n_lanes, 0.0F);  // NaN stays NaN
            std::fill_n(&row.e[begin], n_lanes, 0.0F);
            if (options.wants_hard) std::fill_n(&row.e_hard[begin], n_lanes, 0.0F);
            continue;
        }
        row.shift[block] = shift;
        const T *ahead = logits + begin + count;
        sum += exp_block_at(z, n_lanes, shift, options.inverse_tau, &row.e[begin], ahead);
        if (options.wants_hard) sum_hard += exp_block<true>(z, n_lanes, shift, 1.0F, &row.e_hard[begin], ahead);
    }
    row.top = shift;
    row.sum = sum;
    row.sum_hard = sum_hard;
    if (options.wants_sums) {
        std::int64_t n_holes = 0;
        for (const std::uint64_t word : row.holes) n_holes += std::popcount(word);
        const double difference = static_cast<double>(base) - shift;
        row.sum_all_z = sum_all + difference * static_cast<double>(n);
        row.sum_rest_z = sum_rest + difference * static_cast<double>(n - n_holes);
    }
}

template <bool kHard, bool kSlope, class T>
FUSECHAT_INLINE void write_block(const float *e, const float *e_hard, const float *slope, float a, float a_hard,
                                 float offset, std::int64_t n, T *gradient) {
    for (std::int64_t i = 0; i < n; i += kLanes) {
        Floats v, other;
        load(v, e + i);
        v = v * a + offset;
        if constexpr (kHard) {
            load(other, e_hard + i);
            v += other * a_hard;
        }
        if constexpr (kSlope) {
            load(other, slope + i);
            v *= other;
        }
        if (i + kLanes <= n) {
            narrow(gradient + i, v);
        } else {
            T remainder[kLanes];
            narrow(remainder, v);
            std::copy_n(remainder, n - i, gradient + i);
        }
    }
}

template <class T>
FUSECHAT_INLINE void write_row_body(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n,
                                    T *gradient) {
    const bool has_hard = !row.e_hard.empty(), has_slope = !row.slope.empty();
    for (std::int64_t begin = 0, block = 0; begin < n; begin += kBlock, ++block) {
        const std::int64_t count = std::min(kBlock, n - begin);
        const double difference = static_cast<double>(row.shift[block]) - row.top;
        const double to_top = std::exp(difference);
        double a = dense.soft * (inverse_tau == 1.0F ? to_top : std::exp(difference * inverse_tau));
        if (!has_hard) a += dense.hard * to_top;
        const float a_soft = static_cast<float>(a), a_hard = static_cast<float>(dense.hard * to_top);
        const float offset = static_cast<float>(dense.offset);
        const float *e = &row.e[begin];
        const float *e_hard = has_hard ? &row.e_hard[begin] : nullptr, *slope = has_slope ? &row.slope[begin] : nullptr;
        T *to = gradient + begin;
        if (has_hard && has_slope) write_block<true, true>(e, e_hard, slope, a_soft, a_hard, offset, count, to);
        else if (has_hard) write_block<true, false>(e, e_hard, slope, a_soft, a_hard, offset, count, to);
        else if (has_slope) write_block<false, true>(e, e_hard, slope, a_soft, a_hard, offset, count, to);
        else write_block<false, false>(e, e_hard, slope, a_soft, a_hard, offset, count, to);
    }
}

}  // namespace

FUSECHAT_CLONES void scan_row(const float *logits, std::int64_t n, const ScanOptions &options, RowScratch &row) {
    scan_row_body(logits, n, options, row);
}
FUSECHAT_CLONES void scan_row(const BFloat16 *logits, std::int64_t n, const ScanOptions &options, RowScratch &row) {
    scan_row_body(logits, n, options, row);
}
FUSECHAT_CLONES void scan_row(const Float16 *logits, std::int64_t n, const ScanOptions &options, RowScratch &row) {
    scan_row_body(logits, n, options, row);
}

FUSECHAT_CLONES float max_cell(const float *z, std::int64_t n) { return max_block(z, n); }

FUSECHAT_CLONES double exp_cell(const float *z, std::int64_t n, float shift, float inverse_tau, float *e) {
    double sum = 0;
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        sum += exp_block_at(z + begin, std::min(kBlock, n - begin), shift, inverse_tau, e + begin, z + begin);
    }
    return sum;
}

float softcap_one(float z, float cap) {
    Floats v = Floats{} + z, slope;
    softcap_lanes(v, slope, cap);
    return v[0];
}

FUSECHAT_CLONES void write_row(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n,
                               float *gradient) {
    write_row_body(row, dense, inverse_tau, n, gradient);
}
FUSECHAT_CLONES void write_row(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n,
                               BFloat16 *gradient) {
    write_row_body(row, dense, inverse_tau, n, gradient);
}
FUSECHAT_CLONES void write_row(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n,
                               Float16 *gradient) {
    write_row_body(row, dense, inverse_tau, n, gradient);
}

}  // namespace fusechat::loss
