"""Decoding by programs of the generic route: one sequence at a time, by continuing its cache or state.

What a model is given from token to token is its own business (a ``DynamicCache``, recurrent states,
``mems``): its ``prepare_inputs_for_generation`` says, as in ``generate``. Every such call is a run of a
variant whose inputs and outputs hold the state, so sequences may take turns.

Not every model keeps to that: some hold their state in their modules, where the next sequence would find it.
So before the first generation two short sequences are continued in turns, and must give what each gives as
one prompt. That also compiles the variants, in the thread that submits.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from fpcompile.errors import InvalidInputError, UnsupportedModelError
from fpcompile.executor.decode import Begun, Budgets, Decoder, Step, check_generates
from fpcompile.executor.generic import GenericProgram
from fpcompile.executor.inputs import check_ids
from fpcompile.executor.sampling import Sampler, Wishes
from fpcompile.models.generic_tree import flatten
from fpcompile.models.shadow import shadow

__all__ = ["GenericDecoder", "GenericSequence", "generic_decoder"]

_STATES: Final = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_ERROR: Final = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_PROBE: Final = 7  # tokens of the prompts that are tried; odd, and more than a convolution's width


@final
class GenericSequence:
    """``ids [1, n]`` that the model has seen, and what it is given with the next one. ``default_dtype`` is
    torch's for which its prompt's graph was made: it goes on with such graphs, whatever other threads set.
    """

    __slots__ = ("default_dtype", "ids", "kwargs")

    def __init__(self, ids: Tensor, kwargs: dict[str, Any], default_dtype: torch.dtype) -> None:
        self.ids, self.kwargs, self.default_dtype = ids, kwargs, default_dtype


@final
class GenericDecoder(Decoder):
    """Continues sequences of one program. ``validated`` once two have been continued in turns."""

    together = False

    def __init__(self, program: GenericProgram) -> None:
        self.program = program
        self.model: Any = program.model
        self._notes: Any = shadow(program.model)
        self._positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._lock = threading.Lock()
        self._validated = False
        self._refused: UnsupportedModelError | None = None

    def begin(self, input_ids: Any, **inputs: Any) -> Begun:
        """Raises :class:`InvalidInputError`, and :class:`UnsupportedModelError` for models whose state is
        not in what they return.
        """
        ids = check_ids(input_ids, self.program.vocabulary, self.program.device)
        if ids.shape[0] != 1:
            raise InvalidInputError(
                "a generation continues one sequence",
                expected="input_ids [1, length]",
                got=f"{int(ids.shape[0])} sequences",
                remedy="submit each sequence by itself",
            )
        mask = inputs.pop("attention_mask", None)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise InvalidInputError(
                "a generation continues one sequence",
                expected="no attention_mask, or one that hides nothing",
                got="hidden tokens",
            )
        for name in ("position_ids", "past_key_values", "cache_params", "logits_to_keep", "use_cache"):
            if inputs.pop(name, None) is not None:
                raise InvalidInputError(
                    f"{name} cannot be chosen for a generation of a generic program",
                    expected="None",
                    got="a value",
                )
        self._validate()
        return self._begin(ids, inputs)

    def sampler(self, begun: Begun, wishes: Wishes) -> Sampler:
        """As transformers would choose for this model."""
        return Sampler(self.model, wishes, begun.ids, limit=self.program.max_tokens)

    def open(self, begun: Begun, output: Any) -> tuple[GenericSequence, Tensor]:
        """Keep what the model wants to be given next."""
        kwargs = self.model._update_model_kwargs_for_generation(output, dict(begun.inputs))
        if all(kwargs.get(name) is None for name in _STATES):
            raise self._unsupported("its output holds no cache and no state")
        default_dtype = begun.run.program.captured.guards.default_dtype
        return GenericSequence(begun.ids, kwargs, default_dtype), output.logits[0, -1]

    def seconds(self, sequences: Sequence[GenericSequence], budgets: Budgets = ()) -> float:
        """By the program's first variant; engines learn how far that is off."""
        (sequence,) = sequences
        return max(self.program.predict(tokens=1, context=int(sequence.ids.shape[1]) + 1), 0.0)

    def nbytes(self, sequence: GenericSequence) -> int:
        """Of the states."""
        return sum(tensor.nbytes for tensor in flatten(sequence.kwargs).tensors)

    def step(
        self, sequences: Sequence[GenericSequence], tokens: Sequence[int], budgets: Budgets = ()
    ) -> Step:
        """One call of the model with the one new token."""
        (sequence,), (token,) = sequences, tokens
        ids = torch.cat([sequence.ids, sequence.ids.new_tensor([[token]])], dim=1)
        given = self._inputs(ids, sequence.kwargs, first=False)
        budget = min((one for one in budgets if one is not None), default=None)
        run = self.program.start_next(given, budget, sequence.default_dtype)
        seconds = self.seconds(sequences)

        def logits() -> Tensor:
            output = run.result()
            kwargs = self.model._update_model_kwargs_for_generation(output, dict(sequence.kwargs))
            sequence.ids, sequence.kwargs = ids, kwargs
            last: Tensor = output.logits[:, -1]
            return last

        before = sequence.ids, sequence.kwargs

        def undo() -> None:
            sequence.ids, sequence.kwargs = before

        return Step(run, logits, lambda: seconds / len(run.schedule), seconds, undo)

    def _begin(self, ids: Tensor, inputs: dict[str, Any]) -> Begun:
        options = {n: inputs.pop(n) for n in ("max_blocking_ms", "strict_budget") if n in inputs}
        if self._positions:  # as generate gives them: some models count them wrongly by themselves
            inputs = {**inputs, "position_ids": self._counted(ids, inputs)}
        run = self.program.start(**self._inputs(ids, inputs, first=True), **options)
        return Begun(run, ids, int(ids.shape[1]), inputs)

    def _counted(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Positions of a prompt, those of images in it too. Steps count on from them; what a multimodal model
        notes in itself for that, one note for all sequences, stays in a copy.
        """
        try:
            counted: Tensor = self._notes._prepare_position_ids_for_generation(
                ids, {"input_ids": ids, **inputs}
            )
        except (
            StopIteration,
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
        ) as error:
            if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
                raise
            raise InvalidInputError(
                "the positions of this prompt cannot be counted",
                expected=f"inputs that fit input_ids: {', '.join(inputs) or 'none are needed'}",
                got=f"{type(error).__name__}: {error}".removesuffix(": "),
                remedy="pass what the model's processor makes of one prompt: as many spans of image tokens "
                "as images, each of the size that its grid says",
            ) from error
        return counted

    def _inputs(self, ids: Tensor, kwargs: dict[str, Any], *, first: bool) -> dict[str, Any]:
        made: dict[str, Any] = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if first else 1,
            is_first_iteration=first,
            **{"use_cache": True, **kwargs},
        )
        made.pop("next_sequence_length", None)
        made.pop("is_first_iteration", None)
        return {name: value for name, value in made.items() if value is not None}

    # ---- whether it can be done

    def _validate(self) -> None:
        with self._lock:
            if self._refused is not None:
                raise copy.copy(self._refused)
            if self._validated:
                return
            try:
                with torch.no_grad():
                    self._probe()
            except UnsupportedModelError as error:
                self._refused = copy.copy(error)
                raise
            self._validated = True

    def _probe(self) -> None:
        """Continue two prompts in turns, and raise if they do not give what they give as prompts."""
        prompts = [self.program.random_ids(_PROBE + 2 + i)[:, i:].to(self.program.device) for i in (0, 1)]
        whole = [self._finished(self._begin(prompt, {}))[1] for prompt in prompts]
        sequences = [self._finished(self._begin(prompt[:, :_PROBE], {}))[0] for prompt in prompts]
        for place in (0, 1):
            for sequence, prompt, expected in zip(sequences, prompts, whole, strict=True):
                step = self.step([sequence], [int(prompt[0, _PROBE + place])])
                while not step.run.done:
                    step.run.step()
                got = step.logits()[0]
                if place == 1 and not _close(got, expected):
                    raise self._unsupported(
                        "continued token by token, its logits are not those of the prompt as a whole"
                    )

    def _finished(self, begun: Begun) -> tuple[GenericSequence, Tensor]:
        while not begun.run.done:
            begun.run.step()
        output = begun.run.result()
        if not isinstance(output, ModelOutput) or getattr(output, "logits", None) is None:
            raise self._unsupported("its output has no logits")
        return self.open(begun, output)

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} cannot be continued token by token",
            reason=reason,
            remedy="ask for one forward pass at a time: submit without max_new_tokens",
        )


def _close(got: Tensor, expected: Tensor) -> bool:
    scale = float(expected.float().abs().max())
    return float((got.float() - expected.float()).abs().max()) <= _ERROR.get(got.dtype, 0.1) * scale


def generic_decoder(program: GenericProgram) -> GenericDecoder:
    """The decoder of a program; raises :class:`InvalidInputError` when its model does not generate."""
    check_generates(program.model)
    if getattr(program.config, "is_encoder_decoder", False):
        raise InvalidInputError(
            f"{type(program.model).__name__} has an encoder: it cannot generate here yet",
            expected="a decoder alone",
            got="is_encoder_decoder=True",
            remedy="submit its forward passes one by one, with decoder_input_ids",
        )
    return GenericDecoder(program)
