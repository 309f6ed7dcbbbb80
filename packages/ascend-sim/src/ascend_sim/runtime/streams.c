// SPDX-License-Identifier: Apache-2.0
//
// Streams and events. Operators run when they are called, so that everything asked of a stream has happened already; but for
// ASCEND_SIM_STREAMS=lazy, where the operators of a side stream are tasks (native/streams.cpp). A task runs, in the thread that waits, when
// something waits for it: the host for its stream, for an event or for the device, or an immediate stream for an event. A side stream that is
// told to wait gets a task which waits, and so the order of tasks is that which events ask for, and no other.
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "acl/acl.h"
#include "graph.h"
#include "state.h"

static atomic_int next_id = 1;
Stream *ascend_sim_streams;
pthread_mutex_t ascend_sim_lock = PTHREAD_MUTEX_INITIALIZER;
#define lock ascend_sim_lock
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;

aclError ascend_sim_run_until(Stream *stream, uint64_t position) {
  aclError result = ACL_SUCCESS;
  while (stream->done < position) {
    if (stream->busy) {
      if (pthread_equal(stream->runner, pthread_self())) break;  // asked by one of its own tasks: what comes before that has run
      pthread_cond_wait(&moved, &lock);
      continue;
    }
    Task *task = stream->first;
    stream->first = task->next;
    if (!stream->first) stream->last = NULL;
    stream->busy = 1;
    stream->runner = pthread_self();
    aclError error;
    if (task->run) {
      pthread_mutex_unlock(&lock);
      error = task->run(task->argument);
      pthread_mutex_lock(&lock);
    } else {
      error = ascend_sim_run_until(task->on, task->position);
    }
    free(task);
    stream->busy = 0;
    stream->done++;
    pthread_cond_broadcast(&moved);
    if (error && !result) result = error;
  }
  return result;
}

static aclError run_all(Stream *stream) { return stream ? ascend_sim_run_until(stream, stream->queued) : ACL_SUCCESS; }

uint64_t ascend_sim_append(Stream *stream, Task task) {
  Task *made = malloc(sizeof *made);
  if (!made) abort();
  *made = task;
  made->next = NULL;
  if (stream->last) stream->last->next = made;
  else stream->first = made;
  stream->last = made;
  return ++stream->queued;
}

static aclError wait_for(Stream *waiting, Stream *stream, uint64_t position) {
  if (!stream || stream->done >= position || stream == waiting) return ACL_SUCCESS;
  if (!ascend_sim_late(waiting)) return ascend_sim_run_until(stream, position);
  ascend_sim_append(waiting, (Task){.on = stream, .position = position});
  return ACL_SUCCESS;
}

uint64_t ascend_sim_enqueue(aclrtStream stream, aclError (*run)(void *), void *argument) {
  pthread_mutex_lock(&lock);
  const uint64_t position = ascend_sim_append(stream, (Task){.run = run, .argument = argument});
  pthread_mutex_unlock(&lock);
  return position;
}

aclError ascend_sim_wait(aclrtStream waiting, aclrtStream stream, uint64_t position) {
  pthread_mutex_lock(&lock);
  const aclError error = wait_for(waiting, stream, position);
  pthread_mutex_unlock(&lock);
  return error;
}

void ascend_sim_immediate(aclrtStream stream) {
  if (stream) ((Stream *)stream)->immediate = 1;
}

// ---- CANN's functions: streams ---------------------------------------------------------------------------------------------------------

aclError aclrtCreateStream(aclrtStream *stream) {
  Stream *made = calloc(1, sizeof *made);
  if (!made) return ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  made->id = atomic_fetch_add(&next_id, 1);
  pthread_mutex_lock(&lock);
  made->next = ascend_sim_streams;
  ascend_sim_streams = made;
  pthread_mutex_unlock(&lock);
  *stream = made;
  return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
  (void)priority; (void)flag;
  return aclrtCreateStream(stream);
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  const aclError refused = ascend_sim_graph_host_waits("aclrtSynchronizeStream", stream, NULL);
  if (refused) return refused;
  pthread_mutex_lock(&lock);
  const aclError error = run_all(stream);
  pthread_mutex_unlock(&lock);
  return error;
}

aclError aclrtSynchronizeDevice(void) {  // of all devices: a process drives one
  aclError result = ascend_sim_graph_host_waits("aclrtSynchronizeDevice", NULL, NULL);
  if (result) return result;
  pthread_mutex_lock(&lock);
  for (Stream *stream = ascend_sim_streams; stream; stream = stream->next) {
    const aclError error = run_all(stream);
    if (error && !result) result = error;
  }
  pthread_mutex_unlock(&lock);
  return result;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) { (void)timeout; return aclrtSynchronizeStream(stream); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { (void)timeout; return aclrtSynchronizeDevice(); }
aclError aclrtDestroyStream(aclrtStream stream) { return aclrtSynchronizeStream(stream); }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtSynchronizeStream(stream); }
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) { *id = stream ? ((Stream *)stream)->id : 0; return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { (void)stream; (void)mode; return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) { (void)stream; (void)flag; return ACL_SUCCESS; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) { (void)stream; *flag = 0; return ACL_SUCCESS; }

// Who asks whether a stream has come to its end waits for it to: no program has to ask for ever.
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return aclrtSynchronizeStream(stream);
}

typedef struct { void (*function)(void *); void *argument; } HostCall;

static aclError call_host(void *call) {
  ((HostCall *)call)->function(((HostCall *)call)->argument);
  free(call);
  return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *argument) {
  HostCall *call = malloc(sizeof *call);
  if (!call) return ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  *call = (HostCall){function, argument};
  Stream *on = stream;
  pthread_mutex_lock(&lock);
  const int waits = on && on->done < on->queued;
  if (waits) ascend_sim_append(on, (Task){.run = call_host, .argument = call});
  pthread_mutex_unlock(&lock);
  return waits ? ACL_SUCCESS : call_host(call);
}

aclError aclrtLaunchCallback(aclrtCallback function, void *data, aclrtCallbackBlockType block, aclrtStream stream) {
  (void)block;
  return aclrtLaunchHostFunc(stream, function, data);
}

// ---- CANN's functions: events ----------------------------------------------------------------------------------------------------------

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
  Event *made = calloc(1, sizeof *made);
  if (!made) return ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  made->flag = flag;
  *event = made;
  return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtDestroyEvent(aclrtEvent event) { free(event); return ACL_SUCCESS; }
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { (void)event; (void)stream; return ACL_SUCCESS; }

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  Event *mark = event;
  pthread_mutex_lock(&lock);
  if (!ascend_sim_graph_record(mark, stream)) {
    mark->stream = stream;
    mark->position = stream ? mark->stream->queued : 0;
  }
  pthread_mutex_unlock(&lock);
  clock_gettime(CLOCK_MONOTONIC, &mark->time);
  return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  aclError error;
  pthread_mutex_lock(&lock);
  const int captured = ascend_sim_graph_wait(stream, event, &error);
  pthread_mutex_unlock(&lock);
  return captured ? error : ascend_sim_wait(stream, ((Event *)event)->stream, ((Event *)event)->position);
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  const aclError refused = ascend_sim_graph_host_waits("aclrtSynchronizeEvent", NULL, event);
  return refused ? refused : aclrtStreamWaitEvent(NULL, event);
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return aclrtSynchronizeEvent(event);
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return aclrtSynchronizeEvent(event);
}

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
  const struct timespec a = ((Event *)start)->time, b = ((Event *)end)->time;
  *milliseconds = (float)((b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) / 1e6);
  return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *timestamp) {
  const struct timespec at = ((Event *)event)->time;
  *timestamp = (uint64_t)at.tv_sec * 1000000u + (uint64_t)at.tv_nsec / 1000u;
  return ACL_SUCCESS;
}
