// Several machine codes for one function, chosen when the library loads. Integer code only: float sums would differ.
#pragma once

#include <cstdlib>  // for __GLIBC__: IFUNC needs it

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FUSECHAT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FUSECHAT_CLONES
#endif
