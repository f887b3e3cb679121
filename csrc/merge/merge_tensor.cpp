#include "merge/merge_tensor.hpp"

#include <algorithm>
#include <bit>
#include <optional>

#include "merge/carry.hpp"
#include "merge/checksum.hpp"
#include "merge/files.hpp"
#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

bool any(const std::vector<NonFinite> &bad) {
    for (const NonFinite &source : bad) {
        if (source.count > 0) return true;
    }
    return false;
}

FUSECHAT_CLONES void zero_nonfinite(float *values, int n) {
    for (int i = 0; i < n; ++i) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffffu;
        values[i] = magnitude < 0x7f800000u ? values[i] : 0.0f;
    }
}

// eta_j = Σ delta_j² / Σ_j Σ delta_j² over what was selected (eq. 7).
std::vector<double> weights_from_energy(const Selection &selection, const EnergyWeights &how, std::int64_t n) {
    double total = 0;
    for (const double energy : selection.energy) total += energy;
    const auto count = static_cast<double>(selection.energy.size());
    if (total == 0 || total / static_cast<double>(n) < how.uniform_below) {
        return std::vector<double>(selection.energy.size(), 1 / count);
    }
    std::vector<double> weights;
    for (const double energy : selection.energy) weights.push_back(energy / total);
    return weights;
}

// Candidates are carried only to a merge that needs nothing else.
std::optional<Carry> carry_for(const Task &task) {
    if (!task.select || task.rule.mask != Mask::shared || task.rule.mask_weights_only) return std::nullopt;
    const Quota &quota = task.quotas[0];
    const double share = static_cast<double>(quota.numerator) / static_cast<double>(quota.denominator);
    Carry carry(task.inputs, {task.out_fd, task.out_offset, task.rule.out_dtype}, share);
    if (!carry.used()) return std::nullopt;
    return carry;
}

std::vector<Selection> choose(const Task &task, ScratchPool &pool, int threads, std::vector<NonFinite> &bad,
                              Carry *carry) {
    if (task.select) {
        const Key key = task.rule.mask == Mask::shared ? Key::variance : Key::magnitude;
        return select(task.inputs, pool, key, task.quotas, threads, bad, carry);
    }
    if (task.energy_weights.use) return {select_all(task.inputs, pool, threads, bad)};
    return {};
}

}  // namespace

Report merge_tensor(Task task, int threads) {
    ScratchPool pool(task.inputs.n_targets());
    Report report;
    std::optional<Carry> carry = carry_for(task);
    report.selections = choose(task, pool, threads, report.nonfinite, carry ? &*carry : nullptr);
    if (any(report.nonfinite)) {
        if (!task.allow_nonfinite) return report;
        carry.reset();
    }
    if (task.energy_weights.use) {
        task.rule.weights = weights_from_energy(report.selections[0], task.energy_weights, task.inputs.n);
    }
    task.rule.set_factors();
    report.weights = task.rule.weights;
    const int width = item_bytes(task.rule.out_dtype);
    std::vector<Outcome> outcomes(static_cast<std::size_t>(n_segments(task.inputs.n)));
    const std::vector<double> zeros(task.inputs.targets.size(), 0.0);
    for (Outcome &outcome : outcomes) outcome.energy = outcome.kept_energy = zeros;
    report.outcome.energy = report.outcome.kept_energy = zeros;
    std::vector<std::uint64_t> checksums(static_cast<std::size_t>((task.inputs.n + kChunk - 1) / kChunk));
    report.nonfinite = for_each_segment(
        task.inputs, pool, threads, [&](std::int64_t segment, Scratch &scratch, std::vector<NonFinite> &bad) {
            Outcome &outcome = outcomes[static_cast<std::size_t>(segment)];
            auto write = [&](std::int64_t begin, int n) {
                const std::int64_t size_bytes = static_cast<std::int64_t>(n) * width;
                write_exactly(task.out_fd, scratch.out(), size_bytes, task.out_offset + begin * width);
                checksums[static_cast<std::size_t>(begin / kChunk)] =
                    xxh64(scratch.out(), static_cast<std::size_t>(size_bytes));
            };
            if (carry && carry->holds(segment)) {
                carry->merge(segment, task.rule, report.selections[0], scratch, outcome, write);
                return;
            }
            for_each_tile_of(
                task.inputs, segment, scratch, bad,
                [&](std::int64_t begin, int n) {
                    unsigned char *out = scratch.out() + begin % kChunk * width;
                    combine_tile(task.rule, report.selections, begin, n, scratch,
                                 is_measured(task.inputs.n, begin), out, outcome);
                },
                write);
        });
    report.checksum = tensor_checksum(checksums);
    if (task.inputs.n > 0) start_writeback(task.out_fd, task.out_offset, task.inputs.n * width);
    for (const Outcome &outcome : outcomes) report.outcome.add(outcome);
    return report;
}

Moments measure(const Inputs &inputs, int threads) {
    ScratchPool pool(inputs.n_targets());
    const int width = inputs.n_targets();
    std::vector<Moments> segments(static_cast<std::size_t>(n_segments(inputs.n)));
    Moments all;
    all.nonfinite = for_each_tile(
        inputs, pool, threads,
        [&](std::int64_t segment, std::int64_t, int n, Scratch &scratch) {
            Moments &sums = segments[static_cast<std::size_t>(segment)];
            sums.energy.resize(width, 0.0);
            sums.dot.resize(width, 0.0);
            const int padded = pad(n);
            zero_nonfinite(scratch.base(), padded);  // its deltas are zero already
            sums.base_energy += energy(scratch.base(), padded);
            for (int j = 0; j < width; ++j) {
                sums.energy[j] += energy(scratch.delta(j), padded);
                sums.dot[j] += dot(scratch.base(), scratch.delta(j), padded);
            }
        });
    all.energy.assign(width, 0.0);
    all.dot.assign(width, 0.0);
    for (const Moments &sums : segments) {
        all.base_energy += sums.base_energy;
        for (int j = 0; j < width; ++j) {
            all.energy[j] += sums.energy[j];
            all.dot[j] += sums.dot[j];
        }
    }
    return all;
}

}  // namespace fusechat::merge
