"""Means that a trainer logs by name, over all micro-batches and processes since the last log."""

from collections.abc import Iterable

import torch
from accelerate.utils import gather_object

Number = float | torch.Tensor


class LoggedMeans:
    """Sums and counts by name. Every process adds its own; `take` is called by all of them."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # (2,) float64: sum and count

    def add(self, name: str, total: Number, count: Number) -> None:
        """Add a sum and what it is to be divided by."""
        pair = torch.stack([torch.as_tensor(part).detach().double().cpu() for part in (total, count)])
        self.sums[name] = self.sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def add_tasks(self, tasks: Iterable[str], numbers: torch.Tensor, values: torch.Tensor) -> None:
        """Add the values (P,) of each task as `loss_TASK`.

        Args:
            tasks: Names.
            numbers: (P,) number of the value's task among them; any other for a value that does not count.
            values: (P,).
        """
        for number, name in enumerate(tasks):
            is_its = numbers == number
            self.add(f"loss_{name}", (values * is_its).sum(), is_its.sum())

    def take(self) -> dict[str, tuple[float, float]]:
        """Mean and count by name where the count is not 0; begins anew."""
        totals: dict[str, torch.Tensor] = {}
        for sums in gather_object([self.sums]):
            for name, pair in sums.items():
                totals[name] = totals.get(name, 0.0) + pair
        self.sums = {}
        return {name: (float(pair[0] / pair[1]), float(pair[1])) for name, pair in totals.items() if pair[1]}
