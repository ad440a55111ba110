// Arguments of the front, and what a block keeps in shared memory.
#pragma once
#include "types.cuh"

#if SLOT_64
typedef i64 slot_t;
#else
typedef int slot_t;
#endif
#if GENERATION_64
typedef i64 generation_t;
#else
typedef int generation_t;
#endif

struct Args {  // in the order of mac_kernels.cuda.front
    // may change from step to step
    const half_bits *q, *k, *v;
    const slot_t* slots;
    const generation_t* generations;
    const float *k_scale_ptr, *v_scale_ptr;
    half_bits* out;
    i64 stride_qb, stride_ob;
    int stride_qh, stride_oh;
    float k_scale, v_scale;
    // the same for every step of a layer
    const begin_t* begin;
    const page_t* pages;
    const length_t* lengths;
    const int* slot_table;
    const i64* ring_generation;
    half_bits *ring_q, *ring_out, *ring_key;
    float* ring_lse;
    int *ring_pos, *ring_anchor;
    signed char* ring_sketch;
    float* ring_scale;
    const int* sketch_index;
    const float* sketch_sign;
    u64* counters;
    int* bypass;
    const float *cos_sin, *cap, *influence;
    float *always_out, *always_lse;
    int* decision_int;
    float* decision_float;
    int* info;
    Strides strides;
    float logit_scale, soft_cap;
    int num_slots, max_age, min_context;
};

constexpr int SIDE = THREADS / 2;  // one half of a block searches the ring, the other attends to band and sinks
constexpr int SIDE_WARPS = WARPS / 2;
constexpr int QO_HEADS = NUM_KV_HEADS * GROUP;
constexpr int OWN_HEADS = (GROUP + CLUSTER - 1) / CLUSTER;  // head h is completed by block h % CLUSTER

constexpr bool FEW_GROUPS = CLUSTER >= 4;  // latency counts, bandwidth does not: fetch what may be needed next

constexpr int SEGMENT = 64;  // rows that are ranked among each other first
constexpr int ROWS = (WINDOW + CLUSTER - 1) / CLUSTER;
constexpr int SEGMENTS = (ROWS + SEGMENT - 1) / SEGMENT;
constexpr int PER_SEGMENT = NOMINEES < SEGMENT ? NOMINEES : SEGMENT;
constexpr int CANDIDATES = CLUSTER * SEGMENTS * PER_SEGMENT;
constexpr int CANDIDATE_SLOTS = CANDIDATES <= 128 ? (CANDIDATES + 7) / 8 * 8 : (CANDIDATES + 127) / 128 * 128;
constexpr int BAND_PARTS = CLUSTER * SIDE_WARPS;
constexpr int REST_PARTS = CLUSTER * WARPS;
constexpr int PAGES = (WINDOW - 1) / PAGE_SIZE + 2;  // that the rest of a reused group may touch

struct __align__(16) Shared {
    float band_out[BAND_PARTS][OWN_HEADS][HEAD_DIM];
    float rest_out[REST_PARTS][OWN_HEADS][HEAD_DIM];
    float rest_key[KBAR ? REST_PARTS : 1][OWN_HEADS][HEAD_DIM];
    float key[OWN_HEADS][HEAD_DIM];
    float q_pre[GROUP][HEAD_DIM];
    half_bits q[GROUP][HEAD_DIM];
    float query[128];
    int keys[SEGMENTS * SEGMENT];
    int candidates[CANDIDATE_SLOTS];
    float2 band_weight[BAND_PARTS][GROUP];  // maximum, sum
    float2 rest_weight[REST_PARTS][OWN_HEADS];
    float2 near[NOMINEES][GROUP];  // distance, corrected lse
    page_t pages[PAGES];
    float cosine[HEAD_DIM], sine[HEAD_DIM];
    int nominees[NOMINEES];
    int anchors[NOMINEES];
    int largest[SIDE_WARPS];
};
