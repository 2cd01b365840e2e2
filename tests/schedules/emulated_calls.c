/* Calls kernels of TVM: from stdin their names and arguments, to stdout what the last ones became.
 *
 * A call is a line "name arguments", and for each argument a line "type bits size" (type: DLPack's
 * code) with its bytes after it. Stands in for what the kernels want of TVM's runtime; parallel
 * loops run their tasks one after the other. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm/ffi/c_api.h"

enum { MOST_ARGUMENTS = 16, ALIGNMENT = 64, TASKS = 2 };

typedef int (*Kernel)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
typedef struct { void* sync; int32_t tasks; } Group;
typedef int (*Task)(int task, Group* group, void* closure);

static void fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static void* allocate(size_t bytes) {
  void* found = NULL;
  if (posix_memalign(&found, ALIGNMENT, bytes + ALIGNMENT) != 0) fail("out of memory");
  return found;
}

static void* workspace(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  void* found = allocate(bytes);
  memset(found, 0xff, bytes); /* NaNs: nothing may be read that was not written */
  return found;
}

static int give_back(int type, int id, void* space) {
  (void)type, (void)id;
  free(space);
  return 0;
}

static int launch(Task task, void* closure, int tasks) {
  Group group = {NULL, tasks == 0 ? TASKS : tasks};
  for (int i = 0; i < group.tasks; ++i) {
    if (task(i, &group, closure) != 0) return -1;
  }
  return 0;
}

/* The kernels' object file declares these weakly, for the runtime to fill in. */
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = give_back;
int (*__TVMBackendParallelLaunch)(Task, void*, int) = launch;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fprintf(stderr, "%s", parts[i]);
  fail("");
}

int main(void) {
  char name[128], symbol[160];
  int count;
  while (scanf("%127s %d", name, &count) == 2) {
    DLTensor tensors[MOST_ARGUMENTS] = {0};
    TVMFFIAny arguments[MOST_ARGUMENTS] = {0}, result = {0};
    int64_t sizes[MOST_ARGUMENTS], stride = 1;
    size_t bytes = 0;
    if (count < 1 || count > MOST_ARGUMENTS) fail("a strange number of arguments");
    for (int i = 0; i < count; ++i) {
      int type, bits;
      long long size;
      if (scanf("%d %d %lld", &type, &bits, &size) != 3 || getchar() != '\n') fail("a cut input");
      sizes[i] = size;
      bytes = (size_t)size * bits / 8;
      tensors[i] = (DLTensor){.data = allocate(bytes), .device = {kDLCPU, 0}, .ndim = 1,
                              .dtype = {type, bits, 1}, .shape = &sizes[i], .strides = &stride};
      if (fread(tensors[i].data, 1, bytes, stdin) != bytes) fail("a cut input");
      arguments[i].type_index = kTVMFFIDLTensorPtr;
      arguments[i].v_ptr = &tensors[i];
    }
    snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name);
    Kernel kernel = (Kernel)dlsym(RTLD_DEFAULT, symbol);
    if (kernel == NULL || kernel(NULL, arguments, count, &result) != 0) fail(name);
    fwrite(tensors[count - 1].data, 1, bytes, stdout);
    for (int i = 0; i < count; ++i) free(tensors[i].data);
  }
  return 0;
}
