// Attention of a kv group's heads over tiles of 16 keys, one warp a tile, keys and values from wherever their rows lie.
//
// Products are taken transposed, S^T = K Q^T and O^T = V^T P^T, so that 8 heads fill the 8 columns of an mma. The order
// of the head dims in a product is free: a lane takes 8 neighbours at a time, 16 bytes.
#pragma once
#include "types.cuh"

constexpr int HEAD_BLOCKS = (GROUP + 7) / 8;
constexpr int K_CHUNKS = (HEAD_DIM + 31) / 32;  // of 4 lanes x 8 dims
constexpr int V_CHUNKS = (HEAD_DIM + 63) / 64;  // of 8 lanes x 8 dims
constexpr float LOG2_E = 1.4426950408889634f;

struct State {  // of heads 8 b + 2 (lane % 4) + {0, 1}
    float max[HEAD_BLOCKS][2];
    float sum[HEAD_BLOCKS][2];  // of this lane's keys
    float out[HEAD_BLOCKS][V_CHUNKS][4][4];
};

DEVICE float scale_of(const float* pointer, float number) { return SCALES_ON_DEVICE ? *pointer : number; }

struct Row {
    const half_bits *k, *v;
    int swizzle;  // chunk i of the row, of 8 dims, lies at i ^ swizzle
};

// Keys and values of a kv head at a position.
DEVICE Row row_at(const Strides& s, const half_bits* k, const half_bits* v, int page, int position) {
    const int slot = position % PAGE_SIZE;
    return {k + (i64)page * s.kp + (i64)slot * s.kt, v + (i64)page * s.vp + (i64)slot * s.vt, 0};
}

DEVICE uint4 load_16(const half_bits* from, bool present) {
    return present ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
}

// 8 dims of a row, of which a lane takes every CHUNK-th; only the last ones of some head dims stick out.
template <int CHUNK> DEVICE uint4 load_chunk(const half_bits* row, int i, int lane_dim, int swizzle) {
    const int d = CHUNK * i + lane_dim;
    return load_16(row + ((d / 8) ^ swizzle) * 8, HEAD_DIM % CHUNK == 0 || d < HEAD_DIM);
}

// The queries of a group, so many threads together.
DEVICE void load_query(half_bits* to, const half_bits* q, int stride, int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < GROUP * HEAD_DIM / 8; i += threads) {
        const int head = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
        *(uint4*)(to + head * HEAD_DIM + d) = *(const uint4*)(q + head * stride + d);
    }
}

DEVICE void clear(State& state) {
#pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) {
#pragma unroll
        for (int e = 0; e < 2; ++e) state.max[b][e] = -INFINITY, state.sum[b][e] = 0.f;
#pragma unroll
        for (int i = 0; i < V_CHUNKS * 16; ++i) state.out[b][i / 16][i / 4 % 4][i % 4] = 0.f;
    }
}

// Logits [16 keys, 8 heads] in log2, -inf where a key does not count.
DEVICE float logit_of(float x, float scale, float soft_cap, bool visible) {
    if (SOFT_CAP) x = soft_cap * LOG2_E * (1.f - 2.f / (exp2_of(2.f * scale / soft_cap * x) + 1.f));  // tanh
    else x *= scale;
    return visible ? x : -INFINITY;
}

// out [heads, dims] += weight of keys times rows; rows[r] of the keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9, t = lane % 4
DEVICE void accumulate(float (&out)[HEAD_BLOCKS][V_CHUNKS][4][4], const uint4 (&rows)[4][V_CHUNKS],
                       const u32 (&weight)[HEAD_BLOCKS][2]) {
#pragma unroll
    for (int i = 0; i < V_CHUNKS; ++i)
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            u32 w = word(rows[0][i], m), x = word(rows[1][i], m), y = word(rows[2][i], m), z = word(rows[3][i], m);
            u32 a0 = low_halves(w, x), a1 = high_halves(w, x), a2 = low_halves(y, z), a3 = high_halves(y, z);
#pragma unroll
            for (int b = 0; b < HEAD_BLOCKS; ++b) mma(out[b][i][m], a0, a1, a2, a3, weight[b][0], weight[b][1]);
        }
}

DEVICE int row_of_value(int lane, int r) { return 2 * (lane % 4) + (r & 1) + 8 * (r >> 1); }

// Adds a tile. `at(row)` tells where a row of the tile lies, for rows < count. A head sees the rows from `start` on.
// With KEYS, `keys` sums up the keys like `state` the values.
template <bool KEYS, typename At>
DEVICE void attend_tile(State& state, State& keys, const half_bits* query, At at, int count,
                        const int (&start)[HEAD_BLOCKS][2], float scale, float soft_cap, int lane) {
    const int g = lane / 4, t = lane % 4;
    uint4 key[2][K_CHUNKS], value[4][V_CHUNKS];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Row row = at(min(g + 8 * r, count - 1));
#pragma unroll
        for (int j = 0; j < K_CHUNKS; ++j) key[r][j] = load_chunk<32>(row.k, j, 8 * t, row.swizzle);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const Row row = at(min(row_of_value(lane, r), count - 1));
#pragma unroll
        for (int i = 0; i < V_CHUNKS; ++i) value[r][i] = load_chunk<64>(row.v, i, 8 * g, row.swizzle);
    }
    u32 weight[HEAD_BLOCKS][2];
#pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) {
        float logits[4] = {0.f, 0.f, 0.f, 0.f};
        // columns of heads that there are not are computed, too, and never read
        const half_bits* from = query + min(8 * b + g, GROUP - 1) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < K_CHUNKS; ++j) {
            const uint4 x = key[0][j], y = key[1][j], q = load_chunk<32>(from, j, 8 * t, 0);
            mma(logits, x.x, y.x, x.y, y.y, q.x, q.y);
            mma(logits, x.z, y.z, x.w, y.w, q.z, q.w);
        }
        float decay[2];
        bool moved = false;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float& one = logits[e];
            float& two = logits[2 + e];
            one = logit_of(one, scale, soft_cap, g < count && g >= start[b][e]);
            two = logit_of(two, scale, soft_cap, g + 8 < count && g + 8 >= start[b][e]);
            float top = fmaxf(one, two);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
            top = fmaxf(top, state.max[b][e]);
            const float safe = top == -INFINITY ? 0.f : top;
            decay[e] = exp2_of(state.max[b][e] - safe);
            one = exp2_of(one - safe);
            two = exp2_of(two - safe);
            state.sum[b][e] = state.sum[b][e] * decay[e] + one + two;
            moved |= top > state.max[b][e] && state.max[b][e] != -INFINITY;
            state.max[b][e] = top;
        }
        weight[b][0] = transposed(pack<HALF_KV>(logits[0], logits[1]));
        weight[b][1] = transposed(pack<HALF_KV>(logits[2], logits[3]));
        if (!__any_sync(ALL_LANES, moved)) continue;  // nothing has been summed up yet, or no maximum has changed
#pragma unroll
        for (int i = 0; i < V_CHUNKS * 16; ++i) {
            state.out[b][i / 16][i / 4 % 4][i % 4] *= decay[i % 2];
            if (KEYS) keys.out[b][i / 16][i / 4 % 4][i % 4] *= decay[i % 2];
        }
    }
    accumulate(state.out, value, weight);
    if constexpr (KEYS) {  // once more, in the layout of the values: by now they are in the nearest cache
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const Row row = at(min(row_of_value(lane, r), count - 1));
#pragma unroll
            for (int i = 0; i < V_CHUNKS; ++i) value[r][i] = load_chunk<64>(row.k, i, 8 * g, row.swizzle);
        }
        accumulate(keys.out, value, weight);
    }
}

// Sends a warp's sums to the blocks that own the heads; parts [heads of a block, HEAD_DIM].
DEVICE void push_sums(const float (&out)[HEAD_BLOCKS][V_CHUNKS][4][4], float* part, int lane) {
#pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int head = 8 * b + 2 * (lane % 4) + e;
            if (head >= GROUP) continue;
            float4* to = (float4*)in_block(part + head / CLUSTER * HEAD_DIM + 8 * (lane / 4), head % CLUSTER);
#pragma unroll
            for (int i = 0; i < V_CHUNKS; ++i) {
                if (64 * i + 8 * (lane / 4) >= HEAD_DIM) continue;
                const float(&x)[4][4] = out[b][i];
                to[16 * i] = make_float4(x[0][e], x[0][2 + e], x[1][e], x[1][2 + e]);
                to[16 * i + 1] = make_float4(x[2][e], x[2][2 + e], x[3][e], x[3][2 + e]);
            }
        }
}

// Completes the sums of weights: every lane then holds those of its two heads.
DEVICE void reduce_sums(State& state) {
#pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2)
                state.sum[b][e] += __shfl_xor_sync(ALL_LANES, state.sum[b][e], lanes);
}
