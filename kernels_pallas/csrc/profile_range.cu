// NVTX ranges that open and close where the stream is given their neighbours, for Nsight Systems to show.

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace kernels_pallas {
namespace {

namespace ffi = xla::ffi;

// The array itself: where XLA did not let both have the same memory, a copy.
ffi::Error Pass(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out) {
  if (x.untyped_data() == out->untyped_data()) return ffi::Error::Success();
  const cudaError_t status =
      cudaMemcpyAsync(out->untyped_data(), x.untyped_data(), x.size_bytes(), cudaMemcpyDeviceToDevice, stream);
  return status == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(status));
}

ffi::Error Push(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, std::string_view name) {
  nvtxRangePushA(std::string(name).c_str());
  return Pass(stream, x, out);
}

ffi::Error Pop(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, std::string_view) {
  const ffi::Error error = Pass(stream, x, out);
  nvtxRangePop();
  return error;
}

}  // namespace
}  // namespace kernels_pallas

// Neither may be captured in a CUDA graph: a range is of the thread that launches.
XLA_FFI_DEFINE_HANDLER_SYMBOL(range_push, kernels_pallas::Push,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("name"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(range_pop, kernels_pallas::Pop,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("name"));
