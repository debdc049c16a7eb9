"""Our policy, `fpcompile`: serve as many requests in time as can be, in every class.

At each event it looks at all waiting and paused requests with their exact remaining times.

1. *Late* requests, those that could not meet their deadline even if they had the device at once, are apart.
   They come back when decode steps leave more of the device to prefills, and there is time for them again.
2. Moore-Hodgson's rule over the others: in deadline order, when the next one would be late, set the one that
   frees the most device time aside. What is accepted runs earliest deadline first, and all of it is in time.
   With everything present and one class, this maximises the number in time (Moore 1968).
3. *Foresight*: device time before a distant deadline is not all ours; requests with shorter promises will
   arrive and go first. The time that they are expected to take (the recent load of the classes with a shorter
   SLO) is kept free. So work that would be abandoned later is not begun.
4. *Class balance*: a class is served when 90 % of its requests are in time. What is set aside is the request
   with the most seconds per unit of harm; the harm of a miss grows as the recent attainment of its class
   falls towards the target and below. With one class this is the plain rule.
5. What was set aside goes on when nothing accepted is left, the shortest first.
6. *Blocks*: who is best gets its cache blocks by evicting the last in line. But a run that needs less time to
   finish than to be moved away and back goes on first, if nobody accepted is late for that.
7. Late requests share ``late_share`` of the device time, first come, first served, in turns of 20 to 40 ms,
   and otherwise run only when the device would be idle; idle time that they got counts towards their share.

Cost: O(n log n) per event for n requests that are not late; late ones cost nothing, but when the share of
decode steps changes.
What would change this: costs that are revealed late, or many devices behind one queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from math import inf

from fpcompile.errors import InvalidInputError
from fpcompile.scheduler.batching import slo_batching
from fpcompile.scheduler.job import RequestView
from fpcompile.scheduler.policies.bookkeeping import ClassBook, LateShare
from fpcompile.scheduler.policy import Grain, RankingPolicy, register, whole
from fpcompile.scheduler.states import State

__all__ = ["MooreHodgson"]

_EPSILON = 1e-9
_MOST_RESERVED = 0.9


@register("fpcompile")
class MooreHodgson(RankingPolicy):
    """Moore-Hodgson with class balance; see the module's text.

    ``late_share``: share of device time owed to late requests. ``balance``: how strongly classes are
    balanced, 0 for not at all. ``foresight``: reserved time per expected urgent load, above 1 because bursts
    are not expected; 0 for none. ``memory``: requests of a class after which its attainment is mostly
    forgotten. These three were chosen on two traces (docs/goodput.md). ``pack``: most
    tokens of a packed run, 0 for no packing (then no neighbour ever changes a request's bits).
    ``budget_us``: grain. ``patience``: seconds that a late request may expect to wait for its turn; beyond,
    it is rejected at once.
    """

    def __init__(
        self,
        late_share: float = 0.05,
        balance: float = 12.0,
        foresight: float = 1.25,
        memory: int = 1000,
        pack: int = 0,
        budget_us: int = 2000,
        patience: float = inf,
    ) -> None:
        for name, value, most in (
            ("late_share", late_share, 1.0),
            ("balance", balance, inf),
            ("foresight", foresight, inf),
        ):
            if not 0 <= value < most:
                raise InvalidInputError(f"policy option {name}", expected=f"in [0, {most})", got=repr(value))
        for name, value, least in (("memory", memory, 1), ("pack", pack, 0), ("budget_us", budget_us, 1)):
            whole(f"policy option {name}", value, least)
        if not patience > 0:
            raise InvalidInputError("policy option patience", expected="seconds > 0", got=repr(patience))
        self.grain = Grain("tile", budget_us)
        self.batching = slo_batching(pack) if pack else None
        self._balance, self._foresight, self._memory, self._patience = balance, foresight, memory, patience
        self._live: list[tuple[float, int, RequestView]] = []
        self._place: dict[str, tuple[float, int]] = {}
        self._late: dict[str, RequestView] = {}
        self._missed: set[str] = set()  # of the late ones, those that were learnt as a miss
        self._share = LateShare(late_share)
        self._books: dict[str, ClassBook] = {}
        self._running: RequestView | None = None
        self._hopeless: list[tuple[RequestView, str]] = []
        self._slack = inf

    # ---- what happens

    def arrived(self, view: RequestView, now: float) -> None:
        request = view.request
        book = self._books.get(request.klass)
        if book is None:
            book = self._books[request.klass] = ClassBook(self._memory)
        if now + view.remaining(now) > view.deadline + _EPSILON:
            self._put_late(view, now)  # not even alone: served, but not counted
            return
        book.arrived(view.remaining(now), request.slo, now)
        self._put_live(view)

    def joined(self, view: RequestView, lead: RequestView, now: float) -> None:
        self._forget(view)

    def launched(self, view: RequestView, now: float) -> None:
        self._running = view
        self._share.begin(now, late=view.request.id in self._late)

    def stopped(self, view: RequestView, now: float) -> None:
        self._share.spend(now, bool(self._late))
        self._share.idle()
        self._running = None

    def ended(self, view: RequestView, outcome: State, now: float) -> None:
        if self._forget(view) and outcome is not State.CANCELLED:
            met = outcome is State.COMPLETED and now <= view.deadline + _EPSILON
            self._books[view.request.klass].learn(met)

    def _forget(self, view: RequestView) -> bool:
        """Take a request out of the order; whether it was not late."""
        if self._late.pop(view.request.id, None) is not None:
            self._missed.discard(view.request.id)
            return False
        place = self._place.pop(view.request.id, None)
        if place is not None:
            del self._live[bisect_left(self._live, place)]
        return True

    def retimed(self, now: float) -> None:
        back = [v for v in self._late.values() if now + v.remaining(now) <= v.deadline + _EPSILON]
        if not back:
            return
        self._share.spend(now, waiting=True)
        for view in back:
            if view.request.id in self._missed:
                self._books[view.request.klass].forgive()
            self._forget(view)
            self._put_live(view)
            if view is self._running:
                self._share.begin(now, late=False)
        self._hopeless = [(view, why) for view, why in self._hopeless if view.request.id in self._late]

    def _put_live(self, view: RequestView) -> None:
        self._place[view.request.id] = (view.deadline, view.sequence)
        insort(self._live, (view.deadline, view.sequence, view))

    def _put_late(self, view: RequestView, now: float) -> None:
        if self._patience < inf and view.state is not State.RUNNING and not view.started:
            backlog = sum(other.remaining(now) for other in self._late.values())
            if backlog > self._patience * self._share.share:
                self._hopeless.append((view, f"late, and {backlog:.3g} s of late work are ahead"))
        self._late[view.request.id] = view
        if view is self._running:  # it takes longer than predicted
            self._share.begin(now, late=True)

    def rejects(self) -> list[tuple[str, str]]:
        hopeless, self._hopeless = self._hopeless, []
        return [(view.request.id, reason) for view, reason in hopeless if not view.started]

    # ---- the order

    def rank(self, views: Sequence[RequestView], now: float) -> Iterator[str]:
        self._share.spend(now, bool(self._late))
        accepted, aside, slack = self._select(now)
        self._slack = slack
        running = None if self._running is None else self._running.request.id
        first = None
        if self._late and (accepted or aside):
            if running is None and self._share.take(slack):
                first = next(iter(self._late))
            elif running in self._late and self._share.left:
                first = running
        if first is not None:
            yield first
        for view in (*accepted, *aside):
            yield view.request.id
        if running is not None and running in self._late and running != first:
            yield running
        for name in self._late:
            if name != first and name != running:
                yield name

    def spares(self, victims: Sequence[tuple[RequestView, float]], now: float) -> RequestView | None:
        left, _, view, move = min((view.remaining(now), view.sequence, view, move) for view, move in victims)
        return view if left <= min(move, self._slack) else None

    def last_first(self, views: Sequence[RequestView], now: float) -> list[str]:
        late = [view.request.id for view in views if view.request.id in self._late]
        rest = [view for view in views if view.request.id not in self._late]
        return [*reversed(late), *super().last_first(rest, now)]

    def wake(self, now: float) -> float:
        running = self._running
        if running is None or running.request.id not in self._late or not self._live:
            return inf
        return now + self._share.left if self._share.left else inf

    def _select(self, now: float) -> tuple[list[RequestView], list[RequestView], float]:
        """Accepted requests in deadline order, those set aside, and the least slack of the accepted."""
        accepted: list[RequestView] = []
        aside: list[RequestView] = []
        missed: list[RequestView] = []
        heap: list[tuple[float, int, float, RequestView]] | None = None
        weights: dict[str, float] = {}
        expected = self._expected_load(now)
        rate = owed = 0.0  # seconds taken by more urgent arrivals before a gap: rate * gap - owed
        after, at, slack = 0, now, inf
        for deadline, sequence, view in self._live:
            left = view.remaining(now)
            if now + left > deadline + _EPSILON:
                missed.append(view)
                continue
            gap = deadline - now
            while after < len(expected) and expected[after][0] < gap:
                rate += expected[after][1]
                owed += expected[after][0] * expected[after][1]
                after += 1
            limit = (
                max(deadline - min(_MOST_RESERVED * gap, rate * gap - owed), now + left)
                if after
                else deadline
            )
            at += left
            accepted.append(view)
            if heap is not None:
                heappush(heap, (-left / weights[view.request.klass], -sequence, left, view))
            if at > limit + _EPSILON:
                if heap is None:
                    weights = {klass: book.harm(self._balance) for klass, book in self._books.items()}
                    heap = [_ratio(other, weights, now) for other in accepted]
                    heapify(heap)
                while at > limit + _EPSILON:
                    _, _, freed, other = heappop(heap)
                    aside.append(other)
                    at -= freed
            slack = min(slack, deadline - at)
        for view in missed:
            self._forget(view)
            self._put_late(view, now)
            self._missed.add(view.request.id)
            self._books[view.request.klass].learn(False)
        if aside:
            gone = {view.sequence for view in aside}
            accepted = [view for view in accepted if view.sequence not in gone]
            aside.sort(key=lambda view: (view.remaining(now), view.sequence))
        return accepted, aside, slack

    def _expected_load(self, now: float) -> list[tuple[float, float]]:
        """(SLO, device seconds per second that will be asked for) of each class, shortest SLO first."""
        if not self._foresight or len(self._books) < 2:
            return []
        loads = [
            (book.slo, self._foresight * book.load(now)) for book in self._books.values() if book.slo < inf
        ]
        return sorted(loads)


def _ratio(view: RequestView, weights: dict[str, float], now: float) -> tuple[float, int, float, RequestView]:
    left = view.remaining(now)
    return (-left / weights[view.request.klass], -view.sequence, left, view)
