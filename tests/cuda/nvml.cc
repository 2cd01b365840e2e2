// NVIDIA's management library for the GPU that is none, with the functions that topiarist calls.
#include <string.h>

extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) {
  strncpy(text, "0.0.emulated", size);
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** device) {
  *device = nullptr;
  return strcmp(bus, "0000:01:00.0");
}
int nvmlDeviceGetClockInfo(void*, int which, unsigned* mhz) {
  *mhz = which == 1 ? 1234 : 567;  // of multiprocessors, of memory
  return 0;
}
}
