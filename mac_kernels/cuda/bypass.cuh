// Judges a layer's hits, all groups of the step being counted: mac_kernels.bypass.Bypass.update.
#pragma once
#include "device.cuh"

DEVICE void judge_hits(int* bypass, float break_even) {
    const int hits = bypass[0], judged = bypass[1], pause = bypass[2];
    const bool enough = judged >= TRIAL_GROUPS, poor = enough && (float)hits < (float)judged * break_even;
    bypass[0] = poor ? 0 : enough ? hits / 2 : hits;
    bypass[1] = poor ? 0 : enough ? judged / 2 : judged;
    bypass[2] = poor ? PAUSE_STEPS : max(pause - 1, 0);
}
