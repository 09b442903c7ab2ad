/* What the files of the emulated driver share: types, errors, and each file's functions for the others.
 *
 * Names and values that begin with cu or CU are those of NVIDIA's published driver API, as far as it is used here.
 * Everything that is shared is read and written under one lock, em_lock; functions that expect it to be held say so.
 */
#ifndef EMULATED_H
#define EMULATED_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Types of the interface. */

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct context *CUcontext;
typedef struct stream *CUstream;
typedef struct event *CUevent;
typedef struct pool *CUmemoryPool;

enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_ECC_UNCORRECTABLE = 214,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_UNKNOWN = 999,
};

/* The lock, and the condition that is told whenever an operation has ended. */

extern pthread_mutex_t em_lock;
extern pthread_cond_t em_moved;

/* settings.c: what the environment asks for. */

enum { DEVICES_MAX = 8 };

struct settings {
    long devices;        /* EMULATED_CUDA_DEVICES: how many this machine has; 1 */
    long capacity;       /* EMULATED_CUDA_CAPACITY: bytes of each; 256 MiB */
    long lag_us;         /* EMULATED_CUDA_LAG_US: an operation of a stream begins up to so much late, at random; 200 */
    long seed;           /* EMULATED_CUDA_SEED: of that randomness; 0 */
    long copy_rate;      /* EMULATED_CUDA_COPY_RATE: bytes per second of every copy; 0: as fast as memory */
    long fail_alloc;     /* EMULATED_CUDA_FAIL_ALLOC: the n-th allocation from now finds no memory; 0: none */
    long fail_copy;      /* EMULATED_CUDA_FAIL_COPY: the n-th copy from now fails while it runs; 0: none */
    long pinned_limit;   /* EMULATED_CUDA_PINNED_LIMIT: bytes that can be page-locked; 0: any number */
};

struct counts {
    long copies;           /* copies that were carried out */
    long pinned_copies;    /* those of them whose side on the host was page-locked */
    long pinned;           /* bytes that are page-locked */
    long used;             /* bytes that are allocated on all devices */
    long failed_allocs;    /* allocations that found no memory, asked for or not */
};

extern struct settings em_settings;
extern struct counts em_counts;

void em_read_settings(void);

/* device.c: devices and contexts. */

struct context {
    int device;
    int retained;
};

int em_visible_devices(void);
int em_physical(CUdevice device);
bool em_is_device(CUdevice device);
struct context *em_current(void);       /* of the calling thread; NULL if there is none */
struct context *em_primary(int device);

/* memory.c: who lies where. */

enum place_kind { NOWHERE, ON_DEVICE, PINNED, MANAGED };

struct place {
    enum place_kind kind;
    int device;
    uint64_t begin;
    size_t nbytes;
    uint64_t id;
};

struct place em_locate(uint64_t address);    /* lock held */
char *em_reach(uint64_t address);            /* where the driver itself finds what lies there */
CUresult em_open_memory(void);
CUresult em_allocate(int device, size_t nbytes, CUdeviceptr *address);    /* lock held */
CUresult em_release(CUdeviceptr address);                                 /* lock held */

/* stream.c: what is done when. */

struct operation {
    struct operation *next;
    CUresult (*run)(struct operation *);    /* without the lock */
    struct point *after;                    /* what has to be done before */
    int nafter;
    char *to;
    char *from;
    char *staged;    /* freed afterwards */
    size_t nbytes;
    int value;
    CUdeviceptr address;
    struct event *event;
    void (*call)(CUstream, CUresult, void *);
    void (*host_call)(void *);
    void *data;
    CUstream stream;
};

struct stream *em_stream(CUstream handle);    /* what a handle means to the calling thread; NULL: nothing */
/* Takes a copy of the operation; returns its number. Lock held. */
uint64_t em_submit(struct stream *stream, struct operation operation);
void em_wait(struct stream *stream, uint64_t number);    /* lock held, given up meanwhile */
void em_wait_for_device(int device);                     /* lock held, given up meanwhile */
CUresult em_take_error(struct stream *stream);           /* lock held */

#endif
