#include "merge/files.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fusechat::merge {

void read_exactly(int fd, void *to, std::int64_t size_bytes, std::int64_t offset) {
    auto *at = static_cast<unsigned char *>(to);
    while (size_bytes > 0) {
        const ssize_t got = pread(fd, at, static_cast<std::size_t>(size_bytes), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw std::runtime_error(std::string("cannot read: ") + std::strerror(errno));
        if (got == 0) throw std::runtime_error("a file became shorter while it was read");
        at += got;
        offset += got;
        size_bytes -= got;
    }
}

void write_exactly(int fd, const void *from, std::int64_t size_bytes, std::int64_t offset) {
    const auto *at = static_cast<const unsigned char *>(from);
    while (size_bytes > 0) {
        const ssize_t put = pwrite(fd, at, static_cast<std::size_t>(size_bytes), offset);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) throw std::runtime_error(std::string("cannot write the output: ") + std::strerror(errno));
        at += put;
        offset += put;
        size_bytes -= put;
    }
}

void start_writeback([[maybe_unused]] int fd, [[maybe_unused]] std::int64_t offset,
                     [[maybe_unused]] std::int64_t size_bytes) {
#ifdef SYNC_FILE_RANGE_WRITE
    // A hint: what it cannot do, for a pipe, say, or a file in memory, syncing does later or need not.
    static_cast<void>(sync_file_range(fd, offset, size_bytes, SYNC_FILE_RANGE_WRITE));
#endif
}

}  // namespace fusechat::merge
