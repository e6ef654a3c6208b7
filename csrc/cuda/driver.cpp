// The CUDA kernels on a GPU: finds the driver at run time, so that one build serves machines with and without one,
// loads the fatbin, and launches.
#include "cuda/driver.h"

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/kernel_names.h"
#include "cuda/launch.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

#ifndef GRADSEL_SOURCE
#define GRADSEL_SOURCE "unknown"  // setup.py passes a hash
#endif

namespace gradsel {
namespace {

// The driver's interface, as far as it is used here: cuda.h is not needed to build this.
using Result = int;
using Device = int;
using Handle = void*;  // contexts, libraries, kernels, functions and streams

constexpr int kMultiprocessors = 16, kMajor = 75;  // attributes of a device
constexpr int kOldestDriver = 12010;               // the first that takes 32 kB of parameters
constexpr int kOldestArchitecture = 8;
constexpr int kRelaxed = 2;                        // a capture mode: the thread may do anything meanwhile

#define GRADSEL_DRIVER(X)                                                                                             \
  X(cuInit, (unsigned))                                                                                               \
  X(cuDriverGetVersion, (int*))                                                                                       \
  X(cuDeviceGet, (Device*, int))                                                                                      \
  X(cuDeviceGetAttribute, (int*, int, Device))                                                                        \
  X(cuDevicePrimaryCtxRetain, (Handle*, Device))                                                                      \
  X(cuCtxGetCurrent, (Handle*))                                                                                       \
  X(cuCtxPushCurrent_v2, (Handle))                                                                                    \
  X(cuCtxPopCurrent_v2, (Handle*))                                                                                    \
  X(cuLibraryLoadData, (Handle*, const void*, void*, void*, unsigned, void*, void*, unsigned))                        \
  X(cuLibraryGetKernel, (Handle*, Handle, const char*))                                                               \
  X(cuKernelGetFunction, (Handle*, Handle))                                                                           \
  X(cuLaunchKernel,                                                                                                   \
    (Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, void**))           \
  X(cuThreadExchangeStreamCaptureMode, (int*))                                                                        \
  X(cuGetErrorString, (Result, const char**))

struct Driver {
#define GRADSEL_DECLARE(name, arguments) Result(*name) arguments = nullptr;
  GRADSEL_DRIVER(GRADSEL_DECLARE)
#undef GRADSEL_DECLARE
  Result (*cuFuncLoad)(Handle) = nullptr;  // since CUDA 12.4
  std::string missing;                     // why it cannot be used; empty: it can

  Driver() { missing = open(); }

 private:
  std::string open() {
#if defined(__linux__)
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return "there is no NVIDIA driver (libcuda.so.1 cannot be loaded).";
#define GRADSEL_FIND(name, arguments)                                                \
  name = reinterpret_cast<Result(*) arguments>(dlsym(library, #name));               \
  if (!name) return "the NVIDIA driver has no " #name "; CUDA 12.1 or later has it.";
    GRADSEL_DRIVER(GRADSEL_FIND)
#undef GRADSEL_FIND
    cuFuncLoad = reinterpret_cast<Result (*)(Handle)>(dlsym(library, "cuFuncLoad"));
    int version = 0;
    if (cuInit(0) != 0 || cuDriverGetVersion(&version) != 0) return "the NVIDIA driver finds no device.";
    if (version < kOldestDriver)
      return "the NVIDIA driver is for CUDA " + std::to_string(version / 1000) + "." +
             std::to_string(version % 1000 / 10) + "; these kernels need 12.1 or later.";
    return "";
#else
    return "CUDA C++ kernels are loaded on Linux only.";
#endif
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

void check(Result result, const std::string& what) {
  if (result == 0) return;
  const char* text = nullptr;
  driver().cuGetErrorString(result, &text);
  throw std::runtime_error(what + ": " + (text ? text : "unknown error") + " (CUDA error " + std::to_string(result) +
                           ")");
}

constexpr const char* kNames[] = {
#define GRADSEL_NAME(name) #name,
    GRADSEL_CUDA_KERNELS(GRADSEL_NAME)
#undef GRADSEL_NAME
};
constexpr size_t kKernels = sizeof(kNames) / sizeof(kNames[0]);

// A kernel that only a fatbin built from these sources has.
constexpr const char* kMark = "gradsel_source_" GRADSEL_SOURCE;

// What is loaded. The primary context of a device is the one that torch uses.
struct Loaded {
  Handle context = nullptr;
  int multiprocessors = 0;
  std::array<Handle, kKernels> functions{};
  bool ready = false;
};

std::mutex mutex;
std::string image;  // the fatbin
Handle library = nullptr;
std::map<int, Loaded> devices;  // by number; what is in a map stays where it is

// Makes a context current during its lifetime, unless it already is.
class CurrentContext {
 public:
  explicit CurrentContext(Handle context) {
    Handle now = nullptr;
    check(driver().cuCtxGetCurrent(&now), "finding the CUDA context");
    if (now == context) return;
    check(driver().cuCtxPushCurrent_v2(context), "entering the CUDA context");
    pushed_ = true;
  }
  ~CurrentContext() {
    Handle popped;
    if (pushed_) driver().cuCtxPopCurrent_v2(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

// Lets this thread load kernels while a stream is captured, which the driver would otherwise refuse: loading does not
// become part of the graph.
class Relaxed {
 public:
  Relaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  int mode_ = kRelaxed;
};

// All kernels are loaded when the first one is asked for.
const Loaded& loaded(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  Loaded& found = devices[device];
  if (found.ready) return found;
  if (const std::string reason = driver().missing; !reason.empty()) throw std::runtime_error(reason);
  if (image.empty()) throw std::runtime_error("the CUDA kernels have not been given");
  const Relaxed relaxed;
  Device handle = 0;
  check(driver().cuDeviceGet(&handle, device), "finding CUDA device " + std::to_string(device));
  check(driver().cuDeviceGetAttribute(&found.multiprocessors, kMultiprocessors, handle), "reading the device");
  if (!found.context) check(driver().cuDevicePrimaryCtxRetain(&found.context, handle), "entering the device");
  const CurrentContext current(found.context);
  if (!library)
    check(driver().cuLibraryLoadData(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
          "loading the CUDA kernels");
  Handle kernel = nullptr;
  if (driver().cuLibraryGetKernel(&kernel, library, kMark) != 0)
    throw std::runtime_error("kernels.fatbin and the C++ extension are of different sources; build both again");
  for (size_t i = 0; i < kKernels; ++i) {
    check(driver().cuLibraryGetKernel(&kernel, library, kNames[i]), std::string("finding ") + kNames[i]);
    check(driver().cuKernelGetFunction(&found.functions[i], kernel), std::string("loading ") + kNames[i]);
    if (driver().cuFuncLoad) check(driver().cuFuncLoad(found.functions[i]), std::string("loading ") + kNames[i]);
  }
  found.ready = true;
  return found;
}

Handle function_of(const Loaded& device, const char* name) {
  for (size_t i = 0; i < kKernels; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return device.functions[i];
  throw std::runtime_error(std::string("there is no kernel ") + name);
}

}  // namespace

void cuda_load(const std::string& fatbin) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (image.empty()) image = fatbin;
}

std::string cuda_why_off(int device) {
  const Driver& found = driver();
  if (!found.missing.empty()) return found.missing;
  Device handle = 0;
  int major = 0;
  if (found.cuDeviceGet(&handle, device) != 0 || found.cuDeviceGetAttribute(&major, kMajor, handle) != 0)
    return "the NVIDIA driver finds no device " + std::to_string(device) + ".";
  if (major < kOldestArchitecture)
    return "the device has compute capability " + std::to_string(major) + ".x; these kernels need 8.0 or later.";
  try {
    loaded(device);  // an old driver may not load what a newer compiler has made
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) + ".";
  }
  return "";
}

int cuda_multiprocessors(int device) { return loaded(device).multiprocessors; }

void cuda_launch(const Launch& launch, void** params) {
  const Loaded& device = loaded(launch.device);
  const CurrentContext current(device.context);
  check(driver().cuLaunchKernel(function_of(device, launch.kernel), launch.grid, 1, 1, launch.block, 1, 1,
                                launch.shared_bytes, reinterpret_cast<Handle>(static_cast<intptr_t>(launch.stream)),
                                params, nullptr),
        std::string("launching ") + launch.kernel);
}

}  // namespace gradsel
