/* The few calls of NVML (libnvidia-ml.so.1) that Dask, dask-cuda and UCX cannot do without. It knows the machine's devices, which
 * CUDA_VISIBLE_DEVICES does not change, and nothing of what is allocated on them.
 */

#define _GNU_SOURCE
#include "identity.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

typedef char *device_t; /* one more than the index, so that none of them is NULL */

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static unsigned device_count(void) { return (unsigned)setting("EMULATED_CUDA_DEVICES", 1); }

static uint64_t capacity(void) { return (uint64_t)setting("EMULATED_CUDA_CAPACITY", 256L << 20); }

static int index_of(device_t device) { return (int)((intptr_t)device - 1); }

EXPORT int nvmlInit_v2(void) { return SUCCESS; }
EXPORT int nvmlInitWithFlags(unsigned flags) { return (void)flags, SUCCESS; }
EXPORT int nvmlShutdown(void) { return SUCCESS; }

EXPORT const char *nvmlErrorString(int result) {
    return result == SUCCESS ? "Success" : result == NOT_SUPPORTED ? "Not Supported" : "Error of the emulation";
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "0.0 (emulated)");
    return SUCCESS;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = device_count();
    return SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    *device = (device_t)(intptr_t)(index + 1);
    return index < device_count() ? SUCCESS : INVALID_ARGUMENT;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    for (unsigned i = 0; i < device_count(); i++) {
        char text[UUID_TEXT];
        uuid_text((int)i, text);
        if (strcmp(text, uuid) == 0)
            return nvmlDeviceGetHandleByIndex_v2(i, device);
    }
    return NOT_FOUND;
}

EXPORT int nvmlDeviceGetIndex(device_t device, unsigned *index) {
    *index = (unsigned)index_of(device);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetUUID(device_t device, char *uuid, unsigned length) {
    char text[UUID_TEXT];
    uuid_text(index_of(device), text);
    snprintf(uuid, length, "%s", text);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetName(device_t device, char *name, unsigned length) {
    snprintf(name, length, DEVICE_NAME, index_of(device));
    return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo(device_t device, uint64_t info[3]) {
    (void)device;
    info[0] = info[1] = capacity(); /* total, free */
    info[2] = 0;                    /* used */
    return SUCCESS;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(device_t device, uint64_t info[5]) {
    (void)device;
    info[1] = info[3] = capacity(); /* after the version: total, reserved, free, used */
    info[2] = info[4] = 0;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetBAR1MemoryInfo(device_t device, uint64_t info[3]) { return nvmlDeviceGetMemoryInfo(device, info); }

EXPORT int nvmlDeviceGetCpuAffinity(device_t device, unsigned count, unsigned long *mask) {
    (void)device;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    memset(mask, 0, count * sizeof *mask);
    for (long cpu = 0; cpu < cpus && cpu < (long)count * 64; cpu++)
        mask[cpu / 64] |= 1UL << cpu % 64;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetUtilizationRates(device_t device, unsigned rates[2]) {
    (void)device;
    rates[0] = rates[1] = 0;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, void *infos) {
    (void)device, (void)infos;
    *count = 0;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v2(device_t device, unsigned *count, void *infos) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, infos);
}

EXPORT int nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending) {
    (void)device;
    *current = *pending = 0;
    return NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    (void)device;
    *major = 9;
    *minor = 0;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetPciInfo_v3(device_t device, char *info) {
    /* A short bus id of 16 characters; domain, bus, device, two identities; a long bus id. */
    unsigned numbers[5] = {0, (unsigned)index_of(device) + 1, 0, 0, 0};
    snprintf(info, 16, "0000:%02X:00.0", numbers[1]);
    memcpy(info + 16, numbers, sizeof numbers);
    snprintf(info + 16 + sizeof numbers, 32, "00000000:%02X:00.0", numbers[1]);
    return SUCCESS;
}

EXPORT int nvmlDeviceGetFieldValues(device_t device, int count, void *values) {
    return (void)device, (void)count, (void)values, NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(device_t device, unsigned link, void *info) {
    return (void)device, (void)link, (void)info, NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetGpuFabricInfo(device_t device, void *info) { return (void)device, (void)info, NOT_SUPPORTED; }

EXPORT int nvmlDeviceGetGpuFabricInfoV(device_t device, void *info) { return (void)device, (void)info, NOT_SUPPORTED; }

/* Devices are joined by so many: neighbours by NVLink, by one switch of PCIe, by one processor. Of one alone there is nothing to say. */
static int together(device_t one, device_t other, const char *setting_name) {
    long number = setting(setting_name, 1);
    return number > 1 && index_of(one) / number == index_of(other) / number;
}

EXPORT int nvmlDeviceGetP2PStatus(device_t one, device_t other, int capability, int *status) {
    enum { NVLINK = 2, OK = 0, UNSUPPORTED = 5 };
    *status = capability == NVLINK && together(one, other, "EMULATED_CUDA_NVLINK") ? OK : UNSUPPORTED;
    return SUCCESS;
}

EXPORT int nvmlDeviceGetTopologyCommonAncestor(device_t one, device_t other, int *level) {
    enum { SINGLE = 10, NODE = 40, SYSTEM = 50 };
    *level = together(one, other, "EMULATED_CUDA_SWITCH") ? SINGLE : together(one, other, "EMULATED_CUDA_NUMA") ? NODE : SYSTEM;
    return SUCCESS;
}
