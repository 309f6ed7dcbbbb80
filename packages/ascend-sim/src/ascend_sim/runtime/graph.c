// SPDX-License-Identifier: Apache-2.0
//
// Graphs: what is captured from streams and replayed as one launch (aclmdlRI*). A graph is the list of what was asked of the stream where the
// capture began, and of those that joined it by events, in the order in which the host asked; a replay does it again in that order. It stops
// where it waits for a word of memory (torch.npu.ExternalEvent is one), as the device does, and goes on when that is written. So an update of
// operators may come before a replay or after it. What would wait for such a replay in vain is an error.
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "graph.h"
#include "state.h"

#define lock ascend_sim_lock

typedef struct {
  uint64_t *at, value;
} Word;

typedef struct {
  enum { OPERATOR, WAIT, WRITE } kind;
  aclError (*run)(void *);
  void (*drop)(void *);
  void *argument;
  Word word;      // that is waited for, or written
  uint32_t flag;  // how the word is compared
} Node;

struct Group {  // the operators between ..TaskGrpBegin and ..TaskGrpEnd
  Graph *graph;
  size_t first, count;
  Group *next;
};

struct Graph {
  Node *nodes;
  size_t count, room;
  Group *groups;
  Group *open;  // the task group that is being captured
  Stream *origin, *streams;  // while it is captured
  pthread_t thread;
  aclmdlRICaptureMode mode;
  char invalid[1024];
  uint64_t serial;  // from 1
  int holders;  // the program, and replays that have not ended
  Graph *next;  // of those that are captured now
};

// One replay.
typedef struct Replay {
  Graph *graph;
  Stream *stream;
  size_t at;
  int running, ended;
  aclError error;
  uint64_t position;  // of the stream, after the replay
  struct Replay *next;  // of those that wait for an event
} Replay;

static Graph *captures;
static Replay *waiting;
static atomic_int active;  // captures, updates and replays that wait
static atomic_ullong serials = 1;
static atomic_llong replays, updates;
static void (*before_capture)(void);
static _Thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

static aclError fail(aclError code, const char *format, ...) {
  char reason[1400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  return ascend_sim_fail(code, reason);
}

int ascend_sim_late(aclrtStream stream) {
  const char *streams = getenv("ASCEND_SIM_STREAMS");
  return stream && !((Stream *)stream)->immediate && streams && !strcmp(streams, "lazy");
}

void ascend_sim_graph_before_capture(void (*before)(void)) { before_capture = before; }
int ascend_sim_graph_active(void) { return atomic_load_explicit(&active, memory_order_relaxed); }

void ascend_sim_graph_counts(int64_t *all_replays, int64_t *all_updates) {
  *all_replays = atomic_load(&replays);
  *all_updates = atomic_load(&updates);
}

void ascend_sim_graph_reset_counts(void) { atomic_store(&replays, 0); atomic_store(&updates, 0); }

// ---- graphs and their nodes --------------------------------------------------------------------------------------------------------------

static Node *add(Graph *graph, Node node) {
  if (graph->count == graph->room) {
    graph->room = graph->room ? 2 * graph->room : 64;
    graph->nodes = realloc(graph->nodes, graph->room * sizeof *graph->nodes);
    if (!graph->nodes) abort();
  }
  graph->nodes[graph->count] = node;
  if (graph->open) graph->open->count = graph->count + 1 - graph->open->first;
  return &graph->nodes[graph->count++];
}

static void release(Graph *graph) {  // without the lock: what is dropped may call back
  pthread_mutex_lock(&lock);
  const int left = --graph->holders;
  pthread_mutex_unlock(&lock);
  if (left) return;
  for (size_t i = 0; i < graph->count; ++i)
    if (graph->nodes[i].drop) graph->nodes[i].drop(graph->nodes[i].argument);
  for (Group *group = graph->groups, *next; group; group = next) {
    next = group->next;
    free(group);
  }
  free(graph->nodes);
  free(graph);
}

static void join(Graph *graph, Stream *stream) {
  stream->capture = graph;
  stream->captured = stream->joined = 0;
  stream->next_captured = graph->streams;
  graph->streams = stream;
}

static void invalidate(Graph *graph, const char *reason) {
  if (!*graph->invalid) snprintf(graph->invalid, sizeof graph->invalid, "%s", reason);
}

// ---- operators (native/graph.cpp) --------------------------------------------------------------------------------------------------------

enum AscendSimPlace ascend_sim_graph_place(aclrtStream handle) {
  Stream *stream = handle;
  if (!stream) return PLACE_RUNS;
  if (stream->capture) return PLACE_CAPTURED;
  if (stream->updating) return PLACE_UPDATES;
  enum AscendSimPlace place = PLACE_RUNS;
  pthread_mutex_lock(&lock);
  for (Graph *graph = captures; graph; graph = graph->next)
    if (pthread_equal(graph->thread, pthread_self())) place = PLACE_STRAYS;
  pthread_mutex_unlock(&lock);
  return place;
}

int ascend_sim_graph_in_group(aclrtStream stream) { return ((Stream *)stream)->capture->open != NULL; }

void ascend_sim_graph_add(aclrtStream handle, aclError (*run)(void *), void (*drop)(void *), void *argument) {
  Stream *stream = handle;
  pthread_mutex_lock(&lock);
  add(stream->capture, (Node){.kind = OPERATOR, .run = run, .drop = drop, .argument = argument});
  stream->captured++;
  pthread_mutex_unlock(&lock);
}

void *ascend_sim_graph_next(aclrtStream handle) {
  Stream *stream = handle;
  void *argument = NULL;
  pthread_mutex_lock(&lock);
  const Group *group = stream->updating;
  while (!argument && group && stream->updated < group->count) {
    const Node *node = &group->graph->nodes[group->first + stream->updated++];
    if (node->kind == OPERATOR) argument = node->argument;
  }
  pthread_mutex_unlock(&lock);
  if (argument) atomic_fetch_add(&updates, 1);
  return argument;
}

void ascend_sim_graph_invalidate(aclrtStream stream, const char *reason) {
  pthread_mutex_lock(&lock);
  if (stream && ((Stream *)stream)->capture) invalidate(((Stream *)stream)->capture, reason);
  else
    for (Graph *graph = captures; graph; graph = graph->next)
      if (pthread_equal(graph->thread, pthread_self())) invalidate(graph, reason);
  pthread_mutex_unlock(&lock);
}

// ---- replays -----------------------------------------------------------------------------------------------------------------------------

static aclError write_late(void *argument) {
  const Word *word = argument;
  *word->at = word->value;
  free(argument);
  return ACL_SUCCESS;
}

static int holds(const Node *node) {
  switch (node->flag) {
    case 0: return (int64_t)(*node->word.at - node->word.value) >= 0;
    case 1: return *node->word.at == node->word.value;
    case 2: return (*node->word.at & node->word.value) != 0;
    default: return ~(*node->word.at | node->word.value) != 0;
  }
}

// Whether a word of memory is what a graph waits for; tasks of other streams that write it run until it is.
static int there(const Node *node) {
  for (Stream *stream = ascend_sim_streams; stream && !holds(node); stream = stream->next) {
    uint64_t position = stream->done;
    for (const Task *task = stream->first; task; task = task->next) {
      ++position;
      if (task->run != write_late || ((const Word *)task->argument)->at != node->word.at) continue;
      ascend_sim_run_until(stream, position);
      if (holds(node)) break;
      task = stream->first;
      position = stream->done + 1;
      if (!task) break;
    }
  }
  return holds(node);
}

// Go on with a replay to its end, or to an event that is not there. With the lock held.
static void progress(Replay *replay) {
  Graph *graph = replay->graph;
  if (replay->running) return;
  replay->running = 1;
  for (; replay->at < graph->count; ++replay->at) {
    const Node *node = &graph->nodes[replay->at];
    if (node->kind == WAIT && !there(node)) break;
    if (node->kind == WRITE) *node->word.at = node->word.value;
    if (node->kind != OPERATOR || replay->error) continue;
    pthread_mutex_unlock(&lock);
    const aclError error = node->run(node->argument);
    pthread_mutex_lock(&lock);
    if (error) replay->error = error;
  }
  replay->running = 0;
  replay->ended = replay->at == graph->count;
}

static void forget_waiting(Replay *replay) {
  for (Replay **link = &waiting; *link; link = &(*link)->next)
    if (*link == replay) {
      *link = replay->next;
      atomic_fetch_sub(&active, 1);
      return;
    }
}

// The task that a replay which did not end at once leaves on its stream: the rest of it has to be possible now.
static aclError end(void *argument) {
  Replay *replay = argument;
  pthread_mutex_lock(&lock);
  if (!replay->ended) progress(replay);
  forget_waiting(replay);
  const int ended = replay->ended;
  aclError error = replay->error;
  pthread_mutex_unlock(&lock);
  if (!ended)
    error = fail(TASK_FAILED,
                 "the replay of a graph waits for an event from outside (torch.npu.ExternalEvent) that nothing has recorded: on hardware this wait "
                 "has no end. The graph's host-side arguments have to be updated for each replay, NPUGraph.update(cpu_update_input=[...])");
  release(replay->graph);
  free(replay);
  return error;
}

aclError ascend_sim_graph_settle(aclrtStream stream) {
  pthread_mutex_lock(&lock);
  aclError error = ACL_SUCCESS;
  for (Replay *replay = waiting, *next; replay && !error; replay = next) {
    next = replay->next;
    if (replay->stream == stream && !replay->running) error = ascend_sim_run_until(replay->stream, replay->position);
  }
  pthread_mutex_unlock(&lock);
  return error;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  Graph *graph = model;
  Replay *replay = calloc(1, sizeof *replay);
  if (!replay) return fail(OUT_OF_MEMORY, "out of host memory");
  if (stream && ((Stream *)stream)->capture) {
    free(replay);
    invalidate(((Stream *)stream)->capture, "a graph was replayed during the capture of another");
    return fail(CAPTURE_REFUSED, "a graph cannot be replayed during the capture of another");
  }
  atomic_fetch_add(&replays, 1);
  aclError error = ascend_sim_late(stream) ? ACL_SUCCESS : ascend_sim_graph_settle(stream);
  if (error) {
    free(replay);
    return error;
  }
  pthread_mutex_lock(&lock);
  graph->holders++;
  *replay = (Replay){.graph = graph, .stream = stream};
  if (!ascend_sim_late(stream)) progress(replay);
  if (replay->ended || !stream) {
    pthread_mutex_unlock(&lock);
    return end(replay);
  }
  replay->position = ascend_sim_append(stream, (Task){.run = end, .argument = replay});
  if (!ascend_sim_late(stream)) {
    replay->next = waiting;
    waiting = replay;
    atomic_fetch_add(&active, 1);
  }
  pthread_mutex_unlock(&lock);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecute(aclmdlRI model, int32_t timeout) { (void)timeout; return aclmdlRIExecuteAsync(model, NULL); }
aclError aclmdlRIDestroy(aclmdlRI model) { if (model) release(model); return ACL_SUCCESS; }

// ---- events ------------------------------------------------------------------------------------------------------------------------------

// Those replays that wait for events go on as far as they can; one that comes to its end leaves its stream's queue.
static aclError go_on(void) {
  aclError error = ACL_SUCCESS;
  for (Replay *replay = waiting, *next; replay; replay = next) {
    next = replay->next;
    progress(replay);
    if (!replay->ended) continue;
    const aclError mine = ascend_sim_run_until(replay->stream, replay->position);
    if (!error) error = mine;
  }
  return error;
}

int ascend_sim_graph_record(Event *event, Stream *stream) {
  event->capture = 0;
  if (!stream || !stream->capture) return 0;
  event->capture = stream->capture->serial;
  event->captured = stream->captured;
  event->stream = stream;
  return 1;
}

int ascend_sim_graph_wait(Stream *stream, Event *event, aclError *error) {
  *error = ACL_SUCCESS;
  if (!stream) return 0;
  Graph *graph = captures;
  while (graph && graph->serial != event->capture) graph = graph->next;
  if (!graph && stream->capture && event->stream) {
    invalidate(stream->capture, "it waits for an event that was recorded outside of it");
    *error = fail(CAPTURE_REFUSED, "aclrtStreamWaitEvent: what is captured in a graph cannot wait for an event that was recorded outside of the capture");
    return 1;
  }
  if (!graph) return 0;
  if (!stream->capture) join(graph, stream);
  // What the event's stream had waited for is waited for as well.
  if (stream == graph->origin && event->stream->joined < event->captured) event->stream->joined = event->captured;
  return 1;
}

aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream handle) {
  (void)flag;
  Stream *stream = handle;
  const Word word = {address, value};
  aclError error = ACL_SUCCESS;
  pthread_mutex_lock(&lock);
  if (stream && stream->capture) {
    add(stream->capture, (Node){.kind = WRITE, .word = word});
  } else if (ascend_sim_late(stream)) {
    Word *kept = malloc(sizeof *kept);
    if (!kept) abort();
    *kept = word;
    ascend_sim_append(stream, (Task){.run = write_late, .argument = kept});
  } else {
    *word.at = word.value;
    error = go_on();
  }
  pthread_mutex_unlock(&lock);
  return error;
}

aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream handle) {
  Stream *stream = handle;
  if (!stream || !stream->capture) return fail(CAPTURE_REFUSED, "aclrtValueWait: waiting for a value is simulated in graphs only");
  pthread_mutex_lock(&lock);
  add(stream->capture, (Node){.kind = WAIT, .word = {address, value}, .flag = flag});
  pthread_mutex_unlock(&lock);
  return ACL_SUCCESS;
}

aclError ascend_sim_graph_host_waits(const char *function, Stream *stream, Event *event) {
  if (!ascend_sim_graph_active()) return ACL_SUCCESS;
  Graph *found = NULL;
  pthread_mutex_lock(&lock);
  for (Graph *graph = captures; graph; graph = graph->next) {
    const int own = pthread_equal(graph->thread, pthread_self()) && thread_mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED &&
                    graph->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
    const int device = !stream && !event;
    if (own || device || (stream && stream->capture == graph) || (event && event->capture == graph->serial)) found = graph;
  }
  if (found) {
    char reason[200];
    snprintf(reason, sizeof reason, "%s waits for the device", function);
    invalidate(found, reason);
  }
  pthread_mutex_unlock(&lock);
  if (!found) return ACL_SUCCESS;
  return fail(CAPTURE_REFUSED, "%s: the host must not wait for the device while a graph is captured", function);
}

// ---- captures ----------------------------------------------------------------------------------------------------------------------------

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  Stream *stream = handle;
  if (before_capture) before_capture();
  if (!stream || stream->immediate) return fail(CAPTURE_REFUSED, "the default stream cannot be captured; use torch.npu.stream(torch.npu.Stream())");
  if (stream->capture) return fail(CAPTURE_REFUSED, "this stream is being captured already");
  aclError error = aclrtSynchronizeStream(handle);
  if (error) return error;
  Graph *graph = calloc(1, sizeof *graph);
  if (!graph) return fail(OUT_OF_MEMORY, "out of host memory");
  graph->origin = stream;
  graph->thread = pthread_self();
  graph->mode = mode;
  graph->holders = 1;
  graph->serial = atomic_fetch_add(&serials, 1);
  pthread_mutex_lock(&lock);
  join(graph, stream);
  graph->next = captures;
  captures = graph;
  atomic_fetch_add(&active, 1);
  pthread_mutex_unlock(&lock);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *model) {
  const Graph *graph = stream ? ((Stream *)stream)->capture : NULL;
  *status = !graph            ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : *graph->invalid ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                              : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  if (model) *model = (aclmdlRI)graph;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI *model) {
  Stream *stream = handle;
  Graph *graph = stream ? stream->capture : NULL;
  *model = NULL;
  if (!graph) return fail(CAPTURE_REFUSED, "no capture has begun on this stream");
  if (graph->origin != stream) return fail(CAPTURE_REFUSED, "a capture ends on the stream where it began");
  pthread_mutex_lock(&lock);
  for (Graph **link = &captures; *link; link = &(*link)->next)
    if (*link == graph) {
      *link = graph->next;
      break;
    }
  for (Stream *member = graph->streams, *next; member; member = next) {
    next = member->next_captured;
    if (member != stream && member->joined < member->captured) {
      char reason[200];
      snprintf(reason, sizeof reason,
               "work on stream %d has not joined: the stream where the capture began has to wait for an event that is recorded after it", member->id);
      invalidate(graph, reason);
    }
    member->capture = NULL;
    member->next_captured = NULL;
  }
  if (graph->open) invalidate(graph, "a task group has not been closed");
  graph->streams = NULL;
  atomic_fetch_sub(&active, 1);
  pthread_mutex_unlock(&lock);
  if (*graph->invalid) {
    const aclError error = fail(CAPTURE_REFUSED, "the capture of a graph failed: %s", graph->invalid);
    release(graph);
    return error;
  }
  *model = graph;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
  const aclmdlRICaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return ACL_SUCCESS;
}

// ---- task groups -------------------------------------------------------------------------------------------------------------------------

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  Graph *graph = handle ? ((Stream *)handle)->capture : NULL;
  if (!graph) return fail(CAPTURE_REFUSED, "a task group begins on a stream that is captured");
  if (graph->open) return fail(CAPTURE_REFUSED, "task groups cannot be nested");
  Group *group = calloc(1, sizeof *group);
  if (!group) return fail(OUT_OF_MEMORY, "out of host memory");
  *group = (Group){.graph = graph, .first = graph->count, .next = graph->groups};
  graph->groups = graph->open = group;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp *group) {
  Graph *graph = handle ? ((Stream *)handle)->capture : NULL;
  if (!graph || !graph->open) return fail(CAPTURE_REFUSED, "no task group has begun on this stream");
  *group = graph->open;
  graph->open = NULL;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
  Stream *stream = handle;
  if (!stream || !group || stream->updating || stream->capture)
    return fail(CAPTURE_REFUSED, "an update of a task group begins on a stream that is neither captured nor in another update");
  stream->updating = group;
  stream->updated = 0;
  atomic_fetch_add(&active, 1);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  Stream *stream = handle;
  if (!stream || !stream->updating) return fail(CAPTURE_REFUSED, "no update of a task group has begun on this stream");
  const int complete = ascend_sim_graph_next(handle) == NULL;
  stream->updating = NULL;
  atomic_fetch_sub(&active, 1);
  return complete ? ACL_SUCCESS : fail(CAPTURE_REFUSED, "an update has to give anew every operator of the task group");
}

aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr attribute, aclrtStreamAttrValue *value) {
  (void)stream; (void)attribute; (void)value;
  return ACL_SUCCESS;
}
