// Float lanes, their conversions from and to bf16 and fp16, and exp, for vectors of any width. Results are to tolerance: sums and
// fused multiply-adds differ between instruction sets in the last bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "clones.hpp"

namespace fusechat::loss {

template <int kLanes>
struct Vectors {
    // typedef, for GCC drops the attribute of an alias whose width depends on a parameter.
    typedef float Floats __attribute__((vector_size(4 * kLanes)));
    typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
    typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));
};

constexpr int kMostLanes = 16;

// The vectors of as many lanes as F has.
template <class F>
using Like = Vectors<sizeof(F) / sizeof(float)>;

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class Vector, class T>
FUSECHAT_INLINE void load(Vector &v, const T *from) {
    std::memcpy(&v, from, sizeof v);
}

template <class Vector, class T>
FUSECHAT_INLINE void store(T *to, const Vector &v) {
    std::memcpy(to, &v, sizeof v);
}

// The conversions are written once for a lane and for vectors: F is float or Floats, W the words of the same width.

template <class F, class W>
FUSECHAT_INLINE void from_float16(F &v, const W &half) {
    const W magnitude = (half & 0x7FFFU) << 13;
    // Scaling by 2^112 moves the exponent's bias, subnormals included; infinities and NaN keep a full exponent.
    const W finite = __builtin_bit_cast(W, __builtin_bit_cast(F, magnitude) * 0x1p112F);
    const W bits = (half & 0x7C00U) == 0x7C00U ? (magnitude | 0x7F800000U) : finite;
    v = __builtin_bit_cast(F, bits | (half & 0x8000U) << 16);
}

// Rounds to nearest, ties to even. A NaN must be canonical: rounding may carry others' payload over the exponent.
template <class F, class W>
FUSECHAT_INLINE void to_bfloat16(W &half, const F &v) {
    const W bits = __builtin_bit_cast(W, v);
    half = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
}

template <class F, class W>
FUSECHAT_INLINE void to_float16(W &half, const F &v) {
    const W bits = __builtin_bit_cast(W, v);
    const W magnitude = bits & 0x7FFFFFFFU, zero = bits & 0U;
    const W normal = (magnitude + 0xFFFU + (magnitude >> 13 & 1U) - 0x38000000U) >> 13;
    // Adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const W subnormal = __builtin_bit_cast(W, __builtin_bit_cast(F, magnitude) + 0.5F) - 0x3F000000U;
    half = magnitude < 0x38800000U ? subnormal : normal;
    half = magnitude >= 0x477FF000U ? zero + 0x7C00U : half;  // 65,520 and more
    half = magnitude > 0x7F800000U ? zero + 0x7E00U : half;
    half |= bits >> 16 & 0x8000U;
}

template <class F>
FUSECHAT_INLINE void widen(F &v, const float *from) {
    load(v, from);
}

// By a loop, for GCC 12 converts such vectors half by half.
template <class W>
FUSECHAT_INLINE void load_halves(W &words, const std::uint16_t *from) {
    constexpr int kLanes = sizeof(W) / sizeof(std::uint32_t);
    std::uint32_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = from[lane];
    load(words, lanes);
}

template <class F>
FUSECHAT_INLINE void widen(F &v, const BFloat16 *from) {
    typename Like<F>::Words words;
    load_halves(words, &from->bits);
    v = __builtin_bit_cast(F, words << 16);
}

template <class F>
FUSECHAT_INLINE void widen(F &v, const Float16 *from) {
    typename Like<F>::Words words;
    load_halves(words, &from->bits);
    from_float16(v, words);
}

template <class F>
FUSECHAT_INLINE void narrow(float *to, const F &v) {
    store(to, v);
}

template <class F>
FUSECHAT_INLINE void narrow(BFloat16 *to, const F &v) {
    typename Like<F>::Words w;
    to_bfloat16(w, v);
    store(to, __builtin_convertvector(w, typename Like<F>::Halves));
}

template <class F>
FUSECHAT_INLINE void narrow(Float16 *to, const F &v) {
    typename Like<F>::Words w;
    to_float16(w, v);
    store(to, __builtin_convertvector(w, typename Like<F>::Halves));
}

inline float canonical(float value) { return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value; }

inline float widen_one(float value) { return value; }
inline float widen_one(BFloat16 value) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(value.bits) << 16);
}
inline float widen_one(Float16 value) {
    float v;
    from_float16(v, static_cast<std::uint32_t>(value.bits));
    return v;
}

inline void narrow_one(float &to, float value) { to = value; }
inline void narrow_one(BFloat16 &to, float value) {
    std::uint32_t w;
    to_bfloat16(w, canonical(value));
    to.bits = static_cast<std::uint16_t>(w);
}
inline void narrow_one(Float16 &to, float value) {
    std::uint32_t w;
    to_float16(w, value);
    to.bits = static_cast<std::uint16_t>(w);
}

// exp(x · scale) as 2^n and 2^r − 1, with x · scale · log2 e = n + r and |r| <= ½: the polynomial errs by 1.1e-7. |x · scale| up
// to 87.
template <class F>
FUSECHAT_INLINE void exp_parts(const F &x, float scale, F &power, F &rest) {
    constexpr float kRound = 12582912.0F + 127.0F;  // 1.5 · 2^23: n and the exponent's bias end in the low bits of the sum
    const float per_two = scale * 1.44269504F;
    const F shifted = x * per_two + kRound;
    const F r = x * per_two - (shifted - kRound);
    power = __builtin_bit_cast(F, __builtin_bit_cast(typename Like<F>::Words, shifted) << 23);
    F poly = r * 1.32648265e-3F + 9.67151133e-3F;
    poly = poly * r + 5.55073342e-2F;
    poly = poly * r + 2.40222421e-1F;
    poly = poly * r + 6.93146978e-1F;
    rest = poly * r;
}

// exp(x · scale) for x · scale <= kSlack. Below e^−69 = 1e-30 it is 0: gradients made of such numbers are subnormal, at which a
// CPU's matrix product slows down twentyfold. NaN stays NaN.
template <class F>
FUSECHAT_INLINE void exp_bounded(const F &x, float scale, F &result) {
    F power, rest;
    exp_parts(x, scale, power, rest);
    result = x < -69.0F / scale ? F{} : power + power * rest;
}

// By halves, not lane after lane: the next block waits for it.
template <class F>
FUSECHAT_INLINE float max_lanes(const F &v) {
    constexpr int kLanes = sizeof(F) / sizeof(float);
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] = lanes[lane] > lanes[lane + half] ? lanes[lane] : lanes[lane + half];
        }
    }
    return lanes[0];
}

template <class F>
FUSECHAT_INLINE double add_lanes(const F &v) {
    constexpr int kLanes = sizeof(F) / sizeof(float);
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

// cap · tanh(z / cap) and its derivative, from w = exp(2|z| / cap) − 1 so that no digit cancels: tanh = w / (w + 2).
template <class F>
FUSECHAT_INLINE void softcap_lanes(F &z, F &slope, float cap) {
    F x = z < 0.0F ? -z : z;
    x *= 2.0F / cap;
    x = x > 80.0F ? F{} + 80.0F : x;
    F power, rest;
    exp_parts(x, 1.0F, power, rest);
    const F w = (power - 1.0F) + power * rest;
    const F capped = cap * (w / (w + 2.0F));
    slope = 4.0F * ((w + 1.0F) / ((w + 2.0F) * (w + 2.0F)));
    z = z < 0.0F ? -capped : capped;
}

}  // namespace fusechat::loss
