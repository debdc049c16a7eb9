"""Formulas and conditions on lengths as JSON data: a tree of named classes; no text is evaluated.

An integer stands for itself, a text for a symbol, and ``[class, argument, ...]`` for anything else.
What is read is bounded, since making an expression works it out: powers, numbers and nesting have a limit.
``read_expr(write_expr(e), symbols) == e`` for symbols that are the ones in ``e``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from sympy.core import relational
from sympy.logic import boolalg
from torch.utils._sympy import functions, numbers

from fpcompile.errors import ProgramFileError

Symbols = Callable[[str], sympy.Symbol]

_OWN = (
    *(
        "CeilDiv",
        "CeilToInt",
        "CleanDiv",
        "FloatTrueDiv",
        "FloorDiv",
        "FloorToInt",
        "IntTrueDiv",
        "Max",
        "Min",
    ),
    *("Mod", "ModularIndexing", "PowByNatural", "PythonMod", "RoundToInt", "ToFloat", "TruncToInt", "Where"),
)
_CLASSES: dict[str, Any] = {
    **{f"torch.{name}": getattr(functions, name) for name in _OWN},
    **{name: getattr(sympy, name) for name in ("Add", "Max", "Min", "Mod", "Mul", "Pow", "ceiling", "floor")},
    **{name: getattr(boolalg, name) for name in ("And", "Not", "Or")},
    **{
        kind.__name__: kind
        for kind in (relational.Eq, relational.Ne, relational.Lt, relational.Le, relational.Gt, relational.Ge)
    },
}
_CONSTANTS: dict[str, Any] = {
    "true": sympy.true,
    "false": sympy.false,
    "infinity": sympy.oo,
    "-infinity": -sympy.oo,
    "integers end": numbers.int_oo,
    "integers begin": -numbers.int_oo,
}


_DEEPEST = 100
_BITS = 4096
_HIGHEST = 64


def write_expr(expr: Any) -> Any:
    """``expr`` as JSON data. Raises :class:`ProgramFileError` for a class that is not known."""
    if isinstance(expr, (int, sympy.Integer)) and not isinstance(expr, bool):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return str(expr.name)
    if isinstance(expr, sympy.Rational):
        return ["Rational", int(expr.p), int(expr.q)]
    if isinstance(expr, sympy.Float):
        return ["Float", str(expr)]
    for name, constant in _CONSTANTS.items():
        if expr is constant or expr == constant:
            return [name]
    kind = type(expr)
    name = f"torch.{kind.__name__}" if kind.__module__.startswith("torch") else kind.__name__
    if _CLASSES.get(name) is not kind:
        raise ProgramFileError(
            "a condition on lengths cannot be saved", expected=", ".join(sorted(_CLASSES)), got=str(expr)
        )
    return [name, *map(write_expr, expr.args)]


def read_expr(data: Any, symbols: Symbols, depth: int = 0) -> Any:
    """Read back what :func:`write_expr` gave; ``symbols`` gives the symbol of a name.

    Raises ValueError, KeyError or TypeError for other data, and for what is beyond the limits.
    """
    if depth > _DEEPEST:
        raise ValueError(f"a formula is nested more than {_DEEPEST} times")
    if isinstance(data, bool) or not isinstance(data, (int, str, list)):
        raise ValueError(f"{data!r} is no formula")
    if isinstance(data, int):
        return _bounded(sympy.Integer(data))
    if isinstance(data, str):
        return symbols(data)
    name, *arguments = data
    if name in _CONSTANTS and not arguments:
        return _CONSTANTS[name]
    if name == "Rational":
        return _bounded(sympy.Rational(int(arguments[0]), int(arguments[1])))
    if name == "Float":
        return sympy.Float(float(arguments[0]))
    read = [read_expr(argument, symbols, depth + 1) for argument in arguments]
    if name in ("Pow", "torch.PowByNatural"):
        _check_power(read[-1])
    return _bounded(_CLASSES[name](*read))


def _bounded(expr: Any) -> Any:
    if isinstance(expr, sympy.Rational) and max(expr.p.bit_length(), expr.q.bit_length()) > _BITS:
        raise ValueError(f"a number has more than {_BITS} bits")
    if isinstance(expr, sympy.Pow):
        _check_power(expr.exp)
    return expr


def _check_power(exponent: Any) -> None:
    if exponent.is_number and not abs(exponent) <= _HIGHEST:
        raise ValueError(f"a power is higher than {_HIGHEST}")
