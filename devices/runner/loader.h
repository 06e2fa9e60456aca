// How a program comes into memory, and what of it stays there.
#pragma once

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method_meta.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace mobilellm {

// The file in one read-only mapping. A freed range gives its pages back but stays readable, which
// the official MmapDataLoader's does not: with a weights cache, XNNPACK 1.5.1 goes on reading the
// constants of its additions and multiplications after it has freed them (it knows only of those
// that it packs).
class MappedFile final : public executorch::runtime::DataLoader {
 public:
  using Buffer = executorch::runtime::FreeableBuffer;
  using Error = executorch::runtime::Error;

  // Null where the file cannot be opened and mapped.
  static std::unique_ptr<MappedFile> open(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return nullptr;
    struct stat about;
    void* pages = MAP_FAILED;
    if (fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0) {
      pages = mmap(nullptr, about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    }
    close(file);
    if (pages == MAP_FAILED) return nullptr;
    return std::unique_ptr<MappedFile>(
        new MappedFile(static_cast<uint8_t*>(pages), about.st_size));
  }
  MappedFile(const MappedFile&) = delete;
  ~MappedFile() override { munmap(pages_, size_); }

  executorch::runtime::Result<Buffer> load(size_t offset, size_t size,
                                           const SegmentInfo& segment) const override {
    if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
    if (segment.segment_type == SegmentInfo::Type::Constant) {
      const std::lock_guard<std::mutex> lock(mutex_);
      constants_.emplace_back(offset, size);
    }
    return Buffer(pages_ + offset, size, give_back, nullptr);
  }

  executorch::runtime::Result<size_t> size() const override { return size_; }

  // Gives back the rows of lookup tables that were read. The next read maps them again.
  void release_constants() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [offset, size] : constants_) give_back(nullptr, pages_ + offset, size);
  }

 private:
  MappedFile(uint8_t* pages, size_t size) : pages_(pages), size_(size) {}

  // Only whole pages inside the range: its neighbours may be in use.
  static void give_back(void*, void* data, size_t size) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
    if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
  }

  uint8_t* const pages_;
  const size_t size_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<size_t, size_t>> constants_;
};

// What the program's memory plan asks for. Module would fill it with zeros and so touch all of it;
// here a page costs nothing until a step writes to it, such as the cache's far end.
class PlannedMemory {
 public:
  // `allocator` is null where the system refuses the memory.
  explicit PlannedMemory(const executorch::runtime::MethodMeta& meta) {
    for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
      const size_t size = std::max<int64_t>(1, meta.memory_planned_buffer_size(i).get());
      void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) return;
      buffers_.emplace_back(static_cast<uint8_t*>(pages), size);
    }
    allocator_ = std::make_unique<executorch::runtime::HierarchicalAllocator>(
        executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(
            buffers_.data(), buffers_.size()));
  }
  PlannedMemory(const PlannedMemory&) = delete;
  ~PlannedMemory() {
    for (auto& buffer : buffers_) munmap(buffer.data(), buffer.size());
  }

  executorch::runtime::HierarchicalAllocator* allocator() { return allocator_.get(); }

 private:
  std::vector<executorch::runtime::Span<uint8_t>> buffers_;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> allocator_;
};

} // namespace mobilellm
