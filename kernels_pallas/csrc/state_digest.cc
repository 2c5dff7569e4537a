// state_digest on a CPU.

#include "fingerprint.h"

namespace kernels_pallas {
namespace {

ffi::Error StateDigest(ffi::AnyBuffer x, ffi::Buffer<ffi::S32> start, ffi::ResultBuffer<ffi::U32> out,
                       ffi::Span<const int64_t> whole) {
  Shard shard;
  if (auto error = MakeShard(x.dimensions(), whole, start.element_count(), &shard); error.failure()) return error;
  if (auto error = CheckStart(x.dimensions(), whole, start.typed_data()); error.failure()) return error;
  const int32_t* from = start.typed_data();
  uint32_t sums[4] = {0, 0, 0, 0};
  const ffi::Error error = OfWidth(x.element_type(), [&](auto zero) {
    const auto* bits = static_cast<const decltype(zero)*>(x.untyped_data());
    for (int64_t row = 0; row < shard.rows; ++row) {
      const auto number = static_cast<uint32_t>(shard.Row(row, from));
      const auto first = static_cast<uint32_t>(from[shard.num_dims]);
      for (int64_t column = 0; column < shard.columns; ++column)
        AddNumber(*bits++, number, first + static_cast<uint32_t>(column), sums);
    }
    return ffi::Error::Success();
  });
  for (int i = 0; i < 4; ++i) out->typed_data()[i] = sums[i];
  return error;
}

}  // namespace
}  // namespace kernels_pallas

XLA_FFI_DEFINE_HANDLER_SYMBOL(state_digest, kernels_pallas::StateDigest,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("whole"));
