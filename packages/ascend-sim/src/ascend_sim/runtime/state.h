/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams and events as the files of the stub see them: streams.c runs them, graph.c captures what is asked of them. */
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <time.h>

#include "acl/acl.h"
#include "streams.h"

#define CAPTURE_REFUSED 107025 /* what CANN returns for a call that a capture does not permit */

typedef struct Stream Stream;
typedef struct Graph Graph;
typedef struct Group Group;

typedef struct Task {
  aclError (*run)(void *);
  void *argument;
  Stream *on; /* without `run`: what this task waits for */
  uint64_t position;
  struct Task *next;
} Task;

struct Stream {
  int32_t id;
  int immediate, busy;
  pthread_t runner; /* where busy */
  uint64_t queued, done;
  Task *first, *last;
  Stream *next;
  Graph *capture;            /* the graph that its work becomes part of */
  uint64_t captured, joined; /* its operators in that graph, and how many of them the stream where the capture began waits for */
  Stream *next_captured;
  Group *updating; /* the task group whose operators are given anew */
  size_t updated;
};

typedef struct {
  struct timespec time;
  Stream *stream;
  uint64_t position;
  uint32_t flag;
  uint64_t capture, captured; /* the graph in whose capture it was recorded, 0 for none, and how many operators the stream had in it by then */
} Event;

extern pthread_mutex_t ascend_sim_lock;
extern Stream *ascend_sim_streams; /* all that were ever made: events and tasks may name one that is destroyed */

/* The three below: with the lock held. */

/* Run a stream's tasks up to a position; the lock is released while a task runs. The first error of those that ran here. */
aclError ascend_sim_run_until(Stream *stream, uint64_t position);

uint64_t ascend_sim_append(Stream *stream, Task task);

/* What graph.c makes of calls that streams.c gets: with the lock held. Each returns whether it has dealt with the call. */
int ascend_sim_graph_record(Event *event, Stream *stream);
int ascend_sim_graph_wait(Stream *stream, Event *event, aclError *error);

/* An error where the host would wait during a capture: for `stream` or `event`, or for the device where both are NULL. */
aclError ascend_sim_graph_host_waits(const char *function, Stream *stream, Event *event);
