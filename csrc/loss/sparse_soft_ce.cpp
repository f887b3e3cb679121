#include "sparse_soft_ce.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cells.hpp"
#include "parallel.hpp"
#include "range_cells.hpp"
#include "row_loops.hpp"

namespace fusechat::loss {
namespace {

ScanOptions scan_options(const Options &options) {
    return {
        .softcap = static_cast<float>(options.softcap),
        .inverse_tau = static_cast<float>(1.0 / options.student_temperature),
        .wants_hard = options.student_temperature != 1.0,
        .wants_sums = options.label_smoothing != 0.0 || options.missing == Missing::uniform,
    };
}

// One row: divides it into cells, and turns the loss of the cells into coefficients of the gradient.
template <class T>
class RowLoss {
public:
    RowLoss(const Rows &rows, const Options &options, std::int64_t vocabulary)
        : rows_(rows),
          options_(options),
          scan_(scan_options(options)),
          n_(vocabulary),
          e_(vocabulary),
          scratch_(vocabulary, scan_),
          range_cells_(rows.order == nullptr ? 0 : vocabulary) {}

    void run(std::int64_t row, const T *logits, T *gradient, const Results &results) {
        row_ = row;
        label_ = rows_.labels[row];
        const float z_label = logit(logits, label_);
        if (!scan_ranges(logits)) scan_tokens(logits, gradient);
        cells_.normalise_teacher(options_, rows_.partition[row]);
        hard_term(z_label);
        soft_term();
        const double hard_weight = rows_.hard_weight[row];
        results.hard[row] = static_cast<float>(hard_);
        results.soft[row] = static_cast<float>(soft_);
        results.lse[row] = static_cast<float>(lse_);
        results.correct[row] = z_label_ >= 0.0;
        results.loss[row] =
            static_cast<float>(hard_weight * hard_ + soft_weight_ * soft_ + options_.z_loss * lse_ * lse_);
        if (gradient != nullptr) write(gradient);
        cells_.clear(scratch_);
    }

private:
    float logit(const T *logits, std::int64_t token) const {
        const float z = widen_one(logits[token]);
        return options_.softcap == 0.0 ? z : softcap_one(z, scan_.softcap);
    }

    // Ranges, where all sums are large enough for one scale of exponentials.
    bool scan_ranges(const T *logits) {
        by_map_ = rows_.order != nullptr && (options_.missing != Missing::uniform || rows_.partition[row_]) &&
                  range_cells_.divide(rows_, row_, cells_);
        if (!by_map_) return false;
        scratch_.e = e_.data();
        scan_row(logits, n_, scan_, range_cells_.cell_of(), scratch_);
        top_ = scratch_.top;
        sum_finite();
        by_map_ = range_cells_.sum(rows_, scratch_, top_, options_.student_temperature, cells_);
        if (!by_map_) cells_.cells.clear();
        return by_map_;
    }

    // Tokens that the model rules out, with a logit of −∞, are none of the vocabulary's: neither summed nor counted.
    void sum_finite() {
        n_finite_ = scratch_.n_finite;
        sum_z_ = scratch_.sum_z;
        if (n_finite_ > 0) sum_z_ += (static_cast<double>(scratch_.shift) - top_) * static_cast<double>(n_finite_);
    }

    // Cells' tokens one by one, each cell and the tail relative to its own maximum.
    void scan_tokens(const T *logits, T *gradient) {
        cells_.collect(rows_, row_, n_, scratch_);
        for (const Cell &cell : cells_.cells) {
            const std::int64_t end = cell.begin + cell.n_tokens;
            for (std::int64_t i = cell.begin; i < end; ++i) cells_.z[i] = logit(logits, cells_.tokens[i]);
            if (cell.n_tokens > 1) std::fill_n(cells_.z.data() + end, padded(cell.n_tokens) - cell.n_tokens, kMinusInfinity);
        }
        scratch_.e = e_.data();
        if constexpr (std::is_same_v<T, float>) {
            // The gradient's memory is written anyway: the exponentials wait there, which saves the cache a second row.
            if (gradient != nullptr) scratch_.e = gradient;
        }
        scan_row(logits, n_, scan_, nullptr, scratch_);
        top_ = cells_.max_logit(scratch_.top);
        cells_.summarise(top_, options_.student_temperature);
        if (!scan_.wants_sums) return;
        sum_finite();
        if (options_.missing == Missing::uniform && !rows_.partition[row_]) cells_.n_rest = n_finite_;
        mean_rest_ = sum_z_ / options_.student_temperature / static_cast<double>(std::max<std::int64_t>(cells_.n_rest, 1));
        for (const Cell &cell : cells_.cells) {
            for (std::int64_t i = cell.begin; i < cell.begin + cell.n_tokens; ++i) {
                if (cells_.z[i] == kMinusInfinity) continue;
                sum_z_ += static_cast<double>(cells_.z[i]) - top_;
                ++n_finite_;
            }
        }
    }

    void hard_term(float z_label) {
        const double tau = options_.student_temperature, shift = static_cast<double>(scratch_.shift) - top_;
        z_label_ = static_cast<double>(z_label) - top_;
        const bool any = scratch_.shift != kMinusInfinity;
        shift_to_top_ = any ? std::exp(shift) : 0.0;
        sum_hard_ = (tau == 1.0 ? scratch_.sum : scratch_.sum_hard) * (any ? shift_to_top_ : 1.0);
        for (const Cell &cell : cells_.cells) sum_hard_ += cell.sum_hard;
        log_tail_ = cells_.n_rest > 0 && any ? shift / tau + std::log(scratch_.sum) : static_cast<double>(kMinusInfinity);
        lse_ = top_ + std::log(sum_hard_);
        const double smoothing = options_.label_smoothing;
        hard_ = std::log(sum_hard_) - (1.0 - smoothing) * z_label_;
        if (smoothing != 0.0) hard_ -= smoothing * sum_z_ / static_cast<double>(n_finite_);
    }

    double hard_exp(std::int64_t member) const { return std::exp(static_cast<double>(cells_.z[member]) - top_); }

    // kernels/reference.py has the derivation: a cell receives g − Q Σ g, spread as the student's distribution in the cell.
    void soft_term() {
        const double tau = options_.student_temperature;
        soft_ = spread_ = alpha_tail_ = soft_weight_ = 0;
        if (cells_.cells.empty()) return;
        soft_weight_ = 1.0 - rows_.hard_weight[row_];

        double top = log_tail_;
        for (const Cell &cell : cells_.cells) top = std::max(top, cell.log_sum);
        double sum = std::exp(log_tail_ - top);
        for (const Cell &cell : cells_.cells) sum += std::exp(cell.log_sum - top);
        const double log_sum = top + std::log(sum);

        double sum_g = 0;
        for (Cell &cell : cells_.cells) {
            const CellTerms terms = divergence_terms(options_.divergence, cell.p, cell.log_sum - log_sum, options_.beta);
            soft_ += terms.f;
            sum_g += terms.g;
            cell.alpha = terms.g;
        }
        const double p_tail = cells_.p_tail;
        const Missing missing = rows_.partition[row_] ? Missing::tail : options_.missing;
        double g_tail = 0;
        if (cells_.n_rest > 0 && missing == Missing::uniform) {
            // The tail's gradient is flat instead of following the student inside the tail.
            spread_ = p_tail / static_cast<double>(cells_.n_rest);
            soft_ += p_tail * (log_sum - mean_rest_);
            if (options_.divergence == Divergence::kl && p_tail > 0) soft_ += p_tail * std::log(spread_);
            sum_g -= p_tail;
        } else if (cells_.n_rest > 0 && missing != Missing::zero) {
            const CellTerms terms = divergence_terms(options_.divergence, p_tail, log_tail_ - log_sum, options_.beta);
            soft_ += terms.f;
            sum_g += terms.g;
            g_tail = terms.g;
        }
        for (Cell &cell : cells_.cells) cell.alpha -= std::exp(cell.log_sum - log_sum) * sum_g;
        alpha_tail_ = g_tail - std::exp(log_tail_ - log_sum) * sum_g;
        soft_ *= tau * tau;
    }

    void write(T *gradient) {
        const double scale = rows_.row_scale[row_], hard_weight = rows_.hard_weight[row_];
        const double tau = options_.student_temperature, smoothing = options_.label_smoothing;
        const double per_hard = scale * (hard_weight + 2.0 * options_.z_loss * lse_) / sum_hard_;
        const double per_soft = scale * soft_weight_ * tau;
        const double flat = smoothing == 0.0 ? 0.0 : -scale * hard_weight * smoothing / static_cast<double>(n_finite_);
        const double at_label = -scale * hard_weight * (1.0 - smoothing);
        DenseGradient dense;
        dense.hard = static_cast<float>(per_hard * shift_to_top_);
        dense.offset = static_cast<float>(flat - per_soft * spread_);
        // Where both terms have one temperature, one exponential serves both.
        const double hard_per_e = tau == 1.0 ? per_hard * shift_to_top_ : 0.0;
        dense.soft[0] = static_cast<float>((scratch_.sum > 0 ? per_soft * alpha_tail_ / scratch_.sum : 0.0) + hard_per_e);
        if (by_map_) {
            dense.n_cells = cells_.cells.size() + 1;
            for (std::size_t i = 0; i < cells_.cells.size(); ++i) {
                const Cell &cell = cells_.cells[i];
                dense.soft[i + 1] = static_cast<float>(per_soft * cell.alpha / cell.sum + hard_per_e);
            }
        }
        const std::uint8_t *cell_of = by_map_ ? range_cells_.cell_of() : nullptr;
        // Before the row is written: the exponentials may stand in the same memory.
        double label_value = scratch_.e[label_] * dense.soft[by_map_ ? cell_of[label_] : 0];
        if (z_label_ != kMinusInfinity) label_value += dense.offset;
        if (tau != 1.0) label_value += scratch_.e_hard[label_] * dense.hard;
        write_row(scratch_, dense, cell_of, n_, gradient);
        for (const std::int64_t token : scratch_.ruled_out) narrow_one(gradient[token], 0.0F);
        if (!by_map_) write_cells(per_soft, per_hard, flat, gradient, label_value);
        label_value += at_label;
        narrow_one(gradient[label_],
                   static_cast<float>(scratch_.slope.empty() ? label_value : label_value * scratch_.slope[label_]));
    }

    void write_cells(double per_soft, double per_hard, double flat, T *gradient, double &label_value) {
        const double tau = options_.student_temperature;
        const float *slope = scratch_.slope.empty() ? nullptr : scratch_.slope.data();
        for (const Cell &cell : cells_.cells) {
            const double per_e = per_soft * cell.alpha / cell.sum;
            const double to_top = std::exp(static_cast<double>(cell.shift) - top_);
            const float a = static_cast<float>(per_e + (tau == 1.0 ? per_hard * to_top : 0.0));
            const float offset = static_cast<float>(flat);
            const std::int32_t *tokens = &cells_.tokens[cell.begin];
            float *e = &cells_.e[cell.begin];
            for (std::int64_t i = 0; i < cell.n_tokens; ++i) {
                e[i] = a * e[i] + (cells_.z[cell.begin + i] == kMinusInfinity ? 0.0F : offset);
                if (tau != 1.0) e[i] += static_cast<float>(per_hard * hard_exp(cell.begin + i));
            }
            if (scratch_.is_hole(label_)) {
                const std::int32_t *found = std::find(tokens, tokens + cell.n_tokens, static_cast<std::int32_t>(label_));
                if (found != tokens + cell.n_tokens) label_value = e[found - tokens];
            }
            for (std::int64_t i = 0; i < cell.n_tokens; ++i) {
                narrow_one(gradient[tokens[i]], slope == nullptr ? e[i] : e[i] * slope[tokens[i]]);
            }
        }
    }

    const Rows &rows_;
    const Options &options_;
    const ScanOptions scan_;
    const std::int64_t n_;
    std::vector<float> e_;
    RowScratch scratch_;
    Cells cells_;
    RangeCells range_cells_;
    bool by_map_ = false;
    std::int64_t row_ = 0, label_ = 0, n_finite_ = 0;
    float top_ = 0;
    double z_label_ = 0, sum_z_ = 0, mean_rest_ = 0, shift_to_top_ = 0, sum_hard_ = 0, log_tail_ = 0, lse_ = 0;
    double hard_ = 0, soft_ = 0, soft_weight_ = 0, spread_ = 0, alpha_tail_ = 0;
};

template <class T>
void run_rows(const Matrix &matrix, const Rows &rows, const Options &options, const Results &results, int threads) {
    // A few rows at a time: scratch memory is made once per range, and the threads end together.
    const std::int64_t grain = std::clamp<std::int64_t>(matrix.n_rows / (4 * std::max(threads, 1)), 1, 64);
    parallel_for(matrix.n_rows, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        RowLoss<T> row_loss(rows, options, matrix.vocabulary);
        for (std::int64_t row = begin; row < end; ++row) {
            const T *logits = static_cast<const T *>(matrix.logits) + row * matrix.logits_stride;
            T *gradient = matrix.gradient == nullptr ? nullptr
                                                     : static_cast<T *>(matrix.gradient) + row * matrix.gradient_stride;
            if (rows.labels[row] == kIgnoreLabel) {
                results.loss[row] = results.hard[row] = results.soft[row] = results.lse[row] = 0.0F;
                results.correct[row] = false;
                if (gradient != nullptr) std::fill_n(gradient, matrix.vocabulary, T{});
            } else {
                row_loss.run(row, logits, gradient, results);
            }
        }
    });
}

void check(const Matrix &matrix, const Rows &rows) {
    const std::int64_t vocabulary = matrix.vocabulary;
    const auto refuse = [&](const char *what, std::int64_t row, std::int64_t value) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " of row " + std::to_string(row) +
                                    " lies outside the vocabulary of " + std::to_string(vocabulary));
    };
    for (std::int64_t row = 0; row < matrix.n_rows; ++row) {
        const std::int64_t label = rows.labels[row];
        if (label != kIgnoreLabel && (label < 0 || label >= vocabulary)) refuse("label", row, label);
        for (std::int64_t i = row * rows.n_entries; i < (row + 1) * rows.n_entries; ++i) {
            if (rows.ids[i] >= vocabulary) refuse("id", row, rows.ids[i]);
            if (rows.order == nullptr) continue;
            if (rows.high[i] > rows.low[i] && rows.low[i] < 0) refuse("range start", row, rows.low[i]);
            if (rows.high[i] > vocabulary) refuse("range end", row, rows.high[i]);
        }
    }
}

// The rank of every token.
std::vector<std::int32_t> invert(const std::int32_t *order, std::int64_t vocabulary) {
    std::vector<std::int32_t> rank(vocabulary, -1);
    for (std::int64_t i = 0; i < vocabulary; ++i) {
        if (order[i] < 0 || order[i] >= vocabulary || rank[order[i]] >= 0) {
            throw std::invalid_argument("order is no permutation of the vocabulary: token " + std::to_string(order[i]) +
                                        " at rank " + std::to_string(i) + " is outside it or there twice");
        }
        rank[order[i]] = static_cast<std::int32_t>(i);
    }
    return rank;
}

}  // namespace

void sparse_soft_ce(const Matrix &matrix, const Rows &rows, const Options &options, const Results &results, int threads) {
    check(matrix, rows);
    Rows ranked = rows;
    std::vector<std::int32_t> rank;
    if (rows.order != nullptr) {
        rank = invert(rows.order, matrix.vocabulary);
        ranked.rank = rank.data();
    }
    switch (matrix.format) {
        case Format::float32:
            return run_rows<float>(matrix, ranked, options, results, threads);
        case Format::bfloat16:
            return run_rows<BFloat16>(matrix, ranked, options, results, threads);
        case Format::float16:
            return run_rows<Float16>(matrix, ranked, options, results, threads);
    }
}

}  // namespace fusechat::loss
