"""A GGUF file of architecture `dflash`, which llama.cpp drafts with (`--spec-type draft-dspark`).

Layer numbers are those of inputs (one higher than DeepSpec's), `d2t` holds target ids, vectors are float32. llama.cpp
drafts greedily and knows the vanilla head only; it shares the target's embeddings."""

import json
from pathlib import Path
from typing import Any

import torch

from dspark.errors import HeadError
from dspark.formats.portable import Portable, embedding_scale, write_whole
from dspark.head.folder import checked_config, vocabulary_hash
from dspark.target.target import Target

ARCH = "dflash"
NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# keys of the shape: ours -> theirs, under "dflash."
SHAPE = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
         "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length", "intermediate_size": "feed_forward_length",
         "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "block_size": "block_size"}  # fmt: skip
FLOATS = ("rms_norm_eps", "rope_theta")
NO_ROWS = {"token_embd.weight": "embed_tokens.weight", "output.weight": "lm_head.weight"}


def names(num_layers: int) -> dict[str, str]:
    """DeepSpec's names of tensors -> GGUF's."""
    return NAMES | {f"layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for i in range(num_layers) for a, b in LAYER_NAMES.items()}


def write(head: Portable, path: Path, target: Target, card: str) -> None:
    """Raises `HeadError` for heads that llama.cpp cannot run."""
    import gguf

    config = head.config
    refuse_unheld(head)
    writer = gguf.GGUFWriter(None, ARCH)
    writer.add_name(f"DSpark head for {target.name or type(target.model).__name__}")
    for ours, theirs in SHAPE.items():
        (writer.add_float32 if ours in FLOATS else writer.add_uint32)(f"{ARCH}.{theirs}", getattr(config, ours))
    writer.add_uint32(f"{ARCH}.attention.value_length", config.head_dim)
    writer.add_uint32(f"{ARCH}.rope.dimension_count", config.head_dim)
    writer.add_uint32(f"{ARCH}.vocab_size", config.vocab_size)
    writer.add_uint32(f"{ARCH}.context_length", min(target.max_context, 2**31 - 1))
    writer.add_array(f"{ARCH}.target_layers", [i + 1 for i in config.target_layer_ids])
    writer.add_bool(f"{ARCH}.sample_from_anchor", True)
    writer.add_bool(f"{ARCH}.has_confidence_head", config.enable_confidence_head)
    if (scale := embedding_scale(target)) != 1:
        writer.add_float32(f"{ARCH}.embedding_scale", scale)
    add_vocabulary(writer, target, config.mask_token_id)
    writer.add_uint32("dspark.shortlist", config.shortlist)
    writer.add_uint32("dspark.window", config.window)
    writer.add_uint32("dspark.num_target_layers", config.num_target_layers)
    writer.add_string("dspark.target", target.name)
    writer.add_string("dspark.vocabulary_sha256", vocabulary_hash(target) or "")
    writer.add_string("dspark.tensors_sha256", head.digest())  # golden vectors have no place here
    for name, there in names(config.num_hidden_layers).items():
        if name in head.weights:
            add_tensor(writer, there, head.weights[name])
    if head.reduced:
        add_tensor(writer, "output.weight", target.output_rows(head.draft_ids).cpu().to(head.dtype))
        writer.add_tensor("d2t", head.draft_ids.numpy())

    def fill(file: Path) -> None:
        try:
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    write_whole(path, fill)


def refuse_unheld(head: Portable) -> None:
    """Raise `HeadError` with what this head has that the format, or llama.cpp, has no place for."""
    config = head.config
    reasons = []
    if config.markov_rank == 0:
        reasons.append("a head without a sequential head (rank 0): llama.cpp drafts such ones from the slot after the anchor")
    elif config.markov_head_type != "vanilla":
        reasons.append(f"a {config.markov_head_type} sequential head: llama.cpp knows the vanilla one")
    if config.enable_confidence_head and not config.confidence_head_with_markov:
        reasons.append("a confidence head that does not read the previous token")
    if reasons:
        raise HeadError(f"GGUF cannot hold {' and '.join(reasons)}", "speculators and deepspec hold it")


def note(head: Portable) -> str | None:
    """A word on what llama.cpp may not do with this file."""
    last = head.config.num_target_layers - 1
    if last not in head.config.target_layer_ids:
        return None
    return (
        f"note: this head taps the output of the target's last layer, {last}. llama.cpp (looked at: build 11434) does not give it for Llama and Qwen3 "
        "targets and stops with `layer input tensor is null`; a head trained with other `--taps` runs there, "
        "and `dspark convert --taps` writes this one as if it had been"
    )


def add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
    """Vectors as float32, which llama.cpp's norms and biases need; bfloat16 as its bytes."""
    import gguf

    tensor = tensor.contiguous()
    if tensor.dim() == 1:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def add_vocabulary(writer: Any, target: Target, mask_token_id: int) -> None:
    """The target's tokens: llama.cpp reads the mask token from a vocabulary and shows drafted tokens by it; it tokenizes
    with the target's own file."""
    import gguf

    tokenizer = target.tokenizer
    by_id = {i: token for token, i in tokenizer.get_vocab().items()} if tokenizer is not None else {}
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"] if hasattr(tokenizer, "backend_tokenizer") else {}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    whole = bool(merges) and not model.get("byte_fallback")
    writer.add_tokenizer_model("gpt2" if whole else "llama")
    if whole:
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(merges)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(target.vocab_size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNUSED if i not in by_id else kinds.CONTROL if i in special else kinds.NORMAL for i in range(target.vocab_size)]
    )
    writer.add_mask_token_id(mask_token_id)
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)


def read(path: Path, target: Target) -> Portable:
    """Raises `HeadError` for other architectures, damaged files, quantised tensors and layers that dspark does not run."""
    where = str(path)
    keys, tensors = read_file(path)
    if keys.get("general.architecture") != ARCH:
        raise HeadError(f"{where}: architecture {keys.get('general.architecture')!r}; a DSpark head has {ARCH!r}")
    if keys.get(f"{ARCH}.sample_from_anchor", True) is not True:  # absent means true here
        raise HeadError(f"{where}: sample_from_anchor is false: slot k of its block predicts the token at k, and dspark's at k + 1")
    if keys.get(f"{ARCH}.attention.causal"):
        raise HeadError(f"{where}: its blocks are causal; in dspark's, every slot sees the whole block")
    if keys.get(f"{ARCH}.attention.sliding_window"):
        raise HeadError(f"{where}: draft layers with a sliding window; dspark's see the whole context")
    if abs(keys.get(f"{ARCH}.embedding_scale", 1.0) - embedding_scale(target)) > 0.01:
        raise HeadError(
            f"{where}: embedding_scale {keys.get(f'{ARCH}.embedding_scale', 1.0)}, {target.name}'s is {embedding_scale(target)}"
        )
    if "markov_w1.weight" not in tensors:
        raise HeadError(f"{where} lacks markov_w1.weight: without it the file is a DFlash head, whose slot k predicts the token at k")
    draft_ids = read_draft_ids(tensors, keys, target.vocab_size, where)
    values: dict[str, Any] = {ours: keys.get(f"{ARCH}.{theirs}") for ours, theirs in SHAPE.items()}
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    values |= {"vocab_size": target.vocab_size, "draft_vocab_size": len(draft_ids), "markov_rank": tensors["markov_w1.weight"].shape[-1],
               "markov_head_type": "vanilla", "mask_token_id": keys.get("tokenizer.ggml.mask_token_id"),
               "target_layer_ids": [i - 1 for i in keys.get(f"{ARCH}.target_layers") or []], "num_target_layers": target.num_layers,
               "enable_confidence_head": "conf_proj.weight" in tensors, "confidence_head_with_markov": True,
               "shortlist": keys.get("dspark.shortlist", 0), "window": keys.get("dspark.window", 0)}  # fmt: skip
    config = checked_config(values, where)
    rows = {ours: tensors.pop(theirs) for theirs, ours in NO_ROWS.items() if theirs in tensors}
    ours_of = {there: name for name, there in names(config.num_hidden_layers).items()}
    weights = {ours_of.get(name, name): tensor for name, tensor in tensors.items()}
    if "fc.weight" in weights:
        weights = {name: narrowed(tensor, weights["fc.weight"].dtype) for name, tensor in weights.items()}
    section = {"target": keys.get("dspark.target", ""), "vocabulary_sha256": keys.get("dspark.vocabulary_sha256") or None,
               "tensors_sha256": keys.get("dspark.tensors_sha256")}  # fmt: skip
    return Portable(config, weights, draft_ids, where, rows, section)


def read_draft_ids(tensors: dict[str, torch.Tensor], keys: dict, vocab: int, where: str) -> torch.Tensor:
    d2t = tensors.pop("d2t", None)
    if d2t is None:
        return torch.arange(vocab)
    ids = d2t.long().flatten()
    if not bool(((ids >= 0) & (ids < vocab)).all()):
        raise HeadError(f"{where}: d2t names tokens outside the vocabulary of {vocab}", "the file is of another target, or damaged")
    if not bool((ids.diff() > 0).all()):
        hint = "offsets (id minus position), as in speculators? llama.cpp has target ids" if bool((ids.diff() >= 0).all()) else None
        raise HeadError(f"{where}: the target ids in d2t do not ascend", hint)
    return ids


def narrowed(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Vectors, which GGUF keeps in float32, in the precision of the matrices if that loses nothing."""
    if vector.dim() == 1 and vector.dtype == torch.float32 and torch.equal(vector.to(dtype).float(), vector):
        return vector.to(dtype)
    return vector


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and tensors of a GGUF file. Raises `HeadError` for what is damaged or quantised."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        keys = {name: key.contents() for name, key in reader.fields.items() if not name.startswith(("tokenizer.ggml.tokens", "GGUF."))}
        found = [(t.name, t.tensor_type.name, [int(n) for n in reversed(t.shape)], t.data) for t in reader.tensors]
    except Exception as error:  # the reader trusts its file: any kind comes out of a damaged one
        raise HeadError(f"cannot read {path}: not a whole GGUF file ({error or type(error).__name__})", "restore the file") from error
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    quantised = sorted({kind for _, kind, _, _ in found} - kinds.keys())
    if quantised:
        raise HeadError(
            f"{path} is quantised ({', '.join(quantised)}); dspark reads F32, F16 and BF16", "convert the head it was made from"
        )
    tensors = {}
    for name, kind, shape, data in found:
        flat = torch.from_numpy(data.copy()).flatten().view(torch.uint8).view(kinds[kind])
        tensors[name] = flat.reshape(shape)
    return keys, tensors
