"""The chaos harness: the proof that nothing is lost, doubled or applied backwards.

    make chaos SECONDS=60 SEED=7        or: kamiyo chaos --seconds 60 --seed 7

Real processes (two API servers, two workers, a PostgreSQL) live through a storm that a seed decides, while a simulated
Stripe posts the lives of thousands of customers, and answers what it is asked about them. In the end the tables are
judged, in SQL.

    schedule    what breaks and what operators do, when: from the seed alone
    traffic     what Stripe sends, when, in which disorder: from the seed alone
    stripe      posts it, and retries what was not answered 2xx
    stripe_api  Stripe's API, in a process of its own: what thin events name is read there
    proxy       the wire between Kamiyo and PostgreSQL, which can be cut
    crew        the processes: started, killed, paused, started again
    operators   the commands that operators run meanwhile, and how each ended
    storm       does what the schedule says
    handlers    the user's handlers: a ledger of credits, marks around every run, and poison
    broken      builds with a deliberate fault, each of which must be caught
    judge       the verdict, its questions in judge.sql
    run         one run, from the first process to the last line

What is shown, and what is not: docs/proof.md.
"""
