// Function multiversioning: a function marked FUSECHAT_CLONES is compiled for three x86-64 levels and chosen at load time.
// It needs IFUNC (glibc) and a compiler that clones by architecture level; elsewhere, and under sanitizers, which run
// before IFUNCs may, the mark means nothing. Integer code gives the same on every level, float sums to their last bits.
#pragma once

#include <cstdlib>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    ((defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12) || (defined(__clang__) && __clang_major__ >= 17))
#define FUSECHAT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FUSECHAT_CLONES
#endif
#define FUSECHAT_INLINE inline __attribute__((always_inline))
