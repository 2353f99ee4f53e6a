"""Graft a head, or a model's own drafter, onto a Hugging Face model: `model.generate(...)` then speculates, losslessly.

transformers prepares processors and stopping criteria and hands them to our loop through its
own `custom_generate` hook, so every sampling option of `generate` keeps its meaning."""

import copy
import functools
import inspect
from typing import cast

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from dspark.core.decode import Drafter, decode
from dspark.core.sampling import Streams
from dspark.errors import SettingError
from dspark.generation import make_drafter, make_planner, split_law
from dspark.head.folder import refuse_other_target
from dspark.head.recurrent import AnyHead
from dspark.target.load import say, say_rollback, use_runtime
from dspark.target.target import Target

TAKEN = ("custom_generate", "past_key_values", "assistant_model", "prompt_lookup_num_tokens", "inputs_embeds", "position_ids")
UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def graft(
    model, head: AnyHead | None, runtime: str = "auto", plan: str | None = None, rollback: str = "auto", drafter: str | None = None
) -> None:
    """From now on `model.generate(...)` drafts with `head`, or by the `drafter` of this name as in `dspark.generate`, of which mtp,
    auto (for a model with multi-token-prediction modules) and lookup need no head. One prompt a call; sampling, greedy
    decoding, processors, stopping criteria and streamers work as before, `torch.manual_seed` replays.
    `runtime` as in `load_target`; `eager` computes with the model's own modules. `plan` as in `dspark.generate`.
    `rollback` as in `load_target`.

    What cannot be speculated (batches, beams, an own cache, recorded scores) raises `SettingError`, a head of
    another shape `HeadError`; `ungraft(model)` restores the plain method. Copies of the model are plain.
    `past_key_values` of a returned dictionary is None, since the cache is our runtime's; the next call reads its
    prompt anew."""
    ungraft(model)
    was_training = model.training
    if head is None and drafter is None:
        raise SettingError("there is no head to graft", "pass one, or a drafter that needs none: mtp, auto or lookup")
    target = Target(model, rollback_by=rollback)
    if head is not None:
        refuse_other_target(head.config, {}, target)
    use_runtime(target, runtime)
    say_rollback(target, say)
    model.generate = Speculating(model, target, make_drafter(drafter, target, head), model.__dict__.get("generate"), was_training, plan)


def ungraft(model) -> None:
    """Undo `graft`; nothing happens on a model without a graft."""
    grafted = model.__dict__.get("generate")
    if isinstance(grafted, Speculating):
        grafted.target.untap()
        del model.generate  # the instance attribute; the class's method shows again
        if grafted.own is not None:
            model.generate = grafted.own
        model.train(grafted.was_training)


class Speculating:
    """`generate` of a grafted model: transformers' own, with our loop as its decoding method."""

    def __init__(self, model, target: Target, drafter: Drafter, own, was_training: bool, plan: str | None):
        self.model, self.target, self.drafter, self.own, self.was_training = model, target, drafter, own, was_training
        self.planner = functools.partial(make_planner, plan, target, drafter)
        self.greedy_planner = self.planner()  # learns from all greedy calls; sampled ones begin alike, so that a seed replays
        self.plain = model.generate
        functools.update_wrapper(self, self.plain)

    def __call__(self, *args, **kwargs):
        given = inspect.signature(self.plain).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        for name in TAKEN:
            if given.get(name) is not None:
                raise SettingError(f"{name} cannot be combined with a grafted head", "call dspark.ungraft(model) first")
        given = {name: value for name, value in with_stop_strings(self.model, given).items() if name != "custom_generate"}
        # transformers hands a custom method neither streamer nor tokenizer; the prompt it streams itself.
        return self.plain(**given, custom_generate=functools.partial(run, self, given.get("streamer")))

    def __deepcopy__(self, memo):
        return plain_generate(memo[id(self.model)])

    def __reduce__(self):
        return plain_generate, (self.model,)


def plain_generate(model):
    """The class's own method on this model, which may still be in the making."""
    return functools.partial(type(model).generate, model)


def with_stop_strings(model, given: dict) -> dict:
    """Turn stop strings and `tokenizer` into a stopping criterion, as transformers does for its own methods."""
    config, tokenizer = given.get("generation_config") or model.generation_config, given.get("tokenizer")
    strings = given.get("stop_strings") or config.stop_strings
    if strings is None or tokenizer is None:
        return given
    criteria = StoppingCriteriaList([*(given.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)])
    given = {k: v for k, v in given.items() if k not in ("stop_strings", "tokenizer")} | {"stopping_criteria": criteria}
    if config.stop_strings is not None:
        config = copy.deepcopy(config)
        config.stop_strings = None
        given["generation_config"] = config
    return given


def run(grafted: Speculating, streamer, model, input_ids, *, logits_processor, stopping_criteria, generation_config, **kwargs):
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
    with torch.inference_mode():
        planner = grafted.greedy_planner if law.greedy else grafted.planner()
        for done in decode(grafted.target, grafted.drafter, prompt, law, Streams(seed), num_new, finished, planner, grafted.target.judge):
            new += done.tokens
            if streamer is not None:
                for token in done.tokens:
                    streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    # Made outside inference mode: the caller may want gradients through what it computes from these.
    sequences = torch.cat([input_ids, torch.tensor([new], device=input_ids.device)], dim=1)
    if generation_config.return_dict_in_generate:
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
    return sequences


def refuse(generation_config, input_ids: torch.Tensor, attention_mask) -> None:
    hint = "call dspark.ungraft(model) first, or leave the setting out"
    if (generation_config.num_beams or 1) > 1 or (generation_config.num_return_sequences or 1) > 1:
        raise SettingError("beams and several return sequences cannot be speculated", hint)
    if input_ids.shape[0] != 1:
        raise SettingError(
            f"a grafted model decodes one sequence a call, got a batch of {input_ids.shape[0]}",
            "call generate once per prompt",
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise SettingError("a padded prompt cannot be speculated", "pass the prompt without padding")
    asked = [name for name in UNSUPPORTED_OUTPUTS if getattr(generation_config, name, False)]
    if asked:
        raise SettingError(f"{', '.join(asked)} cannot be recorded while speculating", hint)
