// SPDX-License-Identifier: Apache-2.0
//
// A stub of CANN's runtime: just enough for the real torch_npu to load and run where there is no NPU.
// "Device" memory is in memory.c; streams and events are in streams.c.
// It is compiled against the CANN headers that the torch_npu wheel carries, so the compiler checks every signature.
//
//   ASCEND_SIM_DEVICES   number of devices (default 8)
//   ASCEND_SIM_SOC       name of the chip (default Ascend910B3)
//   ASCEND_SIM_MEMORY    bytes of memory of each device (set by the loader, which understands "4GiB")
//
// What is absent on purpose: an operator that has no kernel in ascend_sim must fail. aclopCompileAndExecute therefore returns an error (a 0
// would hand out uninitialised memory), and every symbol that torch_npu looks up with dlsym and does not find is an error by name.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "runtime.h"

#define UNSUPPORTED 207000
#define INVALID_DEVICE 107001
#define NO_KERNEL 500001

static _Thread_local int32_t current_device = 0;
static char contexts[MAX_DEVICES];  // the address of entry i is the context of device i
static _Thread_local char last_error[2048];

static long long from_environment(const char *name, long long fallback) {
  const char *text = getenv(name);
  return text && *text ? atoll(text) : fallback;
}

// Visible devices: as CANN does it, the entries of ASCEND_RT_VISIBLE_DEVICES before the first that is no device.
static int32_t device_count(void) {
  long long count = from_environment("ASCEND_SIM_DEVICES", 8);
  count = count < 1 ? 1 : count > MAX_DEVICES ? MAX_DEVICES : count;
  const char *entry = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!entry) return (int32_t)count;
  int32_t visible = 0;
  while (visible < count) {
    char *end;
    const long long device = strtoll(entry, &end, 10);
    if (end == entry || device < 0 || device >= count) break;
    ++visible;
    if (*end != ',') break;
    entry = end + 1;
  }
  return visible;
}

size_t ascend_sim_device_bytes(void) { return (size_t)from_environment("ASCEND_SIM_MEMORY_BYTES", 4LL << 30); }
int32_t ascend_sim_device(void) { return current_device; }

aclError ascend_sim_fail(aclError code, const char *reason) {
  snprintf(last_error, sizeof last_error, "ascend-sim: %s", reason);
  return code;
}

static aclError fail(aclError code, const char *reason) { return ascend_sim_fail(code, reason); }

// ---- life, versions, names -----------------------------------------------------------------------------------------------------------

aclError aclInit(const char *path) { (void)path; return ACL_SUCCESS; }
aclError aclFinalize(void) { return ACL_SUCCESS; }
const char *aclGetRecentErrMsg(void) { return last_error; }
const char *aclrtGetSocName(void) {
  const char *name = getenv("ASCEND_SIM_SOC");
  return name && *name ? name : "Ascend910B3";
}
void aclAppLog(aclLogLevel level, const char *func, const char *file, uint32_t line, const char *format, ...) {
  (void)level; (void)func; (void)file; (void)line; (void)format;
}

aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
  (void)name;
  memset(version, 0, sizeof *version);
  strcpy(version->version, "8.5.0");
  return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char *package, char *version) {
  (void)package;
  strcpy(version, "8.5.0");
  return ACL_SUCCESS;
}

// ---- devices and contexts ----------------------------------------------------------------------------------------------------------

aclError aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)device_count(); return ACL_SUCCESS; }

aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count()) return fail(INVALID_DEVICE, "no such device; ASCEND_SIM_DEVICES sets how many there are");
  current_device = device;
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) { *device = current_device; return ACL_SUCCESS; }
aclError aclrtResetDevice(int32_t device) { (void)device; return ACL_SUCCESS; }
aclError aclrtGetCurrentContext(aclrtContext *context) { *context = &contexts[current_device]; return ACL_SUCCESS; }
aclError aclrtSetCurrentContext(aclrtContext context) { current_device = (int32_t)((char *)context - contexts); return ACL_SUCCESS; }

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
  (void)device;
  if (flags) *flags = 0;
  *active = 1;
  return ACL_SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical) { *logical = user; return ACL_SUCCESS; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = device != peer; return ACL_SUCCESS; }
aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { (void)peer; (void)flags; return ACL_SUCCESS; }
aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = getpid(); return ACL_SUCCESS; }

// The figures of an Ascend 910B3 (Atlas A2): 20 AI cores of one cube and two vector units each, 192 KB unified buffer, 192 MB L2.
static aclError attribute(int64_t kind, int64_t *value) {
  switch (kind) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM: *value = 6; return ACL_SUCCESS;
    case ACL_DEV_ATTR_AICORE_CORE_NUM: case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = 20; return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = 40; return ACL_SUCCESS;
    case ACL_DEV_ATTR_UBUF_PER_VECTOR_CORE: *value = 192 << 10; return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = (int64_t)ascend_sim_device_bytes(); return ACL_SUCCESS;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = 192LL << 20; return ACL_SUCCESS;
    default: return fail(UNSUPPORTED, "this device attribute is not simulated");
  }
}

aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attr, int64_t *value) { (void)device; return attribute(attr, value); }

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value) {
  (void)device;
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM ? 20 : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 40 : 192LL << 20;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value) {
  (void)device;
  *value = type == ACL_RT_DEV_RES_CUBE_CORE ? 20 : 40;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value) {
  (void)stream;
  return aclrtGetDeviceResLimit(0, type, value);
}

aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t *value) { return aclrtGetDeviceResLimit(0, type, value); }

// ---- reports of callbacks: streams.c calls them itself -----------------------------------------------------------------------------------

aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream) { (void)thread; (void)stream; return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream) { (void)thread; (void)stream; return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t timeout) { usleep((useconds_t)(timeout > 0 ? timeout : 100) * 1000); return ACL_SUCCESS; }

// ---- settings that change nothing here --------------------------------------------------------------------------------------------------

int HcclSetConfig(int config, int32_t value) { (void)config; (void)value; return 0; }  // hccl.h is C++ only
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t timeout) { (void)timeout; return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { (void)timeout; return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t *actual) { if (actual) *actual = timeout; return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { (void)option; (void)value; return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { (void)option; *value = 0; return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { (void)option; (void)value; return ACL_SUCCESS; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { (void)level; return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel level) { (void)level; return ACL_SUCCESS; }
aclError aclmdlInitDump(void) { return ACL_SUCCESS; }
aclError aclmdlSetDump(const char *path) { (void)path; return ACL_SUCCESS; }
aclError aclmdlFinalizeDump(void) { return ACL_SUCCESS; }
aclError aclSetCompileopt(aclCompileOpt option, const char *value) { (void)option; (void)value; return ACL_SUCCESS; }
static const char *compile_option(aclCompileOpt option) { return option == ACL_OP_JIT_COMPILE ? "disable" : "0"; }  // the defaults of a 910B
size_t aclGetCompileoptSize(aclCompileOpt option) { return strlen(compile_option(option)) + 1; }

aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
  if (length < aclGetCompileoptSize(option)) return fail(ACL_ERROR_INVALID_PARAM, "aclGetCompileopt: the buffer is too small");
  strcpy(value, compile_option(option));
  return ACL_SUCCESS;
}

aclError aclGetCannAttributeList(const aclCannAttr **list, size_t *count) { *list = NULL; *count = 0; return ACL_SUCCESS; }
aclError aclGetCannAttribute(aclCannAttr attr, int32_t *value) { (void)attr; *value = 0; return ACL_SUCCESS; }

// ---- linked by torch_npu, not simulated: each is an error where it is called -------------------------------------------------------------

aclError aclopCompileAndExecute(const char *type, int inputs, const aclTensorDesc *const in[], const aclDataBuffer *const from[], int outputs,
                                const aclTensorDesc *const out[], aclDataBuffer *const to[], const aclopAttr *attr, aclopEngineType engine,
                                aclopCompileType compile, const char *path, aclrtStream stream) {
  (void)inputs; (void)in; (void)from; (void)outputs; (void)out; (void)to; (void)attr; (void)engine; (void)compile; (void)path; (void)stream;
  snprintf(last_error, sizeof last_error, "ascend-sim: no kernel for the graph operator %s", type);
  return NO_KERNEL;
}

#define ABSENT(name)                                                                   \
  __attribute__((visibility("default"))) int name##_absent(void) __asm__(#name);       \
  int name##_absent(void) { return fail(UNSUPPORTED, #name " is not simulated"); }
#define ABSENT_NULL(name)                                                              \
  __attribute__((visibility("default"))) void *name##_absent(void) __asm__(#name);     \
  void *name##_absent(void) { fail(UNSUPPORTED, #name " is not simulated"); return NULL; }
#define NOTHING(name)                                                                  \
  __attribute__((visibility("default"))) int name##_nothing(void) __asm__(#name);      \
  int name##_nothing(void) { return 0; }

ABSENT_NULL(aclCreateDataBuffer) ABSENT_NULL(aclCreateTensorDesc) ABSENT_NULL(aclopCreateAttr)
NOTHING(aclDestroyDataBuffer) NOTHING(aclDestroyTensorDesc) NOTHING(aclopDestroyAttr)
ABSENT(aclGetTensorDescDimV2) ABSENT(aclGetTensorDescFormat) ABSENT(aclGetTensorDescNumDims) ABSENT(aclGetTensorDescType)
ABSENT(aclSetTensorDescName) ABSENT(aclSetTensorFormat) ABSENT(aclSetTensorPlaceMent) ABSENT(aclSetTensorShape)
ABSENT(aclopSetAttrBool) ABSENT(aclopSetAttrDataType) ABSENT(aclopSetAttrFloat) ABSENT(aclopSetAttrInt) ABSENT(aclopSetAttrListBool)
ABSENT(aclopSetAttrListFloat) ABSENT(aclopSetAttrListInt) ABSENT(aclopSetAttrListListInt) ABSENT(aclopSetAttrString)
ABSENT(aclrtBinaryGetFunction) ABSENT(aclrtBinaryLoadFromData) ABSENT(aclrtGetFunctionAddr)
ABSENT(aclrtMemExportToShareableHandle) ABSENT(aclrtMemImportFromShareableHandle)
ABSENT(aclrtMemSetPidToShareableHandle)
ABSENT(rtDevBinaryRegister) ABSENT(rtFunctionRegister) ABSENT(rtGetC2cCtrlAddr) ABSENT(rtKernelLaunch)

// Profiling: nothing is recorded.
NOTHING(MsprofGetHashId) NOTHING(MsprofRegisterCallback) NOTHING(MsprofReportAdditionalInfo) NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo) NOTHING(MsprofSysCycleTime)
