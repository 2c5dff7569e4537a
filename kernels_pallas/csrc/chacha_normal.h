// Normal random numbers from ChaCha20: the arithmetic, bit-identical on a CPU and on a GPU.
//
// It consists of integer operations and of float32 products and sums that are rounded separately. The compiler must not
// fuse them to multiply-adds (-ffp-contract=off; on a GPU intrinsics are used). reference.py is the same in jnp.

#pragma once

#include <cstdint>

#include "both.h"
#include "shard.h"

namespace kernels_pallas {

constexpr int kPerBlock = 8;      // numbers per block of 64 bytes: 64 bits each
constexpr int kSegments = 1024;   // 64 octaves of the tail probability, 16 parts each
struct Segment { float c0, c1, c2, c3; };

BOTH float Times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BOTH float Plus(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

BOTH uint32_t RotateLeft(uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }

BOTH void QuarterRound(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b; d = RotateLeft(d ^ a, 16);
  c += d; b = RotateLeft(b ^ c, 12);
  a += b; d = RotateLeft(d ^ a, 8);
  c += d; b = RotateLeft(b ^ c, 7);
}

// RFC 8439, section 2.3.
BOTH void ChaCha20Block(const uint32_t* key, uint32_t counter, const uint32_t* nonce, uint32_t* out) {
  uint32_t first[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, key[0], key[1], key[2], key[3],
                        key[4], key[5], key[6], key[7], counter, nonce[0], nonce[1], nonce[2]};
  uint32_t x[16];
  for (int i = 0; i < 16; ++i) x[i] = first[i];
  for (int round = 0; round < 10; ++round) {
    QuarterRound(x[0], x[4], x[8], x[12]);
    QuarterRound(x[1], x[5], x[9], x[13]);
    QuarterRound(x[2], x[6], x[10], x[14]);
    QuarterRound(x[3], x[7], x[11], x[15]);
    QuarterRound(x[0], x[5], x[10], x[15]);
    QuarterRound(x[1], x[6], x[11], x[12]);
    QuarterRound(x[2], x[7], x[8], x[13]);
    QuarterRound(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 16; ++i) out[i] = x[i] + first[i];
}

BOTH int LeadingZeros(uint64_t x) {
#ifdef __CUDA_ARCH__
  return __clzll(static_cast<long long>(x));
#else
  return __builtin_clzll(x);
#endif
}

// The first bit is the sign. The others, followed by a 1, are the tail probability q = tail / 2^65 < 1/2. The number of
// leading zeros and the four bits after the first 1 select the segment of q -> x; the next 24 bits are the position in
// the segment.
BOTH float Normal(uint32_t high, uint32_t low, const Segment* segments) {
  uint64_t tail = (static_cast<uint64_t>(high) << 33) | (static_cast<uint64_t>(low) << 1) | 1;
  const int octave = LeadingZeros(tail);
  tail = (tail << octave) << 1;
  const Segment s = segments[octave * 16 + static_cast<int>(tail >> 60)];
  const float t = static_cast<float>(static_cast<uint32_t>(tail >> 36) & 0xffffffu) * 0x1p-24f;
  const float x = Plus(Times(Plus(Times(Plus(Times(s.c3, t), s.c2), t), s.c1), t), s.c0);
  return high >> 31 ? -x : x;
}

// Checks the arguments of secure_normal other than the shard; the block counter has 32 bits.
inline ffi::Error CheckNormal(const Shard& shard, int64_t key, int64_t nonce, int64_t table) {
  if (key != 8 || nonce != 3 || table != 4 * kSegments)
    return ffi::Error::InvalidArgument("wanted a key of 8 words, a nonce of 3, and the table of segments");
  int64_t blocks = (shard.all_columns + kPerBlock - 1) / kPerBlock;
  for (int i = 0; i < shard.num_groups; ++i) blocks *= shard.whole[i];
  if (blocks > int64_t{1} << 32) return ffi::Error::InvalidArgument("the array takes more than 2^32 ChaCha20 blocks");
  return ffi::Error::Success();
}

}  // namespace kernels_pallas
