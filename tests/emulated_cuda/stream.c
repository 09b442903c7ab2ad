/* Streams and events: what is done in which order.
 *
 * Each stream has a queue and a thread. An operation begins when the one before it has ended, and all that it has to come after:
 * a *point* is a stream and the number of one of its operations. Before it begins, the thread sleeps for a random while, so that
 * streams which nothing orders overtake each other, and what relies on luck fails sooner or later. An event is the point at which
 * it was recorded.
 *
 * The legacy default stream waits for all that was asked of the device's blocking streams before, and these wait for it.
 *
 * Streams and events are never freed: a handle that was destroyed is told from one that was not.
 */

#define _GNU_SOURCE
#include "emulated.h"

#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { STREAM = 0x57524d53, EVENT = 0x544e5645, NON_BLOCKING = 1 };

struct point {
    struct stream *stream;
    uint64_t number;
};

struct stream {
    int kind; /* STREAM, or 0: destroyed */
    struct stream *next;
    int device;
    unsigned flags;
    uint64_t submitted;
    uint64_t completed;
    struct operation *first, *last;
    CUresult error; /* of an operation that failed; told once */
    unsigned seed;
};

struct event {
    int kind;
    struct point point; /* number 0: not recorded */
    double time_s;
};

static struct stream *streams;
static struct stream *legacy[DEVICES_MAX];
static __thread struct stream *of_thread[DEVICES_MAX];
static unsigned nstreams;

static bool done(const struct point *point) { return point->stream->completed >= point->number; }

static bool may_begin(const struct operation *operation) {
    for (int i = 0; i < operation->nafter; i++)
        if (!done(&operation->after[i]))
            return false;
    return true;
}

static void *work(void *argument) {
    struct stream *stream = argument;
    pthread_mutex_lock(&em_lock);
    while (stream->kind || stream->first) {
        struct operation *operation = stream->first;
        if (!operation || !may_begin(operation)) {
            pthread_cond_wait(&em_moved, &em_lock);
            continue;
        }
        long lag_us = em_settings.lag_us;
        unsigned chance = rand_r(&stream->seed);
        pthread_mutex_unlock(&em_lock);
        if (lag_us && chance & 1)
            usleep((chance >> 1) % lag_us);
        CUresult result = operation->run ? operation->run(operation) : CUDA_SUCCESS;
        pthread_mutex_lock(&em_lock);
        if (result)
            stream->error = result;
        stream->first = operation->next;
        if (!stream->first)
            stream->last = NULL;
        stream->completed++;
        free(operation->after);
        free(operation->staged);
        free(operation);
        pthread_cond_broadcast(&em_moved);
    }
    pthread_mutex_unlock(&em_lock);
    return NULL;
}

/* Lock held. */
static struct stream *make(int device, unsigned flags) {
    struct stream *stream = calloc(1, sizeof *stream);
    *stream = (struct stream){.kind = STREAM, .next = streams, .device = device, .flags = flags};
    stream->seed = (unsigned)em_settings.seed * 7919 + ++nstreams;
    streams = stream;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    bool made = pthread_create(&thread, NULL, work, stream) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!made)
        abort();
    pthread_detach(thread);
    return stream;
}

struct stream *em_stream(CUstream handle) {
    if (handle != NULL && handle != (CUstream)1 && handle != (CUstream)2)
        return handle->kind == STREAM ? handle : NULL;
    if (!em_current())
        return NULL;
    int device = em_current()->device;
    struct stream **one = handle == (CUstream)2 ? &of_thread[device] : &legacy[device];
    pthread_mutex_lock(&em_lock);
    if (!*one)
        *one = make(device, 0);
    pthread_mutex_unlock(&em_lock);
    return *one;
}

static void come_after(struct operation *operation, struct stream *stream, uint64_t number) {
    operation->after = realloc(operation->after, (operation->nafter + 1) * sizeof *operation->after);
    operation->after[operation->nafter++] = (struct point){stream, number};
}

uint64_t em_submit(struct stream *stream, struct operation given) {
    struct operation *operation = malloc(sizeof *operation);
    *operation = given;
    operation->stream = stream;
    if (stream == legacy[stream->device]) {
        for (struct stream *other = streams; other; other = other->next)
            if (other != stream && other->device == stream->device && !(other->flags & NON_BLOCKING))
                come_after(operation, other, other->submitted);
    } else if (!(stream->flags & NON_BLOCKING) && legacy[stream->device]) {
        come_after(operation, legacy[stream->device], legacy[stream->device]->submitted);
    }
    if (stream->last)
        stream->last->next = operation;
    else
        stream->first = operation;
    stream->last = operation;
    uint64_t number = ++stream->submitted;
    pthread_cond_broadcast(&em_moved);
    return number;
}

void em_wait(struct stream *stream, uint64_t number) {
    while (stream->completed < number)
        pthread_cond_wait(&em_moved, &em_lock);
}

void em_wait_for_device(int device) {
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->device == device)
            em_wait(stream, stream->submitted);
}

CUresult em_take_error(struct stream *stream) {
    CUresult error = stream->error;
    stream->error = CUDA_SUCCESS;
    return error;
}

/* Streams */

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    pthread_mutex_lock(&em_lock);
    *stream = make(em_current()->device, flags);
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    (void)priority;
    return cuStreamCreate(stream, flags);
}

/* What was asked of it is still done. */
EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    if (!stream || stream->kind != STREAM)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    stream->kind = 0;
    pthread_cond_broadcast(&em_moved);
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamQuery(CUstream handle) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    CUresult result = stream->completed < stream->submitted ? CUDA_ERROR_NOT_READY : em_take_error(stream);
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    em_wait(stream, stream->submitted);
    CUresult result = em_take_error(stream);
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned *flags) {
    struct stream *stream = em_stream(handle);
    *flags = stream ? stream->flags : 0;
    return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuStreamGetPriority(CUstream stream, int *priority) {
    *priority = 0;
    return em_stream(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    *context = em_primary(stream->device);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, int *capturing) {
    *capturing = 0;
    return em_stream(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

static CUresult call_back(struct operation *operation) {
    if (operation->call)
        operation->call(operation->stream, CUDA_SUCCESS, operation->data);
    else
        operation->host_call(operation->data);
    return CUDA_SUCCESS;
}

static CUresult submit_call(CUstream handle, struct operation operation) {
    struct stream *stream = em_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    em_submit(stream, operation);
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamAddCallback(CUstream stream, void (*call)(CUstream, CUresult, void *), void *data, unsigned flags) {
    (void)flags;
    return submit_call(stream, (struct operation){.run = call_back, .call = call, .data = data});
}

EXPORT CUresult cuLaunchHostFunc(CUstream stream, void (*call)(void *), void *data) {
    return submit_call(stream, (struct operation){.run = call_back, .host_call = call, .data = data});
}

/* Events */

EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
    (void)flags;
    if (!em_current())
        return CUDA_ERROR_INVALID_CONTEXT;
    *event = calloc(1, sizeof **event);
    (*event)->kind = EVENT;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    if (!event || event->kind != EVENT)
        return CUDA_ERROR_INVALID_HANDLE;
    event->kind = 0;
    return CUDA_SUCCESS;
}

static CUresult note_time(struct operation *operation) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    operation->event->time_s = now.tv_sec + now.tv_nsec * 1e-9;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream handle) {
    struct stream *stream = em_stream(handle);
    if (!event || event->kind != EVENT || !stream)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    event->point = (struct point){stream, em_submit(stream, (struct operation){.run = note_time, .event = event})};
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
    (void)flags;
    return cuEventRecord(event, stream);
}

EXPORT CUresult cuEventQuery(CUevent event) {
    if (!event || event->kind != EVENT)
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&em_lock);
    if (event->point.stream)
        result = done(&event->point) ? em_take_error(event->point.stream) : CUDA_ERROR_NOT_READY;
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuEventSynchronize(CUevent event) {
    if (!event || event->kind != EVENT)
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&em_lock);
    if (event->point.stream) {
        em_wait(event->point.stream, event->point.number);
        result = em_take_error(event->point.stream);
    }
    pthread_mutex_unlock(&em_lock);
    return result;
}

EXPORT CUresult cuEventElapsedTime_v2(float *elapsed_ms, CUevent begin, CUevent end) {
    *elapsed_ms = (float)(1e3 * (end->time_s - begin->time_s));
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    (void)flags;
    struct stream *stream = em_stream(handle);
    if (!event || event->kind != EVENT || !stream)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&em_lock);
    if (event->point.stream) {
        struct operation nothing = {0};
        come_after(&nothing, event->point.stream, event->point.number);
        em_submit(stream, nothing);
    }
    pthread_mutex_unlock(&em_lock);
    return CUDA_SUCCESS;
}
