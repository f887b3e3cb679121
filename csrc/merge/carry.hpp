// What selection has found need not be read and searched again. A segment's candidates, one in ten elements, say, wait in
// the place of the output that they will be merged into; with the base they are all that later passes read. A segment
// with more candidates than its place holds is read again as a whole, so that memory stays what it is.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "merge/combine.hpp"
#include "merge/inputs.hpp"
#include "merge/select.hpp"

namespace fusechat::merge {

// Where the merged tensor goes.
struct Output {
    int fd = -1;
    std::int64_t offset = 0;
    Dtype dtype = Dtype::f32;
};

class Carry {
  public:
    // Carries nothing where it would not pay: for inputs that are not plain files of the output's format, or when the
    // share of elements to be selected does not fit.
    Carry(const Inputs &inputs, const Output &output, double share);

    bool used() const { return used_; }
    bool holds(std::int64_t segment) const { return bytes_[static_cast<std::size_t>(segment)] > 0; }
    bool holds_all() const;

    // Takes the candidates `at` of an opened tile whose first item is `begin`; tiles come in order within a segment.
    void take(std::int64_t begin, int n, const std::int32_t *at, int found, bool measured, Scratch &scratch);

    // Calls tile(begin, found, at, out) for a segment's tiles: the candidates' base and deltas are packed in the scratch
    // then, and `out` holds all of the base's items; then after_chunk(begin, n) with a chunk of these in scratch.out().
    template <class Tile, class AfterChunk>
    void for_each_tile_of(std::int64_t segment, Scratch &scratch, Tile &&tile, AfterChunk &&after_chunk) const {
        fetch(segment, scratch);
        const int width = item_bytes(output_.dtype);
        const std::int64_t stop = std::min(inputs_.n, (segment + 1) * kSegment);
        std::size_t place = 0;
        std::array<std::int32_t, kTile> at;
        for (std::int64_t begin = segment * kSegment; begin < stop; begin += kChunk) {
            const int n = static_cast<int>(std::min<std::int64_t>(kChunk, stop - begin));
            fetch_base(begin, n, scratch);
            for (int done = 0; done < n; done += kTile) {
                unsigned char *out = scratch.out() + static_cast<std::size_t>(done) * width;
                const int found = unpack(place, out, at.data(), scratch);
                tile(begin + done, found, at.data(), out);
            }
            after_chunk(begin, n);
        }
    }

    // Merges what a segment holds into the base's values and has them written, chunk by chunk, by after_chunk(begin, n).
    template <class AfterChunk>
    void merge(std::int64_t segment, const Rule &rule, const Selection &selection, Scratch &scratch, Outcome &outcome,
               AfterChunk &&after_chunk) const {
        for_each_tile_of(
            segment, scratch,
            [&](std::int64_t begin, int found, std::int32_t *at, unsigned char *out) {
                merge_tile(begin, found, at, rule, selection, scratch, out, outcome);
            },
            after_chunk);
        add_energy(segment, outcome);
    }

  private:
    void fetch(std::int64_t segment, Scratch &scratch) const;
    void fetch_base(std::int64_t begin, int n, Scratch &scratch) const;
    int unpack(std::size_t &place, const unsigned char *base, std::int32_t *at, Scratch &scratch) const;
    void merge_tile(std::int64_t begin, int found, std::int32_t *at, const Rule &rule, const Selection &selection,
                    Scratch &scratch, unsigned char *out, Outcome &outcome) const;
    void add_energy(std::int64_t segment, Outcome &outcome) const;
    std::int64_t room(std::int64_t segment) const;

    Inputs inputs_;
    Output output_;
    bool used_;
    std::vector<std::int32_t> bytes_;  // of each segment; 0 where it is read again
    std::vector<double> energy_;       // per segment and target, Σ delta² over the measured tiles
};

}  // namespace fusechat::merge
