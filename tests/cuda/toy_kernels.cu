// Small kernels for test_emulator.py.

namespace gradsel {

constexpr unsigned kAll = 0xffffffffu;

// A grid-stride loop, a reduction over the block, and one over the grid.
extern "C" __global__ void __launch_bounds__(1024) toy_sum(const int* x, int64_t count, int* out) {
  int* shared = reinterpret_cast<int*>(emulated_shared_memory());
  int sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x)
    sum += __ldg(x + i);
  shared[threadIdx.x] = sum;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) atomicAdd(out, shared[0]);
}

// Reverses a block, or each of its warps; without a barrier if told to.
extern "C" __global__ void toy_reverse(const int* x, int* out, int in_warp, int barrier) {
  int* shared = reinterpret_cast<int*>(emulated_shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  if (barrier) {
    if (in_warp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  out[threadIdx.x] = shared[in_warp ? threadIdx.x ^ 31 : blockDim.x - 1 - threadIdx.x];
}

// What every collective gives to the lanes of a mask: 11 ints and 4 long longs for a lane. The others stay out.
extern "C" __global__ void toy_collectives(const int* x, unsigned mask, int offset, int width, int* out,
                                           long long* wide) {
  const unsigned lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int value = x[lane];
  int* to = out + 11 * lane;
  *to++ = static_cast<int>(__ballot_sync(mask, value & 1));
  *to++ = __any_sync(mask, value == x[0]);
  *to++ = __all_sync(mask, value != x[0]);
  *to++ = __reduce_max_sync(mask, value);
  *to++ = __reduce_min_sync(mask, value);
  *to++ = __reduce_add_sync(mask, value);
  *to++ = static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(value)));
  *to++ = static_cast<int>(__reduce_min_sync(mask, static_cast<unsigned>(value)));
  *to++ = static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
  if (mask == kAll) {
    *to++ = __shfl_sync(mask, value, offset, width);
    *to++ = __float_as_int(__shfl_up_sync(mask, __int_as_float(value), offset, width));
    const long long both = static_cast<long long>(static_cast<unsigned long long>(value) << 32 | lane);
    wide[4 * lane] = __shfl_down_sync(mask, both, offset, width);
    wide[4 * lane + 1] = __shfl_xor_sync(mask, both, offset, width);
    wide[4 * lane + 2] = __double_as_longlong(__shfl_sync(mask, __longlong_as_double(both), offset, width));
    wide[4 * lane + 3] = __shfl_up_sync(mask, static_cast<unsigned long long>(both), offset, width);
  }
}

extern "C" __global__ void toy_votes(const int* x, int* out) {
  const int odd = x[threadIdx.x] & 1;
  const int count = __syncthreads_count(odd);
  const int any = __syncthreads_or(odd);
  out[threadIdx.x] = 2 * count + any;
}

// Threads from `count` on leave; the others meet without them.
extern "C" __global__ void toy_early_exit(int count, int* out) {
  if (static_cast<int>(threadIdx.x) >= count) return;
  const int first = static_cast<int>(threadIdx.x / 32 * 32);
  const unsigned mask = count - first >= 32 ? kAll : (1u << (count - first)) - 1;
  const int lanes = __popc(__ballot_sync(mask, 1));
  out[threadIdx.x] = 1000 * lanes + __syncthreads_count(1);
}

extern "C" __global__ void toy_vectors(const unsigned* x, unsigned* out) {
  const unsigned at = 4 * threadIdx.x;
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(x + at));
  const float4 f = *reinterpret_cast<const float4*>(x + at);
  __stcs(reinterpret_cast<uint4*>(out + at), make_uint4(v.w, v.z, __float_as_uint(f.y), v.x));
}

extern "C" __global__ void toy_atomics(int* out, unsigned long long* wide) {
  int* shared = reinterpret_cast<int*>(emulated_shared_memory());
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (threadIdx.x == 0) shared[0] = 0;
  __syncthreads();
  atomicAdd(shared, 1);
  atomicAdd(wide, 1ull << 32);
  atomicAdd(out, t);
  atomicOr(out + 1, 1 << t % 8);
  atomicAnd(out + 2, ~(1 << t % 8));
  atomicMax(out + 3, t);
  atomicMin(out + 4, -t);
  if (atomicCAS(out + 5, 0, 1) == 0) atomicAdd(out + 6, 1);
  const int before = atomicExch(out + 7, t + 1);
  atomicAdd(out + 8, t + 1 - before);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out + 9, shared[0]);
}

// The order in which blocks, and in the first of them the threads, come.
extern "C" __global__ void toy_blocks(unsigned* order, unsigned* threads, unsigned* counts) {
  const unsigned thread = atomicAdd(counts, 1u);
  if (thread < blockDim.x) threads[thread] = threadIdx.x;
  if (__syncthreads_or(0) == 0 && threadIdx.x == 0) order[atomicAdd(counts + 1, 1u)] = blockIdx.x;
}

struct Toy {
  int64_t a;
  int b;
};
extern "C" __global__ void toy_struct(int64_t* out, const __grid_constant__ Toy toy) {
  if (threadIdx.x == 0) *out = min(toy.a, int64_t{toy.b});
}

struct Mistakes {
  enum Mistake {
    kKinds,
    kMasks,
    kWarpAndBlock,
    kBarriers,
    kSites,
    kExited,
    kExits,
    kNotCaller,
    kSource,
    kWidth,
    kSlack,
    kOverrun,
    kMisaligned,
    kShift,
    kBounds,
    kDivision,
    kConversion,
  };
};

extern "C" __global__ void toy_undefined(int mistake, int* out) {
  unsigned char* shared = emulated_shared_memory();
  const unsigned t = threadIdx.x, lane = t % 32;
  const int zero = shared[0] - 0xff;
  switch (mistake) {
    case Mistakes::kKinds:
      if (lane < 16) {
        out[t] = __any_sync(kAll, 1);
      } else {
        out[t] = __all_sync(kAll, 1);
      }
      break;
    case Mistakes::kMasks:
      __syncwarp(lane < 16 ? 0x1ffffu : 0xffff0000u);
      break;
    case Mistakes::kWarpAndBlock:
      if (t == 37) __syncwarp();
      __syncthreads();
      break;
    case Mistakes::kBarriers:
      if (t < 32) {
        __syncthreads();
      } else {
        out[t] = __syncthreads_count(1);
      }
      break;
    case Mistakes::kSites:
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Mistakes::kExited:
      if (lane == 5) return;
      if (lane > 5) __syncwarp();
      break;
    case Mistakes::kExits:
      if (lane != 31) __syncwarp();
      break;
    case Mistakes::kNotCaller:
      __syncwarp(1);
      break;
    case Mistakes::kSource:
      if (lane < 4) out[t] = __shfl_down_sync(15, 1, 1);
      break;
    case Mistakes::kWidth:
      out[t] = __shfl_sync(kAll, 1, 0, 12);
      break;
    case Mistakes::kSlack:
      shared[17 + zero] = 1;
      break;
    case Mistakes::kOverrun:
      out[t] = shared[32 + zero];
      break;
    case Mistakes::kMisaligned:
      out[t] = static_cast<int>(reinterpret_cast<const uint2*>(shared + t % 2 * 4)->y);
      break;
    case Mistakes::kShift:
      out[t] = 1 << (lane + 1);
      break;
    case Mistakes::kBounds: {
      int array[4] = {1, 2, 3, 4};
      out[t] = array[lane];
      break;
    }
    case Mistakes::kDivision:
      out[t] = 7 / zero;
      break;
    case Mistakes::kConversion:
      out[t] = static_cast<int>(1e20f * static_cast<float>(lane));
      break;
    default:
      break;
  }
}

extern "C" __global__ void toy_rendezvous(int count, int block) {
  for (int i = 0; i < count; ++i) {
    if (block) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
}

}  // namespace gradsel
