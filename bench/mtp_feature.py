"""Is a module's hidden state worth a feature of the head? Two trainings alike, without and with it, teacher-forced.

    python bench/mtp_feature.py smollm2-135m --module MTP_HEAD --answers ANSWERS.jsonl --cache DIR [--steps 450] [--without]

The module (`dspark train --kind mtp`) has read the context and the token after each of it, the anchor too, when a draft begins: its states
tell more of the next token than the target's layers do. They go in beside the head's five layers. Nothing else of dspark drafts in
this way: the experiment came before the feature. Prints a line of JSON for each tenth of the way."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.head.folder import load_head
from dspark.head.recurrent import RecurrentHead
from dspark.target.load import load_target
from dspark.train.answers import read_answers
from dspark.train.features import FeatureStore, Sample
from dspark.train.run import begin_head, usable
from dspark.train.trainer import measure, train_steps


class WithStates(FeatureStore):
    """Each sample's features [S, M, D], the module's states before them as another layer's."""

    module: RecurrentHead | None = None

    @torch.no_grad()
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if self.module is None:
            return sample
        states_SD, _ = self.module.run(0, self.module.hidden(sample.features_SMD), sample.ids_S[1:].tolist(), 0, self.module.start())
        return replace(sample, features_SMD=torch.cat([states_SD[:, None].to(sample.features_SMD), sample.features_SMD], dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--module", required=True, type=Path)
    parser.add_argument("--answers", required=True, type=Path)
    parser.add_argument("--cache", required=True, type=Path, help="folder for the features of the five layers")
    parser.add_argument("--without", action="store_true", help="the training without it")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, dtype="bfloat16")
    config = TrainConfig(
        steps=options.steps, sequences_per_step=options.sequences, learning_rate=1.5e-3, teacher_ce=True, ce_weight=1.0, l1_weight=0.5,
        cache_gigabytes=9.0,
    )  # fmt: skip
    records = usable(read_answers(options.answers, target.vocab_size, target.max_context), config)
    plain = begin_head(target, records, {}, config.seed)
    taps = plain.config.target_layer_ids
    module = load_head(options.module, target)
    assert isinstance(module, RecurrentHead) and not set(module.layer_ids) - {taps[-1]}, "a module that reads the deepest layer is needed"
    head = plain if options.without else begin_head(target, records, {"target_layer_ids": [0, *taps]}, config.seed)
    target.tap(taps)
    store = WithStates(target, records, options.cache, config.teacher_tokens, config.cache_gigabytes)
    store.module = None if options.without else module.float()

    def on_step(step: int, losses) -> None:
        if step % max(1, options.steps // 10) == 0:
            print(json.dumps({"step": step, **measure(head, target, store, config, config.held_out)}), flush=True)

    train_steps(head, target, store, config, on_step=on_step)


if __name__ == "__main__":
    main()
