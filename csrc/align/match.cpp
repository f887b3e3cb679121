#include "align/match.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "parallel.hpp"

namespace fusechat::align {
namespace {

// What a row predicts. At one prefix a sequence has at most one wide row, and any number of the others: a dummy space
// without width before the text, the token that ends the turn after it. Each pairs with its own kind, in order.
enum Class : std::uint8_t { WIDE, ZERO, END, N_CLASSES };

struct Row {
    std::int32_t turn;
    std::int32_t prefix;
    std::int32_t next;
    Class cls;

    std::tuple<std::int32_t, std::int32_t> key() const { return {turn, prefix}; }
};

void rows_of(const Tokens &tokens, std::int64_t dialogue, std::vector<Row> &rows) {
    rows.clear();
    const std::int64_t begin = tokens.offsets[dialogue], end = tokens.offsets[dialogue + 1];
    for (std::int64_t t = begin; t + 1 < end; ++t) {
        if (!tokens.loss_mask[t + 1]) continue;
        const std::int32_t turn = tokens.turn[t + 1], next = tokens.byte_end[t + 1];
        // A row before the turn's first token sees none of its text, whatever the template put there.
        const std::int32_t prefix = tokens.turn[t] == turn ? tokens.byte_end[t] : 0;
        rows.push_back({turn, prefix, next, next > prefix ? WIDE : tokens.control[t + 1] ? END : ZERO});
    }
    if (static_cast<std::int64_t>(rows.size()) != tokens.row_offsets[dialogue + 1] - tokens.row_offsets[dialogue]) {
        throw std::invalid_argument("dialogue " + std::to_string(dialogue) + " of the block has " +
                                    std::to_string(rows.size()) + " rows by its loss mask, " +
                                    std::to_string(tokens.row_offsets[dialogue + 1] - tokens.row_offsets[dialogue]) +
                                    " by its offsets");
    }
}

struct Pairing {
    Kind kind = NONE;
    std::int64_t source_row = -1;
    std::int32_t chain = 0;
    std::int32_t rest_bytes = 0;
};

Pairing pair_rows(const Row &pivot, const std::vector<Row> &source, std::size_t s) {
    if (pivot.cls != WIDE) return {SAME, static_cast<std::int64_t>(s), 1, 0};
    if (source[s].next >= pivot.next) {
        return {source[s].next == pivot.next ? SAME : COARSER, static_cast<std::int64_t>(s), 1, 0};
    }
    std::size_t last = s;
    while (source[last].next < pivot.next) {
        const std::int32_t boundary = source[last].next;
        if (++last == source.size() || source[last].turn != pivot.turn || source[last].cls != WIDE ||
            source[last].prefix != boundary) {
            return {};  // the source's turn breaks off inside the pivot's token
        }
    }
    const bool beyond = source[last].next > pivot.next;
    return {FINER, static_cast<std::int64_t>(s), static_cast<std::int32_t>(last - s + 1),
            beyond ? pivot.next - source[last].prefix : 0};
}

void match_dialogue(const std::vector<Row> &pivot, const std::vector<Row> &source, std::int64_t first_source_row,
                    const Match &out, std::int64_t first_row) {
    std::size_t s = 0;
    for (std::size_t p = 0; p < pivot.size();) {
        const auto key = pivot[p].key();
        while (s < source.size() && source[s].key() < key) ++s;
        std::size_t s_end = s;
        while (s_end < source.size() && source[s_end].key() == key) ++s_end;
        std::array<std::size_t, N_CLASSES> cursor{s, s, s};
        for (; p < pivot.size() && pivot[p].key() == key; ++p) {
            std::size_t &c = cursor[pivot[p].cls];
            while (c < s_end && source[c].cls != pivot[p].cls) ++c;
            const Pairing found = c < s_end ? pair_rows(pivot[p], source, c++) : Pairing{};
            const std::int64_t row = first_row + static_cast<std::int64_t>(p);
            out.kind[row] = found.kind;
            out.source_row[row] = found.source_row < 0 ? -1 : first_source_row + found.source_row;
            out.chain[row] = found.chain;
            out.rest_bytes[row] = found.rest_bytes;
        }
        s = s_end;
    }
}

}  // namespace

void match_rows(const Tokens &pivot, const Tokens &source, std::span<const std::int64_t> partner, const Match &out,
                int threads) {
    parallel_for(static_cast<std::int64_t>(partner.size()), 16, threads, [&](std::int64_t begin, std::int64_t end) {
        std::vector<Row> pivot_rows, source_rows;
        for (std::int64_t i = begin; i < end; ++i) {
            rows_of(pivot, i, pivot_rows);
            source_rows.clear();
            if (partner[i] >= 0) rows_of(source, partner[i], source_rows);
            match_dialogue(pivot_rows, source_rows, partner[i] < 0 ? 0 : source.row_offsets[partner[i]], out,
                           pivot.row_offsets[i]);
        }
    });
}

}  // namespace fusechat::align
