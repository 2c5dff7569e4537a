// The checksum of an array: the arithmetic. reference.py is the same in jnp.

#pragma once

#include <cstdint>

#include "shard.h"

namespace kernels_pallas {

// Adds a 32-bit word at a row and column to the four sums. Every step is invertible, so at one position two different
// words never add the same number to any of the sums.
BOTH void AddWord(uint32_t word, uint32_t row, uint32_t column, uint32_t* sums) {
  uint32_t a = word ^ (column * 0x9e3779b1u);
  a ^= a >> 16; a *= 0x7feb352du;
  a ^= a >> 15; a += row * 0x85ebca77u + 0x165667b1u; a *= 0x846ca68bu;
  a ^= a >> 16; sums[0] += a; a *= 0xc2b2ae3du;
  a ^= a >> 15; sums[1] += a; a *= 0x27d4eb2fu;
  a ^= a >> 16; sums[2] += a; a *= 0x165667b1u;
  a ^= a >> 15; sums[3] += a;
}

// Adds an element: 8, 16 or 32 bits are one word, 64 bits are two words.
template <typename Bits>
BOTH void AddNumber(Bits bits, uint32_t row, uint32_t column, uint32_t* sums) {
  if (sizeof(Bits) == 8) {
    AddWord(static_cast<uint32_t>(bits), row, 2 * column, sums);
    AddWord(static_cast<uint32_t>(static_cast<uint64_t>(bits) >> 32), row, 2 * column + 1, sums);
  } else {
    AddWord(static_cast<uint32_t>(bits), row, column, sums);
  }
}

// Calls `run` with the unsigned type of an element's width.
template <typename Run>
ffi::Error OfWidth(ffi::DataType type, Run run) {
  switch (ffi::ByteWidth(type)) {
    case 1: return run(uint8_t{});
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    case 8: return run(uint64_t{});
    default: return ffi::Error::InvalidArgument("elements must have 1, 2, 4 or 8 bytes");
  }
}

}  // namespace kernels_pallas
