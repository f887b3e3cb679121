#include "cells.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fusechat::loss {

void Cells::collect(const Rows &rows, std::int64_t row, std::int64_t vocabulary, RowScratch &scratch) {
    ranges_.clear();
    const std::int64_t first = row * rows.n_entries;
    for (std::int64_t entry = first; entry < first + rows.n_entries; ++entry) {
        const std::int32_t width = rows.order == nullptr ? 0 : std::max(rows.high[entry] - rows.low[entry], 0);
        if (width == 0 && rows.ids[entry] < 0) continue;
        const double p = std::exp(static_cast<double>(rows.logprobs[entry]));
        if (width > 1) {
            ranges_.push_back({rows.low[entry], rows.high[entry], p});
        } else {
            add_token(width == 1 ? rows.order[rows.low[entry]] : rows.ids[entry], p, scratch);
        }
    }
    // Smaller ranges first: a token belongs to the smallest that holds it.
    std::sort(ranges_.begin(), ranges_.end(), [](const Range &a, const Range &b) {
        const std::int32_t width_a = a.high - a.low, width_b = b.high - b.low;
        return width_a != width_b ? width_a < width_b : a.low < b.low;
    });
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
        Range range = ranges_[i];
        while (i + 1 < ranges_.size() && ranges_[i + 1].low == range.low && ranges_[i + 1].high == range.high) {
            range.p += ranges_[++i].p;
        }
        add_range(range, rows.order, scratch);
    }
    n_rest = vocabulary;
    for (const Cell &cell : cells) n_rest -= cell.n_tokens;
    z.resize(tokens.size());
    e.resize(tokens.size());
}

void Cells::add_token(std::int64_t token, double p, RowScratch &scratch) {
    if (scratch.is_hole(token)) {
        for (Cell &cell : cells) {
            if (tokens[cell.begin] == token) cell.p += p;
        }
        return;
    }
    scratch.set_hole(token);
    cells.push_back({.p = p, .begin = static_cast<std::int64_t>(tokens.size()), .n_tokens = 1});
    tokens.push_back(static_cast<std::int32_t>(token));
}

void Cells::add_range(const Range &range, const std::int32_t *order, RowScratch &scratch) {
    const std::size_t begin = tokens.size();
    tokens.resize(begin + padded(range.high - range.low));
    std::int64_t n_tokens = 0;
    std::int32_t *to = &tokens[begin];
    std::uint64_t *holes = scratch.holes.data();
    for (std::int32_t rank = range.low; rank < range.high; ++rank) {
        const std::uint32_t token = static_cast<std::uint32_t>(order[rank]);
        std::uint64_t &word = holes[token / 64];
        const std::uint64_t bit = std::uint64_t{1} << (token % 64);
        to[n_tokens] = static_cast<std::int32_t>(token);
        n_tokens += (word & bit) == 0;  // else it lies in a smaller cell
        word |= bit;
    }
    tokens.resize(begin + (n_tokens == 1 ? 1 : padded(n_tokens)));
    std::fill(tokens.begin() + begin + n_tokens, tokens.end(), -1);
    if (n_tokens == 0) return;  // no token can have this mass: it counts as missing
    cells.push_back({.p = range.p, .begin = static_cast<std::int64_t>(begin), .n_tokens = n_tokens});
}

void Cells::normalise_teacher(const Options &options, bool partition) {
    double total = 0;
    for (const Cell &cell : cells) total += cell.p;
    const bool tail_counts = n_rest > 0 && (options.missing != Missing::renormalise || partition);
    p_tail = tail_counts ? std::max(0.0, 1.0 - total) : 0.0;
    for (const double power : {1.0, 1.0 / options.temperature}) {
        if (power != 1.0) {
            for (Cell &cell : cells) cell.p = std::pow(cell.p, power);
            p_tail = std::pow(p_tail, power);
        }
        double sum = p_tail;
        for (const Cell &cell : cells) sum += cell.p;
        sum = std::max(sum, static_cast<double>(std::numeric_limits<float>::min()));
        for (Cell &cell : cells) cell.p /= sum;
        p_tail /= sum;
    }
}

float Cells::max_logit(float top) const {
    for (const Cell &cell : cells) {
        const float *logits = &z[cell.begin];
        top = std::max(top, cell.n_tokens == 1 ? logits[0] : max_cell(logits, padded(cell.n_tokens)));
    }
    return top;
}

void Cells::summarise(float top, double tau) {
    const float inverse_tau = static_cast<float>(1.0 / tau);
    for (Cell &cell : cells) {
        float *logits = &z[cell.begin], *exponentials = &e[cell.begin];
        cell.shift = cell.n_tokens == 1 ? logits[0] : max_cell(logits, padded(cell.n_tokens));
        const double difference = static_cast<double>(cell.shift) - top;
        if (cell.n_tokens == 1 || cell.shift == kMinusInfinity) {
            std::fill_n(exponentials, cell.n_tokens, 1.0F);
            cell.sum = static_cast<double>(cell.n_tokens);
        } else {
            cell.sum = exp_cell(logits, padded(cell.n_tokens), cell.shift, inverse_tau, exponentials);
        }
        cell.log_sum = difference / tau + (cell.n_tokens == 1 ? 0.0 : std::log(cell.sum));
        cell.sum_hard = 0;
        if (tau == 1.0) {
            cell.sum_hard = cell.sum * std::exp(difference);
        } else {
            for (std::int64_t i = 0; i < cell.n_tokens; ++i) cell.sum_hard += std::exp(static_cast<double>(logits[i]) - top);
        }
    }
}

void Cells::clear(RowScratch &scratch) {
    if (tokens.size() > scratch.holes.size()) {
        std::fill(scratch.holes.begin(), scratch.holes.end(), 0);
    } else {
        for (const std::int32_t token : tokens) {
            if (token >= 0) scratch.clear_hole(token);
        }
    }
    cells.clear();
    tokens.clear();
}

}  // namespace fusechat::loss
