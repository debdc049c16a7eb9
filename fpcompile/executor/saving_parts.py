"""What saved programs of both routes have in common: the model that they fit, functions, tensors."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fpcompile.errors import ProgramFileError
from fpcompile.executor.program import settings
from fpcompile.passes.codegen import Function, key_of
from fpcompile.passes.compiled import load_artifact, read_compiled, write_compiled
from fpcompile.passes.graph_text import read_function, write_function
from fpcompile.passes.lower import compiled_key, target_of
from fpcompile.passes.lower_function import RefusedError, compile_again, with_compiled

FUNCTIONS, CONSTANTS = "functions.json", "constants.safetensors"
COMPILED, CODE = "compiled.json", "code-"


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU for one without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def identity_of(model: nn.Module) -> dict[str, Any]:
    """What must be equal for a saved program to fit a model, as JSON data."""
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fpcompile": sys.modules["fpcompile"].__version__,  # above this layer: read, not imported
        },
        "device": str(device_of(model)),
        "configuration": json.loads(settings(getattr(model, "config", None))),
        "modules": {path: _kind(module) for path, module in model.named_modules()},
        "weights": {path: spec_of(weight) for path, weight in model.named_parameters(remove_duplicate=False)},
    }


def _kind(module: nn.Module) -> str:
    """What of a module is traced besides its weights: class, hooks around its forward, plain attributes."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    names = [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks]
    plain = [f"{name}={value!r}" for name, value in sorted(vars(module).items()) if _traced(name, value)]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return " + ".join([f"{kind}({', '.join(plain)})", *names])


_ELSEWHERE = ("training", "name_or_path")


def _traced(name: str, value: Any) -> bool:
    """Whether an attribute may have become a constant of the graph; what forward keeps there is none."""
    if name.startswith("_") or name.endswith("_cached") or name in _ELSEWHERE:
        return False
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(v is None or isinstance(v, (bool, int, float, str, torch.dtype)) for v in values)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by every path that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def spec_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` was detached from ``a``."""
    return a.shape == b.shape and (a.is_meta or a.detach().is_set_to(b))


def compare(name: str, saved: Any, own: Any, where: str) -> None:
    """Raise unless ``saved`` and ``own`` are equal; mappings are compared entry by entry."""
    if saved == own:
        return
    old, new = [saved], [own]
    if isinstance(saved, dict) and isinstance(own, dict):
        differing = [k for k in {**saved, **own} if saved.get(k) != own.get(k)]
        old, new = ([f"{k}: {side.get(k)}" for k in differing[:4]] for side in (saved, own))
        if len(differing) > 4:
            old.append(f"and {len(differing) - 4} more")
    raise ProgramFileError(
        f"the program was saved for another {name}",
        expected="; ".join(map(str, old)),
        got="; ".join(map(str, new)),
        where=where,
        remedy="compile the model anew with fpcompile.segment(model), or load the program for the model and "
        "with the versions that it was saved with",
    )


def refuse_graphs(functions: Mapping[str, Function]) -> None:
    """Raise :class:`ProgramFileError` for functions that are replayed as CUDA graphs."""
    if any(function.buckets for function in functions.values()):
        raise ProgramFileError(
            "CUDA graphs cannot be saved",
            expected="a program with another backend",
            got="backend='cudagraphs', whose graphs hold the addresses of this process",
            remedy="save the program of backend='eager', or capture the graphs in each process",
        )


def write_functions(functions: Mapping[str, Function]) -> dict[str, Any]:
    """Records of functions, compiled ones as what they were compiled from."""
    return {key_of(f.graph, f.shapes): write_function(f) for f in functions.values()}


def write_compiled_functions(functions: Mapping[str, Function]) -> dict[str, bytes]:
    """The files of compiled functions: one of data for all, one of code for each."""
    files: dict[str, bytes] = {}
    table: dict[str, Any] = {}
    for key, function in functions.items():
        if function.compiled is not None:
            data, code = write_compiled(function.compiled)
            name = f"{CODE}{len(table)}.bin"
            table[key] = {"file": name, "data": data}
            files[name] = code
    if table:
        files[COMPILED] = json.dumps(table).encode()
    return files


def _read_compiled(
    files: Mapping[str, bytes], functions: Mapping[str, Function], device: torch.device, trust_code: bool
) -> dict[str, Function]:
    """Read back :func:`write_compiled_functions`: the code if it is trusted, else compiled again."""
    found: dict[str, Function] = {}
    target = target_of((device,))
    for key, row in json.loads(files[COMPILED]).items():
        own = key.split()[-1]
        if key != compiled_key(target, own):
            raise ProgramFileError(
                "the program was compiled for another processor",
                expected=compiled_key(target, own),
                got=key,
                remedy="compile the model on this machine with fpcompile.segment(model, backend='inductor')",
            )
        compiled = read_compiled(row["data"])
        if trust_code:
            compiled = dataclasses.replace(compiled, artifact=load_artifact(files[row["file"]]))
            found[key] = with_compiled(functions[own], compiled)
            continue
        try:
            found[key] = compile_again(functions[own], compiled.arguments)
        except RefusedError as error:
            raise ProgramFileError(
                "a function of the program cannot be compiled again", got=str(error), where=key
            ) from error
    return found


def read_functions(
    files: Mapping[str, bytes], device: torch.device, trust_code: bool
) -> tuple[dict[str, Function], dict[str, Function]]:
    """The generated functions in the files of a program, and the compiled ones."""
    functions = {key: read_function(key, record) for key, record in json.loads(files[FUNCTIONS]).items()}
    if COMPILED not in files:
        return functions, {}
    return functions, _read_compiled(files, functions, device, trust_code)


def generated_keys(compiled: Mapping[str, Function]) -> dict[str, str]:
    """Key of a compiled function -> key of the generated one."""
    return {key: key.split()[-1] for key in compiled}
