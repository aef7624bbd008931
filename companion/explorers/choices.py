"""What explorers share: controls in a row, and a result that says so where there can be none."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping

import ipywidgets as widgets

LOOK = {"style": {"description_width": "6.5em"}, "layout": widgets.Layout(width="20em")}


class Explorer(widgets.VBox):
    """Controls by name, and what `show` makes of their values; the HTML is in `result`."""

    def __init__(self, controls: Mapping[str, widgets.Widget], show: Callable[..., str]) -> None:
        self.controls, self.show = dict(controls), show
        self.result = widgets.HTML()
        for control in self.controls.values():
            control.observe(lambda _: self.refresh(), names="value")
        self.refresh()
        row = widgets.Box([*self.controls.values()], layout=widgets.Layout(flex_flow="row wrap"))
        super().__init__([row, self.result])

    def refresh(self) -> None:
        """Show what the controls ask for, or why it cannot be."""
        values = {name: control.value for name, control in self.controls.items()}
        self.result.value = shown(lambda: self.show(**values))


def shown(make: Callable[[], str]) -> str:
    """The HTML that `make` gives, or the message of its ValueError."""
    try:
        return make()
    except ValueError as problem:
        return f'<p role="alert">Not possible: {html.escape(str(problem))}</p>'


def group_name(group: int | str) -> str:
    """What shares a scale, in words."""
    return f"groups of {group}" if isinstance(group, int) else f"a grid a {group}"


def choice(name: str, options: list, value: object) -> widgets.Dropdown:
    """A list to choose from."""
    return widgets.Dropdown(description=name, options=options, value=value, **LOOK)
