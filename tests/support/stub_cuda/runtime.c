// A CUDA runtime that computes nothing: memory is the host's, launches are counted.
//
// Functions of the real library that are not here do nothing and return 0 (stub_libraries.py).
#define CUDA_NO_HALF
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cost.h"

typedef cudaError_t Error;

static unsigned long long launches;
static int read_value = -1;

unsigned long long stub_runtime_launches(void) { return launches; }
// What the host gets if it reads an int that a kernel has counted; a condition that it reads, of a
// byte, is true then. With -1 it reads what is in memory.
void stub_set_read(int value) { read_value = value; }

static Error launch(void) {
  launches++;
  spend_cost();
  return cudaSuccess;
}

// ---- devices ----

Error cudaGetDeviceCount(int *count) { *count = 1; return 0; }
Error cudaGetDevice(int *device) { *device = 0; return 0; }
Error cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
Error cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
Error cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }

Error cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stub of an H200");
  p->major = 9;
  p->minor = 0;
  p->totalGlobalMem = 1ull << 37;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 60 << 20;
  p->memoryBusWidth = 6144;
  p->textureAlignment = 512;
  return cudaSuccess;
}

Error cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

Error cudaDeviceGetPCIBusId(char *id, int size, int device) {
  strncpy(id, "0000:00:00.0", size);
  return cudaSuccess;
}

Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

// ---- memory ----

Error cudaMalloc(void **pointer, size_t bytes) {
  *pointer = aligned_alloc(512, (bytes + 511) & ~511ull);
  return *pointer == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
}

Error cudaMallocAsync(void **p, size_t bytes, cudaStream_t s) { return cudaMalloc(p, bytes); }
Error cudaHostAlloc(void **p, size_t bytes, unsigned flags) { return cudaMalloc(p, bytes); }
Error cudaFree(void *pointer) { free(pointer); return 0; }
Error cudaFreeAsync(void *pointer, cudaStream_t stream) { free(pointer); return 0; }
Error cudaFreeHost(void *pointer) { free(pointer); return 0; }
Error cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = 1ull << 37; return 0; }

Error cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                      cudaStream_t stream) {
  if (kind == cudaMemcpyDeviceToDevice) return launch();
  memcpy(to, from, bytes);
  if (kind == cudaMemcpyDeviceToHost && read_value >= 0) {
    if (bytes == sizeof read_value) memcpy(to, &read_value, bytes);
    if (bytes == 1) *(char *)to = 1;
  }
  spend_cost();
  return cudaSuccess;
}

Error cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

Error cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
Error cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t s) { return launch(); }

Error cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

Error cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char memory[1 << 16];
  *pointer = memory;
  return cudaSuccess;
}

// ---- streams and events: work is done when it is queued ----

static char event_handle;

Error cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  static long next = 0x4000;
  *stream = (cudaStream_t)(next += 64);
  return cudaSuccess;
}

Error cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
Error cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return cudaStreamCreate(s); }
Error cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }

Error cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

Error cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                               unsigned long long *id, cudaGraph_t *graph,
                               const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                               size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id != NULL) *id = 0;
  if (count != NULL) *count = 0;
  return cudaSuccess;
}

Error cudaEventCreate(cudaEvent_t *event) { *event = (cudaEvent_t)&event_handle; return 0; }
Error cudaEventCreateWithFlags(cudaEvent_t *event, unsigned f) { return cudaEventCreate(event); }
Error cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; return 0; }

// ---- kernels ----

Error cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                       size_t shared, cudaStream_t stream) {
  return launch();
}

Error cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **args) {
  return launch();
}

Error cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                  size_t shared, cudaStream_t stream) {
  return launch();
}

Error __cudaLaunchKernel(void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                         cudaStream_t stream) {
  return launch();
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     struct CUstream_st *stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared = shared;
  pushed.stream = stream;
  return 0;
}

Error __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void **)stream = pushed.stream;
  return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
char __cudaInitModule(void **handle) { return 1; }
Error __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return 0; }

Error cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->maxDynamicSharedSizeBytes = 49152;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}

Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t shared) {
  *n = 2;
  return cudaSuccess;
}

Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b,
                                                             size_t shared, unsigned flags) {
  *n = 2;
  return cudaSuccess;
}

// ---- the driver's functions by name, and errors ----

Error cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                       unsigned long long flags,
                                       enum cudaDriverEntryPointQueryResult *status) {
  static void *driver;
  char second[128];
  if (driver == NULL) driver = dlopen("libcuda.so.1", RTLD_LAZY);
  snprintf(second, sizeof second, "%s_v2", name);
  *function = dlsym(driver, name);
  if (*function == NULL) *function = dlsym(driver, second);
  if (status != NULL)
    *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

Error cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                              enum cudaDriverEntryPointQueryResult *status) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

const char *cudaGetErrorString(Error error) { return "an error of the stub"; }
const char *cudaGetErrorName(Error error) { return "cudaErrorOfStub"; }
