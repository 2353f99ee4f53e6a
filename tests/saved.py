"""A tiny target on disk with a byte-level tokenizer and a chat template, as the command line wants it, a head for it, and the command."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark.cli.main import main
from dspark.head.folder import save_head
from dspark.target.load import load_target
from tiny import tiny_head, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and the special tokens <s>, </s>, <mask>: 259 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<mask>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", mask_token="<mask>", chat_template=TEMPLATE
    )


def save_tiny_target(folder: Path, seed: int = 0, **overrides) -> Path:
    tokenizer = byte_tokenizer()
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | overrides
    model = tiny_model("llama", seed=seed, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_pair(folder: Path) -> Path:
    """A target and a head for it: `target` and `head` in this folder."""
    target = load_target(save_tiny_target(folder / "target", max_position_embeddings=512))
    save_head(tiny_head(target), target, folder / "head", list(range(1, 30)), {"train": {}}, "# a card\n")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
