"""Record what a core was told and what it answered; replay it; ask what another policy would have done.

A log is jsonl. The first line is the header: format version, policy spec, scheduler options. Every further
line is ``{"events": [...], "commands": [...]}``: events that were handed over together, and the answer to
them; a policy that packs asks its predictor meanwhile, and ``"predictions": [...]`` is what it was told. A
line ``{"restarted": true}`` says that from there on a fresh core answers (the one before had failed).

Replaying the events on fresh cores of the same policy gives the same commands, always: the core is pure.
:func:`differences` says where it does not (another version, or a core that is not pure any more).
:func:`requests_of` and :func:`measured_costs` give the requests with what they really cost, so that the
simulator can serve them under another policy, at another rate.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from math import inf
from pathlib import Path
from typing import Any, TextIO

from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.scheduler import events as ev
from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.errors import TraceError
from fpcompile.scheduler.events import (
    Arrival,
    Cancelled,
    Command,
    Completed,
    Event,
    Failed,
    Launch,
    Pause,
    Reject,
    Request,
    Yielded,
)
from fpcompile.scheduler.options import SchedulerOptions, make_options
from fpcompile.scheduler.predictor import TtftPredictor
from fpcompile.scheduler.simulator import Outcome

__all__ = [
    "Answers",
    "Log",
    "Recorder",
    "differences",
    "measured_costs",
    "outcomes_of",
    "read_log",
    "requests_of",
]

_VERSION = 1
_TYPES = {
    kind.__name__: kind
    for kind in (
        ev.Arrival, ev.Yielded, ev.Completed, ev.Cancelled, ev.Failed, ev.Memory, ev.Reserved, ev.Dropped,
        ev.Decoding, ev.Timer,
        ev.Launch, ev.Pause, ev.Evict, ev.Restore, ev.Reject, ev.SetTimer,
    )
}  # fmt: skip

_JSON: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
"""What a field of such a type may be in a log."""

Step = tuple[tuple[Event, ...], tuple[Command, ...]]


class Log:
    """A recorded log: the header, and the steps in order.

    ``predictions[i]`` is what the core was told during step i; ``restarts`` are the steps before which a
    fresh core took over; ``torn``: a last line, broken off, was left out.
    """

    def __init__(
        self,
        policy: str,
        options: dict[str, Any],
        steps: Sequence[Step],
        *,
        predictions: Sequence[tuple[float, ...]] = (),
        restarts: Iterable[int] = (),
        torn: bool = False,
    ) -> None:
        self.policy, self.options, self.steps = policy, options, tuple(steps)
        self.predictions = tuple(predictions) or ((),) * len(self.steps)
        self.restarts = frozenset(restarts)
        self.torn = torn


class Answers:
    """A predictor that notes what it answers, so that a log can hold it: predictions change with time."""

    def __init__(self, predictor: TtftPredictor) -> None:
        self.predictor = predictor
        self._given: list[float] = []

    def predict(self, tokens: int, context: int = 0) -> float:
        """As the predictor's own."""
        return self._note(self.predictor.predict(tokens, context))

    def predict_pack(self, lengths: Iterable[int]) -> float:
        """As the predictor's own."""
        return self._note(self.predictor.predict_pack(lengths))

    def correct(self, tokens: int, measured: float) -> None:
        """As the predictor's own."""
        self.predictor.correct(tokens, measured)

    def _note(self, seconds: float) -> float:
        self._given.append(seconds)
        return seconds

    def take(self) -> list[float]:
        """What was answered since the last ``take``."""
        given, self._given = self._given, []
        return given


class Recorder:
    """Writes a log line for each call of the core; give it to whoever drives a core. Close it at the end.

    The decisions of a core that packs follow its predictor: give it :class:`Answers` as predictor, else the
    log replays only with the same predictor. Each line is written out at once.
    """

    def __init__(self, path: str | Path, core: Scheduler) -> None:
        self._file: TextIO = Path(path).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close()
        header = {"version": _VERSION, "policy": core.policy.name, "options": _plain(core.options)}
        self._core = core
        self._write(header)

    def record(self, events: Iterable[Event], commands: Iterable[Command]) -> None:
        """Events that were handed over together, and the commands that answered them."""
        line: dict[str, Any] = {
            "events": [_plain(e) for e in events],
            "commands": [_plain(c) for c in commands],
        }
        if isinstance(self._core.predictor, Answers) and (given := self._core.predictor.take()):
            line["predictions"] = given
        self._write(line)

    def restarted(self, core: Scheduler) -> None:
        """From now on this fresh core answers, of the same policy and options."""
        self._core = core
        self._write({"restarted": True})

    def _write(self, value: object) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Write everything out."""
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values; infinities become the string "inf"."""
    name = type(value).__name__
    data = {"type": name} if name in _TYPES else {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Request):
            item = {key: "inf" if number == inf else number for key, number in asdict(item).items()}
        data[field.name] = "inf" if item == inf else item
    return data


def _value(data: dict[str, Any]) -> Any:
    kind = _TYPES[data["type"]]
    made = _numbers(kind, {key: item for key, item in data.items() if key != "type"})
    if "request" in made and isinstance(made["request"], dict):
        made["request"] = Request(**_numbers(Request, made["request"]))
    for key in ("requests", "tokens"):
        if isinstance(made.get(key), list):
            made[key] = tuple(made[key])
    if "growing" in made:
        made["growing"] = tuple((blocks, tokens) for blocks, tokens in made["growing"])
    for field in fields(kind):
        wanted = _JSON.get(str(field.type))
        if wanted is not None and field.name in made and not isinstance(made[field.name], wanted):
            raise TypeError(f"{kind.__name__}.{field.name} is {made[field.name]!r}")
    return kind(**made)


def _numbers(kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with infinities where ``kind`` has numbers: an id or a class may be called "inf" as well."""
    numeric = {field.name for field in fields(kind) if str(field.type).startswith("float")}
    return {key: inf if item == "inf" and key in numeric else item for key, item in data.items()}


def read_log(path: str | Path) -> Log:
    """Read a log; raises :class:`TraceError` with file and line when one cannot be read.

    A last line that breaks off (the writer was killed, its disk was full, or it is writing now) is left out,
    and ``torn`` says so.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("cannot read the log", got=str(error), where=str(source)) from error
    steps: list[Step] = []
    predictions: list[tuple[float, ...]] = []
    restarts: list[int] = []
    header: tuple[str, dict[str, Any]] | None = None
    lines = text.splitlines()
    torn = len(lines) > 1 and not text.endswith("\n") and not _complete(lines[-1])
    if torn:
        del lines[-1]
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            if number == 1:
                if data["version"] != _VERSION:
                    raise ValueError(f"version {data['version']}")
                header = (str(data["policy"]), _numbers(SchedulerOptions, data["options"]))
                continue
            if data.get("restarted"):
                restarts.append(len(steps))
                continue
            events = tuple(_value(item) for item in data["events"])
            steps.append((events, tuple(_value(item) for item in data["commands"])))
            predictions.append(tuple(float(item) for item in data.get("predictions", ())))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise TraceError(
                "a log line cannot be read",
                path=source,
                line=number,
                field=None,
                expected=f"a line of a log of version {_VERSION}",
                got=str(error),
            ) from error
    if header is None:
        raise InvalidInputError("the log is empty", expected="a header line", where=str(source))
    policy, options = header
    return Log(policy, options, steps, predictions=predictions, restarts=restarts, torn=torn)


def _complete(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class _Told:
    """Answers with what the log holds, in order; inf when it holds no more, or what ``otherwise`` says."""

    def __init__(self, otherwise: TtftPredictor | None) -> None:
        self.otherwise = otherwise
        self.left: deque[float] = deque()

    def predict(self, tokens: int, context: int = 0) -> float:
        if self.otherwise is not None:
            return self.otherwise.predict(tokens, context)
        return self.left.popleft() if self.left else inf

    def predict_pack(self, lengths: Iterable[int]) -> float:
        if self.otherwise is not None:
            return self.otherwise.predict_pack(lengths)
        return self.left.popleft() if self.left else inf

    def correct(self, tokens: int, measured: float) -> None:
        raise InternalError("a replay corrects nothing", expected="predictions from the log", got="correct()")


def differences(log: Log, predictor: TtftPredictor | None = None) -> list[str]:
    """Replay the log's events on fresh cores of its policy: where the commands differ, in words.

    A log that holds predictions is replayed with them, any other with ``predictor``.
    """
    told = _Told(None if any(log.predictions) else predictor)

    def fresh() -> Scheduler:
        return Scheduler(log.policy, predictor=told, options=make_options(None, log.options))

    core = fresh()
    found = []
    for number, (events, recorded) in enumerate(log.steps):
        if number in log.restarts:
            core = fresh()
        told.left = deque(log.predictions[number])
        commands = core.handle_all(events)
        if commands != recorded or told.left:
            at = events[-1].time if events else 0.0
            found.append(f"step {number + 1} at t={at:.6f}: recorded {recorded}, replayed {commands}")
    return found


def requests_of(log: Log, rate_scale: float = 1.0) -> list[Request]:
    """The requests that arrived, gaps divided by ``rate_scale``; each keeps its time to the deadline."""
    if not 0 < rate_scale < inf:
        raise InvalidInputError("rate_scale", expected="a number > 0", got=repr(rate_scale))
    arrivals = [event for events, _ in log.steps for event in events if isinstance(event, Arrival)]
    requests = [event.request for event in arrivals if not event.again]
    requests.sort(key=lambda request: request.arrival)
    moved = []
    for request in requests:
        arrival = requests[0].arrival + (request.arrival - requests[0].arrival) / rate_scale
        moved.append(replace(request, arrival=arrival, deadline=arrival + request.deadline - request.arrival))
    return moved


def measured_costs(log: Log) -> dict[str, float]:
    """Device seconds that each completed single-request run really took, all its launches together."""
    spent: dict[str, float] = {}
    done: dict[str, float] = {}
    since: dict[str, float] = {}
    for event, commands in _flat(log):
        if isinstance(event, Yielded | Completed | Failed) and event.run in since:
            spent[event.run] = spent.get(event.run, 0.0) + event.time - since.pop(event.run)
            if isinstance(event, Completed):
                done.setdefault(event.run, spent[event.run])  # what comes again is no new prompt
        for command in commands:
            if isinstance(command, Launch) and len(command.requests) == 1 and command.tokens is None:
                since[command.run] = event.time
    return done


def outcomes_of(log: Log) -> list[Outcome]:
    """What really became of each request, in order of arrival; those that never ended count as not served.

    So do those that were cancelled before their end, whether or not what they shared a launch with went on.
    Raises :class:`InvalidInputError` where events and commands of the log do not belong together.
    """
    requests = {request.id: request for request in requests_of(log)}
    started: dict[str, float] = {}
    done: dict[str, float] = {}
    pauses: dict[str, int] = {}
    asked = ""
    launched: dict[str, Launch] = {}
    left = {name: request.tokens for name, request in requests.items()}
    reasons: dict[str, str] = {}
    for event, commands in _flat(log):
        if isinstance(event, Yielded | Completed) and event.run not in launched:
            raise _torn_apart(f"{type(event).__name__} of {event.run!r}", "a Launch of that run before")
        if isinstance(event, Yielded | Completed) and (launch := launched[event.run]).tokens is not None:
            for name, tokens in zip(launch.requests, launch.tokens, strict=True):
                left[name] -= tokens
                if not left[name] and name not in reasons:
                    done[name] = event.time
        elif isinstance(event, Completed):
            members = launched[event.run].requests
            done.update((name, event.time) for name in members if name not in reasons and name not in done)
        elif isinstance(event, Yielded):
            pauses[event.run] = pauses.get(event.run, 0) + (event.run == asked)
        elif isinstance(event, Cancelled) and event.request not in done:
            reasons.setdefault(event.request, "cancelled")
        for command in commands:
            if isinstance(command, Launch):
                unknown = next((name for name in command.requests if name not in requests), None)
                if unknown is not None:
                    raise _torn_apart(f"Launch of {unknown!r}", "an Arrival of that request before")
                launched[command.run] = command
                asked = ""
                for name in command.requests:
                    started.setdefault(name, event.time)
            elif isinstance(command, Pause):
                asked = command.run
            elif isinstance(command, Reject):
                reasons[command.request] = command.reason
    return [
        Outcome(
            request,
            done[name] - request.arrival if name in done else None,
            started.get(name),
            pauses.get(name, 0),
            reasons.get(name, "" if name in done else "did not end"),
        )
        for name, request in requests.items()
    ]


def _torn_apart(got: str, expected: str) -> InvalidInputError:
    return InvalidInputError(
        "events and commands of the log do not belong together",
        expected=expected,
        got=got,
        remedy="take a log as it was written: Engine(record=FILE)",
    )


def _flat(log: Log) -> Iterator[tuple[Event, tuple[Command, ...]]]:
    """Events one by one; the commands of a step come with its last event."""
    for events, commands in log.steps:
        for event in events[:-1]:
            yield event, ()
        if events:
            yield events[-1], commands
