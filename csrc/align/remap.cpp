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

// One row's targets so far: which slot each pivot id has, without clearing anything between rows.
class Slots {
  public:
    void begin_row(std::size_t vocab_size) {
        if (seen_.size() < vocab_size) seen_.resize(vocab_size, {0, 0});
        if (++row_ == 0) {
            std::fill(seen_.begin(), seen_.end(), Seen{0, 0});
            row_ = 1;
        }
    }
    // The slot of `id`, or −1 and `fresh` becomes its slot.
    int find_or_add(std::int32_t id, int fresh) {
        Seen &seen = seen_[id];
        if (seen.row == row_) return static_cast<int>(seen.slot);
        seen = {row_, static_cast<std::uint32_t>(fresh)};
        return -1;
    }

  private:
    struct Seen {
        std::uint32_t row;
        std::uint32_t slot;
    };
    std::vector<Seen> seen_;
    std::uint32_t row_ = 0;
};

template <class SourceId, class PivotId>
class Remapper {
  public:
    Remapper(const Matched &matched, const SourceRows<SourceId> &source, const Bytes &pivot_tokens, const Maps &maps,
             const Options &options, std::span<const float> probability, const Remapped<PivotId> &out)
        : matched_(matched), source_(source), pivot_tokens_(pivot_tokens), maps_(maps), options_(options),
          probability_(probability), out_(out), slot_id_(source.k * maps.width),
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
        const SourceId *ids = source_.ids + s * source_.k;
        const std::uint16_t *logprobs = source_.logprobs + s * source_.k;
        const std::int32_t source_gold = source_.gold[s];
        double on_gold = kind == COARSER ? std::exp(static_cast<double>(source_.gold_logprob[s])) : 0;
        std::uint64_t units_by_quality[3] = {};
        used_ = 0;
        sorted_ = true;
        slots_.begin_row(pivot_tokens_.offsets.size() - 1);
        for (std::int64_t k = 0; k < source_.k; ++k) {
            const std::uint16_t size = magnitude(logprobs[k]);
            if (size == HALF_INFINITY) continue;
            const std::int64_t id = static_cast<std::int64_t>(ids[k]);
            if (id < 0 || id >= maps_.vocab_size) fail("source token", id, maps_.vocab_size);
            const float probability = probability_[size];
            const std::uint64_t units = static_cast<std::uint64_t>(probability * MASS_UNIT + 0.5);
            // A finer row taken as it stands says nothing of the pivot's gold token as a whole.
            const bool is_gold = kind != FINER && id == source_gold;
            if (is_gold || (matched_.ends_turn[r] && source_.ends_turn[id])) {
                units_by_quality[EXACT] += units;
                if (!is_gold) on_gold += probability;
                put(gold, size, probability);
                continue;
            }
            const std::int32_t *target = maps_.target + (map_begin + id) * width;
            if (target[0] < 0) {
                units_by_quality[LOST] += units;
                std::atomic_ref(out_.lost[id]).fetch_add(units, std::memory_order_relaxed);
                continue;
            }
            units_by_quality[maps_.quality[map_begin + id]] += units;
            if (width == 1) {
                if (target[0] == gold) on_gold += probability;
                put(target[0], size, probability);
                continue;
            }
            const float *weight = maps_.weight + (map_begin + id) * width;
            for (std::int64_t w = 0; w < width && target[w] >= 0; ++w) {
                const double share = static_cast<double>(probability) * weight[w];
                if (target[w] == gold) on_gold += share;
                put(target[w], log_half(share) ^ HALF_SIGN, share);
                sorted_ = false;
            }
        }
        for (int quality = 0; quality < 3; ++quality) mass_[kind * 3 + quality] += units_by_quality[quality];
        if (!sorted_) sort_row();
        const std::int64_t kept = std::min<std::int64_t>(used_, source_.k);
        for (std::int64_t i = 0; i < kept; ++i) {
            out_.ids[r * source_.k + i] = static_cast<PivotId>(slot_id_[i]);
            out_.logprobs[r * source_.k + i] = slot_logprob_[i];
        }
        if (kind == SAME) out_.gold_logprob[r] = source_.gold_logprob[s];
        if (kind == COARSER) out_.gold_logprob[r] = static_cast<float>(std::min(std::log(on_gold), 0.0));
    }

    void put(std::int32_t to, std::uint16_t size, double probability) {
        const int slot = slots_.find_or_add(to, used_);
        if (slot < 0) {
            slot_id_[used_] = to;
            slot_logprob_[used_] = size | HALF_SIGN;
            slot_probability_[used_++] = probability;
        } else if (options_.collisions == Collisions::SUM) {
            sorted_ = false;
            slot_probability_[slot] += probability;
            slot_logprob_[slot] = log_half(slot_probability_[slot]);
        }
    }

    // Most probable first. Rows are nearly in order: insertion is the fast sort here, and a stable one.
    void sort_row() {
        for (int i = 1; i < used_; ++i) {
            const std::int32_t id = slot_id_[i];
            const std::uint16_t logprob = slot_logprob_[i];
            int j = i;
            for (; j > 0 && slot_logprob_[j - 1] > logprob; --j) {
                slot_id_[j] = slot_id_[j - 1];
                slot_logprob_[j] = slot_logprob_[j - 1];
            }
            slot_id_[j] = id;
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
    const Options &options_;
    const std::span<const float> probability_;
    const Remapped<PivotId> &out_;
    std::vector<std::int32_t> slot_id_;
    std::vector<std::uint16_t> slot_logprob_;
    std::vector<double> slot_probability_;
    int used_ = 0;
    bool sorted_ = true;
    std::uint64_t mass_[12] = {};
    Slots slots_;
};

}  // namespace

template <class SourceId, class PivotId>
void remap_rows(const Matched &matched, const SourceRows<SourceId> &source, const Bytes &pivot_tokens,
                const Maps &maps, const Options &options, std::span<const float> probability,
                const Remapped<PivotId> &out, int threads) {
    const std::int64_t pivot_vocab = static_cast<std::int64_t>(pivot_tokens.offsets.size()) - 1;
    for (std::int64_t i = 0; i < maps.n_maps * maps.vocab_size * maps.width; ++i) {
        if (maps.target[i] >= pivot_vocab) fail("map entry", maps.target[i], pivot_vocab);
    }
    for (std::int64_t i = 0; i < maps.n_maps * maps.vocab_size; ++i) {
        if (maps.quality[i] > APPROXIMATE) fail("map quality", maps.quality[i], APPROXIMATE + 1);
    }
    const auto n = static_cast<std::int64_t>(matched.kind.size());
    const std::int64_t grain = std::max<std::int64_t>(ROWS_AT_ONCE, (n + 4 * threads - 1) / (4 * threads));
    parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        Remapper<SourceId, PivotId> remapper(matched, source, pivot_tokens, maps, options, probability, out);
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
