-- What variants answered to the questions of judge jobs, every turn on its own.
-- One row per (job_id, run_id, question, turn).
CREATE TABLE judged_answers (
    job_id      VARCHAR NOT NULL,     -- the judge job, in runs
    run_id      VARCHAR NOT NULL,     -- the run that made the variant
    artifact_id VARCHAR NOT NULL,
    question    VARCHAR NOT NULL,
    category    VARCHAR NOT NULL,
    language    VARCHAR NOT NULL,
    turn        INTEGER NOT NULL,     -- from 1
    prompt      VARCHAR NOT NULL,     -- of this turn
    text        VARCHAR NOT NULL,
    characters  BIGINT NOT NULL,      -- of the whole answer; a very long one is stored in part
    tokens      BIGINT,
    finish      VARCHAR,              -- end | length | context
    temperature DOUBLE NOT NULL,
    top_p       DOUBLE NOT NULL,
    max_new     INTEGER NOT NULL,
    seed        BIGINT NOT NULL,
    answered_at TIMESTAMP NOT NULL
);

-- Every single verdict as it was given: two for a pair that was judged in both orders.
-- One row per (job_id, question, turn, run_a, run_b, swapped).
CREATE TABLE verdicts (
    job_id            VARCHAR NOT NULL,
    judge_id          VARCHAR NOT NULL,  -- who judged and how; others are never counted together
    style             VARCHAR NOT NULL,  -- single | pairwise | preference
    question          VARCHAR NOT NULL,
    category          VARCHAR NOT NULL,
    language          VARCHAR NOT NULL,
    turn              INTEGER NOT NULL,
    run_a             VARCHAR NOT NULL,
    run_b             VARCHAR NOT NULL,  -- '' where one answer is graded
    swapped           BOOLEAN NOT NULL,  -- b was shown first
    games             INTEGER NOT NULL,  -- verdicts that decide together about this item
    score             DOUBLE,            -- 1 to 10
    preference        DOUBLE,            -- 1: a is better, 2: b is better, 1.5: neither
    failed            VARCHAR NOT NULL,  -- why there is neither score nor preference
    flags             VARCHAR NOT NULL,  -- 'empty', 'identical', 'cut', 'reused'
    judge             VARCHAR NOT NULL,  -- model as its server names it; '' where none was asked
    text              VARCHAR NOT NULL,  -- what it said
    prompt_hash       VARCHAR NOT NULL,
    prompt_tokens     BIGINT,
    completion_tokens BIGINT,
    latency_s         DOUBLE,
    attempts          INTEGER NOT NULL,
    judged_at         TIMESTAMP NOT NULL
);
