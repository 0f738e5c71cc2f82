-- The budget of requests to Stripe that all processes share.

-- name: take
-- Takes a token if there is one. Returns the seconds to wait before asking again: 0 when it was
-- taken, null when there is no bucket yet.
WITH now AS (
    SELECT clock_timestamp() AS at
), filled AS (
    SELECT least($1::float8, tokens + extract(epoch FROM now.at - filled_at) * $1::float8) AS tokens,
           greatest(extract(epoch FROM open_until - now.at), 0)::float8 AS pause
    FROM webhook_api_budget, now FOR UPDATE OF webhook_api_budget
), taken AS (
    UPDATE webhook_api_budget AS b
    SET tokens = filled.tokens - 1, filled_at = now.at
    FROM filled, now WHERE coalesce(filled.pause, 0) = 0 AND filled.tokens >= 1
    RETURNING 0::float8 AS wait
)
SELECT coalesce((SELECT wait FROM taken), nullif(filled.pause, 0), (1 - filled.tokens) / $1::float8) FROM filled;

-- name: begin
-- The one row, where it is missing.
INSERT INTO webhook_api_budget DEFAULT VALUES ON CONFLICT DO NOTHING;

-- name: refused
-- Stripe said "too much" or failed: nobody asks for a while, twice as long each time, a minute at most.
UPDATE webhook_api_budget
SET refusals = refusals + 1,
    open_until = clock_timestamp() + make_interval(secs => greatest($1::float8, least(0.5 * 2 ^ refusals, 60)));

-- name: answered
UPDATE webhook_api_budget SET refusals = 0, open_until = NULL WHERE refusals > 0;
