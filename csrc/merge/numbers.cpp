#include "merge/numbers.hpp"

#include <bit>
#include <cstring>

#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

FUSECHAT_INLINE std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
FUSECHAT_INLINE float float_of(std::uint32_t x) { return std::bit_cast<float>(x); }

FUSECHAT_CLONES void widen_bf16(const std::uint16_t *__restrict raw, float *__restrict out, int n) {
    for (int i = 0; i < n; ++i) out[i] = float_of(static_cast<std::uint32_t>(raw[i]) << 16);
}

FUSECHAT_CLONES void widen_f16(const std::uint16_t *__restrict raw, float *__restrict out, int n) {
    for (int i = 0; i < n; ++i) {
        const std::uint32_t half = raw[i];
        const std::uint32_t magnitude = (half & 0x7fffu) << 13;
        // Multiplying by 2^112 rebiases the exponent and normalises subnormals, exactly.
        const std::uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
        const std::uint32_t special = magnitude | 0x7f800000u;
        out[i] = float_of((magnitude >= (0x7c00u << 13) ? special : scaled) | (half & 0x8000u) << 16);
    }
}

FUSECHAT_CLONES void narrow_bf16(const float *__restrict values, std::uint16_t *__restrict raw, int n) {
    for (int i = 0; i < n; ++i) {
        const std::uint32_t bits = bits_of(values[i]);
        const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        const std::uint32_t quiet = bits >> 16 | 0x40u;
        raw[i] = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
    }
}

FUSECHAT_CLONES void narrow_f16(const float *__restrict values, std::uint16_t *__restrict raw, int n) {
    for (int i = 0; i < n; ++i) {
        const std::uint32_t bits = bits_of(values[i]);
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        const std::uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
        // Adding 0.5 aligns a subnormal's last place with the last bit of the sum, which rounds to nearest even.
        const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
        const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
        raw[i] = static_cast<std::uint16_t>((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
    }
}

FUSECHAT_CLONES int count_overflows(const float *__restrict base, const std::uint16_t *__restrict raw,
                                    std::uint32_t exponent, int n) {
    int count = 0;
    for (int i = 0; i < n; ++i) {
        const int lost = (raw[i] & exponent) == exponent;
        const int was_finite = (bits_of(base[i]) & 0x7f800000u) != 0x7f800000u;
        count += lost & was_finite;
    }
    return count;
}

FUSECHAT_CLONES int count_overflows(const float *__restrict base, const float *__restrict values, int n) {
    int count = 0;
    for (int i = 0; i < n; ++i) {
        const int lost = (bits_of(values[i]) & 0x7f800000u) == 0x7f800000u;
        const int was_finite = (bits_of(base[i]) & 0x7f800000u) != 0x7f800000u;
        count += lost & was_finite;
    }
    return count;
}

}  // namespace

void widen(const void *raw, Dtype dtype, float *out, int n) {
    switch (dtype) {
        case Dtype::f32: std::memcpy(out, raw, 4 * static_cast<std::size_t>(n)); break;
        case Dtype::f16: widen_f16(static_cast<const std::uint16_t *>(raw), out, n); break;
        case Dtype::bf16: widen_bf16(static_cast<const std::uint16_t *>(raw), out, n); break;
    }
}

int narrow(const float *values, const float *base, Dtype dtype, void *raw, int n) {
    auto *halves = static_cast<std::uint16_t *>(raw);
    switch (dtype) {
        case Dtype::f16: narrow_f16(values, halves, n); return count_overflows(base, halves, 0x7c00u, n);
        case Dtype::bf16: narrow_bf16(values, halves, n); return count_overflows(base, halves, 0x7f80u, n);
        case Dtype::f32: break;
    }
    std::memcpy(raw, values, 4 * static_cast<std::size_t>(n));
    return count_overflows(base, values, n);
}

}  // namespace fusechat::merge
