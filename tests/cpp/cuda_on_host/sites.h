// The places in kernels where threads meet or memory is ordered, by file and line. A test may have one of them left
// out.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace cuda_on_host {

enum class Kind { kBegin, kBarrier, kWarpBarrier, kShuffle, kAtomic, kAcquire, kRelease };

struct Site {
  Kind kind;
  const char* file;
  int line;

  std::string name() const {
    constexpr const char* kNames[] = {"the begin", "barrier", "warp barrier", "shuffle",
                                      "atomic",    "acquire", "release"};
    const std::string path = file, place = path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
    return kNames[static_cast<int>(kind)] + (line == 0 ? "" : " at " + place);
  }
};

// Those that a thread has come to, in this order; threads begin at the first.
inline std::vector<Site> sites{{Kind::kBegin, "", 0}};

// One that is left out: a barrier does nothing, a mask lacks its highest lane, a counter is not reset, an atomic does
// not acquire, or does not release.
inline int left_out = -1;

inline int site_of(Kind kind, const char* file, int line) {
  constexpr size_t kSlots = 1024;
  static int slots[kSlots];  // indices in sites; 0: free
  for (size_t i = (reinterpret_cast<uintptr_t>(file) + 7 * line) % kSlots;; i = (i + 1) % kSlots) {
    if (slots[i] == 0) {
      slots[i] = static_cast<int>(sites.size());
      sites.push_back({kind, file, line});
    }
    const Site& found = sites[slots[i]];
    if (found.line == line && found.kind == kind && found.file == file) {
      return slots[i];
    }
  }
}

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "CUDA on the host: %s\n", message.c_str());
  std::abort();
}

}  // namespace cuda_on_host
