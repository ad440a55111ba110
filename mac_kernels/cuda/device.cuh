// What the kernels need of the GPU beyond plain C++. The tests have a second implementation of these names on the CPU.
#ifndef MAC_KERNELS_DEVICE
#define MAC_KERNELS_DEVICE

typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define ALL_LANES 0xffffffffu
#undef INFINITY
#define INFINITY __int_as_float(0x7f800000)

DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void some_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

DEVICE void* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Where the same variable lies in another block of the cluster.
template <typename T> DEVICE T* in_block(T* p, int rank) {
    if (CLUSTER == 1) return p;
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return there;
}

// Starts a copy of 4, 8 or 16 bytes from global to shared memory; copies since the last commit form a group.
template <typename T> DEVICE void copy_async(T* to, const T* from) {
    if (sizeof(T) == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     ::"r"(shared_address(to)), "l"(from), "n"(sizeof(T)) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS> DEVICE void copies_wait_but() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }
DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Fetches the 128 bytes around an address into the L2 cache.
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_of(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two 16-bit numbers, the first one in the low half.
template <bool HALF> DEVICE u32 pack(float low, float high) {
    u32 x;
    if (HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
template <bool HALF> DEVICE float2 unpack(u32 x) {
    float2 y;
    if (HALF) asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
                  : "=f"(y.x), "=f"(y.y) : "r"(x));
    else y = make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    return y;
}

// Byte i of x, a signed number: 2^23 + 128 + the byte as a float, less what it has too much.
DEVICE float number_of(u32 x, int i) {
    return __uint_as_float(__byte_perm(x ^ 0x80808080u, 0x4b000000u, 0x7540 + i)) - 8388736.f;
}

DEVICE u32 low_halves(u32 x, u32 y) { return __byte_perm(x, y, 0x5410); }
DEVICE u32 high_halves(u32 x, u32 y) { return __byte_perm(x, y, 0x7632); }

// c [16, 8] += a [16, 16] b [16, 8]
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (HALF_KV)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes 8 x 8 numbers of 16 bits, a row of them held by four lanes.
DEVICE u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

#endif
