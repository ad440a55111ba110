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
    std::vector<unsigned char> memory;
};
struct Fiber {
    jmp_buf at;
    ucontext_t first;
    std::vector<char> stack;
    int block, thread, cluster_phase = 0;
    bool started = false, done = false;
};
static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static Barrier cluster;
static int current, first_block;
static jmp_buf finished;

static void resume() {  // goes on with the next fiber that has not ended
    for (size_t i = 0; i < fibers.size(); ++i) {
        current = (current + 1) % fibers.size();
        Fiber& f = fibers[current];
        if (f.done) continue;
        threadIdx.x = f.thread, blockIdx.x = first_block + f.block;
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        setcontext(&f.first);
    }
    _longjmp(finished, 1);
}
static void yield() {
    if (!_setjmp(fibers[current].at)) resume();
}
static Block& block() { return blocks[fibers[current].block]; }
static Warp& warp_here() { return block().warps[threadIdx.x / 32]; }
static void wait_at(Barrier& barrier, int threads) {
    const int phase = barrier.arrive(threads);
    while (barrier.phase == phase) yield();
}

static void grid_wait() {}
static void grid_launch_dependents() {}
static void cluster_arrive() { fibers[current].cluster_phase = cluster.arrive(THREADS * CLUSTER); }
static void cluster_wait() {
    while (cluster.phase == fibers[current].cluster_phase) yield();
}
static void some_sync(int barrier, int threads) { wait_at(block().barriers[barrier], threads); }
static void __syncthreads() { some_sync(0, THREADS); }
static void __syncwarp() { wait_at(warp_here().barrier, 32); }
static void* shared_memory() { return block().memory.data(); }
template <typename T> static T* in_block(T* p, int rank) {
    return (T*)(blocks[rank].memory.data() + ((unsigned char*)p - block().memory.data()));
}
template <typename T> static void copy_async(T* to, const T* from) { *to = *from; }
static void copies_commit() {}
template <int GROUPS> static void copies_wait_but() {}
static void copies_wait() {}
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
template <typename T> static void atomicAdd(T* to, T x) { *to += x; }
static u32 atomicInc(u32* to, u32 last) { const u32 x = *to; *to = x >= last ? 0 : x + 1; return x; }

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
