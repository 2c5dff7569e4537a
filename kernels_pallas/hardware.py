"""Specifications of known GPUs: dense peak rates, and the device description that XLA needs to cross-compile.

Rates are from the vendor's data sheets, named in `source`. Data sheets print tensor-core rates with sparsity; the rates
here are half of those.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One GPU: its peak rates and the properties that the compiler needs."""

    name: str  # the name on the command line: "h200"
    device_kind: str  # JAX's name
    capability: float  # CUDA compute capability
    arch: str  # the ptxas target, with architecture-specific instructions ("sm_90a")
    flops: dict[str, float]  # dense flop/s by dtype; float32 is the rate of the CUDA cores, not of TF32
    bandwidth: float  # bytes/s of device memory
    memory: int  # bytes of device memory
    cores: int  # streaming multiprocessors
    clock_ghz: float
    shared_memory: int  # the most bytes a thread block can use
    l2_cache: int  # bytes
    source: str

    def peak(self, dtype: str) -> float:
        """Dense flop/s for matrix products whose operands are `dtype`."""
        return self.flops.get(dtype, self.flops["float32"])

    def target_config(self) -> str:
        """The GPU as XLA's GpuTargetConfigProto, for compiling without one."""
        major, minor = divmod(round(self.capability * 10), 10)
        return f"""
platform_name: "CUDA"
device_description_str: "{self.device_kind}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_memory + 1024}
  shared_memory_per_block_optin: {self.shared_memory}
  core_count: {self.cores}  fpus_per_core: 128  clock_rate_ghz: {self.clock_ghz}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}  l2_cache_size: {self.l2_cache}  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
"""


H200 = Hardware(
    name="h200", device_kind="NVIDIA H200", capability=9.0, arch="sm_90a",
    flops={"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12},
    bandwidth=4.8e12, memory=151_397_597_184, cores=132, clock_ghz=1.98,
    shared_memory=232_448, l2_cache=52_428_800,
    source="NVIDIA H200 Tensor Core GPU data sheet, SXM",
)  # fmt: skip
H100 = dataclasses.replace(
    H200, name="h100", device_kind="NVIDIA H100 80GB HBM3", bandwidth=3.35e12, memory=85_017_493_504,
    source="NVIDIA H100 Tensor Core GPU data sheet, SXM",
)  # fmt: skip
A100 = Hardware(
    name="a100", device_kind="NVIDIA A100-SXM4-80GB", capability=8.0, arch="sm_80",
    flops={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    bandwidth=2.039e12, memory=85_097_971_712, cores=108, clock_ghz=1.41,
    shared_memory=166_912, l2_cache=41_943_040,
    source="NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM",
)  # fmt: skip
B200 = Hardware(
    name="b200", device_kind="NVIDIA B200", capability=10.0, arch="sm_100a",
    flops={"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12},
    bandwidth=7.7e12, memory=191_503_532_032, cores=148, clock_ghz=1.965,
    shared_memory=232_448, l2_cache=132_644_864,
    source="NVIDIA HGX B200 data sheet, one eighth of the eight-GPU board",
)  # fmt: skip

GPUS = {gpu.name: gpu for gpu in (H200, H100, A100, B200)}


def by_device_kind(kind: str) -> Hardware | None:
    """The GPU whose JAX device kind is `kind`; None if it is not listed here (then no peak rate is reported)."""
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == kind), None)
