// What a block does with its own heads: merge the parts, write the output and the ring row. A thread takes 4 dims.
#pragma once
#include "decide.cuh"
#include "rotary.cuh"

constexpr int UNITS = (OWN_HEADS * HEAD_DIM / 4 + THREADS - 1) / THREADS;

struct Unit {  // 4 dims of an own head
    int own, head, d;
    bool present;
};

// Threads count from the last warp down: the first ones have the first tiles of the rest.
DEVICE Unit unit_of(int i, int rank, int thread) {
    const int index = THREADS - 1 - thread + i * THREADS, own = index / (HEAD_DIM / 4), head = own * CLUSTER + rank;
    return {own, head, index % (HEAD_DIM / 4) * 4, own < OWN_HEADS && head < GROUP};
}

// Sinks and band of a unit: weights relative to their maximum times values.
DEVICE float4 always_of(const Shared& shared, const Unit& u, int parts, float top) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 2
    for (int part = 0; part < parts; ++part)
        add(sum, exp2_of(shared.band_weight[part][u.head].x - top), *(const float4*)&shared.band_out[part][u.own][u.d]);
    return sum;
}

struct Stored {  // of the matched row
    uint2 out, key;
};

DEVICE Stored load_stored(const Args& a, const Step& s, const Unit& u, int pos) {
    Stored stored = {make_uint2(0, 0), make_uint2(0, 0)};
    if (!u.present) return stored;
    const i64 at = ((s.ring_row + pos % WINDOW) * QO_HEADS + s.kv_head * GROUP + u.head) * HEAD_DIM + u.d;
    stored.out = *(const uint2*)(a.ring_out + at);
    if (KBAR) stored.key = *(const uint2*)(a.ring_key + at);
    return stored;
}

struct Merged {
    float4 out;
    float lse;
};

// Merges the parts of the rest into the matched state; the mean keys of the rest stay in the rotated frame.
DEVICE Merged merge_rest(Shared& shared, const Unit& u, const Stored& stored, float lse, int parts, float v_scale,
                         float k_scale, float4& key) {
    float top = lse;
#pragma unroll 2
    for (int part = 0; part < parts; ++part) top = fmaxf(top, shared.rest_weight[part][u.own].x);
    if (top == -INFINITY) top = 0.f;
    const float own = exp2_of(lse - top);
    float total = own;
    float4 out = make_float4(0.f, 0.f, 0.f, 0.f), fresh = out;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
        const float2 of_part = shared.rest_weight[part][u.own];
        const float weight = exp2_of(of_part.x - top);
        total += weight * of_part.y;
        add(out, weight, *(const float4*)&shared.rest_out[part][u.own][u.d]);
        if (KBAR) add(fresh, weight, *(const float4*)&shared.rest_key[part][u.own][u.d]);
    }
    const float inverse = 1.f / (total > 0.f ? total : 1.f);
    out = times(v_scale * inverse, out);
    add(out, own * inverse, widen<HALF_ROWS>(stored.out));
    if (KBAR) {
        *(float4*)&shared.key[u.own][u.d] = times(k_scale * inverse, fresh);
        key = times(own * inverse, widen<HALF_ROWS>(stored.key));
    }
    return {out, total > 0.f ? log2_of(total) + top : -INFINITY};
}

// Adds the rest's mean key, rotated back to the frame before RoPE.
DEVICE float4 pull_back(const Shared& shared, const Unit& u, float4 key) {
    float x[4] = {key.x, key.y, key.z, key.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int d = u.d + i;
        x[i] += shared.key[u.own][d] * shared.cosine[d] + shared.key[u.own][partner_of(d)] * shared.sine[d];
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

DEVICE void store_row(const Args& a, const Step& s, const Unit& u, const Merged& row, float4 key, int anchor) {
    const i64 slot = s.ring_row + s.position % WINDOW, at = slot * QO_HEADS + s.kv_head * GROUP + u.head;
    *(uint2*)(a.ring_out + at * HEAD_DIM + u.d) = narrow<HALF_ROWS>(row.out);
    if (KBAR) *(uint2*)(a.ring_key + at * HEAD_DIM + u.d) = narrow<HALF_ROWS>(key);
    if (u.d > 0) return;
    a.ring_lse[at] = row.lse;
    if (u.head > 0) return;
    a.ring_anchor[slot * NUM_KV_HEADS + s.kv_head] = anchor;
    a.ring_pos[slot] = s.position;
}

DEVICE void store_out(const Args& a, const Step& s, const Unit& u, const Merged& row, float4 always, float always_max,
                      float always_sum, float v_scale) {
    const float always_lse = always_sum > 0.f ? always_max : -INFINITY;
    float top = fmaxf(always_lse, row.lse);
    if (top == -INFINITY) top = 0.f;
    const float weight = exp2_of(always_lse - top), own = exp2_of(row.lse - top);
    const float total = own + weight * always_sum, inverse = 1.f / (total > 0.f ? total : 1.f);
    float4 out = times(own * inverse, row.out);
    add(out, weight * v_scale * inverse, always);
    half_bits* to = a.out + s.request * a.stride_ob + (s.kv_head * GROUP + u.head) * a.stride_oh + u.d;
    *(uint2*)to = narrow<HALF_KV>(out);
}
