-- Since when Stripe's API does not answer: said once, for metrics, dashboard, alerts and doctor.

BEGIN;

SET LOCAL client_min_messages = warning;
SELECT pg_advisory_xact_lock(118038671810927);

-- When the circuit opened; null while Stripe answers. A circuit that nobody has tried for five minutes says nothing: whoever
-- asked may have no key any more.
CREATE OR REPLACE FUNCTION webhook_circuit_opened_at() RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT opened_at FROM webhook_api_budget WHERE open_until > now() - interval '5 minutes'
$$;

INSERT INTO webhook_migrations (name) VALUES ('027_circuit') ON CONFLICT DO NOTHING;

COMMIT;
