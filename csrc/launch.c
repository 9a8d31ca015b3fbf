// The host's work for a call: launches of compiled Triton kernels without Triton's binder,
// descriptions of tensors, and comparisons of facts.
//
// A Launcher holds one kernel's compiled variants. A call makes a key from the arguments: the
// specialisation that Triton would choose. If the key is known, the kernel is launched with the
// driver; else the slow call, which is Triton's own launch, returns what is needed to remember it.
//
// Plain C API of Python, no headers of torch or CUDA. Tensors are read through DLPack's exchange
// table (DLPack 1.3, `torch.Tensor.__dlpack_c_exchange_api__`).
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <stddef.h>

#include "launch_call.h"
#include "launch_describe.h"
#include "launch_facts.h"

// ---- the type ----

// Launcher(slow, flags, blocks, idle)
static int launcher_init(PyObject *object, PyObject *arguments, PyObject *names) {
  Launcher *self = (Launcher *)object;
  PyObject *slow, *flags, *blocks, *idle;
  if (exchange == NULL || launch_kernel == NULL) {
    PyErr_SetString(PyExc_RuntimeError, "use_driver() must be called before");
    return -1;
  }
  if (!PyArg_ParseTuple(arguments, "OSO!O!", &slow, &flags, &PyTuple_Type, &blocks, &PyTuple_Type,
                        &idle))
    return -1;
  self->count = PyBytes_GET_SIZE(flags);
  if (self->count > MAX_ARGUMENTS || PyTuple_GET_SIZE(blocks) > 255) {
    PyErr_SetString(PyExc_ValueError, "a kernel has at most 128 arguments and 255 configs");
    return -1;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(idle); i++) {
    PyObject *item = PyTuple_GET_ITEM(idle, i);
    int setting = PyTuple_CheckExact(item) && PyTuple_GET_SIZE(item) == 3 &&
                  PyDict_CheckExact(PyTuple_GET_ITEM(item, 0));
    if (!setting && !PyDict_CheckExact(item) && !PyList_CheckExact(item)) {
      PyErr_SetString(PyExc_TypeError, "idle holds dicts, lists and settings (dict, key, value)");
      return -1;
    }
  }
  memcpy(self->flags, PyBytes_AS_STRING(flags), (size_t)self->count);
  self->slow = Py_NewRef(slow);
  self->blocks = Py_NewRef(blocks);
  self->idle = Py_NewRef(idle);
  self->call = launcher_call;
  return grow(self) ? 0 : -1;
}

static int launcher_traverse(PyObject *object, visitproc visit, void *arg) {
  Launcher *self = (Launcher *)object;
  Py_VISIT(self->slow);
  Py_VISIT(self->blocks);
  Py_VISIT(self->idle);
  for (size_t i = 0; i < self->capacity; i++)
    if (self->table[i] != NULL) Py_VISIT(self->table[i]->kept);
  return 0;
}

static int launcher_clear(PyObject *object) {
  Launcher *self = (Launcher *)object;
  Entry **table = self->table;
  size_t capacity = self->capacity;
  self->table = NULL;
  self->capacity = self->entries = 0;
  for (size_t i = 0; i < capacity; i++) {
    if (table[i] == NULL) continue;
    Py_DECREF(table[i]->kept);
    free(table[i]);
  }
  free(table);
  Py_CLEAR(self->slow);
  Py_CLEAR(self->blocks);
  Py_CLEAR(self->idle);
  return 0;
}

static void launcher_dealloc(PyObject *object) {
  PyObject_GC_UnTrack(object);
  launcher_clear(object);
  Py_TYPE(object)->tp_free(object);
}

static PyObject *launcher_counts(PyObject *object, PyObject *unused) {
  Launcher *self = (Launcher *)object;
  return Py_BuildValue("(KKn)", self->hits, self->misses, (Py_ssize_t)self->entries);
}

// key(variant, *arguments)
static PyObject *launcher_key(PyObject *object, PyObject *const *given, Py_ssize_t count) {
  Launcher *self = (Launcher *)object;
  if (count != 1 + self->count)
    return PyErr_Format(PyExc_TypeError, "the kernel takes %zd arguments, got %zd", self->count,
                        count - 1);
  long variant = PyLong_AsLong(given[0]);
  if (variant == -1 && PyErr_Occurred()) return NULL;
  Call call;
  if (!describe(self->flags, self->count, given + 1, (uint8_t)variant, &call)) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize((char *)call.key, (Py_ssize_t)call.length);
}

static PyMethodDef launcher_methods[] = {
    {"key", (PyCFunction)(void *)launcher_key, METH_FASTCALL,
     "What distinguishes the compiled kernels; None if the slow call must serve."},
    {"counts", launcher_counts, METH_NOARGS, "Hits, misses and entries."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject LauncherType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "_launch.Launcher",
    .tp_basicsize = sizeof(Launcher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Launcher, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = PyType_GenericNew,
    .tp_init = launcher_init,
    .tp_traverse = launcher_traverse,
    .tp_clear = launcher_clear,
    .tp_dealloc = launcher_dealloc,
    .tp_methods = launcher_methods,
};

// ---- the module ----

// read_tensors(Tensor, Parameter); ImportError if this torch has no exchange table
static PyObject *read_tensors(PyObject *module, PyObject *arguments) {
  PyObject *tensor, *parameter;
  if (!PyArg_ParseTuple(arguments, "O!O!", &PyType_Type, &tensor, &PyType_Type, &parameter))
    return NULL;
  PyObject *capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  const Exchange *table = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
  Py_XDECREF(capsule);  // the table is static
  if (table == NULL || table->major != 1 || table->view == NULL || table->stream == NULL) {
    PyErr_Clear();
    PyErr_SetString(PyExc_ImportError, "torch has no exchange table of DLPack 1");
    return NULL;
  }
  tensor_type = (PyTypeObject *)Py_NewRef(tensor);
  parameter_type = (PyTypeObject *)Py_NewRef(parameter);
  exchange = table;
  Py_RETURN_NONE;
}

// use_driver(device type of DLPack whose tensors are launched on); ImportError without a driver
static PyObject *use_driver(PyObject *module, PyObject *type) {
  int number = (int)PyLong_AsLong(type);
  if (number == -1 && PyErr_Occurred()) return NULL;
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (driver != NULL) {
    launch_kernel = dlsym(driver, "cuLaunchKernelEx");
    current_device = dlsym(driver, "cuCtxGetDevice");
    error_name = dlsym(driver, "cuGetErrorString");
  }
  if (exchange == NULL || launch_kernel == NULL || current_device == NULL || error_name == NULL) {
    PyErr_SetString(PyExc_ImportError, "libcuda.so.1 has no cuLaunchKernelEx");
    return NULL;
  }
  device_type = number;
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"read_tensors", read_tensors, METH_VARARGS, "Set the classes of tensors that are read."},
    {"use_driver", use_driver, METH_O, "Launch on devices of this type with the CUDA driver."},
    {"describe", describe_arguments, METH_O, "Dtypes, devices, shapes and strides as bytes."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_launch",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__launch(void) {
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  if (requires_grad_name == NULL || PyType_Ready(&LauncherType) < 0 ||
      PyType_Ready(&FactsType) < 0)
    return NULL;
  PyObject *module = PyModule_Create(&definition);
  if (module != NULL && (PyModule_AddObjectRef(module, "Launcher", (PyObject *)&LauncherType) < 0 ||
                         PyModule_AddObjectRef(module, "Facts", (PyObject *)&FactsType) < 0))
    Py_CLEAR(module);
  return module;
}
