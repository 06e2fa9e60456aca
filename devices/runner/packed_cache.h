// A file with the weights as XNNPACK packs them, for a second load that packs nothing.
//
// XNNPACK 1.5.1 finds a weight in the file by its name. It checks neither the weights' values nor
// the size that a kernel reads: the file of another model with the same names, or a changed one,
// would be used. So this file is used only with a second one beside it, FILE.check, that names the
// program, the library and the CPU it was made for and the hash of its own bytes, all as they are
// now, and only if nobody else can write to it. What does not fit is made anew.
#pragma once

#include <cstddef>
#include <string>

namespace mobilellm {

class PackedCache {
 public:
  // For `model`, the path of a .pte. `problem` says what prevents it.
  PackedCache(std::string file, const std::string& model);
  PackedCache(const PackedCache&) = delete;
  ~PackedCache();

  // What XNNPACK is to be told: the file itself if it fits, or the one that it is to write.
  const std::string& path() const { return path_; }
  bool fits() const { return fits_; }
  // After the load: a written file gets its name. Another process that writes at the same time
  // may get ahead; then this one's is dropped.
  void publish();
  const std::string& problem() const { return problem_; }

 private:
  const std::string file_;
  std::string path_, key_, problem_;
  bool fits_ = false;
  int written_ = -1;
};

} // namespace mobilellm
