"""What the leaderboard says in sentences: who is worse than 16 bits, and what that rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.downloads import WRITERS
from app.leaderboard_rows import ANCHORED, IMPORTED, Board, kinds_of
from app.markup import join, tag
from results_db.ratings import FEW_VOTES

NAMED = 3  # variants a sentence names; the rest are counted
WHO = {"human": "people", "judge": "the judge", "auto": "identical answers", "import": "voters"}
WHY_OUT = {
    "leak": "names in the text",
    "duplicate": "duplicates",
    "late": "too late",
    "unfinished": "unfinished answers",
    "retracted": "taken back",
    "named": "names were shown",
    "itself": "a variant against itself",
}
STYLE = {
    "length": "longer answers",
    "headers": "more headings",
    "lists": "more list items",
    "bold": "more bold text",
}


def headline(board: Board) -> str:
    """What one would tell a colleague about these votes."""
    if not board.votes:
        return _nothing(board)
    main = board.people.table
    main = main[(main["group"] == main["group"].iloc[0]) & ~main["few"]]
    start = "" if board.picks.tab == IMPORTED else f"On {board.model}, "
    who = together(board)
    who = who if start else who[0].upper() + who[1:]
    verb = "finds" if who.endswith("judge") and " and " not in who else "find"
    base = main[main["variant"].isin(_baselines(board))]
    if len(base):
        return start + _against_baseline(board, main, who, verb) + "."
    return start + _against_each_other(board, main, who) + "."


def together(board: Board) -> str:
    """Whose votes the ratings rest on: `people and the judge`."""
    return " and ".join(WHO[kind] for kind in kinds_of(board.picks))


def _nothing(board: Board) -> str:
    if board.picks.tab == IMPORTED:
        return "No imported battle passes these filters."
    picks = board.picks
    if picks.category or picks.language or picks.voters or picks.clean or picks.style:
        return f"No vote on variants of {board.model} passes these filters."
    count = int((~board.rows["is_baseline"]).sum())
    if not count:
        return f"Nobody has voted on variants of {board.model} yet."
    one = "1 variant is" if count == 1 else f"{count} variants are"
    return f"On {board.model}, {one} measured and nobody has voted yet."


def _baselines(board: Board) -> set[str]:
    return set(board.rows["variant"][board.rows["is_baseline"]])


def _against_baseline(board: Board, main: pd.DataFrame, who: str, verb: str) -> str:
    rivals = main[~main["variant"].isin(_baselines(board))]
    worse, better = rivals[rivals["high"] < ANCHORED], rivals[rivals["low"] > ANCHORED]
    same = len(rivals) - len(worse) - len(better)
    parts = []
    if len(worse):
        parts.append(f"{names(board, worse['variant'][::-1])} worse")
    if len(better):
        parts.append(f"{names(board, better['variant'])} better")
    if not parts:
        one = "the other variant" if same == 1 else f"any of {same} variants"
        cannot = "cannot tell" if same else "have judged only"
        return f"{who} {cannot} {one if same else '16-bit'}{' from 16-bit' if same else ''} yet"
    rest = f", and cannot tell {'the other' if same == 1 else f'{same} others'} from it"
    return f"{who} {verb} {' and '.join(parts)} than 16-bit{rest if same else ''}"


def _against_each_other(board: Board, main: pd.DataFrame, who: str) -> str:
    if len(main) < 2:
        return f"{who} have cast too few votes to order anything"
    first = main[main["rank"] == 1]
    if len(first) == len(main):
        return f"{who} cannot tell these {len(main)} apart yet"
    if len(first) == 1:
        return f"{who} put {board.name(str(first['variant'].iloc[0]))} clearly first"
    others = len(main) - len(first)
    rest = "the other one" if others == 1 else f"the other {others}"
    return f"{who} put {names(board, first['variant'])} ahead of {rest}"


def names(board: Board, variants: Sequence[str] | pd.Series) -> str:
    """`A, B and 4 others`."""
    listed = [board.name(str(variant)) for variant in variants]
    if len(listed) > NAMED + 1:
        return f"{', '.join(listed[:NAMED])} and {len(listed) - NAMED} others"
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))


# ---- what it rests on ----------------------------------------------------------------------


def facts(board: Board) -> Iterator[Markup | str]:
    """Every condition of the ratings in a sentence, the ones to mind first."""
    yield from _mixed(board)
    if board.votes or board.left_out:
        yield _counted(board)
    if not board.votes:
        return
    yield _scale(board)
    yield from _notes(board)
    yield from _groups(board)
    yield from _style(board)
    yield from _few(board)
    yield from _needed(board)
    yield from _fragile(board)
    yield from _agreement(board)


def _mixed(board: Board) -> Iterator[Markup]:
    if len(kinds_of(board.picks)) > 1:
        yield tag("b", f"The ratings mix votes of {together(board)}.")


def _counted(board: Board) -> Markup:
    voters = f"{look.whole(board.voters)} voter{'s' if board.voters != 1 else ''}"
    total = sum(board.left_out.values())
    whys = ", ".join(f"{WHY_OUT[why]} {look.whole(n)}" for why, n in board.left_out.items())
    out = f"; {look.whole(total)} left out ({whys})" if total else ""
    odd = ""
    if board.anomalous:
        count = f"{len(board.anomalous)} voter{'s' if len(board.anomalous) > 1 else ''}"
        odd = f"; {count} flagged as anomalous, {'left out' if board.picks.clean else 'counted'}"
    files = [
        tag("a", kind.upper(), href=f"/download/battles.{kind}", download=True) for kind in WRITERS
    ]
    return join(
        [
            tag("b", f"{look.whole(board.votes)} votes"),
            f" by {voters}{out}{odd}. Every battle as ",
            join(files, ", "),
            ".",
        ]
    )


def _scale(board: Board) -> str:
    fixed = board.people.estimate.anchor
    start = (
        f"{board.name(fixed[0])} is fixed at {fixed[1]:.0f}; the others' intervals are those of "
        "their difference to it"
        if fixed
        else "The mean rating is 1000"
    )
    kind = {"sandwich": "sandwich", "bootstrap": "bootstrap, 500 rounds", "model": "model-based"}
    return (
        f"{start}. 95 % intervals ({kind[board.people.estimate.interval]}); a rank counts the "
        "variants whose whole interval lies above, so overlapping ones share it."
    )


def _notes(board: Board) -> Iterator[str]:
    """What the fit had to do, with names in place of ids."""
    known = sorted(board.people.estimate.models, key=len, reverse=True)
    for note in board.people.estimate.notes:
        for variant in known:
            note = note.replace(variant, board.name(variant))
        yield note


def _groups(board: Board) -> Iterator[str]:
    if board.people.groups > 1:
        yield (
            f"The variants fall into {board.people.groups} groups that no battle links: ratings "
            "compare only within one, so the groups are listed apart."
        )


def _style(board: Board) -> Iterator[str]:
    effects: Mapping[str, Mapping[str, float]] = board.people.estimate.style
    if not effects:
        return
    told = [
        f"{STYLE[name]} {effect['elo']:+.0f}".replace("-", "−")
        for name, effect in effects.items()
        if effect["low"] > 0 or effect["high"] < 0
    ]
    found = f"; what a typical difference is worth in points: {', '.join(told)}" if told else ""
    none = "" if told else "; no such difference clearly moves votes"
    yield (
        f"Same style: as if all answers were equally long and laid out alike{found}{none}. "
        "Votes whose answers are not known are left out."
    )


def _few(board: Board) -> Iterator[str]:
    count = int(board.people.table["few"].sum())
    if count:
        them = "1 variant has" if count == 1 else f"{count} variants have"
        yield f"{them} fewer than {FEW_VOTES} votes, greyed and without a rank."


def _needed(board: Board) -> Iterator[str]:
    """The pair that is nearest to being told apart; with the 16-bit model where it is rated."""
    few = set(board.people.table["variant"][board.people.table["few"]])
    table = board.needed[(board.needed["needed"] > 0) & (board.needed["needed"] < 1e7)]
    table = table[~table["model_a"].isin(few) & ~table["model_b"].isin(few)]
    base = _baselines(board)
    with_base = table[table["model_a"].isin(base) | table["model_b"].isin(base)]
    table = with_base if len(with_base) else table
    if len(table):
        pair = table.sort_values("needed", kind="stable").iloc[0]
        a, b = board.name(pair["model_a"]), board.name(pair["model_b"])
        more = look.whole(float(f"{pair['needed']:.2g}"))
        yield f"About {more} more votes between them would tell {a} from {b}."


def _fragile(board: Board) -> Iterator[Markup]:
    found = board.fragile
    if found is None:
        return
    dropped = "this 1 vote" if found.k == 1 else f"these {look.whole(found.k)} votes"
    sentence = (
        f"The top rank would pass from {board.name(found.top)} to {board.name(found.rival)} "
        f"if {dropped} ({look.percent(found.share)}) were dropped."
    )
    lines = [tag("li", _vote(board, record)) for record in rows.records(found.votes.head(20))]
    more = len(found.votes) - 20
    rest = tag("li", f"and {more} more kinds of votes") if more > 0 else None
    which = tag("details", tag("summary", "Which?"), tag("ul", lines, rest), data_key="fragile")
    yield join([sentence, " ", which])


def _vote(board: Board, record: rows.Record) -> str:
    a, b = (board.name(str(record[side])) for side in ("model_a", "model_b"))
    said = {"model_a": f"{a} over {b}", "model_b": f"{b} over {a}"}
    return f"{look.whole(record['count'])} × {said.get(record['winner'], f'{a} and {b} tied')}"


def _agreement(board: Board) -> Iterator[str]:
    found = board.agreement
    if "all" not in found:
        return
    items = f"{look.whole(found['all_items'])} pairs of answers"
    decided = (
        f", and of {look.percent(found['decided'])} where both prefer a side (chance: 50.0 %)"
        if "decided" in found
        else ""
    )
    yield (
        f"Judge and people say the same of {look.percent(found['all'])} of votes on {items} "
        f"that both have judged (chance: 33.3 %){decided}."
    )
