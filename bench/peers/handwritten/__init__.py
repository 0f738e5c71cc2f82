"""The handler most guides end at: FastAPI, SQLAlchemy's ORM, `stripe.Webhook.construct_event`.

Written for this benchmark; it runs in an environment of its own.
"""
