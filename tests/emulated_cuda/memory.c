/* Memory: on the devices, page-locked on the host, and managed.
 *
 * A device's memory is one file in memory (memfd) that is mapped twice: at the addresses that the interface gives out, where
 * nobody can read or write, so that host code which takes a device's address for one of its own crashes; and at others, which
 * only the driver knows. Memory that is allocated is filled with what nobody expects. Blocks are found first fit, so memory can
 * get fragmented as on a device without pages. Each process has all of a device for itself, which is not so on a real one.
 */

#define _GNU_SOURCE
#include "emulated.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ALIGNMENT = 512, FILL = 0xA5, HOST_FILL = 0x5A };

struct block {
    struct block *next;
    size_t begin;
    size_t nbytes;
    size_t size;
    uint64_t id;
};

struct arena {
    int fd;
    char *seen;     /* where the interface says it is */
    char *hidden;   /* where it can be reached */
    struct block *blocks;
    size_t used;
};

/* A stretch of the host's memory that the driver knows. */
struct range {
    struct range *next;
    enum place_kind kind;
    uint64_t begin;
    size_t nbytes;
    uint64_t id;
    bool ours;
};

static struct arena arenas[DEVICES_MAX];
static struct range *ranges;
static uint64_t last_id;

struct pool {
    int device;
};

static struct pool default_pools[DEVICES_MAX];

CUresult em_open_memory(void) {
    for (int i = 0; i < em_visible_devices(); i++) {
        struct arena *arena = &arenas[i];
        default_pools[i].device = i;
        arena->fd = memfd_create("emulated-cuda", MFD_CLOEXEC);
        if (arena->fd < 0 || ftruncate(arena->fd, em_settings.capacity))
            return CUDA_ERROR_OUT_OF_MEMORY;
        arena->seen = mmap(NULL, em_settings.capacity, PROT_NONE, MAP_SHARED, arena->fd, 0);
        arena->hidden = mmap(NULL, em_settings.capacity, PROT_READ | PROT_WRITE, MAP_SHARED, arena->fd, 0);
        if (arena->seen == MAP_FAILED || arena->hidden == MAP_FAILED)
            return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return CUDA_SUCCESS;
}

static struct arena *arena_of(uint64_t address) {
    for (int i = 0; i < em_visible_devices(); i++) {
        uint64_t begin = (uint64_t)arenas[i].seen;
        if (address >= begin && address < begin + em_settings.capacity)
            return &arenas[i];
    }
    return NULL;
}

char *em_reach(uint64_t address) {
    struct arena *arena = arena_of(address);
    return arena ? arena->hidden + (address - (uint64_t)arena->seen) : (char *)address;
}

struct place em_locate(uint64_t address) {
    struct place place = {.kind = NOWHERE};
    struct arena *arena = arena_of(address);
    if (arena) {
        size_t offset = address - (uint64_t)arena->seen;
        for (struct block *b = arena->blocks; b; b = b->next)
            if (offset >= b->begin && offset < b->begin + b->size)
                return (struct place){ON_DEVICE, (int)(arena - arenas), (uint64_t)arena->seen + b->begin, b->nbytes, b->id};
        return place;
    }
    for (struct range *r = ranges; r; r = r->next)
        if (address >= r->begin && address < r->begin + r->nbytes)
            return (struct place){r->kind, 0, r->begin, r->nbytes, r->id};
    return place;
}

static bool refused(void) {
    if (em_settings.fail_alloc > 0 && --em_settings.fail_alloc == 0)
        return true;
    return false;
}

CUresult em_allocate(int device, size_t nbytes, CUdeviceptr *address) {
    struct arena *arena = &arenas[device];
    size_t size = (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (!nbytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (refused()) {
        em_counts.failed_allocs++;
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    size_t begin = 0;
    struct block **link = &arena->blocks;
    for (; *link && (*link)->begin - begin < size; link = &(*link)->next)
        begin = (*link)->begin + (*link)->size;
    if (size > em_settings.capacity - begin) {
        em_counts.failed_allocs++;
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    struct block *block = malloc(sizeof *block);
    *block = (struct block){*link, begin, nbytes, size, ++last_id};
    *link = block;
    arena->used += size;
    em_counts.used += size;
    memset(arena->hidden + begin, FILL, size);
    *address = (uint64_t)arena->seen + begin;
    return CUDA_SUCCESS;
}

static CUresult forget_range(uint64_t begin, enum place_kind kind, bool ours) {
    for (struct range **link = &ranges; *link; link = &(*link)->next) {
        struct range *range = *link;
        if (range->begin != begin || range->kind != kind || range->ours != ours)
            continue;
        *link = range->next;
        if (kind == PINNED)
            em_counts.pinned -= range->nbytes;
        if (ours)
            munmap((void *)begin, range->nbytes);
        free(range);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

CUresult em_release(CUdeviceptr address) {
    struct arena *arena = arena_of(address);
    if (!arena)
        return forget_range(address, MANAGED, true) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    size_t begin = address - (uint64_t)arena->seen;
    for (struct block **link = &arena->blocks; *link; link = &(*link)->next) {
        struct block *block = *link;
        if (block->begin != begin)
            continue;
        *link = block->next;
        arena->used -= block->size;
        em_counts.used -= block->size;
        /* What was there is gone, and takes no memory. */
        size_t page = sysconf(_SC_PAGESIZE), from = (begin + page - 1) / page * page, to = (begin + block->size) / page * page;
        if (to > from)
            fallocate(arena->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, to - from);
        free(block);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}

/* Of a device */

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t nbytes) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    CUresult result = em_allocate(em_current()->device, nbytes, address);
    pthread_mutex_unlock(&em_lock);
    return result;
}

/* As the real one does: what still runs may use the memory, and is waited for. */
EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
    if (!address)
        return CUDA_SUCCESS;
    pthread_mutex_lock(&em_lock);
    struct place place = em_locate(address);
    if (place.kind == ON_DEVICE)
        em_wait_for_device(place.device);
    CUresult result = em_release(address);
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    *total = em_settings.capacity;
    *available = em_settings.capacity - arenas[em_current()->device].used;
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *begin, size_t *nbytes, CUdeviceptr address) {
    pthread_mutex_lock(&em_lock);
    struct place place = em_locate(address);
    pthread_mutex_unlock(&em_lock);
    if (place.kind != ON_DEVICE && place.kind != MANAGED)
        return CUDA_ERROR_NOT_FOUND;
    if (begin)
        *begin = place.begin;
    if (nbytes)
        *nbytes = place.nbytes;
    return CUDA_SUCCESS;
}

/* From pools, in the order of a stream. A pool gives back at once what is freed. */

EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) {
    *pool = &default_pools[device];
    return em_is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) { return cuDeviceGetMemPool(pool, device); }

EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool pool, int attribute, void *value) {
    (void)pool, (void)attribute, (void)value;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemPoolGetAttribute(CUmemoryPool pool, int attribute, void *value) {
    if (attribute < 4)
        *(int *)value = 1; /* reuse, which it does not matter here whether it is allowed */
    else
        *(uint64_t *)value = attribute == 4 ? 0 : arenas[pool->device].used;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t nbytes) {
    (void)pool, (void)nbytes;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr *address, size_t nbytes, CUmemoryPool pool, CUstream stream) {
    (void)stream; /* it could not be earlier than now */
    pthread_mutex_lock(&em_lock);
    CUresult result = em_allocate(pool->device, nbytes, address);
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuMemAllocAsync(CUdeviceptr *address, size_t nbytes, CUstream stream) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    return cuMemAllocFromPoolAsync(address, nbytes, &default_pools[em_current()->device], stream);
}

static CUresult release_in_order(struct operation *operation) {
    pthread_mutex_lock(&em_lock);
    CUresult result = em_release(operation->address);
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    em_submit(stream, (struct operation){.run = release_in_order, .address = address});
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

/* Of the host */

static CUresult know(uint64_t begin, size_t nbytes, enum place_kind kind, bool ours) {
    for (struct range *r = ranges; r; r = r->next)
        if (begin < r->begin + r->nbytes && r->begin < begin + nbytes)
            return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (kind == PINNED && em_settings.pinned_limit && em_counts.pinned + (long)nbytes > em_settings.pinned_limit)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct range *range = malloc(sizeof *range);
    *range = (struct range){ranges, kind, begin, nbytes, ++last_id, ours};
    ranges = range;
    if (kind == PINNED)
        em_counts.pinned += nbytes;
    return CUDA_SUCCESS;
}

static CUresult map(void **address, size_t nbytes, enum place_kind kind) {
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&em_lock);
    CUresult result = know((uint64_t)memory, nbytes, kind, true);
    pthread_mutex_unlock(&em_lock);
    if (result) {
        munmap(memory, nbytes);
        return result;
    }
    memset(memory, HOST_FILL, nbytes);
    *address = memory;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocManaged(CUdeviceptr *address, size_t nbytes, unsigned flags) {
    (void)flags;
    return map((void **)address, nbytes, MANAGED);
}

EXPORT CUresult cuMemHostAlloc(void **address, size_t nbytes, unsigned flags) {
    (void)flags;
    return em_current() ? map(address, nbytes, PINNED) : CUDA_ERROR_INVALID_CONTEXT;
}

EXPORT CUresult cuMemAllocHost_v2(void **address, size_t nbytes) { return cuMemHostAlloc(address, nbytes, 0); }

EXPORT CUresult cuMemFreeHost(void *address) {
    pthread_mutex_lock(&em_lock);
    CUresult result = forget_range((uint64_t)address, PINNED, true);
    pthread_mutex_unlock(&em_lock);
    return result ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORT CUresult cuMemHostRegister_v2(void *address, size_t nbytes, unsigned flags) {
    (void)flags;
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    CUresult result = know((uint64_t)address, nbytes, PINNED, false);
    pthread_mutex_unlock(&em_lock);
    return result;
}

/* A real driver does what it likes where memory was unmapped before it was unregistered; this one says so. */
static void insist_on_mapped(uint64_t begin, size_t nbytes) {
    size_t page = sysconf(_SC_PAGESIZE);
    unsigned char *there = malloc((nbytes + page - 1) / page + 1);
    if (mincore((void *)(begin / page * page), nbytes, there) && errno == ENOMEM) {
        fprintf(stderr, "emulated CUDA: memory at %#lx was unmapped while it was page-locked\n", (long)begin);
        abort();
    }
    free(there);
}

EXPORT CUresult cuMemHostUnregister(void *address) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    struct place place = em_locate((uint64_t)address);
    if (place.kind == PINNED)
        insist_on_mapped(place.begin, place.nbytes);
    CUresult result = forget_range((uint64_t)address, PINNED, false);
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *address, unsigned flags) {
    (void)flags;
    *device = (uint64_t)address;
    return CUDA_SUCCESS;
}

/* Whose an address is */

static CUresult answer(int attribute, void *data, uint64_t address, const struct place *place) {
    bool device = place->kind == ON_DEVICE || place->kind == MANAGED;
    switch (attribute) {
    case 1: /* CONTEXT */
        *(CUcontext *)data = place->kind == NOWHERE ? NULL : em_primary(place->device);
        break;
    case 2: /* MEMORY_TYPE: host 1, device 2 */
        *(unsigned *)data = place->kind == NOWHERE ? 0 : device ? 2 : 1;
        break;
    case 3: /* DEVICE_POINTER */
        *(uint64_t *)data = place->kind == NOWHERE ? 0 : address;
        break;
    case 4: /* HOST_POINTER */
        *(uint64_t *)data = place->kind == PINNED || place->kind == MANAGED ? address : 0;
        break;
    case 7: /* BUFFER_ID */
        *(uint64_t *)data = place->id;
        break;
    case 8: /* IS_MANAGED */
        *(unsigned *)data = place->kind == MANAGED;
        break;
    case 9: /* DEVICE_ORDINAL */
        *(int *)data = place->kind == NOWHERE ? -2 : place->device;
        break;
    case 11: /* RANGE_START_ADDR */
        *(uint64_t *)data = place->begin;
        break;
    case 12: /* RANGE_SIZE */
        *(size_t *)data = place->nbytes;
        break;
    case 13: /* MAPPED */
        *(unsigned *)data = place->kind != NOWHERE;
        break;
    case 14: /* ALLOWED_HANDLE_TYPES: 64 bits; none, for nothing is shared with other processes */
    case 17: /* MEMPOOL_HANDLE */
        *(uint64_t *)data = 0;
        break;
    case 6:  /* SYNC_MEMOPS */
    case 10: /* IS_LEGACY_CUDA_IPC_CAPABLE */
    case 15: /* IS_GPU_DIRECT_RDMA_CAPABLE */
    case 16: /* ACCESS_FLAGS */
        *(unsigned *)data = 0;
        break;
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    pthread_mutex_lock(&em_lock);
    struct place place = em_locate(address);
    pthread_mutex_unlock(&em_lock);
    return place.kind == NOWHERE ? CUDA_ERROR_INVALID_VALUE : answer(attribute, data, address, &place);
}

EXPORT CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, CUdeviceptr address) {
    pthread_mutex_lock(&em_lock);
    struct place place = em_locate(address);
    pthread_mutex_unlock(&em_lock);
    for (unsigned i = 0; i < count; i++) {
        CUresult result = answer(attributes[i], data[i], address, &place);
        if (result)
            return result;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerSetAttribute(const void *value, int attribute, CUdeviceptr address) {
    (void)value, (void)attribute, (void)address;
    return CUDA_SUCCESS;
}
