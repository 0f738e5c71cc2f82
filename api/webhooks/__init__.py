"""The webhook routes, for `app.include_router`."""
