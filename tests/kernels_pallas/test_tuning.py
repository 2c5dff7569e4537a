"""Block sizes come from the first place that has them, and only what is right, fits and is faster gets there."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas import backend, deviceless, measured, tuning
from kernels_pallas.bench import main as bench, timing, tune
from kernels_pallas.op import Case, Cost, Kernel, Op


@dataclasses.dataclass(frozen=True)
class Tile:
    """The toys' blocks."""

    block: int
    num_warps: int
    num_stages: int


DEFAULT = Tile(64, 4, 2)
KERNEL = "toy_forward.triton"


def ask(size=256, *, kernel=KERNEL, dtype=jnp.bfloat16, width=64, mask="none", default=DEFAULT):
    return tuning.blocks(kernel, default, dtype=dtype, width=width, mask=mask, size=size)


def entry(block, size=256, **changes):
    values = {
        "kernel": KERNEL, "dtype": "bfloat16", "width": 64, "mask": "none", "size": size,
        "config": {"block": block, "num_warps": 8, "num_stages": 3}, "status": "ok", "median_us": 1.0,
        "default_us": 2.0, "failed": {}, "op": "toy", "case": "one", "device": "cpu", "jax": "0", "date": "2026-01-01",
        "digest": "0",
    }  # fmt: skip
    return values | changes


@pytest.fixture
def files(tmp_path, monkeypatch, caplog):
    """Where the shipped and the user's entries are looked for: two empty folders."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("DITO_TUNED", raising=False)
    tuning._read.cache_clear()
    tuning._log_once.cache_clear()
    caplog.set_level(logging.WARNING, "kernels_pallas")
    yield tuning.shipped_path("cpu"), tuning.user_path("cpu")
    tuning._read.cache_clear()


def test_the_first_place_that_has_blocks_decides(files):
    shipped, user = files
    assert ask() == DEFAULT
    tuning.save(shipped, [entry(16, size=512)])
    assert ask() == Tile(16, 8, 3)  # of the nearest size
    tuning.save(shipped, [entry(32)])
    assert ask() == Tile(32, 8, 3)
    tuning.save(user, [entry(128)])
    assert ask() == Tile(128, 8, 3)
    with tuning.trying(KERNEL, Tile(8, 8, 8)):
        assert ask() == Tile(8, 8, 8)
        assert ask(kernel="toy_backward.triton") == DEFAULT
        with tuning.trying("toy_backward.triton", Tile(4, 4, 4)):
            assert (ask(), ask(kernel="toy_backward.triton")) == (Tile(8, 8, 8), Tile(4, 4, 4))
    assert ask() == Tile(128, 8, 3)


def test_users_entries_win_and_the_others_stay(files):
    shipped, user = files
    tuning.save(shipped, [entry(16), entry(32, mask="causal")])
    tuning.save(user, [entry(128), entry(256, width=128)])
    assert [ask().block, ask(mask="causal").block, ask(width=128).block] == [128, 32, 256]


@pytest.mark.parametrize(
    "changes", [{"kernel": "other"}, {"dtype": jnp.float32}, {"width": 72}, {"mask": "causal"}], ids=str
)
def test_an_entry_is_for_its_kernel_dtype_width_and_mask(files, changes):
    tuning.save(files[0], [entry(16)])
    assert ask(**changes) == DEFAULT


@pytest.mark.parametrize("changes", [{"device": "NVIDIA H200"}, {"status": "the default does not run"}], ids=str)
def test_entries_of_other_devices_and_of_failed_searches_are_not_used(files, changes):
    tuning.save(files[0], [entry(16, **changes)])
    assert ask() == DEFAULT


@pytest.mark.parametrize("size, wanted", [(256, 256), (300, 256), (4250, 4096), (32760, 32768), (77, 64), (1, 1)])
def test_lengths_share_the_nearest_power_of_two(size, wanted):
    assert tuning.bucket(size) == wanted


def test_the_nearest_size_is_taken_and_said_once(files, caplog):
    tuning.save(files[0], [entry(16, size=256), entry(32, size=4096)])
    assert [ask(size).block for size in (512, 2048, 2048, 32768)] == [16, 32, 32, 32]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert (
        lines[1] == f"{KERNEL} bfloat16 width=64 mask=none size=2048: not tuned on cpu; using the blocks of size=4096."
    )
    assert ask(300).block == 16  # its own bucket's entry: nothing to say
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{not json", "Expecting property name"),
        ("[]", "no list of entries"),
        ('{"entries": [3]}', "no list of entries"),
        (json.dumps({"entries": [entry(16) | {"colour": "red"}]}), "missing or unknown fields: colour"),
        (json.dumps({"entries": [entry(16, size=0)]}), "invalid key: toy_forward.triton, bfloat16, 64, none, 0"),
        (json.dumps({"entries": [entry(16, width="64")]}), "invalid key"),
    ],
)
def test_a_corrupt_file_is_one_line_and_the_rest_is_used(files, caplog, text, wanted):
    shipped, user = files
    tuning.save(shipped, [entry(32)])
    user.parent.mkdir(parents=True)
    user.write_text(text)
    assert [ask().block, ask().block] == [32, 32]
    [record] = caplog.records
    line = record.getMessage()
    assert str(user) in line and wanted in line and "delete it" in line and "\n" not in line


@pytest.mark.parametrize("config", [{"block": 16, "block_z": 8}, {"block": "16"}, {"block": 16.0}, [16], None], ids=str)
def test_a_config_that_is_none_of_todays_is_one_line_and_the_default(files, caplog, config):
    tuning.save(files[0], [entry(16, config=config)])
    assert [ask(), ask()] == [DEFAULT, DEFAULT]
    [record] = caplog.records
    assert "wanted a config of block: int, num_warps: int, num_stages: int, got" in record.getMessage()


def test_a_config_may_leave_what_came_later_to_the_default(files):
    tuning.save(files[0], [entry(16, config={"block": 16})])
    assert ask() == Tile(16, 4, 2)


def test_the_users_file_is_named_or_in_the_cache_folder(monkeypatch):
    monkeypatch.setenv("DITO_TUNED", "/a/b.json")
    assert tuning.user_path("NVIDIA H200") == Path("/a/b.json")
    monkeypatch.delenv("DITO_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert tuning.user_path("NVIDIA H200") == Path("/c/dito_jax/tuned/nvidia_h200.json")
    assert tuning.shipped_path("NVIDIA H200").parts[-3:] == ("kernels_pallas", "tuned", "nvidia_h200.json")


def test_a_named_file_is_used_and_one_that_is_not_there_said_once(files, tmp_path, monkeypatch, caplog):
    tuning.save(files[1], [entry(32)])
    named = tmp_path / "named.json"
    monkeypatch.setenv("DITO_TUNED", str(named))
    assert [ask(), ask()] == [DEFAULT, DEFAULT]
    [record] = caplog.records
    assert record.getMessage() == f"DITO_TUNED names {named}, which does not exist. It is ignored."
    tuning.save(named, [entry(8)])
    assert ask().block == 8


def test_a_file_is_written_whole_or_not_at_all(files, monkeypatch):
    _, user = files
    tuning.save(user, [entry(16)])
    before = user.read_text()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        tuning.save(user, [entry(32)])
    assert user.read_text() == before
    monkeypatch.undo()
    tuning.save(user, [entry(32), entry(8, size=512)])
    assert sorted(e["config"]["block"] for e in tuning.load(user).values()) == [8, 32]
    assert os.listdir(user.parent) == [user.name]


def test_shipped_files_are_of_this_version():
    for path in tuning.SHIPPED.glob("*.json"):
        assert tuning.load(path)


def test_importing_starts_no_backend():
    code = "import kernels_pallas.tuning, jax; assert not jax._src.xla_bridge._backends"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The search, over a toy whose time and answer its blocks decide.


def scaled(x, *, gain):
    return x * gain


def slow(x, steps):
    """x, after a while."""
    return jax.lax.fori_loop(0, steps, lambda _, y: jnp.sin(y) * 0 + x, x)


def forward(x, *, gain):
    tile = tuning.blocks(KERNEL, Tile(400, 4, 2), dtype=x.dtype, width=x.shape[1], mask="none", size=x.shape[0])
    if tile.num_warps == 99:
        raise RuntimeError("too many warps\nand a page about it")
    return slow(x, tile.block) * gain * (1.5 if tile.num_stages == 99 else 1), x


def backward(x, d_out, *, gain):
    tile = tuning.blocks("toy_backward.triton", Tile(10, 4, 2), dtype=x.dtype, width=x.shape[1], mask="none", size=256)
    return (slow(d_out, tile.block) * gain,)


@dataclasses.dataclass(frozen=True)
class Tunable(Kernel):
    """A kernel that names candidates, whether or not `Kernel` has a field for them."""

    candidates: dict = dataclasses.field(default_factory=dict)


def fast_candidates(default, *, dtype, width, mask, size):
    assert (dtype, width, mask, size) == ("float32", 64, "none", 256)
    return [Tile(1, 4, 2), Tile(1, 4, 99), Tile(1, 99, 2), Tile(3000, 4, 2), default]


def toy(candidates=fast_candidates, kernels=(KERNEL,)):
    kernel = Tunable(forward, backward, lambda *_, **__: None, candidates=dict.fromkeys(kernels, candidates))
    case = Case((jax.ShapeDtypeStruct((256, 64), jnp.float32),), {"gain": 2.0})
    cost = dict.fromkeys(("forward", "backward"), lambda *_, **__: Cost(1, 1))
    return Op("toy", scaled, {"triton": kernel, "plain": Kernel(forward, backward, lambda *_, **__: None)}, cost,
              {"one": case, "small": dataclasses.replace(case, tiny=True)})  # fmt: skip


def as_if_on_a_gpu(monkeypatch, *words, ops):
    monkeypatch.setattr(backend, "gpu_present", lambda: True)
    monkeypatch.setattr(backend, "settle_platform", lambda: None)
    assert tune.main(list(words), ops=ops) == 0


def test_the_fastest_that_is_right_is_written_and_found(files, monkeypatch, capsys):
    op = toy()
    as_if_on_a_gpu(monkeypatch, "--seconds", "60", ops=(op,))
    [found] = tuning.load(files[1]).values()
    assert found["config"] == {"block": 1, "num_warps": 4, "num_stages": 2}
    assert 0 < found["median_us"] < 0.5 * found["default_us"]
    assert found["failed"] == {
        "block=1 num_warps=4 num_stages=99": "wrong: relative error 5.0e-01",
        "block=1 num_warps=99 num_stages=2": "RuntimeError: too many warps",
    }
    today = {"digest": measured.digest(op), "device": "cpu", "jax": jax.__version__, "op": "toy", "case": "one"}
    assert {name: found[name] for name in today} == today
    printed = capsys.readouterr()
    assert "default" in printed.out and "are not pruned: cpu is not in hardware.py" in printed.err
    with tuning.listening() as asked:
        jax.eval_shape(lambda x: forward(x, gain=2.0), jax.ShapeDtypeStruct((256, 64), jnp.float32))
    [key] = asked
    assert tuning.blocks(key.kernel, asked[key], dtype="float32", width=64, mask="none", size=256).block == 1


def test_a_search_that_was_cut_short_goes_on_and_keeps_what_it_has(files, monkeypatch, capsys):
    kernels = (KERNEL, "toy_backward.triton")
    op = toy(lambda default, **_: [Tile(1, 4, 2)], kernels)
    searched, search = [], tune.search

    def cut_short(task, *rest):
        searched.append(task.key.kernel)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(task, *rest)

    monkeypatch.setattr(tune, "search", cut_short)
    with pytest.raises(KeyboardInterrupt):
        as_if_on_a_gpu(monkeypatch, ops=(op,))
    assert [key.kernel for key in tuning.load(files[1])] == [KERNEL]
    as_if_on_a_gpu(monkeypatch, ops=(op,))
    assert searched == [KERNEL, "toy_backward.triton", "toy_backward.triton"]
    assert f"{KERNEL} float32 width=64 mask=none size=256: up to date" in capsys.readouterr().err
    assert sorted(key.kernel for key in tuning.load(files[1])) == sorted(kernels)
    as_if_on_a_gpu(monkeypatch, "--again", ops=(op,))
    assert len(searched) == 5


def task_of(op, kernel=KERNEL):
    parsed = type("Args", (), {"case": None, "kernel": None})
    [task] = [task for task in tune.tasks([op], parsed) if task.key.kernel == kernel]
    return task


def test_a_backwards_blocks_are_searched_in_its_pass(files):
    task = task_of(toy(lambda default, **_: [Tile(2000, 4, 2)], ("toy_backward.triton",)), "toy_backward.triton")
    assert (task.case, task.pass_, task.default) == ("one", "backward", Tile(10, 4, 2))
    found = tune.search(task, task.configs, seconds=60.0)
    assert found["config"] == dataclasses.asdict(task.default)  # nothing beat it
    assert found["median_us"] == found["default_us"]


def test_a_wrong_answer_is_never_written_however_fast(files):
    task = task_of(toy(lambda default, **_: [Tile(1, 4, 99)]))
    found = tune.search(task, task.configs, seconds=60.0)
    assert found["config"] == dataclasses.asdict(task.default) and len(found["failed"]) == 1


def test_a_default_that_does_not_run_leaves_nothing_to_use(files):
    task = dataclasses.replace(task_of(toy()), default=Tile(1, 99, 2))
    found = tune.search(task, task.configs, seconds=60.0)
    assert found["status"] == "the default does not run: RuntimeError: too many warps"
    assert len(found["failed"]) == 1  # there is nothing to hold the others to


def test_blocks_compiled_in_before_are_no_candidates(files):
    once = jax.jit(lambda x: forward(x, gain=2.0)[0])
    once(jnp.ones((256, 64)))
    deaf = Tunable(lambda x, *, gain: (once(x), x), backward, lambda *_, **__: None)
    task = task_of(toy())
    task = dataclasses.replace(task, op=dataclasses.replace(task.op, kernels={"triton": deaf}))
    found = tune.search(task, task.configs, seconds=60.0)
    assert "did not look up its block sizes" in found["status"]


def take_so_long(monkeypatch, took):
    """Tiles take the times of `took`, by their block, in microseconds; returns the blocks that ran, in order."""
    runs = []

    def call(*_):
        tile = tuning.blocks(KERNEL, Tile(400, 4, 2), dtype="float32", width=64, mask="none", size=256)
        return timing.Call(lambda block: jnp.ones(3), [(tile.block,)])

    def microseconds(call, turn=0):
        [(block,)] = call.copies
        runs.append(block)
        return took[block]

    monkeypatch.setattr(bench, "call", call)
    monkeypatch.setattr(timing, "microseconds", microseconds)
    return runs


def test_the_slow_drop_out_early_and_time_is_bounded(files, monkeypatch):
    task = task_of(toy(lambda default, **_: [Tile(1, 4, 2), Tile(3000, 4, 2), Tile(2, 4, 2)]))
    took = {400: 10.0, 1: 6.0, 3000: 60.0, 2: 9.5}
    runs = take_so_long(monkeypatch, took)
    found = tune.search(task, task.configs, seconds=60.0)
    assert (found["config"]["block"], found["median_us"], found["default_us"]) == (1, 6.0, 10.0)
    assert {block: runs.count(block) - 1 for block in took} == {
        1: tune.ROUNDS, 400: tune.ROUNDS, 2: tune.FIRST_ROUNDS, 3000: tune.FIRST_ROUNDS,
    }  # fmt: skip
    late = tune.search(task, task.configs, seconds=0.0)
    assert set(late["failed"].values()) == {"not tried: out of time"} and len(late["failed"]) == 3


@pytest.mark.parametrize("microseconds, block", [(9.9, 400), (9.7, 1)])
def test_a_hair_faster_than_the_default_is_noise(files, monkeypatch, microseconds, block):
    task = task_of(toy(lambda default, **_: [Tile(1, 4, 2)]))
    take_so_long(monkeypatch, {400: 10.0, 1: microseconds})
    assert tune.search(task, task.configs, seconds=60.0)["config"]["block"] == block


def test_a_dry_run_lists_what_would_be_searched(files, capsys):
    assert tune.main(["--dry-run"], ops=(toy(),)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{KERNEL} float32 width=64 mask=none size=256: toy one forward, 5 candidates"
    ]


def test_a_kernel_without_candidates_leaves_nothing_to_search(capsys):
    assert tune.main(["--dry-run", "--kernel", "plain"], ops=(toy(),)) == 0
    assert capsys.readouterr().err.startswith("nothing to search")


def test_only_the_real_cases_are_searched_unless_one_is_named(capsys):
    op = toy(lambda default, **_: [])
    of_length = lambda length, **more: Case((jax.ShapeDtypeStruct((length, 64), jnp.float32),), {"gain": 2.0}, **more)
    cases = {"one": of_length(256), "same": of_length(256), "small": of_length(8, tiny=True)}
    op = dataclasses.replace(op, cases=cases, sweep={"wide": of_length(4096)})
    for words, searched in [([], ["one"]), (["--case", "small"], ["small"]), (["--case", "wide"], ["wide"])]:
        tune.main(["--dry-run", *words], ops=(op,))
        assert [line.split()[6] for line in capsys.readouterr().out.splitlines()] == searched


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["no_op"], "choose from toy"),
        (["--kernel", "no_kernel"], "choose from triton, plain"),
        (["--dry-run", "--prune-only"], "not allowed with"),
        (["--prune-only", "--device", "h900"], "h200, h100, a100, b200"),
    ],
)
def test_a_mistake_is_one_line(words, wanted):
    run = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment())
    assert (run.returncode, run.stdout) == (2, "")
    [line] = run.stderr.splitlines()
    assert wanted in line


def test_a_file_that_is_in_the_way_is_one_line(files, monkeypatch, capsys):
    files[1].parent.mkdir(parents=True)
    files[1].write_text("{")
    with pytest.raises(SystemExit):
        as_if_on_a_gpu(monkeypatch, ops=(toy(),))
    [line] = capsys.readouterr().err.splitlines()
    assert str(files[1]) in line


# Pruning, by the CUDA compiler: this file, run as a program, is the command over a product in tiles.


def product(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def tiled_product(x, y):
    tile = tuning.blocks("product_forward.triton", DEFAULT, dtype=x.dtype, width=1024, mask="none", size=1024)

    def body(x_ref, y_ref, out_ref):
        step = lambda k, acc: acc + pltriton.dot(x_ref[:, pl.ds(k * 64, 64)], y_ref[pl.ds(k * 64, 64), :])
        out_ref[...] = jax.lax.fori_loop(0, 16, step, jnp.zeros(out_ref.shape, jnp.float32))

    return pl.pallas_call(
        body,
        name="product_forward",
        grid=(1024 // tile.block, 1024 // tile.block),
        in_specs=[
            pl.BlockSpec((tile.block, 1024), lambda i, j: (i, 0)),
            pl.BlockSpec((1024, tile.block), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile.block, tile.block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=backend.interpret(),
    )(x, y)


TILES = [Tile(128, 8, 3), Tile(256, 4, 1), Tile(256, 8, 4), Tile(48, 4, 2)]
PRODUCT = Op(
    "product",
    product,
    {
        "triton": Tunable(
            lambda x, y: (tiled_product(x, y), (x, y)),
            lambda *_: None,
            lambda *_, **__: None,
            candidates={"product_forward.triton": lambda default, **_: TILES},
        )
    },
    {"forward": lambda x, y: Cost(1, 1)},
    {"square": Case((jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),) * 2)},
)


def environment():
    return os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}


@pytest.mark.deviceless
@pytest.mark.skipif(deviceless.why_not() is not None, reason=str(deviceless.why_not()))
def test_what_spills_or_does_not_fit_is_pruned():
    command = [sys.executable, __file__, "product", "--prune-only", "--device", "h200", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr
    rows = {Tile(**row["config"]): row for row in json.loads(run.stdout)}
    assert list(rows) == [DEFAULT, *TILES]
    plausible = [tile for tile, row in rows.items() if row["verdict"] == "plausible"]
    assert plausible == [DEFAULT, Tile(128, 8, 3)]
    for tile in plausible:
        assert rows[tile]["spill_bytes"] == 0 and 0 < rows[tile]["registers"] <= 255
    assert rows[Tile(256, 4, 1)]["verdict"] == f"spills {rows[Tile(256, 4, 1)]['spill_bytes']} bytes"
    assert "Shared memory size limit exceeded" in rows[Tile(256, 8, 4)]["verdict"]
    assert rows[Tile(48, 4, 2)]["verdict"]  # no power of two: refused when lowered
    assert "2 of 5 plausible on h200" in run.stderr


def test_candidates_that_pruning_refused_are_not_timed(monkeypatch):
    task = task_of(toy())
    out = [Tile(1, 4, 2), task.default]  # the default stays, whatever the compiler says of it
    row = lambda tile, verdict: {"config": dataclasses.asdict(tile), "verdict": verdict}
    rows = [row(tile, "spills 8 bytes" if tile in out else "plausible") for tile in task.configs]
    rows = [dataclasses.asdict(task.key) | row for row in rows]
    asked = []
    monkeypatch.setattr(deviceless, "why_not", lambda: None)
    monkeypatch.setattr(tune, "_pruned_apart", lambda task, device: asked.append(device) or (rows, None))
    h200, pruned = backend.Target("gpu", "NVIDIA H200", 9.0), {}
    wanted = tuple(tile for tile in task.configs if tile != Tile(1, 4, 2))
    assert tune._survivors(task, None, h200, pruned) == wanted
    longer = dataclasses.replace(task, key=dataclasses.replace(task.key, size=4096))
    assert tune._survivors(longer, None, h200, pruned) == wanted  # the length changes nothing
    assert asked == ["h200"]


def test_the_table_shows_verdicts_in_columns():
    row = {"kernel": KERNEL, "config": {"block": 16}, "verdict": "spills 8 bytes"}
    head, line = tune.table([row]).splitlines()
    assert line.index("block=16") == head.index("config") and line.endswith("spills 8 bytes")


if __name__ == "__main__":
    sys.exit(tune.main(ops=(toy(), PRODUCT)))
