// The divergences between a teacher and a student over cells; kernels/reference.py has the same formulas with their papers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace fusechat::loss {

enum class Divergence { ce, kl, reverse_kl, jsd, tvd, skew_kl, alpha };

// Where a formula needs the logarithm of a teacher's mass that may be zero.
constexpr double kMassFloor = 1e-6;

// f(Q) of a cell, and g = Q f'(Q), which needs no division by a mass that may vanish.
struct CellTerms {
    double f;
    double g;
};

inline CellTerms divergence_terms(Divergence divergence, double p, double log_q, double beta) {
    const double q = std::exp(log_q);
    switch (divergence) {
        case Divergence::ce:
            return {p > 0 ? -p * log_q : 0.0, -p};
        case Divergence::kl:
            return {p > 0 ? p * (std::log(p) - log_q) : 0.0, -p};
        case Divergence::tvd:
            return {0.5 * std::abs(p - q), q == p ? 0.0 : 0.5 * (q > p ? q : -q)};
        case Divergence::reverse_kl: {
            if (!(q > 0) && !std::isnan(q)) return {0.0, 0.0};
            const double ratio = log_q - std::log(std::max(p, kMassFloor));
            return {q * ratio, q * (ratio + 1.0)};
        }
        case Divergence::alpha: {
            const double mixed = p > 0 ? std::exp(beta * std::log(p) + (1.0 - beta) * log_q) : 0.0;
            return {(beta * p + (1.0 - beta) * q - mixed) / (beta * (1.0 - beta)), (q - mixed) / beta};
        }
        case Divergence::skew_kl: {
            const double m = beta * p + (1.0 - beta) * q;
            return p > 0 ? CellTerms{p * std::log(p / m), -p * (1.0 - beta) * q / m} : CellTerms{0.0 * q, 0.0 * q};
        }
        case Divergence::jsd: {
            const double m = beta * p + (1.0 - beta) * q;
            const double p_part = p > 0 ? p * std::log(p / m) : 0.0;
            const double q_part = q == 0 ? 0.0 : q * (log_q - std::log(m));
            return {beta * p_part + (1.0 - beta) * q_part, (1.0 - beta) * q_part};
        }
    }
    return {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::quiet_NaN()};
}

}  // namespace fusechat::loss
