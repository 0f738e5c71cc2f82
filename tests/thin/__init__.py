"""Stories of thin events: they name an object, which is read from Stripe; and of their twins, which show it."""
