// Dynamic time warping of two token sequences under edit distance, exactly as FuseLLM's and FuseChat's research code
// defines it, ties included.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "align/edit_distance.hpp"

namespace fusechat::align {

// One distinct token string: as it is, without its own word mark, and (source side) with the other side's in its place.
struct Form {
    Text stripped;
    Text whole;
};

// The cost of every pair of distinct source and pivot strings: the distance of the stripped forms, or of the whole
// forms where either stripped form is empty. For a source `whole` has the pivot's mark, for the pivot it is raw.
template <class Cost>
std::vector<Cost> cost_table(const std::vector<Form> &source, const std::vector<Form> &pivot,
                             std::size_t alphabet_size);

struct Warp {
    std::int64_t cost;
    std::vector<std::pair<std::int32_t, std::int32_t>> path;  // (source, pivot), ascending
};

// Rows are source tokens, columns pivot tokens, each by the number of its distinct string; table[s * n_pivot + p].
// D = cost + min(up, left, diagonal); going back, diagonal wins over left (pivot − 1), left over up (source − 1).
// Both sequences must be non-empty and their numbers inside the table.
template <class Cost>
Warp warp(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot, const std::vector<Cost> &table,
          std::size_t n_pivot);

}  // namespace fusechat::align
