#include "merge/merge_tensor.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

void write_exactly(int fd, const unsigned char *from, std::int64_t size_bytes, std::int64_t offset) {
    while (size_bytes > 0) {
        const ssize_t put = pwrite(fd, from, static_cast<std::size_t>(size_bytes), offset);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) throw std::runtime_error(std::string("cannot write the output: ") + std::strerror(errno));
        from += put;
        offset += put;
        size_bytes -= put;
    }
}

bool any(const std::vector<NonFinite> &bad) {
    for (const NonFinite &source : bad) {
        if (source.count > 0) return true;
    }
    return false;
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

std::vector<Selection> choose(const Task &task, ScratchPool &pool, int threads, std::vector<NonFinite> &bad) {
    if (task.select) {
        const Key key = task.rule.mask == Mask::shared ? Key::variance : Key::magnitude;
        return select(task.inputs, pool, key, task.quotas, threads, bad);
    }
    if (task.energy_weights.use) return {select_all(task.inputs, pool, threads, bad)};
    return {};
}

}  // namespace

Report merge_tensor(Task task, int threads) {
    ScratchPool pool(task.inputs.n_targets());
    Report report;
    report.selections = choose(task, pool, threads, report.nonfinite);
    if (any(report.nonfinite) && !task.allow_nonfinite) return report;
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
    const bool whole = task.inputs.n < kMeasuredEvery * kTile;
    report.nonfinite = for_each_tile(
        task.inputs, pool, threads,
        [&](std::int64_t segment, std::int64_t begin, int n, Scratch &scratch) {
            unsigned char *out = scratch.out() + begin % kChunk * width;
            const bool measured = whole || begin / kTile % kMeasuredEvery == 0;
            combine_tile(task.rule, report.selections, begin, n, scratch, measured, out, outcomes[segment]);
        },
        [&](std::int64_t begin, int n, Scratch &scratch) {
            write_exactly(task.out_fd, scratch.out(), static_cast<std::int64_t>(n) * width,
                          task.out_offset + begin * width);
        });
    for (const Outcome &outcome : outcomes) report.outcome.add(outcome);
    report.written = task.allow_nonfinite || !any(report.nonfinite);
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
            sums.base_energy += energy(scratch.base(), padded);
            for (int j = 0; j < width; ++j) {
                sums.energy[j] += energy(scratch.delta(j), padded);
                sums.dot[j] += dot(scratch.base(), scratch.delta(j), padded);
            }
        },
        [](std::int64_t, int, Scratch &) {});
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
