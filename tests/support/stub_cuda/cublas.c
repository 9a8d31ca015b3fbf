// A cuBLAS that computes nothing. Matrix products are counted; they take no time.
//
// Functions of the real library that are not here do nothing and return 0 (stub_libraries.py).
#include <stddef.h>

static unsigned long long products;
static char handle[64];

unsigned long long stub_products(void) { return products; }

int cublasCreate_v2(void **created) { *created = handle; return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetProperty(int kind, int *value) { *value = 13; return 0; }
int cublasGetVersion_v2(void *h, int *version) { *version = 130100; return 0; }
const char *cublasGetStatusString(int status) { return "a status of the stub"; }

// What ATen calls for bfloat16, float16 and float32; arguments do not matter.
#define PRODUCT(name) \
  int name(void) { products++; return 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmEx_64)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmStridedBatchedEx_64)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmBatchedEx_64)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemm_v2_64)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemmStridedBatched_64)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSgemv_v2_64)
