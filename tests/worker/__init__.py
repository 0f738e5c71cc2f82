"""Stories of the workers: what becomes of an event, whose turn it is, how they run and stop."""
