// The rest [start, E) of every kv group: tiles of 16 keys laid end to end and cut into runs, one a block.
//
// A group's state arrives in parts, one a block that shares it. Parts are numbered in the order of the tiles: the block
// that comes o-th writes its part of group g to slot o + g, which no other pair has; the first slot and their number are
// noted.
//
// Where the front leaves SMs free, the blocks there come first, and their runs are longer. If no group was reused in the
// step before, they do not wait for the decision: they begin as if all missed again.
#include "attend.cuh"
#include "bypass.cuh"

struct Args {  // in the order of mac_kernels.cuda.rest
    // may change from step to step
    const half_bits *q, *k, *v;
    const float *k_scale_ptr, *v_scale_ptr;
    i64 stride_qb;
    int stride_qh;
    float k_scale, v_scale;
    int num_groups;
    // the same for every step of a layer
    const begin_t* begin;
    const page_t* pages;
    const length_t* lengths;
    const int* info;
    u32* tickets;  // how many blocks have come, and AHEAD
    int* bypass;
    int* parts;
    float *part_out, *part_key, *part_lse;
    Strides strides;
    float logit_scale, soft_cap, break_even;
    int num_blocks, early_blocks;  // these have SMs of their own, and so many tiles more than the others:
    int lead, lead_ahead;          // beginning with the decision, or ahead of it
    int tiles_ahead;               // that a warp attends to before it waits for the decision
};

constexpr u32 AHEAD = 1u << 31;  // no group was reused in the step before

constexpr int ROW = V_CHUNKS * 64;  // numbers between rows in shared memory
constexpr int STAGE = 2 * 16 * ROW;
constexpr int FITTING = SHARED_BYTES / (WARPS * STAGE * (int)sizeof(half_bits)), STAGES = FITTING < 2 ? 2 : FITTING;

struct Sums {
    float out[GROUP][HEAD_DIM], key[KBAR ? GROUP : 1][HEAD_DIM];
};

struct __align__(16) Shared {
    union {
        half_bits ring[STAGES][2][16][ROW];  // keys, values
        Sums sums;                           // in the end
    } of[WARPS];
    half_bits q[GROUP][HEAD_DIM];
    float2 weight[WARPS][GROUP];  // maximum, sum
    int tiles[WARPS];
    u32 ticket;
    int group, begin;
};

__device__ char rest_shared[sizeof(Shared) / 16];  // tells the host, by its size, what a launch needs

struct Range {
    int low, high;
};

DEVICE i64 first_page(const Args& a, int request) { return (i64)a.begin[request] * (ROW_STRIDE > 0 ? ROW_STRIDE : 1); }

// What a group has to attend to: as decided, or `ahead` of the decision all that a miss attends to.
DEVICE Range range_of(const Args& a, int group, bool ahead) {
    if (!ahead) return {a.info[8 * group], a.info[8 * group + 1]};
    const int request = group / NUM_KV_HEADS;
    int length = (int)a.lengths[request];
    if (ROW_STRIDE == 0) {
        const int pages = (int)(a.begin[request + 1] - a.begin[request]);
        length = pages > 0 ? (pages - 1) * PAGE_SIZE + length : 0;
    }
    return {SINKS, max(length - BAND, SINKS)};
}

DEVICE int tiles_of(Range range) { return max(range.high - range.low + 15, 0) / 16; }

struct Deal {  // of all tiles to the blocks, in the order in which they come
    int total, blocks, early, lead;
};

DEVICE int run_begin(const Deal& d, int order) {
    const int even = d.total - d.early * d.lead;
    return min(order, d.early) * d.lead + order * (even / d.blocks) + min(order, even % d.blocks);
}

DEVICE int order_of(const Deal& d, int tile) {  // of the block whose run has a tile
    int low = 0, high = d.blocks - 1;
#pragma unroll 1
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (run_begin(d, middle) <= tile) low = middle;
        else high = middle - 1;
    }
    return low;
}

struct Run {  // of a block; group and begin are those of its first tile's group
    int first, stop, group, begin;
};

struct Share {  // of a thread: groups whose tiles it counts
    int from, to;
};

DEVICE Share share_of(const Args& a, int thread) {
    const int each = (a.num_groups + THREADS - 1) / THREADS;
    return {min(thread * each, a.num_groups), min((thread + 1) * each, a.num_groups)};
}

struct Count {
    int tiles;
    bool reused;  // a group, as far as it is known
};

DEVICE Count count_of(const Args& a, Share share, bool ahead) {
    Count count = {0, false};
#pragma unroll 1
    for (int group = share.from; group < share.to; ++group) {
        count.tiles += tiles_of(range_of(a, group, ahead));
        if (!ahead) count.reused |= a.info[8 * group + 4] != 0;
    }
    return count;
}

// Every thread has counted its `own` tiles; the one that has the run's first tile tells its group.
DEVICE Run find_run(const Args& a, Shared& shared, Share share, int own, int order, bool ahead, int warp, int lane) {
    int end = own;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int before = __shfl_sync(ALL_LANES, end, lane - lanes);
        if (lane >= lanes) end += before;
    }
    if (lane == 31) shared.tiles[warp] = end;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) end += shared.tiles[w];
        total += shared.tiles[w];
    }
    const int lead = ahead ? a.lead_ahead : a.lead;
    const Deal deal = {total, a.num_blocks, a.early_blocks, min(lead, total / max(a.early_blocks, 1))};
    Run run = {run_begin(deal, order), run_begin(deal, order + 1), 0, 0};
    const bool tells = end - own <= run.first && run.first < end, notes = order == 0;
    if (tells || notes) {
        int begin = end - own;
#pragma unroll 1
        for (int group = share.from; group < share.to; ++group) {
            const int tiles = tiles_of(range_of(a, group, ahead));
            if (begin <= run.first && run.first < begin + tiles) shared.group = group, shared.begin = begin;
            if (notes) {
                const int first = order_of(deal, begin);
                a.parts[2 * group] = first + group;
                a.parts[2 * group + 1] = tiles > 0 ? order_of(deal, begin + tiles - 1) - first + 1 : 0;
            }
            begin += tiles;
        }
    }
    if (run.first == run.stop) return run;
    __syncthreads();
    run.group = shared.group, run.begin = shared.begin;
    return run;
}

// The next group that has tiles; there is one.
DEVICE int next_group(const Args& a, int group, bool ahead, int lane) {
#pragma unroll 1
    for (int first = group + 1;; first += 32) {
        const bool has = first + lane < a.num_groups && tiles_of(range_of(a, first + lane, ahead)) > 0;
        const int found = __reduce_min_sync(ALL_LANES, has ? lane : 32);
        if (found < 32) return first + found;
    }
}

DEVICE void let_follow() {  // what comes next reads the decisions before it waits
    grid_wait();
    grid_launch_dependents();
}

// Neither rows 2 q and 2 q + 1 (read as keys) nor every other one (read as values) meet in a bank.
DEVICE int swizzle_of(int row) { return (row & 6) ^ ((row & 1) << 2); }

// Starts to copy the 16 keys and values at `first`; a lane holds the page of row lane % 16. Rows from `high` on repeat
// the last one.
DEVICE void fetch(const Args& a, const half_bits* k, const half_bits* v, half_bits (&to)[2][16][ROW], int page, int first,
                  int high, int lane) {
    const Row own = row_at(a.strides, k, v, page, min(first + lane % 16, high - 1));
    constexpr int CHUNKS = ROW / 8;
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
        const int row = (32 * i + lane) / CHUNKS, chunk = (32 * i + lane) % CHUNKS;
        const int at = (chunk ^ swizzle_of(row)) * 8;
        const half_bits* from_k = (const half_bits*)__shfl_sync(ALL_LANES, (u64)own.k, row);
        const half_bits* from_v = (const half_bits*)__shfl_sync(ALL_LANES, (u64)own.v, row);
        if (HEAD_DIM % 64 > 0 && 8 * chunk >= HEAD_DIM) continue;
        copy_async((uint4*)&to[0][row][at], (const uint4*)(from_k + 8 * chunk));
        copy_async((uint4*)&to[1][row][at], (const uint4*)(from_v + 8 * chunk));
    }
}

// Attends to so many tiles of a group, the first at position `first`; each warp leaves its sums in shared memory. Ahead
// of the decision it waits for it after a while; returns whether there is anything to merge.
DEVICE bool attend_tiles(const Args& a, Shared& shared, int group, int first, int high, int tiles, bool ahead,
                         float scale, int warp, int lane) {
    const int request = group / NUM_KV_HEADS, kv_head = group % NUM_KV_HEADS;
    const page_t* pages = a.pages + first_page(a, request);
    const half_bits *k = a.k + (i64)kv_head * a.strides.kh, *v = a.v + (i64)kv_head * a.strides.vh;
    auto& ring = shared.of[warp].ring;
    const auto page_of = [&](int tile) {
        return tile < tiles ? (int)pages[min(first + 16 * tile + lane % 16, high - 1) / PAGE_SIZE] : 0;
    };
    int pages_ahead[STAGES];
#pragma unroll
    for (int i = 0; i < STAGES; ++i) pages_ahead[i] = page_of(warp + i * WARPS);
    load_query(&shared.q[0][0], a.q + request * a.stride_qb + kv_head * GROUP * a.stride_qh, a.stride_qh,
               warp * 32 + lane, THREADS);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (warp + i * WARPS < tiles) fetch(a, k, v, ring[i], pages_ahead[i], first + 16 * (warp + i * WARPS), high, lane);
        copies_commit();
    }
    const int start[HEAD_BLOCKS][2] = {};  // all heads of a group that misses see all
    __syncthreads();
    State state, keys;
    clear(state);
    clear(keys);
    int page = pages_ahead[STAGES - 1], stage = 0, until = ahead ? a.tiles_ahead : -1;
    bool reused = false;
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += WARPS) {
        if (until-- == 0) {
            let_follow();
            reused = a.info[8 * group + 4] != 0;
            if (reused) break;
        }
        copies_wait_but<STAGES - 2>();
        __syncwarp();  // all lanes are done with the tile before, too
        const int later = tile + (STAGES - 1) * WARPS, free = stage == 0 ? STAGES - 1 : stage - 1;
        if (later < tiles) fetch(a, k, v, ring[free], page, first + 16 * later, high, lane);
        copies_commit();
        page = page_of(later + WARPS);
        const int low = first + 16 * tile;
        const auto at = [&](int row) { return Row{ring[stage][0][row], ring[stage][1][row], swizzle_of(row)}; };
        attend_tile<KBAR>(state, keys, &shared.q[0][0], at, high - low, start, scale, a.soft_cap, lane);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    if (until >= 0) {
        let_follow();
        reused = a.info[8 * group + 4] != 0;
    }
    copies_wait();
    if (reused || warp >= tiles) return !reused;
    __syncwarp();  // sums take the place of tiles
    reduce_sums(state);
#pragma unroll
    for (int i = 0; i < 2 * HEAD_BLOCKS; ++i) {
        const int head = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        if (head < GROUP && lane < 4)
            shared.weight[warp][head] = make_float2(state.max[i / 2][i % 2], state.sum[i / 2][i % 2]);
    }
    push_sums(state.out, &shared.of[warp].sums.out[0][0], lane);
    if (KBAR) push_sums(keys.out, &shared.of[warp].sums.key[0][0], lane);
    return true;
}

// Merges what so many warps have left into a part; a thread takes 4 dims of a head.
DEVICE void write_part(const Args& a, const Shared& shared, i64 part, int warps, float k_scale, float v_scale,
                       int thread) {
#pragma unroll 1
    for (int i = thread; i < GROUP * HEAD_DIM / 4; i += THREADS) {
        const int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
        float top = -INFINITY, total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w)
            if (w < warps) top = fmaxf(top, shared.weight[w][head].x);
        const float safe = top == -INFINITY ? 0.f : top;
        float4 out = make_float4(0.f, 0.f, 0.f, 0.f), key = out;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w >= warps) break;
            const float2 of_warp = shared.weight[w][head];
            const float weight = exp2_of(of_warp.x - safe);
            total += weight * of_warp.y;
            add(out, weight, *(const float4*)&shared.of[w].sums.out[head][d]);
            if (KBAR) add(key, weight, *(const float4*)&shared.of[w].sums.key[head][d]);
        }
        const i64 at = part * GROUP + head;
        const float inverse = 1.f / (total > 0.f ? total : 1.f);
        *(float4*)(a.part_out + at * HEAD_DIM + d) = times(v_scale * inverse, out);
        if (KBAR) *(float4*)(a.part_key + at * HEAD_DIM + d) = times(k_scale * inverse, key);
        if (d == 0) a.part_lse[at] = total > 0.f ? log2_of(total) + top : -INFINITY;
    }
}

// Tells whether the next step may begin ahead; the tickets of this one are all taken.
DEVICE void renew_tickets(const Args& a, bool reused, int thread) {
    reused = __syncthreads_or(reused);
    if (thread == 0) a.tickets[0] = a.tiles_ahead > 0 && !reused ? AHEAD : 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) rest(const __grid_constant__ Args a) {
    Shared& shared = *(Shared*)shared_memory();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const Share share = share_of(a, thread);
    // most of these come when the front has ended: what follows may come, too, while they take their tickets
    const bool late = blockIdx.x >= a.early_blocks;
    u32 ticket = blockIdx.x;  // unless some have longer runs: then those that come first
    Count own = {0, false};
    if (thread == 0 && a.early_blocks > 0) ticket = atomicAdd(a.tickets, 1u);
    if (late) {
        let_follow();
        own = count_of(a, share, false);
    }
    if (thread == 0) shared.ticket = ticket;
    __syncthreads();
    const bool ahead = shared.ticket >= AHEAD, guesses = ahead && !late;  // it begins without the decision
    const int order = shared.ticket & ~AHEAD;
    const bool is_first = order == 0, is_last = a.early_blocks > 0 && order == a.num_blocks - 1;
    if (!late && !ahead) {
        let_follow();
        own = count_of(a, share, false);
    }
    if (!guesses) {
        if (is_last) renew_tickets(a, own.reused, thread);
        if (!__syncthreads_or(own.tiles > 0) && !is_first) return;
        if (BYPASS && is_first && thread == 0) judge_hits(a.bypass, a.break_even);
    }
    if (ahead) own = count_of(a, share, true);
    const Run run = find_run(a, shared, share, own.tiles, order, ahead, warp, lane);
    bool waits = guesses;  // still
    if (waits && run.first == run.stop) let_follow();
    const float k_scale = scale_of(a.k_scale_ptr, a.k_scale), v_scale = scale_of(a.v_scale_ptr, a.v_scale);
    int group = run.group, begin = run.begin;
#pragma unroll 1
    for (int first = run.first; first < run.stop;) {
        const Range range = range_of(a, group, ahead);
        const int end = begin + tiles_of(range), tiles = min(end, run.stop) - first;
        if (waits || !ahead || a.info[8 * group + 4] == 0) {
            const bool any = attend_tiles(a, shared, group, range.low + 16 * (first - begin), range.high, tiles, waits,
                                          a.logit_scale * k_scale, warp, lane);
            waits = false;
            __syncthreads();
            if (any) write_part(a, shared, (i64)order + group, min(tiles, WARPS), k_scale, v_scale, thread);
        }
        first += tiles;
        if (first == run.stop) break;
        begin = end;
        group = next_group(a, group, ahead, lane);
        __syncthreads();  // before shared memory is written again
    }
    if (!guesses) return;
    if (is_last) renew_tickets(a, count_of(a, share, false).reused, thread);
    if (BYPASS && is_first && thread == 0) judge_hits(a.bypass, a.break_even);
}
