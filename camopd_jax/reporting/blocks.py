"""What the page is built of: sections with a legend, figures and tables. The template lays them out."""

from dataclasses import dataclass, field

from markupsafe import Markup

Legend = list[tuple[str, str]]  # what is named, and its colour


@dataclass(frozen=True)
class Figure:
    """A plot and its caption. `mark`: the colour of the branch that it is of."""

    title: str
    drawing: Markup
    mark: str = ""
    note: str = ""
    legend: Legend = field(default_factory=list)
    wide: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    strong: bool = False
    about: str = ""  # shown on hovering
    colour: str = ""  # of the group that the cell names


@dataclass(frozen=True)
class Table:
    """The first cell of each row names it."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Token:
    text: str
    tint: str  # a CSS class: the sign and the size of the gap
    about: str


@dataclass(frozen=True)
class Answer:
    step: int
    prompt: str
    tokens: list[Token]
    cut: int  # further tokens that are not shown
    facts: str


@dataclass(frozen=True)
class Pair:
    """An early and a late answer of one branch; to the same prompt where there are such."""

    group: str
    branch: str
    early: Answer
    late: Answer


@dataclass(frozen=True)
class Section:
    title: str
    about: str = ""
    legend: Legend = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    multiples: list[Figure] = field(default_factory=list)  # many small ones of one kind
    tables: list[Table] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def key(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    def __bool__(self) -> bool:
        return bool(self.figures or self.tables or self.pairs)
