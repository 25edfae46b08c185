// Kernels of one decoder step over fixed buffers, f32. Every value that changes from step to step
// (ids, positions, bases, slots, visible lengths) is read from device memory, so that a captured
// graph stays valid while sequences grow. Shapes are given row-major.
#include <stdint.h>

static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// Sum over a block of whole warps; every thread gets it.
static __device__ float block_sum(float v) {
  __shared__ float partial[32];
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = v;
  __syncthreads();
  int warps = blockDim.x >> 5;
  return warp_sum((threadIdx.x & 31) < warps ? partial[threadIdx.x & 31] : 0.f);
}

// out[r, :] = table[ids[r], :]. grid rows.
extern "C" __global__ void embed(const uint32_t* ids, const float* table, float* out, int width) {
  const float* src = table + (size_t)ids[blockIdx.x] * width;
  float* dst = out + (size_t)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) dst[i] = src[i];
}

// residual += delta (if has_delta); out = rms_norm(residual) * weight. grid rows. `out` may be `delta`.
extern "C" __global__ void add_rms_norm(float* residual, const float* delta, const float* weight, float* out,
                                        int width, float eps, int has_delta) {
  float* x = residual + (size_t)blockIdx.x * width;
  const float* d = delta + (size_t)blockIdx.x * width;
  float* y = out + (size_t)blockIdx.x * width;
  float sum = 0.f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float v = x[i];
    if (has_delta) { v += d[i]; x[i] = v; }
    sum += v * v;
  }
  float scale = rsqrtf(block_sum(sum) / width + eps);
  for (int i = threadIdx.x; i < width; i += blockDim.x) y[i] = x[i] * scale * weight[i];
}

// y[r, i] += bias[i]. grid rows.
extern "C" __global__ void add_bias(float* y, const float* bias, int width) {
  float* row = y + (size_t)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] += bias[i];
}

// RMS norm over each query head (weight q) and key head (weight k) of qkv [rows, width]. grid (heads + kv_heads, rows).
extern "C" __global__ void head_norm(float* qkv, const float* q, const float* k, int heads, int head_dim, int width, float eps) {
  float* x = qkv + (size_t)blockIdx.y * width + blockIdx.x * head_dim;
  const float* w = blockIdx.x < heads ? q : k;
  float sum = 0.f;
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) sum += x[i] * x[i];
  float scale = rsqrtf(block_sum(sum) / head_dim + eps);
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) x[i] *= scale * w[i];
}

// Rotates query and key heads of qkv by positions[r]. grid (heads + kv_heads, rows), one thread a pair.
extern "C" __global__ void rope(float* qkv, const uint32_t* positions, const float* inv_freq, int head_dim, int width,
                                int pairs, float factor, int interleaved) {
  int i = threadIdx.x;
  if (i >= pairs) return;
  float* x = qkv + (size_t)blockIdx.y * width + blockIdx.x * head_dim;
  float s, c;
  sincosf((float)positions[blockIdx.y] * inv_freq[i], &s, &c);
  s *= factor; c *= factor;
  int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + pairs;
  float u = x[a], v = x[b];
  x[a] = u * c - v * s;
  x[b] = v * c + u * s;
}

// Writes keys and values of each row to slot[r] of its block. K, V: blocks of [layers, kv_heads, capacity, head_dim];
// base[r] is the block's first element. grid (kv_heads, rows).
extern "C" __global__ void append(const float* qkv, float* keys, float* values, const uint64_t* base, const uint32_t* capacity,
                                  const uint32_t* slot, int layer, int heads, int head_dim, int width) {
  int kv_heads = gridDim.x, head = blockIdx.x, row = blockIdx.y;
  const float* src = qkv + (size_t)row * width + (heads + head) * head_dim;
  size_t at = base[row] + (((size_t)layer * kv_heads + head) * capacity[row] + slot[row]) * head_dim;
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
    keys[at + i] = src[i];
    values[at + i] = src[kv_heads * head_dim + i];
  }
}

// One query row and head against the first visible[r] slots of its block; head_dim <= 256 and a multiple of 32.
// grid (heads, rows), 128 threads: each warp takes every fourth slot, then the four partial sums are joined.
extern "C" __global__ void __launch_bounds__(128) attend(const float* qkv, const float* keys, const float* values,
    const uint64_t* base, const uint32_t* capacity, const uint32_t* visible, float* out,
    int layer, int kv_heads, int head_dim, int width, float scale) {
  int heads = gridDim.x, head = blockIdx.x, row = blockIdx.y, group = heads / kv_heads;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, per = head_dim >> 5;
  size_t at = base[row] + ((size_t)layer * kv_heads + head / group) * capacity[row] * head_dim;
  const float* q = qkv + (size_t)row * width + head * head_dim;
  float qr[8], acc[8];
  for (int j = 0; j < per; j++) { qr[j] = q[lane + 32 * j] * scale; acc[j] = 0.f; }
  float m = -1e30f, l = 0.f;
  for (uint32_t s = warp; s < visible[row]; s += 4) {
    const float* k = keys + at + (size_t)s * head_dim;
    const float* v = values + at + (size_t)s * head_dim;
    float dot = 0.f;
    for (int j = 0; j < per; j++) dot += qr[j] * k[lane + 32 * j];
    dot = warp_sum(dot);
    float next = fmaxf(m, dot), keep = __expf(m - next), p = __expf(dot - next);
    m = next;
    l = l * keep + p;
    for (int j = 0; j < per; j++) acc[j] = acc[j] * keep + p * v[lane + 32 * j];
  }
  __shared__ float sums[4][256], maxima[4], totals[4];
  for (int j = 0; j < per; j++) sums[warp][lane + 32 * j] = acc[j];
  if (lane == 0) { maxima[warp] = m; totals[warp] = l; }
  __syncthreads();
  float top = fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3])), total = 0.f, w[4];
  for (int i = 0; i < 4; i++) { w[i] = __expf(maxima[i] - top); total += w[i] * totals[i]; }
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
    float sum = w[0] * sums[0][i] + w[1] * sums[1][i] + w[2] * sums[2][i] + w[3] * sums[3][i];
    out[((size_t)row * heads + head) * head_dim + i] = sum / total;
  }
}

// act = silu(gate) * up of gate_up [rows, 2 * inner]. grid (blocks of columns, rows).
extern "C" __global__ void silu_mul(const float* gate_up, float* act, int inner) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= inner) return;
  const float* row = gate_up + (size_t)blockIdx.y * 2 * inner;
  act[(size_t)blockIdx.y * inner + i] = row[i] / (1.f + __expf(-row[i])) * row[inner + i];
}

// out[i, :] = residual[rows[i], :] + delta[rows[i], :]. grid samples.
extern "C" __global__ void gather_sum(const float* residual, const float* delta, const uint32_t* rows, float* out, int width) {
  size_t from = (size_t)rows[blockIdx.x] * width, to = (size_t)blockIdx.x * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) out[to + i] = residual[from + i] + delta[from + i];
}
