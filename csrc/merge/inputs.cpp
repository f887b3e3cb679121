#include "merge/inputs.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "merge/files.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

FUSECHAT_CLONES void add_scaled(float *__restrict sum, const float *__restrict row, float factor, int n) {
    for (int i = 0; i < n; ++i) sum[i] += factor * row[i];
}

// delta += factor · update, rounded to fp32; returns whether any sum is not finite.
FUSECHAT_CLONES bool add_update(float *__restrict delta, const float *__restrict update, float factor, int n) {
    std::uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const float sum = delta[i] + factor * update[i];
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(sum) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
        delta[i] = sum;
    }
    return largest >= 0x7f800000u;
}

FUSECHAT_INLINE float widened_item(const float *values, int i) { return values[i]; }
FUSECHAT_INLINE float widened_item(const std::uint16_t *bf16, int i) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bf16[i]) << 16);
}

// delta = values − base, rounded to fp32; returns whether any difference is not finite.
template <class T>
FUSECHAT_INLINE bool subtract_items(const T *__restrict values, const float *__restrict base, int n,
                                    float *__restrict delta) {
    std::uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const float difference = widened_item(values, i) - base[i];
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(difference) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
        delta[i] = difference;
    }
    return largest >= 0x7f800000u;
}

FUSECHAT_CLONES bool subtract(const float *values, const float *base, int n, float *delta) {
    return subtract_items(values, base, n, delta);
}

FUSECHAT_CLONES bool subtract_bf16(const std::uint16_t *values, const float *base, int n, float *delta) {
    return subtract_items(values, base, n, delta);
}

FUSECHAT_CLONES bool any_nonfinite(const float *__restrict values, int n) {
    std::uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest >= 0x7f800000u;
}

bool is_finite(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// delta += scale · (B A)[begin, begin + n) in row-major order; returns whether any sum is not finite.
bool add_low_rank(const LowRank &low_rank, std::int64_t begin, float *delta, int n) {
    bool flawed = false;
    for (int done = 0; done < n;) {
        const std::int64_t row = (begin + done) / low_rank.columns, column = (begin + done) % low_rank.columns;
        const int run = static_cast<int>(std::min<std::int64_t>(n - done, low_rank.columns - column));
        const float *b = low_rank.b + row * low_rank.rank;
        float product[kTile] = {};
        for (int k = 0; k < low_rank.rank; ++k) {
            add_scaled(product, low_rank.a + k * low_rank.columns + column, b[k], run);
        }
        flawed |= add_update(delta + done, product, low_rank.scale, run);
        done += run;
    }
    return flawed;
}

}  // namespace

Scratch::Scratch(int n_targets)
    : base_(kTile),
      values_(kTile),
      delta_(static_cast<std::size_t>(n_targets) * kTile),
      packed_(delta_.size()),
      raw_(static_cast<std::size_t>(n_targets + 1) * kChunk * 4),
      out_(static_cast<std::size_t>(kChunk) * 4) {}

void fetch(const Inputs &inputs, std::int64_t begin, int n, Scratch &scratch) {
    auto fetch_one = [&](const Source &source, unsigned char *to) {
        const std::int64_t valid = std::clamp<std::int64_t>(source.n_valid - begin, 0, n);
        if (source.fd < 0 || valid == 0) return;
        const int size = item_bytes(source.dtype);
        read_exactly(source.fd, to, valid * size, source.offset + begin * size);
    };
    fetch_one(inputs.base, scratch.raw(0));
    for (int j = 0; j < inputs.n_targets(); ++j) fetch_one(inputs.targets[j], scratch.raw(j + 1));
}

void open_tile(const Inputs &inputs, std::int64_t begin, int at, int n, Scratch &scratch, std::vector<NonFinite> &bad) {
    const int padded = pad(n);
    float *base = scratch.base();
    auto place = [&](const Source &source, const unsigned char *raw) {
        return raw + static_cast<std::size_t>(at) * item_bytes(source.dtype);
    };
    auto widen_source = [&](const Source &source, const unsigned char *raw, float *to, int valid) {
        if (source.fd < 0) {
            std::fill(to, to + padded, 0.0f);
        } else {
            widen(place(source, raw), source.dtype, to, valid);
        }
    };
    auto n_there = [&](const Source &source) {
        return static_cast<int>(std::clamp<std::int64_t>(source.n_valid - begin - at, 0, n));
    };
    widen_source(inputs.base, scratch.raw(0), base, n_there(inputs.base));
    std::fill(base + n, base + padded, 0.0f);
    if (inputs.base.low_rank.rank > 0) add_low_rank(inputs.base.low_rank, begin + at, base, n_there(inputs.base));
    bool flawed = any_nonfinite(base, n);
    for (int j = 0; j < inputs.n_targets(); ++j) {
        const Source &source = inputs.targets[j];
        const int valid = n_there(source);
        float *delta = scratch.delta(j);
        if (source.dtype == Dtype::bf16 && source.fd >= 0) {
            const auto *raw = reinterpret_cast<const std::uint16_t *>(place(source, scratch.raw(j + 1)));
            flawed |= subtract_bf16(raw, base, valid, delta);
        } else {
            widen_source(source, scratch.raw(j + 1), scratch.values(), valid);
            flawed |= subtract(scratch.values(), base, valid, delta);
        }
        std::fill(delta + valid, delta + padded, 0.0f);
        if (source.low_rank.rank > 0) flawed |= add_low_rank(source.low_rank, begin + at, delta, valid);
    }
    if (!flawed) return;
    for (int i = 0; i < n; ++i) {
        bool keep_base = !is_finite(base[i]);
        for (int s = 0; s <= inputs.n_targets(); ++s) {
            // A target's difference to a base that is not finite says nothing about the target.
            if (s > 0 && !is_finite(base[i])) break;
            if (is_finite(s == 0 ? base[i] : scratch.delta(s - 1)[i])) continue;
            keep_base = true;
            bad[s].count += 1;
            if (bad[s].first < 0) bad[s].first = begin + at + i;
        }
        if (keep_base) {
            for (int j = 0; j < inputs.n_targets(); ++j) scratch.delta(j)[i] = 0.0f;
        }
    }
}

std::unique_ptr<Scratch> ScratchPool::take() {
    const std::lock_guard<std::mutex> hold(lock_);
    if (idle_.empty()) return std::make_unique<Scratch>(n_targets_);
    auto scratch = std::move(idle_.back());
    idle_.pop_back();
    return scratch;
}

void ScratchPool::give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> hold(lock_);
    idle_.push_back(std::move(scratch));
}

}  // namespace fusechat::merge
