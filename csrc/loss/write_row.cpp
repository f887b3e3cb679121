// The loop that turns a row's exponentials into its gradient.
#include <algorithm>

#include "block_loops.hpp"
#include "dispatch.hpp"

namespace fusechat::loss {
namespace {

// As many cells as one shuffle of two vectors tells apart; more take several shuffles and a choice between them.
template <int kLanes>
constexpr int kFewCells = 2 * kLanes;

// The coefficients of kMost cells, looked up for a vector of cells at a time.
template <int kLanes, int kMost>
struct Table {
    static constexpr int kParts = kMost / kLanes;
    typename Vectors<kLanes>::Floats parts[kParts];

    FUSECHAT_INLINE void find(const typename Vectors<kLanes>::Words &cells, typename Vectors<kLanes>::Floats &v) const {
        v = __builtin_shuffle(parts[0], parts[1], cells);
        for (int part = 2; part < kParts; part += 2) {
            v = cells / (2U * kLanes) == static_cast<unsigned>(part) / 2U ? __builtin_shuffle(parts[part], parts[part + 1], cells) : v;
        }
    }
};

template <bool kCells, bool kHard, bool kSlope, class Coefficients, class F>
FUSECHAT_INLINE void gradient_lanes(const float *e, const float *e_hard, const float *slope, const std::uint8_t *cell_of,
                                    const DenseGradient &dense, const Coefficients &table, F &v) {
    F other;
    load(v, e);
    if constexpr (kCells) {
        typename Like<F>::Words cells;
        load_cells(cell_of, cells);
        table.find(cells, other);
        v = v * other + dense.offset;
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

// At most kCells cells are told apart; with 0 the tokens have none.
template <int kLanes, int kCells, bool kHard, bool kSlope, class T>
FUSECHAT_INLINE void write(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n, T *gradient) {
    const float *e = row.e, *e_hard = row.e_hard.data(), *slope = row.slope.data();
    Table<kLanes, std::max(kCells, kLanes)> table;
    load(table, dense.soft);
    const std::int64_t whole = n / kLanes * kLanes;
    typename Vectors<kLanes>::Floats v;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        gradient_lanes<(kCells > 0), kHard, kSlope>(e + i, e_hard + i, slope + i, cell_of + i, dense, table, v);
        narrow(gradient + i, v);
    }
    if (whole < n) {
        std::uint8_t cells[kLanes] = {};
        float exponentials[kLanes] = {};
        if constexpr (kCells > 0) std::copy(cell_of + whole, cell_of + n, cells);
        std::copy(e + whole, e + n, exponentials);
        gradient_lanes<(kCells > 0), kHard, kSlope>(exponentials, e_hard + whole, slope + whole, cells, dense, table, v);
        T remainder[kLanes];
        narrow(remainder, v);
        std::copy_n(remainder, n - whole, gradient + whole);
    }
}

template <int kLanes, int kCells, class T>
FUSECHAT_INLINE void write_form(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n, T *gradient) {
    const bool has_hard = !row.e_hard.empty(), has_slope = !row.slope.empty();
    if (has_hard && has_slope) write<kLanes, kCells, true, true>(row, dense, cell_of, n, gradient);
    else if (has_hard) write<kLanes, kCells, true, false>(row, dense, cell_of, n, gradient);
    else if (has_slope) write<kLanes, kCells, false, true>(row, dense, cell_of, n, gradient);
    else write<kLanes, kCells, false, false>(row, dense, cell_of, n, gradient);
}

struct WriteRow {
    template <int kLanes, class T>
    FUSECHAT_INLINE static void run(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n,
                                    T *gradient) {
        if (cell_of == nullptr) write_form<kLanes, 0>(row, dense, cell_of, n, gradient);
        else if (dense.n_cells <= kFewCells<kLanes>) write_form<kLanes, kFewCells<kLanes>>(row, dense, cell_of, n, gradient);
        else write_form<kLanes, kCoefficients>(row, dense, cell_of, n, gradient);
    }
};

}  // namespace

template <class T>
void write_row(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n, T *gradient) {
    run_widest<WriteRow>(row, dense, cell_of, n, gradient);
}
template void write_row(const RowScratch &, const DenseGradient &, const std::uint8_t *, std::int64_t, float *);
template void write_row(const RowScratch &, const DenseGradient &, const std::uint8_t *, std::int64_t, BFloat16 *);
template void write_row(const RowScratch &, const DenseGradient &, const std::uint8_t *, std::int64_t, Float16 *);

}  // namespace fusechat::loss
