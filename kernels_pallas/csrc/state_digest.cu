// state_digest on an NVIDIA GPU: threads read the rows in 128-bit loads and add up their sums by atomics. The order of
// the atomics does not matter, because the sums are integers.

#include <cuda_runtime.h>

#include <algorithm>

#include "fingerprint.h"

namespace kernels_pallas {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksOfProcessor = 8;

template <typename Bits, int kWide>
__global__ void __launch_bounds__(kThreads)
    StateDigestKernel(const Bits* bits, const int32_t* start, uint32_t* out, Shard shard) {
  struct alignas(sizeof(Bits) * kWide) Pack { Bits bits[kWide]; };
  uint32_t sums[4] = {0, 0, 0, 0};
  const int64_t first = start[shard.num_dims], packs = shard.columns / kWide;
  const auto* of_rows = reinterpret_cast<const Pack*>(bits);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (Walk at(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, stride, packs); at.row < shard.rows;
       at.Step()) {
    const Pack pack = of_rows[at.row * packs + at.part];
    const auto row = static_cast<uint32_t>(shard.Row(at.row, start));
    for (int j = 0; j < kWide; ++j)
      AddNumber(pack.bits[j], row, static_cast<uint32_t>(first + at.part * kWide + j), sums);
  }
  for (int i = 0; i < 4; ++i) {
    for (int lane = 16; lane > 0; lane /= 2) sums[i] += __shfl_down_sync(0xffffffffu, sums[i], lane);
    if (threadIdx.x % 32 == 0) atomicAdd(&out[i], sums[i]);
  }
}

template <typename Bits, int kWide>
void Launch(cudaStream_t stream, const void* bits, const int32_t* start, uint32_t* out, const Shard& shard) {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t threads = shard.rows * (shard.columns / kWide), most = int64_t{processors} * kBlocksOfProcessor;
  const auto grid = static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, most));
  StateDigestKernel<Bits, kWide>
      <<<grid, kThreads, 0, stream>>>(static_cast<const Bits*>(bits), start, out, shard);
}

ffi::Error StateDigest(cudaStream_t stream, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> start,
                       ffi::ResultBuffer<ffi::U32> out, ffi::Span<const int64_t> whole) {
  Shard shard;
  if (auto error = MakeShard(x.dimensions(), whole, start.element_count(), &shard); error.failure()) return error;
  cudaMemsetAsync(out->typed_data(), 0, 4 * sizeof(uint32_t), stream);
  if (x.element_count() == 0) return ffi::Error::Success();
  return OfWidth(x.element_type(), [&](auto zero) {
    using Bits = decltype(zero);
    constexpr int kWide = 16 / sizeof(Bits);
    const auto launch = shard.columns % kWide == 0 ? Launch<Bits, kWide> : Launch<Bits, 1>;
    launch(stream, x.untyped_data(), start.typed_data(), out->typed_data(), shard);
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(status));
  });
}

}  // namespace
}  // namespace kernels_pallas

XLA_FFI_DEFINE_HANDLER_SYMBOL(state_digest, kernels_pallas::StateDigest,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("whole"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
