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

// Lookup tables are cut into pieces of so many bytes (at least a page), see `cut_constants`.
constexpr size_t kPiece = 16384;

// The file in one read-only mapping. A freed range gives its pages back but stays readable, which
// the official MmapDataLoader's does not: with a weights cache, XNNPACK 1.5.1 goes on reading the
// constants of its additions and multiplications after it has freed them (it knows only of those
// that it packs). The mapping lasts until the last range is freed, after the loader itself.
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
    auto mapping = std::make_shared<Mapping>();
    mapping->pages = static_cast<uint8_t*>(pages);
    mapping->size = about.st_size;
    return std::unique_ptr<MappedFile>(new MappedFile(std::move(mapping)));
  }

  executorch::runtime::Result<Buffer> load(size_t offset, size_t size,
                                           const SegmentInfo& segment) const override {
    if (offset > mapping_->size || size > mapping_->size - offset) return Error::InvalidArgument;
    if (segment.segment_type == SegmentInfo::Type::Constant) {
      const std::lock_guard<std::mutex> lock(mutex_);
      constants_.push_back(whole_pages(mapping_->pages + offset, size));
    }
    return Buffer(mapping_->pages + offset, size, free_range, new Shared(mapping_));
  }

  executorch::runtime::Result<size_t> size() const override { return mapping_->size; }

  // A row that is read maps what lies around it, 64 kB, or with large folios (Linux 6.16 and later)
  // any part of the table. No more than a piece is mapped if pieces differ in a flag: here in
  // whether they are part of a core dump. For after the load, which reads whole tables.
  void cut_constants() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, size] : constants_) {
      for (size_t at = 0; at < size; at += 2 * kPiece) {
        madvise(start + at, std::min(kPiece, size - at), MADV_DONTDUMP);
      }
    }
  }

  // Gives back the rows of lookup tables that were read. The next read maps them again.
  void release_constants() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, size] : constants_) madvise(start, size, MADV_DONTNEED);
  }

 private:
  struct Mapping {
    ~Mapping() { munmap(pages, size); }
    uint8_t* pages;
    size_t size;
  };
  using Shared = std::shared_ptr<const Mapping>;

  explicit MappedFile(Shared mapping) : mapping_(std::move(mapping)) {}

  // Those inside the range only: its neighbours may be in use.
  static std::pair<uint8_t*, size_t> whole_pages(void* data, size_t size) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
    return {reinterpret_cast<uint8_t*>(start), start < end ? end - start : 0};
  }

  static void free_range(void* shared, void* data, size_t size) {
    const auto [start, length] = whole_pages(data, size);
    if (length) madvise(start, length, MADV_DONTNEED);
    delete static_cast<Shared*>(shared);
  }

  const Shared mapping_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<uint8_t*, size_t>> constants_;
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
