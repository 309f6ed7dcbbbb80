// SPDX-License-Identifier: Apache-2.0
//
// CANN's profiler, which is asked for and measures nothing: there is no device to measure. torch_npu writes what it knows of the host beside it.
#include <stddef.h>

#include "acl/acl.h"
#include "acl/acl_prof.h"
#include "runtime.h"

struct aclprofConfig { int unused; };
static struct aclprofConfig only_one;

aclError aclprofInit(const char *folder, size_t length) { (void)folder; (void)length; return ACL_SUCCESS; }
aclError aclprofFinalize(void) { return ACL_SUCCESS; }
aclError aclprofStart(const aclprofConfig *config) { (void)config; return ACL_SUCCESS; }
aclError aclprofStop(const aclprofConfig *config) { (void)config; return ACL_SUCCESS; }
aclError aclprofWarmup(const aclprofConfig *config) { (void)config; return ACL_SUCCESS; }
aclError aclprofDestroyConfig(const aclprofConfig *config) { (void)config; return ACL_SUCCESS; }

aclprofConfig *aclprofCreateConfig(uint32_t *devices, uint32_t count, aclprofAicoreMetrics metrics, const aclprofAicoreEvents *events, uint64_t what) {
  (void)devices; (void)count; (void)metrics; (void)events; (void)what;
  return &only_one;
}

aclError aclprofSetConfig(aclprofConfigType type, const char *value, size_t length) { (void)type; (void)value; (void)length; return ACL_SUCCESS; }
