// Reading and writing at a place, whole or not at all.
#pragma once

#include <cstdint>

namespace fusechat::merge {

// Both throw std::runtime_error with the system's reason; reading also when the file ends before `size_bytes`.
void read_exactly(int fd, void *to, std::int64_t size_bytes, std::int64_t offset);
void write_exactly(int fd, const void *from, std::int64_t size_bytes, std::int64_t offset);

}  // namespace fusechat::merge
