// secure_normal on an NVIDIA GPU: a thread computes the eight numbers of a block in registers; the table of segments is
// in shared memory.

#include <cuda_runtime.h>

#include <algorithm>

#include "chacha_normal.h"

namespace kernels_pallas {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksOfProcessor = 8;  // thread blocks per SM; each loads the table once and loops over many rows

__global__ void __launch_bounds__(kThreads)
    SecureNormalKernel(const float* x, const uint32_t* key, const uint32_t* nonce, const int32_t* start,
                       const float4* table, float* out, float stddev, Shard shard, int64_t parts) {
  __shared__ float4 held[kSegments];
  for (int i = threadIdx.x; i < kSegments; i += kThreads) held[i] = table[i];
  __syncthreads();
  const auto* segments = reinterpret_cast<const Segment*>(held);
  uint32_t own_key[8], own_nonce[3];
  for (int i = 0; i < 8; ++i) own_key[i] = key[i];
  for (int i = 0; i < 3; ++i) own_nonce[i] = nonce[i];
  const int64_t first = start[shard.num_dims], columns = shard.columns;
  const int64_t blocks = (shard.all_columns + kPerBlock - 1) / kPerBlock;
  const bool wide = first % kPerBlock == 0 && columns % kPerBlock == 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (Walk at(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, stride, parts); at.row < shard.rows;
       at.Step()) {
    const int64_t row = at.row, block = first / kPerBlock + at.part;
    const int64_t column = block * kPerBlock - first;  // of the block's first number; may be left of the shard
    if (column >= columns) continue;
    uint32_t words[16];
    ChaCha20Block(own_key, static_cast<uint32_t>(shard.Row(row, start) * blocks + block), own_nonce, words);
    const float* from = x + row * columns + column;
    float* to = out + row * columns + column;
    if (wide) {
      for (int half = 0; half < 2; ++half) {
        float4 v = reinterpret_cast<const float4*>(from)[half];
        float* lanes = &v.x;
        for (int j = 0; j < 4; ++j) {
          const int lane = 4 * half + j;
          lanes[j] = Plus(lanes[j], Times(stddev, Normal(words[2 * lane + 1], words[2 * lane], segments)));
        }
        reinterpret_cast<float4*>(to)[half] = v;
      }
    } else {
      for (int lane = 0; lane < kPerBlock; ++lane)
        if (column + lane >= 0 && column + lane < columns)
          to[lane] = Plus(from[lane], Times(stddev, Normal(words[2 * lane + 1], words[2 * lane], segments)));
    }
  }
}

ffi::Error SecureNormal(cudaStream_t stream, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> key,
                        ffi::Buffer<ffi::U32> nonce, ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::F32> table,
                        ffi::ResultBuffer<ffi::F32> out, float stddev, ffi::Span<const int64_t> whole) {
  Shard shard;
  if (auto error = MakeShard(x.dimensions(), whole, start.element_count(), &shard); error.failure()) return error;
  if (auto error = CheckNormal(shard, key.element_count(), nonce.element_count(), table.element_count());
      error.failure())
    return error;
  const int64_t parts = shard.columns / kPerBlock + (shard.all_columns == shard.columns ? 1 : 2);
  const int64_t threads = shard.rows * parts;
  if (x.element_count() == 0) return ffi::Error::Success();
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const auto grid = static_cast<unsigned>(
      std::min<int64_t>((threads + kThreads - 1) / kThreads, static_cast<int64_t>(processors) * kBlocksOfProcessor));
  SecureNormalKernel<<<grid, kThreads, 0, stream>>>(
      x.typed_data(), key.typed_data(), nonce.typed_data(), start.typed_data(),
      reinterpret_cast<const float4*>(table.typed_data()), out->typed_data(), stddev, shard, parts);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(status));
}

}  // namespace
}  // namespace kernels_pallas

XLA_FFI_DEFINE_HANDLER_SYMBOL(secure_normal, kernels_pallas::SecureNormal,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("stddev")
                                  .Attr<xla::ffi::Span<const int64_t>>("whole"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
