"""Live progress on stderr: what is being tried, the best so far, how much of the budget is gone."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mbperf.loader.output.units import si


class Progress:
    """A context manager; call it with the profiler's events. Quiet where stderr is no terminal."""

    def __init__(self, console: Console, budget_s: float):
        self.console = console
        self.budget_s = budget_s
        self.began = time.monotonic()
        self.doing = "starting"
        self.best = "no result yet"
        self.trials = 0
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Progress":
        """Begin to show."""
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the display away."""
        if self.console.is_terminal:
            self._live.stop()

    def __call__(self, event: str, payload: Any) -> None:
        """Take an event of the profiler."""
        if event == "phase":
            self.doing = payload
        elif event == "trial":
            self.doing = f"trying {payload.label()}"
        elif event == "foreseen":
            self.console.print(Text(f"foreseen: {payload}", style="yellow"))
        elif event == "result":
            self._result(*payload)

    def _result(self, trial: Any, candidates: Any) -> None:
        self.trials += 1
        if trial.infeasible and self.console.is_terminal:
            self.console.print(Text(f"infeasible: {trial.settings.label()}: {trial.infeasible}", style="red"))
        feasible = candidates.feasible()
        if feasible:
            self.best = f"{si(feasible[0].rate)} samples/s, {feasible[0].settings.label()}"

    def __rich__(self) -> Table:
        """Return three lines: bar, what is being done, the best so far."""
        spent = min(time.monotonic() - self.began, self.budget_s)
        table = Table.grid(padding=(0, 1))
        table.add_column(style="bold")
        table.add_column()
        table.add_row("budget", ProgressBar(total=self.budget_s, completed=spent, width=40))
        table.add_row("now", Text(self.doing, overflow="ellipsis", no_wrap=True))
        table.add_row("best", Text(f"{self.best} ({self.trials} trials)", overflow="ellipsis", no_wrap=True))
        return table
