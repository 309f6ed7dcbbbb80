/* SPDX-License-Identifier: Apache-2.0
 *
 * What the operators (native/streams.cpp) and the stub of CANN's runtime have in common. */
#pragma once
#include <stdint.h>

#include "acl/acl_rt.h"

#define OUT_OF_MEMORY 207001
#define TASK_FAILED 507015 /* what CANN returns where a kernel failed after it was launched */

#ifdef __cplusplus
extern "C" {
#endif

/* Leave `reason` for aclGetRecentErrMsg in this thread, and return `code`. */
aclError ascend_sim_fail(aclError code, const char *reason);

/* This stream's work is done when it is asked for: a wait on it waits at once. */
void ascend_sim_immediate(aclrtStream stream);

/* Append a task to a stream. It runs, after those before it, when something waits for it; `run` returns 0 or an error that it has left for
 * aclGetRecentErrMsg. Returns the stream's position after the task: what ascend_sim_wait waits for. */
uint64_t ascend_sim_enqueue(aclrtStream stream, aclError (*run)(void *), void *argument);

/* Let `waiting` (NULL: the host) go on only after `stream` has come to `position`. */
aclError ascend_sim_wait(aclrtStream waiting, aclrtStream stream, uint64_t position);

#ifdef __cplusplus
}
#endif
