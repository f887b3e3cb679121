// The loop that only sums a row of logits, for the choice of the k largest.
#include <algorithm>
#include <cmath>

#include "block_loops.hpp"
#include "dispatch.hpp"

namespace fusechat::loss {
namespace {

struct LogsumexpRow {
    template <int kLanes, class T>
    FUSECHAT_INLINE static double run(const T *logits, std::int64_t n, float softcap, float *maxima) {
        static_assert(kBlock % kGroup == 0, "a group lies in one block");
        alignas(64) float z[kBlock];
        float shift = kMinusInfinity;
        double sum = 0;
        for (std::int64_t begin = 0; begin < n; begin += kBlock) {
            const std::int64_t count = std::min(kBlock, n - begin);
            float top = kMinusInfinity;
            for (std::int64_t i = 0; i < count; i += kGroup) {
                const std::int64_t members = std::min(kGroup, count - i);
                float &top_of_group = maxima[(begin + i) / kGroup];
                top_of_group = read_block<kLanes, true>(logits + begin + i, members, z + i);
                if (softcap != 0.0F) {
                    softcap_block<kLanes>(z + i, members, softcap, nullptr);
                    top_of_group = max_block<kLanes>(z + i, members);
                }
                top = std::max(top, top_of_group);
            }
            if (shift == kMinusInfinity ? top > shift : top > shift + kSlack) {
                if (shift != kMinusInfinity) sum *= std::exp(static_cast<double>(shift) - top);
                shift = top;
            }
            typename Vectors<kLanes>::Floats total = {}, v;
            const float finite_shift = shift == kMinusInfinity ? 0.0F : shift;
            std::fill(z + count, z + padded(count), kMinusInfinity);
            for (std::int64_t i = 0; i < count; i += kLanes) {
                load(v, z + i);
                exp_lanes<false>(v, finite_shift, 1.0F, nullptr, total);
                __builtin_prefetch(logits + begin + i + kBlock);
            }
            sum += add_lanes(total);
        }
        return shift + std::log(sum);
    }
};

}  // namespace

template <class T>
double logsumexp_row(const T *logits, std::int64_t n, float softcap, float *maxima) {
    return run_widest<LogsumexpRow>(logits, n, softcap, maxima);
}
template double logsumexp_row(const float *, std::int64_t, float, float *);
template double logsumexp_row(const BFloat16 *, std::int64_t, float, float *);
template double logsumexp_row(const Float16 *, std::int64_t, float, float *);

}  // namespace fusechat::loss
