#include "align/remap.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "align/half.hpp"
#include "align/match.hpp"
#include "parallel.hpp"

namespace fusechat::align {
namespace {

constexpr std::int64_t ROWS_AT_ONCE = 8192;
constexpr double MASS_UNIT = 1 << 30;
constexpr std::uint32_t NO_TARGET = ~std::uint32_t{0};
constexpr std::uint16_t HALF_ROUNDING_NOISE = 0x1400;  // 2^-10: a log-probability this far above 0 is rounding

[[noreturn]] void fail(const std::string &what, std::int64_t value, std::int64_t bound) {
    throw std::invalid_argument(what + " " + std::to_string(value) + " is outside 0.." + std::to_string(bound - 1));
}

// The magnitude of a log-probability's bits; absent entries give HALF_INFINITY.
inline std::uint16_t magnitude(std::uint16_t bits) {
    if (bits & HALF_SIGN) {
        const std::uint16_t size = bits ^ HALF_SIGN;
        if (size > HALF_INFINITY) throw std::invalid_argument("a log-probability is NaN");
        return size;
    }
    if (bits > HALF_ROUNDING_NOISE) throw std::invalid_argument("a log-probability is NaN or positive");
    return 0;
}

inline std::uint16_t log_half(double probability) {
    return half_from_float(static_cast<float>(std::min(std::log(probability), 0.0))) | HALF_SIGN;
}

// One row's targets so far: which slot each pivot id has. A small table that stays in the nearest cache, stamped so that
// nothing is cleared between rows; ids that share a place in it are looked for among the slots.
class Slots {
  public:
    explicit Slots(std::int64_t most) : id_(static_cast<std::size_t>(most)) {}

    void begin_row() {
        used_ = 0;
        if (++row_ == 0) {
            std::fill_n(places_, PLACES, Place{0, 0});
            row_ = 1;
        }
    }
    // The slot of `id`, which is given the next one if it has none.
    std::int64_t of(std::int32_t id) {
        Place &place = places_[static_cast<std::uint32_t>(id) % PLACES];
        if (place.row != row_) {
            place = {row_, static_cast<std::uint16_t>(used_)};
        } else if (id_[place.slot] == id) {
            return place.slot;
        } else {
            const auto end = id_.begin() + used_, found = std::find(id_.begin(), end, id);
            if (found != end) return found - id_.begin();
        }
        id_[used_] = id;
        return used_++;
    }
    std::int64_t used() const { return used_; }
    std::int32_t &id(std::int64_t slot) { return id_[slot]; }

  private:
    static constexpr std::uint32_t PLACES = 2048;
    struct Place {
        std::uint16_t row;
        std::uint16_t slot;
    };
    Place places_[PLACES] = {};
    std::uint16_t row_ = 0;
    std::int64_t used_ = 0;
    std::vector<std::int32_t> id_;
};

// The first target of every entry of the maps with its quality, in one word: two words would be two cache misses.
// Throws for entries out of range.
std::vector<std::uint32_t> packed_entries(const Maps &maps, std::int64_t pivot_vocab) {
    const std::int64_t n = maps.n_maps * maps.vocab_size;
    std::vector<std::uint32_t> entries(n);
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t w = 0; w < maps.width; ++w) {
            if (maps.target[i * maps.width + w] >= pivot_vocab) fail("map entry", maps.target[i * maps.width + w], pivot_vocab);
        }
        if (maps.quality[i] > APPROXIMATE) fail("map quality", maps.quality[i], APPROXIMATE + 1);
        const std::int32_t target = maps.target[i * maps.width];
        entries[i] = target < 0 ? NO_TARGET : static_cast<std::uint32_t>(target) << 2 | maps.quality[i];
    }
    return entries;
}

template <class SourceId, class PivotId>
class Remapper {
  public:
    Remapper(const Matched &matched, const SourceRows<SourceId> &source, const Bytes &pivot_tokens, const Maps &maps,
             std::span<const std::uint32_t> entries, const Options &options, std::span<const float> probability,
             const Remapped<PivotId> &out)
        : matched_(matched), source_(source), pivot_tokens_(pivot_tokens), maps_(maps), entries_(entries),
          options_(options), probability_(probability), out_(out),
          candidates_(source.k), slots_(source.k * maps.width),
          slot_logprob_(source.k * maps.width), slot_probability_(source.k * maps.width) {}

    void row(std::int64_t r) {
        const std::int32_t gold = matched_.gold[r];
        const std::int64_t pivot_vocab = static_cast<std::int64_t>(pivot_tokens_.offsets.size()) - 1;
        if (gold < 0 || gold >= pivot_vocab) fail("pivot token", gold, pivot_vocab);
        std::fill_n(out_.ids + r * source_.k, source_.k, PivotId{0});
        std::fill_n(out_.logprobs + r * source_.k, source_.k, HALF_MINUS_INFINITY);
        out_.gold_logprob[r] = std::numeric_limits<float>::quiet_NaN();
        const std::uint8_t kind = matched_.kind[r];
        if (kind > NONE) fail("row kind", kind, NONE + 1);
        if (kind == NONE) {
            if (options_.unaligned == Unaligned::GOLD) only(r, gold, 0);
            return;
        }
        const std::int64_t s = matched_.source_row[r], chain = matched_.chain[r];
        if (s < 0 || chain < 1 || s > source_.n_rows - chain) fail("source row", s, source_.n_rows);
        if (kind == FINER) {
            const double logprob = chain_logprob(s, chain, gold, matched_.rest_bytes[r]);
            out_.gold_logprob[r] = static_cast<float>(logprob);
            if (options_.finer == Finer::FIRST) return candidates(r, s, gold, kind);
            const bool one_hot = options_.finer == Finer::GOLD;
            return only(r, gold, one_hot ? 0 : half_from_float(static_cast<float>(logprob)) | HALF_SIGN);
        }
        candidates(r, s, gold, kind);
    }

    // Adds what the rows so far did with their mass to the shared counters.
    void flush() {
        for (int i = 0; i < 12; ++i) std::atomic_ref(out_.mass[i]).fetch_add(mass_[i], std::memory_order_relaxed);
        std::fill_n(mass_, 12, 0);
    }

  private:
    void only(std::int64_t r, std::int32_t gold, std::uint16_t logprob) {
        if (source_.k == 0) return;
        out_.ids[r * source_.k] = static_cast<PivotId>(gold);
        out_.logprobs[r * source_.k] = logprob;
    }

    void candidates(std::int64_t r, std::int64_t s, std::int32_t gold, std::uint8_t kind) {
        const std::int64_t map = matched_.map_index[r], width = maps_.width;
        if (map < 0 || map >= maps_.n_maps) fail("map", map, maps_.n_maps);
        const std::int64_t map_begin = map * maps_.vocab_size;
        const std::int32_t source_gold = source_.gold[s];
        double on_gold = kind == COARSER ? std::exp(static_cast<double>(source_.gold_logprob[s])) : 0;
        std::uint64_t lost = 0, exact = 0, all = 0;
        sorted_ = true;
        slots_.begin_row();
        const bool ends_turn = matched_.ends_turn[r];
        const std::int64_t present = look_up(s, map_begin);
        for (std::int64_t k = 0; k < present; ++k) {
            const auto [id, entry, probability, size] = candidates_[k];
            const auto units = static_cast<std::uint64_t>(static_cast<std::int64_t>(probability * MASS_UNIT + 0.5));
            all += units;
            // A finer row taken as it stands says nothing of the pivot's gold token as a whole.
            const bool is_gold = kind != FINER && id == source_gold;
            if (is_gold || (ends_turn && source_.ends_turn[id])) {
                exact += units;
                if (!is_gold) on_gold += probability;
                put(gold, size, probability);
                continue;
            }
            if (entry == NO_TARGET) {
                lost += units;
                std::atomic_ref(out_.lost[id]).fetch_add(units, std::memory_order_relaxed);
                continue;
            }
            // Without branches: which quality comes next is not to be foreseen.
            exact += units & -static_cast<std::uint64_t>((entry & 3) == EXACT);
            lost += units & -static_cast<std::uint64_t>((entry & 3) == LOST);
            if (width == 1) {
                const auto target = static_cast<std::int32_t>(entry >> 2);
                if (target == gold) on_gold += probability;
                put(target, size, probability);
                continue;
            }
            const std::int32_t *target = maps_.target + (map_begin + id) * width;
            const float *weight = maps_.weight + (map_begin + id) * width;
            for (std::int64_t w = 0; w < width && target[w] >= 0; ++w) {
                const double share = static_cast<double>(probability) * weight[w];
                if (target[w] == gold) on_gold += share;
                put(target[w], log_half(share) ^ HALF_SIGN, share);
                sorted_ = false;
            }
        }
        mass_[kind * 3 + LOST] += lost;
        mass_[kind * 3 + EXACT] += exact;
        mass_[kind * 3 + APPROXIMATE] += all - lost - exact;
        if (!sorted_) sort_row();
        const std::int64_t kept = std::min(slots_.used(), source_.k);
        for (std::int64_t i = 0; i < kept; ++i) {
            out_.ids[r * source_.k + i] = static_cast<PivotId>(slots_.id(i));
            out_.logprobs[r * source_.k + i] = slot_logprob_[i];
        }
        if (kind == SAME) out_.gold_logprob[r] = source_.gold_logprob[s];
        if (kind == COARSER) out_.gold_logprob[r] = static_cast<float>(std::min(std::log(on_gold), 0.0));
    }

    // A row's present candidates with what the tables say of them, looked up together so that their cache misses
    // overlap; returns how many there are.
    std::int64_t look_up(std::int64_t s, std::int64_t map_begin) {
        const SourceId *ids = source_.ids + s * source_.k;
        const std::uint16_t *logprobs = source_.logprobs + s * source_.k;
        const std::uint32_t *entries = entries_.data() + map_begin;
        Candidate *out = candidates_.data();
        for (std::int64_t k = 0; k < source_.k; ++k) {
            const std::uint16_t size = magnitude(logprobs[k]);
            if (size == HALF_INFINITY) continue;
            const std::int64_t id = static_cast<std::int64_t>(ids[k]);
            if (id < 0 || id >= maps_.vocab_size) fail("source token", id, maps_.vocab_size);
            *out++ = {static_cast<std::int32_t>(id), entries[id], probability_[size], size};
        }
        return out - candidates_.data();
    }

    void put(std::int32_t to, std::uint16_t size, double probability) {
        const std::int64_t used = slots_.used(), slot = slots_.of(to);
        if (slot == used) {
            slot_logprob_[slot] = size | HALF_SIGN;
            slot_probability_[slot] = probability;
        } else if (options_.collisions == Collisions::SUM) {
            sorted_ = false;
            slot_probability_[slot] += probability;
            slot_logprob_[slot] = log_half(slot_probability_[slot]);
        }
    }

    // Most probable first. Rows are nearly in order: insertion is the fast sort here, and a stable one.
    void sort_row() {
        for (std::int64_t i = 1; i < slots_.used(); ++i) {
            const std::int32_t id = slots_.id(i);
            const std::uint16_t logprob = slot_logprob_[i];
            std::int64_t j = i;
            for (; j > 0 && slot_logprob_[j - 1] > logprob; --j) {
                slots_.id(j) = slots_.id(j - 1);
                slot_logprob_[j] = slot_logprob_[j - 1];
            }
            slots_.id(j) = id;
            slot_logprob_[j] = logprob;
        }
    }

    // log P(the pivot's token): the source's own tokens along its bytes. Where the last of them goes beyond the pivot's
    // token, all candidates that begin with the bytes still missing count, not only the one that came.
    double chain_logprob(std::int64_t s, std::int64_t chain, std::int32_t gold, std::int32_t rest_bytes) const {
        double logprob = 0;
        const std::int64_t whole = rest_bytes > 0 ? chain - 1 : chain;
        for (std::int64_t i = 0; i < whole; ++i) logprob += source_.gold_logprob[s + i];
        if (rest_bytes > 0) logprob += std::log(beginning_with(s + chain - 1, gold, rest_bytes));
        return std::min(logprob, 0.0);
    }

    double beginning_with(std::int64_t s, std::int32_t gold, std::int32_t rest_bytes) const {
        const std::int64_t end = pivot_tokens_.offsets[gold + 1];
        const std::int64_t begin = std::max(pivot_tokens_.offsets[gold], end - rest_bytes);
        const auto rest = pivot_tokens_.data.subspan(begin, end - begin);
        double sum = std::exp(static_cast<double>(source_.gold_logprob[s]));
        for (std::int64_t k = 0; k < source_.k; ++k) {
            const std::uint16_t size = magnitude(source_.logprobs[s * source_.k + k]);
            const std::int64_t id = static_cast<std::int64_t>(source_.ids[s * source_.k + k]);
            if (size == HALF_INFINITY || id == source_.gold[s]) continue;
            if (id < 0 || id >= maps_.vocab_size) fail("source token", id, maps_.vocab_size);
            const auto token = source_.tokens.data.subspan(
                source_.tokens.offsets[id], source_.tokens.offsets[id + 1] - source_.tokens.offsets[id]);
            if (token.size() >= rest.size() && std::equal(rest.begin(), rest.end(), token.begin())) {
                sum += probability_[size];
            }
        }
        return sum;
    }

    const Matched &matched_;
    const SourceRows<SourceId> &source_;
    const Bytes &pivot_tokens_;
    const Maps &maps_;
    const std::span<const std::uint32_t> entries_;
    const Options &options_;
    const std::span<const float> probability_;
    const Remapped<PivotId> &out_;
    struct Candidate {
        std::int32_t id;
        std::uint32_t entry;
        float probability;
        std::uint16_t size;
    };
    std::vector<Candidate> candidates_;
    Slots slots_;
    std::vector<std::uint16_t> slot_logprob_;
    std::vector<double> slot_probability_;
    bool sorted_ = true;
    std::uint64_t mass_[12] = {};
};

}  // namespace

template <class SourceId, class PivotId>
void remap_rows(const Matched &matched, const SourceRows<SourceId> &source, const Bytes &pivot_tokens,
                const Maps &maps, const Options &options, std::span<const float> probability,
                const Remapped<PivotId> &out, int threads) {
    const std::int64_t pivot_vocab = static_cast<std::int64_t>(pivot_tokens.offsets.size()) - 1;
    const std::vector<std::uint32_t> entries = packed_entries(maps, pivot_vocab);
    const auto n = static_cast<std::int64_t>(matched.kind.size());
    const std::int64_t grain = std::max<std::int64_t>(ROWS_AT_ONCE, (n + 4 * threads - 1) / (4 * threads));
    parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        Remapper<SourceId, PivotId> remapper(matched, source, pivot_tokens, maps, entries, options, probability, out);
        for (std::int64_t r = begin; r < end; ++r) remapper.row(r);
        remapper.flush();
    });
}

#define FUSECHAT_REMAP(S, P)                                                                                     \
    template void remap_rows(const Matched &, const SourceRows<S> &, const Bytes &, const Maps &, const Options &, \
                             std::span<const float>, const Remapped<P> &, int);
FUSECHAT_REMAP(std::uint16_t, std::uint16_t)
FUSECHAT_REMAP(std::uint16_t, std::int32_t)
FUSECHAT_REMAP(std::int32_t, std::uint16_t)
FUSECHAT_REMAP(std::int32_t, std::int32_t)
#undef FUSECHAT_REMAP

}  // namespace fusechat::align
