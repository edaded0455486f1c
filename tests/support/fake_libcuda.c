// A driver for tests of what is said when a GPU cannot be used: as much of libcuda as it takes to open one, give it memory and launch,
// with host memory for the device's. Kernels are not run. Built by tests/cli_devices.rs; what is wrong with it stands in the environment.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static size_t number(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static size_t used; // bytes

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = (int)number("FAKE_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Pretended GPU", (size_t)length); return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int capability = (int)number("FAKE_CAPABILITY", 80);
    switch (attribute) {
        case 16: *value = 4; break; // multiprocessors
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        default: *value = 100 << 10;
    }
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == 2 ? "out of memory" : error == 700 ? "an illegal memory access was encountered" : "too many resources requested";
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &used; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = &used; return 0; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &used; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &used; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }

// What a kernel did wrong is told by the next call that waits for it.
int cuLaunchKernelEx(const void *config, void *function, void **args, void **extra) { return (int)number("FAKE_LAUNCH", 0); }
int cuStreamSynchronize(void *stream) { return (int)number("FAKE_WAIT", 0); }

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = number("FAKE_MEMORY", 1 << 30);
    *free = *total - used;
    return 0;
}

int cuMemAlloc_v2(void **pointer, size_t bytes) {
    size_t free, total;
    cuMemGetInfo_v2(&free, &total);
    if (bytes > free) {
        return 2;
    }
    used += bytes;
    *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return 0;
}

int cuMemFree_v2(void *pointer) { free(pointer); return 0; }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) { memcpy(to, from, bytes); return 0; }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) { memcpy(to, from, bytes); return 0; }
int cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }
