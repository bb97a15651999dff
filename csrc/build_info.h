#pragma once

#include <map>
#include <string>

namespace fused_reg {

// What this library was built with, and what it runs on. A backend adds to it where it registers its operators.
// A program that calls it is linked with the library, which one that only has operators called by name is not.
std::map<std::string, std::string>& build_info();

}  // namespace fused_reg
