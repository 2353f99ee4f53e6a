"""Graft a head onto a Hugging Face model: `model.generate(...)` then speculates, losslessly.

transformers prepares processors and stopping criteria and hands them to our loop through its
own `custom_generate` hook, so every sampling option of `generate` keeps its meaning."""

import functools
import inspect
from typing import cast

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from dspark.core.decode import decode
from dspark.core.sampling import Streams
from dspark.drafters import DSparkDrafter
from dspark.errors import SettingError
from dspark.generation import split_law
from dspark.head.head import Head
from dspark.target.load import use_runtime
from dspark.target.target import Target

ATTRIBUTE = "_dspark_graft"
TAKEN = ("custom_generate", "past_key_values", "assistant_model", "prompt_lookup_num_tokens", "inputs_embeds", "position_ids")
UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def graft(model, head: Head, runtime: str = "auto") -> None:
    """From now on `model.generate(...)` drafts with `head`. One prompt a call; sampling, greedy
    decoding, processors, stopping criteria and streamers work as before, `torch.manual_seed` replays.
    `runtime` as in `load_target`; `eager` computes with the model's own modules.

    What cannot be speculated (batches, beams, an own cache, recorded scores) raises `SettingError`;
    `ungraft(model)` restores the plain method."""
    ungraft(model)
    target = Target(model)
    use_runtime(target, runtime)
    drafter = DSparkDrafter(head, target)
    own, plain = model.__dict__.get("generate"), model.generate

    @functools.wraps(plain)
    def speculating(*args, **kwargs):
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        for name in TAKEN:
            if given.get(name) is not None:
                raise SettingError(f"{name} cannot be combined with a grafted head", "call dspark.ungraft(model) first")
        given = {name: value for name, value in with_stop_strings(given).items() if name != "custom_generate"}
        # transformers hands a custom method neither streamer nor tokenizer; the prompt it streams itself.
        decoding = functools.partial(run, target, drafter, given.get("streamer"))
        return plain(**given, custom_generate=decoding)

    setattr(model, ATTRIBUTE, (target, own))
    model.generate = speculating


def ungraft(model) -> None:
    """Undo `graft`; nothing happens on a model without a graft."""
    target, own = model.__dict__.pop(ATTRIBUTE, (None, None))
    if target is not None:
        target.untap()
        del model.generate  # the instance attribute; the class's method shows again
        if own is not None:
            model.generate = own


def with_stop_strings(given: dict) -> dict:
    """Turn `stop_strings` and `tokenizer` into a stopping criterion, as transformers does for its own methods."""
    strings, tokenizer = given.get("stop_strings"), given.get("tokenizer")
    if strings is None or tokenizer is None:
        return given
    criteria = StoppingCriteriaList([*(given.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)])
    return {k: v for k, v in given.items() if k not in ("stop_strings", "tokenizer")} | {"stopping_criteria": criteria}


@torch.inference_mode()
def run(
    target: Target, drafter: DSparkDrafter, streamer, model, input_ids, *, logits_processor, stopping_criteria, generation_config, **kwargs
):
    """The decoding method that transformers calls, in the shape of its own `_sample`."""
    refuse(generation_config, input_ids, kwargs.get("attention_mask"))
    law = split_law(logits_processor, greedy=not generation_config.do_sample)
    prompt = input_ids[0].tolist()
    new: list[int] = []

    def finished(new_ids: list[int]) -> bool:
        so_far = torch.tensor([prompt + new_ids], device=input_ids.device)
        return bool(stopping_criteria(so_far, None).all())

    # `generate` users seed torch itself; one draw from it seeds our streams.
    seed = int(torch.randint(2**40, (1,))) if generation_config.do_sample else 0
    num_new = generation_config.max_length - len(prompt)
    for done in decode(target, drafter, prompt, law, Streams(seed), num_new, finished):
        new += done.tokens
        if streamer is not None:
            for token in done.tokens:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([input_ids, torch.tensor([new], device=input_ids.device, dtype=input_ids.dtype)], dim=1)
    if generation_config.return_dict_in_generate:
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
    return sequences


def refuse(generation_config, input_ids: torch.Tensor, attention_mask) -> None:
    hint = "call dspark.ungraft(model) first, or leave the setting out"
    if input_ids.shape[0] != 1:
        raise SettingError(
            f"a grafted model decodes one sequence a call, got a batch of {input_ids.shape[0]}",
            "call generate once per prompt",
        )
    if (generation_config.num_beams or 1) > 1 or (generation_config.num_return_sequences or 1) > 1:
        raise SettingError("beams and several return sequences cannot be speculated", hint)
    if attention_mask is not None and not bool(attention_mask.all()):
        raise SettingError("a padded prompt cannot be speculated", "pass the prompt without padding")
    asked = [name for name in UNSUPPORTED_OUTPUTS if getattr(generation_config, name, False)]
    if asked:
        raise SettingError(f"{', '.join(asked)} cannot be recorded while speculating", hint)
