"""Django's settings."""
# mypy: disable-error-code="import-not-found,unused-ignore"
# (its libraries are not in this project's environment)

import os

import stripe

from bench.peers.djstripe import KEY

SECRET_KEY = "the benchmark's"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["BENCH_DATABASE"],
        "USER": "postgres",
        "HOST": "127.0.0.1",
        "PORT": os.environ["BENCH_POSTGRES_PORT"],
        # Connections stay open, which is kinder than the default.
        "CONN_MAX_AGE": None,
    }
}
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.sites",
    "djstripe",
]
SITE_ID = 1
MIDDLEWARE: list[str] = []
ROOT_URLCONF = "bench.peers.djstripe.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}

STRIPE_LIVE_MODE = False
STRIPE_TEST_SECRET_KEY = KEY
STRIPE_API_HOST = os.environ["BENCH_STRIPE_API"]
DJSTRIPE_FOREIGN_KEY_TO_FIELD = "id"

# dj-stripe reads each object again from the API; some of those calls pass no key of their own.
stripe.api_key = KEY
stripe.api_base = STRIPE_API_HOST
