// The three floating-point formats of checkpoints, to and from fp32.
#pragma once

#include <cstdint>

namespace fusechat::merge {

enum class Dtype : std::uint8_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int item_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Widens n items at `raw` to fp32; exact.
void widen(const void *raw, Dtype dtype, float *out, int n);

// Rounds n values to nearest even into `raw`; returns how many were finite in `base` and not in the result.
int narrow(const float *values, const float *base, Dtype dtype, void *raw, int n);

}  // namespace fusechat::merge
