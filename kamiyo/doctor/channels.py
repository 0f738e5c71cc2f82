"""Where things are told: the channels of alerts, the collector of traces."""

import asyncio
from importlib import import_module
from typing import Any

from kamiyo import tracing
from kamiyo.doctor.finding import Finding, failed, passed, warning
from kamiyo.errors import SettingsError
from kamiyo.settings import Settings


async def alerts(settings: Settings, *, send_test: bool) -> list[Finding]:
    """Whether there is someone to tell; with `send_test`, whether each channel takes a message."""
    check = "alerts"
    if not settings.alert_channels:
        return [
            warning(
                check,
                "nobody is told when events die or the database is away",
                "Set DISCORD_WEBHOOK_URL, SLACK_WEBHOOK_URL or ALERT_URLS, then: kamiyo doctor --send-test",
            )
        ]
    # Apprise and its hundred plugins take 36 MB: only where there is someone to tell.
    apprise: Any = import_module("apprise")
    found = []
    for number, url in enumerate(settings.alert_channels, 1):
        # Never the address itself: it holds the key to the channel.
        name = f"channel {number} ({url.split(':', 1)[0]}://…)"
        channel = apprise.Apprise()
        if not channel.add(url):
            mend = "Correct it in ALERT_URLS, DISCORD_WEBHOOK_URL or SLACK_WEBHOOK_URL."
            found.append(failed(check, f"{name} is no address that Apprise understands", mend))
        elif not send_test:
            found.append(passed(check, f"{name} is configured; --send-test proves that it reaches a person"))
        elif await channel.async_notify(
            title="Kamiyo: a test", body="kamiyo doctor --send-test asked for this. Nothing is wrong."
        ):
            found.append(passed(check, f"{name} took a test message"))
        else:
            found.append(
                failed(
                    check, f"{name} did not take a test message", "Make the channel's address anew, and set it here."
                )
            )
    return found


async def traces(settings: Settings) -> list[Finding]:
    """Whether the collector of traces answers; nothing where KAMIYO_TRACES is off."""
    check = "traces"
    if not settings.traces:
        return []
    try:
        answers = await asyncio.to_thread(tracing.collector_answers)
    except SettingsError as error:
        return [failed(check, str(error), "Install it, or take KAMIYO_TRACES out: no server starts like this.")]
    if answers:
        return [passed(check, "the collector took an export of OpenTelemetry without spans")]
    return [
        warning(
            check,
            "the collector of OpenTelemetry does not answer, or refuses: spans are lost, events are not",
            "Set OTEL_EXPORTER_OTLP_ENDPOINT to where it listens for OTLP over HTTP (http://localhost:4318), and "
            "OTEL_EXPORTER_OTLP_HEADERS to the key it asks for, if any.",
        )
    ]
