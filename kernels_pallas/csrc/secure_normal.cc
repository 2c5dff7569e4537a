// secure_normal on a CPU.

#include <algorithm>

#include "chacha_normal.h"

namespace kernels_pallas {
namespace {

ffi::Error SecureNormal(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> key, ffi::Buffer<ffi::U32> nonce,
                        ffi::Buffer<ffi::S32> start, ffi::Buffer<ffi::F32> table, ffi::ResultBuffer<ffi::F32> out,
                        float stddev, ffi::Span<const int64_t> whole) {
  Shard shard;
  if (auto error = MakeShard(x.dimensions(), whole, start.element_count(), &shard); error.failure()) return error;
  if (auto error = CheckStart(x.dimensions(), whole, start.typed_data()); error.failure()) return error;
  if (auto error = CheckNormal(shard, key.element_count(), nonce.element_count(), table.element_count());
      error.failure())
    return error;
  const auto* segments = reinterpret_cast<const Segment*>(table.typed_data());
  const int64_t first = start.typed_data()[shard.num_dims];
  const int64_t blocks = (shard.all_columns + kPerBlock - 1) / kPerBlock;
  for (int64_t row = 0; row < shard.rows; ++row) {
    const uint32_t block_of_row = static_cast<uint32_t>(shard.Row(row, start.typed_data()) * blocks);
    const float* from = x.typed_data() + row * shard.columns;
    float* to = out->typed_data() + row * shard.columns;
    for (int64_t column = 0; column < shard.columns;) {
      const int64_t place = first + column;
      uint32_t words[16];
      ChaCha20Block(key.typed_data(), block_of_row + static_cast<uint32_t>(place / kPerBlock), nonce.typed_data(),
                    words);
      const int64_t end = std::min(shard.columns, column + kPerBlock - place % kPerBlock);
      for (int lane = place % kPerBlock; column < end; ++column, ++lane)
        to[column] = from[column] + stddev * Normal(words[2 * lane + 1], words[2 * lane], segments);
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace kernels_pallas

XLA_FFI_DEFINE_HANDLER_SYMBOL(secure_normal, kernels_pallas::SecureNormal,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("stddev")
                                  .Attr<xla::ffi::Span<const int64_t>>("whole"));
