"""Write a full-size checkpoint of a catalogued model with random weights, for benchmarks: nothing is downloaded.

    python benchmarks/make_checkpoint.py sana_600m_controlnet FOLDER [--dtype bfloat16]

Same architecture and dtypes on disk as a published one (float16 denoiser, bfloat16 text encoder and VAE). The tokenizer
makes a token of each word and punctuation mark, so that prompts are about as long as Gemma's. About 7 GB for 0.6B, 10
GB for 1.6B, 15 GB for 4.8B. Pictures are stripes and spots of many colours, which the control image and the prompt
change, so that equal pictures mean something.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from sana_deploy.declare.formats import Dtype, Format
from sana_deploy.declare.pipelines import Role
from sana_deploy.declare.spec import CatalogueModel
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.rehearsal.meta_modules import stand_in

DTYPES: dict[Role, Dtype] = {
    "text_encoder": "bfloat16",
    "vae": "bfloat16",
    "denoiser": "float16",
    "controlnet": "float16",
}


def make_checkpoint(name: str, folder: Path, dtype: Dtype | None = None) -> Path:
    """Write the checkpoint of the catalogued model `name` into `folder`, on the GPU where there is one.

    Components are stored in DTYPES, or all in `dtype`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = open_checkpoint(CatalogueModel(kind="catalogue", name=name))  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)
    modules = {}
    for part in checkpoint.pipeline.components:
        form = Format(dtype or DTYPES[part.role])
        module = stand_in(checkpoint.components[part.name], form).to_empty(device=device)
        fill_randomly(module, generator)
        modules[part.name] = module
    scheduler = checkpoint.pipeline.scheduler.make(diffusers)
    pipeline_class = getattr(diffusers, checkpoint.pipeline.class_name)
    pipeline_class(**modules, tokenizer=word_tokenizer(), scheduler=scheduler).save_pretrained(folder)
    return folder


def word_tokenizer() -> Any:
    """One token per word and punctuation mark behind <bos>; a word's number is that of its first letter."""
    marks = [chr(code) for code in range(33, 127)]
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # What is left of a word after its first letter goes: words of one letter are known, none is split in two.
    tokenizer.normalizer = normalizers.Replace(Regex(r"(?<=\w)\w+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w|[^\w\s]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@torch.no_grad()
def fill_randomly(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a value that keeps signals near unit size: variance 1 / fan-in, norms that pass them on.

    A norm whose weight is zero would end its branch: with the decoder's last one the picture is one flat colour.
    """
    for child in module.modules():
        for key, tensor in child.named_parameters(recurse=False):
            if tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            else:
                tensor.fill_(1.0 if key == "weight" and "Norm" in type(child).__name__ else 0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="store all components in it")
    options = parser.parse_args()
    print(make_checkpoint(options.name, options.folder, options.dtype))
