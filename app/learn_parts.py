"""The Learn page as HTML: matrices to edit, the form of a kind, results, steps and explanations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from torch import Tensor

from app import learn_formulas, learn_state, learn_words, look
from app.form import Widget
from app.learn_formulas import Line, plain
from app.learn_maths import Applied, ByHand, Curve, by_hand
from app.learn_state import KNOB, MOST_SIDE, MOST_TOKENS, Lesson, State, cells, values_of
from app.markup import join, tag
from app.recipe_words import kind_name
from backend.lesson import Walk
from backend.methods import METHODS
from backend.recipes import parse

NOISE = 1e-6  # of the largest number: a few units of fp32's last place
LEAST_SHADE, MOST_SHADE = 8, 46  # per cent of colour behind a number: ink stays readable on it


def try_it(recipe: str) -> Markup:
    """The end of every section: the same recipe on a model."""
    link = tag(
        "a",
        "Try it on a model",
        href=f"/new?recipes={quote(recipe)}&edit=0",
        class_="button",
        data_carry=True,
    )
    return tag("p", link, " ", tag("code", recipe), class_="try-it")


# ---- matrices to edit ----------------------------------------------------------------------


def head(state: State) -> Markup:
    """What this page is, and matrices to begin with."""
    chips = [
        tag(
            "button",
            example.title,
            class_="chip",
            title=example.about,
            aria_pressed=str((example.w, example.x) == (state.w, state.x)).lower(),
            data_set={"w": example.w, "x": example.x, "cell": "", "column": ""},
        )
        for example in learn_state.examples()
    ]
    words = (
        "Change any number, any method, any knob: codes, errors and the formula follow at once. "
        "The address holds everything, so a link shows the same."
    )
    title = tag("h1", "What quantization does to one small matrix")
    start = tag("span", "Start with", class_="chip-title")
    group = tag("div", start, chips, class_="chips", role="group", aria_label="Start with")
    return join([title, tag("p", words, class_="facts"), group])


def editor(state: State, kept: Lesson) -> Markup:
    """W and x as fields; where the address holds no rectangle, the last that held."""
    w, x = editable(state.w, MOST_SIDE), editable(state.x, MOST_TOKENS)
    if not w or not x:
        w = cells(learn_state.numbers(kept.w))
        x = cells(learn_state.numbers(kept.x))
    rows, columns, tokens = len(w), len(w[0]), len(x)
    return join(
        [
            tag("div", tag("h2", "W ", tag("small", f"{rows} outputs × {columns} inputs")),
                sizes(state, rows, columns, tokens), class_="between wrap"),
            grid("w", "W", w, "output", "input"),
            tag("div", tag("h2", "x ", tag("small", f"{tokens} token{'s' * (tokens != 1)}, "
                "shown to the method and multiplied")), token_sizes(state, rows, columns, tokens),
                class_="between wrap"),
            grid("x", "x", x, "token", "input"),
            as_text(state),
        ]
    )  # fmt: skip


def editable(text: str, most: int) -> list[list[str]]:
    """The texts of a rectangle that fits the page, right or wrong numbers in it; [] for others."""
    table = cells(text)
    width = len(table[0])
    fits = len(table) <= most and width <= MOST_SIDE and all(len(row) == width for row in table)
    return table if fits else []


def grid(name: str, title: str, table: Sequence[Sequence[str]], row: str, column: str) -> Markup:
    """Fields in rows; arrow keys move between them (learn.js)."""
    lines = [
        tag("tr", [
            cell_field(name, cell, r, c, f"{title}, {row} {r + 1}, {column} {c + 1}")
            for c, cell in enumerate(cells_)
        ])
        for r, cells_ in enumerate(table)
    ]  # fmt: skip
    return tag("div", tag("table", tag("tbody", lines), class_="numbers-grid"), class_="scroll")


@lru_cache(maxsize=8192)
def cell_field(name: str, text: str, row: int, column: int, words: str) -> Markup:
    """One number to edit."""
    field = tag(
        "input", type="text", value=text, inputmode="decimal", autocomplete="off",
        spellcheck="false", class_="cell-field", id=f"{name}-{row}-{column}",
        aria_invalid="true" if wrong(text) else None, aria_label=words,
        data_cell={"name": name, "row": row, "column": column},
    )  # fmt: skip
    return tag("td", field)


def wrong(text: str) -> bool:
    """True if a cell holds no number."""
    try:
        learn_state.number("", text)
    except ValueError:
        return True
    return False


def sizes(state: State, rows: int, columns: int, tokens: int) -> Markup:
    """More and fewer outputs and inputs."""
    steps = [
        ("− row", "Remove the last output", rows > 1, (rows - 1, columns, tokens)),
        ("+ row", "Add an output", rows < MOST_SIDE, (rows + 1, columns, tokens)),
        ("− column", "Remove the last input", columns > 1, (rows, columns - 1, tokens)),
        ("+ column", "Add an input", columns < MOST_SIDE, (rows, columns + 1, tokens)),
    ]
    return size_buttons(state, steps)


def token_sizes(state: State, rows: int, columns: int, tokens: int) -> Markup:
    """More and fewer tokens."""
    steps = [
        ("− token", "Remove the last token", tokens > 1, (rows, columns, tokens - 1)),
        ("+ token", "Add a token", tokens < MOST_TOKENS, (rows, columns, tokens + 1)),
    ]
    return size_buttons(state, steps)


def size_buttons(
    state: State, steps: Iterable[tuple[str, str, bool, tuple[int, int, int]]]
) -> Markup:
    made = [
        tag("button", text, class_="tool", aria_label=words,
            data_set=learn_state.resized(state, *size))
        for text, words, possible, size in steps
        if possible
    ]  # fmt: skip
    return tag("span", made, class_="tools")


def as_text(state: State) -> Markup:
    """Both as text, to paste into."""
    fields = [
        tag("label", f"{title}: commas between numbers, a line or ; per row", for_=f"text-{name}")
        + tag("textarea", text.replace(";", "\n"), id=f"text-{name}", data_param=name, rows=3,
              spellcheck="false", class_="wide mono")
        for name, title, text in (("w", "W", state.w), ("x", "x", state.x))
    ]  # fmt: skip
    return tag("details", tag("summary", "As text, to paste a matrix"), fields, data_key="as-text")


# ---- the method and its knobs --------------------------------------------------------------


def controls(state: State, problem: str) -> Markup:
    """Every kind, the form of the chosen one, and what is wrong."""
    methods = [kind_chip(state, kind) for kind in METHODS.load() if shown(kind)]
    grids = [kind_chip(state, "rtn", grid) for grid in learn_state.grids()]
    return join(
        [
            tag("h2", "Method"),
            tag("div", methods, class_="chips", role="group", aria_label="Method"),
            tag("h3", "or a number format, rounded to nearest"),
            tag("div", grids, class_="chips", role="group", aria_label="Number format"),
            tag("p", problem or Markup(""), class_="problem", role="alert") if problem else None,
            knob_form(state),
        ]
    )


def shown(kind: str) -> bool:
    """False for what does not touch a linear."""
    return METHODS.find(kind).targets != frozenset({"kv_cache"})


def kind_chip(state: State, kind: str, grid_kind: str = "") -> Markup:
    """Switches to a kind; knobs that it has too stay."""
    values = values_of(state)
    here = state.kind == kind
    if grid_kind:
        here = here and values.get("format", "int") == grid_kind
    name = kind_name(grid_kind) if grid_kind else kind_name(kind)
    dot = tag("i", class_="dot", style=f"background:{look.family_colour(kind)}")
    return tag(
        "button",
        None if grid_kind else dot,
        name if name != "Int" else "Integers",
        class_="chip",
        aria_pressed=str(here).lower(),
        data_set=learn_state.switched(state, kind, grid_kind),
        data_key=f"kind-{kind}-{grid_kind}",
    )


def knob_form(state: State) -> Markup:
    """One line of idea, the knobs, the steps behind."""
    cls = METHODS.find(state.kind)
    values = values_of(state)
    rows = [knob_row(widget, values.get(widget.path, widget.default), widget.path in values)
            for widget in learn_state.knobs_of(state)]  # fmt: skip
    behind = tag(
        "div",
        tag("label", "then", for_="k-then"),
        tag("input", type="text", id="k-then", data_param="then", spellcheck="false",
            autocomplete="off", value=state.then, aria_describedby="k-then-help",
            placeholder=learn_state.AFTER_EXACT if cls.exact else "activations(bits=8)"),
        tag("p", "Steps that follow, as a recipe; none for no more.", id="k-then-help"),
        class_="field",
    )  # fmt: skip
    legend = tag("legend", kind_name(state.kind))
    about = tag("p", cls.summary(), class_="hint")
    return tag("fieldset", legend, about, tag("div", rows, behind, class_="fields"),
               data_key=f"form-{state.kind}")  # fmt: skip


@lru_cache(maxsize=1024)
def knob_row(widget: Widget, value: str, changed: bool) -> Markup:
    """A knob: its field is a URL parameter, so what is typed acts at once."""
    name = f"k-{widget.path.replace('.', '-')}"
    common: dict[str, Any] = {
        "id": name,
        "data_param": KNOB + widget.path,
        "aria_describedby": f"{name}-help",
    }
    choices = ("true", "false") if widget.kind == "switch" else widget.choices
    if choices:
        words = {"true": "on", "false": "off"}
        options = [tag("option", words.get(c, c), value=c, selected=c == value) for c in choices]
        box = tag("select", options, **common)
    else:
        box = tag(
            "input",
            type="text",
            value=value,
            spellcheck="false",
            autocomplete="off",
            inputmode={"whole": "numeric", "number": "decimal"}.get(widget.kind),
            **common,
        )
    default = widget.default if widget.default != "" else "empty"
    limits = "; ".join(p for p in (widget.bounds, f"default {default}") if p)
    told = tag("p", widget.help, " ", tag("span", f"({limits})", class_="bounds"),
               id=f"{name}-help")  # fmt: skip
    return tag("div", tag("label", widget.label, for_=name), box, told,
               class_="field changed" if changed else "field", data_key=name)  # fmt: skip


# ---- what comes out ------------------------------------------------------------------------


def result(state: State, done: Applied, walk: Walk | None) -> Markup:
    """The sentence, every matrix, the chosen weight in numbers, the bits."""
    chosen = chosen_cell(state, done)
    w, w_hat = done.lesson.w, done.w_hat
    error = difference(w_hat, w)
    tables = [
        number_table("Ŵ", "what x is multiplied by now", w_hat, chosen=chosen),
        number_table("Ŵ − W", "error of each weight", error, shade=error, chosen=chosen, pick=True),
    ]
    if done.q is not None:
        codes = done.q.codes.int()
        tables.insert(0, number_table("Codes", "what is stored", codes, chosen=chosen, pick=True))
        tables.insert(1, scales(done))
    if done.moved:
        tables.insert(0, number_table("s", "inputs are divided by it, columns of W multiplied",
                                      done.scale[None]))  # fmt: skip
    if done.x_hat is not None:
        tables.append(number_table("x̂", "inputs as the product sees them", done.x_hat,
                                   shade=difference(done.x_hat, done.lesson.x)))  # fmt: skip
    return join(
        [
            tag("h2", said(done), aria_live="polite", class_="learn-said"),
            notes(done),
            tag("div", tables, class_="matrices"),
            outputs(done),
            tag("div", cell_in_numbers(done, walk, chosen), bit_account(done), class_="two"),
            try_it(done.lesson.recipe),
        ]
    )


def difference(found: Tensor, exact: Tensor) -> Tensor:
    """found - exact, 0 where only fp32 arithmetic differs: that is no rounding to a grid."""
    error = found - exact
    return error.masked_fill(error.abs() <= NOISE * exact.abs().max(), 0)


def said(done: Applied) -> str:
    """The answer first."""
    worst = difference(done.w_hat, done.lesson.w).abs().max().item()
    bits = sum(done.bits.values())
    return (
        f"The output is off by {look.significant(100 * done.relative, 3)} %, the worst weight by "
        f"{plain(worst)}, at {bits:.2f} bits per weight."
    )


def notes(done: Applied) -> Markup | None:
    """Fallbacks and skips."""
    if not done.notes:
        return None
    items = [tag("li", text) for text in done.notes]
    return tag("div", tag("b", "Notes"), tag("ul", items), class_="notes-box")


def chosen_cell(state: State, done: Applied) -> tuple[int, int]:
    """The cell in the address, else the one of largest error."""
    error = difference(done.w_hat, done.lesson.w).abs()
    rows, columns = error.shape
    chosen = learn_state.place_of(state.cell, rows, columns)
    return chosen or divmod(int(error.argmax()), columns)


def number_table(
    title: str,
    about: str,
    values: Tensor,
    *,
    shade: Tensor | None = None,
    chosen: tuple[int, int] | None = None,
    pick: bool = False,
    done: int = 0,
    marked: int | None = None,
    names: Sequence[str] = (),
) -> Markup:
    """A matrix with its numbers; `shade` colours behind them, blue below 0 and orange above.

    `pick` makes cells choose themselves. Of its columns the first `done` are told apart, and
    column `marked` is framed.
    """
    most = shade.abs().max().item() if shade is not None else 0.0
    columns = [tag("th", name, scope="col") for name in names]
    lines = []
    for r, row in enumerate(values.tolist()):
        shown_cells = []
        for c, value in enumerate(row):
            tone = shade[r, c].item() / most if shade is not None and most else 0.0
            marks = {"picked": (r, c) == chosen, "done": c < done, "now": c == marked}
            look_ = " ".join(name for name, holds in marks.items() if holds)
            words = f"{title}, row {r + 1}, column {c + 1}" if pick else ""
            shown_cells.append(value_cell(plain(value), look_, tinted(tone), words, f"{r},{c}"))
        lines.append(tag("tr", shown_cells))
    head_ = tag("thead", tag("tr", columns)) if columns else None
    caption = tag("caption", tag("b", title), " ", tag("small", about))
    return tag("div", tag("table", caption, head_, tag("tbody", lines), class_="values"),
               class_="scroll matrix")  # fmt: skip


@lru_cache(maxsize=8192)
def value_cell(text: str, look_: str, style: str | None, words: str, place: str) -> Markup:
    """One number; with `words` it is a button that chooses the weight at `place`."""
    inner: Any = text
    if words:
        inner = tag("button", text, class_="cell-button", data_set={"cell": place},
                    aria_label=f"{words}: {text}")  # fmt: skip
    return tag("td", inner, class_=look_ or None, style=style)


def tinted(tone: float) -> str | None:
    """A background for −1..1: the sign is in the number too."""
    if abs(tone) < 1e-6:
        return None
    share = LEAST_SHADE + (MOST_SHADE - LEAST_SHADE) * abs(tone)
    return f"--tone:var(--{'over' if tone > 0 else 'under'});--share:{share:.0f}%"


def scales(done: Applied) -> Markup:
    """Every parameter of the grid, one table each."""
    assert done.q is not None
    made = [
        number_table(name, f"of the {covers(done.q.format.granularity)}",
                     value.float().reshape(len(value), -1))
        for name, value in done.q.params.items()
        if value.numel()
    ]  # fmt: skip
    return tag("div", made or tag("p", "No scales.", class_="hint"), class_="scales")


def covers(granularity: str) -> str:
    """What one scale covers, in words."""
    return {"tensor": "whole matrix", "row": "row", "group": "group of a row"}[granularity]


def outputs(done: Applied) -> Markup:
    """y exact and rounded, and the difference."""
    error = difference(done.y, done.exact)
    tables = [
        number_table("y = W x", "exact", done.exact),
        number_table("ŷ", "of the rounded layer", done.y),
        number_table("ŷ − y", f"mean square {plain(done.loss)}", error, shade=error),
    ]
    words = tag("h3", "Output, a row per token")
    return tag("div", words, tag("div", tables, class_="matrices"), class_="outputs")


def cell_in_numbers(done: Applied, walk: Walk | None, chosen: tuple[int, int]) -> Markup:
    """The formula with the numbers of one weight and its output."""
    row, column = chosen
    title = f"Weight in row {row + 1}, column {column + 1}: {plain(done.lesson.w[chosen].item())}"
    return tag(
        "div",
        tag("h3", title),
        formula_list(learn_formulas.of_cell(done, walk, row, column)),
        tag("h3", f"Output {row + 1} of the first token"),
        formula_list(learn_formulas.of_output(done, row)),
        tag("p", "Press a code or an error to see another weight.", class_="hint"),
        class_="in-numbers",
    )


def formula_list(lines: Iterable[Line]) -> Markup:
    """Formula left, numbers right."""
    pairs = [tag("dt", formula) + tag("dd", numbers) for formula, numbers in lines]
    return tag("dl", pairs, class_="formula")


def bit_account(done: Applied) -> Markup:
    """Bits per weight by part."""
    count = done.lesson.w.numel()
    rows = [
        tag("tr", tag("th", name.capitalize(), scope="row"),
            tag("td", f"{value:.2f}", class_="number"),
            tag("td", f"{value * count:.0f}", class_="number"))
        for name, value in done.bits.items()
        if value or name == "codes"
    ]  # fmt: skip
    total = sum(done.bits.values())
    rows.append(
        tag("tr", tag("th", tag("b", "Together"), scope="row"),
            tag("td", tag("b", f"{total:.2f}"), class_="number"),
            tag("td", tag("b", f"{total * count:.0f}"), class_="number"))
    )  # fmt: skip
    top = tag("tr", [tag("th", text, scope="col", class_="number" if at else None)
                     for at, text in enumerate(("Stored", "Bits per weight", "Bits"))])  # fmt: skip
    remark = (
        f"Scales weigh heavily on {count} weights; a layer of 4096 × 4096 shares each among "
        "hundreds or thousands."
    )
    return tag("div", tag("h3", "Bits"), tag("table", tag("thead", top), tag("tbody", rows)),
               tag("p", remark, class_="hint"), class_="bits")  # fmt: skip


# ---- three ways by hand --------------------------------------------------------------------

HOW = {
    "Clip": "A level is worth 1: round, and cut what lies past the last level.",
    "Scale": "Multiply W so that its range is the levels' range, round, divide again.",
    "Scale by inputs": "Enlarge columns with large inputs by s = mean|x| first (AWQ's idea, "
    "r = 1): their weights use more levels, and s is divided out of x.",
}


def hand_section(state: State, lesson: Lesson, bits: int) -> Markup:
    """Clipping, scaling, and scaling by inputs, beside each other."""
    ways = by_hand(lesson.w, lesson.x, bits)
    exact = lesson.x @ lesson.w.T
    title = f"Three ways to {2**bits} levels, by hand"
    best = min(ways, key=lambda way: way.loss(exact))
    answer = f"{best.title} errs least here: sum of squares {plain(round(best.loss(exact), 6))}."
    cards = [hand_card(way, lesson, exact, bits) for way in ways]
    recipe = next(way.recipe for way in ways if way.recipe)
    return join(
        [tag("h2", title), tag("p", answer), tag("div", cards, class_="hand"),
         try_it(best.recipe or recipe)]
    )  # fmt: skip


def hand_card(way: ByHand, lesson: Lesson, exact: Tensor, bits: int) -> Markup:
    """One way: levels, what they are worth, output."""
    steps = list(dict.fromkeys(plain(round(1 / v, 3)) for v in way.step.tolist()))
    factor = f"W × {steps[0]}" if len(steps) == 1 else f"W × ({', '.join(steps)})"
    lines: list[Line] = [("before rounding", factor)]
    if diagonal(lesson.w):
        codes = way.codes.diagonal()
        lines.append(("levels on the diagonal", listed(codes)))
        lines.append(("levels · x", listed(codes * lesson.x[0])))
        lines.append(("weights again", listed(way.w_hat.diagonal())))
    lines.append(("ŷ", listed(way.y[0])))
    lines.append(("y", listed(exact[0])))
    lines.append(("Σ error²", plain(round(way.loss(exact), 6))))
    load = None
    if way.recipe:
        first = parse(way.recipe)[0]
        load = tag("button", f"Load into {kind_name(first.kind)} above", class_="tool",
                   data_set=learn_state.taught(State("", "", first.kind), way.recipe))  # fmt: skip
    return tag("div", tag("h3", way.title), tag("p", HOW[way.title], class_="hint"),
               formula_list(lines), load, class_="hand-card")  # fmt: skip


def diagonal(w: Tensor) -> bool:
    """True if only the diagonal of a square matrix is not 0."""
    return w.shape[0] == w.shape[1] and bool((w - w.diag().diag() == 0).all())


def listed(values: Tensor) -> str:
    """(3, 6, 3)."""
    return f"({', '.join(plain(round(value, 4)) for value in values.tolist())})"


# ---- GPTQ ----------------------------------------------------------------------------------


def walk_section(state: State, done: Applied, walk: Walk) -> Markup:
    """One column at a time: its error, and what the rest takes over."""
    count = len(walk.order)
    at = min(int(state.column), count) if state.column.isdigit() else 0
    now, after = walk.before(at), walk.before(min(at + 1, count))
    names = [f"col {column + 1}" for column in walk.order]
    slider = tag("input", type="range", min="0", max=str(count), step="1", value=str(at),
                 id="learn-column", data_param="column", aria_label="Columns done")  # fmt: skip
    tools = [
        tag("button", text, class_="tool", data_set={"column": str(to) if to else ""},
            aria_disabled=None if 0 <= to <= count else "true", aria_label=words)
        for text, words, to in (("◂", "One column back", max(at - 1, 0)),
                                ("▸", "One column on", min(at + 1, count)))
    ]  # fmt: skip
    parts: list[Any] = [
        tag("h2", "GPTQ, column by column"),
        tag("p", walk_words(walk, at), aria_live="polite"),
        tag("div", tools[0], slider, tools[1], f"{at} of {count} done", class_="stepper"),
    ]
    if at < count:
        parts.append(
            tag("div",
                number_table("W now", "done, this column, to come", now, done=at, marked=at,
                             shade=now - walk.start, names=names),
                number_table("Change", "what this column's error adds to the rest",
                             (after - now)[:, at + 1 :], shade=(after - now)[:, at + 1 :],
                             names=names[at + 1 :]) if at + 1 < count else None,
                class_="matrices")
        )  # fmt: skip
        row = int(walk.errors[:, at].abs().argmax())
        parts.append(tag("h3", f"Row {row + 1}, which errs most here"))
        parts.append(formula_list(learn_formulas.of_gptq(walk, at, row)))
    else:
        parts.append(
            tag("div", number_table("Ŵ", "every column done", now, done=count, names=names,
                                    shade=now - walk.start), class_="matrices")
        )  # fmt: skip
    parts.append(try_it(done.lesson.recipe))
    return join(parts)


def walk_words(walk: Walk, at: int) -> str:
    """Where the walk stands."""
    if at == len(walk.order):
        return "Every column is rounded; the later ones have taken over errors of the earlier."
    column = walk.order[at] + 1
    error = walk.errors[:, at].square().sum().item()
    return (
        f"Column {column} is rounded next; its squared error, in units of the output's, is "
        f"{plain(error)}, and the columns still to come change so that the output changes least."
    )


# ---- curve and explanation -----------------------------------------------------------------


def curve_said(found: Curve) -> str:
    """The curve in one sentence."""
    least = min(found.loss)
    return (
        f"The output's mean squared error is least, {plain(least)}, at {found.knob} "
        f"{found.best:g}"
        + (f"; the form above has {found.now:g}." if found.now is not None else ".")
    )


def curve_head(found: Curve, as_table: bool) -> Markup:
    """Title and switch."""
    switch = tag("button", "Show as chart" if as_table else "Show as table", class_="tool",
                 aria_pressed=str(as_table).lower(),
                 data_set={"table": "" if as_table else "1"})  # fmt: skip
    return tag("div", tag("h2", f"Error over {found.knob}"), switch, class_="between")


def curve_foot(found: Curve, as_table: bool, recipe: str) -> Markup:
    """The sentence, the table if asked for, and the way to a model."""
    table = None
    if as_table:
        table = curve_table(found)
    return join([tag("p", curve_said(found), class_="facts"), table, try_it(recipe)])


def curve_table(found: Curve) -> Markup:
    """The curve's points."""
    rows = [
        tag("tr", tag("td", f"{at:g}", class_="number"), tag("td", plain(loss), class_="number"))
        for at, loss in zip(found.at, found.loss, strict=True)
    ]
    titles = (found.knob, "Mean squared error (lower is better)")
    top = tag("tr", [tag("th", title, scope="col", class_="number") for title in titles])
    table = tag("table", tag("thead", top), tag("tbody", rows))
    return tag("div", table, class_="scroll as-table")


def about(state: State, recipe: str) -> Markup:
    """The kind's section, formulas and presets; of its grid too where it has one."""
    grid_kind = grid_of(state)
    kinds = [kind for kind in (state.kind, grid_kind) if kind]
    parts = [
        join([tag("h2", learn_words.heading_of(kind)), learn_words.about(kind)]) for kind in kinds
    ]
    return join([tag("div", parts, id="about"), preset_chips(state, grid_kind), try_it(recipe)])


def grid_of(state: State) -> str:
    """The kind of the chosen number format; "" where the method has none."""
    widget = next((w for w in learn_state.knobs_of(state) if w.path == "format"), None)
    return values_of(state).get("format", widget.default) if widget else ""


def preset_chips(state: State, grid_kind: str) -> Markup | None:
    """Presets of the kind, to load; of rounding to nearest those with the chosen grid."""
    chips = [
        tag("button", name, class_="chip", title=text, data_set=learn_state.taught(state, text))
        for name, text in learn_words.presets_of(state.kind).items()
        if state.kind != "rtn" or learn_words.kinds_of(text)[1] == grid_kind
    ]
    if not chips:
        return None
    title = tag("span", "Presets", class_="chip-title")
    return tag("div", title, chips, class_="chips", role="group", aria_label="Presets")
