/* Devices, as far as CUDA_VISIBLE_DEVICES shows them, and their primary contexts. There are no other contexts. */

#include "emulated.h"
#include "identity.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ordinal -> which of the machine's devices it is. */
static int visible[DEVICES_MAX];
static int nvisible;
static struct context primary[DEVICES_MAX];

enum { DEPTH_MAX = 64 };

static __thread struct context *stack[DEPTH_MAX];
static __thread int depth;

static int named(const char *name) {
    char uuid[UUID_TEXT];
    char *end;
    long number = strtol(name, &end, 10);
    if (end != name && *end == '\0')
        return number >= 0 && number < em_settings.devices ? (int)number : -1;
    for (int i = 0; i < em_settings.devices; i++) {
        uuid_text(i, uuid);
        if (strncmp(name, uuid, strlen(name)) == 0 && strlen(name) > strlen("GPU-"))
            return i;
    }
    return -1;
}

/* As the real one does: the list ends at the first name that means no device. */
static void look(void) {
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    if (!list) {
        for (nvisible = 0; nvisible < em_settings.devices; nvisible++)
            visible[nvisible] = nvisible;
        return;
    }
    char *copy = strdup(list), *rest = copy, *name;
    while ((name = strsep(&rest, ",")) && nvisible < DEVICES_MAX) {
        int device = named(name);
        if (device < 0)
            break;
        visible[nvisible++] = device;
    }
    free(copy);
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool initialized;

static void initialize(void) {
    em_read_settings();
    look();
    initialized = em_open_memory() == CUDA_SUCCESS;
    for (int i = 0; i < DEVICES_MAX; i++)
        primary[i].device = i;
}

int em_visible_devices(void) { return nvisible; }

int em_physical(CUdevice device) { return visible[device]; }

bool em_is_device(CUdevice device) { return device >= 0 && device < nvisible; }

struct context *em_current(void) { return depth ? stack[depth - 1] : NULL; }

struct context *em_primary(int device) { return &primary[device]; }

static bool is_context(struct context *context) { return context >= primary && context < primary + DEVICES_MAX; }

EXPORT CUresult cuInit(unsigned flags) {
    if (flags)
        return CUDA_ERROR_INVALID_VALUE;
    pthread_once(&once, initialize);
    if (!initialized)
        return CUDA_ERROR_OUT_OF_MEMORY;
    return nvisible ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (!initialized)
        return CUDA_ERROR_NOT_INITIALIZED;
    *device = ordinal;
    return em_is_device(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = nvisible;
    return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, DEVICE_NAME, em_physical(device));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice device) {
    if (!em_is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    uuid_bytes(em_physical(device), uuid);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t *nbytes, CUdevice device) {
    *nbytes = em_settings.capacity;
    return em_is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    if (!em_is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
    case 1: /* MAX_THREADS_PER_BLOCK */
        *value = 1024;
        break;
    case 10: /* WARP_SIZE */
        *value = 32;
        break;
    case 16: /* MULTIPROCESSOR_COUNT */
    case 19: /* CAN_MAP_HOST_MEMORY */
    case 41: /* UNIFIED_ADDRESSING */
    case 115: /* MEMORY_POOLS_SUPPORTED */
        *value = 1;
        break;
    case 33: /* PCI_BUS_ID */
        *value = em_physical(device) + 1;
        break;
    case 40: /* ASYNC_ENGINE_COUNT */
        *value = 2;
        break;
    case 75: /* COMPUTE_CAPABILITY_MAJOR */
        *value = 9;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    *can = 0;
    return em_is_device(device) && em_is_device(peer) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

/* Contexts */

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    if (!em_is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    pthread_mutex_lock(&em_lock);
    primary[device].retained++;
    pthread_mutex_unlock(&em_lock);
    *context = &primary[device];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    if (!em_is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    pthread_mutex_lock(&em_lock);
    if (primary[device].retained)
        primary[device].retained--;
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (!em_is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    *flags = 0;
    *active = primary[device].retained > 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = em_current();
    return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    if (context && !is_context(context))
        return CUDA_ERROR_INVALID_CONTEXT;
    if (depth)
        depth--;
    if (context)
        stack[depth++] = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (!is_context(context) || depth == DEPTH_MAX)
        return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    depth--;
    if (context)
        *context = stack[depth];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    *device = em_current()->device;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long *id) {
    if (!context)
        context = em_current();
    if (!context)
        return CUDA_ERROR_INVALID_CONTEXT;
    *id = context->device + 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version) {
    (void)context;
    *version = 13000;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSetFlags(unsigned flags) {
    (void)flags;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxSynchronize(void) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    em_wait_for_device(em_current()->device);
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}
