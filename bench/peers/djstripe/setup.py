"""Makes the tables and the webhook endpoint: `python -m bench.peers.djstripe.setup`. The stub must be running."""
# mypy: disable-error-code="import-not-found,unused-ignore"
# (its libraries are not in this project's environment)

import os

import django
from django.core.management import call_command

from bench.events import SECRET
from bench.peers.djstripe import ENDPOINT, KEY

os.environ["DJANGO_SETTINGS_MODULE"] = "bench.peers.djstripe.settings"


def main() -> None:
    """Migrate, and register the endpoint with its secret, so that signatures are verified here."""
    django.setup()
    call_command("migrate", verbosity=0)
    # Django's models can be imported once it is set up, and not before.
    from djstripe.models import Account, WebhookEndpoint

    WebhookEndpoint.objects.get_or_create(
        id="we_benchmark",
        defaults={
            "secret": SECRET,
            "url": "http://127.0.0.1/stripe/webhook/",
            "enabled_events": ["*"],
            "livemode": False,
            "djstripe_uuid": ENDPOINT,
            "api_version": "2020-08-27",
            "status": "enabled",
            "djstripe_owner_account": Account.get_or_retrieve_for_api_key(KEY),
            "djstripe_validation_method": "verify_signature",
        },
    )


if __name__ == "__main__":
    main()
