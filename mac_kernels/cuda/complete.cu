// Completes the groups that were not reused: merges the parts of the rest, writes the ring row and, with sinks and band,
// the output. A block takes HEADS heads of a group; PART_WARPS warps share the parts of a head.
#include "types.cuh"
#include "bypass.cuh"
#include "rotary.cuh"

struct Args {  // in the order of mac_kernels.cuda.complete
    // may change from step to step
    half_bits* out;
    i64 stride_ob;
    int stride_oh;
    // the same for every step of a layer
    const int *info, *parts;
    const float *part_out, *part_key, *part_lse, *always_out, *always_lse;
    half_bits *ring_out, *ring_key;
    float* ring_lse;
    int *ring_pos, *ring_anchor;
    const float* cos_sin;
    int* bypass;
    float break_even;
};

constexpr int QO_HEADS = NUM_KV_HEADS * GROUP;
constexpr int BLOCKS = (GROUP + HEADS - 1) / HEADS;  // of a group
constexpr int QUADS = HEAD_DIM / 4;
constexpr int LANE_QUADS = (QUADS + 31) / 32;               // of a part, a lane
constexpr int UNITS = (HEADS * QUADS + THREADS - 1) / THREADS;  // 4 dims of a head each, a thread
constexpr int BATCH = LANE_QUADS > 1 || PART_WARPS == 1 ? 4 : 8;  // parts loaded at once

struct __align__(16) Shared {
    float out[HEADS][PART_WARPS][HEAD_DIM];
    float key[KBAR ? HEADS : 1][PART_WARPS][HEAD_DIM];
    float mean_key[HEADS][HEAD_DIM];
    float2 weight[HEADS][PART_WARPS];  // maximum, sum
};

__device__ char complete_shared[sizeof(Shared) / 16];  // tells the host, by its size, what a launch needs

DEVICE float4 load_4(const float* from, bool present) {
    return present ? *(const float4*)from : make_float4(0.f, 0.f, 0.f, 0.f);
}

// Merges every PART_WARPS-th part of a head.
DEVICE void merge_parts(const Args& a, Shared& shared, int group, int own, int head, int part_warp, int lane) {
    const int first_part = a.parts[2 * group], num_parts = a.parts[2 * group + 1];
    float top = -INFINITY, total = 0.f;
    float4 out[LANE_QUADS], key[LANE_QUADS];
#pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i) out[i] = key[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int first = part_warp; first < num_parts; first += BATCH * PART_WARPS) {
        float lse[BATCH];
        float4 outs[BATCH][LANE_QUADS], keys[BATCH][LANE_QUADS];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            // a part that there is not: the last one once more, without weight
            const i64 at = (i64)(first_part + min(first + b * PART_WARPS, num_parts - 1)) * GROUP + head;
            lse[b] = a.part_lse[at];
#pragma unroll
            for (int i = 0; i < LANE_QUADS; ++i) {
                const int d = min(4 * (lane + 32 * i), HEAD_DIM - 4);
                outs[b][i] = *(const float4*)(a.part_out + at * HEAD_DIM + d);
                if (KBAR) keys[b][i] = *(const float4*)(a.part_key + at * HEAD_DIM + d);
            }
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (first + b * PART_WARPS >= num_parts) lse[b] = -INFINITY;
        }
        float most = top;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) most = fmaxf(most, lse[b]);
        const float safe = most == -INFINITY ? 0.f : most, decay = exp2_of(top - safe);
        total *= decay;
#pragma unroll
        for (int i = 0; i < LANE_QUADS; ++i) out[i] = times(decay, out[i]), key[i] = times(decay, key[i]);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const float weight = exp2_of(lse[b] - safe);
            total += weight;
#pragma unroll
            for (int i = 0; i < LANE_QUADS; ++i) {
                add(out[i], weight, outs[b][i]);
                if (KBAR) add(key[i], weight, keys[b][i]);
            }
        }
        top = most;
    }
    if (lane == 0) shared.weight[own][part_warp] = make_float2(top, total);
#pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i) {
        const int d = 4 * (lane + 32 * i);
        if (d >= HEAD_DIM) continue;
        *(float4*)&shared.out[own][part_warp][d] = out[i];
        if (KBAR) *(float4*)&shared.key[own][part_warp][d] = key[i];
    }
}

struct Merged {
    float4 out;
    float lse;
};

// Joins what the warps of a head have merged; the mean key stays in the rotated frame.
DEVICE Merged join(Shared& shared, int own, int d) {
    float top = -INFINITY, total = 0.f;
#pragma unroll
    for (int w = 0; w < PART_WARPS; ++w) top = fmaxf(top, shared.weight[own][w].x);
    const float safe = top == -INFINITY ? 0.f : top;
    float4 out = make_float4(0.f, 0.f, 0.f, 0.f), key = out;
#pragma unroll
    for (int w = 0; w < PART_WARPS; ++w) {
        const float2 of_warp = shared.weight[own][w];
        const float weight = exp2_of(of_warp.x - safe);
        total += weight * of_warp.y;
        add(out, weight, *(const float4*)&shared.out[own][w][d]);
        if (KBAR) add(key, weight, *(const float4*)&shared.key[own][w][d]);
    }
    const float inverse = 1.f / (total > 0.f ? total : 1.f);
    if (KBAR) *(float4*)&shared.mean_key[own][d] = times(inverse, key);
    return {times(inverse, out), total > 0.f ? log2_of(total) + top : -INFINITY};
}

struct Turn {  // what rotates 4 dims back to the frame before RoPE
    float cosine[4], sine[4];
};

DEVICE Turn load_turn(const Args& a, int position, int first) {
    const float* turn = a.cos_sin + (i64)max(position, 0) * ROTARY_DIM;  // -1: a request without tokens
    constexpr int HALF = ROTARY_DIM / 2;
    Turn t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int d = first + i, angle = INTERLEAVED ? d / 2 : d % HALF;
        const bool rotated = d < ROTARY_DIM;
        t.cosine[i] = rotated ? turn[angle] : 1.f;
        t.sine[i] = !rotated ? 0.f : d < partner_of(d) ? turn[HALF + angle] : -turn[HALF + angle];
    }
    return t;
}

DEVICE float4 pull_back(const float* key, const Turn& turn, int first) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        x[i] = key[first + i] * turn.cosine[i] + key[partner_of(first + i)] * turn.sine[i];
    return make_float4(x[0], x[1], x[2], x[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) complete(const __grid_constant__ Args a) {
    Shared& shared = *(Shared*)shared_memory();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int group = blockIdx.x / BLOCKS, first_head = blockIdx.x % BLOCKS * HEADS;
    const int *info = a.info + 8 * group, position = info[2], ring = info[3], anchor = info[5];
    const bool reuse = info[4] != 0;
    if (JUDGES && blockIdx.x == 0 && thread == 0) judge_hits(a.bypass, a.break_even);
    if (reuse) {  // done before
        grid_wait();
        grid_launch_dependents();
        return;
    }
    float4 always[UNITS];
    float always_lse[UNITS];
    Turn turn[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const int unit = thread + i * THREADS, head = first_head + unit / QUADS;
        const bool present = unit < HEADS * QUADS && head < GROUP;
        const i64 at = (i64)group * GROUP + head;
        always[i] = load_4(a.always_out + at * HEAD_DIM + unit % QUADS * 4, present);
        always_lse[i] = present ? a.always_lse[at] : -INFINITY;
        if (KBAR) turn[i] = load_turn(a, position, unit % QUADS * 4);
    }
    grid_wait();
    grid_launch_dependents();
    const int own = warp / PART_WARPS;
    if (first_head + own < GROUP) merge_parts(a, shared, group, own, first_head + own, warp % PART_WARPS, lane);
    __syncthreads();
    Merged row[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const int unit = thread + i * THREADS;
        if (unit < HEADS * QUADS && first_head + unit / QUADS < GROUP) row[i] = join(shared, unit / QUADS, unit % QUADS * 4);
    }
    if (KBAR) __syncthreads();
    const int request = group / NUM_KV_HEADS, kv_head = group % NUM_KV_HEADS;
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const int unit = thread + i * THREADS, head = first_head + unit / QUADS, d = unit % QUADS * 4;
        if (unit >= HEADS * QUADS || head >= GROUP) continue;
        const int qo_head = kv_head * GROUP + head;
        if (ring >= 0) {
            const i64 slot = (i64)ring * WINDOW + position % WINDOW, at = slot * QO_HEADS + qo_head;
            *(uint2*)(a.ring_out + at * HEAD_DIM + d) = narrow<HALF_ROWS>(row[i].out);
            if (KBAR) {
                const float4 key = pull_back(shared.mean_key[unit / QUADS], turn[i], d);
                *(uint2*)(a.ring_key + at * HEAD_DIM + d) = narrow<HALF_ROWS>(key);
            }
            if (d == 0) a.ring_lse[at] = row[i].lse;
            if (d == 0 && head == 0) {
                a.ring_anchor[slot * NUM_KV_HEADS + kv_head] = anchor;
                a.ring_pos[slot] = position;
            }
        }
        float top = fmaxf(always_lse[i], row[i].lse);
        if (top == -INFINITY) top = 0.f;
        const float weight = exp2_of(always_lse[i] - top), rest = exp2_of(row[i].lse - top), total = weight + rest;
        const float inverse = 1.f / (total > 0.f ? total : 1.f);
        float4 out = times(rest * inverse, row[i].out);
        add(out, weight * inverse, always[i]);
        *(uint2*)(a.out + request * a.stride_ob + qo_head * a.stride_oh + d) = narrow<HALF_KV>(out);
    }
}
