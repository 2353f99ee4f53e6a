"""transformers: its own `generate`, plainly or with prompt lookup."""

import argparse
import time

import torch
import transformers
from serve import Answer, serve

DTYPE = {"bf16": torch.bfloat16, "f32": torch.float32}
LOOKUP = {"prompt_lookup_num_tokens": 8}  # as many as dspark's own prompt lookup proposes


class Clock:
    """A streamer that notes when each round's tokens came; the first call carries the prompt."""

    def __init__(self):
        self.calls: list[tuple[float, int]] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.calls.append((time.perf_counter(), tokens.numel()))

    def end(self) -> None:
        pass


def load(options: argparse.Namespace) -> tuple[Answer, dict]:
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPE[options.precision]).eval()
    more = LOOKUP if options.method == "lookup" else {}

    def answer(ids: list[int], n: int) -> dict:
        clock, prompt = Clock(), torch.tensor([ids])
        begin = time.perf_counter()
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False,
            eos_token_id=options.eos, pad_token_id=options.eos, streamer=clock, **more,
        )  # fmt: skip
        end = time.perf_counter()
        _, (prompt_end, first), *_ = clock.calls
        times = {"first": first, "prompt_s": prompt_end - begin, "decode_s": end - prompt_end}
        return {"tokens": output[0, len(ids) :].tolist(), **times, "drafted": None, "accepted": None}

    return answer, {"version": transformers.__version__, "torch": torch.__version__, **more}


serve(load)
