// Which source row speaks of the same prefix as each of the pivot's rows: two sequences' byte ends, walked once.
#pragma once

#include <cstdint>
#include <span>

namespace fusechat::align {

// What an aligned row's distributions are over, told by where the next tokens end.
enum Kind : std::uint8_t {
    SAME = 0,     // both next tokens end at the same byte
    COARSER = 1,  // the source's ends later
    FINER = 2,    // the source's ends earlier
    NONE = 3,     // the source has no boundary here
};

// The token axis of a block of dialogues. `control` is non-zero where a token is no text (ends of turns).
struct Tokens {
    std::span<const std::int64_t> offsets;      // [n+1]
    std::span<const std::int64_t> row_offsets;  // [n+1]
    const std::uint8_t *loss_mask;
    const std::int32_t *turn;
    const std::int32_t *byte_end;
    const std::uint8_t *control;
};

// Per pivot row: its kind; the block-wide source row with the same prefix (−1: none); how many source rows from
// there on cover the pivot's next token (0: none, 1: same and coarser); and how many bytes of the pivot's next token
// only the last of them covers, when that one goes beyond it (0 otherwise).
struct Match {
    std::uint8_t *kind;
    std::int64_t *source_row;
    std::int32_t *chain;
    std::int32_t *rest_bytes;
};

// Matches pivot dialogue i with source dialogue partner[i] (−1: the source lacks it) for all i.
// Throws std::invalid_argument when the row offsets are not the loss mask's.
void match_rows(const Tokens &pivot, const Tokens &source, std::span<const std::int64_t> partner, const Match &out,
                int threads);

}  // namespace fusechat::align
