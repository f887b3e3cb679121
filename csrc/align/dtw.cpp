#include "align/dtw.hpp"

#include <algorithm>
#include <limits>
#include <memory>

#include "align/lanes.hpp"
#include "clones.hpp"

namespace fusechat::align {

template <class Cost>
CostTable<Cost> cost_table(const std::vector<Form> &source, const std::vector<Form> &pivot, std::size_t alphabet_size) {
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
    const std::size_t stride = whole_lanes(pivot.size()), part_stride = whole_lanes(empty_pivots.size());
    CostTable<Cost> table{stride, std::vector<Cost>(source.size() * stride)};
    distance_table(source_stripped, pivot_stripped, alphabet_size, stride, table.cost.data());
    std::vector<Cost> part(std::max(empty_sources.size() * stride, source.size() * part_stride));
    if (!empty_sources.empty()) distance_table(empty_source_whole, pivot_whole, alphabet_size, stride, part.data());
    for (std::size_t i = 0; i < empty_sources.size(); ++i) {
        std::copy_n(&part[i * stride], pivot.size(), &table.cost[empty_sources[i] * stride]);
    }
    if (empty_pivots.empty()) return table;
    distance_table(source_whole, empty_pivot_whole, alphabet_size, part_stride, part.data());
    for (std::size_t s = 0; s < source.size(); ++s) {
        for (std::size_t i = 0; i < empty_pivots.size(); ++i) {
            table.cost[s * stride + empty_pivots[i]] = part[s * part_stride + i];
        }
    }
    return table;
}
template CostTable<std::uint8_t> cost_table(const std::vector<Form> &, const std::vector<Form> &, std::size_t);
template CostTable<std::uint32_t> cost_table(const std::vector<Form> &, const std::vector<Form> &, std::size_t);

namespace {

enum Move : std::uint8_t { DIAGONAL = 0, LEFT = 1, UP = 2 };

using Bytes16 = Lanes<std::uint8_t>;

constexpr int STEPS = 8;  // two bits of a move each fill sixteen

// What stands for infinity among sums of `Sum`. Lanes beyond the matrix's ends add at most 255 in each of the 2·LANES
// steps they run there, which must not make a sum wrap.
template <class Sum>
constexpr std::uint64_t INFINITE = static_cast<Sum>(-1) - 2 * LANES * 255;

// Lane l of a vector that came l steps ago: four exchanges, each between the vectors now and 1, 2, 4 and 8 steps ago,
// in place of gathering sixteen bytes from sixteen rows.
struct Skew {
    Bytes16 ago1{}, ago2[2]{}, ago4[4]{}, ago8[8]{};

    FUSECHAT_INLINE void operator()(Bytes16 (&v)[STEPS]) {
        constexpr Bytes16 by1{0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31};
        constexpr Bytes16 by2{0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31};
        constexpr Bytes16 by4{0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31};
        constexpr Bytes16 by8{0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31};
        Bytes16 a[STEPS], b[STEPS], c[STEPS];
        for (int i = 0; i < STEPS; ++i) a[i] = __builtin_shuffle(v[i], i < 1 ? ago1 : v[i - 1], by1);
        for (int i = 0; i < STEPS; ++i) b[i] = __builtin_shuffle(a[i], i < 2 ? ago2[i] : a[i - 2], by2);
        for (int i = 0; i < STEPS; ++i) c[i] = __builtin_shuffle(b[i], i < 4 ? ago4[i] : b[i - 4], by4);
        ago1 = v[STEPS - 1];
        for (int i = 0; i < 2; ++i) ago2[i] = a[STEPS - 2 + i];
        for (int i = 0; i < 4; ++i) ago4[i] = b[STEPS - 4 + i];
        for (int i = 0; i < STEPS; ++i) {
            v[i] = __builtin_shuffle(c[i], ago8[i], by8);
            ago8[i] = c[i];
        }
    }
};

// Sixteen rows at once, each one column behind the row above it, so that a step's sixteen cells are independent: lane
// l of step s is column s − l. `costs` [distinct pivot strings][LANES] holds the rows' costs, `at` where in it each
// step's column begins, for a whole number of STEPS. border points at the D of the row above the strip in column 0, that
// of column j standing at border[−j]: against the order of columns, so that the last lane's D, written with those of the
// lanes above it, is not overwritten by the next step's. `corner` is the D above and left of the strip's first cell.
// moves[step / STEPS * LANES + l] receives two bits a step. Lanes beyond the ends compute what no cell inside depends on.
template <class Sum>
FUSECHAT_INLINE void strip_of(const std::uint8_t *costs, const std::uint32_t *at, std::int64_t steps, Sum corner,
                              Sum *border, std::uint16_t *moves) {
    using Sums = Lanes<Sum>;
    constexpr Lanes<std::int16_t> shift{15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30};
    Sums left = Sums{} + static_cast<Sum>(INFINITE<Sum>), diagonal = left;
    store(border + 1, left);
    diagonal[0] = corner;
    Skew skew;
    for (std::int64_t begin = 0; begin < steps; begin += STEPS) {
        Bytes16 cost[STEPS];
        for (int i = 0; i < STEPS; ++i) load(cost[i], costs + at[begin + i]);
        skew(cost);
        Sums packed{};
        for (int i = 0; i < STEPS; ++i) {
            Sum *const here = border - (begin + i);
            Sums up;
            if constexpr (sizeof(Sum) == sizeof(std::int16_t)) {
                load(up, here - (LANES - 1));
                up = (Sums)__builtin_shuffle((Lanes<std::int16_t>)up, (Lanes<std::int16_t>)left, shift);
            } else {  // what the step before has stored; slower, but no compiler shuffles two vectors of this width well
                load(up, here);
            }
            const Sums side = left < up ? left : up;
            const Sums best = diagonal < side ? diagonal : side;
            // Comparisons are −1 where true: UP − 1 where left is the lesser, nothing where the diagonal wins.
            const Sums sideways = (Sums)(left == side) + static_cast<Sum>(UP);
            const Sums move = sideways & ~(Sums)(best == diagonal);
            packed |= move << 2 * i;
            left = best + __builtin_convertvector(cost[i], Sums);
            diagonal = up;
            store(here, left);
        }
        store(moves + begin / STEPS * LANES, __builtin_convertvector(packed, Lanes<std::uint16_t>));
    }
}

#define FUSECHAT_STRIP(Sum)                                                                                        \
    FUSECHAT_CLONES void strip(const std::uint8_t *costs, const std::uint32_t *at, std::int64_t steps, Sum corner, \
                               Sum *border, std::uint16_t *moves) {                                                \
        strip_of<Sum>(costs, at, steps, corner, border, moves);                                                    \
    }
FUSECHAT_STRIP(std::uint16_t)
FUSECHAT_STRIP(std::uint32_t)
#undef FUSECHAT_STRIP

// Sixteen rows of the table as sixteen lanes: out[p * LANES + l] is row l's cost of pivot string p.
FUSECHAT_CLONES void interleave(const std::uint8_t *const *rows, std::size_t stride, std::uint8_t *out) {
    for (std::size_t p = 0; p < stride; p += LANES) {
        Bytes16 v[LANES];
        for (int l = 0; l < LANES; ++l) load(v[l], rows[l] + p);
        transpose(v);
        for (int i = 0; i < LANES; ++i) store(out + (p + i) * LANES, v[i]);
    }
}

template <class Cost>
Warp walk_back(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot, const CostTable<Cost> &table,
               auto &&move_at) {
    Warp out{0, {}};
    out.path.reserve(source.size() + pivot.size());
    for (std::size_t i = source.size() - 1, j = pivot.size() - 1;;) {
        out.path.emplace_back(static_cast<std::int32_t>(i), static_cast<std::int32_t>(j));
        out.cost += table.cost[source[i] * table.stride + pivot[j]];
        if (i == 0 && j == 0) break;
        const auto move = move_at(i, j);
        i -= move != LEFT;
        j -= move != UP;
    }
    std::reverse(out.path.begin(), out.path.end());
    return out;
}

template <class Sum>
Warp warp_by_strips(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
                    const CostTable<std::uint8_t> &table) {
    const std::size_t n = source.size(), m = pivot.size();
    const std::size_t steps = (m + LANES - 1 + STEPS - 1) / STEPS * STEPS, words = steps / STEPS * LANES;
    std::vector<std::uint32_t> at(steps, 0);
    for (std::size_t j = 0; j < m; ++j) at[j] = static_cast<std::uint32_t>(pivot[j]) * LANES;
    std::vector<std::uint8_t> costs(table.stride * LANES);
    std::vector<Sum> border(steps + 2 * LANES, static_cast<Sum>(INFINITE<Sum>));
    // Uninitialised: every word that is read back was written, and zeroing would cost as much as the strips.
    const auto moves = std::make_unique_for_overwrite<std::uint16_t[]>(whole_lanes(n) / LANES * words);
    for (std::size_t i = 0; i < n; i += LANES) {
        const std::uint8_t *rows[LANES];
        for (std::size_t l = 0; l < LANES; ++l) rows[l] = &table.cost[source[std::min(i + l, n - 1)] * table.stride];
        interleave(rows, table.stride, costs.data());
        strip(costs.data(), at.data(), static_cast<std::int64_t>(steps), static_cast<Sum>(i == 0 ? 0 : INFINITE<Sum>),
              &border[steps + LANES - 1], &moves[i / LANES * words]);
    }
    return walk_back(source, pivot, table, [&](std::size_t i, std::size_t j) {
        const std::size_t lane = i % LANES, step = j + lane;
        return moves[i / LANES * words + step / STEPS * LANES + lane] >> 2 * (step % STEPS) & 3;
    });
}

template <class Cost>
Warp warp_by_rows(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
                  const CostTable<Cost> &table) {
    constexpr std::int64_t infinite = std::numeric_limits<std::int64_t>::max() / 2;
    const std::size_t n = source.size(), m = pivot.size();
    std::vector<std::uint8_t> moves(n * m);
    std::vector<std::int64_t> row(m, infinite);
    for (std::size_t i = 0; i < n; ++i) {
        std::int64_t diagonal = i == 0 ? 0 : infinite, left = infinite;
        for (std::size_t j = 0; j < m; ++j) {
            const std::int64_t up = row[j];
            const std::int64_t side = std::min(left, up);
            moves[i * m + j] = side < diagonal ? (up < left ? UP : LEFT) : DIAGONAL;
            left = row[j] = std::min(diagonal, side) + table.cost[source[i] * table.stride + pivot[j]];
            diagonal = up;
        }
    }
    return walk_back(source, pivot, table, [&](std::size_t i, std::size_t j) { return moves[i * m + j]; });
}

// No D is more than what the path along the first row and then down the dearest column costs.
std::uint64_t greatest_sum(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
                           const CostTable<std::uint8_t> &table) {
    std::vector<std::uint8_t> dearest(table.cost.size() / table.stride, 0);
    for (std::size_t s = 0; s < dearest.size(); ++s) {
        const std::uint8_t *row = &table.cost[s * table.stride];
        std::uint8_t most = 0;
        for (std::size_t p = 0; p < table.stride; ++p) most = std::max(most, row[p]);
        dearest[s] = most;
    }
    std::uint64_t sum = 0;
    for (const std::int32_t p : pivot) sum += table.cost[source[0] * table.stride + p];
    for (const std::int32_t s : source) sum += dearest[s];
    return sum;
}

}  // namespace

template <>
Warp warp(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
          const CostTable<std::uint8_t> &table) {
    if (greatest_sum(source, pivot, table) < INFINITE<std::uint16_t>) {
        return warp_by_strips<std::uint16_t>(source, pivot, table);
    }
    return warp_by_strips<std::uint32_t>(source, pivot, table);  // 2^32 would take a matrix of 2^46 cells
}

template <>
Warp warp(std::span<const std::int32_t> source, std::span<const std::int32_t> pivot,
          const CostTable<std::uint32_t> &table) {
    return warp_by_rows(source, pivot, table);
}

}  // namespace fusechat::align
