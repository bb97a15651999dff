// Whether tests would notice that a place in the kernels is not there: each is left out once, in a process of its own.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <regex>

#include "../expect.h"
#include "sites.h"

namespace cuda_on_host {

// What comes first of the child's messages, and whether it has failed.
struct Answer {
  bool has_failed;
  char first[400];
};

template <class Workload>
Answer without(int site, const Workload& workload) {
  std::FILE* const messages = std::tmpfile();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(fileno(messages), STDERR_FILENO);
    alarm(60);  // who waits for ever has failed, too
    left_out = site;
    workload();
    _exit(fused_reg::testing::failures == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  Answer answer{status != 0, {}};
  std::rewind(messages);
  if (std::fgets(answer.first, sizeof answer.first, messages) == nullptr) {
    std::snprintf(answer.first, sizeof answer.first, "status %d\n", status);
  }
  std::fclose(messages);
  return answer;
}

// Where the kernels have such a place, and no thread has come to it. Cards with few float64 units have no strips.
inline std::vector<std::string> unreached(const std::filesystem::path& folder) {
  std::vector<std::string> found;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    if (fused_reg::cuda::kFewDoubles && file.path().filename() == "strips.cuh") {
      continue;
    }
    std::ifstream lines(file.path());
    std::string line;
    for (int number = 1; file.path().extension() == ".cuh" && std::getline(lines, line); ++number) {
      const std::string code = line.substr(0, line.find("//"));
      const bool is_place = std::regex_search(code, std::regex("\\b(__sync|__shfl|acquire_release_inc)")) &&
                            code.find("__device__") == std::string::npos;  // where it is called
      const auto is_here = [&](const Site& s) { return s.line == number && s.file == file.path(); };
      if (is_place && std::none_of(sites.begin(), sites.end(), is_here)) {
        found.push_back(file.path().filename().string() + ":" + std::to_string(number));
      }
    }
  }
  return found;
}

// The workload, which must pass; and once without each of the places that it has come to, where it must fail.
template <class Workload>
void expect_every_site_matters(const Workload& workload) {
  workload();
  EXPECT(fused_reg::testing::failures == 0, "with all of them");
  EXPECT(sites.size() > 20);
  for (const std::string& place : unreached(std::filesystem::path(sites.back().file).parent_path())) {
    EXPECT(false, place, "is not reached");
  }
  for (int site = 1; site < static_cast<int>(sites.size()); ++site) {
    const Answer answer = without(site, workload);
    EXPECT(answer.has_failed, sites[site].name(), "is left out, and no test fails");
    std::printf("without the %s: %s", sites[site].name().c_str(), answer.first);
    std::fflush(stdout);
  }
}

}  // namespace cuda_on_host
