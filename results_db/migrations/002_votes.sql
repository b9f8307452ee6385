-- Copies of votes.jsonl, one row per entry, only ever added to. No key: who copies asks for the
-- last `seq` and adds what follows it, so that nothing comes twice. `ends` is the byte of the file
-- where the entry ends and `hash` what its line is bound by: together they name the very file.
-- A vote that was taken back stays here; its battle is in `retractions`.

CREATE TABLE votes (
    seq            BIGINT NOT NULL,
    battle_id      VARCHAR NOT NULL,
    model          VARCHAR NOT NULL,   -- what both are variants of; '' in imports
    model_a        VARCHAR NOT NULL,   -- variants by side as shown
    model_b        VARCHAR NOT NULL,
    winner         VARCHAR NOT NULL,   -- model_a | model_b | tie | tie (bothbad)
    kind           VARCHAR NOT NULL,   -- human | judge | auto | import
    judge          VARCHAR NOT NULL,   -- keyed hash of a session, or the name of a judge model
    tstamp         DOUBLE NOT NULL,    -- unix seconds
    cast_at        TIMESTAMP NOT NULL, -- the same moment
    turn           INTEGER NOT NULL,
    anony          BOOLEAN NOT NULL,   -- names were hidden
    language       VARCHAR NOT NULL,
    category       VARCHAR NOT NULL,
    prompt         VARCHAR NOT NULL,
    conversation_a JSON NOT NULL,      -- [{"role": ..., "content": ...}, ...]
    conversation_b JSON NOT NULL,
    tokens_a       BIGINT,
    tokens_b       BIGINT,
    headers_a      INTEGER,            -- style of all answers of a side; NULL without a text
    headers_b      INTEGER,
    lists_a        INTEGER,
    lists_b        INTEGER,
    bold_a         INTEGER,
    bold_b         INTEGER,
    characters_a   BIGINT,
    characters_b   BIGINT,
    run_a          VARCHAR NOT NULL,
    run_b          VARCHAR NOT NULL,
    seed_a         BIGINT NOT NULL,
    seed_b         BIGINT NOT NULL,
    settings       JSON NOT NULL,
    propensity     DOUBLE,             -- probability with which the pair was drawn
    address        VARCHAR NOT NULL,   -- keyed hash
    latency_s      DOUBLE,
    flags          VARCHAR NOT NULL,   -- 'leak,late'
    hash           VARCHAR NOT NULL,
    ends           BIGINT NOT NULL
);

CREATE TABLE retractions (
    seq          BIGINT NOT NULL,
    battle_id    VARCHAR NOT NULL,
    tstamp       DOUBLE NOT NULL,
    retracted_at TIMESTAMP NOT NULL,
    hash         VARCHAR NOT NULL,
    ends         BIGINT NOT NULL
);
