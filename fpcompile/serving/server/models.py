"""From the command line's names to models and tokenizers. Code from a repository is never executed.

``NAME=SOURCE`` serves SOURCE under NAME; without ``NAME=`` the source is the name. A source is a hub id, a
folder, or with random weights: ``tiny`` (:mod:`fpcompile.serving.server.tiny`), a demo model
(``qwen3-110m``), or a hub id or folder of which only configuration and tokenizer are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fpcompile.errors import InvalidInputError, UnknownNameError
from fpcompile.serving.server.messages import Kind
from fpcompile.serving.server.settings import ModelSpec
from fpcompile.serving.server.tiny import EMBEDDER, GENERATOR, byte_tokenizer, config_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["build_model", "kind_of", "load_config", "load_tokenizer", "parse_models"]

Loaded = TypeVar("Loaded")


def parse_models(
    models: Sequence[str], random: Sequence[str] = (), embed: Sequence[str] = ()
) -> tuple[ModelSpec, ...]:
    """The models of a command line; ``embed``: names that are served as embedders whatever they are."""
    specs = [_named(text, random_weights=False) for text in models]
    for text in random:
        if text == GENERATOR:
            specs += [ModelSpec(name, name, random_weights=True) for name in (GENERATOR, EMBEDDER)]
        else:
            specs.append(_named(text, random_weights=True))
    names = [spec.name for spec in specs]
    if unknown := [name for name in embed if name not in names]:
        raise UnknownNameError("model for --embed", unknown[0], known=names)
    return tuple(
        ModelSpec(spec.name, spec.source, "embed" if spec.name in embed else None, spec.random_weights)
        for spec in specs
    )


def _named(text: str, *, random_weights: bool) -> ModelSpec:
    name, equals, source = text.partition("=")
    if not equals:
        name = source = text
    if not name or not source:
        raise InvalidInputError("a model is named wrongly", expected="MODEL or NAME=MODEL", got=repr(text))
    return ModelSpec(name, source, random_weights=random_weights)


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The configuration; nothing is built. Raises :class:`InvalidInputError`."""
    if spec.random_weights:
        from fpcompile.models.demo_models import DEMO_MODELS

        if spec.source in (GENERATOR, EMBEDDER):
            return config_of(spec.source)
        if spec.source in DEMO_MODELS:
            config = DEMO_MODELS[spec.source].config()
            config.architectures = ["ForCausalLM"]
            return config
    from transformers import AutoConfig

    found: PretrainedConfig = _loaded(
        spec, lambda: AutoConfig.from_pretrained(spec.source, trust_remote_code=False)
    )
    return found


def kind_of(spec: ModelSpec, config: PretrainedConfig) -> Kind:
    """What the model is served for: a causal language model generates, anything else embeds."""
    if spec.kind is not None:
        return spec.kind
    names = config.architectures or []
    return "generate" if any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names) else "embed"


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's own tokenizer; with random weights, where there is none, the one of bytes."""
    if spec.random_weights:
        from fpcompile.models.demo_models import DEMO_MODELS

        folder = Path(spec.source).expanduser()
        without = folder.is_dir() and not any(folder.glob("tokenizer*"))
        if spec.source in (GENERATOR, EMBEDDER) or spec.source in DEMO_MODELS or without or folder.is_file():
            return byte_tokenizer()
    from transformers import AutoTokenizer

    return _loaded(spec, lambda: AutoTokenizer.from_pretrained(spec.source, trust_remote_code=False))


def build_model(
    spec: ModelSpec, kind: Kind, config: PretrainedConfig, device: Any, dtype: Any
) -> PreTrainedModel:
    """The model in evaluation mode on ``device``; ``dtype`` None: its own; drawn: bf16, tiny fp32."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if kind == "generate" else AutoModel
    if spec.random_weights:
        own = torch.float32 if spec.source in (GENERATOR, EMBEDDER) else torch.bfloat16
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=forked), device:
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=dtype or own)
    else:
        model = _loaded(
            spec,
            lambda: auto.from_pretrained(spec.source, dtype=dtype or "auto", trust_remote_code=False),
        ).to(device)
    model.train(False)
    built: PreTrainedModel = model
    return built


def _loaded(spec: ModelSpec, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise InvalidInputError(
            f"model {spec.source!r} cannot be loaded",
            expected="a hub id, a folder, or --random-weights tiny",
            got=reason,
            remedy="check the name; in a repository with code of its own, load the model in Python instead",
        ) from error
