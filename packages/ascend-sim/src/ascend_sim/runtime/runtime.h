/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the stub of CANN's runtime have in common. */
#pragma once
#include <stddef.h>

#include "streams.h"

#define MAX_DEVICES 64

/* Bytes of memory of each device. */
size_t ascend_sim_device_bytes(void);

/* The device of this thread. */
int32_t ascend_sim_device(void);
