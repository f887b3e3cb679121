// What a tensor's bytes are recognised by: XXH64 (Yann Collet's xxHash, seed 0) over the XXH64 of every chunk, so that
// chunks are hashed in any order while they are at hand. It finds damage, not malice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusechat::merge {

std::uint64_t xxh64(const void *data, std::size_t size_bytes);

// The checksum of a tensor from its chunks' in order.
std::uint64_t tensor_checksum(const std::vector<std::uint64_t> &chunks);

// The checksum of a tensor in an open file: n items of the given size. Throws std::runtime_error when reading fails.
std::uint64_t tensor_checksum(int fd, std::int64_t offset, std::int64_t n, int item_bytes);

}  // namespace fusechat::merge
