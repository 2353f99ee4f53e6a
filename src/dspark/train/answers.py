"""The training text: instructions the target invents, and its own answers, on disk as it goes.

Both stages append to a JSON-lines file batch by batch, so a killed run resumes at the batch it
was in; batch i draws with seed + i, so a resumed run writes what an unbroken one would have, and so do several
processes, which take a batch each at a time."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dspark.errors import HeadError, PromptError
from dspark.prompts import parse_json
from dspark.target.target import Target
from dspark.train.distributed import ALONE, Ranks
from dspark.train.openers import all_openers
from dspark.train.sample import sample_batch

BATCH = 128  # rows a batch on a CPU: matrix products are near their peak rate here, the cache still fits
MOST_ROWS = 4096  # on a GPU, where the time of a step hardly depends on them: fewer steps
GPU_SHARE = 0.6  # of the GPU's memory that a batch may take
OPENER_TOKENS = 20  # about; of the start that an instruction is invented from
INVENT_TOKENS = 80  # an instruction longer than this is cut; it is still an instruction
EMPTY_START = "\n"  # what an empty opener becomes where the tokenizer has no token to begin a text with
INVENT_TEMPERATURE = 0.8  # at 1 a small model's instructions wander off
# Greedy, mild and full sampling: the head is measured at T = 0 and T = 1, and features differ.
TEMPERATURES = (0.0, 0.7, 1.0)

Progress = Callable[[str, int, int], Any]  # stage, done, total


def invent_prompts(
    target: Target, count: int, seed: int, path: Path, progress: Progress, kinds: Sequence[str] = (), ranks: Ranks = ALONE
) -> list[dict]:
    """`count` user turns the target makes up from the openers of these kinds (none named: all): records of text and kind."""
    before, after = turn_template(target)
    openers = all_openers(kinds)
    jobs = [openers[i % len(openers)] for i in range(count)]
    stop = target.eos_ids | frozenset(target.tokenizer(after, add_special_tokens=False).input_ids[:1])

    def run(batch: Sequence[tuple[str, str]], batch_seed: int) -> list[dict]:
        ids = [target.tokenizer(before + opener or EMPTY_START, add_special_tokens=False).input_ids for _, opener in batch]
        invented = sample_batch(target, ids, [INVENT_TEMPERATURE] * len(ids), INVENT_TOKENS, batch_seed, stop)
        texts = [
            (opener + target.tokenizer.decode([t for t in new if t not in stop])).strip()
            for (_, opener), new in zip(batch, invented, strict=True)
        ]
        return [{"prompt": text or "Hello", "kind": kind} for (kind, _), text in zip(batch, texts, strict=True)]

    size = ranks.once(batch_size, target, INVENT_TOKENS + OPENER_TOKENS)
    return resumable(jobs, run, seed, path, lambda done: progress("inventing instructions", done, count), ("prompt", "kind"), size, ranks)


def answer_prompts(
    target: Target, prompts: Sequence[dict], max_new_tokens: int, seed: int, path: Path, progress: Progress, ranks: Ranks = ALONE
) -> list[dict]:
    """The target's own answers: records of prompt_ids, answer_ids (stop token included), temperature, kind.

    Prompts are sorted by length within windows of eight batches: little padding, still a mix at any point."""
    jobs = []
    for index, record in enumerate(prompts):
        ids = target.prompt_ids(record.get("prompt") or for_template(record["messages"]))
        if len(ids) + max_new_tokens <= target.max_context:
            jobs.append((ids, TEMPERATURES[index % len(TEMPERATURES)], str(record.get("kind") or record.get("set") or "user")))
    size = ranks.once(batch_size, target, max((len(ids) for ids, _, _ in jobs), default=0) + max_new_tokens)
    window = 8 * size
    jobs = [job for start in range(0, len(jobs), window) for job in sorted(jobs[start : start + window], key=lambda j: len(j[0]))]

    def run(batch: Sequence[tuple[list[int], float, str]], batch_seed: int) -> list[dict]:
        answers = sample_batch(target, [j[0] for j in batch], [j[1] for j in batch], max_new_tokens, batch_seed)
        return [
            {"prompt_ids": ids, "answer_ids": answer, "temperature": temperature, "kind": kind}
            for (ids, temperature, kind), answer in zip(batch, answers, strict=True)
        ]

    keys = ("prompt_ids", "answer_ids", "temperature", "kind")
    return resumable(jobs, run, seed, path, lambda done: progress("sampling answers", done, len(jobs)), keys, size, ranks)


def for_template(messages: list[dict]) -> list[dict]:
    """The messages with the arguments of tool calls as objects, where they are JSON texts, as templates expect them.

    Raises `PromptError` for calls that are none."""
    made = []
    for message in messages:
        calls = []
        for given in message.get("tool_calls") or []:
            try:
                function = dict(given["function"])
                if isinstance(function.get("arguments"), str):
                    function["arguments"] = json.loads(function["arguments"] or "{}")
                calls.append({**given, "function": function})
            except (TypeError, KeyError, ValueError) as error:
                raise PromptError(f"a message holds a tool call that is none: {str(given)[:100]}") from error
        made.append({**message, "tool_calls": calls} if calls else message)
    return made


def batch_size(target: Target, num_tokens: int) -> int:
    """Rows to sample at once, for texts of up to so many tokens: on a GPU what its memory holds, a power of two."""
    if target.device.type != "cuda":
        return BATCH
    text, itemsize = target.text_config, target.model.dtype.itemsize
    head_dim = getattr(text, "head_dim", None) or target.hidden_size // text.num_attention_heads
    cached = target.num_layers * 2 * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim * itemsize
    row = num_tokens * cached + 6 * 4 * target.vocab_size  # logits, their law and its sums in float32
    fitting = int(GPU_SHARE * torch.cuda.get_device_properties(target.device).total_memory / row)
    return min(MOST_ROWS, 2 ** max(0, fitting.bit_length() - 1))


def turn_template(target: Target) -> tuple[str, str]:
    """What the chat template writes before and after the text of one user turn."""
    if target.tokenizer.chat_template is None:
        return target.tokenizer.bos_token or "", "\n"
    mark = "\u2603\u2603mark\u2603\u2603"
    text = target.tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(mark)
    return before, after


def resumable(
    jobs: Sequence,
    run: Callable,
    seed: int,
    path: Path,
    progress: Callable[[int], None],
    keys: Sequence[str],
    size: int,
    ranks: Ranks = ALONE,
) -> list[dict]:
    """Run `jobs` in batches of `size`, appending each batch's records (with these keys) to `path`; start where the file ends.
    Each process takes every so-manieth batch; the first one writes."""
    records = ranks.once(whole_batches, path, keys, size, len(jobs))
    for first in range(len(records), len(jobs), size * ranks.size):
        progress(first)
        start = first + size * ranks.rank
        batch = jobs[start : start + size]
        new = [record for part in ranks.gather(run(batch, seed + start // size) if batch else []) for record in part]
        ranks.once(append_records, path, new)
        records += new
    progress(len(jobs))
    return records[: len(jobs)]


def whole_batches(path: Path, keys: Sequence[str], size: int, count: int) -> list[dict]:
    """The records that an earlier start wrote, without the batch that was being written when it was killed."""
    records = read_records(path, keys)
    if len(records) < count:
        records = records[: len(records) // size * size]
        write_records(path, records)
    return records


def append_records(path: Path, records: Sequence[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path, keys: Sequence[str] = ()) -> list[dict]:
    """Complete lines of our own records file; a last line that a kill left unfinished is left out.

    Raises `HeadError` naming a line that is no record with these keys."""
    if not path.exists():
        return []
    hint = "cut the file before this line, or delete it, and continue with --resume: what it lacks is made again"
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        record = parse_json(line, f"{path}, line {number}", HeadError, hint)
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            raise HeadError(f"{path}, line {number}: not a record with {', '.join(keys) or 'names'}", hint)
        records.append(record)
    return records


def read_answers(path: Path, vocab_size: int, max_context: int) -> list[dict]:
    """Answers that a user brings. Raises `PromptError` naming the line that cannot be used."""
    hint = 'a line is {"prompt_ids": [...], "answer_ids": [...], "temperature": T}, as `dspark train --only-answers` writes it'
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PromptError(f"cannot read answers file {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_json(line, f"{path}, line {number}", PromptError, hint)
        try:
            ids = [*record["prompt_ids"], *record["answer_ids"]]
            usable = record["prompt_ids"] and len(ids) <= max_context and all(type(i) is int and 0 <= i < vocab_size for i in ids)
            records.append({"prompt_ids": record["prompt_ids"], "answer_ids": record["answer_ids"],
                            "temperature": float(record.get("temperature", 1.0)), "kind": str(record.get("kind", "user"))})  # fmt: skip
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise PromptError(f"{path}, line {number}: not a record of an answer ({error})", hint) from error
        if not usable:
            raise PromptError(
                f"{path}, line {number}: token ids do not fit a vocabulary of {vocab_size} and a context of {max_context}", hint
            )
    return records


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Written beside and renamed: a kill at this moment loses nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)
