#include "merge/checksum.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "merge/files.hpp"
#include "merge/inputs.hpp"

namespace fusechat::merge {
namespace {

static_assert(std::endian::native == std::endian::little, "checkpoints are little-endian, and so is what reads them");

constexpr std::uint64_t kPrimes[] = {0x9e3779b185ebca87u, 0xc2b2ae3d27d4eb4fu, 0x165667b19e3779f9u, 0x85ebca77c2b2ae63u,
                                     0x27d4eb2f165667c5u};

template <class T>
std::uint64_t word(const unsigned char *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

std::uint64_t mixed(std::uint64_t sum, std::uint64_t input) {
    return std::rotl(sum + input * kPrimes[1], 31) * kPrimes[0];
}

}  // namespace

std::uint64_t xxh64(const void *data, std::size_t size_bytes) {
    const auto *at = static_cast<const unsigned char *>(data);
    const unsigned char *const end = at + size_bytes;
    std::uint64_t hash = kPrimes[4];
    if (size_bytes >= 32) {
        std::uint64_t sums[4] = {kPrimes[0] + kPrimes[1], kPrimes[1], 0, 0 - kPrimes[0]};
        for (; end - at >= 32; at += 32) {
            for (int i = 0; i < 4; ++i) sums[i] = mixed(sums[i], word<std::uint64_t>(at + 8 * i));
        }
        hash = std::rotl(sums[0], 1) + std::rotl(sums[1], 7) + std::rotl(sums[2], 12) + std::rotl(sums[3], 18);
        for (const std::uint64_t sum : sums) hash = (hash ^ mixed(0, sum)) * kPrimes[0] + kPrimes[3];
    }
    hash += size_bytes;
    for (; end - at >= 8; at += 8) {
        hash = std::rotl(hash ^ mixed(0, word<std::uint64_t>(at)), 27) * kPrimes[0] + kPrimes[3];
    }
    for (; end - at >= 4; at += 4) {
        hash = std::rotl(hash ^ word<std::uint32_t>(at) * kPrimes[0], 23) * kPrimes[1] + kPrimes[2];
    }
    for (; at < end; ++at) hash = std::rotl(hash ^ *at * kPrimes[4], 11) * kPrimes[0];
    hash = (hash ^ hash >> 33) * kPrimes[1];
    hash = (hash ^ hash >> 29) * kPrimes[2];
    return hash ^ hash >> 32;
}

std::uint64_t tensor_checksum(const std::vector<std::uint64_t> &chunks) {
    return xxh64(chunks.data(), chunks.size() * sizeof(std::uint64_t));
}

std::uint64_t tensor_checksum(int fd, std::int64_t offset, std::int64_t n, int item_bytes) {
    std::vector<unsigned char> buffer(static_cast<std::size_t>(kChunk) * item_bytes);
    std::vector<std::uint64_t> chunks;
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
        const std::int64_t size_bytes = std::min<std::int64_t>(kChunk, n - begin) * item_bytes;
        read_exactly(fd, buffer.data(), size_bytes, offset + begin * item_bytes);
        chunks.push_back(xxh64(buffer.data(), static_cast<std::size_t>(size_bytes)));
    }
    return tensor_checksum(chunks);
}

}  // namespace fusechat::merge
