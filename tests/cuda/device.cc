// A CUDA driver and runtime whose device is this machine's processor, for tests of generated code.
//
// It has just the functions that TVM's runtime calls. A module is the path of a shared library
// that was made from the kernels' source with kernels.h. Every buffer ends at a page that can't be
// touched, so that reading past it ends the process.
#include <dlfcn.h>
#include <string.h>
#include <sys/mman.h>

#include <chrono>
#include <map>
#include <string>
#include <vector>

typedef unsigned long long Word;
typedef void (*Runner)(void** params, const unsigned* dims);

struct Kernel {
  Runner run;
  int params;
};

struct Launch {
  Kernel* kernel;
  std::vector<Word> params;
  unsigned dims[6];
  void run() {
    std::vector<void*> pointers;
    for (Word& word : params) pointers.push_back(&word);
    kernel->run(pointers.data(), dims);
  }
};

struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

typedef std::vector<Launch> Graph;
typedef std::chrono::steady_clock Clock;

static std::map<void*, std::pair<void*, size_t>> mapped;
static Graph* capturing;
static const size_t kPage = 4096, kAlignment = 256;
static const int kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotFound = 500;
static const int kOutOfResources = 701;

// What the device has left for new buffers.
extern "C" size_t emulated_memory;
size_t emulated_memory = ~static_cast<size_t>(0);

// How many threads of a block have the registers that they need.
extern "C" int emulated_threads;
int emulated_threads = 1024;

// What a test may ask: launches since the start, by themselves and in graphs.
extern "C" int emulated_launches, emulated_graphs;
int emulated_launches, emulated_graphs;

extern "C" {
int cuInit(unsigned) { return kOk; }
int cuDriverGetVersion(int* version) { return *version = 13000, kOk; }
int cuDeviceGetCount(int* count) { return *count = 1, kOk; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == 75 ? 9 : 0, kOk;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  return *module ? kOk : kInvalidValue;
}
int cuModuleUnload(void*) { return kOk; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  void* run = dlsym(module, (std::string(name) + "_run").c_str());
  void* params = dlsym(module, (std::string(name) + "_params").c_str());
  if (!run || !params) return kNotFound;
  *function = new Kernel{reinterpret_cast<Runner>(run), *static_cast<int*>(params)};
  return kOk;
}
int cuLaunchKernelEx(const Config* config, void* function, void** params, void**) {
  const unsigned* block = config->block;
  if (block[0] * block[1] * block[2] > emulated_threads) return kOutOfResources;
  Kernel* kernel = static_cast<Kernel*>(function);
  Launch launch{kernel, {}, {}};
  for (int i = 0; i < kernel->params; i++) {
    Word word;
    memcpy(&word, params[i], sizeof word);
    launch.params.push_back(word);
  }
  memcpy(launch.dims, config->grid, sizeof config->grid);
  memcpy(launch.dims + 3, config->block, sizeof config->block);
  if (capturing) {
    capturing->push_back(launch);
    return kOk;
  }
  emulated_launches++;
  launch.run();
  return kOk;
}
int cuFuncSetAttribute(void*, int, int) { return kOk; }
int cuGetErrorName(int error, const char** text) {
  *text = error == kOutOfResources ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "emulated error";
  return kOk;
}
int cuGetErrorString(int, const char** text) { return *text = "emulated error", kOk; }
int cuTensorMapEncodeTiled() { return kInvalidValue; }
int cuDeviceGetName(char* name, int size, int) {
  strncpy(name, "emulated", size);
  return kOk;
}

int cuDeviceGetPCIBusId(char* name, int size, int) {
  strncpy(name, "0000:01:00.0", size);
  return kOk;
}

int cudaGetDeviceCount(int* count) { return *count = 1, kOk; }
int cudaSetDevice(int) { return kOk; }
int cudaGetDevice(int* device) { return *device = 0, kOk; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: *value = 1024; break;        // threads of a block
    case 8: *value = 48 << 10; break;    // shared memory of a block
    case 10: *value = 32; break;         // warp
    case 13: *value = 1000000; break;    // clock, kHz
    case 16: *value = 1; break;          // multiprocessors
    case 75: *value = 9; break;          // compute capability
    default: *value = 0;
  }
  return kOk;
}
int cudaGetDeviceProperties(void*, int) { return kInvalidValue; }
int cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = 1 << 30, kOk; }
int cudaMalloc(void** pointer, size_t size) {
  size = (size + kAlignment - 1) / kAlignment * kAlignment;
  if (size > emulated_memory) return kOutOfMemory;
  emulated_memory -= size;
  size_t pages = (size + kPage - 1) / kPage * kPage;
  char* start = static_cast<char*>(mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return kInvalidValue;
  mprotect(start + pages, kPage, PROT_NONE);
  memset(start, 0xff, pages);  // NaN
  *pointer = start + pages - size;
  mapped[*pointer] = {start, pages + kPage};
  return kOk;
}
int cudaFree(void* pointer) {
  auto found = mapped.find(pointer);
  if (found == mapped.end()) return pointer ? kInvalidValue : kOk;
  munmap(found->second.first, found->second.second);
  mapped.erase(found);
  return kOk;
}
int cudaMallocHost(void** pointer, size_t size) { return cudaMalloc(pointer, size); }
int cudaFreeHost(void* pointer) { return cudaFree(pointer); }
int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) {
  if (capturing) return kInvalidValue;
  memcpy(to, from, size);
  return kOk;
}
int cudaMemcpyPeerAsync() { return kInvalidValue; }
int cudaGetLastError() { return kOk; }
int cudaPeekAtLastError() { return kOk; }
const char* cudaGetErrorName(int) { return "emulated error"; }
const char* cudaGetErrorString(int error) {
  return error == kOutOfMemory ? "out of memory" : "emulated error";
}

int cudaStreamCreate(void** stream) { return *stream = new char, kOk; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void* stream) { return delete static_cast<char*>(stream), kOk; }
int cudaStreamSynchronize(void*) { return kOk; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return kOk; }
int cudaEventCreate(void** event) { return *event = new Clock::time_point, kOk; }
int cudaEventDestroy(void* event) { return delete static_cast<Clock::time_point*>(event), kOk; }
int cudaEventRecord(void* event, void*) {
  return *static_cast<Clock::time_point*>(event) = Clock::now(), kOk;
}
int cudaEventSynchronize(void*) { return kOk; }
int cudaEventElapsedTime(float* ms, void* start, void* end) {
  auto spent = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
  return *ms = std::chrono::duration<float, std::milli>(spent).count(), kOk;
}
int cudaStreamBeginCapture(void*, int) { return capturing = new Graph, kOk; }
int cudaStreamEndCapture(void*, void** graph) {
  *graph = capturing;
  capturing = nullptr;
  return kOk;
}
int cudaGraphInstantiate(void** executable, void* graph, Word) {
  return *executable = new Graph(*static_cast<Graph*>(graph)), kOk;
}
int cudaGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), kOk; }
int cudaGraphExecDestroy(void* graph) { return delete static_cast<Graph*>(graph), kOk; }
int cudaGraphLaunch(void* executable, void*) {
  emulated_graphs++;
  for (Launch& launch : *static_cast<Graph*>(executable)) launch.run();
  return kOk;
}
}
