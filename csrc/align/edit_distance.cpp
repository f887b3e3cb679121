#include "align/edit_distance.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "align/lanes.hpp"
#include "clones.hpp"
#include "parallel.hpp"

namespace fusechat::align {

std::uint32_t &Alphabet::slot(std::uint32_t code_point) {
    const std::size_t mask = high_.size() - 1;
    std::size_t at = (code_point * 0x9E3779B1U) & mask;
    while (high_[at].first != 0 && high_[at].first != code_point + 1) at = (at + 1) & mask;
    high_[at].first = code_point + 1;
    return high_[at].second;
}

std::uint32_t Alphabet::number(std::uint32_t code_point) {
    if (code_point < low_.size()) {
        std::uint32_t &n = low_[code_point];
        if (!n) n = ++used_;
        return n - 1;
    }
    if (2 * (n_high_ + 1) > high_.size()) {
        const auto old = std::move(high_);
        high_.assign(std::max<std::size_t>(64, 2 * old.size()), {0, 0});
        for (const auto &[key, value] : old) {
            if (key) slot(key - 1) = value;
        }
    }
    std::uint32_t &n = slot(code_point);
    if (!n) {
        ++n_high_;
        n = ++used_;
    }
    return n - 1;
}

void Alphabet::number_all(Text &text) {
    for (std::uint32_t &c : text) c = number(c);
}

namespace {

template <class Word>
constexpr std::size_t BITS = 8 * sizeof(Word);

// Up to LANES patterns of at most BITS<Word> code points: for every symbol and lane, the positions where it stands in
// the lane's pattern.
template <class Word>
class PatternBlock {
  public:
    explicit PatternBlock(std::size_t alphabet_size) : match_(alphabet_size * LANES, 0) {}

    // Cleared by symbol, so that a block costs its patterns' length and not the alphabet's.
    void set(const Text *const *patterns, std::size_t n) {
        for (const std::uint32_t symbol : used_) std::fill_n(&match_[symbol * LANES], LANES, 0);
        used_.clear();
        std::fill_n(length_, LANES, 1);
        for (std::size_t l = 0; l < n; ++l) {
            length_[l] = static_cast<Word>(patterns[l]->size());
            for (std::size_t i = 0; i < patterns[l]->size(); ++i) {
                const std::uint32_t symbol = (*patterns[l])[i];
                match_[symbol * LANES + l] |= static_cast<Word>(Word{1} << i);
                used_.push_back(symbol);
            }
        }
    }

    const Word *match() const { return match_.data(); }
    const Word *length() const { return length_; }

  private:
    std::vector<Word> match_;
    std::vector<std::uint32_t> used_;
    alignas(64) Word length_[LANES];
};

// The bit of every lane's last row.
template <class Word>
FUSECHAT_INLINE void last_bits(const Word *length, Lanes<Word> &bits) {
    for (int l = 0; l < LANES; ++l) bits[l] = static_cast<Word>(Word{1} << (length[l] - 1));
}

// Hyyrö's form of Myers' bit-vector step on LANES patterns at once: bit i of a lane stands for row i of its matrix.
template <class Word>
FUSECHAT_INLINE void lanes_distance(const Word *match, const Word *length, const Lanes<Word> &last, const Text &text,
                                    Lanes<Word> &score) {
    Lanes<Word> vertical_plus = ~Lanes<Word>{}, vertical_minus{};
    load(score, length);
    for (const std::uint32_t symbol : text) {
        Lanes<Word> equal;
        load(equal, match + std::size_t{symbol} * LANES);
        const Lanes<Word> diagonal = (((equal & vertical_plus) + vertical_plus) ^ vertical_plus) | equal | vertical_minus;
        Lanes<Word> horizontal_plus = vertical_minus | ~(diagonal | vertical_plus);
        Lanes<Word> horizontal_minus = diagonal & vertical_plus;
        // Comparisons are −1 where true.
        score -= (Lanes<Word>)((horizontal_plus & last) == last);
        score += (Lanes<Word>)((horizontal_minus & last) == last);
        horizontal_plus = (horizontal_plus + horizontal_plus) | 1;
        horizontal_minus = horizontal_minus + horizontal_minus;
        vertical_plus = horizontal_minus | ~(diagonal | horizontal_plus);
        vertical_minus = horizontal_plus & diagonal;
    }
}

// distances[place[j] * LANES + l]: of text j and lane l's pattern.
template <class Word, class Cost>
FUSECHAT_INLINE void every_distance(const Word *match, const Word *length, const Text *const *texts,
                                    const std::int32_t *place, std::size_t n, Cost *distances) {
    Lanes<Word> last;
    last_bits<Word>(length, last);
    for (std::size_t j = 0; j < n; ++j) {
        Lanes<Word> score;
        lanes_distance<Word>(match, length, last, *texts[j], score);
        store(distances + static_cast<std::size_t>(place[j]) * LANES, __builtin_convertvector(score, Lanes<Cost>));
    }
}

#define FUSECHAT_EVERY_DISTANCE(Word, Cost)                                                                     \
    FUSECHAT_CLONES void block_distances(const Word *match, const Word *length, const Text *const *texts,       \
                                         const std::int32_t *place, std::size_t n, Cost *distances) {           \
        every_distance(match, length, texts, place, n, distances);                                              \
    }
FUSECHAT_EVERY_DISTANCE(std::uint8_t, std::uint8_t)
FUSECHAT_EVERY_DISTANCE(std::uint16_t, std::uint8_t)
FUSECHAT_EVERY_DISTANCE(std::uint32_t, std::uint8_t)
FUSECHAT_EVERY_DISTANCE(std::uint64_t, std::uint8_t)
FUSECHAT_EVERY_DISTANCE(std::uint32_t, std::uint32_t)
FUSECHAT_EVERY_DISTANCE(std::uint64_t, std::uint32_t)
#undef FUSECHAT_EVERY_DISTANCE

// Improves best (distance, index) of every lane with texts [0, n), whose places in the order given are `index`.
FUSECHAT_CLONES void block_nearest(const std::uint32_t *match, const std::uint32_t *length, const Text *const *texts,
                                   const std::int32_t *index, std::size_t n, std::int32_t *best,
                                   std::int32_t *best_index) {
    using Ints = Lanes<std::int32_t>;
    Lanes<std::uint32_t> last, distance;
    last_bits<std::uint32_t>(length, last);
    Ints least, place;
    load(least, best);
    load(place, best_index);
    for (std::size_t j = 0; j < n; ++j) {
        lanes_distance<std::uint32_t>(match, length, last, *texts[j], distance);
        const Ints score = (Ints)distance;
        const Ints here = Ints{} + index[j];
        const Ints better = (score < least) | ((score == least) & (here < place));
        least = better ? score : least;
        place = better ? here : place;
    }
    store(best, least);
    store(best_index, place);
}

// Places in the order of their texts' lengths, equal ones as given.
template <class At>
std::vector<std::int32_t> by_length(std::size_t n, At &&at) {
    std::size_t longest = 0;
    for (std::size_t i = 0; i < n; ++i) longest = std::max(longest, at(i).size());
    std::vector<std::int32_t> next(longest + 2, 0), order(n);
    for (std::size_t i = 0; i < n; ++i) ++next[at(i).size() + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (std::size_t i = 0; i < n; ++i) order[next[at(i).size()]++] = static_cast<std::int32_t>(i);
    return order;
}

// A block's distances into their rows.
template <class Cost>
void scatter(const Cost *distances, const std::int32_t *row_of_lane, std::size_t n_lanes, std::size_t n,
             std::size_t stride, Cost *out) {
    if constexpr (sizeof(Cost) == 1) {
        for (std::size_t begin = 0; begin < n; begin += LANES) {
            Lanes<std::uint8_t> v[LANES];
            for (int i = 0; i < LANES; ++i) load(v[i], distances + (begin + i) * LANES);
            transpose(v);
            for (std::size_t l = 0; l < n_lanes; ++l) store(out + row_of_lane[l] * stride + begin, v[l]);
        }
    } else {
        for (std::size_t l = 0; l < n_lanes; ++l) {
            for (std::size_t j = 0; j < n; ++j) out[row_of_lane[l] * stride + j] = distances[j * LANES + l];
        }
    }
}

}  // namespace

std::uint32_t edit_distance(std::span<const std::uint32_t> pattern, std::span<const std::uint32_t> text) {
    if (pattern.size() > text.size()) std::swap(pattern, text);
    if (pattern.empty()) return static_cast<std::uint32_t>(text.size());
    const std::size_t words = (pattern.size() + 63) / 64;
    std::vector<std::uint32_t> symbols(pattern.begin(), pattern.end());
    std::sort(symbols.begin(), symbols.end());
    symbols.erase(std::unique(symbols.begin(), symbols.end()), symbols.end());
    std::vector<std::uint64_t> match(symbols.size() * words, 0);
    for (std::size_t i = 0; i < pattern.size(); ++i) {
        const auto s = std::lower_bound(symbols.begin(), symbols.end(), pattern[i]) - symbols.begin();
        match[s * words + i / 64] |= std::uint64_t{1} << i % 64;
    }
    std::vector<std::uint64_t> plus(words, ~std::uint64_t{0}), minus(words, 0);
    const std::uint64_t last = std::uint64_t{1} << (pattern.size() - 1) % 64;
    auto distance = static_cast<std::uint32_t>(pattern.size());
    const std::vector<std::uint64_t> nothing(words, 0);
    for (const std::uint32_t symbol : text) {
        const auto s = std::lower_bound(symbols.begin(), symbols.end(), symbol);
        const std::uint64_t *equals =
            s != symbols.end() && *s == symbol ? &match[(s - symbols.begin()) * words] : nothing.data();
        std::uint64_t plus_in = 1, minus_in = 0;
        for (std::size_t w = 0; w < words; ++w) {
            const std::uint64_t equal = equals[w] | minus_in;
            const std::uint64_t diagonal = (((equal & plus[w]) + plus[w]) ^ plus[w]) | equal | minus[w];
            std::uint64_t horizontal_plus = minus[w] | ~(diagonal | plus[w]);
            std::uint64_t horizontal_minus = diagonal & plus[w];
            if (w + 1 == words) {
                distance += (horizontal_plus & last) != 0;
                distance -= (horizontal_minus & last) != 0;
            }
            const std::uint64_t plus_out = horizontal_plus >> 63, minus_out = horizontal_minus >> 63;
            horizontal_plus = horizontal_plus << 1 | plus_in;
            horizontal_minus = horizontal_minus << 1 | minus_in;
            plus[w] = horizontal_minus | ~(diagonal | horizontal_plus);
            minus[w] = horizontal_plus & diagonal;
            plus_in = plus_out;
            minus_in = minus_out;
        }
    }
    return distance;
}

template <class Cost>
void distance_table(const std::vector<const Text *> &patterns, const std::vector<const Text *> &texts,
                    std::size_t alphabet_size, std::size_t stride, Cost *out) {
    const std::size_t n = texts.size();
    // By length, so that a block's words are no wider than they must be, and the loops over texts end as foreseen.
    const auto row = by_length(patterns.size(), [&](std::size_t i) -> const Text & { return *patterns[i]; });
    const auto column = by_length(n, [&](std::size_t j) -> const Text & { return *texts[j]; });
    std::vector<const Text *> sorted;
    for (const std::int32_t j : column) sorted.push_back(texts[j]);
    std::vector<Cost> distances((n + LANES) * LANES, 0);
    std::size_t begin = 0;
    const auto up_to = [&](std::size_t length) {
        std::size_t end = begin;
        while (end < row.size() && patterns[row[end]]->size() <= length) ++end;
        return end;
    };
    const auto one_by_one = [&](std::size_t end) {
        for (; begin < end; ++begin) {
            const Text &pattern = *patterns[row[begin]];
            for (std::size_t j = 0; j < n; ++j) {
                out[row[begin] * stride + j] = static_cast<Cost>(edit_distance(pattern, *texts[j]));
            }
        }
    };
    const auto by_blocks = [&]<class Word>(Word) {
        const std::size_t end = up_to(BITS<Word>);
        if (begin == end) return;
        for (PatternBlock<Word> block(alphabet_size); begin < end; begin += LANES) {
            const std::size_t count = std::min<std::size_t>(LANES, end - begin);
            const Text *members[LANES];
            for (std::size_t l = 0; l < count; ++l) members[l] = patterns[row[begin + l]];
            block.set(members, count);
            block_distances(block.match(), block.length(), sorted.data(), column.data(), n, distances.data());
            scatter(distances.data(), &row[begin], count, n, stride, out);
        }
        begin = end;
    };
    one_by_one(up_to(0));
    if constexpr (sizeof(Cost) == 1) {  // no distance is beyond 255, so that narrow words can hold it
        by_blocks(std::uint8_t{});
        by_blocks(std::uint16_t{});
    }
    by_blocks(std::uint32_t{});
    by_blocks(std::uint64_t{});
    one_by_one(row.size());
}
template void distance_table(const std::vector<const Text *> &, const std::vector<const Text *> &, std::size_t,
                             std::size_t, std::uint8_t *);
template void distance_table(const std::vector<const Text *> &, const std::vector<const Text *> &, std::size_t,
                             std::size_t, std::uint32_t *);

void nearest(const std::vector<Text> &patterns, const std::vector<Text> &texts, std::size_t alphabet_size,
             std::int64_t *index, std::int32_t *distance, int threads) {
    const auto order = by_length(texts.size(), [&](std::size_t i) -> const Text & { return texts[i]; });
    const auto pattern_order = by_length(patterns.size(), [&](std::size_t i) -> const Text & { return patterns[i]; });
    std::vector<const Text *> sorted;
    for (const std::int32_t t : order) sorted.push_back(&texts[t]);
    const std::size_t longest = sorted.empty() ? 0 : sorted.back()->size();
    // first[n]: where texts of n code points and more begin.
    std::vector<std::size_t> first(longest + 2, sorted.size());
    for (std::size_t i = sorted.size(); i-- > 0;) first[sorted[i]->size()] = i;
    for (std::size_t n = longest + 1; n-- > 0;) first[n] = std::min(first[n], first[n + 1]);

    const auto n_patterns = static_cast<std::int64_t>(patterns.size());
    parallel_for(n_patterns, 64 * LANES, threads, [&](std::int64_t begin, std::int64_t end) {
        PatternBlock<std::uint32_t> block(alphabet_size);
        for (std::int64_t at = begin; at < end; at += LANES) {
            const auto count = static_cast<std::size_t>(std::min<std::int64_t>(LANES, end - at));
            alignas(64) std::int32_t best[LANES], place[LANES];
            std::fill_n(best, LANES, std::numeric_limits<std::int32_t>::max());
            std::fill_n(place, LANES, -1);
            const Text *members[LANES];
            bool fast = true;
            std::size_t low = std::numeric_limits<std::size_t>::max(), high = 0;
            for (std::size_t l = 0; l < count; ++l) {
                members[l] = &patterns[pattern_order[at + l]];
                low = std::min(low, members[l]->size());
                high = std::max(high, members[l]->size());
                fast &= !members[l]->empty() && members[l]->size() <= BITS<std::uint32_t>;
            }
            if (fast) block.set(members, count);
            const auto look = [&](std::size_t length) {
                const std::size_t from = first[length], to = first[length + 1];
                if (from == to) return;
                if (fast) {
                    block_nearest(block.match(), block.length(), &sorted[from], &order[from], to - from, best, place);
                    return;
                }
                for (std::size_t l = 0; l < count; ++l) {
                    for (std::size_t i = from; i < to; ++i) {
                        const auto found = static_cast<std::int32_t>(edit_distance(*members[l], *sorted[i]));
                        if (found < best[l] || (found == best[l] && order[i] < place[l])) {
                            best[l] = found;
                            place[l] = order[i];
                        }
                    }
                }
            };
            const auto worst = [&] { return static_cast<std::size_t>(*std::max_element(best, best + count)); };
            // From the patterns' own lengths outwards: no distance is less than the difference in length.
            for (std::size_t n = low; n <= std::min(high, longest); ++n) look(n);
            for (std::size_t gap = 1; gap <= std::max(low, longest); ++gap) {
                if (gap > worst()) break;
                if (high + gap <= longest) look(high + gap);
                if (gap <= low && low - gap <= longest) look(low - gap);
            }
            for (std::size_t l = 0; l < count; ++l) {
                index[pattern_order[at + l]] = place[l];
                distance[pattern_order[at + l]] = best[l];
            }
        }
    });
}

}  // namespace fusechat::align
