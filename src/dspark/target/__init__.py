"""Any Hugging Face causal LM: load it, tap its layers, score tokens, roll back exactly."""

import importlib
import logging


def import_quietly(module: str) -> None:
    """transformers imports torchao where it is installed, which then lists every GPU kernel it does not find."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    importlib.import_module(module)
    for logger, level in levels.items():
        logger.setLevel(level)


import_quietly("transformers.modeling_utils")
