"""`grid:` in a configuration, and the keys in which configurations differ.

Anomalib's ``get_iterator_from_grid_dict`` takes every key that contains "grid" for a grid, even an argument
`grid_size`. Here it is the mapping ``{grid: [...]}`` alone.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from anomalib.utils.config import flatten_dict


def expand(value: Any, where: str) -> list[Any]:
    """List all values that a value with grids stands for.

    Args:
        value: Anything; grids are looked for in mappings and in the choices of other grids.
        where: What the value is called in an error.

    Raises:
        ValueError: If a grid is not a list, or is empty.

    Example:
        >>> expand({"lr": {"grid": [0.1, 0.2]}, "grid_size": 3}, "init_args")
        [{'lr': 0.1, 'grid_size': 3}, {'lr': 0.2, 'grid_size': 3}]
    """
    if not isinstance(value, dict):
        return [value]
    if set(value) == {"grid"}:
        choices = value["grid"]
        if not isinstance(choices, list) or not choices:
            msg = f"{where}.grid must be a list with at least one value, got {choices!r}."
            raise ValueError(msg)
        return [each for choice in choices for each in expand(choice, where)]
    parts = [expand(part, f"{where}.{key}") for key, part in value.items()]
    return [dict(zip(value, combination, strict=True)) for combination in product(*parts)]


def differences(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List what tells each configuration from the others: its values under the dotted keys that not all agree on.

    Example:
        >>> differences([{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}])
        [{'b.c': 2}, {'b.c': 3}]
    """
    flat = [flatten_dict(configuration) for configuration in configurations]
    keys = dict.fromkeys(key for each in flat for key in each)
    differing = [key for key in keys if any(each.get(key) != flat[0].get(key) for each in flat)]
    return [{key: each.get(key) for key in differing} for each in flat]
