"""A pretrained model from a local Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import nn

from thinwire.comm.settings import Settings

Head: TypeAlias = Literal["causal", "masked", "encoder"]

_LONGEST = 512  # "auto" takes no more: the cost of a step follows the longest prompt


class HFSettings(Settings):
    """A pretrained model, from a folder as `save_pretrained()` writes it (config.json, safetensors, tokenizer).

    Nothing is downloaded, no code of the folder is run and no pickle is read. Weights are fp32; dropout is off, in
    training too.

    path: the folder.
    head: how the model gives an answer: "causal" or "masked" language model, or "encoder" of sentences (mean over the
      tokens, normalised); "auto" goes by `architectures` in config.json.
    context: most tokens of a prompt, longer texts are cut; "auto" = what model and tokenizer allow, at most 512.
    temperature: for an encoder: a class's score is cosine similarity / temperature.
    attention: implementation, by transformers' name.
    """

    kind: Literal["hf"] = "hf"
    path: str = Field(min_length=1)
    head: Literal["auto"] | Head = "auto"
    context: Annotated[int, Field(gt=1)] | Literal["auto"] = "auto"
    temperature: float = Field(0.05, gt=0)
    attention: Literal["sdpa", "eager"] = "sdpa"


@dataclass(frozen=True)
class Pretrained:
    """network: the model in evaluation mode. tokenizer: of the `tokenizers` library, without cutting or padding.

    mask_token: its text, for a masked model. identity: changes whenever the encoding of any text might.
    """

    network: nn.Module
    tokenizer: Any
    head: Head
    context: int
    mask_token: str
    identity: str


def load_pretrained(settings: HFSettings, device: torch.device) -> Pretrained:
    """Read model and tokenizer.

    Args:
        device: meta reads the shape of the model alone, from its config.json.
    Raises:
        ValueError: transformers is not installed, or the folder does not hold such a model, whole.
    """
    try:
        import tokenizers
        import transformers
    except ImportError as error:
        raise ValueError(
            f"model.path: {settings.path} needs the transformers library: pip install 'thinwire[transformers]'"
        ) from error
    folder = Path(settings.path).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path: {folder} holds no config.json; give a local folder as save_pretrained() writes it, for "
            "nothing is downloaded"
        )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        head = _head(config) if settings.head == "auto" else settings.head
        known = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
        class_, on_meta = _class_of(transformers, head), device.type == "meta"
        if on_meta:  # its shapes alone
            with device:
                network = class_.from_config(config, dtype=torch.float32, attn_implementation=settings.attention)
        else:
            network, report = class_.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=settings.attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        raise ValueError(f"model.path: {folder} cannot be loaded: {error}") from error
    if head == "encoder" and getattr(network, "pooler", None) is not None:
        network.pooler = None  # not part of a mean over the tokens: its weights would be trained for nothing
    if not on_meta:
        _refuse_random_weights(network, report, folder, head)
    if not known.is_fast:
        raise ValueError(f"model.path: {folder} has no tokenizer.json (a fast tokenizer), which is needed")
    tokenizer = tokenizers.Tokenizer.from_str(known.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if head == "masked" and known.mask_token is None:
        raise ValueError(f"model.head: masked, but the tokenizer in {folder} has no mask token; give causal or encoder")
    return Pretrained(
        network=network.eval().to(device),
        tokenizer=tokenizer,
        head=head,
        context=_context(settings, config, known),
        mask_token=known.mask_token or "",
        identity=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
    )


def _head(config: Any) -> Head:
    name = (config.architectures or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    return "masked" if name.endswith("ForMaskedLM") else "encoder"


def _class_of(transformers: Any, head: Head) -> Any:
    match head:
        case "causal":
            return transformers.AutoModelForCausalLM
        case "masked":
            return transformers.AutoModelForMaskedLM
        case "encoder":
            return transformers.AutoModel


def _refuse_random_weights(network: nn.Module, report: Any, folder: Path, head: Head) -> None:
    """transformers draws what the folder lacks at random, with a warning at most."""
    present = {name for name, _ in network.named_parameters()}  # a tied weight has one name, and is not missing
    wrong = sorted((set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}) & present)
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ValueError(
            f"model.head: {head} needs weights that {folder} does not hold ({shown}); give another model.head"
        )


def _context(settings: HFSettings, config: Any, tokenizer: Any) -> int:
    positions = int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
    limit = min(positions, int(tokenizer.model_max_length))
    if settings.context == "auto":
        return min(limit, _LONGEST)
    if settings.context > limit:
        raise ValueError(
            f"model.context: {settings.context} is more than the model's {limit} tokens; give at most that"
        )
    return settings.context
