#pragma once

// The dim that the rotation mixes into one.
DEVICE int partner_of(int d) {
    if (d >= ROTARY_DIM) return d;
    return INTERLEAVED ? d ^ 1 : d < ROTARY_DIM / 2 ? d + ROTARY_DIM / 2 : d - ROTARY_DIM / 2;
}
