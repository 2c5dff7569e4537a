"""train.py and dito as a user runs them: real processes, real data, real kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dito_jax import DiT, load_run
from dito_jax.data import ImageFolderData, batches

from . import preloaded_python


ROOT = Path(__file__).parent.parent
SMALL = [
    "--model.depth", "2", "--train.batch_size", "64", "--train.log_every", "5",
    "--evaluation.num_samples", "60", "--evaluation.grid", "20", "--sample.steps", "4",
]  # fmt: skip
STEPS = ["--train.steps", "40", "--checkpoint.every", "7"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """One device, no inherited flags, and one compilation cache for all these processes."""
    cache = tmp_path_factory.mktemp("cache")
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS", "NPROC")}
    return kept | {"DITO_CACHE": str(cache)}


def command(verb: str, *arguments: str | Path) -> list[str]:
    start = ["train.py"] if verb == "train" else ["-m", "dito_jax", verb.removeprefix("dito-")]
    return [*start, *map(str, arguments)]


@pytest.fixture
def call(environment):
    def run(verb: str, *arguments: str | Path, code: int = 0, **changes: str) -> subprocess.CompletedProcess:
        done = preloaded_python.run(command(verb, *arguments), env=environment | changes, timeout=600)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    return run


def one_line(done: subprocess.CompletedProcess) -> str:
    """The only line of stderr, but for the one that says, once the arguments are right, which platform was chosen."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("No NVIDIA GPU")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def cold(environment, *arguments: str) -> subprocess.CompletedProcess:
    """A process that imports the packages itself, as a user's does."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_wrong_name_is_one_line_and_nothing_else(environment):
    done = cold(environment, "train.py", "configs/digits.py", "--train.stepz", "5")
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "did you mean --train.steps" in done.stderr


@pytest.fixture(scope="session")
def finished(tmp_path_factory, environment) -> Path:
    """A short run, never killed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    arguments = command("train", "configs/digits.py", *SMALL, *STEPS, "--run-dir", run)
    preloaded_python.run(arguments, env=environment, timeout=600).check_returncode()
    return run


def test_a_run_leaves_everything_a_person_looks_at(finished):
    for name in (
        "config.json",
        "metrics.jsonl",
        "eval.json",
        "report.md",
        "samples/final.png",
        "loss.png",
        "tensorboard",
    ):
        assert (finished / name).exists(), name
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(5, 41, 5))
    assert rows[-1]["loss"] < 0.8 * rows[1]["loss"]
    assert {"images_per_second", "mfu", "learning_rate", "gradient_norm"} <= set(rows[-1])
    assert {"trace_seconds", "lower_seconds", "compile_seconds", "cache_hit"} <= set(rows[0])
    figures = json.loads((finished / "eval.json").read_text())
    assert 0 <= figures["class_agreement"] <= 1 < 60 == figures["num_samples"]
    assert figures["class_agreement_of_validation"] > 0.97


def test_monitoring_changes_no_bit_and_a_stopped_run_makes_up_for_what_it_missed(finished, tmp_path, call):
    """Stopped right after it saved step 20, before the validation loss and the samples of that step."""
    run = tmp_path / "monitored"
    words = ["train", "configs/digits.py", *SMALL, *STEPS, "--run-dir", run, "--monitoring.validation_every", "10",
             "--monitoring.samples_every", "20", "--monitoring.num_samples", "16"]  # fmt: skip

    def rows(path, name):
        return [row for line in (path / "metrics.jsonl").read_text().splitlines() if name in (row := json.loads(line))]

    call(*words, "--faults.inject", "term@20", code=75)
    assert [row["step"] for row in rows(run, "validation_loss")] == [10] and not (run / "samples").exists()
    call(*words)
    measured = rows(run, "validation_loss")
    assert [row["step"] for row in measured] == [10, 20, 30, 40]
    assert measured[-1]["validation_loss"] < measured[0]["validation_loss"]
    assert len([name for name in measured[0] if name.startswith("validation_loss/t_")]) == 10
    assert {path.name for path in (run / "samples").iterdir()} == {"step_20.png", "step_40.png", "final.png"}
    assert [row["loss"] for row in rows(run, "loss")] == [row["loss"] for row in rows(finished, "loss")]
    assert call("digest", run).stdout.splitlines()[-1] == call("digest", finished).stdout.splitlines()[-1]


EXPERTS = [*SMALL, "--train.log_every", "1", "--model.expert_hidden", "None", "--model.shared_hidden", "0"]


def test_experts_begin_as_a_dense_runs_mlps_and_resume_with_the_very_same_bits(finished, tmp_path, call):
    """Upcycled, the first loss is what the dense run had come to; stopped half way, it ends as if it had not been."""
    digests = []
    for name, stops in (("whole", [6]), ("stopped", [3, 6])):
        run = tmp_path / name
        for steps in stops:
            call("train", "configs/moe_dit_digits.py", *EXPERTS, "--init-from", finished, "--run-dir", run,
                 "--train.steps", str(steps), "--checkpoint.every", "3", "--optimizer.final_fraction", "1.0",
                 "--optimizer.warmup_steps", "0")  # fmt: skip
        digests.append(call("digest", run).stdout.splitlines()[-1])
    assert digests[0] == digests[1]

    def losses(run):
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    assert losses(tmp_path / "whole")[0] < 1.2 * losses(finished)[-1] < 0.7 * losses(finished)[0]
    figures = json.loads((tmp_path / "whole/eval.json").read_text())
    assert 0 <= figures["expert_load"]["smallest"] <= 1 <= figures["expert_load"]["largest"] <= 8
    with Image.open(tmp_path / "whole/expert_load.png") as picture:
        assert picture.size[0] > 300
    assert "expert_load.png" in (tmp_path / "whole/report.md").read_text()


def test_a_run_that_cannot_be_upcycled_is_one_line(finished, call, tmp_path):
    words = ("train", "configs/moe_dit_digits.py", "--model.depth", "2", "--run-dir", tmp_path / "run", "--init-from")
    line = call(*words, finished, code=2).stderr.splitlines()[-1]
    assert "model.expert_hidden is 64, the dense model's MLPs have 176" in line
    assert "no run here" in call(*words, tmp_path, code=2).stderr.splitlines()[-1]


def test_a_finished_run_does_nothing_again(finished, call):
    before = call("digest", finished).stdout
    assert call("digest", finished, "--step", "40").stdout == before
    assert call("digest", finished, "--step", "35").stdout != before


def test_samples_are_drawn_from_a_run_and_overwrite_none_of_it(finished, call):
    asked = ["sample", finished, "--num", "6", "--seed", "3", "--class", "7", "2", "--guidance", "2"]
    png, npz = (ROOT / path for path in call(*asked).stdout.strip().split(", "))
    assert png == finished / "samples" / "step_40_seed_3_guidance_2.0_class_7-2.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    with np.load(npz) as drawn:
        images = drawn["images"]
        assert images.shape == (6, 8, 8, 1) and images.dtype == np.float32 and np.abs(images).max() <= 1
        assert drawn["labels"].tolist() == [7, 2, 7, 2, 7, 2]
    assert call(*asked).stdout.startswith(f"{png.with_suffix('')}_2.png")
    run = load_run(finished)
    assert run.step == 40 and run.classes == tuple("0123456789") and run.config.model.depth == 2
    again = run.sample(["7", 2, 7, "2", 7, 2], guidance=2.0, seed=3)
    np.testing.assert_allclose(again, images, atol=1e-3)
    assert np.abs(run.sample([7, 2, 7, 2, 7, 2], guidance=1.0, seed=3) - images).max() > 0.01
    other = load_run(finished, step=35, ema_decay=0.999)
    assert other.step == 35 and np.abs(other.sample([7], steps=2, sampler="euler") - run.sample([7])).max() > 0.01
    assert isinstance(run.model(), DiT)


def test_a_folder_of_images_is_trained_sampled_by_class_and_resumed_without_python(call, tmp_path):
    for name, shade in (("owl", 30), ("ant", 220)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(60):
            Image.fromarray(np.full((9, 8, 3), shade + number % 20, np.uint8)).save(
                tmp_path / "photos" / name / f"{number}.png"
            )
    train = [
        "dito-train", "images", "--data.path", tmp_path / "photos", "--data.image_size", "8", "--model.depth", "1",
        "--model.width", "32", "--sample.steps", "2", "--evaluation.num_samples", "8", "--evaluation.grid", "4",
        "--train.batch_size", "8", "--run-dir", tmp_path / "run", "--train.steps",
    ]  # fmt: skip
    call(*train, "3")
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["model"]["image_shape"] == [8, 8, 3] and stored["model"]["num_classes"] == 2
    assert json.loads((tmp_path / "run/classes.json").read_text()) == ["ant", "owl"]
    assert "from step 3" in call(*train, "6").stderr
    npz = call("sample", tmp_path / "run", "--num", "4", "--class", "owl", "0").stdout.strip().split(", ")[1]
    with np.load(npz) as drawn:
        assert drawn["labels"].tolist() == [1, 0, 1, 0] and drawn["images"].shape == (4, 8, 8, 3)
    assert "no class 'owls'; did you mean owl?" in one_line(call("sample", tmp_path / "run", "--class", "owls", code=2))


def test_eval_judges_a_run_again(finished, call):
    before = json.loads((finished / "eval.json").read_text())
    call("eval", finished)
    assert json.loads((finished / "eval.json").read_text()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.batch_size", "0"], "at least 1"),
        (["--mesh.data", "3"], "does not use exactly the 1 available devices"),
        (["--model.image_shape", "16", "16", "1"], "the data's images are (8, 8, 1)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments, words, call, tmp_path):
    assert words in one_line(call("train", "configs/digits.py", *arguments, "--run-dir", tmp_path / "run", code=2))
    assert not (tmp_path / "run/checkpoints").exists()


def test_missing_data_are_one_line(call, tmp_path):
    done = call("train", "configs/dit_xl2_imagenet256.py", "--data.path", "/nowhere", "--run-dir", tmp_path, code=2)
    assert "/nowhere" in one_line(done)


def drawn_in_step(data: ImageFolderData, step: int) -> str:
    """The file of an image that a run with batches of 16 reads in this step and in none before."""
    source = data.open("train")
    stream = batches(source, batch_size=16, seed=0)
    earlier, chosen = [next(stream)["image"] for _ in range(step - 1)], next(stream)["image"][0]
    assert not any((image == chosen).all() for images in earlier for image in images)
    return next(source.name(index) for index in range(len(source)) if (source[index]["image"] == chosen).all())


def test_an_image_that_cannot_be_read_ends_the_run_after_a_save_or_is_skipped(call, tmp_path):
    """The error names step and file, nothing is lost, and the resumed run skips as many images as it may."""
    pixels = iter(np.random.default_rng(0).integers(0, 256, (80, 8, 8), np.uint8))
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(40):
            Image.fromarray(next(pixels)).save(tmp_path / "data" / name / f"{number}.png")
    data = ImageFolderData(path=str(tmp_path / "data"), image_size=8, channels=1)
    bad = drawn_in_step(data, 4)
    Path(bad).write_bytes(b"no image at all")
    config, run = tmp_path / "folder.py", tmp_path / "run"
    text = (ROOT / "configs/digits.py").read_text().replace("DigitsData", "ImageFolderData")
    config.write_text(text.replace("ImageFolderData()", repr(data)))
    again = ["train", config, *SMALL, "--train.steps", "6", "--train.batch_size", "16", "--run-dir", run]
    again += ["--evaluation.num_samples", "0"]
    last = call(*again, code=2).stderr.splitlines()[-1]
    assert f"step 4: {bad}: not a readable image" in last and "Step 3 is saved" in last
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"]
    done = call(*again, "--data.max_unreadable", "1")
    assert "from step 3" in done.stderr
    [event] = [
        row
        for row in map(json.loads, (run / "events.jsonl").read_text().splitlines())
        if row["event"] == "unreadable_image"
    ]
    assert event["file"] == bad and "none of PNG" in event["reason"] and event["said"] in done.stderr


def test_a_full_disk_is_one_line_and_the_last_good_step_stays(call, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        arguments = [*SMALL, "--train.steps", "40", "--checkpoint.every", "10", "--run-dir", disk / "run"]
        done = call("train", "configs/digits.py", *arguments, code=2)
        assert "cannot write the checkpoint" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
        saved = sorted(path.name for path in (disk / "run/checkpoints").iterdir())
        assert saved and all(name.isdecimal() for name in saved), "nothing half-written"
        assert len(call("digest", disk / "run").stdout.splitlines()[-1]) == 64
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_of_another_model_is_one_line_and_stays_intact(finished, call):
    before = call("digest", finished).stdout
    line = one_line(call("train", "configs/digits.py", *SMALL, "--model.width", "32", "--run-dir", finished, code=2))
    assert "in this checkpoint and" in line and "use another --run-dir" in line
    assert call("digest", finished).stdout == before


def test_a_run_directory_in_use_is_one_line(call, tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time; from dito_jax.telemetry.run_directory import RunDirectory\n"
            f"with RunDirectory({str(tmp_path / 'run')!r}).hold(): print('held', flush=True); time.sleep(600)",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        line = one_line(call("train", "configs/digits.py", *SMALL, "--run-dir", tmp_path / "run", code=2))
        assert str(holder.pid) in line and "--run-dir" in line
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("sampel", [], "did you mean sample"),
        ("sample", ["/nowhere"], "/nowhere"),
        ("digest", [], "run"),
        ("hlo", ["configs/digits.py", "--gpus", "8xh900"], "choose from h200"),
        ("hlo", ["configs/digits.py", "--gpus", "h200"], "wanted a count and a GPU"),
        ("hlo", ["configs/digits.py", "--train.stepz", "3"], "did you mean --train.steps"),
        ("eval", ["/nowhere", "--bogus"], "--bogus"),
    ],
)
def test_a_mistake_in_a_dito_command_is_one_line(verb, arguments, words, call):
    assert words in one_line(call(verb, *arguments, code=2))


def test_a_class_that_the_model_does_not_know_is_one_line(finished, call):
    assert "classes 0 to 9" in one_line(call("sample", finished, "--class", "10", code=2))


def test_help_lists_every_option(call):
    text = call("train", "configs/digits.py", "--help").stdout
    assert "usage: train.py configs/digits.py" in text and "--train.steps INT" in text and "(default: 1500)" in text


def test_the_doctor_says_what_runs_and_why_not(call):
    text = call("doctor").stdout
    assert "flash_attention triton: no: needs an NVIDIA GPU" in text and "flash_attention xla: runs" in text


def test_no_command_prints_a_traceback_of_the_cuda_plug_in(environment):
    done = cold(environment, "-m", "dito_jax", "doctor")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "cuDNN" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1
