/* Finding functions, and naming errors.
 *
 * cuGetProcAddress_v2 finds what the files here define, under the name without its version: of no function are
 * there two versions here, for the one that is asked for would have to be told from the other. What is not defined is not found, and
 * whoever needs it says so; EMULATED_CUDA_TRACE=1 prints what was asked for in vain.
 */

#define _GNU_SOURCE
#include "emulated.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static const struct {
    CUresult result;
    const char *name;
    const char *story;
} errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "memory is page-locked already"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "memory is not page-locked"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

enum { ERRORS = sizeof errors / sizeof *errors };

EXPORT CUresult cuGetErrorName(CUresult result, const char **name) {
    for (int i = 0; i < ERRORS; i++)
        if (errors[i].result == result) {
            *name = errors[i].name;
            return CUDA_SUCCESS;
        }
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult result, const char **story) {
    for (int i = 0; i < ERRORS; i++)
        if (errors[i].result == result) {
            *story = errors[i].story;
            return CUDA_SUCCESS;
        }
    *story = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    static const char *suffixes[] = {"_v3", "_v2", ""};
    static void *self;
    (void)version, (void)flags;
    if (!self) {
        Dl_info info;
        dladdr(errors, &info);
        self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    *function = NULL;
    for (int i = 0; i < 3 && !*function; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(self, name);
    }
    if (status)
        *status = *function ? 0 : 1;
    if (!*function && getenv("EMULATED_CUDA_TRACE"))
        fprintf(stderr, "emulated CUDA: there is no %s\n", symbol);
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
