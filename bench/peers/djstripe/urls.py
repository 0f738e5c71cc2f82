"""Django's addresses."""
# mypy: disable-error-code="import-not-found,unused-ignore"
# (its libraries are not in this project's environment)

from django.urls import include, path

urlpatterns = [path("stripe/", include("djstripe.urls", namespace="djstripe"))]
