"""What one mining job found, prompt by prompt: against a brute force over plain rows."""

import json
import random

import pandas as pd
import pytest
from test_mined import mined, spec

from results_db.mined import prompts_of, variants_of

RUNS, PROMPTS = ["r0", "r1", "r2"], [f"p{i:02}" for i in range(25)]


@pytest.fixture
def rows(store) -> list[dict]:
    rng = random.Random(1)
    made = [
        mined(
            run,
            prompt,
            kld=None if rng.random() < 0.1 else round(rng.random(), 1),
            departs=rng.randrange(4),
            identical=rng.random() < 0.4,
            category=rng.choice(["math", "chat"]),
        )
        for prompt in PROMPTS
        for run in RUNS
        if rng.random() < 0.9
    ]
    store.ingest("job", spec(), made, 100)
    store.ingest("other", spec(), [mined("r0", "p00", kld=9.0)], 100)
    return made


def ranked(rows: list[dict]) -> list[tuple[str, float | None, int | None]]:
    """(prompt, largest divergence, earliest parting), most telling first."""
    found = []
    for prompt in {row["prompt_id"] for row in rows}:
        own = [row for row in rows if row["prompt_id"] == prompt]
        klds = [row["kld"] for row in own if row["kld"] is not None]
        partings = [row["departs"] for row in own if not row["identical"]]
        found.append((prompt, max(klds, default=None), min(partings, default=None)))

    def key(item: tuple[str, float | None, int | None]) -> tuple:
        prompt, kld, parts = item
        return kld is None, -(kld or 0), parts is None, parts or 0, prompt

    return sorted(found, key=key)


@pytest.mark.parametrize("run", ["", "r1"])
def test_prompts_come_by_divergence_in_pages(store, rows, run):
    wanted = ranked([row for row in rows if run in ("", row["run_id"])])
    seen = []
    for offset in range(0, len(wanted) + 7, 7):
        page, total = prompts_of(store, "job", run=run, offset=offset, limit=7)
        assert total == (len(wanted) if offset < len(wanted) else 0)
        seen += page.drop_duplicates("prompt_id")["prompt_id"].tolist()
        for _, own in page.groupby("place"):
            same = [
                r["identical"]
                for r in rows
                if r["prompt_id"] == own["prompt_id"].iloc[0] and run in ("", r["run_id"])
            ]
            assert own["identical"].iloc[0] == pytest.approx(sum(same) / len(same))
            assert own["variants"].iloc[0] == len(own) == len(same)
            klds = own["kld"].dropna().tolist()
            assert klds == sorted(klds, reverse=True)
    assert seen == [prompt for prompt, *_ in wanted]


def test_search_looks_at_text_category_and_id(store, rows):
    for search in ("TEXT OF P07", "p07"):
        page, total = prompts_of(store, "job", search=search)
        assert (total, set(page["prompt_id"])) == (1, {"p07"})
    math = {row["prompt_id"] for row in rows if row["category"] == "math"}
    page, total = prompts_of(store, "job", search="math", limit=100)
    assert set(page["prompt_id"]) == math
    assert prompts_of(store, "job", search="%' OR true --")[1] == 0
    assert prompts_of(store, "gone")[1] == 0


def test_variants_are_summed_up(store, rows):
    found = variants_of(store, "job").set_index("run_id")
    for run in RUNS:
        own = pd.DataFrame([row for row in rows if row["run_id"] == run])
        assert found.loc[run, "prompts"] == len(own)
        assert found.loc[run, "identical"] == pytest.approx(own["identical"].mean())
        assert found.loc[run, "kld"] == pytest.approx(own["kld"].astype(float).mean())
        assert found.loc[run, "departs"] == own["departs"][~own["identical"]].median()
    assert variants_of(store, "gone").empty
    assert json.loads(spec())["kind"] == "mine"
