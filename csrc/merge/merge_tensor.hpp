// One tensor's merge: the passes that choose, then the pass that writes.
#pragma once

#include <cstdint>
#include <vector>

#include "merge/combine.hpp"
#include "merge/inputs.hpp"
#include "merge/select.hpp"

namespace fusechat::merge {

// Where the weights of an SCE merge come from, and what happens when nothing was selected.
struct EnergyWeights {
    bool use = false;
    double uniform_below = 0;  // all weights are 1/J when Σ_j mean(delta²) is below this, or is zero
};

struct Task {
    Inputs inputs;
    Rule rule;
    bool select = false;           // by rule.mask: shared or each
    std::vector<Quota> quotas;     // one for shared, one per target for each
    EnergyWeights energy_weights;
    bool allow_nonfinite = false;  // such elements keep the base's value
    int out_fd = -1;
    std::int64_t out_offset = 0;
};

struct Report {
    std::vector<NonFinite> nonfinite;  // base, then targets; unless it is allowed, the output is then no merge
    std::vector<Selection> selections;
    std::vector<double> weights;
    Outcome outcome;
    std::uint64_t checksum = 0;        // of the merged tensor's bytes
};

// Runs the passes and writes the merged tensor at out_offset. Throws std::runtime_error when reading or writing fails.
Report merge_tensor(Task task, int threads);

// Per target Σ delta² and Σ base·delta, and Σ base² last: what VaRM's wider units and slerp need beforehand. An item that
// is not finite counts as zero: the base's in all sums, a target's as a delta.
struct Moments {
    std::vector<double> energy, dot;
    double base_energy = 0;
    std::vector<NonFinite> nonfinite;
};
Moments measure(const Inputs &inputs, int threads);

}  // namespace fusechat::merge
