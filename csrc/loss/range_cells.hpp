// Rows with ranges, the fast way: every entry is a range of ranks, the ranks are cut into runs of one cell each, and a byte a
// token says which. The loops over the row then need neither lists of tokens nor scattered stores.
#pragma once

#include <cstdint>
#include <vector>

#include "cells.hpp"

namespace fusechat::loss {

class RangeCells {
public:
    explicit RangeCells(std::int64_t vocabulary) : cell_of_(vocabulary) {}

    // Divides a row into `cells` (their masses and numbers of tokens); false where it has no ranges, or more cells than a table.
    bool divide(const Rows &rows, std::int64_t row, Cells &cells);

    // Sums the cells' exponentials; false where a sum is so small that exponentials may be missing from it.
    bool sum(const Rows &rows, const RowScratch &scratch, float top, double tau, Cells &cells) const;

    const std::uint8_t *cell_of() const { return cell_of_.data(); }

private:
    struct Range {
        std::int32_t low, high;
        double p;
    };
    struct Run {
        std::int32_t low, high;
        std::size_t cell;
    };

    void cut();

    std::vector<std::uint8_t> cell_of_;  // 0 in the tail, else 1 + the cell's index
    std::vector<Range> ranges_;
    std::vector<std::int32_t> ends_;
    std::vector<Run> runs_;
};

}  // namespace fusechat::loss
