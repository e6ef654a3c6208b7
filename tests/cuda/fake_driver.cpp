// A stand-in for libcuda.so.1: it runs nothing, and writes down what it is asked for. The environment says how it fails.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

int setting(const char* name, int usual) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : usual;
}

void say(const std::string& line) {
  std::FILE* file = std::fopen(std::getenv("FAKE_LOG"), "a");
  std::fprintf(file, "%s\n", line.c_str());
  std::fclose(file);
}

// Handles are addresses of these.
char contexts[2];
char library;
thread_local std::vector<void*> stack;  // of current contexts

}  // namespace

extern "C" {

int cuInit(unsigned) { return setting("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) {
  *version = setting("FAKE_VERSION", 13000);
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 2 ? 0 : 101;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 16 ? 132 : attribute == 75 ? setting("FAKE_MAJOR", 9) : -1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  say("retain " + std::to_string(device));
  *context = contexts + device;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = stack.empty() ? nullptr : stack.back();
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  stack.push_back(context);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  if (stack.empty()) say("popped from an empty stack");
  *context = stack.back();
  stack.pop_back();
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static thread_local int now = 0;
  std::swap(now, *mode);
  return 0;
}
int cuLibraryLoadData(void** found, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  say(std::string("load ") + static_cast<const char*>(code));
  *found = &library;
  return setting("FAKE_LOAD", 0);
}
int cuLibraryGetKernel(void** kernel, void*, const char* name) {
  if (std::strncmp(name, "gradsel_source_", 15) == 0) return setting("FAKE_MARK", 0);
  *kernel = const_cast<char*>(strdup(name));
  return 0;
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return stack.empty() ? 201 : 0;
}
int cuFuncLoad(void*) { return 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
  char line[256];
  std::snprintf(line, sizeof(line), "%s device %d grid %u %u %u block %u %u %u shared %u stream %zu first %llx%s",
                static_cast<const char*>(function),
                stack.empty() ? -1 : static_cast<int>(static_cast<char*>(stack.back()) - contexts), x, y, z, bx, by, bz,
                shared, reinterpret_cast<size_t>(stream), *static_cast<unsigned long long*>(params[0]),
                extra ? " extra" : "");
  say(line);
  return setting("FAKE_LAUNCH", 0);
}
#ifndef WITHOUT_ERROR_STRINGS
int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : "a fake error";
  return 0;
}
#endif

}  // extern "C"
