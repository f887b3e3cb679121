#include "merge/carry.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "merge/files.hpp"
#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

// A tile's record: how many candidates, where each stands in the tile, then every target's values as the file has them.
std::size_t record_bytes(const Inputs &inputs, int found) {
    std::size_t item = sizeof(std::uint16_t);
    for (const Source &source : inputs.targets) item += static_cast<std::size_t>(item_bytes(source.dtype));
    return sizeof(std::uint16_t) + static_cast<std::size_t>(found) * item;
}

bool plain(const Source &source, std::int64_t n) {
    return source.fd >= 0 && source.n_valid == n && source.low_rank.rank == 0;
}

template <class T>
void copy_items(const unsigned char *from, const std::int32_t *at, int n, unsigned char *to) {
    for (int i = 0; i < n; ++i) std::memcpy(to + sizeof(T) * i, from + sizeof(T) * at[i], sizeof(T));
}

template <class T>
void scatter_items(const unsigned char *from, const std::int32_t *at, int n, unsigned char *to) {
    for (int i = 0; i < n; ++i) std::memcpy(to + sizeof(T) * at[i], from + sizeof(T) * i, sizeof(T));
}

void pick(const unsigned char *from, Dtype dtype, const std::int32_t *at, int n, unsigned char *to) {
    item_bytes(dtype) == 4 ? copy_items<std::uint32_t>(from, at, n, to) : copy_items<std::uint16_t>(from, at, n, to);
}

// Leaves the selected of `found` candidates, in some order, padded with zeros; returns how many there are.
int keep_selected(const Selection &selection, std::int64_t begin, int found, std::int32_t *at, int n_targets,
                  Scratch &scratch) {
    alignas(64) double keys[kTile];
    variance_keys(scratch.delta(0), n_targets, found, keys);
    int n = found;
    // Nearly all candidates are selected: the last of them takes the place of one that is not.
    for (int i = found - 1; i >= 0; --i) {
        const bool tied = keys[i] == selection.threshold && begin + at[i] < selection.tie_stop;
        if (keys[i] > selection.threshold || tied) continue;
        --n;
        at[i] = at[n];
        scratch.base()[i] = scratch.base()[n];
        for (int j = 0; j < n_targets; ++j) scratch.delta(j)[i] = scratch.delta(j)[n];
    }
    std::fill(scratch.base() + n, scratch.base() + pad(n), 0.0f);
    for (int j = 0; j < n_targets; ++j) std::fill(scratch.delta(j) + n, scratch.delta(j) + pad(n), 0.0f);
    return n;
}

}  // namespace

Carry::Carry(const Inputs &inputs, const Output &output, double share) : inputs_(inputs), output_(output) {
    const double needed = share * static_cast<double>(record_bytes(inputs, kTile)) / kTile;
    used_ = plain(inputs.base, inputs.n) && inputs.base.dtype == output.dtype && needed < 0.9 * item_bytes(output.dtype);
    for (const Source &source : inputs.targets) used_ = used_ && plain(source, inputs.n);
    if (!used_) return;
    const auto n = static_cast<std::size_t>(n_segments(inputs.n));
    bytes_.assign(n, 0);
    energy_.assign(n * inputs.targets.size(), 0.0);
}

bool Carry::holds_all() const {
    return std::all_of(bytes_.begin(), bytes_.end(), [](std::int32_t bytes) { return bytes > 0; });
}

std::int64_t Carry::room(std::int64_t segment) const {
    return (std::min(inputs_.n, (segment + 1) * kSegment) - segment * kSegment) * item_bytes(output_.dtype);
}

void Carry::take(std::int64_t begin, int n, const std::int32_t *at, int found, bool measured, Scratch &scratch) {
    const std::int64_t segment = begin / kSegment;
    std::vector<unsigned char> &held = scratch.carried();
    double *energies = energy_.data() + static_cast<std::size_t>(segment) * inputs_.targets.size();
    if (begin == segment * kSegment) {
        held.clear();
        std::fill(energies, energies + inputs_.targets.size(), 0.0);
    }
    for (int j = 0; measured && j < inputs_.n_targets(); ++j) energies[j] += energy(scratch.delta(j), pad(n));
    const auto limit = static_cast<std::size_t>(room(segment));
    const std::size_t before = held.size(), grown = before + record_bytes(inputs_, found);
    if (before <= limit) held.resize(std::min(grown, limit + 1));  // more than fits means none
    if (grown <= limit) {
        unsigned char *to = held.data() + before;
        const auto count = static_cast<std::uint16_t>(found);
        std::memcpy(to, &count, sizeof count);
        to += sizeof count;
        for (int i = 0; i < found; ++i, to += sizeof(std::uint16_t)) {
            const auto place = static_cast<std::uint16_t>(at[i]);
            std::memcpy(to, &place, sizeof place);
        }
        for (int j = 0; j < inputs_.n_targets(); ++j) {
            const Dtype dtype = inputs_.targets[j].dtype;
            pick(scratch.raw(j + 1) + begin % kChunk * item_bytes(dtype), dtype, at, found, to);
            to += static_cast<std::size_t>(found) * item_bytes(dtype);
        }
    }
    if (begin + n != std::min(inputs_.n, (segment + 1) * kSegment)) return;
    const bool fits = held.size() <= limit;
    bytes_[static_cast<std::size_t>(segment)] = fits ? static_cast<std::int32_t>(held.size()) : 0;
    if (!fits) return;
    write_exactly(output_.fd, held.data(), static_cast<std::int64_t>(held.size()),
                  output_.offset + segment * kSegment * item_bytes(output_.dtype));
}

void Carry::fetch(std::int64_t segment, Scratch &scratch) const {
    std::vector<unsigned char> &held = scratch.carried();
    held.resize(static_cast<std::size_t>(bytes_[static_cast<std::size_t>(segment)]));
    read_exactly(output_.fd, held.data(), static_cast<std::int64_t>(held.size()),
                 output_.offset + segment * kSegment * item_bytes(output_.dtype));
}

void Carry::fetch_base(std::int64_t begin, int n, Scratch &scratch) const {
    const int width = item_bytes(output_.dtype);
    read_exactly(inputs_.base.fd, scratch.out(), static_cast<std::int64_t>(n) * width, inputs_.base.offset + begin * width);
}

int Carry::unpack(std::size_t &place, const unsigned char *base, std::int32_t *at, Scratch &scratch) const {
    const unsigned char *from = scratch.carried().data() + place;
    std::uint16_t found;
    std::memcpy(&found, from, sizeof found);
    place += record_bytes(inputs_, found);
    from += sizeof found;
    for (int i = 0; i < found; ++i, from += sizeof(std::uint16_t)) {
        std::uint16_t index;
        std::memcpy(&index, from, sizeof index);
        at[i] = index;
    }
    alignas(64) unsigned char items[kTile * 4];
    pick(base, output_.dtype, at, found, items);
    widen(items, output_.dtype, scratch.base(), found);
    for (int j = 0; j < inputs_.n_targets(); ++j) {
        const Dtype dtype = inputs_.targets[j].dtype;
        float *delta = scratch.delta(j);
        widen(from, dtype, delta, found);
        for (int i = 0; i < found; ++i) delta[i] -= scratch.base()[i];
        std::fill(delta + found, delta + pad(found), 0.0f);
        from += static_cast<std::size_t>(found) * item_bytes(dtype);
    }
    return found;
}

void Carry::merge_tile(std::int64_t begin, int found, std::int32_t *at, const Rule &rule, const Selection &selection,
                       Scratch &scratch, unsigned char *out, Outcome &outcome) const {
    const int n = keep_selected(selection, begin, found, at, inputs_.n_targets(), scratch);
    if (n == 0) return;
    alignas(64) unsigned char items[kTile * 4];
    combine_selected(rule, n, scratch, is_measured(inputs_.n, begin), items, outcome);
    if (item_bytes(output_.dtype) == 4) {
        scatter_items<std::uint32_t>(items, at, n, out);
    } else {
        scatter_items<std::uint16_t>(items, at, n, out);
    }
}

void Carry::add_energy(std::int64_t segment, Outcome &outcome) const {
    const std::size_t width = inputs_.targets.size();
    for (std::size_t j = 0; j < width; ++j) outcome.energy[j] += energy_[static_cast<std::size_t>(segment) * width + j];
}

}  // namespace fusechat::merge
