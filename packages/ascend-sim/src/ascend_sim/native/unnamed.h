// SPDX-License-Identifier: Apache-2.0
//
// For sources whose checks are not yet rules with an id (ascend_sim/contracts): STRICT without one.
#pragma once
#undef STRICT
#define STRICT(condition, ...)                                                                                          \
  TORCH_CHECK(!::ascend_sim::strict() || (condition), "ascend-sim strict mode: ", __VA_ARGS__, " (ASCEND_SIM_STRICT=0 allows it)")
