// The loop that reads a row of logits and keeps their exponentials.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "block_loops.hpp"
#include "dispatch.hpp"

namespace fusechat::loss {
namespace {

// exp_bounded gives 0 below it, and so does a rescaling.
constexpr float kLeast = 1e-30F;

// A whole block's exponentials, in place, while the next whole block is read: memory and arithmetic work at the same time.
template <int kLanes, bool kCells, bool kCopy, class T>
FUSECHAT_INLINE double exp_block_reading(float *e, float shift, float inverse_tau, const std::uint8_t *cell_of, const T *next,
                                         float &top_next) {
    using Floats = typename Vectors<kLanes>::Floats;
    Floats sum = {}, v, top = Floats{} + kMinusInfinity;
    for (std::int64_t i = 0; i < kBlock; i += kLanes) {
        __builtin_prefetch(next + i + kBlock);
        widen(v, next + i);
        top = v > top ? v : top;
        if constexpr (kCopy) store(e + kBlock + i, v);
        load(v, e + i);
        exp_lanes<kCells>(v, shift, inverse_tau, cell_of + i, sum);
        store(e + i, v);
    }
    top_next = max_lanes(top);
    return add_lanes(sum);
}

// Holes become −∞ in z: they are summed as cells, never with the tail. Returns the highest of them.
FUSECHAT_INLINE float punch_holes(const RowScratch &row, std::int64_t begin, std::int64_t n, float *z) {
    float highest = kMinusInfinity;
    for (std::int64_t word = begin / 64; word < (begin + n + 63) / 64; ++word) {
        for (std::uint64_t bits = row.holes[word]; bits != 0; bits &= bits - 1) {
            float &hole = z[word * 64 + std::countr_zero(bits) - begin];
            highest = hole < highest ? highest : hole;  // NaN is the highest: it must not hide another's maximum
            hole = kMinusInfinity;
        }
    }
    return highest;
}

// Of a block with n_finite logits; kept only where there are any, which is rare.
template <bool kCells>
FUSECHAT_INLINE void list_ruled_out(std::int64_t begin, std::int64_t n, const float *z, std::int64_t n_finite, RowScratch &row) {
    for (std::int64_t i = 0; i < n && n_finite < n; ++i) {
        if (z[i] == kMinusInfinity && (kCells || !row.is_hole(begin + i))) row.ruled_out.push_back(begin + i);
    }
}

FUSECHAT_INLINE void rescale(float *e, std::int64_t n, float factor) {
    for (std::int64_t i = 0; i < n; ++i) {
        const float v = e[i] * factor;
        e[i] = v < kLeast ? 0.0F : v;
    }
}

template <int kLanes, bool kCells, bool kCopy, class T>
FUSECHAT_INLINE void scan(const T *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of, RowScratch &row) {
    static_assert(kBlock % 64 == 0, "a block must not share a word of holes with its neighbour");
    float shift = kMinusInfinity, top_of_row = kMinusInfinity;
    double sum = 0, sum_hard = 0, sum_z = 0;
    // Of logits: their exponents are formed at τ and, for the hard term, at 1.
    const float slack = kSlack / std::max(1.0F, options.inverse_tau);
    row.n_finite = 0;
    row.ruled_out.clear();
    float base = 0;  // what logits are summed relative to, so that large ones keep their digits
    float top = read_block<kLanes, kCopy>(logits, std::min(kBlock, n), row.e);
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        const std::int64_t count = std::min(kBlock, n - begin);
        float *z = row.e + begin;
        if (options.softcap != 0.0F) {
            softcap_block<kLanes>(z, count, options.softcap, &row.slope[begin]);
            top = max_block<kLanes>(z, count);
        }
        if constexpr (!kCells) {
            const float highest = punch_holes(row, begin, count, z);
            if (!(highest < top)) top = max_block<kLanes>(z, count);
        }
        top_of_row = std::max(top_of_row, top);
        if (shift == kMinusInfinity ? top > shift : top > shift + slack) {
            if (shift != kMinusInfinity) {
                const double difference = static_cast<double>(shift) - top, hard_factor = std::exp(difference);
                const double factor = std::exp(difference * options.inverse_tau);
                sum *= factor;
                sum_hard *= hard_factor;
                rescale(row.e, begin, static_cast<float>(factor));
                if (options.wants_hard) rescale(row.e_hard.data(), begin, static_cast<float>(hard_factor));
            } else {
                base = top;
            }
            shift = top;
        }
        // Where there is nothing but −∞ so far, a finite shift keeps the exponents from being −∞ + ∞.
        const float finite_shift = shift == kMinusInfinity ? 0.0F : shift;
        if (options.wants_sums) {
            std::int64_t n_finite = 0;
            sum_z += sum_block<kLanes>(z, count, base, n_finite);
            row.n_finite += n_finite;
            list_ruled_out<kCells>(begin, count, z, n_finite, row);
        }
        const std::uint8_t *cells = kCells ? cell_of + begin : nullptr;
        if (options.wants_hard) sum_hard += exp_block<kLanes, kCells>(z, count, finite_shift, 1.0F, cells, &row.e_hard[begin]);
        const T *next = logits + begin + count;
        const std::int64_t next_count = std::min(kBlock, n - begin - count);
        if (next_count == kBlock) {
            sum += exp_block_reading<kLanes, kCells, kCopy>(z, finite_shift, options.inverse_tau, cells, next, top);
        } else {
            sum += exp_block<kLanes, kCells>(z, count, finite_shift, options.inverse_tau, cells, z);
            if (next_count > 0) top = read_block<kLanes, kCopy>(next, next_count, z + count);
        }
    }
    row.shift = shift;
    row.top = top_of_row;
    row.sum = sum;
    row.sum_hard = sum_hard;
    row.sum_z = sum_z;
    if (row.n_finite > 0) row.sum_z += (static_cast<double>(base) - shift) * static_cast<double>(row.n_finite);
}

struct ScanRow {
    template <int kLanes, class T>
    FUSECHAT_INLINE static void run(const T *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of,
                                    RowScratch &row) {
        if constexpr (std::is_same_v<T, float>) {
            // In place the logits are where their exponentials will be.
            if (cell_of == nullptr && row.e == logits) return scan<kLanes, false, false>(logits, n, options, cell_of, row);
        }
        if (cell_of == nullptr) scan<kLanes, false, true>(logits, n, options, cell_of, row);
        else scan<kLanes, true, true>(logits, n, options, cell_of, row);
    }
};

struct MaxCell {
    template <int kLanes>
    FUSECHAT_INLINE static float run(const float *z, std::int64_t n) {
        return max_block<kLanes>(z, n);
    }
};

struct ExpCell {
    template <int kLanes>
    FUSECHAT_INLINE static double run(const float *z, std::int64_t n, float shift, float inverse_tau, float *e) {
        double sum = 0;
        for (std::int64_t begin = 0; begin < n; begin += kBlock) {
            sum += exp_block<kLanes, false>(z + begin, std::min(kBlock, n - begin), shift, inverse_tau, nullptr, e + begin);
        }
        return sum;
    }
};

struct SoftcapOne {
    template <int kLanes>
    FUSECHAT_INLINE static float run(float z, float cap) {
        typename Vectors<kLanes>::Floats v = {z}, slope;
        softcap_lanes(v, slope, cap);
        return v[0];
    }
};

}  // namespace

template <class T>
void scan_row(const T *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of, RowScratch &row) {
    run_widest<ScanRow>(logits, n, options, cell_of, row);
}
template void scan_row(const float *, std::int64_t, const ScanOptions &, const std::uint8_t *, RowScratch &);
template void scan_row(const BFloat16 *, std::int64_t, const ScanOptions &, const std::uint8_t *, RowScratch &);
template void scan_row(const Float16 *, std::int64_t, const ScanOptions &, const std::uint8_t *, RowScratch &);

float max_cell(const float *z, std::int64_t n) { return run_widest<MaxCell>(z, n); }

double exp_cell(const float *z, std::int64_t n, float shift, float inverse_tau, float *e) {
    return run_widest<ExpCell>(z, n, shift, inverse_tau, e);
}

float softcap_one(float z, float cap) { return run_widest<SoftcapOne>(z, cap); }

}  // namespace fusechat::loss
