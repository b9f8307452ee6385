"""What judge jobs said, read back: verdicts, grades, games, preferences, and the votes they make.

A job has one judge, asked in one way, so numbers are per job and never pooled over jobs. Variants
go by the names that votes have. The statistics are `judging.py`'s and `length_control.py`'s.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from hashlib import sha256

import numpy as np
import pandas as pd

from results_db.events import Row
from results_db.judging import (
    Agreement,
    PositionReport,
    agreement,
    games_table,
    position_report,
    reconcile,
)
from results_db.length_control import WinRate, win_rate
from results_db.store import Store
from results_db.variants import variant_names
from results_db.vote import Vote
from results_db.vote_table import VoteTable
from results_db.votes import Votes

SETTLED = ("empty", "identical")  # flags of verdicts that no judge was asked for
WINNERS = {"model_1": "model_a", "model_2": "model_b", "tie": "tie"}
SAMPLED = ("temperature", "top_p", "max_new", "seed")
TIE = 1.5  # between 1, the first is better, and 2

JOBS = """
    SELECT r.run_id AS job_id, r.label, r.recipe AS title, r.model, r.state, r.artifact_id,
           r.submitted, r.finished, any_value(v.style) AS style, any_value(v.judge_id) AS judge_id,
           coalesce(
               string_agg(DISTINCT nullif(v.judge, ''), ', ' ORDER BY nullif(v.judge, '')),
               json_extract_string(any_value(r.spec), '$.judge_model.model'),
               json_extract_string(any_value(r.spec), '$.judge_model.run'), ''
           ) AS judge,
           count(v.job_id) AS verdicts, count(*) FILTER (v.failed <> '') AS failed,
           count(*) FILTER (v.flags LIKE '%empty%') AS empty,
           count(*) FILTER (v.flags LIKE '%identical%') AS identical,
           count(*) FILTER (v.flags LIKE '%cut%') AS cut,
           coalesce(sum(v.attempts), 0)::BIGINT AS requests,
           coalesce(sum(v.prompt_tokens), 0)::BIGINT AS prompt_tokens,
           coalesce(sum(v.completion_tokens), 0)::BIGINT AS completion_tokens
    FROM runs r LEFT JOIN verdicts v ON v.job_id = r.run_id
    WHERE r.kind = 'judge' AND ($model = '' OR r.model = $model)
    GROUP BY ALL ORDER BY r.submitted DESC NULLS LAST, r.run_id
"""

# One row per item of which all games are there; `one` and `two` are seen from model_1's side.
GAMES = """
    SELECT v.question, v.category, v.language, v.turn, v.run_a, v.run_b,
           any_value(v.games) AS games,
           max(v.preference) FILTER (NOT v.swapped) AS one,
           max(v.preference) FILTER (v.swapped) AS two,
           bool_or(v.failed <> '') AS failed, bool_or(v.flags LIKE '%empty%') AS empty,
           bool_or(v.flags LIKE '%identical%') AS identical,
           max(v.judged_at) AS judged_at, sum(v.latency_s) AS latency_s,
           string_agg(DISTINCT v.flags, ',' ORDER BY v.flags) FILTER (v.flags <> '') AS flags,
           any_value(a.characters) AS length_1, any_value(b.characters) AS length_2
    FROM verdicts v
    LEFT JOIN judged_answers a ON (a.job_id, a.run_id, a.question, a.turn)
                                = (v.job_id, v.run_a, v.question, v.turn)
    LEFT JOIN judged_answers b ON (b.job_id, b.run_id, b.question, b.turn)
                                = (v.job_id, v.run_b, v.question, v.turn)
    WHERE v.job_id = $job_id AND v.run_b <> ''
    GROUP BY v.question, v.category, v.language, v.turn, v.run_a, v.run_b
    HAVING count(*) = any_value(v.games)
    ORDER BY v.question, v.turn, v.run_a, v.run_b
"""


def jobs(store: Store, model: str = "") -> pd.DataFrame:
    """Judge jobs, newest first: who judged, how many verdicts of which sort, what was asked."""
    return store.frame(JOBS, model=model)


def verdicts(store: Store, job_id: str) -> pd.DataFrame:
    """Every verdict of a job as it was given, with `model_a` and `model_b`."""
    sql = "FROM verdicts WHERE job_id = $job_id ORDER BY question, turn, run_a, run_b, swapped"
    return _named(store, store.frame(sql, job_id=job_id), {"run_a": "model_a", "run_b": "model_b"})


def answers(store: Store, job_id: str) -> pd.DataFrame:
    """Every answer that was judged, with `model`."""
    sql = "FROM judged_answers WHERE job_id = $job_id ORDER BY question, turn, run_id"
    return _named(store, store.frame(sql, job_id=job_id), {"run_id": "model"})


def judgments(store: Store, job_id: str) -> pd.DataFrame:
    """model, question, category, turn, score, flags: what `judging.grades` takes; NaN is failed."""
    rows = verdicts(store, job_id)
    single = rows[rows["run_b"] == ""].rename(columns={"model_a": "model"})
    columns = ["model", "question", "category", "language", "turn", "score", "flags", "failed"]
    return single[columns].reset_index(drop=True)


def games(store: Store, job_id: str) -> pd.DataFrame:
    """One row per pair, question and turn: what `judging.games_table` takes.

    `first` and `second` are the verdicts of the two orders by the side shown (A, B, tie, error),
    `preference` their mean from 1 (model_1 is better) to 2, NaN if one failed. Where one order
    was judged, `second` is what the same verdict would be in the other; `orders` says how many.
    `settled`: nobody was asked. Items of which a game is still missing are left out.
    """
    found = store.frame(GAMES, job_id=job_id)
    rows = _named(store, found, {"run_a": "model_1", "run_b": "model_2"})
    one, two = rows["one"].fillna(rows["two"]), rows["two"].fillna(rows["one"])
    told = rows.assign(
        first=_said(one, rows["failed"]),
        second=_said(3 - two, rows["failed"]),
        preference=((one + two) / 2).mask(rows["failed"]),
        settled=rows["empty"] | rows["identical"],
        orders=rows["games"],
    )
    return told.drop(columns=["one", "two", "games"])


def win_table(store: Store, job_id: str) -> pd.DataFrame:
    """Wins, losses, ties, errors and rates of every variant of a pairwise job."""
    return games_table(games(store, job_id))


def bias(store: Store, job_id: str) -> PositionReport:
    """What the order shown did to the judge's verdicts, over the pairs it was asked about twice."""
    rows = games(store, job_id)
    return position_report(rows[(rows["orders"] == 2) & ~rows["settled"]])


def win_rates(store: Store, job_id: str, minimum: int = 100) -> pd.DataFrame:
    """AlpacaEval's numbers for every pair: model_2 against model_1, in percent, with `notes`.

    `length_controlled` is blank under `minimum` comparisons and wherever the fit does not hold.
    """
    rows = []
    for (one, two), pair in games(store, job_id).groupby(["model_1", "model_2"], sort=False):
        lengths = (pair[name].to_numpy(dtype=np.float64) for name in ("length_1", "length_2"))
        rate = win_rate(pair["preference"], *lengths, minimum=minimum)
        rows.append({"model_1": one, "model_2": two} | asdict(rate))
    columns = ["model_1", "model_2", *(f.name for f in fields(WinRate))]
    return pd.DataFrame(rows, columns=columns)


def agreement_with_people(votes: Votes, model: str = "", judge: str = "") -> Agreement:
    """How often a judge (or all of them) and people say the same of a pair on a prompt."""
    people = votes.frame(model=model, kinds=("human",), text=True)
    said = votes.frame(model=model, kinds=("judge",), text=True)
    said = said[said["judge"] == judge] if judge else said
    return agreement(people[people["prompt"] != ""], said)


def reply_seconds(store: Store, model: str, judge_id: str) -> float | None:
    """Median time of a reply from the judge of this id, else from this model; None if there was
    none."""
    sql = """
        SELECT median(v.latency_s) FILTER (v.judge_id = $judge_id) AS own,
               median(v.latency_s) AS like_it
        FROM verdicts v JOIN runs r ON r.run_id = v.job_id
        WHERE v.failed = '' AND v.attempts > 0 AND (v.judge_id = $judge_id OR ($model <> ''
              AND json_extract_string(r.spec, '$.judge_model.model') = $model))
    """
    found = store.frame(sql, model=model, judge_id=judge_id).iloc[0]
    times = [float(t) for t in (found["own"], found["like_it"]) if pd.notna(t)]
    return times[0] if times else None


def said(
    store: Store,
    job_id: str,
    *,
    search: str = "",
    failed: bool = False,
    offset: int = 0,
    limit: int = 20,
) -> tuple[pd.DataFrame, int]:
    """Some verdicts of a job as they were given, with what was asked and answered -> rows, total.

    Every word of `search` must occur in question, answers, reply or reason, whatever its case.
    """
    words = search.lower().split()
    has = [f"contains(text_of_all, $word_{at})" for at in range(len(words))]
    sql = f"""
        WITH whole AS (
            SELECT v.*, coalesce(a.prompt, '') AS prompt, coalesce(a.text, '') AS answer_a,
                   coalesce(b.text, '') AS answer_b,
                   lower(concat_ws(chr(10), v.question, v.category, v.failed, v.text, v.flags,
                                   a.prompt, a.text, b.text)) AS text_of_all
            FROM verdicts v
            LEFT JOIN judged_answers a ON (a.job_id, a.run_id, a.question, a.turn)
                                        = (v.job_id, v.run_a, v.question, v.turn)
            LEFT JOIN judged_answers b ON (b.job_id, b.run_id, b.question, b.turn)
                                        = (v.job_id, v.run_b, v.question, v.turn)
            WHERE v.job_id = $job_id
        )
        SELECT * EXCLUDE (text_of_all), count(*) OVER () AS total FROM whole
        WHERE {" AND ".join(["(NOT $failed OR failed <> '')", *has])}
        ORDER BY question, turn, run_a, run_b, swapped LIMIT $limit OFFSET $offset
    """
    given = {f"word_{at}": word for at, word in enumerate(words)}
    rows = store.frame(sql, job_id=job_id, failed=failed, limit=limit, offset=offset, **given)
    named = _named(store, rows, {"run_a": "model_a", "run_b": "model_b"})
    return named.drop(columns="total"), int(rows["total"].iloc[0]) if len(rows) else 0


def agreement_of(store: Store, job_id: str) -> Agreement:
    """How often a pairwise job and people say the same of a pair on a prompt."""
    made = votes_of(store, job_id)
    columns = ["model_a", "model_b", "winner", "prompt"]
    judged = pd.DataFrame([[getattr(vote, n) for n in columns] for vote in made], columns=columns)
    model = made[0].model if made else ""
    people = VoteTable(store).frame(model=model, kinds=("human",), text=True, columns=columns)
    asked = people["prompt"].isin(judged["prompt"]) & (people["prompt"] != "")
    return agreement(people[asked], judged)


def votes_of(store: Store, job_id: str) -> list[Vote]:
    """A pairwise job's reconciled verdicts as votes of the kind "judge"; errors make none.

    A battle is named after all that decided it, so that two jobs that asked just the same make
    the same battles and the log takes each once.
    """
    job = next((j for j in _records(jobs(store)) if j["job_id"] == job_id), None)
    if job is None:
        raise ValueError(f"there is no judge job {job_id!r}")
    talks = _talks(_records(answers(store, job_id)))
    return [
        _vote(job, item, verdict, talks)
        for item in _records(games(store, job_id))
        if (verdict := reconcile(item["first"], item["second"])) != "error"
        and item["model_1"] != item["run_a"]
        and item["model_2"] != item["run_b"]
    ]


def cast_votes(store: Store, votes: Votes, job_id: str = "") -> int:
    """Cast what a finished job says, or all of them, and the log lacks -> how many it took."""
    chosen = [job for job in finished(store) if job_id in ("", job)]
    return sum(votes.cast_all(votes_of(store, job)) for job in chosen)


def finished(store: Store) -> dict[str, datetime]:
    """{judge job that is done: when it was}."""
    sql = "SELECT run_id, finished FROM runs WHERE kind = 'judge' AND state = 'done' ORDER BY 1"
    return dict(store.frame(sql).itertuples(index=False, name=None))


class VoteCaster:
    """Casts the votes of judge jobs as they end; asking it often costs next to nothing."""

    def __init__(self, store: Store, votes: Votes) -> None:
        self._store, self._votes = store, votes
        self._version = -1
        self._cast: dict[str, datetime] = {}

    def cast(self) -> int:
        """Look for jobs that have ended since -> how many votes they made."""
        if self._version == self._store.version:
            return 0
        version, counted = self._store.version, 0
        for job, ended in finished(self._store).items():
            if self._cast.get(job) != ended:
                counted += self._votes.cast_all(votes_of(self._store, job))
                self._cast[job] = ended
        self._version = version
        return counted


@dataclass(frozen=True)
class _Talk:
    """A variant's conversation about one question, turn by turn."""

    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sampled: Row = field(default_factory=dict)  # the last turn's settings

    def messages(self, turn: int) -> list[dict[str, str]]:
        """As a vote has them, up to a turn."""
        said = zip(self.prompts[:turn], self.texts[:turn], strict=True)
        pairs = ((("user", prompt), ("assistant", text)) for prompt, text in said)
        return [{"role": role, "content": text} for pair in pairs for role, text in pair]


def _talks(rows: Sequence[Row]) -> dict[tuple[str, str], _Talk]:
    """Answers in order of their turns -> {(run id, question): conversation}."""
    talks: dict[tuple[str, str], _Talk] = defaultdict(_Talk)
    for row in rows:
        talk = talks[row["run_id"], row["question"]]
        talk.prompts.append(row["prompt"])
        talk.texts.append(row["text"])
        talk.tokens.append(int(row["tokens"] or 0))
        talk.sampled.update({name: row[name] for name in SAMPLED})
    return talks


def _vote(job: Row, item: Row, verdict: str, talks: Mapping[tuple[str, str], _Talk]) -> Vote:
    turn = int(item["turn"])
    a, b = (talks[item[run], item["question"]] for run in ("run_a", "run_b"))
    named = [job["artifact_id"], item["question"], turn, item["model_1"], item["model_2"]]
    kept = ("style", "judge_id", "job_id")
    return Vote(
        battle_id=f"judge-{sha256(json.dumps(named).encode()).hexdigest()[:24]}",
        model=job["model"],
        model_a=item["model_1"],
        model_b=item["model_2"],
        winner=WINNERS[verdict],
        kind="judge",
        judge=job["judge"],
        tstamp=item["judged_at"].replace(tzinfo=UTC).timestamp(),
        turn=turn,
        language=item["language"],
        category=item["category"],
        prompt="\n\n".join(a.prompts[:turn]),
        conversation_a=a.messages(turn),
        conversation_b=b.messages(turn),
        tokens_a=sum(a.tokens[:turn]),
        tokens_b=sum(b.tokens[:turn]),
        run_a=item["run_a"],
        run_b=item["run_b"],
        seed_a=int(a.sampled["seed"]),
        seed_b=int(b.sampled["seed"]),
        settings=a.sampled | {name: job[name] for name in kept} | {"orders": int(item["orders"])},
        flags=tuple(flag for flag in SETTLED if item[flag]),
    )


def _records(rows: pd.DataFrame) -> list[Row]:
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def _named(store: Store, rows: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows with the variants' names beside their run ids; a run that is gone keeps its id."""
    names = variant_names(store)
    named = {new: rows[old].map(lambda run: names.get(run, run)) for old, new in columns.items()}
    return rows.assign(**named)


def _said(preference: pd.Series, failed: pd.Series) -> np.ndarray:
    """Preference for the side shown second -> A, B, tie or error."""
    told = np.select([failed, preference < TIE, preference > TIE], ["error", "A", "B"], "tie")
    return told.astype(object)
