"""stripe-sync-engine, from npm: it keeps Stripe's objects in PostgreSQL; it stores no events."""
