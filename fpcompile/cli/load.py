"""From a name on the command line to a model.

Words
    *name*  a demo model (``qwen3-110m``), ``tiny:ARCH`` (the zoo), a folder written by ``save_pretrained``,
            or an id of the Hugging Face hub (``Qwen/Qwen3-0.6B``); tried in this order.

Invariants
    Code from a repository is never executed (``trust_remote_code`` is False, and not asked for).
    What is in the hub's cache needs no network. Every failure is a typed error that says what to do.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fpcompile.errors import FpcompileError, InvalidInputError
from fpcompile.models.demo_models import DEMO_MODELS, build_demo_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "LEGAL_NAMES",
    "describe",
    "forward_arguments",
    "load_config",
    "load_model",
    "load_shape",
    "random_ids",
]

Loaded = TypeVar("Loaded")

_TINY = "tiny:"
LEGAL_NAMES = f"{', '.join(DEMO_MODELS)}, tiny:ARCH (tiny:llama), a local folder, or a Hugging Face hub id"


def load_model(name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal LM called ``name`` on ``device``, in evaluation mode.

    ``dtype`` None: bf16 for demo models, fp32 for the zoo, the checkpoint's own otherwise.
    Raises :class:`InvalidInputError`, :class:`UnknownNameError` or :class:`UnsupportedModelError`.
    """
    if name in DEMO_MODELS:
        return build_demo_model(name, dtype=dtype or torch.bfloat16, device=device)
    if name.startswith(_TINY):
        from fpcompile.models.zoo import tiny_model

        return _placed(tiny_model(name.removeprefix(_TINY), dtype=dtype or torch.float32), device)

    def load(local: bool) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", trust_remote_code=False, local_files_only=local
        )
        return model

    return _placed(_local_first(name, load), device)


def load_config(name: str) -> PretrainedConfig:
    """The configuration of the model called ``name``; nothing is built. Raises as :func:`load_model`."""
    if name in DEMO_MODELS:
        return DEMO_MODELS[name].config()
    if name.startswith(_TINY):
        from fpcompile.models.zoo import tiny_config

        return tiny_config(name.removeprefix(_TINY))

    def load(local: bool) -> PretrainedConfig:
        from transformers import AutoConfig

        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=False, local_files_only=local
        )
        return config

    return _local_first(name, load)


def load_shape(name: str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model called ``name`` without its weights (meta device; the zoo has them): enough for a plan."""
    if name in DEMO_MODELS:
        return build_demo_model(name, dtype=dtype or torch.bfloat16, device="meta")
    if name.startswith(_TINY):
        return load_model(name, device=torch.device("cpu"), dtype=dtype)

    def load(local: bool) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype or config.dtype or torch.bfloat16, trust_remote_code=False
            )
        return model

    return _evaluating(_local_first(name, load))


def describe(model: PreTrainedModel, name: str) -> str:
    """``qwen3-110m (Qwen3ForCausalLM, 107 M parameters, bfloat16, cpu)``."""
    count = sum(p.numel() for p in model.parameters())
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{name} ({type(model).__name__}, {size} parameters, {dtype}, {model.device})"


def forward_arguments(model: Any) -> dict[str, Any]:
    """What a prefill is asked for: the last position's logits and the cache, where ``forward`` names them."""
    wanted = {"logits_to_keep": 1, "use_cache": True}
    named = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in named}


def random_ids(model: Any, length: int, *, seed: int) -> torch.Tensor:
    """Token ids ``[1, length]`` drawn from the model's vocabulary, on its device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return torch.randint(vocabulary, (1, length), generator=generator).to(model.device)


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    if model.device != device:
        model.to(device)  # type: ignore[arg-type]
    return _evaluating(model)


def _evaluating(model: PreTrainedModel) -> PreTrainedModel:
    model.train(False)
    return model


def _local_first(name: str, load: Callable[[bool], Loaded]) -> Loaded:
    """``load`` from a folder or the hub's cache, then from the network."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _guarded(name, load, local=True)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InvalidInputError(
            f"there is no model folder {name!r}",
            expected=LEGAL_NAMES,
            got="no such folder",
            remedy="check the path",
        )
    try:
        return _guarded(name, load, local=True)
    except FpcompileError:
        _ask_hub(name)
        return _guarded(name, load, local=False)


def _guarded(name: str, load: Callable[[bool], Loaded], *, local: bool) -> Loaded:
    """Errors of transformers as a typed one; its messages are long, the first sentence tells the reason."""
    try:
        return load(local)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        remedy = "use a causal language model of transformers"
        if "trust_remote_code" in str(error):
            reason = "the repository brings its own code"
            remedy = (
                "the command line never runs such code; load the model in Python and call fpcompile.segment"
            )
        elif isinstance(error, ImportError):
            remedy = "install the package that is named"
        raise InvalidInputError(
            f"model {name!r} cannot be loaded", expected=LEGAL_NAMES, got=reason, remedy=remedy
        ) from error


def _ask_hub(name: str) -> None:
    """Say why the hub will not give ``name``, in one request without retries; return when it will."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    no_download = _near(name) or f"use a model that needs no download: {', '.join(DEMO_MODELS)}"
    try:
        HfApi().model_info(name, timeout=10)
        return
    except GatedRepoError as error:
        got, remedy = "a gated repository", "accept its terms on huggingface.co, then run `hf auth login`"
        cause: Exception = error
    except (RepositoryNotFoundError, HFValidationError) as error:
        remedy = _near(name) or "check the spelling; a private repository needs `hf auth login`"
        got, cause = "no such name, folder or hub repository", error
    except OfflineModeIsEnabled as error:
        got, cause = "not in the hub's cache, and HF_HUB_OFFLINE is set", error
        remedy = f"unset HF_HUB_OFFLINE, or {no_download}"
    except Exception as error:  # whatever the client's network library raises
        got, cause = f"not in the hub's cache, and the hub cannot be reached ({type(error).__name__})", error
        remedy = f"check the network, or {no_download}"
    raise InvalidInputError(
        f"model {name!r} cannot be loaded", expected=LEGAL_NAMES, got=got, remedy=remedy
    ) from cause


def _near(name: str) -> str | None:
    near = difflib.get_close_matches(name, DEMO_MODELS, n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else None
