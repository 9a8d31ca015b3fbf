// A cuBLASLt that computes nothing. Matrix products are counted; they take no time.
//
// Functions of the real library that are not here do nothing and return 0 (stub_libraries.py).
#include <stdlib.h>
#include <string.h>

#define RESULT_BYTES 96  // sizeof(cublasLtMatmulHeuristicResult_t)

static unsigned long long products;
static char handle[64];

unsigned long long stub_products_lt(void) { return products; }

int cublasLtMatmul(void) { products++; return 0; }
int cublasLtCreate(void **created) { *created = handle; return 0; }
unsigned long cublasLtGetVersion(void) { return 130100; }
const char *cublasLtGetStatusString(int status) { return "a status of the stub"; }

static int make(void **created) { *created = malloc(256); return 0; }
static int drop(void *made) { free(made); return 0; }

int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return make(d); }
int cublasLtMatmulDescDestroy(void *d) { return drop(d); }
int cublasLtMatmulPreferenceCreate(void **p) { return make(p); }
int cublasLtMatmulPreferenceDestroy(void *p) { return drop(p); }
int cublasLtMatrixLayoutCreate(void **l, int type, unsigned long long rows,
                               unsigned long long columns, long long stride) {
  return make(l);
}
int cublasLtMatrixLayoutDestroy(void *l) { return drop(l); }

int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *out, void *p,
                                   int most, void *results, int *found) {
  memset(results, 0, RESULT_BYTES);
  *found = 1;
  return 0;
}
