"""`dspark train`: prompts, answers, features, steps, held-out rounds, a saved head of any kind. Every stage resumes."""

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dspark.config import MAX_BLOCK, RECURRENT_KINDS, HeadConfig, RecurrentConfig, TrainConfig
from dspark.core.calibration import Calibration
from dspark.errors import HeadError, SettingError
from dspark.generation import generate
from dspark.head.folder import MOST_OF_A_SIZE, dspark_only, load_head, refuse_bundled, save_head
from dspark.head.head import Head
from dspark.head.recurrent import AnyHead, RecurrentHead
from dspark.measure.calibrate import LAWS, calibrate
from dspark.profiling import device_name
from dspark.prompts import Prompt, read_json
from dspark.target.target import Target
from dspark.train.answers import (
    BATCH,
    INVENT_TOKENS,
    answer_prompts,
    append_records,
    for_template,
    invent_prompts,
    read_answers,
    read_records,
    write_records,
)
from dspark.train.card import write_card
from dspark.train.distributed import ALONE, Ranks
from dspark.train.estimate import CALIBRATION_TOKENS, CURVE_ANSWERS, ROUNDS_PROMPTS, ROUNDS_TOKENS, Done, curve_every, done_before, estimate
from dspark.train.features import FeatureStore, default_taps
from dspark.train.remote import Server, ask_server
from dspark.train.trainer import LOOK_EVERY, measure, train_steps
from dspark.train.warmstart import module_to_begin_as, new_head, new_recurrent_head, widened

LEAST_WINDOW = 512
MOST_BATCHES = 50_000  # of prompts; the seeds of the answers' batches begin this far behind theirs
EAGLE3_LAYERS = 3
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # as SentencePiece writes a byte


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bar:
    """Progress of one stage on stderr; tqdm draws it."""

    def __init__(self, shown: bool = True) -> None:
        self.bar: Any = None
        self.stage, self.shown = "", shown

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        from tqdm import tqdm

        if not self.shown:
            return
        if stage != self.stage:
            self.close()
            self.bar, self.stage = tqdm(total=total, initial=done, desc=stage, file=sys.stderr, mininterval=1.0), stage
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.stage = None, ""


def train(
    target: Target,
    out: Path,
    config: TrainConfig,
    shape: dict,
    prompts: Sequence[Prompt] | None = None,
    answers: Sequence[Path] = (),
    resume: bool = False,
    only_answers: bool = False,
    command: str = "",
    start_from: Path | None = None,
    server: Server | None = None,
    ranks: Ranks = ALONE,
) -> dict:
    """Train a head for `target` into the folder `out`; returns the measured figures. `shape` has what `RecurrentConfig` calls it for the
    kinds mtp and eagle3, which it names as `kind`; without one, what `HeadConfig` calls it.

    Prompts given by the user are mixed with `config.num_prompts` that the target invents; `server` answers them where one is
    given, else the target. `answers` are files of earlier answers (prompt_ids, answer_ids, temperature) used as they are.
    `start_from` is the folder of a head to go on with; `shape` then holds nothing, or a larger `markov_rank`.
    `resume` continues in `out`; without it an `out` that holds work is refused, nothing is overwritten. A run that was
    finished before is not measured again: its figures are returned with `finished_before`. Several processes (`ranks`) each call
    this with the same arguments; all of them get the figures."""
    work = out / "progress"
    refuse_beforehand(target, config, shape, prompts, answers, server)
    check_processes(config, ranks)
    if start_from:
        refuse_bundled(Path(start_from))
    given = load_head(start_from, target, calibrated=False) if start_from else None
    if ranks.size > 1 and (isinstance(given, RecurrentHead) or shape.get("kind") in RECURRENT_KINDS):
        raise SettingError("heads of the kinds mtp and eagle3 are trained in one process", "start without torchrun")
    if isinstance(given, RecurrentHead) and config.detached_confidence:
        raise SettingError("--confidence detached cannot take effect: a head of this kind has no confidences", "leave it out")
    begun_from = given if given is not None else target.mtp if shape.get("warm_start") == "mtp" else None
    start = [digest(parameter) for parameter in begun_from.parameters()] if isinstance(begun_from, torch.nn.Module) else None
    if given is not None and shape.get("markov_rank") is not None:
        given = widened(dspark_only(given, str(start_from)), target, shape["markov_rank"])
    brought = brought_answers(target, config, prompts, answers)
    # The label binds the folder to these settings: all that can be refused beforehand has been.
    described = settings(target, config, shape, prompts, answers, start, server)
    ranks.once(begin_or_resume, out, work, described, resume, command)
    check_shared(out, work, ranks)
    before = None if only_answers else ranks.once(finished, out)
    if before is not None:
        ranks.once(say, f"the run in {out} is finished: nothing is left to do")
        return before | {"finished_before": True}
    bar = Bar(shown=ranks.leads)
    done = ranks.once(done_before, work) if resume else Done()
    planned = shape if given is None else vars(given.config)
    ranks.once(lambda: announce(ranks, config, estimate(target, config, planned, prompts, answers, server is not None, done)))
    records = brought or make_answers(target, config, prompts, work, bar, server, ranks)
    if only_answers:
        return {"answers": len(records)}
    started = time.time()
    head = given.float().requires_grad_(True) if given else begin_head(target, records, shape, config.seed)
    target.tap(head.config.target_layer_ids)
    cache = work / ("cache" if ranks.machine == 0 else f"cache-{ranks.machine}")  # one a machine: its processes share the pages
    store = ranks.one_first(
        lambda: FeatureStore(target, records, cache, config.teacher_tokens, config.cache_gigabytes, config.feature_dtype)
    )
    curve = run_steps(head, target, store, config, work, bar, ranks)
    provenance = origin(target, config, records, command) | {"seconds_last_start": round(time.time() - started), "curve": curve}
    if ranks.size > 1:
        provenance |= {"processes": ranks.size, "parallel": ranks.parallel}
    return ranks.once(save_measured, head, target, store, records, config, provenance, out, bar)


def save_measured(
    head: AnyHead, target: Target, store: FeatureStore, records: Sequence[dict], config: TrainConfig, provenance: dict, out: Path, bar: Bar
) -> dict:
    """Measure the trained head on held-out answers, calibrate it and write it; the provenance with its figures."""
    provenance = provenance | {"held_out_teacher_forced": measure(head, target, store, config, config.held_out)}
    save_head(head, target, out, golden_ids(records), provenance, write_card(head, target, provenance, None))
    served = load_head(out, target)
    rounds = held_out_rounds(target, served, records[: config.held_out], bar)
    provenance["held_out_rounds"] = rounds
    calibration = held_out_calibration(target, served, records[: config.held_out], bar)
    if isinstance(head, Head):
        head.calibration = calibration
    save_head(head, target, out, golden_ids(records), provenance, write_card(head, target, provenance, rounds))
    return provenance


def check_processes(config: TrainConfig, ranks: Ranks) -> None:
    each, left = divmod(config.sequences_per_step, ranks.size)
    if left:
        raise SettingError(
            f"{ranks.size} processes cannot share the {config.sequences_per_step} answers of a step evenly",
            f"use --sequences {(each + 1) * ranks.size}, or another number of processes",
        )


def check_shared(out: Path, work: Path, ranks: Ranks) -> None:
    """Raise `SettingError` unless all processes see what the first one has just written."""
    blind = [rank for rank, sees in enumerate(ranks.gather((work / "settings.json").exists())) if not sees]
    if blind:
        raise SettingError(f"process {blind[0]} does not see {out}", "choose an --out on a file system that all machines share")


def announce(ranks: Ranks, config: TrainConfig, estimated: str) -> None:
    if ranks.size > 1:
        say(
            f"{ranks.size} processes ({ranks.parallel}): they sample batches of answers in turns, each takes "
            f"{config.sequences_per_step // ranks.size} of the {config.sequences_per_step} answers of a step, and one measures; one process alone would take:"
        )
    say(estimated)


def refuse_beforehand(
    target: Target, config: TrainConfig, shape: dict, prompts: Sequence[Prompt] | None, answers: Sequence[Path], server: Server | None
) -> None:
    """Raise for settings that could only fail after work was done."""
    if target.tokenizer is None and not answers:
        raise SettingError(f"target {target.name} has no tokenizer to write prompts with", "pass answers as token ids with --answers")
    check_settings(config, shape, None if answers else len(prompts or ()))
    check_shape(target, shape)
    if answers:
        return
    check_room(target, config)
    if server is not None and target.tokenizer.chat_template is None:
        raise SettingError(
            f"target {target.name} has no chat template: what a server reads of a chat is not known", "leave --answers-from out"
        )


def brought_answers(target: Target, config: TrainConfig, prompts: Sequence[Prompt] | None, answers: Sequence[Path]) -> list[dict] | None:
    """The usable records of the files that a user brings; without any, None once the prompts are seen to fit."""
    if answers:
        return usable([record for path in answers for record in read_answers(path, target.vocab_size, target.max_context)], config)
    refuse_unfit_prompts(target, config, prompts or ())
    return None


def make_answers(
    target: Target,
    config: TrainConfig,
    prompts: Sequence[Prompt] | None,
    work: Path,
    bar: Bar,
    server: Server | None = None,
    ranks: Ranks = ALONE,
) -> list[dict]:
    """Invent instructions, mix them with the given prompts, and have all answered, by the target or a server that runs it."""
    own = [{"prompt": p.content, **p.extra} if isinstance(p.content, str) else {"messages": p.content, **p.extra} for p in prompts or ()]
    invented = invent_prompts(target, config.num_prompts, config.seed * 100_000, work / "prompts.jsonl", bar, config.kinds, ranks)
    everything, first_seed = interleave(own, invented), config.seed * 100_000 + MOST_BATCHES
    if server is not None:
        return usable(
            ranks.once(lambda: ask_server(target, everything, config.max_answer_tokens, first_seed, work, server, bar, say)), config
        )
    return usable(answer_prompts(target, everything, config.max_answer_tokens, first_seed, work / "answers.jsonl", bar, ranks), config)


def golden_ids(records: Sequence[dict]) -> list[int]:
    return (records[0]["prompt_ids"] + records[0]["answer_ids"])[:64]


def origin(target: Target, config: TrainConfig, records: Sequence[dict], command: str) -> dict:
    """What a head's provenance says of the machine, the settings and the data."""
    return {
        "command": command,
        "target": target.name,
        "target_dtype": str(target.model.dtype).removeprefix("torch."),
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "transformers": __import__("transformers").__version__,
        },
        "threads": torch.get_num_threads(),
        "device": device_name(target.device),
        "train": asdict(config),
        "answers": len(records),
        "answer_tokens": sum(len(r["answer_ids"]) for r in records),
        "answers_by_kind": dict(Counter(r["kind"] for r in records)),
    }


def held_out_calibration(target: Target, head: AnyHead, records: Sequence[dict], bar: Bar) -> Calibration | None:
    """The confidences of the saved head, calibrated on held-out prompts; None, with a word, where that cannot be done, and None
    for a head that has none."""
    if isinstance(head, RecurrentHead):
        return None
    prompts = [(r["prompt_ids"], r["kind"]) for r in records if len(r["prompt_ids"]) + CALIBRATION_TOKENS <= target.max_context]
    try:
        return calibrate(target, head, prompts, LAWS, CALIBRATION_TOKENS, bar)[0]
    except SettingError as error:
        say(f"not calibrated: {error}")
        return None


def usable(records: Sequence[dict], config: TrainConfig) -> list[dict]:
    """The answers long enough to learn from, held-out ones first. Raises `SettingError` when too few are left."""
    records = held_out_first([r for r in records if len(r["answer_ids"]) >= 8], config.held_out, config.seed)
    if len(records) <= config.held_out:
        raise SettingError(
            f"{len(records)} usable answers leave nothing to train on beside {config.held_out} held out",
            "give more prompts or answers, or lower --held-out, with another --out if this one was begun",
        )
    return records


def refuse_unfit_prompts(target: Target, config: TrainConfig, prompts: Sequence[Prompt]) -> None:
    """Raise before any prompt is invented if the target's template cannot take a turn or a given chat, or too few chats fit."""
    target.prompt_ids("Hello")
    chats = [p.content if isinstance(p.content, str) else for_template(p.content) for p in prompts]
    num_fitting = sum(len(target.prompt_ids(chat)) + config.max_answer_tokens <= target.max_context for chat in chats)
    if num_fitting + config.num_prompts <= config.held_out:
        raise SettingError(
            f"only {num_fitting} of {len(prompts)} prompts fit a context of {target.max_context} with {config.max_answer_tokens} answer tokens",
            "give more or shorter prompts, or lower --max-answer-tokens or --held-out",
        )


def settings(
    target: Target,
    config: TrainConfig,
    shape: dict,
    prompts: Sequence[Prompt] | None,
    answers: Sequence[Path],
    start: list[str] | None,
    server: Server | None = None,
) -> dict:
    """Everything that decides what a run computes: a resumed run must have the same."""
    described: dict[str, Any] = {
        "train": asdict(config),
        "shape": shape,
        "target": target.fingerprint(),
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest(),
        "answers": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in answers],
        "start_from": start,
    }
    if server is not None:  # it may be another one at every start
        described["server"] = True
    return json.loads(json.dumps(described, default=str))  # as it will be read again


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().numpy().tobytes()).hexdigest()


def begin_or_resume(out: Path, work: Path, described: dict, resume: bool, command: str) -> None:
    """One folder, one set of settings: a resumed run with others would be neither. The command is kept beside them."""
    check_folder(out, resume)
    label = work / "settings.json"
    hint = f"delete {work} if it holds no work, or choose another --out; `--answers {work}/answers.jsonl` uses its answers there"
    if label.exists():
        before = read_json(label, HeadError, hint)
        if not isinstance(before, dict) or before.keys() - {"command"} != described.keys():
            raise HeadError(f"{label} does not hold the settings of a run", hint)
        others = different(before, described)
        if others:
            raise SettingError(f"{out} was started with other settings: {'; '.join(others)}", "use the same, or choose another --out")
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        partial = label.with_suffix(".partial")
        partial.write_text(json.dumps(described | {"command": command}, sort_keys=True))
        os.replace(partial, label)
    except OSError as error:
        raise HeadError(f"cannot write to {out}: {error.strerror}", "choose another --out") from error


def check_folder(out: Path, resume: bool) -> None:
    """Raise `SettingError` unless a run can begin in `out`, or go on there if `resume`; nothing is written."""
    label = out / "progress" / "settings.json"
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise SettingError(f"cannot write to {out}: {there} is a file", "choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingError(f"cannot write to {out}: {there} is not yours to write to", "choose another --out")
    taken = [name for name in ("config.json", "model.safetensors", "README.md") if (out / name).exists()]
    if taken and not label.exists():
        raise SettingError(f"{out} holds {', '.join(taken)} already; nothing was overwritten", "choose another --out")
    if resume and not label.exists():
        raise SettingError(f"there is no training run to resume in {out}", "start one without --resume, or check --out")
    if label.exists() and not resume:
        raise SettingError(f"{out} holds an unfinished or finished training run", "continue it with --resume, or choose another --out")


def different(before: dict, now: dict) -> list[str]:
    """The settings that differ: those of training and shape with both values."""
    names = []
    for section, value in now.items():
        if value == before[section]:
            continue
        if isinstance(value, dict) and isinstance(before[section], dict):
            keys = [key for key in {**before[section], **value} if before[section].get(key) != value.get(key)]
            names += [f"{key} was {before[section].get(key)} and is {value.get(key)}" for key in keys]
        else:
            names.append(f"other {section}")
    return names


def finished(out: Path) -> dict | None:
    """The provenance of a run whose last figures were measured, else None."""
    record = out / "provenance.json"
    if not all((out / name).exists() for name in ("provenance.json", "model.safetensors", "config.json", "golden.safetensors")):
        return None
    provenance = read_json(record, HeadError, "delete it and continue with --resume: the figures are measured again")
    return provenance if isinstance(provenance, dict) and provenance.get("held_out_rounds") else None


def held_out_first(records: Sequence[dict], num_held_out: int, seed: int) -> list[dict]:
    """The records in a seeded order, so that the first ones, which are never trained on, are a fair sample;
    what shares a prompt with one of those is left out."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [records[i] for i in order[:num_held_out]]
    prompts = {tuple(record["prompt_ids"]) for record in held_out}
    return held_out + [records[i] for i in order[num_held_out:] if tuple(records[i]["prompt_ids"]) not in prompts]


def check_settings(config: TrainConfig, shape: dict, num_given: int | None) -> None:
    """Raise `SettingError` for what no target can be trained with. `num_given`: the prompts that a user brings; None where
    answers are brought."""
    taps = shape.get("target_layer_ids") or []
    if any(tap < -1 for tap in taps) or sorted(set(taps)) != list(taps):
        raise SettingError(
            f"--taps is {listed(taps)}, which are not ascending layers", "number layers from 0, each once; -1 is the embeddings"
        )
    if not 1 <= shape.get("block_size", 5) <= MAX_BLOCK:
        raise SettingError(f"a block of {shape['block_size']} tokens", f"use 1 to {MAX_BLOCK}")
    if (shape.get("window") or 0) > MOST_OF_A_SIZE:  # no folder that says so is loaded
        raise SettingError(f"--window is {shape['window']}", f"use at most {MOST_OF_A_SIZE}, or 0 for all of the context")
    if shape.get("kind") == "eagle3" and taps and len(taps) != EAGLE3_LAYERS:
        raise SettingError(f"--taps is {listed(taps)}; an eagle3 head reads {EAGLE3_LAYERS} layers", "name a low, a middle and a high one")
    chain = shape.get("trained_steps")
    if chain is not None and not 1 <= chain <= shape.get("block_size", 5):
        raise SettingError(f"--chain is {chain}", f"use 1 to the {shape.get('block_size', 5)} tokens of a draft (--block-size)")
    if not 0 <= config.cache_gigabytes < float("inf"):
        raise SettingError(f"--cache-gb is {config.cache_gigabytes}", "use a number of gigabytes, 0 for no cache")
    for flag, rate in (("--lr", config.learning_rate), ("--muon-lr", config.muon_learning_rate)):
        if not 0 < rate < float("inf"):
            raise SettingError(f"{flag} is {rate}", "use a positive number")
    if num_given is None:
        return
    num_prompts = config.num_prompts + num_given
    if num_prompts > MOST_BATCHES * BATCH:
        raise SettingError(f"{num_prompts} prompts are too many", f"use at most {MOST_BATCHES * BATCH}")
    if num_prompts <= config.held_out:
        raise SettingError(
            f"{num_prompts} prompts leave nothing to train on beside {config.held_out} held out",
            "ask for more prompts, or lower --held-out",
        )


def check_shape(target: Target, shape: dict) -> None:
    """Raise `SettingError` before any work is done for a head that does not fit the target."""
    heads, kv_heads = target.text_config.num_attention_heads, shape.get("num_key_value_heads")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise SettingError(f"{kv_heads} key heads do not divide the target's {heads} heads")
    if "kind" not in shape and shape.get("num_hidden_layers", 2) > target.num_layers:
        raise SettingError(f"{shape['num_hidden_layers']} draft layers are more than the target's {target.num_layers}")
    if shape.get("kind") == "eagle3" and target.num_layers < EAGLE3_LAYERS:
        raise SettingError(f"an eagle3 head reads {EAGLE3_LAYERS} layers, and the target has {target.num_layers}", "train another --kind")
    if shape.get("warm_start") == "mtp":
        module_to_begin_as(target)
    taps = shape.get("target_layer_ids") or []
    if any(tap >= target.num_layers for tap in taps):
        raise SettingError(
            f"--taps is {listed(taps)}, and the target has {target.num_layers} layers", f"the last is {target.num_layers - 1}"
        )
    draft_size, kept = shape.get("draft_vocab_size") or target.vocab_size, len(always_kept(target))
    if draft_size < kept:
        raise SettingError(
            f"a draft vocabulary of {draft_size} has no room for the {kept} special and byte tokens", "ask for more, or 0 for all"
        )


def check_room(target: Target, config: TrainConfig) -> None:
    """Raise `SettingError` for answers that leave no room for a prompt."""
    room = target.max_context - (INVENT_TOKENS if config.num_prompts else 1)
    if config.max_answer_tokens > room:
        raise SettingError(
            f"--max-answer-tokens is {config.max_answer_tokens}, and the target's context is {target.max_context}", f"use at most {room}"
        )


def begin_head(target: Target, records: Sequence[dict], shape: dict, seed: int) -> AnyHead:
    """A new head of this shape, not yet trained."""
    if shape.get("kind") in RECURRENT_KINDS:
        return new_recurrent_head(target, *choose_recurrent_shape(target, records, shape), seed)
    return new_head(target, *choose_shape(target, records, shape), seed, shape.get("warm_start", "last"))


def listed(taps: Sequence[int]) -> str:
    return ",".join(map(str, taps))


def interleave(first: Sequence, second: Sequence) -> list:
    """Both lists spread evenly over their union, order kept: any window of it is a mix."""
    keyed = [((i + 0.5) / len(first), 0, x) for i, x in enumerate(first)] + [((i + 0.5) / len(second), 1, x) for i, x in enumerate(second)]
    return [x for _, _, x in sorted(keyed, key=lambda item: item[:2])]


def choose_shape(target: Target, records: Sequence[dict], shape: dict) -> tuple[HeadConfig, torch.Tensor]:
    """The head's configuration from the target's, and its draft vocabulary."""
    counts = token_counts(records)
    draft_ids = draft_vocabulary(target, counts, shape)
    config = HeadConfig(
        **layer_sizes(target, shape),
        num_hidden_layers=shape.get("num_hidden_layers", 2),
        draft_vocab_size=len(draft_ids),
        block_size=shape.get("block_size", 5),
        mask_token_id=shape["mask_token_id"] if shape.get("mask_token_id") is not None else mask_token(target, counts),
        target_layer_ids=tuple(shape.get("target_layer_ids") or default_taps(target.num_layers)),
        markov_rank=shape.get("markov_rank", 96),
        markov_head_type=shape.get("markov_head_type", "vanilla"),
        window=trained_window(records) if shape.get("window") is None else shape["window"],
    )
    return config, draft_ids


def choose_recurrent_shape(target: Target, records: Sequence[dict], shape: dict) -> tuple[RecurrentConfig, torch.Tensor]:
    """The same for a head of one recurrent layer. MTP trains one step of its chain where nothing is said, EAGLE-3 all of a draft."""
    kind, block_size = shape["kind"], shape.get("block_size", 5)
    draft_ids = draft_vocabulary(target, token_counts(records), shape)
    layers = [target.num_layers - 1] if kind == "mtp" else shape.get("target_layer_ids") or three_layers(target.num_layers)
    config = RecurrentConfig(
        **layer_sizes(target, shape),
        kind=kind,
        draft_vocab_size=len(draft_ids),
        block_size=block_size,
        target_layer_ids=tuple(layers),
        trained_steps=shape.get("trained_steps") or (1 if kind == "mtp" else block_size),
    )
    return config, draft_ids


def token_counts(records: Sequence[dict]) -> Counter:
    return Counter(token for record in records for token in record["answer_ids"])


def draft_vocabulary(target: Target, counts: Counter, shape: dict) -> torch.Tensor:
    """The tokens answers use most, with every special and single-byte token, ascending."""
    draft_size = min(shape.get("draft_vocab_size") or target.vocab_size, target.vocab_size)
    kept = always_kept(target)
    ranked = [token for token, _ in counts.most_common() if token not in kept] + [
        t for t in range(target.vocab_size) if t not in counts and t not in kept
    ]
    return torch.tensor(sorted([*kept, *ranked[: draft_size - len(kept)]]))


def renewed_vocabulary(target: Target, draft_ids: torch.Tensor, counts: Counter) -> torch.Tensor:
    """The draft tokens with those of the answers that are not among them, the most used first, in the place of such as no answer has."""
    before = set(draft_ids.tolist())
    wanted = [token for token, _ in counts.most_common() if token not in before]
    kept = always_kept(target)
    unused = [token for token in sorted(before, reverse=True) if token not in counts and token not in kept]
    num = min(len(wanted), len(unused))
    return torch.tensor(sorted(before - set(unused[:num]) | set(wanted[:num])))


def layer_sizes(target: Target, shape: dict) -> dict[str, Any]:
    """Of draft layers: the target's own sizes where nothing else is asked for."""
    text, heads = target.text_config, target.text_config.num_attention_heads
    return {
        "hidden_size": target.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": shape.get("num_key_value_heads") or heads,
        "head_dim": getattr(text, "head_dim", None) or target.hidden_size // heads,
        "intermediate_size": shape.get("intermediate_size") or getattr(text, "intermediate_size", None) or 4 * target.hidden_size,
        "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
        "rope_theta": rope_theta(text),
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
    }


def trained_window(records: Sequence[dict]) -> int:
    """Blocks see as far back as they did in training, at a distance that the demo target's head was measured at or more."""
    return max(LEAST_WINDOW, *(len(record["prompt_ids"]) + len(record["answer_ids"]) for record in records))


def rope_theta(text_config) -> float:
    rope = getattr(text_config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:  # families with one rotary setting a layer type (Gemma 3)
        rope = next((r for r in rope.values() if isinstance(r, dict) and "rope_theta" in r), {})
    return float(rope.get("rope_theta", 10_000.0))


def always_kept(target: Target) -> set[int]:
    """Special and byte tokens: grammars, tool calls and rare characters need them."""
    if target.tokenizer is None:
        return set(target.eos_ids)
    special = {i for i in target.tokenizer.all_special_ids if i < target.vocab_size} | set(target.eos_ids)
    vocabulary = target.tokenizer.get_vocab().items()
    single = {i for text, i in vocabulary if (len(text) == 1 or BYTE_TOKEN.fullmatch(text)) and i < target.vocab_size}
    return special | single


def mask_token(target: Target, counts: Counter) -> int:
    """A token the answers never use: a reserved one where the tokenizer has such, else the rarest."""
    special = [i for i in sorted(getattr(target.tokenizer, "all_special_ids", [])) if i not in target.eos_ids and counts[i] == 0]
    return special[-1] if special else max(range(target.vocab_size), key=lambda i: (counts[i] == 0, i))


def three_layers(num_layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer, as EAGLE-3's other implementations choose them; spread in a small model."""
    usual = (1, num_layers // 2 - 1, num_layers - 4)
    return usual if usual[0] < usual[1] < usual[2] else tuple(sorted({0, num_layers // 2, num_layers - 1}))


def run_steps(
    head: AnyHead, target: Target, store: FeatureStore, config: TrainConfig, work: Path, bar: Bar, ranks: Ranks = ALONE
) -> list[dict]:
    """Train to the end, drawing the bar and keeping a curve of held-out figures: ten points, fewer in a short run."""
    curve_file = work / "curve.jsonl"
    cpu_start, steps_at_start = time.process_time(), None
    average: torch.Tensor | None = None
    show_every = 1 if target.device.type == "cpu" else LOOK_EVERY

    def on_step(step: int, result) -> None:
        nonlocal average, steps_at_start
        if steps_at_start is None:  # a killed run may have measured further than its last checkpoint
            steps_at_start = step - 1
            ranks.once(lambda: write_records(curve_file, [e for e in read_records(curve_file, ("step",)) if e["step"] < step]))
        now = result.overlap_NAG.sum((0, 1)) / result.valid_NAG.sum((0, 1)).clamp_min(1)
        average = now if average is None else 0.9 * average + 0.1 * now
        if step % show_every == 0 or step == config.steps:
            accepted = " ".join(f"{a:.2f}" for a in average.tolist())
            bar("training", step, config.steps, f"loss {result.total.item():.3f} acceptance {accepted}")
        if step % curve_every(config.steps) == 0 or step == config.steps:
            whole = ranks.whole(head)
            ranks.once(add_point, whole, step)

    def add_point(whole: Head, step: int) -> None:
        assert steps_at_start is not None
        entry = {"step": step, "anchors": step * config.sequences_per_step * config.anchors_per_sequence,
                 "cpu_seconds_this_start": round(time.process_time() - cpu_start), "steps_this_start": step - steps_at_start,
                 **measure(whole, target, store, config, min(CURVE_ANSWERS, config.held_out))}  # fmt: skip
        append_records(curve_file, [entry])

    train_steps(head, target, store, config, work / "checkpoint.pt", on_step, ranks)
    return ranks.once(read_records, curve_file, ("step",))


def held_out_rounds(target: Target, head: AnyHead, records: Sequence[dict], bar: Bar) -> dict:
    """tau by real decoding rounds on prompts whose answers were never trained on, at T = 0 and T = 1."""
    return round_figures(count_rounds(target, head, list(records)[:ROUNDS_PROMPTS], bar))


def count_rounds(target: Target, head: AnyHead, records: Sequence[dict], bar: Bar, note: str = "") -> dict[str, list[tuple[int, int]]]:
    """By law, t0 and t1: (tokens, rounds) of decoding each of these prompts."""
    counts: dict[str, list[tuple[int, int]]] = {}
    for temperature in (0.0, 1.0):
        each = counts[f"t{temperature:.0f}"] = []
        for i, record in enumerate(records):
            room = min(ROUNDS_TOKENS, target.max_context - len(record["prompt_ids"]))
            if room < 1:
                continue
            result = generate(target, head, record["prompt_ids"], room, temperature=temperature, seed=i, drafter=head.kind, plan="fixed")
            each.append((result.num_tokens, result.rounds))
            bar(f"held-out rounds{note}, T={temperature:.0f}", i + 1, len(records))
    return counts


def round_figures(counts: dict[str, list[tuple[int, int]]]) -> dict:
    """`tau_t0`, `tau_t1`, and of how many prompts and tokens."""
    taus = {f"tau_{law}": round(sum(n for n, _ in each) / max(1, sum(r for _, r in each)), 3) for law, each in counts.items()}
    return taus | {"prompts": max(map(len, counts.values())), "max_new_tokens": ROUNDS_TOKENS}
