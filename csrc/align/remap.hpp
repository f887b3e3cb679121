// Source rows into the pivot's vocabulary: each candidate through a map, colliding candidates added.
#pragma once

#include <cstdint>
#include <span>

namespace fusechat::align {

enum Quality : std::uint8_t { LOST = 0, EXACT = 1, APPROXIMATE = 2 };

enum class Finer : int { CHAIN = 0, FIRST = 1, GOLD = 2 };
enum class Unaligned : int { GOLD = 0, EMPTY = 1 };
enum class Collisions : int { SUM = 0, FIRST = 1 };

// A vocabulary's tokens as bytes (fusechat/bytetable.py).
struct Bytes {
    std::span<const std::uint8_t> data;
    std::span<const std::int64_t> offsets;  // [V+1]
};

// What match_rows found, with what the remap must know besides; all of length R.
struct Matched {
    std::span<const std::uint8_t> kind;
    const std::int64_t *source_row;
    const std::int32_t *chain;
    const std::int32_t *rest_bytes;
    const std::int32_t *gold;        // the pivot's next token
    const std::uint8_t *ends_turn;   // whether that token ends the turn
    const std::int16_t *map_index;   // the map of this row
};

// The source's rows: candidates [Rs,K] and the token that really came next.
template <class Id>
struct SourceRows {
    std::int64_t n_rows;
    std::int64_t k;
    const Id *ids;
    const std::uint16_t *logprobs;  // half, by bits
    const float *gold_logprob;
    const std::int32_t *gold;
    Bytes tokens;
    std::span<const std::uint8_t> ends_turn;  // [Vs], whether a token ends a turn
};

// Maps [M,Vs,width] from source id to pivot ids (−1: none, and none after it) with the share of the mass each takes,
// and how good each source id's entry is [M,Vs]. With width 1 all the mass goes to the one target.
struct Maps {
    std::int64_t n_maps;
    std::int64_t vocab_size;
    std::int64_t width;
    const std::int32_t *target;
    const float *weight;
    const std::uint8_t *quality;
};

struct Options {
    Finer finer;
    Unaligned unaligned;
    Collisions collisions;
};

// The rows in the pivot's vocabulary, [R,K], absent entries id 0 and −inf. `mass` [4,3] and `lost` [Vs] grow by the
// probability, in units of 2^-30, that went each way: whole numbers, so that no order of summation shows in them.
template <class Id>
struct Remapped {
    Id *ids;
    std::uint16_t *logprobs;
    float *gold_logprob;
    std::uint64_t *mass;
    std::uint64_t *lost;
};

// `probability` [32768] is exp of minus every non-negative half, by its bits.
// Throws std::invalid_argument for ids, rows or map entries out of range, and for NaN or positive log-probabilities.
template <class SourceId, class PivotId>
void remap_rows(const Matched &matched, const SourceRows<SourceId> &source, const Bytes &pivot_tokens,
                const Maps &maps, const Options &options, std::span<const float> probability,
                const Remapped<PivotId> &out, int threads);

}  // namespace fusechat::align
