// The call of a launcher: a known kernel is launched, else the slow call serves.
#pragma once
#include <stdlib.h>

#include "launch_table.h"

// Whether an item of `idle` asks for the slow call: a dict or list that is not empty, or a setting
// (dict, key, value) that is there, true and not this value. -1: error.
static int is_busy(PyObject *item) {
  if (PyDict_CheckExact(item)) return PyDict_GET_SIZE(item) > 0;
  if (PyList_CheckExact(item)) return PyList_GET_SIZE(item) > 0;
  PyObject *settings = PyTuple_GET_ITEM(item, 0);
  if (PyDict_GET_SIZE(settings) == 0) return 0;
  PyObject *value = PyDict_GetItemWithError(settings, PyTuple_GET_ITEM(item, 1));
  if (value == NULL) return PyErr_Occurred() ? -1 : 0;
  return value == PyTuple_GET_ITEM(item, 2) ? 0 : PyObject_IsTrue(value);
}

// Whether nothing asks for the slow call: recordings, hooks, settings of Triton that were changed.
static int is_idle(Launcher *self) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->idle); i++) {
    int busy = is_busy(PyTuple_GET_ITEM(self->idle, i));
    if (busy < 0) PyErr_Clear();
    if (busy) return 0;
  }
  const char *mode = getenv("TRITON_INSTRUMENTATION_MODE");
  return mode == NULL || *mode == '\0';
}

// The numbers of programs; 1: launch, 0: there are none, -1: error.
static int programs_of(PyObject *grid, PyObject *blocks, unsigned size[3]) {
  PyObject *programs = PyObject_CallOneArg(grid, blocks);
  if (programs == NULL) return -1;
  if (!PyTuple_CheckExact(programs) || PyTuple_GET_SIZE(programs) > 3) {
    PyErr_SetString(PyExc_TypeError, "a grid is a tuple of at most three integers");
    Py_DECREF(programs);
    return -1;
  }
  int some = 1;
  size[0] = size[1] = size[2] = 1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(programs); i++) {
    unsigned long long count = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(programs, i));
    if (count > UINT32_MAX && !PyErr_Occurred())
      PyErr_Format(PyExc_OverflowError, "a grid of %llu programs", count);
    size[i] = (unsigned)count;
    some &= count != 0;
  }
  Py_DECREF(programs);
  return PyErr_Occurred() ? -1 : some;
}

static PyObject *launch(Launcher *self, PyObject *grid, PyObject *blocks, Call *call,
                        const Entry *entry) {
  LaunchConfig config = {.block_x = entry->block,
                         .block_y = 1,
                         .block_z = 1,
                         .shared = entry->shared};
  unsigned size[3];
  int some = programs_of(grid, blocks, size);
  if (some < 0) return NULL;
  self->hits++;
  if (some == 0) Py_RETURN_NONE;
  config.grid_x = size[0];
  config.grid_y = size[1];
  config.grid_z = size[2];
  if (device_type == CUDA && exchange->stream(CUDA, call->device, &config.stream)) return NULL;
  uint64_t zero = 0;  // two addresses of scratch memory, which these kernels do not use
  void *parameters[MAX_ARGUMENTS + 2];
  for (int j = 0; j < entry->parameter_count; j++)
    parameters[j] = &call->values[entry->source[j]];
  parameters[entry->parameter_count] = parameters[entry->parameter_count + 1] = &zero;
  void *function = entry->function;
  int error;
  Py_BEGIN_ALLOW_THREADS
  error = launch_kernel(&config, function, parameters, NULL);
  Py_END_ALLOW_THREADS
  if (error) {
    const char *name = NULL;
    error_name(error, &name);
    return PyErr_Format(PyExc_RuntimeError, "Triton Error [CUDA]: %s", name ? name : "unknown");
  }
  Py_RETURN_NONE;
}

// launcher(variant, grid, *arguments)
static PyObject *launcher_call(PyObject *object, PyObject *const *given, size_t flags,
                               PyObject *names) {
  Launcher *self = (Launcher *)object;
  Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (names != NULL || count != 2 + self->count)
    return PyErr_Format(PyExc_TypeError, "the kernel takes %zd arguments, got %zd", self->count,
                        count - 2);
  long variant = PyLong_AsLong(given[0]);
  if (variant < 0 || variant >= PyTuple_GET_SIZE(self->blocks)) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_IndexError, "the kernel has no config %ld", variant);
    return NULL;
  }
  Call call;
  int known = is_idle(self) && describe(self->flags, self->count, given + 2, (uint8_t)variant, &call);
  if (known) {
    Entry *entry = *find(self, &call);
    int device = -1;
    if (entry != NULL && current_device(&device) == 0 && device == call.device)
      return launch(self, given[1], PyTuple_GET_ITEM(self->blocks, variant), &call, entry);
  }
  self->misses++;
  PyObject *recipe = PyObject_Vectorcall(self->slow, given, (size_t)count, NULL);
  if (recipe == NULL || recipe == Py_None) return recipe;
  int kept = !known || keep(self, &call, recipe, given + 2);
  Py_DECREF(recipe);
  if (!kept) return NULL;
  Py_RETURN_NONE;
}

