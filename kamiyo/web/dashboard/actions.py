"""What a person can do: sign in and out, run one event again, run all of one cause again."""

from starlette.responses import RedirectResponse, Response

from kamiyo import inbox
from kamiyo.errors import AdminKeyInvalid, EventNotFailed
from kamiyo.telemetry import happened
from kamiyo.web.dashboard import queries
from kamiyo.web.dashboard.site import PageNotFound, Visit


async def sign_in(visit: Visit) -> Response:
    """Begin a session for whoever knows the admin key."""
    wanted = visit.form.get("next", "")
    client = visit.request.client
    try:
        await visit.site.doorkeeper.admit(visit.form.get("key", "").strip(), client.host if client else "")
    except AdminKeyInvalid:
        return visit.page("sign_in.html", 401, wanted=wanted, wrong=True)
    response = RedirectResponse(visit.base + _own_path(wanted), 303)
    visit.site.sessions.begin(response, path=visit.base, secure=visit.secure)
    return response


def _own_path(wanted: str) -> str:
    # It is put behind our own address, so it leads nowhere else; but what is no path of ours is left out.
    fine = wanted.startswith("/") and wanted.isascii() and wanted.isprintable() and not set(wanted) & set('\\"<> ')
    return wanted if fine and not wanted.startswith("//") else ""


async def sign_out(visit: Visit) -> Response:
    """End the session."""
    response = visit.to("sign-in")
    visit.site.sessions.end(response, path=visit.base, secure=visit.secure)
    return response


async def retry(visit: Visit) -> Response:
    """Put one failed event back in line."""
    event_id = visit.path("event_id")
    try:
        async with visit.site.writing() as db:
            await inbox.retry(db, event_id)
    except EventNotFailed:
        return visit.to("events", event_id, said="not-failed")
    happened("events_retried", count=1, event_id=event_id)
    return visit.to("events", event_id, said="retry")


async def replay(visit: Visit) -> Response:
    """Begin to put every failed event of one cause back in line, and go to where its progress is shown."""
    fingerprint = visit.path("fingerprint")
    async with visit.reading() as db:
        if await queries.group(db, fingerprint) is None:
            raise PageNotFound("No failure with this fingerprint is remembered.")
    number = await visit.site.behind.replay(fingerprint)
    return visit.to("replays", str(number))
