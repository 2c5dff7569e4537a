// A device's shard of an array and the row numbers of the whole array. A row extends along the last dim.

#pragma once

#include <cstdint>

#include "both.h"
#include "xla/ffi/api/ffi.h"

namespace kernels_pallas {

namespace ffi = xla::ffi;
constexpr int kMostDims = 8;

struct Shard {
  int num_groups;  // groups of row dims: an unsharded dim is merged into the dim before it
  int num_dims;    // row dims: one less than the dims of the array, which has at least one
  int64_t rows, columns, all_columns;
  int64_t local[kMostDims], whole[kMostDims];  // sizes of each group in the shard and in the whole array
  int64_t step[kMostDims];                     // rows of the group per index of its first dim
  int first[kMostDims];                        // the first dim of each group

  // The row number in the whole array of a row of the shard.
  BOTH int64_t Row(int64_t row, const int32_t* start) const {
    int64_t number = 0, scale = 1;
    for (int i = num_groups - 1; i > 0; --i) {
      number += (row % local[i] + start[first[i]] * step[i]) * scale;
      row /= local[i];
      scale *= whole[i];
    }
    return num_groups == 0 ? 0 : number + (row + start[first[0]] * step[0]) * scale;
  }
};

// Iterates over the pairs (row, part) of a shard in strides, in the order of row * parts + part, with one division.
struct Walk {
  int64_t row, part, parts, rows_a_stride, parts_a_stride;

  BOTH Walk(int64_t begin, int64_t stride, int64_t parts)
      : row(begin / parts), part(begin % parts), parts(parts), rows_a_stride(stride / parts),
        parts_a_stride(stride % parts) {}

  BOTH void Step() {
    row += rows_a_stride;
    part += parts_a_stride;
    if (part >= parts) {
      part -= parts;
      ++row;
    }
  }
};

// Checks that the shard lies inside the whole array; `start` is in host memory.
inline ffi::Error CheckStart(ffi::AnyBuffer::Dimensions local, ffi::Span<const int64_t> whole, const int32_t* start) {
  for (size_t i = 0; i < local.size(); ++i)
    if (start[i] < 0 || start[i] > whole[i] - local[i])
      return ffi::Error::InvalidArgument("the shard is not inside the whole array");
  return ffi::Error::Success();
}

// Fills in a Shard from the shapes, or returns why they do not fit.
inline ffi::Error MakeShard(ffi::AnyBuffer::Dimensions local, ffi::Span<const int64_t> whole, int64_t starts,
                            Shard* shard) {
  const int dims = static_cast<int>(local.size());
  if (dims < 1 || dims > kMostDims || whole.size() != local.size() || starts != dims)
    return ffi::Error::InvalidArgument("the array must have 1 to 8 dims, and start and whole one number for each");
  *shard = Shard{0, dims - 1, 1, local[dims - 1], whole[dims - 1], {}, {}, {}, {}};
  for (int i = 0; i < dims; ++i)
    if (local[i] > whole[i]) return ffi::Error::InvalidArgument("the shard is larger than the whole array");
  for (int i = 0; i < dims - 1; ++i) {
    shard->rows *= local[i];
    const bool cut = i == 0 || local[i] != whole[i];
    const int group = cut ? shard->num_groups++ : shard->num_groups - 1;
    shard->local[group] = local[i] * (cut ? 1 : shard->local[group]);
    shard->whole[group] = whole[i] * (cut ? 1 : shard->whole[group]);
    shard->step[group] = cut ? 1 : shard->step[group] * local[i];
    if (cut) shard->first[group] = i;
  }
  return ffi::Error::Success();
}

}  // namespace kernels_pallas
