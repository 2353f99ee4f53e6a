"""Does the `speculators` library compute from an exported head what dspark does? `speculators_check.py HEAD --target TARGET`

Exports HEAD in the library's format, loads the folder with the library's own class, and compares draft logits and
confidences in float32 on random features. Needs `pip install speculators` (checked with 0.9.0); exit 1 when they differ."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from dspark.formats.convert import build, read_own
from dspark.formats.portable import Portable
from dspark.formats.speculators import read, write
from dspark.head.folder import named_head
from dspark.target.load import load_target
from dspark.target.target import Target

TOLERANCE = 1e-4
NUM_TOKENS, NUM_ANCHORS = 48, 6


def load_theirs(folder: Path, verifier: Path, scratch: Path):
    """The library's model of this folder, in float32. It takes the target's rows from `verifier`, a local folder."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    copy = shutil.copytree(folder, scratch / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(verifier)
    (copy / "config.json").write_text(json.dumps(config))
    made = SpeculatorModelConfig.from_pretrained(str(copy))
    made.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(str(copy), config=made, dtype=torch.float32).float().eval()


@torch.no_grad()
def theirs_on(model, features_TMD: torch.Tensor, ids: torch.Tensor, anchors: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draft logits [A, G, Vd] and confidence logits [A, G], by the library's own training pass, whose loss is left out."""
    from speculators.models.dspark import core

    seen: dict[str, torch.Tensor | None] = {}

    def note(logits, _targets, confidences, *_args, **_more):
        seen.update(logits=logits, confidences=confidences)
        return logits.sum(), {}

    mask = torch.zeros(1, len(ids))
    mask[0, anchors] = 1
    usual, core.compute_metrics = core.compute_metrics, note
    try:
        model(
            hidden_states=features_TMD.flatten(1)[None], input_ids=ids[None], loss_mask=mask,
            verifier_last_hidden_states=features_TMD[None, :, 0], document_ids=torch.zeros(1, len(ids), dtype=torch.long),
            max_anchors=len(anchors),
        )  # fmt: skip
    finally:
        core.compute_metrics = usual
    logits, confidences = seen["logits"], seen["confidences"]
    assert logits is not None
    shape = (len(anchors), model.block_size)
    return logits.view(*shape, -1), None if confidences is None else confidences.view(shape)


@torch.no_grad()
def ours_on(head, target: Target, features_TMD: torch.Tensor, ids: torch.Tensor, anchors: list[int]):
    positions = torch.arange(len(ids))
    visible = positions[None, None, :] < torch.tensor(anchors)[None, :, None]
    context_kv = head.context_kv(features_TMD[None], positions[None])
    h = head.hidden(target.embed(ids[anchors])[None], torch.tensor([anchors]), context_kv, visible)
    following = ids[torch.tensor(anchors)[:, None] + torch.arange(head.config.block_size)]
    logits, confidences = head(h, following[None])
    return logits[0], None if confidences is None else confidences[0]


def differences(source: Portable, target: Target, verifier: Path) -> dict[str, float]:
    """Largest differences between the library and dspark, logits and confidences, as shares of 1 or of the largest value."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exported"
        write(source, folder, target, "")
        head = build(read(folder, target), target)
        if source.reduced:  # as they were written; a whole vocabulary's rows it takes from the verifier
            head.output_rows = head.output_rows.to(source.dtype).float()
        model = load_theirs(folder, verifier, Path(scratch))
        generator = torch.Generator().manual_seed(0)
        config = source.config
        features = torch.randn(NUM_TOKENS, len(config.target_layer_ids), config.hidden_size, generator=generator)
        ids = torch.randint(0, config.vocab_size, (NUM_TOKENS,), generator=generator)
        last = NUM_TOKENS - config.block_size - 1
        anchors = sorted({1 + i * (last - 1) // (NUM_ANCHORS - 1) for i in range(NUM_ANCHORS)})
        pairs = zip(
            ("logits", "confidences"), theirs_on(model, features, ids, anchors), ours_on(head, target, features, ids, anchors), strict=True
        )
        return {
            name: ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)).item()
            for name, theirs, ours in pairs
            if theirs is not None and ours is not None
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", metavar="HEAD")
    parser.add_argument("--target", required=True, metavar="TARGET")
    parser.add_argument("--verifier", type=Path, required=True, metavar="FOLDER", help="the target's own folder, with model.safetensors")
    options = parser.parse_args()
    target = load_target(options.target, dtype="float32", runtime="eager")
    found = differences(read_own(named_head(options.head)), target, options.verifier)
    for name, difference in found.items():
        print(f"{name}: largest difference {difference:.1e} (tolerance {TOLERANCE:g})")
    return 0 if max(found.values()) < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
