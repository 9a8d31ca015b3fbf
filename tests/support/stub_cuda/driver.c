// A CUDA driver for tests that accepts every call and computes nothing.
//
// It counts launches and keeps the last one: function, grid, block, shared memory and parameters.
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#include "cost.h"

typedef unsigned long long u64;

static int launches, unloads, device_now, launch_error, watched;
static volatile int held;
static u64 function_now, parameters_now[160];
static unsigned config_now[7];

// ---- what tests read and set ----

int stub_launches(void) { return launches; }
int stub_unloads(void) { return unloads; }
u64 stub_function(void) { return function_now; }
u64 stub_parameter(int i) { return parameters_now[i]; }
unsigned stub_config(int i) { return config_now[i]; }
void stub_watch(int parameters) { watched = parameters; }
void stub_set_device(int device) { device_now = device; }
void stub_set_error(int error) { launch_error = error; }
// While it is held a launch waits, at most half a minute, for another thread to let it go.
void stub_hold(int hold) { held = hold; }
int stub_is_held(void) { return held; }

// ---- the driver ----

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  launches++;
  function_now = (u64)(uintptr_t)function;
  memcpy(config_now, config, sizeof config_now);
  for (int i = 0; i < watched; i++) memcpy(&parameters_now[i], parameters[i], 8);
  for (time_t end = time(NULL) + 30; held && time(NULL) < end;) {
  }
  spend_cost();
  return launch_error;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream,
                   void **parameters, void **extra) {
  unsigned config[7] = {x, y, z, block_x, block_y, block_z, shared};
  return cuLaunchKernelEx(config, function, parameters, extra);
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  static u64 next = 0x3000;
  *function = (void *)(uintptr_t)(next += 16);
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 49152; break;    // shared memory of a block
    case 10: *value = 32; break;      // threads of a warp
    case 12: *value = 65536; break;   // registers of a block
    case 16: *value = 132; break;     // multiprocessors
    case 75: *value = 9; break;       // compute capability, major
    case 76: *value = 0; break;       // and minor
    case 81: *value = 233472; break;  // shared memory of a multiprocessor
    case 97: *value = 232448; break;  // shared memory of a block that opts in
    default: *value = 1000; break;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;  // threads of a block; registers and spills: none
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = error ? "an error of the stub" : "no error";
  return 0;
}

int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }
int cuPointerGetAttribute(u64 *out, int attribute, u64 pointer) { *out = pointer; return 0; }
int cuCtxGetDevice(int *device) { *device = device_now; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)0x1000; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "stub", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1ull << 37; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)0x2000; return 0; }
int cuModuleLoadDataEx(void **module, const void *image) { return cuModuleLoadData(module, image); }
int cuModuleUnload(void *module) { unloads++; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 16; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

#define DOES_NOTHING(name) \
  int name(void) { return 0; }
DOES_NOTHING(cuInit)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col)
