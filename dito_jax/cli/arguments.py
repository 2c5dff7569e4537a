"""The command line of every `dito` verb; nothing that is slow to import."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import NoReturn

from dito_jax import version
from dito_jax.errors import UserError


# Verb -> its module in this folder. `dito train` is parsed by run/arguments.py.
MODULES = {
    "train": "train", "supervise": "supervise", "configs": "configs", "sample": "sample", "eval": "evaluate",
    "data": "data", "checkpoint": "checkpoint", "goodput": "goodput", "digest": "digest", "export": "export",
    "hlo": "hlo", "block": "block", "privacy": "privacy", "doctor": "doctor", "completion": "completion",
}  # fmt: skip
HELP = {
    "train": "Train a model, or resume its training: CONFIG [--run-dir DIR] [--section.field value ...]",
    "supervise": "Multi-process launcher with automatic restart on failure, like torchrun --max-restarts",
    "configs": "List, show or copy the built-in configs",
    "sample": "Draw class-conditional samples from a checkpoint: a PNG grid and an .npz",
    "eval": "Re-run the evaluation on the latest checkpoint: eval.json, report.md, samples/final.png",
    "data": "Read every example of a data set before a run, and list those that are unreadable",
    "checkpoint": "List, inspect, verify (checksums) and time checkpoints",
    "goodput": "Goodput report over all restarts (init, compile, data, step, checkpoint, lost, idle), with a PNG",
    "digest": "SHA-256 of the parameters and the EMA parameters, to compare two runs bit for bit",
    "export": "Export the denoiser, sampler or train step as StableHLO plus safetensors, or verify an export",
    "hlo": "AOT-compile the sharded train step and report HLO, collectives and memory; no GPU needed",
    "block": "Ablation of the fused kernels in one DiT block: timings on a GPU, bytes moved otherwise",
    "privacy": "Differential privacy: calibrate noise, ledger, statement, empirical audit, utility, cost",
    "doctor": "Versions, devices, and which kernels run on this machine and why not",
    "completion": "Print a shell completion script",
}
PRIVACY_HELP = {
    "plan": "Calibrate the noise multiplier for (epsilon, delta), beside other budgets and batch sizes",
    "cost": "Memory and step time: non-private training, and each DP-SGD implementation",
    "ledger": "The privacy budget of a data set: what each run spent, and what is left",
    "card": "The DP statement of a run: privacy_card.md and privacy_card.json",
    "audit": "Empirical privacy audit (membership inference, canaries): lower bounds on epsilon",
    "utility": "Downstream utility of private samples: accuracy of a classifier trained on them alone",
}
PLATFORMS = ("cpu", "cuda")
WITH_FIELDS = {
    ("supervise", None), ("hlo", None), ("block", None), ("data", "check"), ("privacy", "plan"), ("privacy", "cost"),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}. `{self.prog} --help` lists what there is.")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its options; `overrides` are the fields of a config among them.

    Raises:
      UserError: there is no such verb or option, or a value is not of its type.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in MODULES:
        near = difflib.get_close_matches(arguments[0], MODULES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(MODULES)}."
        raise UserError(f"no verb {arguments[0]!r}; {hint}")
    options, rest = make_parser()[0].parse_known_args(arguments)
    if rest and (options.verb, getattr(options, "what", None)) not in WITH_FIELDS:
        raise UserError(f"{options.verb}: {_no_option(rest[0], make_parser()[1][options.verb])}")
    options.overrides = rest
    return options


def make_parser() -> tuple[Parser, "Parsers"]:
    """The parser of the command, and that of each verb by its name."""
    parser = Parser(
        prog="dito", description=_table(HELP), formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`dito VERB --help` lists the options of one.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dito_jax {version.installed()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    made = {name: verbs.add_parser(name, description=f"{HELP[name]}.") for name in MODULES}
    for add in (_training, _configs, _data, _runs, _sample, _export, _planning, _privacy, _completion):
        add(made)
    return parser, made


type Parsers = Mapping[str, argparse.ArgumentParser]


def _table(meanings: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:10}  {meaning}" for name, meaning in meanings.items())


def _training(parsers: Parsers) -> None:
    supervise = parsers["supervise"]
    supervise.add_argument("config", help="a config file, or the name of a built-in config; then fields, as for train")
    supervise.add_argument("--processes", type=int, default=1, help="number of processes on this machine")
    supervise.add_argument("--hosts", nargs="+", default=[], help="machines that run one process each")
    supervise.add_argument("--remote-shell", default="ssh", help="runs a command on a host, with stdin; default: ssh")
    supervise.add_argument("--run-dir", help="run directory; default: runs/CONFIG")


def _configs(parsers: Parsers) -> None:
    whats = parsers["configs"].add_subparsers(dest="what", required=True, metavar="list|show|copy", parser_class=Parser)
    whats.add_parser("list", help="names and summaries")
    show = whats.add_parser("show", help="print a built-in config")
    copy = whats.add_parser("copy", help="copy a built-in config, to edit the copy")
    for parser in (show, copy):
        parser.add_argument("name", help="name of a built-in config, e.g. digits")
    copy.add_argument("path", nargs="?", help="file to write; default: NAME.py")


def _data(parsers: Parsers) -> None:
    parsers["data"].add_argument("what", choices=("check",), help="check: read every example of both splits")
    parsers["data"].add_argument(
        "subject", metavar="PATH|CONFIG", help="a folder or file of data, or a config; then fields, as for train"
    )


def _runs(parsers: Parsers) -> None:
    parsers["checkpoint"].add_argument(
        "what",
        choices=("ls", "show", "verify", "bench"),
        help="list; contents of one; verify all checksums; time a save",
    )
    for name in ("sample", "eval", "checkpoint", "goodput", "digest"):
        parsers[name].add_argument("run", help="a run directory, e.g. runs/digits")
    for name in ("digest", "checkpoint", "sample"):
        parsers[name].add_argument("--step", type=int, help="step of the checkpoint; default: the latest")


def _sample(parsers: Parsers) -> None:
    add = parsers["sample"].add_argument
    add("--num", type=int, default=64, help="number of samples; default: 64")
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--class", dest="classes", nargs="+", metavar="CLASS", help="names or numbers of classes; default: all")
    add("--guidance", type=float, help="classifier-free guidance scale, 1 is none; default: the config's")
    add("--steps", type=int, help="sampler steps; default: the config's")
    add("--sampler", choices=("euler", "heun"), help="ODE solver; default: the config's")
    add("--ema-decay", type=float, help="which EMA of the parameters, by its decay; default: the config's")
    add("--no-ema", action="store_true", help="sample from the parameters themselves, not from their EMA")
    add("--npz", action="store_true", help="write the .npz for FID evaluators: arr_0 uint8 (N, h, w, 3), arr_1 labels")
    add("--out", metavar="DIR|FILE.png|FILE.npz", help="where to write; default: RUN/samples")


def _export(parsers: Parsers) -> None:
    add = parsers["export"].add_argument
    add("run", metavar="RUN|verify", help="a run directory; or `verify`, then the directory of an export")
    add("directory", metavar="DIR", nargs="?", help="verify: the export")
    add("--what", choices=("denoiser", "sampler", "train_step"), default="sampler", help="default: sampler")
    add("--platform", metavar="P[,P]", type=_platforms, help="cpu, cuda, or both; default: what is here")
    add("-o", "--out", metavar="DIR", help="where to write; default: RUN/export/WHAT")


def _planning(parsers: Parsers) -> None:
    for name in ("hlo", "block"):
        parsers[name].add_argument("config", help="a config file, or the name of a built-in config; then fields")
        parsers[name].add_argument("--gpus", help="compile for these GPUs, which need not be here: 1xh200, 8xh100")
    parsers["block"].add_argument("--images", type=int, default=32, help="batch size; default: 32")
    parsers["hlo"].add_argument(
        "--stage", choices=("jaxpr", "stablehlo", "optimized"), default="optimized", help="default: optimized"
    )
    parsers["hlo"].add_argument("--out", help="directory; default: runs/hlo/CONFIG_GPUS")


def _privacy(parsers: Parsers) -> None:
    parsers["privacy"].formatter_class = argparse.RawDescriptionHelpFormatter
    parsers["privacy"].description = _table(PRIVACY_HELP)
    whats = parsers["privacy"].add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    made = {name: whats.add_parser(name, description=f"{text}.") for name, text in PRIVACY_HELP.items()}
    for name in ("plan", "cost"):
        made[name].add_argument("subject", metavar="CONFIG", help="a config; then fields, as for train")
    for name in ("card", "audit", "utility"):
        made[name].add_argument("subject", metavar="RUN", help="a run directory")
    made["utility"].add_argument("more", metavar="RUN", nargs="*", help="further runs on the same data set")
    made["ledger"].add_argument("subject", metavar="DATASET", help="its name: the config's privacy.dataset")
    made["ledger"].add_argument(
        "--budget", type=float, help="set the budget to this epsilon; the old one is kept on record"
    )
    made["plan"].add_argument("--epsilon", type=float, help="default: the config's")
    made["plan"].add_argument("--delta", type=float, help="default: the config's")
    made["audit"].add_argument("--epsilon", type=float, help="the claim to test; default: the ledger's")
    made["cost"].add_argument("--gpus", help="compile for these GPUs, which need not be here: 1xh200")
    made["cost"].add_argument(
        "--units", type=int, metavar="N", help="units in the data set, which set the padding; default: the data's"
    )


def _completion(parsers: Parsers) -> None:
    parsers["completion"].add_argument("shell", choices=("bash", "zsh", "fish"))


def _no_option(name: str, parser: argparse.ArgumentParser) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists what there is."
    return f"no option {name}; {hint}" if name.startswith("-") else f"unexpected {name!r}; {hint}"


def _platforms(told: str) -> list[str]:
    platforms = list(dict.fromkeys(told.split(",")))
    if not set(platforms) <= set(PLATFORMS):
        raise argparse.ArgumentTypeError(f"{told!r} is not of {','.join(PLATFORMS)}.")
    return platforms
