// SPDX-License-Identifier: Apache-2.0
//
// Memory. That of devices is host memory, counted for each device and limited by ASCEND_SIM_MEMORY. CANN gives it out in two ways: as blocks, and
// as physical memory that a program maps into addresses which it has reserved, with which torch_npu's allocator makes its segments grow.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "acl/acl.h"
#include "runtime.h"

#define HEADER 512  // keeps what aclrtMalloc returns aligned to 512 bytes, as on hardware
#define PAGE (2u << 20)  // the granularity of physical memory: that of a huge page of the device

typedef struct { size_t bytes; int32_t device; } Block;

static atomic_size_t used[MAX_DEVICES];

static aclError out_of_memory(void) { return ascend_sim_fail(OUT_OF_MEMORY, "out of device memory; ASCEND_SIM_MEMORY sets how much each device has"); }

static void give_back(int32_t device, size_t bytes) { atomic_fetch_sub(&used[device], bytes); }

// Whether a device has this much left; it is counted then.
static int take(int32_t device, size_t bytes) {
  if (atomic_fetch_add(&used[device], bytes) + bytes <= ascend_sim_device_bytes()) return 1;
  give_back(device, bytes);
  return 0;
}

// Asks the host for huge pages, as a device has: a product that streams weights then seldom waits for the address of a page. Only a wish.
static void use_huge_pages(void *begin, size_t bytes) {
  const uintptr_t first = ((uintptr_t)begin + PAGE - 1) / PAGE * PAGE, end = ((uintptr_t)begin + bytes) / PAGE * PAGE;
  if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
}

// ---- blocks -------------------------------------------------------------------------------------------------------------------------

aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *available, size_t *total) {
  (void)attr;
  const size_t taken = atomic_load(&used[ascend_sim_device()]);
  *total = ascend_sim_device_bytes();
  *available = taken < *total ? *total - taken : 0;
  return ACL_SUCCESS;
}

aclError aclrtMalloc(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) {
  (void)policy;
  const int32_t device = ascend_sim_device();
  void *block = NULL;
  if (!take(device, bytes)) return out_of_memory();
  if (posix_memalign(&block, HEADER, bytes + HEADER)) {
    give_back(device, bytes);
    return out_of_memory();
  }
  use_huge_pages(block, bytes + HEADER);
  *(Block *)block = (Block){bytes, device};
  *pointer = (char *)block + HEADER;
  return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) { return aclrtMalloc(pointer, bytes, policy); }

aclError aclrtMallocWithCfg(void **pointer, size_t bytes, aclrtMemMallocPolicy policy, aclrtMallocConfig *config) {
  (void)config;
  return aclrtMalloc(pointer, bytes, policy);
}

aclError aclrtFree(void *pointer) {
  if (!pointer) return ACL_SUCCESS;
  Block *block = (Block *)((char *)pointer - HEADER);
  give_back(block->device, block->bytes);
  free(block);
  return ACL_SUCCESS;
}

// ---- physical memory and addresses for it ----------------------------------------------------------------------------------------------

// Addresses of which none can be read or written before physical memory is mapped there. `begin` is what the program knows of `mapping`.
typedef struct Range { char *begin; size_t bytes; char *mapping; size_t mapped_bytes; struct Range *next; } Range;

// Counted since it was made. It has pages of the host only while it is mapped, at one place at a time; its contents end with the mapping.
typedef struct Physical { size_t bytes; int32_t device; char *at; struct Physical *next; } Physical;

static Range *ranges;
static Physical *physicals;
static pthread_mutex_t address_lock = PTHREAD_MUTEX_INITIALIZER;

static aclError invalid(const char *reason) { return ascend_sim_fail(ACL_ERROR_INVALID_PARAM, reason); }

// The mapped physical memory of which any byte lies in these addresses, or NULL.
static Physical *mapped_in(const char *begin, size_t bytes) {
  for (Physical *one = physicals; one; one = one->next)
    if (one->at && one->at < begin + bytes && begin < one->at + one->bytes) return one;
  return NULL;
}

static int reserved(const char *begin, size_t bytes) {
  for (const Range *one = ranges; one; one = one->next)
    if (begin >= one->begin && bytes <= one->bytes && (size_t)(begin - one->begin) <= one->bytes - bytes) return 1;
  return 0;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *prop, aclrtMemGranularityOptions option, size_t *granularity) {
  (void)prop; (void)option;
  *granularity = PAGE;
  return ACL_SUCCESS;
}

aclError aclrtReserveMemAddress(void **pointer, size_t bytes, size_t alignment, void *expected, uint64_t flags) {
  (void)alignment; (void)expected; (void)flags;  // always aligned to a page; where the addresses are wanted is a wish
  if (!bytes) return invalid("aclrtReserveMemAddress: no bytes");
  Range *range = malloc(sizeof *range);
  if (!range) return ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  char *mapping = mmap(NULL, bytes + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    free(range);
    return ascend_sim_fail(OUT_OF_MEMORY, "out of addresses of the host");
  }
  char *begin = (char *)(((uintptr_t)mapping + PAGE - 1) / PAGE * PAGE);
  pthread_mutex_lock(&address_lock);
  *range = (Range){begin, bytes, mapping, bytes + PAGE, ranges};
  ranges = range;
  pthread_mutex_unlock(&address_lock);
  *pointer = begin;
  return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void *pointer) {
  aclError error = invalid("aclrtReleaseMemAddress: no addresses that were reserved begin here");
  pthread_mutex_lock(&address_lock);
  for (Range **link = &ranges; *link; link = &(*link)->next)
    if ((*link)->begin == pointer) {
      Range *range = *link;
      error = mapped_in(range->begin, range->bytes) ? invalid("aclrtReleaseMemAddress: physical memory is still mapped there") : ACL_SUCCESS;
      if (error) break;
      *link = range->next;
      munmap(range->mapping, range->mapped_bytes);
      free(range);
      break;
    }
  pthread_mutex_unlock(&address_lock);
  return error;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t bytes, const aclrtPhysicalMemProp *prop, uint64_t flags) {
  (void)flags;
  if (!bytes || bytes % PAGE) return invalid("aclrtMallocPhysical: the size is not a multiple of 2 MiB");
  if (prop->location.type != ACL_MEM_LOCATION_TYPE_DEVICE || prop->location.id >= MAX_DEVICES)
    return invalid("aclrtMallocPhysical: only memory of a device is simulated");
  const int32_t device = (int32_t)prop->location.id;
  if (!take(device, bytes)) return out_of_memory();
  Physical *made = malloc(sizeof *made);
  if (!made) {
    give_back(device, bytes);
    return ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  }
  pthread_mutex_lock(&address_lock);
  *made = (Physical){bytes, device, NULL, physicals};
  physicals = made;
  pthread_mutex_unlock(&address_lock);
  *handle = made;
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  aclError error = invalid("aclrtFreePhysical: this is no physical memory");
  pthread_mutex_lock(&address_lock);
  for (Physical **link = &physicals; *link; link = &(*link)->next)
    if (*link == handle) {
      Physical *one = *link;
      error = one->at ? invalid("aclrtFreePhysical: it is still mapped") : ACL_SUCCESS;
      if (error) break;
      *link = one->next;
      give_back(one->device, one->bytes);
      free(one);
      break;
    }
  pthread_mutex_unlock(&address_lock);
  return error;
}

aclError aclrtMapMem(void *pointer, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
  (void)flags;
  Physical *one = handle;
  aclError error = ACL_SUCCESS;
  pthread_mutex_lock(&address_lock);
  if (!reserved(pointer, bytes)) error = invalid("aclrtMapMem: these addresses were not reserved");
  else if ((uintptr_t)pointer % PAGE || mapped_in(pointer, bytes)) error = invalid("aclrtMapMem: the address is not one of 2 MiB, or in use");
  else if (one->at || offset || bytes != one->bytes) error = invalid("aclrtMapMem: only the whole of physical memory is mapped, at one place at a time");
  else if (mmap(pointer, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    error = ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  else {
    use_huge_pages(pointer, bytes);
    one->at = pointer;
  }
  pthread_mutex_unlock(&address_lock);
  return error;
}

aclError aclrtUnmapMem(void *pointer) {
  aclError error = ACL_SUCCESS;
  pthread_mutex_lock(&address_lock);
  Physical *one = mapped_in(pointer, 1);
  if (!one || one->at != pointer) error = invalid("aclrtUnmapMem: nothing was mapped here");
  else if (mmap(pointer, one->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
    error = ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  else one->at = NULL;
  pthread_mutex_unlock(&address_lock);
  return error;
}

// ---- host memory, and copies ------------------------------------------------------------------------------------------------------------

// Pinned host memory, so that is_pinned can tell it from any other.
static struct Pinned { char *start; size_t bytes; struct Pinned *next; } *pinned;
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

aclError aclrtMallocHost(void **pointer, size_t bytes) {
  struct Pinned *entry = malloc(sizeof *entry);
  if (!entry || posix_memalign(pointer, HEADER, bytes ? bytes : 1)) {
    free(entry);
    return ascend_sim_fail(OUT_OF_MEMORY, "out of host memory");
  }
  pthread_mutex_lock(&pinned_lock);
  *entry = (struct Pinned){*pointer, bytes, pinned};
  pinned = entry;
  pthread_mutex_unlock(&pinned_lock);
  return ACL_SUCCESS;
}

static int is_pinned(const char *pointer) {
  int found = 0;
  pthread_mutex_lock(&pinned_lock);
  for (struct Pinned *entry = pinned; entry && !found; entry = entry->next) found = pointer >= entry->start && pointer < entry->start + entry->bytes;
  pthread_mutex_unlock(&pinned_lock);
  return found;
}

aclError aclrtMallocHostWithCfg(void **pointer, uint64_t bytes, aclrtMallocConfig *config) { (void)config; return aclrtMallocHost(pointer, bytes); }

aclError aclrtFreeHost(void *pointer) {
  pthread_mutex_lock(&pinned_lock);
  for (struct Pinned **link = &pinned; *link; link = &(*link)->next)
    if ((*link)->start == pointer) {
      struct Pinned *entry = *link;
      *link = entry->next;
      free(entry);
      break;
    }
  pthread_mutex_unlock(&pinned_lock);
  free(pointer);
  return ACL_SUCCESS;
}

aclError aclrtMemcpy(void *to, size_t capacity, const void *from, size_t bytes, aclrtMemcpyKind kind) {
  (void)kind;
  if (bytes > capacity) return ascend_sim_fail(ACL_ERROR_INVALID_PARAM, "aclrtMemcpy would write past the destination");
  memmove(to, from, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t capacity, const void *from, size_t bytes, aclrtMemcpyKind kind, aclrtStream stream) {
  const aclError error = aclrtSynchronizeStream(stream);
  return error ? error : aclrtMemcpy(to, capacity, from, bytes, kind);
}

aclError aclrtMemcpyAsyncWithCondition(void *to, size_t capacity, const void *from, size_t bytes, aclrtMemcpyKind kind, aclrtStream stream) {
  return aclrtMemcpyAsync(to, capacity, from, bytes, kind, stream);
}

aclError aclrtMemset(void *pointer, size_t capacity, int32_t value, size_t bytes) {
  if (bytes > capacity) return ascend_sim_fail(ACL_ERROR_INVALID_PARAM, "aclrtMemset would write past the destination");
  memset(pointer, value, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *pointer, size_t capacity, int32_t value, size_t bytes, aclrtStream stream) {
  const aclError error = aclrtSynchronizeStream(stream);
  return error ? error : aclrtMemset(pointer, capacity, value, bytes);
}

aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
  memset(attributes, 0, sizeof *attributes);  // torch_npu asks this of host pointers only (is_pinned)
  attributes->location.type = is_pinned(pointer) ? ACL_MEM_LOCATION_TYPE_HOST : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return ACL_SUCCESS;
}
