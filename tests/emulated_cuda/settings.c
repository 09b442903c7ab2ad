/* Settings, by environment when the process begins, and by emulated_set() while it runs; and counts for tests to look at. */

#include "emulated.h"

#include <stdlib.h>
#include <string.h>

pthread_mutex_t em_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t em_moved = PTHREAD_COND_INITIALIZER;

struct settings em_settings = {.devices = 1, .capacity = 256L << 20, .lag_us = 200};
struct counts em_counts;

static const struct {
    const char *name;
    const char *variable;
    long *value;
} known[] = {
    {"devices", "EMULATED_CUDA_DEVICES", &em_settings.devices},
    {"capacity", "EMULATED_CUDA_CAPACITY", &em_settings.capacity},
    {"lag_us", "EMULATED_CUDA_LAG_US", &em_settings.lag_us},
    {"seed", "EMULATED_CUDA_SEED", &em_settings.seed},
    {"copy_rate", "EMULATED_CUDA_COPY_RATE", &em_settings.copy_rate},
    {"fail_alloc", "EMULATED_CUDA_FAIL_ALLOC", &em_settings.fail_alloc},
    {"fail_copy", "EMULATED_CUDA_FAIL_COPY", &em_settings.fail_copy},
    {"pinned_limit", "EMULATED_CUDA_PINNED_LIMIT", &em_settings.pinned_limit},
    {"copies", NULL, &em_counts.copies},
    {"pinned_copies", NULL, &em_counts.pinned_copies},
    {"pinned", NULL, &em_counts.pinned},
    {"used", NULL, &em_counts.used},
    {"failed_allocs", NULL, &em_counts.failed_allocs},
};

enum { KNOWN = sizeof known / sizeof *known };

void em_read_settings(void) {
    for (int i = 0; i < KNOWN; i++) {
        const char *text = known[i].variable ? getenv(known[i].variable) : NULL;
        if (text && *text)
            *known[i].value = atol(text);
    }
    if (em_settings.devices > DEVICES_MAX)
        em_settings.devices = DEVICES_MAX;
}

/* Returns whether there is such a setting. Devices and capacity are fixed once the driver was used. */
EXPORT int emulated_set(const char *name, long value) {
    for (int i = 0; i < KNOWN; i++) {
        if (strcmp(known[i].name, name) == 0) {
            pthread_mutex_lock(&em_lock);
            *known[i].value = value;
            pthread_mutex_unlock(&em_lock);
            return 1;
        }
    }
    return 0;
}

EXPORT long emulated_get(const char *name) {
    long value = -1;
    for (int i = 0; i < KNOWN; i++) {
        if (strcmp(known[i].name, name) == 0) {
            pthread_mutex_lock(&em_lock);
            value = *known[i].value;
            pthread_mutex_unlock(&em_lock);
        }
    }
    return value;
}
