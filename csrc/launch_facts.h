// Facts about Python objects, which are compared all at once: what an answer was based on.
#pragma once
#include "launch_describe.h"

// How an object is compared; the order of KINDS in vlm_fast/ops/facts.py.
typedef enum {
  ITEM,             // object[key] is value, of a dict
  NO_ITEM,          // key is not in object
  FALSE_ITEM,       // object[key] is false or absent
  KEYS,             // the keys of object are those of the tuple value
  VALUES,           // the values of object are those of the tuple value
  LENGTH,           // object has value items
  TYPE,             // the class of object is value
  ATTRIBUTE,        // getattr(object, key) is value
  EQUAL_ATTRIBUTE,  // getattr(object, key) == value
  FALSE_ATTRIBUTE,  // getattr(object, key) is false or absent
  CALL,             // object(*key) is value
  TENSOR,           // object is a tensor of this description, a bytes
  KIND_COUNT
} FactKind;

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *facts;  // a tuple of (kind, object, key, value)
} Facts;

// The following functions return 1 for a fact that holds, 0 for one that does not, -1 for an error.

static int is_item(PyObject *dict, PyObject *key, PyObject *value) {
  PyObject *found = PyDict_GetItemWithError(dict, key);
  return found == NULL ? (PyErr_Occurred() ? -1 : 0) : found == value;
}

static int is_false_item(PyObject *dict, PyObject *key) {
  PyObject *found = PyDict_GetItemWithError(dict, key);
  if (found == NULL) return PyErr_Occurred() ? -1 : 1;
  Py_INCREF(found);
  int is_true = PyObject_IsTrue(found);
  Py_DECREF(found);
  return is_true < 0 ? -1 : !is_true;
}

static int are_items(PyObject *dict, PyObject *expected, int keys) {
  PyObject *key, *value;
  Py_ssize_t count = PyTuple_GET_SIZE(expected), at = 0, i = 0;
  if (PyDict_GET_SIZE(dict) != count) return 0;
  while (PyDict_Next(dict, &at, &key, &value)) {
    PyObject *found = keys ? key : value, *wanted = PyTuple_GET_ITEM(expected, i++);
    if (found == wanted) continue;
    int equal = keys ? PyObject_RichCompareBool(found, wanted, Py_EQ) : 0;
    if (equal <= 0) return equal;
  }
  return 1;
}

static int has_attribute(FactKind kind, PyObject *object, PyObject *name, PyObject *value) {
  PyObject *found = PyObject_GetAttr(object, name);
  if (found == NULL) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return kind == FALSE_ATTRIBUTE;
  }
  int holds = found == value;
  if (kind == EQUAL_ATTRIBUTE && !holds) holds = PyObject_RichCompareBool(found, value, Py_EQ);
  if (kind == FALSE_ATTRIBUTE) {
    int is_true = PyObject_IsTrue(found);
    holds = is_true < 0 ? -1 : !is_true;
  }
  Py_DECREF(found);
  return holds;
}

static int gives(PyObject *function, PyObject *arguments, PyObject *value) {
  PyObject *found = PyObject_CallObject(function, arguments);
  if (found == NULL) return -1;
  Py_DECREF(found);
  return found == value;
}

static int is_tensor(PyObject *object, PyObject *description) {
  Description found;
  found.length = 0;
  found.requires_grad = 0;
  size_t length = (size_t)PyBytes_GET_SIZE(description);
  if (!add_object(&found, object)) {
    PyErr_Clear();
    return 0;
  }
  return found.length == length && !memcmp(found.bytes, PyBytes_AS_STRING(description), length);
}

static int holds(PyObject *fact) {
  FactKind kind = (FactKind)PyLong_AsLong(PyTuple_GET_ITEM(fact, 0));
  PyObject *object = PyTuple_GET_ITEM(fact, 1), *key = PyTuple_GET_ITEM(fact, 2);
  PyObject *value = PyTuple_GET_ITEM(fact, 3);
  int found;
  switch (kind) {
    case ITEM: return is_item(object, key, value);
    case NO_ITEM: found = PyDict_Contains(object, key); return found < 0 ? -1 : !found;
    case FALSE_ITEM: return is_false_item(object, key);
    case KEYS: return are_items(object, value, 1);
    case VALUES: return are_items(object, value, 0);
    case LENGTH: return PyDict_GET_SIZE(object) == PyLong_AsSsize_t(value);
    case TYPE: return (PyObject *)Py_TYPE(object) == value;
    case CALL: return gives(object, key, value);
    case TENSOR: return is_tensor(object, value);
    default: return has_attribute(kind, object, key, value);
  }
}

// facts(): whether all hold, in their order up to the first that does not
static PyObject *facts_call(PyObject *object, PyObject *const *given, size_t flags,
                            PyObject *names) {
  if (names != NULL || PyVectorcall_NARGS(flags) != 0)
    return PyErr_Format(PyExc_TypeError, "facts take no arguments");
  PyObject *facts = Py_XNewRef(((Facts *)object)->facts);
  if (facts == NULL) Py_RETURN_FALSE;
  int all = 1;
  for (Py_ssize_t i = 0; all > 0 && i < PyTuple_GET_SIZE(facts); i++)
    all = holds(PyTuple_GET_ITEM(facts, i));
  Py_DECREF(facts);
  if (all < 0 && (PyErr_ExceptionMatches(PyExc_AttributeError) ||
                  PyErr_ExceptionMatches(PyExc_KeyError))) {
    PyErr_Clear();
    all = 0;
  }
  return all < 0 ? NULL : PyBool_FromLong(all);
}

// Whether a fact has the types that its kind reads.
static int is_fact(PyObject *fact) {
  if (!PyTuple_CheckExact(fact) || PyTuple_GET_SIZE(fact) != 4) return 0;
  if (!PyLong_CheckExact(PyTuple_GET_ITEM(fact, 0))) return 0;
  long kind = PyLong_AsLong(PyTuple_GET_ITEM(fact, 0));
  if (kind < 0 || kind >= KIND_COUNT) return 0;
  PyObject *object = PyTuple_GET_ITEM(fact, 1), *key = PyTuple_GET_ITEM(fact, 2);
  PyObject *value = PyTuple_GET_ITEM(fact, 3);
  if (kind <= LENGTH && !PyDict_Check(object)) return 0;
  if ((kind == KEYS || kind == VALUES) && !PyTuple_CheckExact(value)) return 0;
  if (kind == LENGTH && !PyLong_CheckExact(value)) return 0;
  if (kind >= ATTRIBUTE && kind <= FALSE_ATTRIBUTE && !PyUnicode_CheckExact(key)) return 0;
  if (kind == CALL && !PyTuple_CheckExact(key)) return 0;
  return kind != TENSOR || PyBytes_CheckExact(value);
}

// Facts(facts)
static int facts_init(PyObject *object, PyObject *arguments, PyObject *names) {
  Facts *self = (Facts *)object;
  PyObject *facts;
  if (!PyArg_ParseTuple(arguments, "O!", &PyTuple_Type, &facts)) return -1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(facts); i++) {
    if (is_fact(PyTuple_GET_ITEM(facts, i))) continue;
    PyErr_Format(PyExc_TypeError, "fact %zd is no (kind, object, key, value) of its kind", i);
    return -1;
  }
  Py_XSETREF(self->facts, Py_NewRef(facts));
  self->call = facts_call;
  return 0;
}

static PyObject *facts_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
  Facts *self = (Facts *)type->tp_alloc(type, 0);
  if (self == NULL) return NULL;
  self->facts = PyTuple_New(0);
  self->call = facts_call;
  if (self->facts == NULL) Py_CLEAR(self);
  return (PyObject *)self;
}

static int facts_traverse(PyObject *object, visitproc visit, void *arg) {
  Py_VISIT(((Facts *)object)->facts);
  return 0;
}

static int facts_clear(PyObject *object) {
  // What is cleared may still be called: then nothing is known to hold.
  PyObject *facts = ((Facts *)object)->facts;
  ((Facts *)object)->facts = NULL;
  Py_XDECREF(facts);
  return 0;
}

static void facts_dealloc(PyObject *object) {
  PyObject_GC_UnTrack(object);
  facts_clear(object);
  Py_TYPE(object)->tp_free(object);
}

static PyTypeObject FactsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "_launch.Facts",
    .tp_basicsize = sizeof(Facts),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Facts, call),
    .tp_call = PyVectorcall_Call,
    .tp_new = facts_new,
    .tp_init = facts_init,
    .tp_traverse = facts_traverse,
    .tp_clear = facts_clear,
    .tp_dealloc = facts_dealloc,
};
