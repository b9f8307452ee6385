"""Named reads of the store, each a DataFrame. Missing is NaN, None or NA, never 0."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import pandas as pd

from results_db.events import Row
from results_db.store import Store

# What a number was measured under; in `wide` each is a column "<name>__<condition>".
CONDITIONS = (
    "n",
    "stderr",
    "unit",
    "better",
    "metric_id",
    "device",
    "dtype",
    "version",
    "storage",
    "data",
)
COUNTS = ("n", "version")

RUNS = """
    SELECT r.* EXCLUDE (seen_bytes),
           r.kind = 'run' AND coalesce(json_array_length(r.spec, '$.steps'), 0) = 0 AS is_baseline,
           coalesce(k.notes, 0) AS notes,
           coalesce(k.notes_text, '') AS notes_text
    FROM runs r LEFT JOIN (
        SELECT run_id, count(*) AS notes,
               string_agg(text, '\n' ORDER BY block NULLS FIRST, module, rowid) AS notes_text
        FROM notes GROUP BY run_id
    ) k USING (run_id)
"""

IS_RUN = "r.kind = 'run'"  # jobs of other kinds measure no model


def runs(store: Store) -> pd.DataFrame:
    """Every run, newest first, with `is_baseline` (no steps), `notes` and `notes_text`."""
    return store.frame(f"{RUNS} WHERE {IS_RUN} ORDER BY submitted DESC NULLS LAST, run_id")


def run(store: Store, run_id: str) -> pd.DataFrame:
    """One job of any kind as one row, or no row where the id is unknown."""
    return store.frame(f"{RUNS} WHERE r.run_id = $run_id", run_id=run_id)


def models(store: Store) -> pd.DataFrame:
    """Models that were run, the most used first: how many runs, how many done, the last one."""
    return store.frame(f"""
        SELECT model, revision, model_content, count(*) AS runs,
               count(*) FILTER (state = 'done') AS done, max(submitted) AS last_submitted
        FROM runs r WHERE {IS_RUN} GROUP BY ALL ORDER BY runs DESC, model, revision
    """)


def measurements(store: Store, model: str | None = None) -> pd.DataFrame:
    """Every number, one per row, with its run's label, recipe and model; of one model id or all."""
    sql = f"""
        SELECT m.*, r.label, r.recipe, r.model, r.model_content
        FROM measurements m JOIN runs r USING (run_id)
        WHERE {IS_RUN} AND ($model::VARCHAR IS NULL OR r.model = $model)
        ORDER BY r.submitted, m.run_id, m.name, m.metric_id, m.device, m.dtype
    """
    return store.frame(sql, model=model)


def layers(store: Store, run_id: str) -> pd.DataFrame:
    """Per-layer values of one run, in the order of its blocks."""
    sql = "FROM layers WHERE run_id = $run_id ORDER BY name, metric_id, block, module"
    return store.frame(sql, run_id=run_id)


def notes(store: Store, run_id: str) -> pd.DataFrame:
    """What the run's methods had to say, run-wide notes first."""
    sql = "FROM notes WHERE run_id = $run_id ORDER BY block NULLS FIRST, module, rowid"
    return store.frame(sql, run_id=run_id)


def items(store: Store, run_ids: Sequence[str], name: str) -> pd.DataFrame:
    """Scores per item of the measurement `name`; pair them only within metric, device, dtype."""
    sql = """
        FROM items WHERE run_id = ANY($run_ids) AND name = $name
        ORDER BY run_id, metric_id, device, dtype, item
    """
    return store.frame(sql, run_ids=list(run_ids), name=name)


def wide(store: Store, model_content: str | None = None) -> pd.DataFrame:
    """Runs that are done or measured in part, one column per name and one per condition of it.

    A run fills one row, and one more for every further device, dtype or setting under which
    a name was measured again: filter on `<name>__metric_id` before two names share an axis.
    """
    sql = f"{RUNS} WHERE {IS_RUN} AND ($content::VARCHAR IS NULL OR r.model_content = $content)"
    found = store.frame(f"{sql} ORDER BY submitted, run_id", content=model_content)
    measured = _spread(measurements(store))
    rows = found.drop(columns=["spec", "env", "error"]).merge(measured, on="run_id", how="left")
    has_numbers = rows["run_id"].isin(measured["run_id"])
    return rows[has_numbers | (rows["state"] == "done")].reset_index(drop=True)


def with_baseline(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`wide` rows with `<name>__delta` added: value / baseline - 1, as a fraction.

    The baseline is the latest run without steps of the same model content, measured under the
    same metric, version, device and dtype. Blank where there is none, or where it is 0.
    """
    return rows.assign(**{f"{name}__delta": _delta(rows, name) for name in names})


def _spread(measured: pd.DataFrame) -> pd.DataFrame:
    """Long measurements -> rows of `run_id` and the columns of every name."""
    records = [
        {"run_id": run_id} | _columns(choice)
        for run_id, group in measured.groupby("run_id", sort=False)
        for choice in _choices(cast(list[Row], group.to_dict("records")))
    ]
    names = sorted(measured["name"].unique())
    columns = [c for name in names for c in (name, *(f"{name}__{k}" for k in CONDITIONS))]
    spread = pd.DataFrame(records, columns=["run_id", *columns])
    counts = {f"{name}__{k}": "Int64" for name in names for k in COUNTS}
    return spread.astype({"run_id": "str"} | counts)


def _choices(measured: Sequence[Row]) -> Iterator[list[Row]]:
    """Measurements of one run -> every way to take one per name.

    Names keep to one device and dtype where they can: perplexity and divergence on two devices
    make two rows, not four, and a size measured once fills both.
    """
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in measured:
        by_name[row["name"]].append(row)
    places = [dict.fromkeys(map(_place, found)) for found in by_name.values()]
    repeated = dict.fromkeys(place for own in places if len(own) > 1 for place in own)
    seen = set()
    for place in repeated or [None]:
        at_place = ([r for r in rows if _place(r) == place] or rows for rows in by_name.values())
        for choice in _combinations(at_place):
            key = frozenset((row["name"], *_setting(row)) for row in choice)
            if key not in seen:
                seen.add(key)
                yield choice


def _combinations(candidates: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """Rows of each name -> one of each; names with the same settings (one metric's) move as one."""
    families: dict[tuple, list[list[Row]]] = defaultdict(list)
    for rows in candidates:
        families[tuple(map(_setting, rows))].append(rows)
    for picks in itertools.product(*(range(len(settings)) for settings in families)):
        pairs = zip(picks, families.values(), strict=True)
        yield [rows[pick] for pick, family in pairs for rows in family]


def _setting(row: Row) -> tuple[str, str, str]:
    return row["metric_id"], row["device"], row["dtype"]


def _place(row: Row) -> tuple[str, str]:
    return row["device"], row["dtype"]


def _columns(choice: Sequence[Row]) -> Row:
    values = {row["name"]: row["value"] for row in choice}
    return values | {f"{row['name']}__{k}": row[k] for row in choice for k in CONDITIONS}


def _delta(rows: pd.DataFrame, name: str) -> pd.Series:
    if name not in rows:
        return pd.Series(float("nan"), index=rows.index)
    same = ["model_content", *(f"{name}__{k}" for k in ("metric_id", "version", "device", "dtype"))]
    usable = rows["is_baseline"] & rows[name].notna() & (rows[name] != 0)
    found = rows[usable].dropna(subset=same).sort_values("submitted", na_position="first")
    baseline = found.drop_duplicates(same, keep="last")[[*same, name]]
    beside = rows[same].merge(baseline, on=same, how="left", validate="many_to_one")
    return rows[name] / beside[name].set_axis(rows.index) - 1


def kernel_jobs(store: Store) -> pd.DataFrame:
    """Bench jobs that have times, the newest first: device, threads, rows and the environment."""
    return store.frame("""
        SELECT t.job_id, any_value(t.device) AS device, any_value(t.threads) AS threads,
               count(*) AS timed, max(t.measured_at) AS measured_at, any_value(r.env) AS env
        FROM kernel_times t LEFT JOIN runs r ON r.run_id = t.job_id
        GROUP BY t.job_id ORDER BY measured_at DESC, t.job_id DESC
    """)


def kernel_times(store: Store, job_id: str) -> pd.DataFrame:
    """Every row of a bench job, products that were wrong or unsteady included."""
    sql = "FROM kernel_times WHERE job_id = $job_id ORDER BY n, k, m, kernel, weight, act"
    return store.frame(sql, job_id=job_id)


def ceilings(store: Store, job_id: str) -> dict[str, float]:
    """{name: value} of what the device could do in a bench job: GB/s, TFLOP/s, microseconds."""
    found = store.frame("FROM ceilings WHERE job_id = $job_id", job_id=job_id)
    return dict(zip(found["name"], found["value"], strict=True))
