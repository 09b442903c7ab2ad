/* What UCX is linked against, and this driver does not have: memory that is shared between processes, or put together page by
 * page. UCX goes without where it is told so.
 */

#include "emulated.h"

#include <stdio.h>
#include <stdlib.h>

static CUresult no(const char *name) {
    if (getenv("EMULATED_CUDA_TRACE"))
        fprintf(stderr, "emulated CUDA: %s is not supported\n", name);
    return CUDA_ERROR_NOT_SUPPORTED;
}

/* The arguments do not matter, and need not be declared: the caller removes them. */
#define ABSENT(name) \
    EXPORT CUresult name(void) { return no(#name); }

ABSENT(cuIpcCloseMemHandle)
ABSENT(cuIpcGetMemHandle)
ABSENT(cuIpcOpenMemHandle_v2)
ABSENT(cuMemAddressFree)
ABSENT(cuMemAddressReserve)
ABSENT(cuMemCreate)
ABSENT(cuMemExportToShareableHandle)
ABSENT(cuMemGetAllocationGranularity)
ABSENT(cuMemGetAllocationPropertiesFromHandle)
ABSENT(cuMemImportFromShareableHandle)
ABSENT(cuMemMap)
ABSENT(cuMemPoolDestroy)
ABSENT(cuMemPoolExportPointer)
ABSENT(cuMemPoolExportToShareableHandle)
ABSENT(cuMemPoolImportFromShareableHandle)
ABSENT(cuMemPoolImportPointer)
ABSENT(cuMemPoolSetAccess)
ABSENT(cuMemRangeGetAttribute)
ABSENT(cuMemRelease)
ABSENT(cuMemRetainAllocationHandle)
ABSENT(cuMemSetAccess)
ABSENT(cuMemUnmap)
