"""`dspark train TARGET --out DIR`"""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.options import add_modules, add_target, flag, open_target, say
from dspark.cli.parser import Parser
from dspark.config import KINDS, RECURRENT_KINDS, SEQUENTIAL_HEADS, TrainConfig
from dspark.errors import HeadError, SettingError
from dspark.prompts import Prompt, read_json, read_prompts
from dspark.train.openers import OPENERS

if TYPE_CHECKING:
    from dspark.train.distributed import Ranks

# option -> (the head's own name for it, what is chosen when nothing is said)
SHAPE = {
    "layers": ("num_hidden_layers", 2), "kv_heads": ("num_key_value_heads", None), "block_size": ("block_size", 5), "rank": ("markov_rank", 96),
    "sequential": ("markov_head_type", "vanilla"), "draft_vocab": ("draft_vocab_size", 8192), "taps": ("target_layer_ids", None),
    "window": ("window", None),
}  # fmt: skip
# What says nothing of heads of one recurrent layer.
NOT_RECURRENT = ("layers", "rank", "sequential", "confidence", "warm_start", "window")
CONFIG = TrainConfig()
SERVED_TOKENS = 1024  # of an answer from a server: one that is cut is not used
CONCURRENCY, MOST_AT_ONCE = 8, 1024
FEATURE_DTYPES = ("bfloat16", "float8")
# What decides what a run computes: option -> what holds where it is not given. argparse leaves None there.
DATA: dict[str, Any] = {
    "dtype": "bfloat16", "device": "cpu", "prompts": None, "num_prompts": CONFIG.num_prompts, "kinds": "", "answers": [],
    "max_answer_tokens": CONFIG.max_answer_tokens, "held_out": CONFIG.held_out, "cache_gb": CONFIG.cache_gigabytes, "feature_dtype": CONFIG.feature_dtype,
    "answers_from": None, "answers_model": None, "api_key_env": None, "concurrency": None,
}  # fmt: skip
STEPS: dict[str, Any] = {
    "steps": CONFIG.steps, "sequences": CONFIG.sequences_per_step, "anchors": CONFIG.anchors_per_sequence, "optimizer": CONFIG.optimizer,
    "lr": CONFIG.learning_rate, "muon_lr": CONFIG.muon_learning_rate, "loss": "paper", "confidence": "attached", "seed": CONFIG.seed,
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    **DATA,
    "start_from": None,
    "kind": "dspark",
    "chain": None,
    "warm_start": "last",
    "mtp": None,
    **{option: default for option, (_, default) in SHAPE.items()},
    **STEPS,
}
# What they hold is compared, or they change nothing in an answer: files may have moved, and the server too.
MAY_DIFFER = ("prompts", "answers", "start_from", "mtp", "answers_from", "api_key_env", "concurrency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, dtype="bfloat16")
    add_run(parser)
    data = add_data(parser, DEFAULTS)
    data.add_argument("--only-answers", action="store_true", help="stop when the answers are sampled (DIR/progress/answers.jsonl)")
    shape = parser.add_argument_group("head")
    shape.add_argument(
        "--kind", choices=KINDS,
        help="dspark; dflash: without a sequential head; mtp: a multi-token-prediction module; eagle3: EAGLE-3, as a chain (default dspark)",
    )  # fmt: skip
    shape.add_argument(
        "--chain",
        type=int,
        metavar="N",
        help="mtp, eagle3: steps of its chain that training walks (default 1 for mtp, the block for eagle3)",
    )
    shape.add_argument(
        "--warm-start",
        choices=("last", "mtp"),
        help="what the first draft layer starts as: the target's own layer, or its first multi-token-prediction module (default last)",
    )
    add_modules(shape)
    shape.add_argument("--start-from", metavar="HEAD", help="go on training this head, which brings its own shape; only --rank may grow it")
    shape.add_argument("--layers", type=int, metavar="L", help="draft layers (default 2)")
    shape.add_argument("--kv-heads", type=int, metavar="K", help="key heads of the draft layers (default: as many as query heads)")
    shape.add_argument("--block-size", type=int, metavar="G", help="tokens drafted a round, gamma (default 5)")
    shape.add_argument("--rank", type=int, metavar="R", help="rank of the sequential head; 0 is DFlash (default 96)")
    shape.add_argument("--sequential", choices=SEQUENTIAL_HEADS, help="kind of sequential head (default vanilla)")
    shape.add_argument("--draft-vocab", type=int, metavar="N", help="tokens the head can propose; 0 for all (default 8192)")
    shape.add_argument(
        "--taps", metavar="I,J,..", help="target layers whose outputs feed the head (default: five, spread; three for eagle3)"
    )
    shape.add_argument(
        "--window", type=int, metavar="W",
        help="tokens of context that a block sees, the last ones; 0: all (default: as many as the longest answer with its prompt, 512 at least)",
    )  # fmt: skip
    add_steps(parser, DEFAULTS)
    machines = parser.add_argument_group("several processes", "torchrun --nproc-per-node N -m dspark train TARGET ...")
    machines.add_argument(
        "--parallel", choices=("ddp", "fsdp"),
        help="ddp: each process has the whole head; fsdp: each keeps a share of its weights and optimiser states (default under torchrun: ddp)",
    )  # fmt: skip


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="the head's folder; work in progress lies in DIR/progress")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR with its settings; they need not be given again")
    parser.add_argument("--json", action="store_true", help="print the provenance record as JSON at the end")


def add_data(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> Any:
    """Where prompts and answers come from; returns the group."""
    data = parser.add_argument_group("data")
    data.add_argument("--prompts", metavar="FILE.jsonl", help="your own prompts, mixed with those the target invents")
    data.add_argument(
        "--num-prompts", type=int, metavar="N", help=f"instructions the target invents (default {defaults['num_prompts']})"
    )  # fmt: skip
    data.add_argument("--kinds", metavar="LIST", help=f"kinds of instructions to invent, of {', '.join(OPENERS)} (default: all)")
    data.add_argument("--answers", action="append", metavar="FILE", help="answers sampled earlier, used as they are; may be given again")
    data.add_argument(
        "--max-answer-tokens", type=int, metavar="N",
        help=f"longest answer (default {defaults['max_answer_tokens']}; {SERVED_TOKENS} from a server, whose cut answers are left out)",
    )  # fmt: skip
    data.add_argument("--held-out", type=int, metavar="N", help=f"answers kept for measuring (default {defaults['held_out']})")
    data.add_argument(
        "--cache-gb", type=float, metavar="G", help=f"bound of the feature cache on disk; 0: none (default {defaults['cache_gb']})"
    )  # fmt: skip
    data.add_argument(
        "--feature-dtype", choices=FEATURE_DTYPES, help="precision of features; float8 takes half the room (default bfloat16)"
    )  # fmt: skip
    server = parser.add_argument_group("answers from a server")
    server.add_argument(
        "--answers-from", metavar="URL", help="an OpenAI-compatible server that runs the target answers the prompts, like http://127.0.0.1:8000/v1"
    )  # fmt: skip
    server.add_argument("--answers-model", metavar="NAME", help="which of its models is the target (default: the one named so)")
    server.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds its key")
    server.add_argument("--concurrency", type=int, metavar="N", help=f"requests at once (default {CONCURRENCY})")
    return data


def add_steps(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> Any:
    """How the head is trained; returns the group. What was given can be told from what was not: there is None."""
    steps = parser.add_argument_group("steps")
    steps.add_argument("--steps", type=int, metavar="N", help=f"optimiser steps (default {defaults['steps']})")
    steps.add_argument("--sequences", type=int, metavar="N", help=f"answers a step (default {defaults['sequences']})")
    steps.add_argument("--anchors", type=int, metavar="N", help=f"anchors an answer (default {defaults['anchors']})")
    steps.add_argument("--optimizer", choices=("adamw", "muon"), help=f"muon: for matrices only (default {defaults['optimizer']})")
    steps.add_argument("--lr", type=float, metavar="R", help=f"peak learning rate of AdamW (default {defaults['lr']})")
    steps.add_argument("--muon-lr", type=float, metavar="R", help=f"peak learning rate of Muon (default {defaults['muon_lr']})")
    steps.add_argument("--loss", choices=LOSSES, help=f"{LOSS_HELP} (default {defaults['loss']})")
    steps.add_argument(
        "--confidence", choices=("attached", "detached"),
        help="detached: the loss of the confidences trains their layer alone (default attached)",
    )  # fmt: skip
    steps.add_argument("--seed", type=int, metavar="S", help="the same seed and threads give the same head on a CPU (default 0)")
    parser.set_defaults(dtype=None, device=None)
    return steps


LOSSES = ("paper", "distil")
LOSS_HELP = "paper: 0.1 cross entropy with the sampled token + 0.9 L1; distil: cross entropy with the target's law + 0.5 L1"
LOSS_SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"teacher_ce": False, "ce_weight": 0.1, "l1_weight": 0.9},
    "distil": {"teacher_ce": True, "ce_weight": 1.0, "l1_weight": 0.5},
}


def run(options: argparse.Namespace) -> int:
    from dspark.train.distributed import processes

    before = started_with(Path(options.out), add_arguments) if options.resume else {}
    with processes(options.parallel, options.device or before.get("device") or DATA["device"]) as ranks:
        return run_as(options, ranks)


def run_as(options: argparse.Namespace, ranks: "Ranks") -> int:
    """`run` in one of the processes that share it; the first one prints."""
    from dspark.train.distributed import restarted
    from dspark.train.run import check_folder, check_processes, check_settings, train

    if restarted() and (Path(options.out) / "progress" / "settings.json").exists():
        options.resume = True
    ranks.once(check_folder, Path(options.out), options.resume)
    if options.resume:
        reuse_settings(options, DEFAULTS, add_arguments)
    command = command_of(options, ["train", options.target], DEFAULTS)
    for name in ("layers", "block_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise SettingError(f"{flag(name)} is {getattr(options, name)}", "use 1 or more")
    if min(options.rank or 0, options.draft_vocab or 0, options.window or 0) < 0:
        raise SettingError("--rank, --draft-vocab and --window cannot be negative")
    if options.answers and options.only_answers:
        raise SettingError("--answers brings finished answers; --only-answers cannot take effect beside it", "leave one of them out")
    shape = head_shape(options)
    config, prompts = training(options, DEFAULTS)
    check_settings(config, shape, None if options.answers else len(prompts or ()))
    check_processes(config, ranks)
    from dspark.head.folder import named_head

    start_from = None if options.start_from is None else named_head(options.start_from)
    server = open_server(options)
    if ranks.size > 1 and options.device == "cuda":
        options.device = f"cuda:{ranks.local_rank}"
    target = open_target(options)
    report = train(
        target, Path(options.out), config, shape, prompts, [Path(a) for a in options.answers], options.resume, options.only_answers, command,
        start_from, server, ranks,
    )  # fmt: skip
    if not ranks.leads:
        return 0
    if not (options.only_answers or report.get("finished_before")):
        report["break_even"] = break_even(target, Path(options.out))
        say(advice(options.out, report))
    if options.only_answers:
        print(f"{report['answers']} answers in {options.out}/progress/answers.jsonl")
    elif options.json:
        print(json.dumps(report))
    else:
        rounds = report["held_out_rounds"]
        print(
            f"head saved in {options.out}: tau {rounds['tau_t0']} at T=0, {rounds['tau_t1']} at T=1 on {rounds['prompts']} held-out prompts"
        )
    return 0


def training(options: argparse.Namespace, defaults: dict[str, Any]) -> tuple[TrainConfig, list[Prompt] | None]:
    """What `add_data` and `add_steps` were given, checked, and the defaults put in; and the prompts. Raises `UserError`s."""
    given = {name: getattr(options, name) for name in defaults}
    for name, default in defaults.items():
        if getattr(options, name) is None and name not in SHAPE:
            setattr(options, name, default)
    if options.answers_from and given["max_answer_tokens"] is None:
        options.max_answer_tokens = SERVED_TOKENS
    for name in ("steps", "sequences", "anchors", "max_answer_tokens", "held_out"):
        if getattr(options, name) < 1:
            raise SettingError(f"{flag(name)} is {getattr(options, name)}", "use 1 or more")
    if options.num_prompts < 0:
        raise SettingError(f"--num-prompts is {options.num_prompts}", "it cannot be negative")
    if not 0 <= options.seed < 2**32:
        raise SettingError(f"--seed is {options.seed}", "seeds of a training run are whole numbers from 0 to 2**32 - 1")
    kinds = tuple(kind.strip() for kind in options.kinds.split(",") if kind.strip())
    unknown = [kind for kind in kinds if kind not in OPENERS]
    if unknown:
        raise SettingError(f"--kinds names {unknown[0]!r}", f"choose from {', '.join(OPENERS)}")
    beside = [name for name in ("prompts", "num_prompts", "kinds", "answers_from") if given[name] is not None]
    if options.answers and beside:
        raise SettingError(f"--answers brings finished answers; {flag(beside[0])} cannot take effect beside it", "leave one of them out")
    missing = [path for path in options.answers if not Path(path).is_file()]
    if missing:
        raise SettingError(f"no answers file {missing[0]}", "sample some: `dspark train TARGET --out DIR --only-answers`")
    config = TrainConfig(
        seed=options.seed, num_prompts=options.num_prompts, kinds=kinds, max_answer_tokens=options.max_answer_tokens, steps=options.steps,
        sequences_per_step=options.sequences, anchors_per_sequence=options.anchors, optimizer=options.optimizer, learning_rate=options.lr,
        muon_learning_rate=options.muon_lr, held_out=options.held_out, cache_gigabytes=options.cache_gb, feature_dtype=options.feature_dtype, **LOSS_SETTINGS[options.loss],
        detached_confidence=options.confidence == "detached",
    )  # fmt: skip
    return config, read_prompts(options.prompts) if options.prompts else None


def open_server(options: argparse.Namespace):
    """The server that answers the prompts, asked which models it has; None where the target answers itself."""
    alone = [name for name in ("answers_model", "api_key_env", "concurrency") if getattr(options, name) is not None]
    if options.answers_from is None:
        if alone:
            raise SettingError(f"{flag(alone[0])} cannot take effect without --answers-from")
        return None
    concurrency = CONCURRENCY if options.concurrency is None else options.concurrency
    if not 1 <= concurrency <= MOST_AT_ONCE:
        raise SettingError(f"--concurrency is {concurrency}", f"use 1 to {MOST_AT_ONCE}")
    from dspark.train.remote import Server, api_key, find_server

    if options.resume and (Path(options.out) / "progress" / "answers.jsonl").exists():  # all is answered: it may be gone by now
        return Server(options.answers_from, options.answers_model or options.target)
    return find_server(options.answers_from, options.target, options.answers_model, api_key(options.api_key_env), concurrency)


def break_even(target, out: Path) -> float | None:
    """Tokens a round that the trained head must give to pay on this machine, measured now."""
    from dspark.head.folder import load_head
    from dspark.profiling import ROWS, profile

    return profile(target, load_head(out, target), context=min(300, target.max_context - max(ROWS) - 1)).break_even


def advice(out: str, report: dict) -> str:
    """What can be done now: whether the head pays here yet, and what the work in progress is still good for."""
    work = Path(out) / "progress"
    size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    lines = [f"{work} ({size / 1e6:.0f} MB) may be deleted now"]
    if (work / "answers.jsonl").exists():
        lines[0] += f"; its answers can train this head further: --out OTHER --start-from {out} --answers {work}/answers.jsonl"
    tau = report["held_out_rounds"]["tau_t0"]
    if report["break_even"] is not None and tau < report["break_even"]:
        lines.append(
            f"warning: the head does not pay on this machine yet: it gives {tau:.2f} tokens a round, and a round costs as much as "
            f"{report['break_even']:.2f} plain tokens; train with more --steps and more answers (--num-prompts)"
        )
    return "\n".join(lines)


def reuse_settings(options: argparse.Namespace, defaults: dict[str, Any], add: Callable[[argparse.ArgumentParser], None]) -> None:
    """Take the settings of the run in `out` where none are given. Raises `SettingError` naming one that is given and differs.

    `add` gives a parser the options of this verb."""
    saved = started_with(Path(options.out), add)
    for name, default in defaults.items():
        now, then = getattr(options, name), saved.get(name)
        may_differ = name in MAY_DIFFER and not (name == "answers_from" and then is None)
        if now is None:
            setattr(options, name, then)
        elif saved and not may_differ and now != (default if then is None else then):
            raise SettingError(
                f"{flag(name)} is {now}, and the run in {options.out} was started with {default if then is None else then}",
                f"leave {flag(name)} out to resume, or choose another --out",
            )


def started_with(out: Path, add: Callable[[argparse.ArgumentParser], None]) -> dict[str, Any]:
    """The options that the run in `out` was started with; empty where the folder does not tell."""
    label = out / "progress" / "settings.json"
    settings = read_json(label, HeadError, f"restore the file, or delete {label.parent} if it holds no work") if label.exists() else None
    command = settings.get("command") if isinstance(settings, dict) else None
    if not isinstance(command, str) or not command:
        return {}
    parser = Parser()
    add(parser)
    try:
        return vars(parser.parse(shlex.split(command)[2:]))
    except ValueError as error:
        hint = "go on with the version of dspark that began the run, or choose another --out"
        raise HeadError(f"the command in {label} cannot be read: {error.args[0]}", hint) from error


def command_of(options: argparse.Namespace, verb: list[str], defaults: dict[str, Any]) -> str:
    """The command that starts this run: `verb` with its objects, its settings, and the threads that the bits of the head depend on."""
    given = [(flag(name), getattr(options, name)) for name in (*defaults, "threads") if getattr(options, name) is not None]
    each = [f"{name}={value}" for name, values in given for value in (values if isinstance(values, list) else [values])]
    return shlex.join(["dspark", *verb, "--out", options.out, *each])


def head_shape(options: argparse.Namespace) -> dict:
    """The shape asked for; beside --start-from, whose head has one, at most a larger rank. Raises `SettingError` for what cannot take effect."""
    if options.mtp is not None and options.warm_start != "mtp":
        raise SettingError("--mtp cannot take effect without --warm-start mtp", "add it, or leave --mtp out")
    given = [name for name in ("kind", "chain", "warm_start", *SHAPE, "confidence") if getattr(options, name) is not None]
    if options.start_from is not None:
        other = [name for name in given if name not in ("rank", "confidence")]
        if other:
            raise SettingError(f"{flag(other[0])} cannot take effect beside --start-from", "the head brings its own shape")
        return {} if options.rank is None else {"markov_rank": options.rank}
    kind = options.kind or DEFAULTS["kind"]
    idle = {"mtp": (*NOT_RECURRENT, "taps"), "eagle3": NOT_RECURRENT, "dflash": ("rank", "sequential", "chain"), "dspark": ("chain",)}[kind]
    for name in given:
        if name in idle:
            raise SettingError(f"{flag(name)} cannot take effect with --kind {kind}", "leave one of them out")
    shape = {name: default if getattr(options, option) is None else getattr(options, option) for option, (name, default) in SHAPE.items()}
    shape["draft_vocab_size"] = shape["draft_vocab_size"] or None
    try:
        shape["target_layer_ids"] = [int(i) for i in options.taps.split(",")] if options.taps is not None else None
    except ValueError as error:
        raise SettingError(f"--taps is {options.taps!r}", "give layer numbers with commas, like 1,8,15,22,29") from error
    if kind == "dflash":
        shape["markov_rank"] = 0
    if options.warm_start == "mtp":
        shape["warm_start"] = "mtp"
    if kind in RECURRENT_KINDS:
        kept = ("num_key_value_heads", "block_size", "draft_vocab_size", "target_layer_ids")
        return {"kind": kind, "trained_steps": options.chain} | {name: shape[name] for name in kept}
    return shape
