// Fixed-width lanes. A sum over lanes is added in an order that depends on nothing but the data's place, so that every
// instruction set, thread count and block size gives the same bits (the build forbids contraction to FMA).
#pragma once

#include <cstdint>
#include <cstring>

#include "clones.hpp"

#pragma GCC diagnostic ignored "-Wpsabi"  // lanes cross no boundary that is not inlined

namespace fusechat::merge {

// As wide as AVX2's registers: GCC takes comparisons of wider vectors apart, lane by lane.
constexpr int kLanes = 4;
constexpr int kPadding = 2 * kLanes;  // of a tile: whole lanes of fp32, too

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Doubles = double __attribute__((vector_size(8 * kLanes)));
using Longs = std::int64_t __attribute__((vector_size(8 * kLanes)));

template <class Vector, class T>
FUSECHAT_INLINE void load(Vector &v, const T *from) {
    std::memcpy(&v, from, sizeof v);
}

template <class Vector, class T>
FUSECHAT_INLINE void store(T *to, const Vector &v) {
    std::memcpy(to, &v, sizeof v);
}

FUSECHAT_INLINE Doubles loaded(const double *from) {
    Doubles lanes;
    load(lanes, from);
    return lanes;
}

FUSECHAT_INLINE Doubles widened(const float *from) {
    Floats narrow;
    load(narrow, from);
    return __builtin_convertvector(narrow, Doubles);
}

// `yes` where the mask is set, `no` elsewhere, in bits: compilers take a ?: of vectors apart, lane by lane, in functions
// that are cloned for several instruction sets.
FUSECHAT_INLINE Doubles choose(const Longs &mask, const Doubles &yes, const Doubles &no) {
    return (Doubles)((mask & (Longs)yes) | (~mask & (Longs)no));
}

// `value` where the mask is set, zero elsewhere.
FUSECHAT_INLINE Doubles where(const Longs &mask, const Doubles &value) { return (Doubles)(mask & (Longs)value); }

// Rounds a count up to whole lanes.
FUSECHAT_INLINE int pad(int n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Adds the lanes of `v` from first to last.
FUSECHAT_INLINE double add_lanes(const Doubles &v) {
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

FUSECHAT_INLINE std::int64_t add_lanes(const Longs &v) {
    std::int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}

}  // namespace fusechat::merge
