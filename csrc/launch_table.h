// The kernels that a launcher remembers: open addressing; entries are neither moved nor freed before it.
#pragma once
#include <stdlib.h>

#include "launch_key.h"

enum { MAX_ENTRIES = 4096 };

typedef struct {
  uint64_t hash;
  void *function;
  unsigned block, shared;
  PyObject *kept;  // the owner of the function, and constants that the key names by address
  uint16_t key_length, parameter_count;
  uint8_t source[MAX_ARGUMENTS];  // the argument that parameter j takes
  uint8_t key[];
} Entry;

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  Py_ssize_t count;
  uint8_t flags[MAX_ARGUMENTS];
  PyObject *slow, *blocks, *idle;
  Entry **table;
  size_t capacity, entries;
  unsigned long long hits, misses;
} Launcher;

static Entry **find(Launcher *self, const Call *call) {
  for (size_t i = call->hash & (self->capacity - 1);; i = (i + 1) & (self->capacity - 1)) {
    Entry *entry = self->table[i];
    if (entry == NULL || (entry->hash == call->hash && entry->key_length == call->length &&
                          memcmp(entry->key, call->key, call->length) == 0))
      return &self->table[i];
  }
}

static int grow(Launcher *self) {
  size_t capacity = self->capacity ? 2 * self->capacity : 16;
  Entry **table = calloc(capacity, sizeof *table);
  if (table == NULL) {
    PyErr_NoMemory();
    return 0;
  }
  for (size_t i = 0; i < self->capacity; i++) {
    if (self->table[i] == NULL) continue;
    size_t j = self->table[i]->hash & (capacity - 1);
    while (table[j] != NULL) j = (j + 1) & (capacity - 1);
    table[j] = self->table[i];
  }
  free(self->table);
  self->table = table;
  self->capacity = capacity;
  return 1;
}

// Keep what the slow call returned: (function, threads, shared bytes, sources, owner).
static int keep(Launcher *self, const Call *call, PyObject *recipe, PyObject *const *arguments) {
  unsigned long long function;
  unsigned block, shared;
  PyObject *sources, *owner;
  if (!PyArg_ParseTuple(recipe, "KIISO", &function, &block, &shared, &sources, &owner)) return 0;
  if (PyBytes_GET_SIZE(sources) > MAX_ARGUMENTS) {
    PyErr_SetString(PyExc_ValueError, "a kernel has more parameters than arguments");
    return 0;
  }
  if (self->entries >= MAX_ENTRIES) return 1;
  if (2 * (self->entries + 1) > self->capacity && !grow(self)) return 0;
  Entry **place = find(self, call);
  if (*place != NULL) return 1;  // another thread was first
  Entry *entry = malloc(sizeof *entry + call->length);
  PyObject *kept = PyList_New(0);
  int failed = entry == NULL || kept == NULL || PyList_Append(kept, owner);
  for (int i = 0; !failed && i < self->count; i++)
    if (self->flags[i] & CONSTANT) failed = PyList_Append(kept, arguments[i]);
  if (failed) {
    free(entry);
    Py_XDECREF(kept);
    if (!PyErr_Occurred()) PyErr_NoMemory();
    return 0;
  }
  entry->hash = call->hash;
  entry->function = (void *)(uintptr_t)function;
  entry->block = block;
  entry->shared = shared;
  entry->kept = kept;
  entry->key_length = (uint16_t)call->length;
  entry->parameter_count = (uint16_t)PyBytes_GET_SIZE(sources);
  memcpy(entry->source, PyBytes_AS_STRING(sources), entry->parameter_count);
  memcpy(entry->key, call->key, call->length);
  *place = entry;
  self->entries++;
  return 1;
}

