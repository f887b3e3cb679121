#include "merge/select.hpp"

#include <algorithm>
#include <deque>

#include "merge/keys.hpp"
#include "merge/lanes.hpp"
#include "merge/search.hpp"

namespace fusechat::merge {
namespace {

// Kept of all searches' brackets, and of one's at least and at most.
constexpr std::int64_t kListBytes = 8 << 20, kLeastListBytes = 1 << 18, kMostListBytes = 3 << 20;
constexpr std::int64_t kSampleItems = 1 << 18;   // sampled at most, for one search, and twice that for several
constexpr int kSampleRun = 128;                  // neighbours taken together: a read costs more than their arithmetic
constexpr std::int64_t kSampledFrom = 1 << 16;   // smaller tensors are kept or narrowed at once

void bracket_by_sample(const Inputs &inputs, std::deque<Search> &searches, ScratchPool &pool) {
    if (inputs.n < kSampledFrom) return;
    // About n^(2/3) balances the cost of the sample with that of what its bracket keeps, as long as that can be kept.
    std::int64_t wanted = std::int64_t{1} << 2 * std::bit_width(static_cast<std::uint64_t>(inputs.n)) / 3;
    // Of larger tensors it seldom can: then one in 64 makes the bracket narrow.
    wanted = std::max(wanted, inputs.n >> 6);
    const auto n_searches = static_cast<std::int64_t>(searches.size());
    wanted = std::min(wanted, n_searches == 1 ? kSampleItems : 2 * kSampleItems / n_searches);
    const std::int64_t n_runs = std::max<std::int64_t>(wanted / kSampleRun, 1);
    std::vector<std::vector<double>> samples(searches.size());
    for (auto &sample : samples) sample.reserve(static_cast<std::size_t>((n_runs + 1) * kSampleRun));
    auto scratch = pool.take();
    std::vector<NonFinite> ignored(inputs.targets.size() + 1);
    for (std::int64_t run = 0; run < n_runs; ++run) {
        const auto begin = static_cast<std::int64_t>(static_cast<__int128>(inputs.n - kSampleRun) * run / n_runs);
        fetch(inputs, begin, kSampleRun, *scratch);
        open_tile(inputs, begin, 0, kSampleRun, *scratch, ignored);
        for (std::size_t s = 0; s < searches.size(); ++s) {
            searches[s].append_keys(*scratch, static_cast<int>(s), kSampleRun, samples[s]);
        }
    }
    pool.give(std::move(scratch));
    for (std::size_t s = 0; s < searches.size(); ++s) searches[s].bracket_from(samples[s]);
}

}  // namespace

std::int64_t Quota::resolve(std::int64_t n_nonzero) const {
    if (k >= 0) return k;
    if (in_fp32) {
        const float share = static_cast<float>(static_cast<double>(numerator) / static_cast<double>(denominator));
        return std::min(n_nonzero, static_cast<std::int64_t>(static_cast<float>(n_nonzero) * share));
    }
    return static_cast<std::int64_t>(static_cast<__int128>(n_nonzero) * numerator / denominator);
}

std::vector<Selection> select(const Inputs &inputs, ScratchPool &pool, Key key, const std::vector<Quota> &quotas,
                              int threads, std::vector<NonFinite> &bad, Carry *carry) {
    const std::int64_t list_bytes =
        std::clamp(kListBytes / static_cast<std::int64_t>(quotas.size()), kLeastListBytes, kMostListBytes);
    std::deque<Search> searches;
    for (std::size_t s = 0; s < quotas.size(); ++s) {
        Inputs own = inputs;
        if (key == Key::magnitude) own.targets = {inputs.targets[s]};
        searches.emplace_back(std::move(own), key, quotas[s], list_bytes, carry);
    }
    bracket_by_sample(inputs, searches, pool);
    std::vector<Search *> open;
    for (Search &search : searches) open.push_back(&search);
    Inputs read = inputs;
    for (bool first = true; !open.empty(); first = false) {
        for (Search *search : open) search->begin_pass();
        if (open.size() == 1 && open[0]->held()) {
            for_each_segment(read, pool, threads, [&](std::int64_t segment, Scratch &scratch, std::vector<NonFinite> &) {
                open[0]->tally_held(segment, scratch);
            });
            if (open[0]->end_pass(pool)) break;
            continue;
        }
        const auto found = for_each_tile(
            read, pool, threads,
            [&](std::int64_t segment, std::int64_t begin, int n, Scratch &scratch) {
                for (std::size_t s = 0; s < open.size(); ++s) {
                    open[s]->tally(segment, begin, n, scratch, static_cast<int>(s));
                }
            });
        if (first) bad = found;
        std::erase_if(open, [&](Search *search) { return search->end_pass(pool); });
        // A further pass reads only the targets whose bracket was missed.
        read.targets.clear();
        for (const Search *search : open) {
            read.targets.insert(read.targets.end(), search->own().targets.begin(), search->own().targets.end());
        }
    }
    std::vector<Selection> selections;
    for (Search &search : searches) selections.push_back(search.take());
    return selections;
}

Selection select_all(const Inputs &inputs, ScratchPool &pool, int threads, std::vector<NonFinite> &bad) {
    const int width = inputs.n_targets();
    std::vector<std::vector<double>> segments(static_cast<std::size_t>(n_segments(inputs.n)));
    bad = for_each_tile(
        inputs, pool, threads,
        [&](std::int64_t segment, std::int64_t, int n, Scratch &scratch) {
            auto &sums = segments[static_cast<std::size_t>(segment)];
            sums.resize(width, 0.0);
            for (int j = 0; j < width; ++j) sums[j] += energy(scratch.delta(j), pad(n));
        });
    Selection selection;
    selection.k = inputs.n;
    selection.threshold = -1;
    selection.energy.assign(width, 0.0);
    for (const auto &sums : segments) {
        for (int j = 0; j < width; ++j) selection.energy[j] += sums[j];
    }
    return selection;
}

}  // namespace fusechat::merge
