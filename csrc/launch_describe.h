// What an op's checks look at of its arguments, as bytes: equal bytes pass the same checks.
#pragma once
#include "launch_key.h"

enum { MAX_DESCRIPTION = 4096, MAX_RANK = 6, MOST_OF_TENSOR = 8 + 16 * MAX_RANK };

static PyObject *requires_grad_name;

typedef struct {
  uint8_t bytes[MAX_DESCRIPTION];
  size_t length;
  int requires_grad;  // of any tensor
} Description;

// Whether the object is None, a dense tensor of torch's own classes, or a list of such.
static int add_object(Description *out, PyObject *object) {
  if (out->length > MAX_DESCRIPTION - MOST_OF_TENSOR - 2) return 0;
  uint8_t *end = out->bytes + out->length;
  PyTypeObject *type = Py_TYPE(object);
  if (object == Py_None) {
    *end = 'n';
    out->length++;
    return 1;
  }
  if (type == &PyList_Type || type == &PyTuple_Type) {
    *end = type == &PyList_Type ? '[' : '(';
    out->length++;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); i++)
      if (!add_object(out, PySequence_Fast_GET_ITEM(object, i))) return 0;
    if (out->length > MAX_DESCRIPTION - 2) return 0;  // deeply nested lists end all at once
    out->bytes[out->length++] = ']';
    return 1;
  }
  if (type != tensor_type && type != parameter_type) return 0;
  TensorView view;
  if (exchange->view(object, &view) || view.ndim > MAX_RANK) return 0;
  PyObject *grad = PyObject_GetAttr(object, requires_grad_name);
  if (grad == NULL) return 0;
  out->requires_grad |= grad == Py_True;
  Py_DECREF(grad);
  *end++ = (uint8_t)('0' + view.ndim);
  *end++ = view.code;
  *end++ = view.bits;
  *end++ = (uint8_t)view.device.type;
  *end++ = (uint8_t)view.device.id;
  memcpy(end, view.shape, 8 * (size_t)view.ndim);
  end += 8 * view.ndim;
  memcpy(end, view.strides, 8 * (size_t)view.ndim);
  out->length = (size_t)(end - out->bytes) + 8 * (size_t)view.ndim;
  return 1;
}

// describe(arguments): (dtypes, devices, shapes and strides as bytes, whether any requires a
// gradient); None for other objects than tensors, None and lists, or for too many.
static PyObject *describe_arguments(PyObject *module, PyObject *arguments) {
  Description found;
  found.length = 0;
  found.requires_grad = 0;
  if (!PyTuple_CheckExact(arguments)) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); i++) {
    if (add_object(&found, PyTuple_GET_ITEM(arguments, i))) continue;
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  found.bytes[found.length++] = (uint8_t)found.requires_grad;
  return PyBytes_FromStringAndSize((char *)found.bytes, (Py_ssize_t)found.length);
}
