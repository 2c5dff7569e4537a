// Custom calls that open and close NVTX ranges between the launches of a stream, for profiling with Nsight Systems.

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace kernels_pallas {
namespace {

namespace ffi = xla::ffi;

// Passes the arrays through: in place if XLA has aliased input and output, else by a copy. The last argument and result
// is a token that only orders the calls.
ffi::Error Pass(cudaStream_t stream, ffi::RemainingArgs arrays, ffi::RemainingRets out) {
  for (size_t i = 0; i + 1 < arrays.size(); ++i) {
    const auto from = arrays.get<ffi::AnyBuffer>(i);
    const auto to = out.get<ffi::AnyBuffer>(i);
    if (!from || !to) return ffi::Error::InvalidArgument("profile_range: an array is missing");
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

// These calls must not be captured in a CUDA graph, because an NVTX range belongs to the launching thread.
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
