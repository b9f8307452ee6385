"""What mining found: prompts that tell two variants apart, and those that cannot.

Variants are addressed by run and compared by artifact, so another run of the same artifact finds
what was mined for the first. Where a prompt was mined again, the last time counts.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from results_db.store import Store

SETTINGS = ("temperature", "top_p", "max_new", "seed")  # of sampling; answers compare within them

LATEST = f"""
    SELECT * FROM mined WHERE model = $model
    QUALIFY row_number() OVER (
        PARTITION BY artifact_id, prompt_id, {", ".join(SETTINGS)}
        ORDER BY mined_at DESC, job_id DESC
    ) = 1
"""
# Runs asked about and what they made; where none are named, one for each mined artifact.
NAMED = """
    SELECT u.run_id, coalesce(r.artifact_id, m.artifact_id) AS artifact_id
    FROM (SELECT DISTINCT unnest($runs) AS run_id) u LEFT JOIN runs r USING (run_id)
    LEFT JOIN (SELECT DISTINCT run_id, artifact_id FROM mined) m USING (run_id)
"""
EVERY = "SELECT min(run_id) AS run_id, artifact_id FROM latest GROUP BY artifact_id"
BESIDE = " AND ".join(f"a.{name} = b.{name}" for name in ("prompt_id", "prompt", *SETTINGS))


def telling(
    store: Store,
    model: str,
    run_a: str,
    run_b: str,
    n: int = 20,
    settings: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The n prompts that two variants answer differently and that tell most about them.

    Ranked by `divergence` in nats: the larger of the two answers' mean KL from the 16-bit model;
    among equals, what departs from the 16-bit answer first. `settings` (temperature, top_p,
    max_new, seed) keeps to answers sampled like that.
    """
    sql = f"""
        WITH latest AS ({LATEST}), asked AS ({NAMED})
        SELECT a.prompt_id, a.category, a.language, a.prompt,
               greatest(a.kld, b.kld) AS divergence, least(a.departs, b.departs) AS departs,
               a.kld AS kld_a, b.kld AS kld_b, a.departs AS departs_a, b.departs AS departs_b,
               a.tokens AS tokens_a, b.tokens AS tokens_b,
               {", ".join(f"a.{name}" for name in SETTINGS)}
        FROM latest a JOIN latest b ON {BESIDE}
        WHERE a.artifact_id = (SELECT artifact_id FROM asked WHERE run_id = $runs[1])
          AND b.artifact_id = (SELECT artifact_id FROM asked WHERE run_id = $runs[2])
          AND a.answer_hash <> b.answer_hash {_like(settings)}
        ORDER BY divergence DESC NULLS LAST, departs, a.prompt_id LIMIT $n
    """
    return store.frame(sql, model=model, runs=[run_a, run_b], n=n, **(settings or {}))


def identical_pairs(
    store: Store,
    model: str,
    runs: Sequence[str] | None = None,
    settings: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Prompts to which two variants give the same text: ties that need no human.

    Each pair once, run_a < run_b, of all mined variants or of `runs` alone.
    """
    sql = f"""
        WITH latest AS ({LATEST}), asked AS ({EVERY if runs is None else NAMED})
        SELECT x.run_id AS run_a, y.run_id AS run_b, a.prompt_id, a.category, a.language, a.prompt,
               a.tokens AS tokens_a, b.tokens AS tokens_b, a.answer_hash,
               {", ".join(f"a.{name}" for name in SETTINGS)}
        FROM asked x JOIN asked y ON x.run_id < y.run_id
        JOIN latest a ON a.artifact_id = x.artifact_id
        JOIN latest b ON b.artifact_id = y.artifact_id AND {BESIDE}
        WHERE a.answer_hash = b.answer_hash {_like(settings)}
        ORDER BY run_a, run_b, a.prompt_id
    """
    given = {} if runs is None else {"runs": list(runs)}
    return store.frame(sql, model=model, **given, **(settings or {}))


def variants(store: Store, model: str) -> pd.DataFrame:
    """One row per mined variant: prompts, share of identical answers, where the others depart.

    `departs` is the median over prompts of the first token that differs from the 16-bit answer
    (its length where none does): one near-tie moves a single prompt's, not the median.
    """
    sql = f"""
        WITH latest AS ({LATEST})
        SELECT artifact_id, min(run_id) AS run_id, count(*) AS prompts,
               avg(identical::INT) AS identical, median(departs) AS departs,
               avg(kld) AS kld, avg(agreement) AS agreement, max(mined_at) AS mined_at
        FROM latest GROUP BY artifact_id ORDER BY run_id
    """
    return store.frame(sql, model=model)


# Of one job: every prompt with the variants that answered it, the least like 16 bits first.
OF_JOB = """
    WITH answered AS (
        SELECT * FROM mined WHERE job_id = $job_id AND ($run = '' OR run_id = $run)
               AND contains(lower(prompt || ' ' || coalesce(category, '') || ' ' || prompt_id),
                            lower($search))
    ), ranked AS (
        SELECT prompt_id, any_value(prompt) AS prompt, any_value(category) AS category,
               any_value(language) AS language, max(kld) AS divergence,
               min(departs) FILTER (NOT identical) AS departs,
               avg(identical::INT) AS identical, count(*) AS variants
        FROM answered GROUP BY prompt_id
    ), page AS (
        SELECT *, row_number() OVER (ORDER BY divergence DESC NULLS LAST, departs, prompt_id)
                  AS place, count(*) OVER () AS total
        FROM ranked QUALIFY place BETWEEN $first AND $last
    )
    SELECT p.*, a.run_id, a.kld, a.departs AS parts_at, a.tokens, a.identical AS same,
           a.agreement, a.finish
    FROM page p JOIN answered a USING (prompt_id)
    ORDER BY p.place, a.kld DESC NULLS LAST, a.run_id
"""


def prompts_of(
    store: Store, job_id: str, *, run: str = "", search: str = "", offset: int = 0, limit: int = 20
) -> tuple[pd.DataFrame, int]:
    """Some prompts of a mining job by divergence, a row per variant -> rows, prompts in all.

    Columns of the prompt: place (from 1), divergence (the largest), departs (the earliest),
    identical (share of variants); of the variant: kld, parts_at, same, tokens, agreement, finish.
    """
    given = {"run": run, "search": search, "first": offset + 1, "last": offset + limit}
    rows = store.frame(OF_JOB, job_id=job_id, **given)
    return rows.drop(columns="total"), int(rows["total"].iloc[0]) if len(rows) else 0


def variants_of(store: Store, job_id: str) -> pd.DataFrame:
    """Of one job, per run: prompts, share of identical answers, median place of parting, mean
    divergence and agreement; what differs most first."""
    sql = """
        SELECT run_id, count(*) AS prompts, avg(identical::INT) AS identical,
               median(departs) FILTER (NOT identical) AS departs, avg(kld) AS kld,
               max(kld) AS kld_max, avg(agreement) AS agreement
        FROM mined WHERE job_id = $job_id GROUP BY run_id ORDER BY kld DESC NULLS LAST, run_id
    """
    return store.frame(sql, job_id=job_id)


def _like(settings: Mapping[str, float] | None) -> str:
    unknown = set(settings or ()) - set(SETTINGS)
    if unknown:
        raise ValueError(
            f"{min(unknown)!r} is no setting of sampling; there are {', '.join(SETTINGS)}"
        )
    return " ".join(f"AND a.{name} = ${name}" for name in settings or ())
