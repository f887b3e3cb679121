#include "sparse_soft_ce.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cells.hpp"
#include "parallel.hpp"
#include "row_loops.hpp"

namespace fusechat::loss {
namespace {

// Below this sum the tail lies so far under the row's maximum that its exponents are taken again from its own maximum.
constexpr double kSmallTail = 1e-12;

ScanOptions scan_options(const Options &options) {
    return {
        .softcap = static_cast<float>(options.softcap),
        .inverse_tau = static_cast<float>(1.0 / options.student_temperature),
        .wants_hard = options.student_temperature != 1.0,
        .wants_sums = options.label_smoothing != 0.0 || options.missing == Missing::uniform,
        .skip_holes = false,
    };
}

// One row: divides it into cells, and turns the loss of the cells into coefficients of the gradient.
template <class T>
class RowLoss {
public:
    RowLoss(const Rows &rows, const Options &options, std::int64_t vocabulary)
        : rows_(rows), options_(options), scan_(scan_options(options)), n_(vocabulary), scratch_(vocabulary, scan_) {}

    void run(std::int64_t row, const T *logits, T *gradient, const Results &results) {
        row_ = row;
        label_ = rows_.labels[row];
        cells_.collect(rows_, row, options_, n_, scratch_);
        scan_row(logits, n_, scan_, scratch_);
        // After the scan, which left the row in the cache.
        for (const Cell &cell : cells_.cells) {
            const std::int64_t end = cell.begin + cell.n_tokens;
            for (std::int64_t i = cell.begin; i < end; ++i) cells_.z[i] = logit(logits, cells_.tokens[i]);
            if (cell.n_tokens > 1) std::fill_n(cells_.z.data() + end, padded(cell.n_tokens) - cell.n_tokens, kMinusInfinity);
        }
        hard_term(logits);
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

    void hard_term(const T *logits) {
        const double tau = options_.student_temperature;
        top_ = scratch_.top;
        const double mean = scratch_.sum_all_z / static_cast<double>(n_);
        mean_rest_ = scratch_.sum_rest_z / tau / static_cast<double>(std::max<std::int64_t>(cells_.n_rest, 1));
        z_label_ = static_cast<double>(logit(logits, label_)) - top_;
        cells_.summarise(top_, tau);
        sum_hard_ = tau == 1.0 ? scratch_.sum : scratch_.sum_hard;
        for (const Cell &cell : cells_.cells) sum_hard_ += hard_sum(cell);
        if (scratch_.sum < kSmallTail && cells_.n_rest > 0) {
            ScanOptions tail_only = scan_;
            tail_only.skip_holes = true;
            scan_row(logits, n_, tail_only, scratch_);
        }
        log_tail_ = cells_.n_rest > 0 ? (static_cast<double>(scratch_.top) - top_) / tau + std::log(scratch_.sum)
                                      : static_cast<double>(kMinusInfinity);
        lse_ = top_ + std::log(sum_hard_);
        const double smoothing = options_.label_smoothing;
        hard_ = std::log(sum_hard_) - (1.0 - smoothing) * z_label_ - (smoothing == 0.0 ? 0.0 : smoothing * mean);
    }

    // Σ exp(z_j − top) over a cell: what it adds to the hard term's softmax.
    double hard_sum(const Cell &cell) const {
        if (options_.student_temperature == 1.0) return std::exp(cell.log_sum);
        double sum = 0;
        for (std::int64_t i = cell.begin; i < cell.begin + cell.n_tokens; ++i) sum += hard_exp(i);
        return sum;
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
        const double flat = -scale * hard_weight * smoothing / static_cast<double>(n_);
        const double at_label = -scale * hard_weight * (1.0 - smoothing);
        const double tail_to_top = std::exp(static_cast<double>(scratch_.top) - top_);
        const DenseGradient dense{
            .soft = scratch_.sum > 0 ? per_soft * alpha_tail_ / scratch_.sum : 0.0,
            .hard = per_hard * tail_to_top,
            .offset = flat - per_soft * spread_,
        };
        write_row(scratch_, dense, scan_.inverse_tau, n_, gradient);

        const float *slope = scratch_.slope.empty() ? nullptr : scratch_.slope.data();
        double label_value = dense_at(dense, label_);
        for (const Cell &cell : cells_.cells) {
            const double per_e = per_soft * cell.alpha / cell.sum;
            const double to_top = std::exp(static_cast<double>(cell.shift) - top_);
            const float a = static_cast<float>(per_e + (tau == 1.0 ? per_hard * to_top : 0.0));
            const float offset = static_cast<float>(flat);
            const std::int32_t *tokens = &cells_.tokens[cell.begin];
            float *e = &cells_.e[cell.begin];
            for (std::int64_t i = 0; i < cell.n_tokens; ++i) {
                e[i] = a * e[i] + offset;
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
        label_value += at_label;
        narrow_one(gradient[label_], static_cast<float>(slope == nullptr ? label_value : label_value * slope[label_]));
    }

    double dense_at(const DenseGradient &dense, std::int64_t token) const {
        const double difference = static_cast<double>(scratch_.shift[token / kBlock]) - scratch_.top;
        const double e_soft = scratch_.e[token] * std::exp(difference / options_.student_temperature);
        const double e_hard = scratch_.e_hard.empty() ? e_soft : scratch_.e_hard[token] * std::exp(difference);
        return dense.soft * e_soft + dense.hard * e_hard + dense.offset;
    }

    const Rows &rows_;
    const Options &options_;
    const ScanOptions scan_;
    const std::int64_t n_;
    RowScratch scratch_;
    Cells cells_;
    std::int64_t row_ = 0, label_ = 0;
    float top_ = 0;
    double z_label_ = 0, mean_rest_ = 0, sum_hard_ = 0, log_tail_ = 0, lse_ = 0;
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
    if (rows.order == nullptr) return;
    for (std::int64_t rank = 0; rank < vocabulary; ++rank) {
        if (rows.order[rank] < 0 || rows.order[rank] >= vocabulary) refuse("token", rank, rows.order[rank]);
    }
}

}  // namespace

void sparse_soft_ce(const Matrix &matrix, const Rows &rows, const Options &options, const Results &results, int threads) {
    check(matrix, rows);
    switch (matrix.format) {
        case Format::float32:
            return run_rows<float>(matrix, rows, options, results, threads);
        case Format::bfloat16:
            return run_rows<BFloat16>(matrix, rows, options, results, threads);
        case Format::float16:
            return run_rows<Float16>(matrix, rows, options, results, threads);
    }
}

}  // namespace fusechat::loss
