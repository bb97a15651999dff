#pragma once

#include <map>
#include <string>

namespace fused_reg {

// What this library was built with, and what it runs on. A backend adds to it where it registers its operators.
std::map<std::string, std::string>& build_info();

}  // namespace fused_reg
