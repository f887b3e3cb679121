// Levenshtein distances over code points, sixteen patterns at a time.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace fusechat::align {

using Text = std::vector<std::uint32_t>;

// Numbers code points 0.. in order of first sight, so that tables indexed by them stay small.
class Alphabet {
  public:
    std::uint32_t number(std::uint32_t code_point);
    void number_all(Text &text);
    std::size_t size() const { return used_; }

  private:
    std::uint32_t &slot(std::uint32_t code_point);

    std::vector<std::uint32_t> low_ = std::vector<std::uint32_t>(1 << 12, 0);  // number + 1
    std::vector<std::pair<std::uint32_t, std::uint32_t>> high_;  // open addressing: code point + 1, number + 1
    std::size_t n_high_ = 0;
    std::uint32_t used_ = 0;
};

// out[i * stride + j] = distance of pattern i and text j, all of numbers below alphabet_size. A stride of
// whole_lanes(texts.size()); what a row has beyond the texts may be overwritten. With bytes for the
// distances no pattern and no text may be longer than 255.
template <class Cost>
void distance_table(const std::vector<const Text *> &patterns, const std::vector<const Text *> &texts,
                    std::size_t alphabet_size, std::size_t stride, Cost *out);

// For every pattern the nearest text, the first of them in the order given, and its distance. Texts whose length alone
// rules them out are not looked at. −1 where there are no texts.
void nearest(const std::vector<Text> &patterns, const std::vector<Text> &texts, std::size_t alphabet_size,
             std::int64_t *index, std::int32_t *distance, int threads);

// Myers' algorithm on one pair, with as many machine words as the shorter text needs.
std::uint32_t edit_distance(std::span<const std::uint32_t> a, std::span<const std::uint32_t> b);

}  // namespace fusechat::align
