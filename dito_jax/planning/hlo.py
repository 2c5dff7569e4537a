"""Contents of a compiled train step: Pallas kernels, custom calls, fusions, collectives with their bytes, memory.

Counted in the optimized HLO text. An instruction in a loop body (the scan over layers) is counted once.
"""

import collections
import dataclasses
import re

from dito_jax.planning.lowering import Lowered


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\(", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class StepContents:
    """Instruction counts of one compiled step on one device."""

    kernels: dict[str, int]  # Pallas kernels by name
    custom_calls: dict[str, int]  # other custom calls by target
    fusions: dict[str, int]  # by kind
    collectives: dict[str, tuple[int, int]]  # by kind: (count, bytes of the results)
    instructions: int


def contents(text: str) -> StepContents:
    """Counts the instructions in optimized HLO text."""
    kernels, calls, fusions = collections.Counter(), collections.Counter(), collections.Counter()
    collectives: dict[str, tuple[int, int]] = {}
    instructions = 0
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        instructions += 1
        op = match["op"]
        if op == "custom-call":
            name, target = (
                re.search(r'\bname = "([^"]+)"', line),
                re.search(r'custom_call_target="([^"]+)"', line),
            )
            if name:
                kernels[name[1]] += 1
            elif target:
                calls[target[1]] += 1
        elif op == "fusion" and (kind := re.search(r"kind=k(\w+)", line)):
            fusions[kind[1]] += 1
        elif (base := op.removesuffix("-start")) in COLLECTIVES:
            count, size = collectives.get(base, (0, 0))
            collectives[base] = count + 1, size + _result_bytes(match["type"], asynchronous=op != base)
    return StepContents(dict(kernels), dict(calls), dict(fusions), collectives, instructions)


def page(title: str, lowered: Lowered) -> str:
    """The report as Markdown."""
    found = contents(lowered.text)
    assert lowered.report is not None
    sections = [
        f"# {title}\n\n{lowered.report.line()}. {found.instructions:,} instructions; one in a loop body counts once.",
        _table("Pallas kernels", ("name", "calls"), found.kernels.items()),
        _table("Other custom calls", ("target", "calls"), found.custom_calls.items()),
        _table("Fusions", ("kind", "count"), found.fusions.items()),
        _table(
            "Collectives",
            ("kind", "count", "result MiB"),
            [(kind, n, f"{size / 2**20:,.2f}") for kind, (n, size) in sorted(found.collectives.items())],
        ),
        _table("Memory per device", ("what", "MiB"), _memory_rows(lowered.memory)),
    ]
    return "\n\n".join(sections) + "\n"


def _memory_rows(memory: object | None) -> list[tuple[str, str]]:
    names = {
        "argument": "argument_size_in_bytes",
        "output": "output_size_in_bytes",
        "of which aliased (donated)": "alias_size_in_bytes",
        "temporary": "temp_size_in_bytes",
        "peak": "peak_memory_in_bytes",
    }
    return [(name, f"{getattr(memory, field) / 2**20:,.1f}") for name, field in names.items() if hasattr(memory, field)]


def _table(title: str, header: tuple[str, ...], rows) -> str:
    lines = [" | ".join(str(cell) for cell in row) for row in rows]
    body = "\n".join(f"| {line} |" for line in lines) if lines else "| none |" + " |" * (len(header) - 1)
    return f"## {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n{body}"


def _result_bytes(result: str, *, asynchronous: bool) -> int:
    """Bytes of a result type such as "f32[8,128]{1,0}" or a tuple; a start op's tuple is (operands, results)."""
    sizes = []
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
        count = 1
        for dim in filter(None, shape.split(",")):
            count *= int(dim)
        sizes.append(count * ITEM_BYTES.get(dtype, 4))
    return sum(sizes[len(sizes) // 2 :]) if asynchronous and len(sizes) > 1 else sum(sizes)
