#include "range_cells.hpp"

#include <algorithm>
#include <cmath>

namespace fusechat::loss {
namespace {

// Exponentials below 1e-30 are lost: under this sum they might be a part of it.
constexpr double kSmallSum = 1e-12;

// Eight sums side by side: each token's exponential comes from the L2 cache, and an addition may not wait for it.
// Σ e[order[i]] over n elements.
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

}  // namespace

bool RangeCells::divide(const Rows &rows, std::int64_t row, Cells &cells) {
    ranges_.clear();
    bool any = false;
    for (std::int64_t entry = row * rows.n_entries; entry < (row + 1) * rows.n_entries; ++entry) {
        std::int32_t low = rows.low[entry], high = rows.high[entry];
        any |= high - low > 1;
        if (high <= low) {
            if (rows.ids[entry] < 0) continue;
            low = rows.rank[rows.ids[entry]];
            high = low + 1;
        }
        ranges_.push_back({low, high, std::exp(static_cast<double>(rows.logprobs[entry]))});
    }
    if (!any || ranges_.size() >= kCoefficients) return false;
    cut();
    cells.n_rest = static_cast<std::int64_t>(cell_of_.size());
    for (const Range &range : ranges_) cells.cells.push_back({.p = range.p});
    for (const Run &run : runs_) {
        cells.cells[run.cell].n_tokens += run.high - run.low;
        cells.n_rest -= run.high - run.low;
    }
    // A cell without a token can have no mass: it counts as missing.
    for (Run &run : runs_) {
        for (std::size_t cell = run.cell; cell-- > 0;) run.cell -= cells.cells[cell].n_tokens == 0;
    }
    std::erase_if(cells.cells, [](const Cell &cell) { return cell.n_tokens == 0; });
    std::fill(cell_of_.begin(), cell_of_.end(), 0);
    // By locals, since a byte that is stored might be part of any member.
    std::uint8_t *cell_of = cell_of_.data();
    for (const auto [low, high, cell] : runs_) {
        const std::int32_t *order = rows.order;
        for (std::int32_t rank = low; rank < high; ++rank) cell_of[order[rank]] = static_cast<std::uint8_t>(cell + 1);
    }
    return true;
}

// Adds up equal ranges, and gives every rank to the smallest range around it, of equally wide ones the first.
void RangeCells::cut() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range &a, const Range &b) {
        const std::int32_t width_a = a.high - a.low, width_b = b.high - b.low;
        return width_a != width_b ? width_a < width_b : a.low < b.low;
    });
    std::size_t kept = 0;
    for (std::size_t i = 1; i < ranges_.size(); ++i) {
        if (ranges_[i].low == ranges_[kept].low && ranges_[i].high == ranges_[kept].high) ranges_[kept].p += ranges_[i].p;
        else ranges_[++kept] = ranges_[i];
    }
    ranges_.resize(kept + 1);
    ends_.clear();
    for (const Range &range : ranges_) ends_.insert(ends_.end(), {range.low, range.high});
    std::sort(ends_.begin(), ends_.end());
    runs_.clear();
    for (std::size_t i = 1; i < ends_.size(); ++i) {
        const std::int32_t low = ends_[i - 1], high = ends_[i];
        const auto around = std::find_if(ranges_.begin(), ranges_.end(),
                                         [&](const Range &range) { return range.low <= low && high <= range.high; });
        if (low < high && around != ranges_.end()) runs_.push_back({low, high, static_cast<std::size_t>(around - ranges_.begin())});
    }
}

bool RangeCells::sum(const Rows &rows, const RowScratch &scratch, float top, double tau, Cells &cells) const {
    for (Cell &cell : cells.cells) cell.sum = cell.sum_hard = 0;
    for (const Run &run : runs_) {
        Cell &cell = cells.cells[run.cell];
        const std::int32_t *order = rows.order + run.low;
        cell.sum += sum_at(scratch.e, order, run.high - run.low);
        if (tau != 1.0) cell.sum_hard += sum_at(scratch.e_hard.data(), order, run.high - run.low);
    }
    const double difference = static_cast<double>(scratch.shift) - top, to_top = std::exp(difference);
    for (Cell &cell : cells.cells) {
        if (cell.sum < kSmallSum) return false;
        cell.sum_hard = (tau == 1.0 ? cell.sum : cell.sum_hard) * to_top;
        cell.log_sum = difference / tau + std::log(cell.sum);
    }
    return cells.n_rest == 0 || !(scratch.sum < kSmallSum);
}

}  // namespace fusechat::loss
