"""What the bars of a study show beside how far it is."""

import pytest
from rich.console import Console
from rich.progress import Progress

from synapse.cli.terminal import RateColumn


@pytest.mark.parametrize(("steps_a_second", "shown"), [(2000, "2,000/s"), (10, "10/s"), (0.5, "0.5/s")])
def test_the_bar_says_how_many_steps_a_second_there_are(steps_a_second, shown):
    now = [0.0]
    bars = Progress(console=Console(quiet=True), get_time=lambda: now[0])
    task = bars.add_task("record", total=1_000_000)
    assert RateColumn().render(bars.tasks[0]).plain == ""
    for second in range(5):
        now[0] = float(second)
        bars.update(task, completed=second * steps_a_second)
    assert RateColumn().render(bars.tasks[0]).plain == shown
