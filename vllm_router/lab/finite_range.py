"""A type of options: a number in a range."""

from __future__ import annotations

import math

import click


class FiniteRange(click.FloatRange):
    """A finite number in a range; `nan` is within every range of click's own."""

    def convert(
        self, value: float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value!r}", param, ctx)
        return number
