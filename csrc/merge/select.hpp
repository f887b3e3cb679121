// Exact selection of the k elements with the largest keys, for tensors of any size in fixed memory.
//
// A sample brackets the threshold; one pass over the tensor counts and sums what lies above the bracket and keeps what
// lies inside. A missed or overfull bracket is narrowed with a histogram of its keys' bits until it fits or is one
// single key. Exact ties go to the lowest flat index. Nothing here depends on threads.
#pragma once

#include <cstdint>
#include <vector>

#include "merge/inputs.hpp"

namespace fusechat::merge {

class Carry;

// What orders the elements: the population variance of the targets' deltas, or a single target's |delta|.
enum class Key { variance, magnitude };

// How many elements to take: k of all, or floor(numerator / denominator · those with a non-zero key), or the same with
// the product rounded to fp32, which is what torch computes.
struct Quota {
    std::int64_t k = -1;
    std::int64_t numerator = 0, denominator = 1;
    bool in_fp32 = false;

    std::int64_t resolve(std::int64_t n_nonzero) const;
};

struct Selection {
    std::int64_t k = 0;
    std::int64_t n_nonzero = 0;        // elements with a non-zero key
    double threshold = 0;              // selected: key > threshold, or key == threshold and index < tie_stop
    std::int64_t tie_stop = 0;
    std::vector<double> energy;        // by variance only: per target, sum of delta² over the selected
};

// Selects once by variance, for which there is one quota, or by magnitude for every target, for which there is a quota
// each; targets share the passes. Sets `bad` to what is not finite. By variance, the candidates are left in `carry` unless
// it is null.
std::vector<Selection> select(const Inputs &inputs, ScratchPool &pool, Key key, const std::vector<Quota> &quotas,
                              int threads, std::vector<NonFinite> &bad, Carry *carry);

// The sums of delta² alone, as a Selection of everything.
Selection select_all(const Inputs &inputs, ScratchPool &pool, int threads, std::vector<NonFinite> &bad);

}  // namespace fusechat::merge
