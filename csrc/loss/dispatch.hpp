// Loops over vectors, compiled for the vector width of each x86-64 level and chosen by the CPU at hand. One width for all levels
// will not do: a comparison of vectors wider than the CPU's is taken apart lane by lane, which costs six times the loop.
#pragma once

#include "clones.hpp"

#if defined(__x86_64__) && ((defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12) || (defined(__clang__) && __clang_major__ >= 18))
#define FUSECHAT_WIDTHS
#define FUSECHAT_AVX2 __attribute__((target("arch=x86-64-v3")))
#define FUSECHAT_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define FUSECHAT_AVX2
#define FUSECHAT_AVX512
#endif

namespace fusechat::loss {

template <class Loop, class... Arguments>
FUSECHAT_AVX512 auto run_avx512(Arguments &...arguments) {
    return Loop::template run<16>(arguments...);
}

template <class Loop, class... Arguments>
FUSECHAT_AVX2 auto run_avx2(Arguments &...arguments) {
    return Loop::template run<8>(arguments...);
}

template <class Loop, class... Arguments>
auto run_baseline(Arguments &...arguments) {
    return Loop::template run<4>(arguments...);
}

// Calls Loop::run<lanes>(arguments…); Loop::run must be FUSECHAT_INLINE, so that it takes the caller's instruction set.
template <class Loop, class... Arguments>
auto run_widest(Arguments &...arguments) {
#if defined(FUSECHAT_WIDTHS)
    static const int lanes = __builtin_cpu_supports("x86-64-v4") ? 16 : __builtin_cpu_supports("x86-64-v3") ? 8 : 4;
    if (lanes == 16) return run_avx512<Loop>(arguments...);
    if (lanes == 8) return run_avx2<Loop>(arguments...);
#endif
    return run_baseline<Loop>(arguments...);
}

}  // namespace fusechat::loss
