/* SPDX-License-Identifier: Apache-2.0
 *
 * What the recorder of operators (native/graph.cpp) and the stub's graphs (graph.c) have in common. */
#pragma once
#include "streams.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Call `before` whenever a capture begins. It tells ascend_sim_immediate which stream is the default one. */
void ascend_sim_graph_before_capture(void (*before)(void));

/* Whether a capture, an update or a replay that waits is under way anywhere in the process: nothing below need be asked where not. */
int ascend_sim_graph_active(void);

/* What becomes of an operator that this thread calls on `stream`. */
enum AscendSimPlace {
  PLACE_RUNS = 0,     /* it runs, after a replay that waits on this stream has gone on: ascend_sim_graph_settle */
  PLACE_CAPTURED = 1, /* it becomes part of a graph: ascend_sim_graph_add */
  PLACE_UPDATES = 2,  /* it gives an operator of a task group its new arguments: ascend_sim_graph_next */
  PLACE_STRAYS = 3,   /* this thread captures, and `stream` has not joined the capture */
};
enum AscendSimPlace ascend_sim_graph_place(aclrtStream stream);

/* Whether operators on `stream` come between ..TaskGrpBegin and ..TaskGrpEnd. */
int ascend_sim_graph_in_group(aclrtStream stream);

/* Append an operator to the graph that `stream` is captured for. `run` returns 0 or an error that it has left for aclGetRecentErrMsg; `drop` is
 * called when the graph goes. */
void ascend_sim_graph_add(aclrtStream stream, aclError (*run)(void *), void (*drop)(void *), void *argument);

/* The argument of the next operator of the task group that is updated on `stream`; NULL after its last. */
void *ascend_sim_graph_next(aclrtStream stream);

/* What the stream was captured for is no graph any more; the end of the capture fails with this reason. */
void ascend_sim_graph_invalidate(aclrtStream stream, const char *reason);

/* Run what is left of a replay on `stream` that waits for an event; an error where nothing has recorded the event. */
aclError ascend_sim_graph_settle(aclrtStream stream);

/* Whether work on `stream` is done when something waits for it, and not at once (ASCEND_SIM_STREAMS=lazy). */
int ascend_sim_late(aclrtStream stream);

/* How many replays and updates of operators the host has launched; and set both to zero. */
void ascend_sim_graph_counts(int64_t *replays, int64_t *updates);
void ascend_sim_graph_reset_counts(void);

#ifdef __cplusplus
}
#endif
