// The elementwise half of every method: mask the deltas, elect a sign, sum, divide, add to the base.
#pragma once

#include <cstdint>
#include <vector>

#include "merge/inputs.hpp"
#include "merge/select.hpp"

namespace fusechat::merge {

enum class Mask { none, shared, each, random };      // shared: by variance; each: by a target's own magnitude
enum class Elect { none, plain, weighted };          // whose sum's sign survives: the deltas' or the weighted deltas'
enum class Divide { none, surviving, clamped };      // by the weights that survive: 0 counts as 1, or at least 1e-6

struct Rule {
    Mask mask = Mask::none;
    bool mask_weights_only = false;  // the mask chose the weights and does not apply to what is merged (FuseAI's code)
    Elect elect = Elect::none;
    Divide divide = Divide::none;
    bool per_parameter = false;  // weights are delta² / Σ delta², element by element (VaRM)
    double scale = 1;            // of the update
    std::vector<double> weights;
    std::vector<double> factors;            // set_factors: the weights over what random masking divides by
    std::vector<double> keep_share;         // random: the probability to keep, per target, which divides what is kept
    std::vector<std::uint64_t> random_key;  // random: per target
    Dtype out_dtype = Dtype::f32;

    void set_factors();
};

// Tensors of fewer tiles than this are measured whole.
constexpr int kMeasuredEvery = 16;

inline bool is_measured(std::int64_t n, std::int64_t begin) {
    return n < kMeasuredEvery * kTile || begin / kTile % kMeasuredEvery == 0;
}

// What a merge did, summed over a tensor.
struct Outcome {
    // Per target Σ delta², and Σ delta² over what reached the sum, on one tile in kMeasuredEvery.
    std::vector<double> energy, kept_energy;
    double update_energy = 0;      // Σ (merged − base)²
    std::int64_t n_touched = 0;    // elements whose update is not zero
    std::int64_t n_conflicts = 0;  // of these, where a target was dropped for its sign
    std::int64_t n_overflow = 0;      // finite inputs, infinite in the output's dtype

    void add(const Outcome &other);
};

// Merges one tile, n <= kTile items from flat index `begin` on, of an opened scratch; writes n items to `out`. Energies
// are added to the outcome when `measured`.
void combine_tile(const Rule &rule, const std::vector<Selection> &selections, std::int64_t begin, int n, Scratch &scratch,
                  bool measured, unsigned char *out, Outcome &outcome);

// The same for n elements that were all selected, packed in the scratch. Adds to kept_energy when `measured`.
void combine_selected(const Rule &rule, int n, Scratch &scratch, bool measured, unsigned char *out, Outcome &outcome);

}  // namespace fusechat::merge
