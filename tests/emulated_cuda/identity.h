/* By what the devices are known, to the driver and to NVML. */
#ifndef IDENTITY_H
#define IDENTITY_H

#include <stdio.h>
#include <string.h>

#define DEVICE_NAME "Emulated device %d (no GPU)"

enum { UUID_NBYTES = 16, UUID_TEXT = 41 };

static inline void uuid_bytes(int device, unsigned char *bytes) {
    memcpy(bytes, "EMULATED-NO-GPU", UUID_NBYTES - 1);
    bytes[UUID_NBYTES - 1] = (unsigned char)device;
}

static inline void uuid_text(int device, char text[UUID_TEXT]) {
    unsigned char b[UUID_NBYTES];
    uuid_bytes(device, b);
    snprintf(text, UUID_TEXT, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2],
             b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
}

#endif
