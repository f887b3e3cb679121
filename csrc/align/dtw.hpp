// Dynamic time warping of two token sequences under edit distance, exactly as FuseLLM's and FuseChat's research code
// defines it, ties included.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "align/edit_distance.hpp"

namespace fusechat::align {

// One distinct token string: without its own word mark, and as it is, or (source side) with the other side's mark in
// its place. `whole` is read only where some string of either side is empty without its mark.
struct Form {
    Text stripped;
    Text whole;
};

// The cost of every pair of distinct source and pivot strings, cost[s * stride + p]: the distance of the stripped forms,
// or of the whole forms where either stripped form is empty. For a source `whole` has the pivot's mark, for the pivot it
// is raw. Beyond the pivot strings a row holds anything.
template <class Cost>
struct CostTable {
    std::size_t stride;
    std::vector<Cost> cost;
};

template <class Cost>
CostTable<Cost> cost_table(const std::vector<Form> &source, const std::vector<Form> &pivot, std::size_t alphabet_size);

struct Warp {
    std::int64_t cost;
    std::vector<std::pair<std::int32_t, std::int32_t>> path;  // (source, pivot), ascending
};

// Rows are source tokens, columns pivot tokens, each by the number of its distinct string.
// D = cost + min(up, left, diagonal); going back, diagonal wins over left (pivot − 1), left over up (source − 1).
// Both sequences must be non-empty and their numbers inside the table.
template <class Cost>
Warp warp(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot, const CostTable<Cost> &table);

}  // namespace fusechat::align
