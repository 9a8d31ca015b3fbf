// What launch.c takes from DLPack and from the CUDA driver: own definitions of their C interfaces.
//
// DLPack 1.3 (dlpack.h, DLPackExchangeAPI) and cuda.h (CUlaunchConfig, cuLaunchKernelEx).
#pragma once
#include <stdint.h>

// ---- DLPack ----

typedef struct {
  int32_t type, id;
} Device;

typedef struct {
  void *data;
  Device device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} TensorView;

typedef struct {
  uint32_t major, minor;
  void *previous, *allocate, *from_object, *to_object;
  int (*view)(void *tensor, TensorView *out);
  int (*stream)(int32_t device_type, int32_t device, void **out);
} Exchange;

enum { CUDA = 2 };

// ---- the CUDA driver ----

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig;

static int (*launch_kernel)(const LaunchConfig *, void *function, void **parameters, void **extra);
static int (*current_device)(int *);
static int (*error_name)(int, const char **);

