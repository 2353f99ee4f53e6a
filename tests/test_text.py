"""Streamed text: whatever the steps, its pieces make up the text of all the tokens, cut before the first stop string."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark.text import TextStream

TEXTS = [
    "Ein Satz,  mit zwei Räumen.\n\n\tUnd ein Absatz: 你好，世界 👩‍👩‍👧 naïve café",
    " leading space, then 👍🏽👍🏽 and \u0000 and \u200d",
    "a" * 50 + "      " * 9 + "日本語" * 20,
]
BYTES = {f"<0x{b:02X}>": b for b in range(256)}


def byte_level() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"Ġt": 256, "Ġth": 257, "on": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "t"), ("Ġt", "h"), ("o", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special(tokenizer)


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Spaces as ▁, the first one dropped; characters outside the vocabulary as runs of byte tokens."""
    words = ["▁", "a", "▁E", "in", "▁S", "atz", ",", "▁zwei", "e", "n", "o", "▁mit", "t", "日"]
    vocab = BYTES | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<0x00>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return with_special(tokenizer)


def with_special(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<tool>", special=True), AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZERS = {"byte level": byte_level(), "sentence pieces": sentence_pieces()}


def pieces(stream: TextStream, ids: list[int], steps: random.Random) -> list[str]:
    said, at = [], 0
    while at < len(ids):
        step = steps.randint(1, 8)
        said.append(stream.push(ids[at : at + step]))
        at += step
    return [*said, stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_up_the_text(name, seed):
    tokenizer, rng = TOKENIZERS[name], random.Random(seed)
    special = tokenizer.convert_tokens_to_ids(["<tool>", "<end>"])
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ids.insert(0, rng.choice(special))
        ids.append(special[1])
        stream = TextStream(tokenizer)
        said = pieces(stream, ids, rng)
        assert "".join(said) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in said)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_token_at_a_time_costs_a_window(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(TEXTS[0] * 20, add_special_tokens=False).input_ids
    stream, longest = TextStream(tokenizer), 0
    for token in ids:
        stream.push([token])
        longest = max(longest, len(stream.ids))
    assert stream.text + stream.finish() == tokenizer.decode(ids)
    assert longest < 24


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_a_stop_string_is_cut_wherever_it_falls(name, seed):
    tokenizer, rng = TOKENIZERS[name], random.Random(seed)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        whole = tokenizer.decode(ids)
        start = rng.randrange(1, len(whole) - 4)
        stops = (whole[start : start + 3], whole[-2:], "not in it")
        said = pieces(stream := TextStream(tokenizer, stops), ids, rng)
        assert "".join(said) == whole[: min(whole.index(s) for s in stops[:2])]
        assert stream.stopped


def test_the_start_of_a_stop_string_is_held_until_it_is_refuted():
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, ["END."])
    assert [stream.push(tokenizer(part).input_ids) for part in ("so EN", "D", "!", "E")] == ["so ", "", "END!", ""]
    assert (stream.finish(), stream.stopped) == ("E", False)


def test_special_tokens_are_kept_on_request():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("a<tool>b<end>").input_ids
    assert TextStream(tokenizer).push(ids) == "ab"
    assert TextStream(tokenizer, keep=tokenizer.convert_tokens_to_ids(["<tool>"])).push(ids) == "a<tool>b"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_are_no_text_do_not_hold_the_stream(name):
    tokenizer = TOKENIZERS[name]
    broken = tokenizer("é", add_special_tokens=False).input_ids[-1]
    stream = TextStream(tokenizer)
    said = [stream.push([broken]) for _ in range(300)]
    assert sum(map(len, said)) > 250
    assert len(stream.ids) < 100
