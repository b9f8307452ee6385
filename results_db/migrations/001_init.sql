-- Timestamps are UTC without a zone. A missing number is NULL; NaN and infinity are results.
-- Only `runs` has a key: its key never changes, so updates leave the index alone. The other
-- tables are unique by their writer (delete, then insert, under one lock), because replaying an
-- index from the log after a crash is where DuckDB has failed. No foreign keys: they forbid
-- deleting a child and its parent in one transaction.

CREATE TABLE schema_version (
    version    INTEGER NOT NULL,
    applied_at TIMESTAMP NOT NULL
);

CREATE TABLE runs (
    run_id        VARCHAR PRIMARY KEY,
    fingerprint   VARCHAR,
    artifact_id   VARCHAR,
    label         VARCHAR,
    recipe        VARCHAR,
    targets       VARCHAR,            -- 'weights,kv': what the steps quantize
    storage       VARCHAR,            -- simulated | packed
    model         VARCHAR,
    revision      VARCHAR,
    model_content VARCHAR,
    spec          JSON NOT NULL,
    env           JSON,
    state         VARCHAR NOT NULL,   -- queued | running | done | failed | cancelled
    error         JSON,
    submitted     TIMESTAMP,
    started       TIMESTAMP,
    finished      TIMESTAMP,
    seen_bytes    BIGINT NOT NULL     -- bytes of events.jsonl already copied
);

-- One row per (run_id, metric_id, name, device, dtype).
CREATE TABLE measurements (
    run_id      VARCHAR NOT NULL,
    metric_id   VARCHAR NOT NULL,
    metric      VARCHAR,
    version     INTEGER NOT NULL,
    name        VARCHAR NOT NULL,
    value       DOUBLE,
    unit        VARCHAR,
    better      VARCHAR,              -- lower | higher
    n           BIGINT,
    stderr      DOUBLE,
    detail      JSON NOT NULL,
    device      VARCHAR NOT NULL,
    dtype       VARCHAR NOT NULL,
    storage     VARCHAR,
    data        VARCHAR,
    measured_at TIMESTAMP
);

-- One row per item of a measurement: feeds paired tests.
CREATE TABLE items (
    run_id    VARCHAR NOT NULL,
    metric_id VARCHAR NOT NULL,
    name      VARCHAR NOT NULL,
    device    VARCHAR NOT NULL,
    dtype     VARCHAR NOT NULL,
    item      INTEGER NOT NULL,
    value     DOUBLE
);

-- One row per (run_id, metric_id, block, module, name).
CREATE TABLE layers (
    run_id    VARCHAR NOT NULL,
    metric_id VARCHAR NOT NULL,
    block     INTEGER,
    module    VARCHAR NOT NULL,
    name      VARCHAR NOT NULL,
    value     DOUBLE,
    unit      VARCHAR,
    better    VARCHAR
);

CREATE TABLE notes (
    run_id VARCHAR NOT NULL,
    block  INTEGER,
    module VARCHAR NOT NULL,
    text   VARCHAR NOT NULL
);
