"""What gunicorn serves."""
# mypy: disable-error-code="import-not-found,unused-ignore"
# (its libraries are not in this project's environment)

import os

from django.core.wsgi import get_wsgi_application

os.environ["DJANGO_SETTINGS_MODULE"] = "bench.peers.djstripe.settings"
application = get_wsgi_application()
