"""The Kamiyo API application: `uvicorn api.main:app`."""

from kamiyo.web import create_app

app = create_app()
