// The names of device.cuh on a CPU: every CUDA thread is a fiber of one OS thread, barriers switch between them.
#pragma once
#define MAC_KERNELS_DEVICE
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
#define DEVICE static inline
#define ALL_LANES 0xffffffffu
#define __global__
#define __device__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
using std::max;
using std::min;

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Index threadIdx, blockIdx;

struct Barrier {
    int arrived = 0, phase = 0;
    int arrive(int threads) {
        const int mine = phase;
        if (++arrived == threads) arrived = 0, ++phase;
        return mine;
    }
};
struct Warp {
    Barrier barrier;
    u64 values[32];
    u32 a[32][4], b[32][2];
};
struct Block {
    std::vector<Warp> warps{THREADS / 32};
    Barrier barriers[3];
    int any = 0;
    std::vector<unsigned char> memory;
};
struct Copy {
    void* to;
    const void* from;
    size_t size;
};
struct Fiber {
    jmp_buf at;
    ucontext_t first;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> copies{1};  // groups under way; the last one is open
    int block, thread, cluster_phase = 0;
    const int* waits_for = nullptr;  // until this is another number
    int number;
    bool started = false, done = false, waited = false;
    bool may_run() const { return !done && (!waits_for || *waits_for != number); }
};
struct Change {  // by another launch; every block starts with what was before
    void* to;
    const void *before, *after;
    size_t size = 0;
};
static Change written_before;  // by what the grid waits for
static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static Barrier cluster;
static int current, first_block;
static jmp_buf finished;

// Goes on with a fiber of the same warp if there is one, so that warps are as far apart as barriers let them.
static void resume() {
    const int warp = current / 32 * 32, count = fibers.size();
    for (int i = 0; i < 32 + count; ++i) {
        const int next = i < 32 ? warp + (current + i) % 32 : (warp + i) % count;
        Fiber& f = fibers[next];
        if (!f.may_run()) continue;
        current = next;
        threadIdx.x = f.thread, blockIdx.x = first_block + f.block;
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        setcontext(&f.first);
    }
    _longjmp(finished, 1);
}
static void wait_for(const int& phase, int old) {
    Fiber& f = fibers[current];
    f.waits_for = &phase, f.number = old;
    if (phase == old && !_setjmp(f.at)) resume();
}
static Block& block() { return blocks[fibers[current].block]; }
static Warp& warp_here() { return block().warps[threadIdx.x / 32]; }
static void wait_at(Barrier& barrier, int threads) {
    const int phase = barrier.arrive(threads);
    wait_for(barrier.phase, phase);
}

static void grid_wait() {
    fibers[current].waited = true;
    memcpy(written_before.to, written_before.after, written_before.size);
}
static void grid_launch_dependents() {}
static void cluster_arrive() { fibers[current].cluster_phase = cluster.arrive(THREADS * CLUSTER); }
static void cluster_wait() { wait_for(cluster.phase, fibers[current].cluster_phase); }
static void some_sync(int barrier, int threads) { wait_at(block().barriers[barrier], threads); }
static void __syncthreads() { some_sync(0, THREADS); }
static int __syncthreads_or(int x) {
    Block& b = block();
    b.any |= x;
    __syncthreads();
    const int y = b.any;
    __syncthreads();
    b.any = 0;
    __syncthreads();
    return y;
}
static void __syncwarp() { wait_at(warp_here().barrier, 32); }
static void* shared_memory() { return block().memory.data(); }
template <typename T> static T* in_block(T* p, int rank) {
    return (T*)(blocks[rank].memory.data() + ((unsigned char*)p - block().memory.data()));
}
// Copies of odd threads are done at once, those of others as late as they may be.
template <typename T> static void copy_async(T* to, const T* from) {
    if (threadIdx.x % 2) *to = *from;
    else fibers[current].copies.back().push_back({to, from, sizeof(T)});
}
static void copies_commit() { fibers[current].copies.emplace_back(); }
template <int GROUPS> static void copies_wait_but() {  // the newest first: groups have no order
    auto& groups = fibers[current].copies;
    const int done = max((int)groups.size() - GROUPS - 1, 0);
    for (int i = done; i-- > 0;)
        for (const Copy& copy : groups[i]) memcpy(copy.to, copy.from, copy.size);
    groups.erase(groups.begin(), groups.begin() + done);
}
static void copies_wait() {
    copies_commit();
    copies_wait_but<0>();
}
static void prefetch(const void* from) { volatile char read = *(const char*)from; }

template <typename T> static T __shfl_sync(u32, T x, int lane) {
    Warp& w = warp_here();
    memcpy(&w.values[threadIdx.x % 32], &x, sizeof(T));
    __syncwarp();
    T y;
    memcpy(&y, &w.values[lane % 32], sizeof(T));
    __syncwarp();
    return y;
}
template <typename T> static T __shfl_xor_sync(u32, T x, int lanes) {
    return __shfl_sync(0, x, threadIdx.x % 32 ^ lanes);
}
template <typename F> static int reduced(int x, F f) {
    Warp& w = warp_here();
    w.values[threadIdx.x % 32] = (u32)x;
    __syncwarp();
    for (int i = 0; i < 32; ++i) x = f(x, (int)w.values[i]);
    __syncwarp();
    return x;
}
static int __reduce_min_sync(u32, int x) { return reduced(x, [](int a, int b) { return min(a, b); }); }
static int __reduce_max_sync(u32, int x) { return reduced(x, [](int a, int b) { return max(a, b); }); }
static int __ballot_sync(u32, bool x) {
    return reduced(x ? 1 << threadIdx.x % 32 : 0, [](int a, int b) { return a | b; });
}
static bool __any_sync(u32, bool x) { return reduced(x, [](int a, int b) { return a | b; }); }
template <typename T> static T atomicAdd(T* to, T x) { const T before = *to; *to += x; return before; }

static float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static float __fmul_rn(float x, float y) { return x * y; }
static float exp2_of(float x) { return std::exp2(x); }
static float log2_of(float x) { return std::log2(x); }

template <bool HALF> static u32 pack_one(float x) {
    if (HALF) { _Float16 y = (_Float16)x; unsigned short z; memcpy(&z, &y, 2); return z; }
    const u32 bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool HALF> static float unpack_one(u32 x) {
    if (!HALF) return __uint_as_float(x << 16);
    const unsigned short z = (unsigned short)x;
    _Float16 y;
    memcpy(&y, &z, 2);
    return (float)y;
}
template <bool HALF> static u32 pack(float low, float high) { return pack_one<HALF>(low) | pack_one<HALF>(high) << 16; }
template <bool HALF> static float2 unpack(u32 x) { return {unpack_one<HALF>(x & 0xffff), unpack_one<HALF>(x >> 16)}; }
static float number_of(u32 x, int i) { return (float)(signed char)(x >> 8 * i); }
static u32 low_halves(u32 x, u32 y) { return (x & 0xffff) | y << 16; }
static u32 high_halves(u32 x, u32 y) { return x >> 16 | (y & 0xffff0000u); }

static float half_of(u32 x, int i) { return unpack_one<HALF_KV>(i ? x >> 16 : x & 0xffff); }
static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    memcpy(w.a[lane], a, sizeof a), memcpy(w.b[lane], b, sizeof b);
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k)
            c[i] += half_of(w.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                    half_of(w.b[column * 4 + k % 8 / 2][k / 8], k % 2);
    }
    __syncwarp();
}
static u32 transposed(u32 x) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32, row = lane / 4, column = 2 * (lane % 4);
    w.values[lane] = x;
    __syncwarp();
    const u32 one = w.values[column * 4 + row / 2], two = w.values[(column + 1) * 4 + row / 2];
    __syncwarp();
    return row % 2 ? high_halves(one, two) : low_halves(one, two);
}
