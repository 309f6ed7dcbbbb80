// SPDX-License-Identifier: Apache-2.0
//
// Which family of chips is simulated, for the rules that differ between them.
#pragma once
#include <cstdlib>
#include <string>

namespace ascend_sim {

// Whether the chip is an Atlas A3 (ASCEND_SIM_SOC is Ascend910_93*); otherwise it is an Atlas A2.
inline bool is_a3() {
  static const bool value = [] {
    const char* name = std::getenv("ASCEND_SIM_SOC");
    return name && std::string(name).starts_with("Ascend910_93");
  }();
  return value;
}

}  // namespace ascend_sim
