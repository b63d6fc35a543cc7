"""How many a share of some are, without the errors of binary fractions."""

from __future__ import annotations

from fractions import Fraction


def whole_share(share: float, count: int) -> int:
    """floor(share * count) for the decimal number that ``share`` was written as.

    In floats 0.29 * 100 is 28.999..., so that ``int`` of it is one less than was meant.

    Example:
        >>> whole_share(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    return int(Fraction(str(share)) * count)  # a float's str is the shortest number that it can have been
