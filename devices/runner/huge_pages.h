// Puts what is in memory into pages of 2 MB where Linux has them.
//
// A decode step reads all packed weights once. In pages of 4 kB that is a walk through the page
// tables for every 64 cache lines, which costs a tenth to a quarter of the step (docs/benchmarks.md).
// XNNPACK allocates with malloc, so that the kernel would use large pages only where it always does.
#pragma once

#include <sys/mman.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

namespace mobilellm {

// Since Linux 6.1; older headers do not name it.
constexpr int kCollapse = 25;
constexpr uint64_t kHugePage = uint64_t{2} << 20;

// To be called after a load, before the first step: blocks without any page stay empty, such as
// those of the cache. Returns the bytes that are in large pages now; 0 where the kernel has none.
inline uint64_t collapse_pages() {
  std::ifstream maps("/proc/self/maps");
  uint64_t collapsed = 0;
  for (std::string line; std::getline(maps, line);) {
    uint64_t begin, end, offset, inode;
    char rights[5], device[16];
    const int read = std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %15s %" SCNu64,
                                 &begin, &end, rights, &offset, device, &inode);
    if (read != 6 || inode || std::string(rights) != "rw-p") continue;
    if (line.find("[stack") != std::string::npos) continue;
    for (uint64_t at = (begin + kHugePage - 1) / kHugePage * kHugePage; at + kHugePage <= end;
         at += kHugePage) {
      // It fails for an empty block and where the kernel finds no free large page: then all stays
      // as it is.
      if (madvise(reinterpret_cast<void*>(at), kHugePage, kCollapse) == 0) collapsed += kHugePage;
    }
  }
  return collapsed;
}

}  // namespace mobilellm
