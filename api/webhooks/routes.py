"""`from api.webhooks.routes import router as webhook_router`: one `include_router` is the whole integration."""

from kamiyo.web import create_router

router = create_router()
