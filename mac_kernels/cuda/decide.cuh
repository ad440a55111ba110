// The acceptance rule (mac_kernels.match.accept), taken by every warp for itself: lane h holds head h, lane h + 16 too.
#pragma once
#include "match.cuh"

enum Reason { HIT, NO_RING, SHORT_CONTEXT, BYPASSED, NO_ROW, DISTANCE, AGE, INFLUENCE, NUM_REASONS };

struct Limits {  // of this lane's head
    float cap, influence;
};

struct Verdict {
    // of this lane's head
    int pos, start;
    float lse;                   // of the matched state, corrected
    // of the group
    bool reuse;
    int low, stop, anchor;
};

DEVICE Limits load_limits(const Args& a, int kv_head, int lane) {
    const int head = lane % 16;
    const bool known = head < GROUP;
    return {known ? a.cap[kv_head * GROUP + head] : 0.f, known ? a.influence[kv_head * GROUP + head] : 0.f};
}

// The nominee that a head reuses: the nearest one, among equals the newest; -1 if there is none.
DEVICE int elect(const Shared& shared, int head, int side) {
    int best = INFINITE, best_pos = -1, best_slot = -1;
#pragma unroll 3
    for (int slot = side; slot < NOMINEES; slot += 2) {
        int bits = 0;
        if (GROUP_SCOPE)
            for (int h = 0; h < GROUP; ++h) bits = max(bits, __float_as_int(shared.near[slot][h].x) & 0x7fffffff);
        else
            bits = __float_as_int(shared.near[slot][head].x) & 0x7fffffff;
        const int pos = shared.nominees[slot];
        if (bits < best || (bits == best && bits < INFINITE && pos > best_pos))
            best = bits, best_pos = pos, best_slot = slot;
    }
    const int other = __shfl_xor_sync(ALL_LANES, best, 16), other_pos = __shfl_xor_sync(ALL_LANES, best_pos, 16);
    const int other_slot = __shfl_xor_sync(ALL_LANES, best_slot, 16);
    return other < best || (other == best && other_pos > best_pos) ? other_slot : best_slot;
}

DEVICE void note(const Args& a, const Step& s, const Verdict& v, float distance, float weight_bound, int reason,
                 int head_hit, int lane) {
    if (lane < GROUP) {
        int* ints = a.decision_int + s.group * (3 * GROUP) + lane;
        float* floats = a.decision_float + s.group * (3 * GROUP) + lane;
        ints[0] = v.start;
        ints[GROUP] = v.pos >= 0 ? v.pos % WINDOW : 0;
        ints[2 * GROUP] = v.pos;
        floats[0] = v.lse;
        floats[GROUP] = distance;
        floats[2 * GROUP] = weight_bound;
    }
    if (lane > 0) return;
    const int kv_len = s.position + 1, end = min(v.stop, kv_len);
    int4* info = (int4*)(a.info + s.group * 8);
    // a reused group ends here: nothing is left to attend to
    info[0] = make_int4(v.low, v.reuse ? v.low : end, s.position, kv_len > 0 ? s.ring : -1);
    info[1] = make_int4(v.reuse, v.anchor, reason, head_hit);
    const int read = min(max(v.stop - v.low, 0) + max(kv_len - v.stop, 0) + SINKS, kv_len);
    atomicAdd(a.counters + reason, 1ull);
    atomicAdd(a.counters + NUM_REASONS, (u64)read);
    atomicAdd(a.counters + NUM_REASONS + 1, (u64)kv_len);
    if (BYPASS && reason == HIT) atomicAdd(a.bypass, 1);
    if (BYPASS && (reason == HIT || reason >= DISTANCE)) atomicAdd(a.bypass + 1, 1);
}

// Maximum and sum of the weights of sinks and band, of this lane's head.
DEVICE float2 weigh_always(const Shared& shared, int parts, int lane) {
    const int head = min(lane % 16, GROUP - 1), side = lane / 16;
    float top = -INFINITY, sum = 0.f;
#pragma unroll 4
    for (int part = side; part < parts; part += 2) top = fmaxf(top, shared.band_weight[part][head].x);
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 16));
    if (top == -INFINITY) top = 0.f;
#pragma unroll 4
    for (int part = side; part < parts; part += 2) {
        const float2 weight = shared.band_weight[part][head];
        sum += weight.y * exp2_of(weight.x - top);
    }
    return make_float2(top, sum + __shfl_xor_sync(ALL_LANES, sum, 16));
}

DEVICE Verdict decide(const Args& a, const Step& s, const Shared& shared, Limits limits, float2 always, bool paused,
                      bool notes, int lane) {
    const int head = lane % 16 < GROUP ? lane % 16 : 0, side = lane / 16;
    Verdict v;
    const int slot = s.searching ? elect(shared, head, side) : -1;
    const float2 near = slot < 0 ? make_float2(INFINITY, -INFINITY) : shared.near[slot][head];
    const int anchor = slot < 0 ? -1 : shared.anchors[slot];
    v.pos = slot < 0 ? -1 : shared.nominees[slot];
    v.lse = near.y;

    const float always_lse = always.y > 0.f ? log2_of(always.y) + always.x : -INFINITY;
    float top = fmaxf(always_lse, v.lse);
    if (top == -INFINITY) top = 0.f;
    const float own = exp2_of(v.lse - top), total = exp2_of(always_lse - top) + own;
    const float weight_bound = own / (total > 0.f ? total : 1.f);
    int reason = HIT;
    if (!(weight_bound * near.x < limits.influence)) reason = INFLUENCE;  // a NaN on either side refuses the reuse
    if (s.position - anchor > a.max_age) reason = AGE;
    if (near.x >= limits.cap) reason = DISTANCE;
    if (v.pos < 0) reason = NO_ROW;
    if (paused) reason = BYPASSED;
    if (s.position < a.min_context) reason = SHORT_CONTEXT;
    if (s.ring < 0) reason = NO_RING;
    const bool known = lane % 16 < GROUP;
    const int head_hit = __ballot_sync(ALL_LANES, lane < GROUP && reason == HIT);
    const int worst = __reduce_min_sync(ALL_LANES, known && reason != HIT ? reason : NUM_REASONS);
    v.reuse = worst == NUM_REASONS;
    v.stop = max(s.position + 1 - BAND, SINKS);
    v.start = v.reuse ? max(v.pos + 1 - BAND, SINKS) : SINKS;
    v.low = min(__reduce_min_sync(ALL_LANES, known ? v.start : 0x7fffffff), v.stop);
    const int oldest = __reduce_min_sync(ALL_LANES, known ? anchor : 0x7fffffff);
    v.anchor = v.reuse ? oldest - HANDOVER : s.position;
    if (notes) note(a, s, v, near.x, weight_bound, v.reuse ? HIT : worst, head_hit, lane);
    return v;
}
