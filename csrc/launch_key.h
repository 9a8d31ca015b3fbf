// The key of a launch: the specialisation that Triton would choose, as bytes, and the values.
#pragma once
#include <Python.h>
#include <string.h>

#include "launch_driver.h"

// Set by setup().
static const Exchange *exchange;
static PyTypeObject *tensor_type, *parameter_type;
static int32_t device_type;  // DLPack's number of the device whose tensors are served

enum { SPECIALIZE = 1, ALIGN = 2, CONSTANT = 4 };  // of an argument
enum { MAX_ARGUMENTS = 128, MAX_TEXT = 40, MAX_KEY = 2048 };
enum { MOST_BYTES = MAX_TEXT + 2 };  // that one argument adds to a key

typedef struct {
  uint8_t key[MAX_KEY];
  size_t length;
  uint64_t hash, values[MAX_ARGUMENTS];
  int device;
} Call;

static uint64_t hash_of(const uint8_t *bytes, size_t length) {
  uint64_t hash = 1469598103934665603ull, word;
  for (; length >= 8; bytes += 8, length -= 8) {
    memcpy(&word, bytes, 8);
    hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 32;
  }
  while (length--) hash = (hash ^ *bytes++) * 1099511628211ull;
  return hash ^ (hash >> 29);
}

// The key's part of a constant, by value or, for singletons, by address; NULL if it has none.
static uint8_t *add_constant(PyObject *constant, uint8_t *key) {
  if (PyLong_CheckExact(constant)) {
    int overflow;
    int64_t value = PyLong_AsLongLongAndOverflow(constant, &overflow);
    if (overflow) return NULL;
    *key++ = 'c';
    memcpy(key, &value, 8);
    return key + 8;
  }
  if (PyFloat_CheckExact(constant)) {
    double value = PyFloat_AS_DOUBLE(constant);
    *key++ = 'd';
    memcpy(key, &value, 8);
    return key + 8;
  }
  if (PyUnicode_CheckExact(constant)) {
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(constant, &length);
    if (text == NULL || length > MAX_TEXT) return NULL;
    *key++ = 's';
    *key++ = (uint8_t)length;
    memcpy(key, text, (size_t)length);
    return key + length;
  }
  *key++ = 'o';
  memcpy(key, &constant, sizeof constant);
  return key + sizeof constant;
}

static uint8_t *add_tensor(Call *call, PyObject *tensor, uint8_t flags, uint8_t *key, int i) {
  TensorView view;
  if (exchange->view(tensor, &view) || view.device.type != device_type) return NULL;
  if (call->device < 0) call->device = view.device.id;
  if (call->device != view.device.id) return NULL;
  uint64_t address = (uint64_t)(uintptr_t)view.data + view.byte_offset;
  call->values[i] = address;
  *key++ = (flags & SPECIALIZE) && (address & 15) == 0 ? 'T' : 't';
  *key++ = view.code;
  *key++ = view.bits;
  return key;
}

// Triton's class of an integer: its width and, if it is specialised, whether it is 1 or divisible.
static uint8_t integer_class(int64_t value, uint8_t flags) {
  int wide = value != (int32_t)value;
  if (!(flags & SPECIALIZE)) return wide ? 'l' : 'i';
  if (value == 1) return '1';
  if ((flags & ALIGN) && (value & 15) == 0) return wide ? 'L' : 'I';
  return wide ? 'm' : 'j';
}

// The end of the key after argument i, or NULL if the slow call must serve it.
static uint8_t *add_argument(Call *call, PyObject *argument, uint8_t flags, uint8_t *key, int i) {
  if (flags & CONSTANT) return add_constant(argument, key);
  PyTypeObject *type = Py_TYPE(argument);
  if (type == tensor_type || type == parameter_type)
    return add_tensor(call, argument, flags, key, i);
  if (type == &PyLong_Type) {
    int overflow;
    int64_t value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (overflow) return NULL;
    call->values[i] = (uint64_t)value;
    *key++ = integer_class(value, flags);
  } else if (type == &PyFloat_Type) {
    float value = (float)PyFloat_AS_DOUBLE(argument);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    call->values[i] = bits;
    *key++ = 'f';
  } else if (argument == Py_None) {
    *key++ = 'n';
  } else if (type == &PyBool_Type) {
    call->values[i] = argument == Py_True;
    *key++ = 'b';
  } else {
    return NULL;
  }
  return key;
}

// Whether the arguments have a key; then `call` holds it and their values.
static int describe(const uint8_t *flags, Py_ssize_t count, PyObject *const *arguments,
                    uint8_t variant, Call *call) {
  uint8_t *key = call->key;
  call->device = -1;
  *key++ = variant;
  for (int i = 0; i < (int)count; i++) {
    if (key - call->key > MAX_KEY - MOST_BYTES - 1) return 0;
    key = add_argument(call, arguments[i], flags[i], key, i);
    if (key == NULL) {
      PyErr_Clear();
      return 0;
    }
  }
  if (call->device < 0) return 0;  // no tensor
  *key++ = (uint8_t)call->device;
  call->length = (size_t)(key - call->key);
  call->hash = hash_of(call->key, call->length);
  return 1;
}

