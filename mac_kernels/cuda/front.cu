// The front of the fused decode step: one cluster of CLUSTER blocks per kv group.
//
// One half of a block searches the ring, the other attends to sinks and band. A group that is reused is completed here;
// of any other, sinks and band and the decision are left for the kernels that compute the rest.
#include "attend.cuh"
#include "complete.cuh"

__device__ char front_shared[sizeof(Shared) / 16];  // tells the host, by its size, what a launch needs

// What was sent before arriving is there after the wait.
DEVICE void arrive() {
    if (CLUSTER > 1) cluster_arrive();
}
DEVICE void wait() {
    if (CLUSTER > 1) cluster_wait();
    else __syncthreads();
}

DEVICE void send_state(State& state, float2* weights, float* parts, int lane, bool to_all) {
    reduce_sums(state);
#pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int head = 8 * b + 2 * (lane % 4) + e, to = lane / 4;
            const float2 weight = make_float2(state.max[b][e], state.sum[b][e]);
            if (head >= GROUP) continue;
            if (to_all && to < CLUSTER) *in_block(weights + head, to) = weight;
            if (!to_all && to == 0) *in_block(weights + head / CLUSTER, head % CLUSTER) = weight;
        }
    push_sums(state.out, parts, lane);
}

DEVICE void attend_always(const Args& a, const Step& s, Shared& shared, int stop, int entries,
                          float scale, int warp, int lane) {
    const page_t* pages = a.pages + s.first_page;
    const half_bits *k = a.k + (i64)s.kv_head * a.strides.kh, *v = a.v + (i64)s.kv_head * a.strides.vh;
    const int start[HEAD_BLOCKS][2] = {};
    const int part = warp * CLUSTER + s.rank;
    State state;
    clear(state);
    for (int first = 16 * part; first < entries; first += 16 * BAND_PARTS) {
        const int own = first + lane % 16, position = own < SINKS ? own : own + stop - SINKS;
        const int page = own < entries ? (int)pages[position / PAGE_SIZE] : 0;
        const auto at = [&](int row) {
            const int entry = first + row, where = entry < SINKS ? entry : entry + stop - SINKS;
            return row_at(a.strides, k, v, __shfl_sync(ALL_LANES, page, row), where);
        };
        attend_tile<false>(state, state, &shared.q[0][0], at, entries - first, start, scale, a.soft_cap, lane);
    }
    if (CLUSTER > 1) cluster_wait();  // all blocks run: from here on their shared memory may be written
    if (16 * part >= entries) return;
    send_state(state, shared.band_weight[part], &shared.band_out[part][0][0], lane, true);
}

// The tiles of a reused group's rest, dealt out to all warps of the cluster.
DEVICE void attend_rest(const Args& a, const Step& s, Shared& shared, const Verdict& v,
                        float scale, int first_page, int warp, int lane) {
    const int part = warp * CLUSTER + s.rank;
    if (v.low + 16 * part >= v.stop) return;
    State state, keys;
    const half_bits *k_head = a.k + (i64)s.kv_head * a.strides.kh, *v_head = a.v + (i64)s.kv_head * a.strides.vh;
    clear(state);
    clear(keys);
    for (int first = v.low + 16 * part; first < v.stop; first += 16 * REST_PARTS) {
        int start[HEAD_BLOCKS][2];
#pragma unroll
        for (int i = 0; i < 2 * HEAD_BLOCKS; ++i)
            start[i / 2][i % 2] = __shfl_sync(ALL_LANES, v.start, 8 * (i / 2) + 2 * (lane % 4) + i % 2) - first;
        const auto at = [&](int row) {
            const int position = first + row;
            return row_at(a.strides, k_head, v_head, (int)shared.pages[position / PAGE_SIZE - first_page], position);
        };
        attend_tile<KBAR>(state, keys, &shared.q[0][0], at, v.stop - first, start, scale, a.soft_cap, lane);
    }
    send_state(state, shared.rest_weight[part], &shared.rest_out[part][0][0], lane, false);
    if (KBAR) push_sums(keys.out, &shared.rest_key[part][0][0], lane);
}

// Fetches the keys and values that a reuse of a recent row would add; a thread takes 128 bytes.
DEVICE void fetch_rest(const Args& a, const Step& s, int lowest, int stop, int thread) {
    constexpr int LINES = (HEAD_DIM + 63) / 64;
    const int index = s.rank * SIDE + thread, position = stop - 1 - index / (2 * LINES), line = index % LINES * 64;
    if (position < lowest) return;
    const half_bits *k = a.k + (i64)s.kv_head * a.strides.kh, *v = a.v + (i64)s.kv_head * a.strides.vh;
    const Row row = row_at(a.strides, k, v, (int)a.pages[s.first_page + position / PAGE_SIZE], position);
    prefetch((index / LINES % 2 ? row.v : row.k) + line);
}

// Keys of this block's rows; the smallest go to all blocks. Returns the sketch of the query.
DEVICE Codes search(const Args& a, const Step& s, Shared& shared, const Terms& terms, bool owned, int warp, int lane) {
    const int thread = warp * 32 + lane, begin = s.rank * ROWS;
    const int last = s.searching ? min(begin + ROWS, WINDOW) : 0;
    Rows rows = load_rows(a, s, begin + BLOCK_ROWS * warp, last, lane);
    unrotate(a, s, shared, thread);
#pragma unroll 1
    for (int i = thread; i < NOMINEES; i += SIDE) shared.nominees[i] = -1;
#pragma unroll 1
    for (int i = CANDIDATES + thread; i < CANDIDATE_SLOTS; i += SIDE) shared.candidates[i] = 0x7fffffff;
    some_sync(1, SIDE);
    const Codes codes = sketch(shared, terms, thread, warp, lane);
    if (s.searching && owned) {
        float query[16];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 four = ((const float4*)shared.query)[4 * (lane % 8) + i];
            query[4 * i] = four.x, query[4 * i + 1] = four.y, query[4 * i + 2] = four.z, query[4 * i + 3] = four.w;
        }
#pragma unroll 1
        for (int first = BLOCK_ROWS * warp; first < SEGMENTS * SEGMENT; first += BLOCK_ROWS * SIDE_WARPS) {
            Rows next;
            if (SEGMENTS * SEGMENT > BLOCK_ROWS * SIDE_WARPS)
                next = load_rows(a, s, begin + first + BLOCK_ROWS * SIDE_WARPS, last, lane);
            store_keys(s, rows, query, begin + first, begin, shared.keys, lane);
            rows = next;
        }
        some_sync(1, SIDE);
    }
    if (CLUSTER > 1) cluster_wait();
    if (s.searching && owned) push_candidates(a, s, shared, thread);
    return codes;
}

// Writes the query of the new row and its sketch. The row at m - W is overwritten from here on; nothing matches it any
// more, its tag is still the old position.
DEVICE void store_query(const Args& a, const Step& s, const Shared& shared, const Codes& codes, int thread) {
    const i64 row = s.ring_row + s.position % WINDOW, at = row * NUM_KV_HEADS + s.kv_head;
    if (s.rank == 0 && thread < SIDE) {
#pragma unroll
        for (int i = 0; i < IMAGES; ++i) {
            const int k = thread + i * SIDE;
            if (k < SKETCH_DIM) a.ring_sketch[at * SKETCH_DIM + k] = (signed char)codes.of[i];
        }
        if (thread == 0) a.ring_scale[at] = codes.scale;
    }
#pragma unroll 1
    for (int i = thread; i < OWN_HEADS * HEAD_DIM / 4; i += THREADS) {
        const int head = i / (HEAD_DIM / 4) * CLUSTER + s.rank, d = i % (HEAD_DIM / 4) * 4;
        if (head >= GROUP) continue;
        half_bits* to = a.ring_q + (row * QO_HEADS + s.kv_head * GROUP + head) * HEAD_DIM + d;
        *(uint2*)to = narrow<HALF_ROWS>(*(const float4*)&shared.q_pre[head][d]);
    }
}

// Writes sinks and band of the own heads for the kernels that complete a group that was not reused.
DEVICE void leave_always(const Args& a, const Step& s, const Unit& u, float4 always, float top, float sum,
                         float v_scale) {
    const i64 at = (i64)s.group * GROUP + u.head;
    *(float4*)(a.always_out + at * HEAD_DIM + u.d) = times(v_scale / (sum > 0.f ? sum : 1.f), always);
    if (u.d == 0) a.always_lse[at] = sum > 0.f ? log2_of(sum) + top : -INFINITY;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) front(const __grid_constant__ Args a) {
    Shared& shared = *(Shared*)shared_memory();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const bool searches = warp < SIDE_WARPS;
    Step s;
    s.rank = blockIdx.x % CLUSTER;
    s.group = blockIdx.x / CLUSTER;
    s.request = s.group / NUM_KV_HEADS;
    s.kv_head = s.group % NUM_KV_HEADS;
    arrive();
    const Limits limits = load_limits(a, s.kv_head, lane);
    Terms terms;
    Codes codes;
    if (searches) load_terms(a, terms, thread);
    grid_wait();
    grid_launch_dependents();

    const slot_t slot = a.slots[s.request];
    s.first_page = a.begin[s.request];
    int length = a.lengths[s.request];
    const generation_t generation = a.generations[s.request];
    const bool paused = BYPASS && a.bypass[2] > 0;
    s.ring = slot >= 0 && slot < a.num_slots ? a.slot_table[slot] : -1;
    if (ROW_STRIDE > 0) s.first_page *= ROW_STRIDE;
    else {
        const int pages = (int)(a.begin[s.request + 1] - s.first_page);
        length = pages > 0 ? (pages - 1) * PAGE_SIZE + length : 0;
    }
    s.position = length - 1;
    s.ring_row = (i64)max(s.ring, 0) * WINDOW;
    s.searching = s.ring >= 0 && s.position >= 0 && !paused;
    const bool owned = s.ring >= 0 && a.ring_generation[max(s.ring, 0)] == generation;
    const float k_scale = scale_of(a.k_scale_ptr, a.k_scale), v_scale = scale_of(a.v_scale_ptr, a.v_scale);
    const float scale = a.logit_scale * k_scale;
    const half_bits* q = a.q + s.request * a.stride_qb + s.kv_head * GROUP * a.stride_qh;
    const int lowest = max(s.position + 2 - WINDOW - BAND, SINKS), stop = max(s.position + 1 - BAND, SINKS);
    const int entries = min(SINKS, s.position + 1) + max(s.position + 1 - stop, 0);
    const int always_parts = min((entries + 15) / 16, BAND_PARTS);

    if (searches) {
        codes = search(a, s, shared, terms, owned, warp, lane);
    } else {
        load_query(&shared.q[0][0], q, a.stride_qh, thread - SIDE, SIDE);
        some_sync(2, SIDE);
        if (s.searching && lowest < stop) {
            const int pages = (stop - 1) / PAGE_SIZE - lowest / PAGE_SIZE + 1;
            const page_t* from = a.pages + s.first_page + lowest / PAGE_SIZE;
#pragma unroll 1
            for (int i = thread - SIDE; i < pages; i += SIDE) copy_async(shared.pages + i, from + i);
        }
        attend_always(a, s, shared, stop, entries, scale, warp - SIDE_WARPS, lane);
        if (FEW_GROUPS && s.searching) fetch_rest(a, s, lowest, stop, thread - SIDE);
        copies_wait();
        // as many as the other half: racecheck of compute-sanitizer takes a missing one for a hazard
        some_sync(2, SIDE);
        some_sync(2, SIDE);
        if (s.searching && owned) some_sync(2, SIDE);
    }
    s.searching = s.searching && owned;
    s.ring = owned ? s.ring : -1;
    arrive();
    wait();

    if (s.searching) {
        nominate(shared, s.position, thread);
        __syncthreads();
    }
    Pair pairs[BATCH];
    if (s.searching)
#pragma unroll
        for (int i = 0; i < BATCH; ++i) load_pair(a, s, shared, pairs[i], pair_of(s, i, warp, lane), lane);
    const float2 always_weight = weigh_always(shared, always_parts, lane);
    if (s.searching)
#pragma unroll 1
        for (int trip = 0;;) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i) push_pair(a, shared, pairs[i], pair_of(s, trip + i, warp, lane), lane);
            trip += BATCH;
            if (trip >= TRIPS) break;
#pragma unroll
            for (int i = 0; i < BATCH; ++i) load_pair(a, s, shared, pairs[i], pair_of(s, trip + i, warp, lane), lane);
        }
    arrive();
    if (owned && s.position >= 0) store_query(a, s, shared, codes, thread);
    wait();

    const Verdict v = decide(a, s, shared, limits, always_weight, paused, s.rank == 0 && warp == 0, lane);
    Stored stored[UNITS];
    float4 always[UNITS];
    float lse[UNITS], always_max[UNITS], always_sum[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const Unit u = unit_of(i, s.rank, thread);
        const int pos = __shfl_sync(ALL_LANES, v.pos, u.head % 16);
        lse[i] = __shfl_sync(ALL_LANES, v.lse, u.head % 16);
        always_max[i] = __shfl_sync(ALL_LANES, always_weight.x, u.head % 16);
        always_sum[i] = __shfl_sync(ALL_LANES, always_weight.y, u.head % 16);
        if (!u.present) continue;
        if (v.reuse) stored[i] = load_stored(a, s, u, pos);
        always[i] = always_of(shared, u, always_parts, always_max[i]);
        if (!v.reuse) leave_always(a, s, u, always[i], always_max[i], always_sum[i], v_scale);
    }
    if (!v.reuse) return;
    attend_rest(a, s, shared, v, scale, lowest / PAGE_SIZE, warp, lane);
    arrive();
    wait();

    const int parts = min((v.stop - v.low + 15) / 16, REST_PARTS);
    Merged row[UNITS];
    float4 key[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const Unit u = unit_of(i, s.rank, thread);
        if (u.present) row[i] = merge_rest(shared, u, stored[i], lse[i], parts, v_scale, k_scale, key[i]);
    }
    if (KBAR) __syncthreads();
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const Unit u = unit_of(i, s.rank, thread);
        if (!u.present) continue;
        if (KBAR) key[i] = pull_back(shared, u, key[i]);
        store_row(a, s, u, row[i], key[i], v.anchor);
        store_out(a, s, u, row[i], always[i], always_max[i], always_sum[i], v_scale);
    }
}
