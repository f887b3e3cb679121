// The cells of one row: which tokens each holds, the teacher's mass and the student's.
#pragma once

#include <cstdint>
#include <vector>

#include "row_loops.hpp"
#include "sparse_soft_ce.hpp"

namespace fusechat::loss {

struct Cell {
    double p;                    // the teacher's mass
    std::int64_t begin = 0;      // its tokens in Cells::tokens, their logits in Cells::z and exponentials in Cells::e
    std::int64_t n_tokens = 0;
    float shift = 0;             // e_j = exp((z_j − shift) / τ)
    double sum = 1;              // Σ e_j
    double sum_hard = 0;         // Σ exp(z_j − top)
    double log_sum = 0;          // log Σ exp((z_j − top) / τ)
    double alpha = 0;            // what it receives of the soft term's gradient
};

// Memory of a thread, reused from row to row.
struct Cells {
    std::vector<Cell> cells;
    std::vector<std::int32_t> tokens;
    std::vector<float> z;
    std::vector<float> e;
    double p_tail = 0;
    std::int64_t n_rest = 0;  // tokens in no cell

    // Reads a row's entries into cells and marks their tokens as holes.
    void collect(const Rows &rows, std::int64_t row, std::int64_t vocabulary, RowScratch &scratch);

    // Brings the teacher's masses to the form of `options`.
    void normalise_teacher(const Options &options, bool partition);

    // The highest of the cells' logits, and of `top`.
    float max_logit(float top) const;

    // Sums the exponentials of every cell's logits; `top` is the row's maximum.
    void summarise(float top, double tau);

    void clear(RowScratch &scratch);

private:
    struct Range {
        std::int32_t low, high;
        double p;
    };

    void add_token(std::int64_t token, double p, RowScratch &scratch);
    void add_range(const Range &range, const std::int32_t *order, RowScratch &scratch);

    std::vector<Range> ranges_;
};

}  // namespace fusechat::loss
