#include "row_loops.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace fusechat::loss {
namespace {

// How far a logit may lie above the shift before the exponentials so far are rescaled: e^16 leaves fp32 room for sums.
constexpr float kSlack = 16.0F;

// exp_negative gives 0 below it, and so does a rescaling.
constexpr float kLeast = 1e-30F;

// By halves, not lane after lane: the next block waits for it.
FUSECHAT_INLINE float max_lanes(const Floats &v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] = lanes[lane] > lanes[lane + half] ? lanes[lane] : lanes[lane + half];
        }
    }
    return lanes[0];
}

FUSECHAT_INLINE double add_lanes(const Floats &v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

// cap · tanh(z / cap) and its derivative, from w = exp(2|z| / cap) − 1 so that no digit cancels: tanh = w / (w + 2).
FUSECHAT_INLINE void softcap_lanes(Floats &z, Floats &slope, float cap) {
    Floats x = z < 0.0F ? -z : z;
    x *= 2.0F / cap;
    x = x > 80.0F ? Floats{} + 80.0F : x;
    Floats power, rest;
    exp_parts(x, 1.0F, power, rest);
    const Floats w = (power - 1.0F) + power * rest;
    const Floats capped = cap * (w / (w + 2.0F));
    slope = 4.0F * ((w + 1.0F) / ((w + 2.0F) * (w + 2.0F)));
    z = z < 0.0F ? -capped : capped;
}

template <class T>
FUSECHAT_INLINE void load_lanes(const T *logits, float *z, Floats &top) {
    Floats v;
    widen(v, logits);
    store(z, v);
    top = v > top ? v : top;
}

// Widens a block into z, padded with −∞; returns its maximum.
template <class T>
FUSECHAT_INLINE float load_block(const T *logits, std::int64_t n, float *z) {
    Floats top = Floats{} + kMinusInfinity;
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) load_lanes(logits + i, z + i, top);
    if (whole < n) {
        T remainder[kLanes] = {};
        std::copy(logits + whole, logits + n, remainder);
        Floats v;
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

FUSECHAT_INLINE void load_cells(const std::uint8_t *cell_of, Words &cells) {
    std::uint32_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = cell_of[lane];
    load(cells, lanes);
}

// The exponentials of sixteen logits, added to `sum` where the tokens have no cell.
template <bool kCells>
FUSECHAT_INLINE void exp_lanes(const float *z, float shift, float inverse_tau, const std::uint8_t *cell_of, Floats &v, Floats &sum) {
    load(v, z);
    v -= shift;
    exp_negative(v, inverse_tau, v);
    if constexpr (kCells) {
        Words cells;
        load_cells(cell_of, cells);
        sum += cells == 0U ? v : Floats{};
    } else {
        sum += v;
    }
}

// Of a block, or of fewer elements: z is padded with −∞, e and cell_of are not.
template <bool kCells>
FUSECHAT_INLINE double exp_block(const float *z, std::int64_t n, float shift, float inverse_tau, const std::uint8_t *cell_of, float *e) {
    Floats sum = {}, v;
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        exp_lanes<kCells>(z + i, shift, inverse_tau, cell_of + i, v, sum);
        store(e + i, v);
    }
    if (whole < n) {
        std::uint8_t cells[kLanes] = {};
        if constexpr (kCells) std::copy(cell_of + whole, cell_of + n, cells);
        exp_lanes<kCells>(z + whole, shift, inverse_tau, cells, v, sum);
        float remainder[kLanes];
        store(remainder, v);
        std::copy_n(remainder, n - whole, e + whole);
    }
    return add_lanes(sum);
}

// A whole block's exponentials while the next whole block is read: memory and arithmetic work at the same time.
template <bool kCells, class T>
FUSECHAT_INLINE double exp_block_reading(const float *z, float shift, float inverse_tau, const std::uint8_t *cell_of, float *e,
                                         const T *next, float *z_next, float &top_next) {
    Floats sum = {}, v, top = Floats{} + kMinusInfinity;
    for (std::int64_t i = 0; i < kBlock; i += kLanes) {
        __builtin_prefetch(next + i + kBlock);
        load_lanes(next + i, z_next + i, top);
        exp_lanes<kCells>(z + i, shift, inverse_tau, cell_of + i, v, sum);
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

FUSECHAT_INLINE void rescale(float *e, std::int64_t n, float factor) {
    for (std::int64_t i = 0; i < n; ++i) {
        const float v = e[i] * factor;
        e[i] = v < kLeast ? 0.0F : v;
    }
}

template <bool kCells, class T>
FUSECHAT_INLINE void scan_row_body(const T *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of,
                                   RowScratch &row) {
    static_assert(kBlock % 64 == 0, "a block must not share a word of holes with its neighbour");
    alignas(64) float buffers[2][kBlock];
    float *z = buffers[0], *z_next = buffers[1];
    float shift = kMinusInfinity, top_of_row = kMinusInfinity;
    double sum = 0, sum_hard = 0, sum_z = 0;
    float base = 0;  // what logits are summed relative to, so that large ones keep their digits
    float top = load_block(logits, std::min(kBlock, n), z);
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        const std::int64_t count = std::min(kBlock, n - begin), n_lanes = padded(count);
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
        if constexpr (!kCells) {
            const float highest = punch_holes(row, begin, count, z);
            if (!(highest < top)) top = max_block(z, n_lanes);
        }
        top_of_row = std::max(top_of_row, top);
        if (shift == kMinusInfinity ? top > shift : top > shift + kSlack) {
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
        if (options.wants_sums) sum_z += sum_block(z, n_lanes, base);
        const std::uint8_t *cells = kCells ? cell_of + begin : nullptr;
        if (options.wants_hard) sum_hard += exp_block<kCells>(z, count, finite_shift, 1.0F, cells, &row.e_hard[begin]);
        const T *next = logits + begin + count;
        const std::int64_t next_count = std::min(kBlock, n - begin - count);
        if (next_count == kBlock) {
            sum += exp_block_reading<kCells>(z, finite_shift, options.inverse_tau, cells, row.e + begin, next, z_next, top);
        } else {
            sum += exp_block<kCells>(z, count, finite_shift, options.inverse_tau, cells, row.e + begin);
            if (next_count > 0) top = load_block(next, next_count, z_next);
        }
        std::swap(z, z_next);
    }
    row.shift = shift;
    row.top = top_of_row;
    row.sum = sum;
    row.sum_hard = sum_hard;
    row.sum_z = sum_z;
    if (options.wants_sums && shift != kMinusInfinity) {
        std::int64_t n_summed = n;
        if constexpr (!kCells) {
            for (const std::uint64_t word : row.holes) n_summed -= std::popcount(word);
        }
        row.sum_z += (static_cast<double>(base) - shift) * static_cast<double>(n_summed);
    }
}

template <class T>
FUSECHAT_INLINE void scan_row_either(const T *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of,
                                     RowScratch &row) {
    if (cell_of == nullptr) scan_row_body<false>(logits, n, options, cell_of, row);
    else scan_row_body<true>(logits, n, options, cell_of, row);
}

struct Table {
    Floats low, high;
};

template <bool kCells, bool kHard, bool kSlope>
FUSECHAT_INLINE void gradient_lanes(const float *e, const float *e_hard, const float *slope, const std::uint8_t *cell_of,
                                    const DenseGradient &dense, const Table &table, Floats &v) {
    Floats other;
    load(v, e);
    if constexpr (kCells) {
        Words cells;
        load_cells(cell_of, cells);
        v = v * __builtin_shuffle(table.low, table.high, cells) + dense.offset;
    } else {
        v = v * dense.soft[0] + dense.offset;
    }
    if constexpr (kHard) {
        load(other, e_hard);
        v += other * dense.hard;
    }
    if constexpr (kSlope) {
        load(other, slope);
        v *= other;
    }
}

template <bool kCells, bool kHard, bool kSlope, class T>
FUSECHAT_INLINE void write_row_body(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                                    T *gradient) {
    const float *e = row.e, *e_hard = row.e_hard.data(), *slope = row.slope.data();
    Table table;
    load(table.low, dense.soft);
    load(table.high, dense.soft + kLanes);
    const std::int64_t whole = n / kLanes * kLanes;
    Floats v;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        gradient_lanes<kCells, kHard, kSlope>(e + i, e_hard + i, slope + i, cell_of + i, dense, table, v);
        narrow(gradient + i, v);
    }
    if (whole < n) {
        std::uint8_t cells[kLanes] = {};
        float exponentials[kLanes] = {};
        if constexpr (kCells) std::copy(cell_of + whole, cell_of + n, cells);
        std::copy(e + whole, e + n, exponentials);
        gradient_lanes<kCells, kHard, kSlope>(exponentials, e_hard + whole, slope + whole, cells, dense, table, v);
        T remainder[kLanes];
        narrow(remainder, v);
        std::copy_n(remainder, n - whole, gradient + whole);
    }
}

template <bool kCells, class T>
FUSECHAT_INLINE void write_row_form(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                                    T *gradient) {
    const bool has_hard = !row.e_hard.empty(), has_slope = !row.slope.empty();
    if (has_hard && has_slope) write_row_body<kCells, true, true>(row, dense, cell_of, n, gradient);
    else if (has_hard) write_row_body<kCells, true, false>(row, dense, cell_of, n, gradient);
    else if (has_slope) write_row_body<kCells, false, true>(row, dense, cell_of, n, gradient);
    else write_row_body<kCells, false, false>(row, dense, cell_of, n, gradient);
}

template <class T>
FUSECHAT_INLINE void write_row_either(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                                      T *gradient) {
    if (cell_of == nullptr) write_row_form<false>(row, dense, cell_of, n, gradient);
    else write_row_form<true>(row, dense, cell_of, n, gradient);
}

}  // namespace

FUSECHAT_CLONES void scan_row(const float *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of,
                              RowScratch &row) {
    scan_row_either(logits, n, options, cell_of, row);
}
FUSECHAT_CLONES void scan_row(const BFloat16 *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of,
                              RowScratch &row) {
    scan_row_either(logits, n, options, cell_of, row);
}
FUSECHAT_CLONES void scan_row(const Float16 *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of,
                              RowScratch &row) {
    scan_row_either(logits, n, options, cell_of, row);
}

FUSECHAT_CLONES float max_cell(const float *z, std::int64_t n) { return max_block(z, n); }

FUSECHAT_CLONES double exp_cell(const float *z, std::int64_t n, float shift, float inverse_tau, float *e) {
    double sum = 0;
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        sum += exp_block<false>(z + begin, std::min(kBlock, n - begin), shift, inverse_tau, nullptr, e + begin);
    }
    return sum;
}

// Eight sums side by side: each token's exponential comes from the L2 cache, and an addition may not wait for it.
double sum_at(const float *e, const std::int32_t *order, std::int64_t n) {
    constexpr int kSums = 8;
    float sums[kSums] = {};
    std::int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (int k = 0; k < kSums; ++k) sums[k] += e[order[i + k]];
    }
    double total = 0;
    for (; i < n; ++i) total += e[order[i]];
    for (const float sum : sums) total += sum;
    return total;
}

float softcap_one(float z, float cap) {
    Floats v = Floats{} + z, slope;
    softcap_lanes(v, slope, cap);
    return v[0];
}

FUSECHAT_CLONES void write_row(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                               float *gradient) {
    write_row_either(row, dense, cell_of, n, gradient);
}
FUSECHAT_CLONES void write_row(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                               BFloat16 *gradient) {
    write_row_either(row, dense, cell_of, n, gradient);
}
FUSECHAT_CLONES void write_row(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                               Float16 *gradient) {
    write_row_either(row, dense, cell_of, n, gradient);
}

}  // namespace fusechat::loss
