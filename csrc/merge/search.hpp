// One search for a threshold: the bracket it is in, and what a pass over the tensor learns about it.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "merge/inputs.hpp"
#include "merge/keys.hpp"
#include "merge/select.hpp"

namespace fusechat::merge {

// Keys are non-negative doubles, whose bits order as integers: a bracket is a range of bits.
struct Bracket {
    std::uint64_t low = 0;
    std::uint64_t high = std::bit_cast<std::uint64_t>(std::numeric_limits<double>::infinity());

    bool single() const { return high - low == 1; }
    double low_key() const { return std::bit_cast<double>(low); }
    double high_key() const { return std::bit_cast<double>(high); }
};

class Search {
  public:
    // `own`: the base and the targets whose deltas are ordered, all of them by variance, one by magnitude.
    // `list_bytes`: what may be kept of a bracket. `carry`, if any, takes the candidates of every pass.
    Search(Inputs own, Key key, const Quota &quota, std::int64_t list_bytes, Carry *carry);

    const Inputs &own() const { return own_; }

    // Appends the keys of an opened tile. The search's first target is the scratch's target `slot`.
    void append_keys(Scratch &scratch, int slot, int n, std::vector<double> &keys) const;

    // Sets the bracket to a range of keys that probably holds the threshold and little else; reorders the sample.
    void bracket_from(std::vector<double> &sample);

    // Forgets the last pass. Then tally() may be called for tiles, in order within a segment, from several threads.
    void begin_pass();
    void tally(std::int64_t segment, std::int64_t begin, int n, Scratch &scratch, int slot);

    // Whether what an earlier pass carried is all that this one needs: then it is tallied, segment by segment, instead.
    bool held() const { return held_; }
    void tally_held(std::int64_t segment, Scratch &scratch);

    // Ends a pass: returns true when the selection is found, else the bracket is another and needs another pass.
    bool end_pass(ScratchPool &pool);

    Selection take() { return std::move(found_); }

  private:
    struct Kept {
        std::int64_t index;
        double key;
    };

    // What one pass learns about a segment.
    struct Segment {
        std::int64_t n_above = 0, n_inside = 0, n_nonzero = 0;
        std::vector<double> above, inside;  // by variance, per target: sums of delta²
        std::vector<Kept> kept;
        std::vector<float> payload;  // by variance: the deltas of what was kept, row by row
    };

    // How many keys fall into a bin, and between which two they lie: updates of 16-bit models take few distinct values.
    struct Bin {
        std::uint64_t count = 0, lowest = UINT64_MAX, highest = 0;
    };

    void tally_variances(Segment &into, std::int64_t begin, int n, Scratch &scratch);
    template <class T>
    void tally_keys(Segment &into, std::int64_t begin, int n, const std::int32_t *places, const T *keys, T low, T high,
                    const KeyCounts &counts, const float *deltas);
    void tally_candidates(Segment &into, std::int64_t begin, int found, const std::int32_t *at, const float *deltas);
    Segment &opened(std::int64_t segment);
    void open_histogram();
    void add_to_histogram(double key);
    Bracket narrowed(std::int64_t k) const;
    void start(std::int64_t k);
    void find_in_kept();
    void find_in_ties(ScratchPool &pool);
    void cut_segment(std::int64_t segment, std::int64_t needed, ScratchPool &pool);

    Inputs own_;
    Key key_;
    Quota quota_;
    int width_;  // the targets whose energies are summed
    std::int64_t limit_;
    Carry *carry_;
    bool held_ = false;
    std::uint64_t carried_from_ = std::bit_cast<std::uint64_t>(std::numeric_limits<double>::infinity());
    Bracket bracket_;
    Selection found_;

    std::int64_t n_above_ = 0, n_nonzero_ = 0;
    std::atomic<std::int64_t> n_inside_{0};
    std::vector<Segment> segments_;
    std::mutex histogram_lock_;
    std::vector<Bin> histogram_;  // of the keys inside that were not kept
};

}  // namespace fusechat::merge
