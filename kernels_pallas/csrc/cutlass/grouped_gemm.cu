// grouped_matmul by CUTLASS's grouped GEMM for Hopper: persistent thread blocks, TMA, wgmma, float32 accumulation.
//
// The group sizes are known only on the device. A small kernel turns them into what CUTLASS reads (pointers, strides
// and shapes) and sets the padding rows to zero; there is no host synchronisation. The size of the scratch memory
// depends on the numbers of groups and of SMs and not on the group sizes: CUTLASS keeps the TMA descriptors of each SM
// there, which the kernel writes before it reads them.

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <climits>
#include <cstdint>
#include <cub/block/block_scan.cuh>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace kernels_pallas {
namespace {

namespace ffi = xla::ffi;

constexpr int kAlign = 8;                 // 16-bit numbers in 16 bytes: TMA needs rows of multiples of 16 bytes
constexpr size_t kLine = 256;             // alignment in bytes of the arrays in scratch; a TMA descriptor needs 128
constexpr size_t kScratchAlign = 16;      // the largest alignment that XLA's allocator supports
constexpr int kThreads = 256;             // threads per block of the Prepare kernel
constexpr int kSharedMemory = 227 << 10;  // bytes, the most that a block can use on Hopper

// y = x w, with JAX's layouts of x, y and w: the last dim is contiguous.
template <typename Element>
struct Config {
  using Shape = cute::Shape<int, int, int>;  // rows, columns, depth of a group
  using Problem = cutlass::gemm::GroupProblemShape<Shape>;
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two tiles of rows share the loads of w
  using Rows = cutlass::layout::RowMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Rows*, kAlign, Element, Rows*, kAlign,
      cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
      cutlass::epilogue::fusion::LinearCombination<Element, float, void>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Rows*, kAlign, Element, Rows*, kAlign, float, Tile,
      Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Gemm =
      cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>>;
};

// The arguments of CUTLASS for each group, in device memory.
template <typename Element>
struct Groups {
  using Kernel = typename Config<Element>::Gemm::GemmKernel;
  typename Config<Element>::Shape* shape;
  const Element** x;
  const Element** w;
  Element** y;
  typename Kernel::InternalStrideA* x_stride;
  typename Kernel::InternalStrideB* w_stride;
  typename Kernel::InternalStrideD* y_stride;
};

// The arrays of one call.
template <typename Element>
struct Arrays {
  const Element* x;
  const Element* w;
  const int32_t* group_sizes;
  Element* y;
  int rows, depth, columns, num_groups;
};

// The first block writes the groups; all blocks set the padding rows to zero. Negative sizes count as 0, and groups are
// clipped to the rows of the arrays. If there are more groups than threads, the scan takes several rounds.
template <typename Element>
__global__ void __launch_bounds__(kThreads) Prepare(Arrays<Element> arrays, Groups<Element> groups) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage memory;
  const int64_t depth = arrays.depth, columns = arrays.columns;
  int64_t before = 0;  // rows of the groups of earlier rounds
  for (int first = 0; first < arrays.num_groups; first += kThreads) {
    const int group = first + static_cast<int>(threadIdx.x);
    const int64_t size = group < arrays.num_groups ? max(arrays.group_sizes[group], 0) : 0;
    int64_t start, in_round;
    Scan(memory).ExclusiveSum(size, start, in_round);
    __syncthreads();  // the next round writes to the same memory
    start = min(before + start, int64_t{arrays.rows});
    before += in_round;
    if (blockIdx.x != 0 || group >= arrays.num_groups) continue;
    groups.shape[group] = {static_cast<int>(min(size, arrays.rows - start)), arrays.columns, arrays.depth};
    groups.x[group] = arrays.x + start * depth;
    groups.w[group] = arrays.w + group * depth * columns;
    groups.y[group] = arrays.y + start * columns;
    cute::get<0>(groups.x_stride[group]) = depth;
    cute::get<1>(groups.w_stride[group]) = columns;
    cute::get<0>(groups.y_stride[group]) = columns;
  }
  const int64_t packs = columns * static_cast<int64_t>(sizeof(Element)) / static_cast<int64_t>(sizeof(uint4));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  auto* out = reinterpret_cast<uint4*>(arrays.y);
  for (int64_t i = min(before, int64_t{arrays.rows}) * packs + int64_t{blockIdx.x} * kThreads + threadIdx.x;
       i < arrays.rows * packs; i += stride)
    out[i] = make_uint4(0, 0, 0, 0);
}

constexpr size_t ToLine(size_t size) { return (size + kLine - 1) / kLine * kLine; }

// Divides one piece of scratch memory into arrays; with a null pointer it only computes the size.
class Cutter {
 public:
  explicit Cutter(void* memory) : memory_(ToLine(reinterpret_cast<uintptr_t>(memory))) {}

  void* Bytes(size_t size) {
    const uintptr_t piece = memory_ == 0 ? 0 : memory_ + taken_;
    taken_ += ToLine(size);
    return reinterpret_cast<void*>(piece);
  }

  template <typename T>
  void Array(T*& array, int size) {
    array = static_cast<T*>(Bytes(sizeof(T) * size));
  }

  size_t wanted() const { return taken_ + kLine - kScratchAlign; }

 private:
  uintptr_t memory_;
  size_t taken_ = 0;
};

template <typename Element>
Groups<Element> Cut(Cutter& cutter, int num_groups) {
  Groups<Element> groups;
  cutter.Array(groups.shape, num_groups);
  cutter.Array(groups.x, num_groups);
  cutter.Array(groups.w, num_groups);
  cutter.Array(groups.y, num_groups);
  cutter.Array(groups.x_stride, num_groups);
  cutter.Array(groups.w_stride, num_groups);
  cutter.Array(groups.y_stride, num_groups);
  return groups;
}

ffi::Error Failed(const std::string& what, const std::string& why) {
  return ffi::Error::Internal("grouped_gemm: " + what + ": " + why + ".");
}

// Whether the driver has filled in a TMA descriptor; CUTLASS does not report a failure.
bool Encoded(const cute::TmaDescriptor* descriptor) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(descriptor);
  for (size_t i = 0; i < sizeof(*descriptor); ++i)
    if (bytes[i] != 0) return true;
  return false;
}

template <typename Element>
ffi::Error Run(cudaStream_t stream, ffi::ScratchAllocator& scratch, const Arrays<Element>& arrays) {
  using Gemm = typename Config<Element>::Gemm;
  static_assert(Gemm::GemmKernel::SharedStorageSize <= kSharedMemory);
  cutlass::KernelHardwareInfo device;
  cudaError_t status = cudaGetDevice(&device.device_id);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, device.device_id);
  if (status != cudaSuccess) return Failed("cannot query the device", cudaGetErrorString(status));

  const auto arguments_of = [&](const Groups<Element>& groups) {
    return typename Gemm::Arguments{cutlass::gemm::GemmUniversalMode::kGrouped,
                                    {arrays.num_groups, groups.shape, nullptr},
                                    {groups.x, groups.x_stride, groups.w, groups.w_stride},
                                    {{}, nullptr, nullptr, groups.y, groups.y_stride},  // alpha = 1, no C
                                    device};
  };
  Cutter measure(nullptr);
  const size_t workspace_size = Gemm::get_workspace_size(arguments_of(Cut<Element>(measure, arrays.num_groups)));
  measure.Bytes(workspace_size);
  const auto memory = scratch.Allocate(measure.wanted(), kScratchAlign);
  if (!memory.has_value() || *memory == nullptr)
    return Failed("cannot allocate scratch memory", std::to_string(measure.wanted()) + " bytes");
  Cutter cutter(*memory);
  const auto groups = Cut<Element>(cutter, arrays.num_groups);
  const auto arguments = arguments_of(groups);

  Gemm gemm;
  if (const auto answer = Gemm::can_implement(arguments); answer != cutlass::Status::kSuccess)
    return Failed("CUTLASS does not support these arguments", cutlassGetStatusString(answer));
  const auto ready = gemm.initialize(arguments, cutter.Bytes(workspace_size), stream);
  if (ready != cutlass::Status::kSuccess) return Failed("CUTLASS failed to initialize", cutlassGetStatusString(ready));
  const auto& params = gemm.params();
  if (!Encoded(params.mainloop.tma_load_a.get_tma_descriptor()) ||
      !Encoded(params.mainloop.tma_load_b.get_tma_descriptor()) ||
      !Encoded(params.epilogue.tma_store_d.get_tma_descriptor()))
    return Failed("cannot create a TMA descriptor", "the driver returned an error");
  Prepare<Element><<<device.sm_count, kThreads, 0, stream>>>(arrays, groups);
  status = cudaGetLastError();
  if (status != cudaSuccess) return Failed("cannot launch the Prepare kernel", cudaGetErrorString(status));
  const auto ran = gemm.run(stream);
  return ran == cutlass::Status::kSuccess ? ffi::Error::Success()
                                          : Failed("CUTLASS failed to run", cutlassGetStatusString(ran));
}

// The reason why the arrays are invalid, or null.
const char* Unfit(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& group_sizes,
                  const ffi::AnyBuffer& y) {
  const auto dtype = x.element_type();
  if (dtype != ffi::BF16 && dtype != ffi::F16) return "x must be bfloat16 or float16";
  if (w.element_type() != dtype || y.element_type() != dtype) return "w and y must have the dtype of x";
  if (group_sizes.element_type() != ffi::S32) return "group_sizes must be int32";
  const auto xs = x.dimensions(), ws = w.dimensions(), sizes = group_sizes.dimensions(), ys = y.dimensions();
  if (xs.size() != 2 || ws.size() != 3 || sizes.size() != 1 || ys.size() != 2)
    return "the shapes must be x (R, D), w (E, D, F), group_sizes (E,) and y (R, F)";
  if (ws[0] != sizes[0] || ws[1] != xs[1] || ys[0] != xs[0] || ys[1] != ws[2])
    return "the shapes of x (R, D), w (E, D, F), group_sizes (E,) and y (R, F) do not fit together";
  if (ws[1] % kAlign != 0 || ws[2] % kAlign != 0) return "D and F must be multiples of 8";
  if (xs[0] > INT_MAX || ws[0] > INT_MAX || ws[1] > INT_MAX || ws[2] > INT_MAX) return "a dimension is 2^31 or larger";
  for (const void* data : {x.untyped_data(), w.untyped_data(), y.untyped_data()})
    if (reinterpret_cast<uintptr_t>(data) % sizeof(uint4) != 0) return "an array is not aligned to 16 bytes";
  return nullptr;
}

ffi::Error GroupedGemm(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer x, ffi::AnyBuffer w,
                       ffi::AnyBuffer group_sizes, ffi::Result<ffi::AnyBuffer> y) {
  if (const char* wrong = Unfit(x, w, group_sizes, *y); wrong != nullptr)
    return ffi::Error::InvalidArgument("grouped_gemm: " + std::string(wrong) + ".");
  if (y->element_count() == 0) return ffi::Error::Success();
  if (w.element_count() == 0) {  // no groups, or a contraction of size 0
    const cudaError_t status = cudaMemsetAsync(y->untyped_data(), 0, y->size_bytes(), stream);
    return status == cudaSuccess ? ffi::Error::Success() : Failed("cannot set y to zero", cudaGetErrorString(status));
  }
  const auto run = [&](auto zero) {
    using Element = decltype(zero);
    const auto sides = w.dimensions();
    return Run<Element>(stream, scratch,
                        {static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(w.untyped_data()),
                         static_cast<const int32_t*>(group_sizes.untyped_data()),
                         static_cast<Element*>(y->untyped_data()), static_cast<int>(x.dimensions()[0]),
                         static_cast<int>(sides[1]), static_cast<int>(sides[2]), static_cast<int>(sides[0])});
  };
  return x.element_type() == ffi::BF16 ? run(cutlass::bfloat16_t{}) : run(cutlass::half_t{});
}

}  // namespace
}  // namespace kernels_pallas

// This call must not be captured in a CUDA graph: the scratch memory is freed when the handler returns, so a replayed
// graph could write to memory that is used by other operations.
XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_gemm, kernels_pallas::GroupedGemm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::ScratchAllocator>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
