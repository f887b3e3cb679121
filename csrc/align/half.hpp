// IEEE half precision by bits, so that stored log-probabilities can be compared and copied without conversion.
#pragma once

#include <bit>
#include <cstdint>

namespace fusechat::align {

constexpr std::uint16_t HALF_SIGN = 0x8000;
constexpr std::uint16_t HALF_INFINITY = 0x7C00;
constexpr std::uint16_t HALF_MINUS_INFINITY = HALF_SIGN | HALF_INFINITY;

// Rounds to the nearest half, ties to even; overflow goes to infinity.
inline std::uint16_t half_from_float(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & HALF_SIGN);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U) return sign | HALF_INFINITY | 0x200;
    if (magnitude >= 0x477FF000U) return sign | HALF_INFINITY;  // 65,520 and more
    if (magnitude < 0x38800000U) {
        // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
        const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
        return sign | static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U);
    }
    const std::uint32_t odd = magnitude >> 13 & 1U;
    return sign | static_cast<std::uint16_t>((magnitude + 0xFFFU + odd - 0x38000000U) >> 13);
}

}  // namespace fusechat::align
