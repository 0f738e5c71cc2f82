"""The doors over HTTP: Stripe's, the operators', Prometheus's."""

from kamiyo.web.app import create_app, create_router

__all__ = ["create_app", "create_router"]
