"""Stand-ins for a rehearsal in shapes: components from their configs alone, and a tokenizer that counts words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import diffusers
import torch
import transformers
from torch import nn

from ..declare.formats import Format
from ..errors import CheckpointError
from ..facts.component import ComponentFacts
from ..run.quantize import quantize_linears
from ..run.weights import cast_module


def stand_in(facts: ComponentFacts, form: Format) -> nn.Module:
    """Build a component from its config on the meta device, without weights.

    Raises:
        CheckpointError: the config is incomplete.
        InvalidSpecError: the library that quantises is not installed.
    """
    config = {key: value for key, value in facts.config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            if facts.library == "transformers":
                cls = getattr(transformers, facts.class_name)
                module = cls(cls.config_class(**config))
            else:
                module = getattr(diffusers, facts.class_name).from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError) as problem:
        raise CheckpointError(f"the config of {facts.name} is incomplete: {problem}", where=facts.name) from problem
    cast_module(module, getattr(torch, form.dtype))
    if form.quantization:
        quantize_linears(module, form.quantization)
    return cast("nn.Module", module.eval())


class StandInTokenizer:
    """Counts words and punctuation marks as tokens, where a checkpoint's own tokenizer is not on this host."""

    padding_side = "right"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; only their number means anything."""
        return [1] * (1 + len(re.findall(r"\w+|[^\w\s]", text)))

    def __call__(self, texts: Sequence[str], max_length: int, **_: Any) -> Any:
        """Ids and mask of (len(texts), max_length), padded as the pipeline asks."""
        lengths = [min(len(self.encode(text)), max_length) for text in texts]
        mask = torch.tensor([[1] * length + [0] * (max_length - length) for length in lengths])
        return type("Encoding", (), {"input_ids": mask.clone(), "attention_mask": mask})()
