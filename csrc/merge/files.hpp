// Reading and writing at a place, whole or not at all.
#pragma once

#include <cstdint>

namespace fusechat::merge {

// Both throw std::runtime_error with the system's reason; reading also when the file ends before `size_bytes`.
void read_exactly(int fd, void *to, std::int64_t size_bytes, std::int64_t offset);
void write_exactly(int fd, const void *from, std::int64_t size_bytes, std::int64_t offset);

// Asks the system to start writing a range to the disk, so that little is left to wait for when the file is synced.
void start_writeback(int fd, std::int64_t offset, std::int64_t size_bytes);

}  // namespace fusechat::merge
