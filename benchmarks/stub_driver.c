/* cuLaunchKernelEx that records what it is given. A function handle is the address of a `kernel` of the caller. */
#include <cuda.h>
#include <string.h>

enum { PARAMETERS = 64, RECORDS = 64 };

struct kernel {
  int count;
  int sizes[PARAMETERS];
};

struct record {
  const struct kernel *kernel;
  unsigned grid[3], threads, shared;
  unsigned char parameters[PARAMETERS][8];
};

struct record records[RECORDS];
unsigned recorded; /* the last RECORDS are kept */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  struct record *to = &records[recorded++ % RECORDS];
  to->kernel = (const struct kernel *)function;
  to->grid[0] = config->gridDimX;
  to->grid[1] = config->gridDimY;
  to->grid[2] = config->gridDimZ;
  to->threads = config->blockDimX;
  to->shared = config->sharedMemBytes;
  for (int i = 0; i < to->kernel->count; i++)
    memcpy(to->parameters[i], parameters[i], to->kernel->sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
