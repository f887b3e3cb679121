// What selection has found need not be read and searched again. A segment's candidates, one in ten elements, say, wait in
// the place of the output that they will be merged into; then only the base is read once more. A segment with more
// candidates than its place holds is read again as a whole, so that memory stays what it is.
#pragma once

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

    // Takes the candidates `at` of an opened tile whose first item is `begin`; tiles come in order within a segment.
    void take(std::int64_t begin, int n, const std::int32_t *at, int found, bool measured, Scratch &scratch);

    // Merges what a segment holds into the base's values and has them written, chunk by chunk, by after(begin, n).
    template <class After>
    void merge(std::int64_t segment, const Rule &rule, const Selection &selection, Scratch &scratch, Outcome &outcome,
               After &&after) const {
        fetch(segment, scratch);
        const std::int64_t stop = std::min(inputs_.n, (segment + 1) * kSegment);
        std::size_t place = 0;
        for (std::int64_t begin = segment * kSegment; begin < stop; begin += kChunk) {
            const int n = static_cast<int>(std::min<std::int64_t>(kChunk, stop - begin));
            place = merge_chunk(begin, n, place, rule, selection, scratch, outcome);
            after(begin, n);
        }
        add_energy(segment, outcome);
    }

  private:
    void fetch(std::int64_t segment, Scratch &scratch) const;
    std::size_t merge_chunk(std::int64_t begin, int n, std::size_t place, const Rule &rule, const Selection &selection,
                            Scratch &scratch, Outcome &outcome) const;
    void add_energy(std::int64_t segment, Outcome &outcome) const;
    std::int64_t room(std::int64_t segment) const;

    Inputs inputs_;
    Output output_;
    bool used_;
    std::vector<std::int32_t> bytes_;  // of each segment; 0 where it is read again
    std::vector<double> energy_;       // per segment and target, Σ delta² over the measured tiles
};

}  // namespace fusechat::merge
