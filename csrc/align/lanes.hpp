// Vectors of sixteen lanes, in words as wide as their values need: the fewer bits, the fewer instructions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "clones.hpp"

namespace fusechat::align {

constexpr int LANES = 16;

// The least multiple of LANES that is no less than n.
constexpr std::size_t whole_lanes(std::size_t n) { return (n + LANES - 1) / LANES * LANES; }

template <class Word>
using Lanes __attribute__((vector_size(LANES * sizeof(Word)))) = Word;

template <class Vector>
FUSECHAT_INLINE void load(Vector &to, const void *from) {
    __builtin_memcpy(&to, from, sizeof to);
}

template <class Vector>
FUSECHAT_INLINE void store(void *to, const Vector &from) {
    __builtin_memcpy(to, &from, sizeof from);
}

// Sixteen rows of sixteen bytes, transposed: afterwards vector c holds byte c of every row.
FUSECHAT_INLINE void transpose(Lanes<std::uint8_t> (&v)[LANES]) {
    constexpr Lanes<std::uint8_t> low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr Lanes<std::uint8_t> high{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int step = 0; step < 4; ++step) {
        Lanes<std::uint8_t> next[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            next[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], low);
            next[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], high);
        }
        for (int i = 0; i < LANES; ++i) v[i] = next[i];
    }
}

}  // namespace fusechat::align
