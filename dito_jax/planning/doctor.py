"""The report of `dito doctor`: versions, devices, and which kernels run on this machine or why not."""

import importlib.metadata
import platform

import jax

from kernels_pallas import OPS, deviceless, hardware, measured


PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def diagnosis() -> str:
    """Versions, devices with their peak performance, and each kernel with the reason if it cannot run."""
    lines = [f"python {platform.python_version()} on {platform.machine()}"]
    lines += [f"{name} {_version(name)}" for name in PACKAGES]
    lines.append("")
    for device in jax.devices():
        gpu = hardware.by_device_kind(device.device_kind)
        peak = (
            f"{gpu.flops['bfloat16'] / 1e12:.0f} dense bf16 TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s ({gpu.source})"
            if gpu
            else "peak unknown: no MFU, no roofline"
        )
        lines.append(f"{device.id}: {device.device_kind}: {peak}")
    lines.append(f"compiling without a GPU: {deviceless.why_not() or 'yes, for ' + ', '.join(hardware.GPUS)}")
    lines.append("")
    for op in OPS:
        case = next(case for case in op.cases.values() if not case.tiny)  # of a model's dtype
        for name, kernel in op.kernels.items():
            reason = kernel.unsupported(*case.arrays, **case.static)
            proven = not kernel.needs_gpu_proof or measured.passed(op, name)
            runs = "runs" if proven else "runs only if selected by name, until it is measured on this hardware"
            lines.append(f"{op.name} {name}: {'no: ' + reason if reason else runs}")
        lines.append(f"{op.name} xla: runs")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
