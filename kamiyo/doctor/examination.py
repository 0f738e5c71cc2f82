"""The checks one after another, and nothing secret in what they say."""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import chain
from urllib.parse import unquote

from kamiyo.doctor import channels, configuration, endpoints, postgresql, server
from kamiyo.doctor.finding import Finding, Subject


async def examine(subject: Subject, *, heard: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Every finding, in the order of the checks; `heard` is told each as it is made."""
    found: list[Finding] = []
    async for finding in _examine(subject):
        clean = without_secrets(finding, subject)
        heard(clean)
        found.append(clean)
    return found


async def _examine(subject: Subject) -> AsyncIterator[Finding]:
    settings = subject.settings
    written = (configuration.secrets(settings), configuration.env_file(subject.env_file), configuration.logs(settings))
    for finding in chain(*written):
        yield finding
    yield configuration.own_handlers(settings)
    for finding in chain(configuration.mirrored(settings), configuration.slips(settings)):
        yield finding
    async with postgresql.opened(subject) as (db, pool, refused):
        if db is None:
            yield refused
        else:
            async for finding in postgresql.answers(db, subject):
                yield finding
        async for finding in server.answers(subject):
            yield finding
        for finding in await channels.alerts(settings, send_test=subject.send_test):
            yield finding
        for finding in await channels.traces(settings):
            yield finding
        for finding in await endpoints.stripe(subject, pool):
            yield finding


def without_secrets(finding: Finding, subject: Subject) -> Finding:
    # No check puts one in; this is for the words of others (PostgreSQL's, an importing handler's) that are passed on.
    settings = subject.settings
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    password = re.match(r"\w+://[^:/]*:(.*)@", url)
    known = {
        *configuration.secret_values(settings),
        settings.admin_api_key.get_secret_value(),
        *settings.alert_channels,
        *((url, password[1], unquote(password[1])) if password else ()),
    }
    seen, mend = finding.seen, finding.mend
    for secret in sorted((one for one in known if len(one) >= 4), key=len, reverse=True):
        seen, mend = seen.replace(secret, "•••"), mend.replace(secret, "•••")
    return replace(finding, seen=seen, mend=mend)
