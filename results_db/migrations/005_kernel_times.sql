-- Times of kernels, beside a bf16 product in the same run.
-- One row per (job_id, kernel, weight, act, m, n, k).
CREATE TABLE kernel_times (
    job_id        VARCHAR NOT NULL,   -- the bench job, in runs; its env says versions and driver
    kernel        VARCHAR NOT NULL,   -- "bf16" is what the others are compared with
    weight        JSON NOT NULL,      -- format of the weights [n, k]
    act           JSON NOT NULL,      -- of the inputs [m, k]; null: 16 bits
    m             INTEGER NOT NULL,
    n             INTEGER NOT NULL,
    k             INTEGER NOT NULL,
    weight_bytes  BIGINT NOT NULL,    -- as they are held
    median_ms     DOUBLE,             -- NULL where the product was wrong
    p20_ms        DOUBLE,
    p80_ms        DOUBLE,
    eager_ms      DOUBLE,             -- on a GPU: with its launch; the others are from a CUDA graph
    ratio_to_bf16 DOUBLE,             -- NULL where one of the two was unsteady
    steady        BOOLEAN,
    max_rel_err   DOUBLE,
    correct       BOOLEAN NOT NULL,
    device        VARCHAR NOT NULL,
    threads       INTEGER NOT NULL,
    measured_at   TIMESTAMP NOT NULL
);

-- What the device could do at best, measured in the same job. One row per (job_id, name).
CREATE TABLE ceilings (
    job_id      VARCHAR NOT NULL,
    name        VARCHAR NOT NULL,     -- read | bf16 product | launch in a graph
    value       DOUBLE NOT NULL,
    unit        VARCHAR NOT NULL,
    device      VARCHAR NOT NULL,
    measured_at TIMESTAMP NOT NULL
);
