// The search of a ring: sketch of the query, squared distances, the nearest rows, and their exact distances.
#pragma once
#include "layout.cuh"

constexpr int INFINITE = 0x7f800000;  // keys from here on: rows that nothing may match
constexpr int STEPS = 4;              // loads of 4 rows that a warp has in flight
constexpr int LIKELY = 4;             // rows of a block that may well be nominated
constexpr int BLOCK_ROWS = 4 * STEPS;
constexpr int IMAGES = (SKETCH_DIM + SIDE - 1) / SIDE;  // sketch elements of a thread
constexpr int D_CHUNKS = (HEAD_DIM + 127) / 128;        // of 16 lanes x 8 dims

struct Step {  // what all threads know of a group
    int group, request, kv_head, position, ring, rank;
    bool searching;
    i64 first_page, ring_row;
};

constexpr int PAIRS = NOMINEES * GROUP;  // of a nominated row and a head; half a warp takes one
constexpr int PAIRS_AT_ONCE = 2 * CLUSTER * WARPS;
constexpr int TRIPS = (PAIRS + PAIRS_AT_ONCE - 1) / PAIRS_AT_ONCE;
constexpr int MOST_PAIRS = D_CHUNKS == 1 ? 6 : 3;  // that a thread has in flight
constexpr int BATCH = TRIPS < MOST_PAIRS ? TRIPS : MOST_PAIRS;

struct Rows {  // BLOCK_ROWS rows: 8 lanes share one, 16 codes each
    uint4 codes[STEPS];
    int pos;
    float scale;
};

// Rows [first, first + BLOCK_ROWS) of this block's share, as far as they are below `last`.
DEVICE Rows load_rows(const Args& a, const Step& s, int first, int last, int lane) {
    Rows rows;
    const int own = first + lane % BLOCK_ROWS;
    rows.pos = own < last ? a.ring_pos[s.ring_row + own] : -1;
    rows.scale = own < last ? a.ring_scale[(s.ring_row + own) * NUM_KV_HEADS + s.kv_head] : 0.f;
    const int row = first + lane / 8, code = 16 * (lane % 8);
    const signed char* from = a.ring_sketch + ((s.ring_row + row) * NUM_KV_HEADS + s.kv_head) * SKETCH_DIM + code;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const bool present = row + 4 * i < last && code < SKETCH_DIM;
        rows.codes[i] = present ? *(const uint4*)(from + 4 * i * NUM_KV_HEADS * SKETCH_DIM) : make_uint4(0, 0, 0, 0);
    }
    return rows;
}

// Sum of squared differences of 16 elements; products are rounded like those of the query, so equal rows give 0.
DEVICE float gap_of(const uint4& codes, float scale, const float (&query)[16]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const u32 four = i < 4 ? codes.x : i < 8 ? codes.y : i < 12 ? codes.z : codes.w;
        const float gap = __fmul_rn(number_of(four, i % 4), scale) - query[i];
        sum += gap * gap;
    }
    return sum;
}

// The key of a row: its squared distance, the last bits replaced by the lag; unique among all rows.
DEVICE int key_of(float distance, int pos, int position, int row) {
    const bool eligible = pos > position - WINDOW && pos < position && pos + 1 - BAND > SINKS;
    const int bits = __float_as_int(distance) & 0x7fffffff;
    return eligible && bits < INFINITE ? (bits & ~(BLOCK_W - 1)) + position - pos : INFINITE + row;
}

DEVICE void store_keys(const Step& s, const Rows& rows, const float (&query)[16], int first, int begin, int* keys,
                       int lane) {
    float part[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        part[i] = gap_of(rows.codes[i], __shfl_sync(ALL_LANES, rows.scale, 4 * i + lane / 8), query);
    // halve the number of rows with every exchange: in the end a lane holds the sum of one
    const bool high = lane & 4, odd = lane & 2;
    const float a = (high ? part[2] : part[0]) + __shfl_xor_sync(ALL_LANES, high ? part[0] : part[2], 4);
    const float b = (high ? part[3] : part[1]) + __shfl_xor_sync(ALL_LANES, high ? part[1] : part[3], 4);
    float sum = (odd ? b : a) + __shfl_xor_sync(ALL_LANES, odd ? a : b, 2);
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    const int row = 4 * (lane / 2 % 4 / 2 * 2 + lane / 2 % 2) + lane / 8;
    const int pos = __shfl_sync(ALL_LANES, rows.pos, row);
    const int local = first - begin + row;
    if (lane % 2 == 0) keys[local] = key_of(sum, pos, s.position, s.rank * SEGMENTS * SEGMENT + local);
}

template <int COUNT> DEVICE int rank_among(const int* keys, int key) {
    int rank = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        const int4 other = *(const int4*)(keys + i);
        rank += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
    }
    return rank;
}

// Ranks every segment's keys and tells all blocks of the cluster the smallest ones.
DEVICE void push_candidates(const Args& a, const Step& s, Shared& shared, int thread) {
#pragma unroll 1
    for (int i = thread; i < SEGMENTS * SEGMENT; i += SIDE) {
        const int key = shared.keys[i], rank = rank_among<SEGMENT>(shared.keys + i / SEGMENT * SEGMENT, key);
        int* to = shared.candidates + (s.rank * SEGMENTS + i / SEGMENT) * PER_SEGMENT + rank;
        if (rank < PER_SEGMENT)
            for (int block = 0; block < CLUSTER; ++block) *in_block(to, block) = key;
        if (FEW_GROUPS && rank < LIKELY && key < INFINITE) {
            const i64 row = s.ring_row + (s.position - (key & (BLOCK_W - 1))) % WINDOW;
            const i64 at = (row * QO_HEADS + s.kv_head * GROUP) * HEAD_DIM;
            for (int line = 0; line < GROUP * HEAD_DIM; line += 64) {
                prefetch(a.ring_q + at + line);
                if (CORRECTION) prefetch(a.ring_key + at + line);
            }
        }
    }
}

// Positions of the nearest rows, -1 where there are fewer (set beforehand). Two threads share a candidate.
DEVICE void nominate(Shared& shared, int position, int thread) {
    constexpr int HALF = CANDIDATE_SLOTS / 2, PIECE = HALF < 64 ? HALF : 64;
#pragma unroll 1
    for (int first = 0; first < CANDIDATES; first += THREADS / 2) {
        const int i = first + thread / 2, key = shared.candidates[min(i, CANDIDATES - 1)];
        int rank = 0;
#pragma unroll 1
        for (int from = 0; from < HALF; from += PIECE)
            rank += rank_among<PIECE>(shared.candidates + thread % 2 * HALF + from, key);
        rank += __shfl_xor_sync(ALL_LANES, rank, 1);
        if (i < CANDIDATES && key < INFINITE && rank < NOMINEES && thread % 2 == 0)
            shared.nominees[rank] = position - (key & (BLOCK_W - 1));
    }
}

struct Pair {  // a nominated row and a head; 16 lanes share it, 8 dims each
    uint4 query[D_CHUNKS], mean[CORRECTION ? D_CHUNKS : 1];
    float lse;
    int anchor;
};

DEVICE int pair_of(const Step& s, int trip, int warp, int lane) {
    return trip * PAIRS_AT_ONCE + 2 * (s.rank * WARPS + warp) + lane / 16;
}

DEVICE void load_pair(const Args& a, const Step& s, const Shared& shared, Pair& pair, int index, int lane) {
    const int head = index % GROUP, pos = index < PAIRS ? shared.nominees[index / GROUP] : -1;
    const i64 row = s.ring_row + max(pos, 0) % WINDOW, at = row * QO_HEADS + s.kv_head * GROUP + head;
    const i64 element = at * HEAD_DIM + 8 * (lane % 16);
#pragma unroll
    for (int i = 0; i < D_CHUNKS; ++i) {
        const bool present = pos >= 0 && 128 * i + 8 * (lane % 16) < HEAD_DIM;
        pair.query[i] = present ? *(const uint4*)(a.ring_q + element + 128 * i) : make_uint4(0, 0, 0, 0);
        if (CORRECTION)
            pair.mean[i] = present ? *(const uint4*)(a.ring_key + element + 128 * i) : make_uint4(0, 0, 0, 0);
    }
    pair.lse = pos < 0 ? 0.f : a.ring_lse[at];
    pair.anchor = pos < 0 ? -1 : a.ring_anchor[row * NUM_KV_HEADS + s.kv_head];
}

// Tells all blocks the exact distance of a pair, and the weight that the head's state would have.
DEVICE void push_pair(const Args& a, Shared& shared, const Pair& pair, int index, int lane) {
    const int slot = min(index, PAIRS - 1) / GROUP, head = index % GROUP, to = lane % 16;
    float square = 0.f, step = 0.f;
#pragma unroll
    for (int i = 0; i < D_CHUNKS; ++i) {
        const int d = 128 * i + 8 * (lane % 16);
        if (d >= HEAD_DIM) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 x = unpack<HALF_ROWS>(word(pair.query[i], j));
            const float2 q = *(const float2*)&shared.q_pre[head][d + 2 * j];
            const float one = q.x - x.x, other = q.y - x.y;
            square += one * one + other * other;
            if (CORRECTION) {
                const float2 y = unpack<HALF_ROWS>(word(pair.mean[i], j));
                step += one * y.x + other * y.y;
            }
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) {
        square += __shfl_xor_sync(ALL_LANES, square, lanes);
        if (CORRECTION) step += __shfl_xor_sync(ALL_LANES, step, lanes);
    }
    if (index >= PAIRS || to >= CLUSTER) return;
    const bool found = shared.nominees[slot] >= 0;
    const float moved = CORRECTION ? fminf(fmaxf(step * a.logit_scale, -1024.f), 1024.f) : 0.f;
    *in_block(&shared.near[slot][head], to) = make_float2(found ? sqrtf(square) : INFINITY, pair.lse + moved);
    if (head == 0) *in_block(&shared.anchors[slot], to) = pair.anchor;
}

// The group's queries before RoPE, into shared memory; every thread of a side has its dims.
DEVICE void unrotate(const Args& a, const Step& s, Shared& shared, int thread) {
    constexpr int HALF = ROTARY_DIM / 2, AT_ONCE = HEAD_DIM < SIDE ? SIDE / HEAD_DIM : 1;
    const half_bits* q = a.q + s.request * a.stride_qb + s.kv_head * GROUP * a.stride_qh;
    const float* turn = a.cos_sin + (i64)max(s.position, 0) * ROTARY_DIM;
#pragma unroll
    for (int i = 0; i < (HEAD_DIM + SIDE - 1) / SIDE; ++i) {
        const int d = HEAD_DIM < SIDE ? thread % HEAD_DIM : thread + i * SIDE, head = d == thread + i * SIDE ? 0 : thread / HEAD_DIM;
        if (d >= HEAD_DIM || head >= AT_ONCE) continue;
        const bool turned = d < ROTARY_DIM, first = INTERLEAVED ? d % 2 == 0 : d < HALF;
        const int other = !turned ? d : INTERLEAVED ? d ^ 1 : first ? d + HALF : d - HALF;
        const int angle = INTERLEAVED ? d / 2 : first ? d : d - HALF;
        float x[(GROUP + AT_ONCE - 1) / AT_ONCE], y[(GROUP + AT_ONCE - 1) / AT_ONCE];
#pragma unroll
        for (int j = 0; j < (GROUP + AT_ONCE - 1) / AT_ONCE; ++j) {
            const half_bits* from = q + min(head + j * AT_ONCE, GROUP - 1) * a.stride_qh;
            x[j] = unpack<HALF_KV>(from[d]).x;
            y[j] = unpack<HALF_KV>(from[other]).x;
        }
        const float cosine = turned ? turn[angle] : 1.f;
        const float sine = !turned ? 0.f : first ? turn[HALF + angle] : -turn[HALF + angle];
        const float inverse = 1.f / (cosine * cosine + sine * sine);
#pragma unroll
        for (int j = 0; j < (GROUP + AT_ONCE - 1) / AT_ONCE; ++j)
            if (head + j * AT_ONCE < GROUP)
                shared.q_pre[head + j * AT_ONCE][d] = (x[j] * cosine + y[j] * sine) * inverse;
        if (head == 0) shared.cosine[d] = cosine, shared.sine[d] = sine;
    }
}

struct Terms {  // of this thread's sketch elements: which entries of the queries they add up
    int index[IMAGES][TERMS];
    float sign[IMAGES][TERMS];
};

DEVICE void load_terms(const Args& a, Terms& terms, int thread) {
#pragma unroll
    for (int i = 0; i < IMAGES; ++i)
#pragma unroll
        for (int t = 0; t < TERMS; ++t) {
            const int at = t * SKETCH_DIM + thread + i * SIDE;
            const bool present = thread + i * SIDE < SKETCH_DIM;
            terms.index[i][t] = present ? a.sketch_index[at] : 0;
            terms.sign[i][t] = present ? a.sketch_sign[at] : 0.f;
        }
}

struct Codes {
    float of[IMAGES], scale;
};

// The sketch of the query, dequantized into shared memory, and the codes of this thread's elements.
DEVICE Codes sketch(Shared& shared, const Terms& terms, int thread, int warp, int lane) {
    float image[IMAGES], top = 0.f;
#pragma unroll
    for (int i = 0; i < IMAGES; ++i) {
        image[i] = 0.f;
#pragma unroll
        for (int t = 0; t < TERMS; ++t) image[i] += terms.sign[i][t] * (&shared.q_pre[0][0])[terms.index[i][t]];
        top = fmaxf(top, fabsf(image[i]));
    }
    const int of_warp = __reduce_max_sync(ALL_LANES, __float_as_int(top));
    if (lane == 0) shared.largest[warp] = of_warp;
    some_sync(1, SIDE);
    int largest = 0;
#pragma unroll
    for (int i = 0; i < SIDE_WARPS; ++i) largest = max(largest, shared.largest[i]);
    Codes codes;
    codes.scale = fmaxf(__int_as_float(largest), 1e-30f) / 127.f;
#pragma unroll
    for (int i = 0; i < IMAGES; ++i) {
        codes.of[i] = fminf(fmaxf(floorf(image[i] / codes.scale + 0.5f), -127.f), 127.f);
        if (thread + i * SIDE < 128) shared.query[thread + i * SIDE] = __fmul_rn(codes.of[i], codes.scale);
    }
#pragma unroll
    for (int k = IMAGES * SIDE; k < 128; k += SIDE)
        if (k + thread < 128) shared.query[k + thread] = 0.f;
    some_sync(1, SIDE);
    return codes;
}
