/* Copies, and filling memory.
 *
 * All of them are operations of a stream. Those that the interface calls synchronous are waited for, and so are copies to
 * pageable memory of the host; what lies in pageable memory is staged, as the documentation has it, so that it may change once
 * the call has returned. Page-locked memory is read and written when the copy's turn has come, and not before.
 */

#define _GNU_SOURCE
#include "emulated.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SLICE = 1 << 20 };

static CUresult run_copy(struct operation *operation) {
    pthread_mutex_lock(&em_lock);
    em_counts.copies++;
    em_counts.pinned_copies += operation->value;
    long rate = em_settings.copy_rate;
    bool fail = em_settings.fail_copy > 0 && --em_settings.fail_copy == 0;
    pthread_mutex_unlock(&em_lock);
    for (size_t at = 0; at < operation->nbytes; at += SLICE) {
        size_t nbytes = operation->nbytes - at < SLICE ? operation->nbytes - at : SLICE;
        if (fail && at + nbytes == operation->nbytes)
            return CUDA_ERROR_ECC_UNCORRECTABLE; /* all but the end was copied */
        memmove(operation->to + at, operation->from + at, nbytes);
        if (rate)
            usleep(1e6 * nbytes / rate);
    }
    return CUDA_SUCCESS;
}

static CUresult run_fill(struct operation *operation) {
    memset(operation->to, operation->value, operation->nbytes);
    return CUDA_SUCCESS;
}

/* Lock held. */
static bool allowed(uint64_t address, size_t nbytes) {
    struct place place = em_locate(address);
    if (place.kind == NOWHERE)
        return em_reach(address) == (char *)address; /* the host's, which nothing is known of */
    return address + nbytes <= place.begin + place.nbytes;
}

static CUresult copy(uint64_t to, uint64_t from, size_t nbytes, CUstream handle, bool wait) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return em_current() ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_CONTEXT;
    if (!nbytes)
        return CUDA_SUCCESS;
    pthread_mutex_lock(&em_lock);
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    if (allowed(to, nbytes) && allowed(from, nbytes)) {
        struct operation operation = {.run = run_copy, .to = em_reach(to), .from = em_reach(from), .nbytes = nbytes};
        enum place_kind source = em_locate(from).kind, target = em_locate(to).kind;
        operation.value = source == PINNED || target == PINNED;
        if (target == NOWHERE) {
            wait = true;
        } else if (source == NOWHERE && !wait) {
            operation.staged = malloc(nbytes);
            memcpy(operation.staged, operation.from, nbytes);
            operation.from = operation.staged;
        }
        uint64_t number = em_submit(stream, operation);
        result = CUDA_SUCCESS;
        if (wait) {
            em_wait(stream, number);
            result = em_take_error(stream);
        }
    }
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t nbytes) { return copy(to, from, nbytes, NULL, true); }

EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t nbytes) {
    return copy(to, (uint64_t)from, nbytes, NULL, true);
}

EXPORT CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t nbytes) {
    return copy((uint64_t)to, from, nbytes, NULL, true);
}

/* Between two places of a device the real one does not wait either. */
EXPORT CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t nbytes) {
    return copy(to, from, nbytes, NULL, false);
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream) {
    return copy(to, from, nbytes, stream, false);
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t nbytes, CUstream stream) {
    return copy(to, (uint64_t)from, nbytes, stream, false);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t nbytes, CUstream stream) {
    return copy((uint64_t)to, from, nbytes, stream, false);
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream) {
    return copy(to, from, nbytes, stream, false);
}

static bool lies_in(CUcontext context, CUdeviceptr address) {
    pthread_mutex_lock(&em_lock);
    struct place place = em_locate(address);
    pthread_mutex_unlock(&em_lock);
    return context && place.kind == ON_DEVICE && place.device == context->device;
}

EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context, size_t nbytes,
                                  CUstream stream) {
    if (!lies_in(to_context, to) || !lies_in(from_context, from))
        return CUDA_ERROR_INVALID_CONTEXT;
    return copy(to, from, nbytes, stream, false);
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t nbytes, CUstream handle) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return em_current() ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    if (em_locate(to).kind != NOWHERE && allowed(to, nbytes)) {
        em_submit(stream, (struct operation){.run = run_fill, .to = em_reach(to), .nbytes = nbytes, .value = value});
        result = CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t nbytes) {
    return cuMemsetD8Async(to, value, nbytes, NULL);
}
