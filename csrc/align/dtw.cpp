#include "align/dtw.hpp"

#include <algorithm>
#include <limits>
#include <memory>

#include "clones.hpp"

namespace fusechat::align {

template <class Cost>
std::vector<Cost> cost_table(const std::vector<Form> &source, const std::vector<Form> &pivot,
                             std::size_t alphabet_size) {
    std::vector<const Text *> source_stripped, source_whole, empty_source_whole;
    std::vector<const Text *> pivot_stripped, pivot_whole, empty_pivot_whole;
    std::vector<std::size_t> empty_sources, empty_pivots;
    for (const Form &form : source) {
        if (form.stripped.empty()) {
            empty_sources.push_back(source_stripped.size());
            empty_source_whole.push_back(&form.whole);
        }
        source_stripped.push_back(&form.stripped);
        source_whole.push_back(&form.whole);
    }
    for (const Form &form : pivot) {
        if (form.stripped.empty()) {
            empty_pivots.push_back(pivot_stripped.size());
            empty_pivot_whole.push_back(&form.whole);
        }
        pivot_stripped.push_back(&form.stripped);
        pivot_whole.push_back(&form.whole);
    }
    std::vector<Cost> table(source.size() * pivot.size());
    distance_table(source_stripped, pivot_stripped, alphabet_size, table.data());
    std::vector<Cost> part(std::max(empty_sources.size() * pivot.size(), source.size() * empty_pivots.size()));
    distance_table(empty_source_whole, pivot_whole, alphabet_size, part.data());
    for (std::size_t i = 0; i < empty_sources.size(); ++i) {
        std::copy_n(&part[i * pivot.size()], pivot.size(), &table[empty_sources[i] * pivot.size()]);
    }
    if (empty_pivots.empty()) return table;
    distance_table(source_whole, empty_pivot_whole, alphabet_size, part.data());
    for (std::size_t s = 0; s < source.size(); ++s) {
        for (std::size_t i = 0; i < empty_pivots.size(); ++i) {
            table[s * pivot.size() + empty_pivots[i]] = part[s * empty_pivots.size() + i];
        }
    }
    return table;
}
template std::vector<std::uint8_t> cost_table(const std::vector<Form> &, const std::vector<Form> &, std::size_t);
template std::vector<std::uint32_t> cost_table(const std::vector<Form> &, const std::vector<Form> &, std::size_t);

namespace {

enum Move : std::uint8_t { DIAGONAL = 0, LEFT = 1, UP = 2 };

constexpr std::int32_t INFINITE = 1 << 29;
constexpr int LANES = 16;

using Bytes16 = std::uint8_t __attribute__((vector_size(LANES)));
using Ints16 = std::int32_t __attribute__((vector_size(4 * LANES)));

// Sixteen rows of sixteen bytes, transposed: afterwards vector c holds byte c of every row.
inline __attribute__((always_inline)) void transpose(Bytes16 (&v)[LANES]) {
    constexpr Bytes16 low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr Bytes16 high{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int step = 0; step < 4; ++step) {
        Bytes16 next[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], high);
        }
        for (int i = 0; i < LANES; ++i) v[i] = next[i];
    }
}

// Sixteen rows at once, each one column behind the row above it, so that a step's sixteen cells are independent: lane
// l of step s is column s − l. rows[l][j + LANES] is row l's cost at column j. border[j + LANES] holds the D of the row
// above the strip and receives that of its last lane; moves[s * LANES + l] receives the steps. `corner` is the D above
// and left of the strip's first cell. Lanes beyond the ends compute what no cell inside depends on.
FUSECHAT_CLONES void strip(const std::uint8_t *const *rows, std::int64_t columns, std::int32_t corner,
                           std::int32_t *border, int last_lane, std::uint8_t *moves) {
    constexpr Ints16 shift{16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
    Ints16 left = Ints16{} + INFINITE, diagonal = Ints16{} + INFINITE;
    diagonal[0] = corner;
    for (std::int64_t begin = 0; begin < columns + LANES - 1; begin += LANES) {
        Bytes16 costs[LANES];
        for (int l = 0; l < LANES; ++l) __builtin_memcpy(&costs[l], rows[l] + begin - l + LANES, LANES);
        transpose(costs);
        std::uint8_t narrow[LANES * LANES];
        alignas(64) std::int32_t wide[LANES * LANES];
        __builtin_memcpy(narrow, costs, sizeof costs);
        for (int k = 0; k < LANES * LANES; ++k) wide[k] = narrow[k];
        for (int i = 0; i < LANES; ++i) {
            const std::int64_t s = begin + i;
            const Ints16 up = __builtin_shuffle(left, Ints16{} + border[s + LANES], shift);
            const Ints16 side = left < up ? left : up;
            const Ints16 best = diagonal < side ? diagonal : side;
            // Comparisons are −1 where true: LEFT + 1 where up is smaller than left, nothing where the diagonal wins.
            const Ints16 sideways = std::int32_t{LEFT} - (up < left);
            const Ints16 move = sideways & (side < diagonal);
            const Bytes16 packed = __builtin_convertvector(move, Bytes16);
            __builtin_memcpy(moves + s * LANES, &packed, LANES);
            Ints16 cost;
            __builtin_memcpy(&cost, wide + i * LANES, sizeof cost);
            left = best + cost;
            diagonal = up;
            alignas(64) std::int32_t lanes[LANES];
            __builtin_memcpy(lanes, &left, sizeof left);
            border[s - last_lane + LANES] = lanes[last_lane];
        }
    }
}

Warp walk_back(std::int64_t cost, std::int64_t n, std::int64_t m, auto &&move_at) {
    Warp out{cost, {}};
    out.path.reserve(n + m);
    for (std::int64_t i = n - 1, j = m - 1;;) {
        out.path.emplace_back(static_cast<std::int32_t>(i), static_cast<std::int32_t>(j));
        if (i == 0 && j == 0) break;
        const std::uint8_t move = move_at(i, j);
        i -= move != LEFT;
        j -= move != UP;
    }
    std::reverse(out.path.begin(), out.path.end());
    return out;
}

Warp warp_by_strips(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
                    const std::vector<std::uint8_t> &table, std::size_t n_pivot) {
    const auto n = static_cast<std::int64_t>(source.size()), m = static_cast<std::int64_t>(pivot.size());
    // The costs of each distinct source string along the pivot, with room for the lanes that run ahead and behind.
    const std::int64_t stride = m + 3 * LANES;
    const std::size_t n_source = n_pivot ? table.size() / n_pivot : 0;
    std::vector<std::uint8_t> along(n_source * stride, 0);
    std::vector<std::uint8_t> seen(n_source, 0);
    // Uninitialised: every byte that is read back was written, and zeroing would cost as much as the strips.
    const auto moves = std::make_unique_for_overwrite<std::uint8_t[]>((n + LANES - 1) / LANES * (m + 2 * LANES) * LANES);
    std::vector<std::int32_t> border(m + 3 * LANES, INFINITE);
    for (std::int64_t i = 0; i < n; i += LANES) {
        const std::uint8_t *rows[LANES];
        for (int l = 0; l < LANES; ++l) {
            const std::int32_t s = source[std::min(i + l, n - 1)];
            std::uint8_t *row = &along[s * stride];
            if (!seen[s]) {
                seen[s] = 1;
                const std::uint8_t *costs = &table[s * n_pivot];
                for (std::int64_t j = 0; j < m; ++j) row[j + LANES] = costs[pivot[j]];
            }
            rows[l] = row;
        }
        const int last_lane = static_cast<int>(std::min<std::int64_t>(LANES, n - i)) - 1;
        strip(rows, m, i == 0 ? 0 : INFINITE, border.data(), last_lane, &moves[i * (m + 2 * LANES)]);
    }
    return walk_back(border[m - 1 + LANES], n, m, [&](std::int64_t i, std::int64_t j) {
        const std::int64_t lane = i % LANES;
        return moves[(i - lane) * (m + 2 * LANES) + (j + lane) * LANES + lane];
    });
}

template <class Cost>
Warp warp_by_rows(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
                  const std::vector<Cost> &table, std::size_t n_pivot) {
    constexpr std::int64_t infinite = std::numeric_limits<std::int64_t>::max() / 2;
    const auto n = static_cast<std::int64_t>(source.size()), m = static_cast<std::int64_t>(pivot.size());
    std::vector<std::uint8_t> moves(n * m);
    std::vector<std::int64_t> row(m, infinite);
    for (std::int64_t i = 0; i < n; ++i) {
        std::int64_t diagonal = i == 0 ? 0 : infinite, left = infinite;
        for (std::int64_t j = 0; j < m; ++j) {
            const std::int64_t up = row[j];
            const std::int64_t side = std::min(left, up);
            moves[i * m + j] = side < diagonal ? (up < left ? UP : LEFT) : DIAGONAL;
            left = row[j] = std::min(diagonal, side) + table[source[i] * n_pivot + pivot[j]];
            diagonal = up;
        }
    }
    return walk_back(row[m - 1], n, m, [&](std::int64_t i, std::int64_t j) { return moves[i * m + j]; });
}

}  // namespace

template <>
Warp warp(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
          const std::vector<std::uint8_t> &table, std::size_t n_pivot) {
    // A path has at most n + m cells of at most 255: beyond this the 32-bit lanes could reach INFINITE.
    if (source.size() + pivot.size() > (INFINITE >> 1) / 255) return warp_by_rows(source, pivot, table, n_pivot);
    return warp_by_strips(source, pivot, table, n_pivot);
}

template <>
Warp warp(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
          const std::vector<std::uint32_t> &table, std::size_t n_pivot) {
    return warp_by_rows(source, pivot, table, n_pivot);
}

}  // namespace fusechat::align
