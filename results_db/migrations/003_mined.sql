-- Jobs of every kind have a row here: it says how far their events were read.
ALTER TABLE runs ADD COLUMN kind VARCHAR DEFAULT 'run';   -- run | mine | ...

-- What a variant answered to a prompt, beside the 16-bit model's answer.
-- One row per (job_id, run_id, prompt_id).
CREATE TABLE mined (
    job_id      VARCHAR NOT NULL,     -- the job that asked, in runs
    run_id      VARCHAR NOT NULL,     -- the run that made the variant
    artifact_id VARCHAR NOT NULL,
    model       VARCHAR,
    prompt_id   VARCHAR NOT NULL,
    category    VARCHAR,
    language    VARCHAR,
    prompt      VARCHAR NOT NULL,
    kld         DOUBLE,               -- nats, KL(16-bit || variant), mean along the 16-bit answer
    kld_max     DOUBLE,
    agreement   DOUBLE,               -- share of its tokens at which both prefer the same token
    departs     INTEGER,              -- first token that differs from the 16-bit answer
    tokens      INTEGER,              -- of the variant's answer
    base_tokens INTEGER,              -- of the 16-bit answer
    finish      VARCHAR,              -- end | length | context
    identical   BOOLEAN NOT NULL,     -- the same text as the 16-bit answer
    answer_hash VARCHAR NOT NULL,     -- of the text: two variants' answers are alike if these are
    temperature DOUBLE NOT NULL,
    top_p       DOUBLE NOT NULL,
    max_new     INTEGER NOT NULL,
    seed        BIGINT NOT NULL,
    device      VARCHAR NOT NULL,
    dtype       VARCHAR NOT NULL,
    storage     VARCHAR NOT NULL,
    mined_at    TIMESTAMP NOT NULL
);
