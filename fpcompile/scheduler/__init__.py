"""Pure scheduling: events in, commands out; policies, predictor, simulator. Nothing here imports torch.

Typical use::

    core = Scheduler("s-edf", predictor=CostPredictor(profile()))
    request = Request("a", arrival=now, deadline=now + 0.25, tokens=512, cost=0.04)
    commands = core.handle(Arrival(now, request))
"""

from __future__ import annotations

from fpcompile.scheduler.core import Scheduler
from fpcompile.scheduler.costs import CostTable, SegmentCost, load_costs
from fpcompile.scheduler.errors import (
    CostFileError,
    EventOrderError,
    InvariantError,
    TraceError,
    TransitionError,
    UnknownPolicyError,
    UnknownRequestError,
)
from fpcompile.scheduler.events import (
    Arrival,
    Cancelled,
    Command,
    Completed,
    Decoding,
    Dropped,
    Event,
    Evict,
    Failed,
    Launch,
    Memory,
    Pause,
    Reject,
    Request,
    Reserved,
    Restore,
    SetTimer,
    Timer,
    Yielded,
    event_order,
)
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.options import SchedulerOptions
from fpcompile.scheduler.policy import (
    Grain,
    KeyedPolicy,
    Policy,
    RankingPolicy,
    StepPolicy,
    make_policy,
    policy_names,
    register,
)
from fpcompile.scheduler.predictor import CostPredictor, PredictionError, TtftPredictor
from fpcompile.scheduler.profiles import DEFAULT_PROFILE, SLO_TABLE, profile, profile_names
from fpcompile.scheduler.states import ENDED, TRANSITIONS, State

__all__ = [
    "DEFAULT_PROFILE",
    "ENDED",
    "SLO_TABLE",
    "TRANSITIONS",
    "Arrival",
    "Cancelled",
    "Command",
    "Completed",
    "CostFileError",
    "CostPredictor",
    "CostTable",
    "Decoding",
    "Dropped",
    "Event",
    "EventOrderError",
    "Evict",
    "Failed",
    "Grain",
    "InvariantError",
    "KeyedPolicy",
    "Launch",
    "Memory",
    "Pause",
    "Policy",
    "PredictionError",
    "RankingPolicy",
    "Reject",
    "Request",
    "RequestView",
    "Reserved",
    "Restore",
    "Scheduler",
    "SchedulerOptions",
    "SegmentCost",
    "SetTimer",
    "State",
    "StepPolicy",
    "Timer",
    "TraceError",
    "TransitionError",
    "TtftPredictor",
    "UnknownPolicyError",
    "UnknownRequestError",
    "Yielded",
    "event_order",
    "load_costs",
    "make_policy",
    "policy_names",
    "profile",
    "profile_names",
    "register",
]
