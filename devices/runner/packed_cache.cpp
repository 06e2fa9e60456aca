#include "packed_cache.h"

#include <fcntl.h>
#include <link.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <vector>

namespace mobilellm {
namespace {

// An option's value, with its end (runtime/backend/options.h).
constexpr size_t kLongestPath = 255;
constexpr size_t kBlock = 1 << 20;
constexpr size_t kLongestCheck = 4096;

// A hash of 256 bits that runs at the speed of memory: four sums, each changed by every one of its
// words in a way that can be undone. It finds damage and confusion. It is no protection from
// whoever can write both files, who could also replace the program.
class Hash {
 public:
  // `size` is a multiple of 32, except in the last call.
  void add(const uint8_t* data, size_t size) {
    size_ += size;
    for (; size >= 32; data += 32, size -= 32) mix(data);
    if (size) {
      uint8_t rest[32] = {};
      std::memcpy(rest, data, size);
      mix(rest);
    }
  }

  std::string text() const {
    char digits[96];
    std::snprintf(digits, sizeof digits,
                  "%016" PRIx64 "%016" PRIx64 "%016" PRIx64 "%016" PRIx64 " %zu", sums_[0],
                  sums_[1], sums_[2], sums_[3], size_);
    return digits;
  }

 private:
  void mix(const uint8_t* data) {
    uint64_t words[4];
    std::memcpy(words, data, sizeof words);
    for (int i = 0; i < 4; ++i) {
      const uint64_t product = (sums_[i] ^ words[i]) * 0x9e3779b97f4a7c15u;
      sums_[i] = product ^ (product >> 32);
    }
  }

  uint64_t sums_[4] = {1, 2, 3, 4};
  size_t size_ = 0;
};

// Of an open file, without mapping it; "" where it cannot be read.
std::string hash_of(int file) {
  Hash hash;
  std::vector<uint8_t> block(kBlock);
  for (off_t at = 0;;) {
    size_t held = 0;
    while (held < kBlock) {
      const ssize_t got = pread(file, block.data() + held, kBlock - held, at + held);
      if (got < 0) return "";
      if (got == 0) break;
      held += got;
    }
    hash.add(block.data(), held);
    at += held;
    if (held < kBlock) return hash.text();
  }
}

std::string hash_of(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return "";
  const std::string hash = hash_of(file);
  close(file);
  return hash;
}

// A regular file of ours that nobody else can write to; -1 if it is not.
int open_own(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  struct stat about;
  if (file >= 0 && fstat(file, &about) == 0 && S_ISREG(about.st_mode) &&
      about.st_uid == geteuid() && !(about.st_mode & (S_IWGRP | S_IWOTH))) {
    return file;
  }
  if (file >= 0) close(file);
  return -1;
}

// The file with XNNPACK in it: its version decides how weights are packed.
std::string library() {
  std::string path = "/proc/self/exe";
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        if (std::strstr(info->dlpi_name, "executorch_backend_xnnpack")) {
          *static_cast<std::string*>(found) = info->dlpi_name;
        }
        return 0;
      },
      &path);
  return path;
}

// By what XNNPACK chooses its kernels, and with them the packing.
std::string processor() {
  static const char* keys[] = {"vendor_id", "cpu family", "model",   "stepping",
                               "flags",     "Features",   "CPU impl", "CPU arch",
                               "CPU vari",  "CPU part",   "CPU revi"};
  std::set<std::string> lines;
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line);) {
    for (const char* key : keys) {
      if (line.rfind(key, 0) == 0) lines.insert(line);
    }
  }
  lines.insert(std::to_string(getauxval(AT_HWCAP)) + " " + std::to_string(getauxval(AT_HWCAP2)) +
               " " + std::to_string(sysconf(_SC_PAGESIZE)));
  std::string all;
  for (const auto& line : lines) all += line + "\n";
  Hash hash;
  hash.add(reinterpret_cast<const uint8_t*>(all.data()), all.size());
  return hash.text();
}

std::string check_of(const std::string& key, int packed) {
  return key + "packed " + hash_of(packed) + "\n";
}

bool fits(const std::string& file, const std::string& key) {
  const int check = open_own(file + ".check");
  if (check < 0) return false;
  char said[kLongestCheck];
  const ssize_t size = read(check, said, sizeof said);
  close(check);
  // The packed file is read only if the rest fits.
  if (size < 0 || std::string(said, size).compare(0, key.size(), key) != 0) return false;
  const int packed = open_own(file);
  if (packed < 0) return false;
  const bool same = std::string(said, size) == check_of(key, packed);
  close(packed);
  return same;
}

bool write_whole(const std::string& path, const std::string& text) {
  const std::string unfinished = path + ".new";
  unlink(unfinished.c_str());
  const int file = open(unfinished.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return false;
  const bool fine =
      write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size()) && !fsync(file);
  close(file);
  return fine && std::rename(unfinished.c_str(), path.c_str()) == 0;
}

// XNNPACK writes through a mapping, and a full disk would end the process.
bool has_room(const std::string& folder, const std::string& model) {
  struct statvfs disk;
  struct stat about;
  if (statvfs(folder.c_str(), &disk) || stat(model.c_str(), &about)) return false;
  return static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize / 3 * 2 >
      static_cast<uint64_t>(about.st_size);
}

} // namespace

PackedCache::PackedCache(std::string file, const std::string& model) : file_(std::move(file)) {
  const std::string program = hash_of(model), code = hash_of(library());
  if (program.empty() || code.empty()) {
    problem_ = model + ": cannot be read";
    return;
  }
  key_ = "mobilellm packed cache 1\nprogram " + program + "\nlibrary " + code + "\nprocessor " +
      processor() + "\n";
  fits_ = mobilellm::fits(file_, key_);
  path_ = fits_ ? file_ : file_ + ".new";
  if (path_.size() > kLongestPath) {
    problem_ = file_ + ": ExecuTorch takes no path of more than " + std::to_string(kLongestPath) +
        " characters";
    return;
  }
  if (fits_) return;
  const size_t slash = file_.rfind('/');
  if (!has_room(slash == std::string::npos ? "." : file_.substr(0, slash + 1), model)) {
    problem_ = file_ + ": is not in a folder with room for 1.5 times the program";
    return;
  }
  unlink(path_.c_str());
  written_ = open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (written_ < 0) problem_ = path_ + ": cannot be written";
}

PackedCache::~PackedCache() {
  if (written_ >= 0) close(written_);
}

void PackedCache::publish() {
  if (written_ < 0) return;
  struct stat ours, there;
  if (fstat(written_, &ours) || ours.st_size == 0) {
    problem_ = path_ + ": XNNPACK has packed no weight into it";
    unlink(path_.c_str());
    return;
  }
  const std::string check = check_of(key_, written_);
  if (stat(path_.c_str(), &there) || there.st_ino != ours.st_ino) return;
  // A later load only reads it. XNNPACK would open it for writing, were it allowed to.
  fchmod(written_, 0400);
  if (std::rename(path_.c_str(), file_.c_str()) || !write_whole(file_ + ".check", check)) {
    problem_ = file_ + ": cannot be written";
  }
}

} // namespace mobilellm
