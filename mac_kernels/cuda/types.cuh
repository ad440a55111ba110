// Types that the kernels share, and arithmetic on four numbers at once.
#pragma once
#include "device.cuh"

typedef unsigned short half_bits;  // bf16 or fp16

#if BEGIN_64
typedef i64 begin_t;
#else
typedef int begin_t;
#endif
#if PAGE_64
typedef i64 page_t;
#else
typedef int page_t;
#endif
#if LENGTH_64
typedef i64 length_t;
#else
typedef int length_t;
#endif

struct Strides {  // between pages, tokens and heads of keys and values
    int kp, kt, kh, vp, vt, vh;
};

constexpr int WARPS = THREADS / 32;

DEVICE u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

DEVICE void add(float4& sum, float weight, float4 x) {
    sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
}

DEVICE float4 times(float weight, float4 x) {
    return make_float4(weight * x.x, weight * x.y, weight * x.z, weight * x.w);
}

template <bool HALF> DEVICE float4 widen(uint2 x) {
    const float2 low = unpack<HALF>(x.x), high = unpack<HALF>(x.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

template <bool HALF> DEVICE uint2 narrow(float4 x) { return make_uint2(pack<HALF>(x.x, x.y), pack<HALF>(x.z, x.w)); }
