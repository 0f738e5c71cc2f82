-- The budget of requests to Stripe that all processes share, and the circuit that opens when Stripe does not answer.

-- name: take
-- Takes a token if there is one. Returns the seconds to wait before asking again: 0 when it was taken, null when there is
-- no bucket yet. While the circuit is open, one request goes out to try; the others wait for what comes of it, or until
-- $2 seconds have passed without a word.
WITH now AS (
    SELECT clock_timestamp() AS at
), filled AS (
    SELECT least($1::float8, tokens + extract(epoch FROM now.at - filled_at) * $1::float8) AS tokens,
           greatest(extract(epoch FROM open_until - now.at), 0)::float8 AS pause
    FROM webhook_api_budget, now FOR UPDATE OF webhook_api_budget
), taken AS (
    UPDATE webhook_api_budget AS b
    SET tokens = filled.tokens - 1, filled_at = now.at, probing = refusals > 0,
        open_until = CASE WHEN refusals > 0 THEN now.at + make_interval(secs => $2::float8) END
    FROM filled, now WHERE coalesce(filled.pause, 0) = 0 AND filled.tokens >= 1
    RETURNING 0::float8 AS wait
)
SELECT coalesce((SELECT wait FROM taken), nullif(filled.pause, 0), (1 - filled.tokens) / $1::float8) FROM filled;

-- name: begin
-- The one row, where it is missing.
INSERT INTO webhook_api_budget DEFAULT VALUES ON CONFLICT DO NOTHING;

-- name: pause
-- Seconds until Stripe may be asked again; 0 while the circuit is closed.
SELECT coalesce((SELECT greatest(extract(epoch FROM open_until - clock_timestamp()), 0) FROM webhook_api_budget), 0)::float8;

-- name: refused
-- Stripe said "too much", or failed, or said nothing: nobody asks for a while, twice as long each time, a minute at most.
-- Many requests that fail together are one failure.
UPDATE webhook_api_budget
SET refusals = refusals + 1, probing = false, opened_at = coalesce(opened_at, clock_timestamp()),
    open_until = clock_timestamp() + make_interval(secs => greatest($1::float8, least(0.5 * 2 ^ least(refusals, 10), 60)))
WHERE probing OR refusals = 0;

-- name: answered
-- Stripe answers: the circuit is closed. But not by what was on its way when it opened: that says nothing of now. What Stripe
-- refused a key for is over once it answers for the same ($1), or for anything with that key ($2).
UPDATE webhook_api_budget
SET refusals = CASE WHEN probing THEN 0 ELSE refusals END, open_until = CASE WHEN NOT probing THEN open_until END,
    opened_at = CASE WHEN NOT probing THEN opened_at END, probing = false,
    refused_at = CASE WHEN refused_what IN ($1, $2) THEN NULL ELSE refused_at END,
    refused_what = CASE WHEN refused_what IN ($1, $2) THEN NULL ELSE refused_what END
WHERE probing OR refused_what IN ($1, $2);

-- name: key_refused
-- Stripe answers, but not to this key; what it was asked for is kept if somebody waits for it.
UPDATE webhook_api_budget
SET refusals = CASE WHEN probing THEN 0 ELSE refusals END, open_until = CASE WHEN NOT probing THEN open_until END,
    opened_at = CASE WHEN NOT probing THEN opened_at END, probing = false,
    refused_at = CASE WHEN $1::text IS NULL THEN refused_at ELSE coalesce(refused_at, clock_timestamp()) END,
    refused_last_at = CASE WHEN $1::text IS NULL THEN refused_last_at ELSE clock_timestamp() END,
    refused_what = coalesce($1::text, refused_what)
WHERE probing OR $1::text IS NOT NULL;
