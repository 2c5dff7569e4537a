// NVTX ranges that open and close where the stream is given their neighbours, for Nsight Systems to show.

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace kernels_pallas {
namespace {

namespace ffi = xla::ffi;

// The arrays themselves; where XLA did not let both have the same memory, copies. The last argument, and the result
// that takes its place, order the calls and hold nothing.
ffi::Error Pass(cudaStream_t stream, ffi::RemainingArgs arrays, ffi::RemainingRets out) {
  for (size_t i = 0; i + 1 < arrays.size(); ++i) {
    const auto from = arrays.get<ffi::AnyBuffer>(i);
    const auto to = out.get<ffi::AnyBuffer>(i);
    if (!from || !to) return ffi::Error::InvalidArgument("a range: an array is missing");
    if (from->untyped_data() == (*to)->untyped_data()) continue;
    const cudaError_t status = cudaMemcpyAsync((*to)->untyped_data(), from->untyped_data(), from->size_bytes(),
                                               cudaMemcpyDeviceToDevice, stream);
    if (status != cudaSuccess) return ffi::Error::Internal(cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

ffi::Error Push(cudaStream_t stream, ffi::RemainingArgs arrays, ffi::RemainingRets out, std::string_view name) {
  nvtxRangePushA(std::string(name).c_str());
  return Pass(stream, arrays, out);
}

ffi::Error Pop(cudaStream_t stream, ffi::RemainingArgs arrays, ffi::RemainingRets out, std::string_view) {
  const ffi::Error error = Pass(stream, arrays, out);
  nvtxRangePop();
  return error;
}

}  // namespace
}  // namespace kernels_pallas

// Neither may be captured in a CUDA graph: a range is of the thread that launches.
XLA_FFI_DEFINE_HANDLER_SYMBOL(range_push, kernels_pallas::Push,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("name"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(range_pop, kernels_pallas::Pop,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("name"));
