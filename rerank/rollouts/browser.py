"""`rerank inspect`: the rollouts of a run, browsed in a terminal or, where there is none, printed.

The first screen reads the few columns of the list; a group's prompt and completions are read when it is opened.
Whatever a model or a catalogue wrote is shown as `rich.text.Text`, never as markup.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import Horizontal, ScrollableContainer, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Static

from rerank.catalogue import Catalogue
from rerank.rollouts import text as rollout_view
from rerank.rollouts.groups import Line, RolloutGroups
from rerank.rollouts.schema import Rollout

PAGE_SIZE = 200
EXAMPLE = "kept = false and target_rank_after > target_rank"


def inspect(
    run_dir: str | Path,
    limit: int = 5,
    step: int | None = None,
    row_id: int | None = None,
    where: str = "",
    against: str | Path | None = None,
    against_step: int | None = None,
    console: Console | None = None,
) -> None:
    """Browse the groups of a run, the latest step first, or print some where standard output is no terminal.

    Args:
        run_dir: A run, its dapo folder (finished or partial), or the folder of the parts.
        limit: Number of groups to print.
        step: Only groups of this step.
        row_id: Only groups of this row.
        where: Only groups with a rollout that meets this DuckDB condition.
        against: A run whose latest group of the same row is shown beside each.
        against_step: The last step of that run that counts; of the same run, this holds two of its policies together.
        console: Where to print; standard output or the terminal's browser when None.

    Raises:
        ValueError: When there is nothing to show, `where` is no condition, or a step is given of no other run.
    """
    if against is None and against_step is not None:
        raise ValueError(f"against_step is {against_step} but there is no other run; give one with --against")
    if limit < 1:
        raise ValueError(f"limit is {limit} but must be at least 1")
    groups = RolloutGroups(run_dir, against, against_step)
    groups.filter(where)  # alone first, so that a message quotes what the user wrote
    parts = [f"{name} = {value}" for name, value in (("step", step), ("row_id", row_id)) if value is not None]
    if parts:
        groups.filter(" AND ".join([*parts, *([f"({where}\n)"] if where.strip() else [])]))
    if groups.num_groups == 0:
        asked = " and ".join([*parts, *([where] if where.strip() else [])])
        (steps,) = groups.rollouts.records("SELECT min(step) AS first, max(step) AS last FROM rollouts")
        raise ValueError(f"{run_dir} has no rollout with {asked}; its steps are {steps['first']} to {steps['last']}")
    if console is None and sys.stdin.isatty() and sys.stdout.isatty():
        RolloutBrowser(groups).run()
    else:
        _print(groups, limit, console or Console())


def _print(groups: RolloutGroups, limit: int, console: Console) -> None:
    for line in groups.page(limit=limit):
        rollout_view.print_group(groups.read(line), groups.catalogue, console)
        if groups.against is not None:
            console.print(Text(f"\nagainst {groups.against.run_dir}:", style="bold"))
            rollout_view.print_group(groups.read_other(line), groups.against.catalogue, console)


class RolloutBrowser(App[None]):
    """The list of groups, and above it the screen of the group that is open."""

    CSS = """
    GroupList #status { dock: top; height: auto; padding: 0 1; background: $panel; }
    GroupList #filter { display: none; }
    GroupList #groups { height: 1fr; }
    GroupScreen .heading { text-style: bold; background: $panel; padding: 0 1; height: auto; }
    GroupScreen .prompt { height: auto; max-height: 25%; border-bottom: solid $panel; padding: 0 1; }
    GroupScreen .run { width: 1fr; }
    GroupScreen .other { border-left: heavy $accent; }
    GroupScreen .completions { layout: horizontal; overflow: auto; }
    GroupScreen .completion { width: 46; height: auto; padding: 0 1; border-right: solid $panel; }
    GroupScreen .two .completion { width: 36; }
    GroupScreen .completion Static { height: auto; margin-bottom: 1; }
    """
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, groups: RolloutGroups) -> None:
        super().__init__()
        self.groups = groups

    def get_default_screen(self) -> Screen[None]:
        return GroupList(self.groups)


class GroupList(Screen[None]):
    """The groups page by page, sorted by a column, with a line that takes a filter."""

    BINDINGS: ClassVar = [
        ("slash", "filter", "filter"),
        ("s", "sort", "sort by column"),
        ("n", "page(1)", "next page"),
        ("p", "page(-1)", "previous page"),
        ("escape", "leave_filter", "leave filter"),
        ("q", "app.quit", "quit"),
    ]

    def __init__(self, groups: RolloutGroups) -> None:
        super().__init__()
        self.groups = groups
        self.sort_column, self.descending, self.first_shown = "step", True, 0
        self.lines: list[Line] = []

    def compose(self) -> ComposeResult:
        yield Static(id="status")
        yield DataTable(id="groups", zebra_stripes=True)
        yield Input(self.groups.where, placeholder=EXAMPLE, id="filter")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns(*((Text(_title(name)), name) for name in self.groups.columns))
        self.show_page()

    def show_page(self) -> None:
        """Fill the table with the page that sort and filter say."""
        self.lines = self.groups.page(self.sort_column, self.descending, self.first_shown, PAGE_SIZE)
        table = self.query_one(DataTable)
        column = table.cursor_column
        table.clear()
        for line in self.lines:
            table.add_row(*(_cell(line[name]) for name in self.groups.columns))
        table.move_cursor(row=0, column=column)
        table.focus()
        self.query_one("#status", Static).update(Text(self._status()))

    def _status(self) -> str:
        end, against = self.first_shown + len(self.lines), self.groups.against
        shown = f"groups {self.first_shown + 1:,} to {end:,} of {self.groups.num_groups:,}" if end else "no group"
        order = f"by {_title(self.sort_column)} {'↓' if self.descending else '↑'}"
        runs = f"{self.groups.run_dir}{'' if against is None else f' against {against.run_dir}'}"
        where = f" where {rollout_view.visible(' '.join(self.groups.where.split()))}" if self.groups.where else ""
        return f"{runs}: {shown}{where}, {order}"

    def on_data_table_cell_selected(self, event: DataTable.CellSelected) -> None:
        if self.lines:
            with self.errors_in_status():
                self.app.push_screen(GroupScreen(self.groups, self.lines[event.coordinate.row]))

    @contextmanager
    def errors_in_status(self) -> Iterator[None]:
        """Show what is refused above the list, which stays."""
        try:
            yield
        except ValueError as error:
            self.query_one("#status", Static).update(Text(rollout_view.visible(str(error)), style="bold red"))

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self.sort_by(self.groups.columns[event.column_index])

    def action_sort(self) -> None:
        self.sort_by(self.groups.columns[self.query_one(DataTable).cursor_column])

    def sort_by(self, name: str) -> None:
        """Sort by a column, the largest first; by the same one again, the other way round."""
        self.descending = not self.descending if name == self.sort_column else True
        self.sort_column, self.first_shown = name, 0
        self.show_page()

    def action_page(self, pages: int) -> None:
        first = self.first_shown + pages * PAGE_SIZE
        if 0 <= first < self.groups.num_groups:
            self.first_shown = first
            self.show_page()

    def action_filter(self) -> None:
        entry = self.query_one("#filter", Input)
        entry.display = True
        entry.focus()

    def action_leave_filter(self) -> None:
        self.query_one("#filter", Input).display = False
        self.query_one(DataTable).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        with self.errors_in_status():
            self.groups.filter(event.value)
            self.first_shown = 0
            self.action_leave_filter()
            self.show_page()


class GroupScreen(Screen[None]):
    """One group: its prompt, the incoming order and its completions side by side, or those of two runs."""

    BINDINGS: ClassVar = [
        ("n", "move(1)", "next completion"),
        ("p", "move(-1)", "previous completion"),
        ("t", "titles", "titles or ids in texts"),
        ("escape,q", "app.pop_screen", "back"),
    ]
    AUTO_FOCUS = ".completions"

    def __init__(self, groups: RolloutGroups, line: Line) -> None:
        super().__init__()
        self.with_titles = True
        self.sides = [(groups.read(line), groups.catalogue)]
        if groups.against is not None:
            self.sides.append((groups.read_other(line), groups.against.catalogue))

    def compose(self) -> ComposeResult:
        with Horizontal(classes="two" if len(self.sides) == 2 else ""):
            for number, (group, catalogue) in enumerate(self.sides):
                with Vertical(classes="run other" if number else "run"):
                    yield from self._side(group, catalogue)
        yield Footer()

    def _side(self, group: Sequence[Rollout], catalogue: Catalogue | None) -> ComposeResult:
        titles = _titles(catalogue) if self.with_titles else {}
        yield Static(Text(rollout_view.visible(f"{group[0]['run']} {rollout_view.heading(group)}")), classes="heading")
        with VerticalScroll(classes="prompt"):
            yield Static(_text(group[0]["prompt"], titles))
        with ScrollableContainer(classes="completions"):
            if len(self.sides) == 1:
                with Vertical(classes="completion"):
                    yield Static(Text("incoming order", style="bold"))
                    yield Static(rollout_view.incoming_order(group[0], catalogue))
            for number, rollout in enumerate(group, start=1):
                yield from _completion(number, rollout, catalogue, titles)

    def action_move(self, completions: int) -> None:
        for row in self.query(".completions"):
            row.scroll_relative(x=completions * row.children[0].outer_size.width, animate=False)

    async def action_titles(self) -> None:
        """Show titles in place of semantic ids in prompt and completions, or the texts as they are."""
        self.with_titles = not self.with_titles
        await self.recompose()
        self.query(".completions").first().focus()


def _completion(number: int, rollout: Rollout, catalogue: Catalogue | None, titles: dict[str, str]) -> ComposeResult:
    mark = "" if rollout["matches"] else ", does not meet the filter"
    rewards = [f"{name} {rollout_view.shown_number(rollout[name])}" for name in ("reward", "advantage")]
    with Vertical(classes="completion"):
        yield Static(Text(f"rollout {number}: {rollout_view.outcome(rollout)}{mark}", style="bold"))
        yield Static(Text("\n".join([*rewards, *(f"  {part}" for part in rollout_view.reward_parts(rollout))])))
        yield Static(rollout_view.outgoing_order(rollout, catalogue))
        yield Static(_text(rollout["completion"], titles))


def _text(text: str, titles: dict[str, str]) -> Text:
    return Text(rollout_view.visible(rollout_view.with_titles(text, titles)))


def _titles(catalogue: Catalogue | None) -> dict[str, str]:
    """Semantic id -> title, of the items that have one."""
    if catalogue is None:
        return {}
    return {name: title for name, title in zip(catalogue.semantic_ids, catalogue.titles, strict=True) if title}


def _title(name: str) -> str:
    full = {"before": "target before", "after": "best after", "best": "best reward", "mean": "mean reward"}
    plain = name.removeprefix("other_")
    return f"{'' if plain == name else 'other '}{full.get(plain, plain.replace('_', ' '))}"


def _cell(value: object) -> Text:
    if isinstance(value, str):
        return Text(rollout_view.visible(value))
    return Text("" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value}", justify="right")
