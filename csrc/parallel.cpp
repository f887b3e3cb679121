#include "parallel.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fusechat {

#if defined(__linux__)
namespace {

// How GCC calls a parallel region: libgomp's interface, which LLVM's and Intel's OpenMP have too.
using GompParallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Found through torch's library, so that it is the team that torch itself uses, whatever else is loaded; looked for until it
// is there, for torch may be imported later.
GompParallel torch_team() {
    static std::atomic<GompParallel> found{nullptr};
    if (GompParallel team = found) return team;
    void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return nullptr;
    found = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
    return found;
}

}  // namespace

bool run_on_torch_threads(void (*work)(void *), void *data, int threads) {
    const GompParallel team = forked ? nullptr : torch_team();
    if (team == nullptr) return false;
    team(work, data, static_cast<unsigned>(threads), 0);
    return true;
}
#else
bool run_on_torch_threads(void (*)(void *), void *, int) { return false; }
#endif

}  // namespace fusechat
