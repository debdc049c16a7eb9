"""The policies that come with the package; importing this module registers them."""

from __future__ import annotations

from fpcompile.scheduler.policies import hodgson, neighbours, orders

__all__ = ["hodgson", "neighbours", "orders"]
