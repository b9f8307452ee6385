"""What votes and ratings call the variants of a model: one name per artifact, for ever."""

from results_db.store import Store

# The first run that made an artifact names it, so that its name never changes.
NAMES = """
    SELECT run_id, model, artifact_id, first_value(
               CASE WHEN coalesce(json_array_length(spec, '$.steps'), 0) = 0 THEN 'baseline'
                    ELSE regexp_replace(coalesce(recipe, ''), '\\s', '', 'g') END
           ) OVER (PARTITION BY model, artifact_id ORDER BY submitted, run_id) AS recipe
    FROM runs WHERE kind = 'run' AND artifact_id IS NOT NULL
"""


def variant_id(model: str, recipe: str, artifact_id: str) -> str:
    """What votes and ratings call the variant that a finished run made."""
    return f"{model}/{recipe}@{artifact_id[:8]}"


def variant_names(store: Store) -> dict[str, str]:
    """{run id: name of the variant it made}."""
    rows = store.frame(NAMES).itertuples(index=False)
    return {run_id: variant_id(model, recipe, made) for run_id, model, made, recipe in rows}


def shown(variant: str) -> str:
    """A variant's name as people read it."""
    return variant.rpartition("@")[0] or variant
