"""Who is drawn how: one colour for a method through the whole page, and what stands back where there are many."""

from collections.abc import Sequence
from dataclasses import dataclass

from camopd_jax.config.methods import AGAINST
from camopd_jax.reporting.runs import Group
from camopd_jax.reporting.svg import GROUPS

LEADS = 3  # groups that have figures of their own, where a figure holds only one


@dataclass(frozen=True)
class Style:
    colour: str  # its name on the page
    width: float = 1.8
    alpha: float = 1.0

    @property
    def muted(self) -> bool:
        return self.colour == "muted"


@dataclass(frozen=True)
class Cast:
    """All groups, in the order of their drawing's legend, with their styles."""

    groups: list[Group]
    styles: dict[str, Style]

    @property
    def many(self) -> bool:
        """Whether there are more than colours: then all but two are thin and grey."""
        return len(self.groups) > GROUPS

    @property
    def leads(self) -> list[Group]:
        """Those in colour, then others: the few that have figures of their own."""
        return sorted(self.groups, key=lambda group: self.styles[group.name].muted)[:LEADS]

    def style(self, group: Group) -> Style:
        return self.styles[group.name]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Names and colours; the grey ones are one line."""
        keys = [(group.name, self.style(group).colour) for group in self.groups if not self.style(group).muted]
        grey = len(self.groups) - len(keys)
        return keys + (
            [(f"{grey} others (hovering names them; \u2191 \u2193 lie beyond the frame)", "muted")] if grey else []
        )


def cast(groups: Sequence[Group]) -> Cast:
    """CaMOPD and vanilla have the first two colours. Beyond the number of colours, all others are grey."""
    stars: dict[str, Group] = {}
    for group in groups:
        if group.method in AGAINST:
            stars.setdefault(group.method, group)
    first = [stars[method] for method in sorted(AGAINST) if method in stars]
    many = len(groups) > GROUPS
    if many and not first:
        first = list(groups[:1])
    rest = [group for group in groups if group not in first]
    colours = [f"group-{i}" for i in range(1, GROUPS + 1)]
    if stars and "camopd" not in stars:
        colours.append(colours.pop(0))  # the first stays free: it is CaMOPD's on every page
    styles = {group.name: Style(colour, 2.2) for group, colour in zip(first, colours, strict=False)}
    left = [colour for colour in colours if colour not in {style.colour for style in styles.values()}]
    styles |= {group.name: Style("muted", 0.9, 0.6) for group in rest} if many else {
        group.name: Style(colour) for group, colour in zip(rest, left, strict=False)}  # fmt: skip
    return Cast([*first, *rest], styles)
