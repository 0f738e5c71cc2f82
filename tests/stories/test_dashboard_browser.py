"""The dashboard in a real browser: by keyboard, on a phone, without scripts, in both themes, under axe-core's rules.

One server and one filled database serve all stories; each has a browser session of its own. A story that changes an
event has events of its own, too.
"""

import importlib.util
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Route, async_playwright, expect

from kamiyo import simulator
from tests.conftest import ADMIN_KEY, DEADLINE, NewDatabase, deliver, event_json, run_apart, serving, until

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; on Debian and Ubuntu: apt-get install chromium"),
]

# What is expected of a page comes when the browser gets round to it, and a machine may be busy.
expect.set_options(timeout=DEADLINE * 1000)

_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]

_HANDLERS = """
from pathlib import Path
from kamiyo import Bury, Event, Retry, on


@on("invoice.payment_failed")
async def warn(event: Event, db: object) -> None:
    raise Bury("nobody at " + "mail.example.org " * 12)


@on("order.shipped")
async def ship(event: Event, db: object) -> None:
    if not Path("paper").exists():
        raise Bury("the printer is out of paper")


@on("customer.discount.created")
async def thank(event: Event, db: object) -> None:
    raise Retry(after=3600, reason="not at night")
"""


@dataclass(frozen=True)
class Desk:
    """A server with something to look at: its address, its folder, its database, and ids of what is in it."""

    url: str
    folder: Path
    database: str
    dead: str
    customer: str
    fingerprint: str
    session: str

    @property
    def pages(self) -> dict[str, str]:
        """Every kind of page, by a name."""
        return {
            "overview": "",
            "events": "/events",
            "events, narrowed": "/events?status=dead&type=invoice.payment_failed",
            "no events": "/events?customer=cus_nobody",
            "event, dead": f"/events/{self.dead}",
            "failures": "/failures",
            "one cause": f"/failures/{self.fingerprint}",
            "retry these?": f"/failures/{self.fingerprint}/retry",
            "replay": "/replays/1",
            "customer": f"/customers/{self.customer}",
            "search": "/search?q=evt_1",
            "nothing found": "/search?q=evt_nobody_has_this",
            "undecided": "/undecided",
            "not found": "/nowhere",
        }


@pytest.fixture(scope="module")
def desk(new_database: NewDatabase) -> Iterator[Desk]:
    """Some hundred events of made-up customers, of which some are dead and one waits for its next try."""
    url = new_database()
    with tempfile.TemporaryDirectory(prefix="kamiyo-desk-") as home:
        folder = Path(home)
        (folder / "shop.py").write_text(_HANDLERS)
        with serving(url, folder=folder, KAMIYO_HANDLERS="shop") as served:
            ids = run_apart(_fill(served.url, url)) | {"session": _session(served.url)}
            yield Desk(f"{served.url}/dashboard", folder, url, **ids)


def _session(server: str) -> str:
    answer = httpx.post(f"{server}/dashboard/sign-in", data={"key": ADMIN_KEY})
    return answer.cookies["kamiyo_session"]


async def _fill(server: str, database: str) -> dict[str, str]:
    rng = random.Random(7)
    world = simulator.World(7, start=int(time.time()) - 400 * 86400)
    for _ in range(5):
        simulator.lifecycle(world, rng, steps=7)
    simulator.STORIES["dunning"](world)
    events = sorted(world.events, key=lambda event: event.created)
    async with httpx.AsyncClient(base_url=server) as client:
        for event in events:
            answer = await deliver(client, event.body(simulator.CURRENT_API_VERSION))
            assert answer.status_code == 200
        await deliver(client, event_json("evt_waits", "customer.discount.created"))
    db = await asyncpg.connect(database)
    try:
        waiting = "SELECT count(*) = 0 FROM webhook_events WHERE status IN ('pending', 'processing')"
        await until(lambda: db.fetchval(waiting))
        dead = await db.fetchrow(
            "SELECT event_id, e.customer, fingerprint FROM webhook_events AS e JOIN webhook_failures USING (event_id) "
            "WHERE e.event_type = 'invoice.payment_failed' LIMIT 1"
        )
        assert dead is not None
        cause: str = dead["fingerprint"]
        await db.execute("INSERT INTO webhook_replays (fingerprint, total, done) VALUES ($1, 9, 4)", cause)
    finally:
        await db.close()
    return {"dead": dead["event_id"], "customer": dead["customer"], "fingerprint": cause}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium."""
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=_ARGUMENTS)
        yield launched
        await launched.close()


@asynccontextmanager
async def opened(browser: Browser, desk: Desk, *, expected: str = " 404 ", **options: Any) -> AsyncIterator[Page]:
    """A page of a new, signed-in session.

    Whatever the console complains of fails the story, but for what is `expected` (of a page that is not there it says
    404); and so does any request that leads elsewhere.
    """
    context: BrowserContext = await browser.new_context(**options)
    context.set_default_timeout(DEADLINE * 1000)
    page = await context.new_page()
    complaints: list[str] = []
    # As signing in sets it; the story of the keyboard signs in itself.
    cookie: Any = {
        **{"name": "kamiyo_session", "value": desk.session, "domain": "127.0.0.1", "path": "/dashboard"},
        **{"httpOnly": True, "sameSite": "Strict", "expires": time.time() + 12 * 3600},
    }

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and expected not in message.text:
            complaints.append(message.text)

    page.on("console", hear)

    def see(request: Request) -> None:
        if not request.url.startswith(desk.url) and "example/" not in request.url:
            complaints.append(f"asked for {request.url}")

    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", see)
    try:
        await context.add_cookies([cookie])
        await page.goto(desk.url)
        yield page
        assert complaints == []
    finally:
        await context.close()


async def follow(page: Page, what: str) -> None:
    """Click on `what`, and be on the page that it leads to: before that, the next click could meet the old one.

    Told by its address: a page that is live may be loaded anew meanwhile.
    """
    here = page.url
    await page.click(what)
    await page.wait_for_url(lambda url: url != here)


def axe() -> str:
    """axe-core's script, out of the package that brings it."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-playwright-python is not installed: axe-core's rules were not checked")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


# ── What it looks like to everyone ──────────────────────────────────────────────────────────────────────────


_WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

_CUT_OFF = """[...document.querySelectorAll(".id")].filter((one) => one.checkVisibility()).filter((one) => {
    for (let box = one; box && box.id !== "live"; box = box.parentElement) {
        const style = getComputedStyle(box);
        const hides = style.textOverflow === "ellipsis" || style.overflowX === "hidden";
        if (hides && box.scrollWidth > box.clientWidth + 1) return true;
    }
    return false;
}).map((one) => one.outerHTML)"""


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 390)], ids=str)
async def test_every_page_keeps_the_rules_of_axe_core_fits_the_screen_and_shows_ids_whole(
    theme: Any, width: int, desk: Desk, browser: Browser
) -> None:
    script = axe()
    view: Any = {"width": width, "height": 844}
    phone = width < 500
    other: Any = "dark" if theme == "light" else "light"
    async with opened(browser, desk, color_scheme=theme, viewport=view, is_mobile=phone, has_touch=phone) as page:

        async def look(name: str) -> None:
            # What is folded away is seen once it is opened.
            await page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            assert await page.evaluate(_WIDER) <= 0, name
            assert await page.evaluate(_CUT_OFF) == [], name
            # Evaluated by the browser itself, so the page's own policy stays as strict as it is.
            await page.evaluate(script)
            assert await violations("rules: { 'target-size': { enabled: true } }") == [], f"{name}, {theme}, {width}"
            await page.emulate_media(color_scheme=other)
            assert await violations("runOnly: ['color-contrast']") == [], f"{name}, {other}, {width}"
            await page.emulate_media(color_scheme=theme)

        async def violations(rules: str) -> list[str]:
            found = await page.evaluate(f"axe.run({{ resultTypes: ['violations'], {rules} }})")
            return [broken(one) for one in found["violations"]]

        for name, path in desk.pages.items():
            await page.goto(desk.url + path)
            await look(name)
        await page.context.clear_cookies()
        await page.goto(desk.url)
        await look("sign in")


def broken(violation: dict[str, Any]) -> str:
    """A violation in a line: the rule, how bad it is, and where."""
    places = [node["html"][:120] + " " + (node.get("failureSummary") or "")[-160:] for node in violation["nodes"][:3]]
    return f"{violation['id']} ({violation['impact']}): {places}"


async def test_the_two_themes_are_light_and_dark(desk: Desk, browser: Browser) -> None:
    grounds = {}
    for theme in ("light", "dark"):
        options: dict[str, Any] = {"color_scheme": theme}
        async with opened(browser, desk, **options) as page:
            ground = await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            grounds[theme] = sum(int(part) for part in ground.strip("rgb()").split(","))
    assert grounds["light"] > 700 and grounds["dark"] < 100


async def test_on_a_phone_every_button_is_large_enough_for_a_thumb(desk: Desk, browser: Browser) -> None:
    view: Any = {"width": 390, "height": 844}
    async with opened(browser, desk, viewport=view, is_mobile=True, has_touch=True) as page:
        for path in ("", "/failures", f"/failures/{desk.fingerprint}/retry", f"/events/{desk.dead}"):
            await page.goto(desk.url + path)
            small = await page.evaluate(
                "[...document.querySelectorAll('a.button, button:not(.plain, .copy), input:not([type=hidden])')]"
                ".filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 40)"
                ".map((one) => one.outerHTML)"
            )
            assert small == [], path


async def test_on_a_phone_every_status_is_there_to_be_seen(desk: Desk, browser: Browser) -> None:
    view: Any = {"width": 390, "height": 844}
    async with opened(browser, desk, viewport=view, is_mobile=True, has_touch=True) as page:
        await page.goto(f"{desk.url}/events")
        hidden = await page.evaluate(
            "[...document.querySelectorAll('nav[aria-label=Status] a')].filter((one) => {"
            " const box = one.getBoundingClientRect(), all = one.parentElement.getBoundingClientRect();"
            " return box.left < all.left || box.right > all.right || box.right > innerWidth; })"
            ".map((one) => one.innerText)"
        )
        assert hidden == []
        await expect(page.get_by_role("link", name="dead", exact=True)).to_be_visible()


# ── By keyboard alone ───────────────────────────────────────────────────────────────────────────────────────


async def test_by_keyboard_alone_one_signs_in_finds_what_is_stuck_and_retries_it(desk: Desk, browser: Browser) -> None:
    event_id = await new_order(desk)
    context = await browser.new_context()
    context.set_default_timeout(DEADLINE * 1000)
    page = await context.new_page()
    await page.goto(f"{desk.url}/events/{event_id}")
    # The field has the focus already; a browser that is kept busy gives it a moment after the page has loaded.
    await expect(page.locator("input[name=key]")).to_be_focused()
    await page.keyboard.type(ADMIN_KEY)
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{desk.url}/events/{event_id}")
    await page.keyboard.press("Tab")
    assert await focused(page) == "Skip to content"
    await page.keyboard.press("Enter")
    for _ in range(12):
        await page.keyboard.press("Tab")
        assert await page.evaluate(
            "(() => { const style = getComputedStyle(document.activeElement);"
            " return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2; })()"
        ), "what has the focus must be seen to have it"
        if await focused(page) == "Retry":
            break
    (desk.folder / "paper").touch()
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{desk.url}/events/{event_id}?said=retry")
    # The page looks by itself until the event is settled.
    await expect(page.locator(".lead .badge")).to_have_text("processed")
    (desk.folder / "paper").unlink()
    await context.close()


async def focused(page: Page) -> str:
    """The text of what has the focus."""
    text: str = await page.evaluate("document.activeElement.innerText || document.activeElement.id")
    return text.strip()


_orders = itertools.count()


async def new_order(desk: Desk) -> str:
    """A new event whose handler gives it up."""
    event_id = f"evt_order_{next(_orders)}"
    server = desk.url.removesuffix("/dashboard")
    async with httpx.AsyncClient(base_url=server) as client:
        body = event_json(event_id, "order.shipped", {"id": "or_1", "object": "order", "note": "x"})
        assert (await deliver(client, body)).status_code == 200
    await standing(desk, event_id, "failed")
    return event_id


async def orders_given_up(desk: Desk) -> int:
    """How many orders are dead at this moment."""
    db = await asyncpg.connect(desk.database)
    try:
        return int(
            await db.fetchval(
                "SELECT count(*) FROM webhook_events WHERE event_type = 'order.shipped' AND status = 'failed'"
            )
        )
    finally:
        await db.close()


async def standing(desk: Desk, event_id: str, status: str) -> None:
    """Wait until the event stands like that."""
    db = await asyncpg.connect(desk.database)
    try:
        await until(
            lambda: db.fetchval("SELECT 1 FROM webhook_events WHERE event_id = $1 AND status = $2", event_id, status)
        )
    finally:
        await db.close()


# ── Without the script ──────────────────────────────────────────────────────────────────────────────────────


async def test_without_scripts_everything_works(desk: Desk, browser: Browser) -> None:
    event_id = await new_order(desk)
    async with opened(browser, desk, java_script_enabled=False) as page:
        await follow(page, "nav >> text=Events")
        await follow(page, "nav[aria-label=Status] >> text=dead")
        await page.click("summary:has-text('Filter')")
        await page.fill("input[name=type]", "order.shipped")
        await follow(page, "text=Apply")
        await follow(page, f"tr:has-text('{event_id}') a.type")
        await expect(page.locator(".verdict")).to_contain_text("the printer is out of paper")
        await follow(page, "text=Others with this cause")
        await follow(page, "text=Retry these…")
        # Other stories may have left some of this cause: which story comes first is not theirs to say.
        many = await orders_given_up(desk)
        those = f"Retry {many} event{'s' if many > 1 else ''}"
        await expect(page.locator("h1")).to_have_text(f"{those}?")
        (desk.folder / "paper").touch()
        await page.click(f"button:has-text('{those}')")
        await page.wait_for_url("**/replays/*")
        await standing(desk, event_id, "processed")
        await page.reload()
        await expect(page.locator("h1")).to_have_text("Done")
        (desk.folder / "paper").unlink()
        await page.fill("#q", event_id)
        await page.press("#q", "Enter")
        await page.wait_for_url(f"{desk.url}/events/{event_id}")
        await follow(page, "nav >> text=Overview")
        # Live without a script: the browser itself asks again.
        await expect(page.locator("noscript meta[http-equiv=refresh]")).to_have_count(1)
        await page.click("text=Sign out")
        await page.wait_for_url(f"{desk.url}/sign-in")


# ── With it ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_overview_is_live_and_stands_still_when_it_is_told_to(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk) as page:
        # Time passes for the page when the story says so.
        await page.clock.install()
        await page.reload()
        await page.evaluate("document.getElementById('live').dataset.mark = 'first'")
        await page.click("details.numbers summary")
        event_id = await new_order(desk)
        await page.clock.run_for(6_000)
        await expect(page.locator(f".events code:has-text('{event_id}')")).to_be_visible()
        # What was open is open still, and the count in the bar above followed.
        assert await page.locator("details.numbers").get_attribute("open") is not None
        assert await page.locator("#live").get_attribute("data-mark") is None
        assert await page.locator("#dead").inner_text() == await page.locator("#live").get_attribute("data-dead")
        await page.click("text=Pause")
        await expect(page.locator(".pulse-words")).to_have_text("Paused")
        another = await new_order(desk)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.clock.run_for(60_000)
        assert asked == []
        assert await page.locator(f"code:has-text('{another}')").count() == 0
        await page.click("text=Resume")
        await expect(page.locator(f".events code:has-text('{another}')")).to_be_visible()


async def test_a_page_whose_server_does_not_answer_says_so_and_goes_on_asking(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk, expected=" 502 ") as page:
        answers = False

        async def cut(route: Route) -> None:
            live = "x-fragment" in route.request.headers
            await (route.fulfill(status=502, body="bad gateway") if live and not answers else route.continue_())

        await page.clock.install()
        await page.route("**/dashboard", cut)
        await page.reload()
        words = page.locator(".pulse-words")
        for _ in range(2):
            async with page.expect_response(lambda answer: answer.status == 502):
                await page.clock.run_for(15_000)
        await expect(words).to_have_text("No answer, still asking")
        answers = True
        async with page.expect_response(lambda answer: answer.status == 200):
            await page.clock.run_for(60_000)
        await expect(words).to_have_text("Live")


async def test_the_live_part_does_not_take_the_focus_or_what_is_selected(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk) as page:
        await page.clock.install()
        await page.reload()
        summary = page.locator("details.numbers summary")
        await summary.focus()
        async with page.expect_response(lambda answer: answer.request.headers.get("x-fragment") == "live") as looked:
            await page.clock.run_for(6_000)
        await (await looked.value).finished()
        await expect(summary).to_be_focused()


_WRITE_DOWN = """(what) => {
    const one = document.querySelector(what);
    window.words = [];
    new MutationObserver(() => window.words.push(one.textContent)).observe(one, { childList: true });
}"""


async def test_an_id_is_copied_whole(desk: Desk, browser: Browser) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    async with opened(browser, desk, permissions=permissions) as page:
        await page.goto(f"{desk.url}/events/{desk.dead}")
        # The button says so for a second and a half, which one could miss; what it says is written down by the page.
        await page.evaluate(_WRITE_DOWN, f"button[data-copy='{desk.dead}']")
        await page.click(f"button[data-copy='{desk.dead}']")
        await expect(page.locator("#said")).to_have_text("Copied")
        assert (await page.evaluate("window.words"))[0] == "Copied"
        assert await page.evaluate("navigator.clipboard.readText()") == desk.dead
    async with opened(browser, desk, java_script_enabled=False) as page:
        await page.goto(f"{desk.url}/events/{desk.dead}")
        # Without the script there is no button, and one click selects all of the id.
        assert not await page.locator(".copy").first.is_visible()


async def test_the_value_under_the_pointer_is_said_beside_the_picture(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk) as page:
        # The pictures stand still meanwhile.
        await page.click("text=Pause")
        await expect(page.locator(".pulse-words")).to_have_text("Paused")
        words = page.locator(".picture .words").first
        before = await words.inner_text()
        hit = page.locator(".picture").first.locator(".hit").last
        await hit.hover(force=True)
        await expect(words).to_contain_text("received")
        await page.mouse.move(1, 1)
        await expect(words).to_have_text(before)


async def test_the_payload_folds_and_unfolds_as_a_whole(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk) as page:
        await page.goto(f"{desk.url}/events/{desk.dead}")
        folded = page.locator(".tree details:not([open])")
        await page.click("text='Unfold all'")
        await expect(folded).to_have_count(0)
        await page.click("text='Fold all'")
        await expect(page.locator(".tree details[open]")).to_have_count(0)


# ── The session, as a browser keeps it ──────────────────────────────────────────────────────────────────────


async def test_a_link_in_a_message_opens_the_page_for_whoever_is_signed_in(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk) as page:

        async def message(route: Route) -> None:
            link = f"<a href='{desk.url}/failures/{desk.fingerprint}'>An event is dead</a>"
            await route.fulfill(body=f"<!doctype html><title>Chat</title>{link}", content_type="text/html")

        await page.route("https://chat.example/**", message)
        await page.goto("https://chat.example/room")
        await page.click("text=An event is dead")
        # The browser keeps a strict cookie to itself on the way in from another site; the dashboard asks once more.
        await expect(page.locator("h1")).to_have_text("Bury")
        assert page.url == f"{desk.url}/failures/{desk.fingerprint}"


async def test_scripts_cannot_read_the_session_and_it_ends_with_signing_out(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk) as page:
        await page.context.clear_cookies()
        await page.goto(f"{desk.url}/events?status=dead")
        await page.fill("#key", ADMIN_KEY)
        await page.click("text='Sign in'")
        await page.wait_for_url(f"{desk.url}/events?status=dead")
        assert await page.evaluate("document.cookie") == ""
        [cookie] = await page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/dashboard")
        assert 11.9 * 3600 < cookie["expires"] - time.time() <= 12 * 3600
        await page.click("text=Sign out")
        await page.wait_for_url(f"{desk.url}/sign-in")
        assert await page.context.cookies() == []
        await page.goto(f"{desk.url}/events")
        await expect(page.locator("label[for=key]")).to_be_visible()


async def test_a_page_that_looks_again_after_the_session_has_ended_asks_to_sign_in(
    desk: Desk, browser: Browser
) -> None:
    async with opened(browser, desk, expected=" 401 ") as page:
        await page.clock.install()
        await page.reload()
        await page.context.clear_cookies()
        await page.clock.run_for(6_000)
        await expect(page.locator("label[for=key]")).to_be_visible()


async def test_the_policy_keeps_foreign_code_out_even_if_it_got_into_a_page(desk: Desk, browser: Browser) -> None:
    async with opened(browser, desk, expected="Content Security Policy") as page:
        told = await page.evaluate(
            """async () => {
                const refused = [];
                document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
                const script = document.createElement("script");
                script.textContent = "window.evil = true";
                document.body.append(script);
                const styled = document.createElement("p");
                styled.setAttribute("style", "color: red");
                document.body.append(styled);
                await fetch("https://elsewhere.example/").catch(() => null);
                // The browser tells of them in its own time.
                for (let looks = 0; refused.length < 3 && looks < 1000; looks++) {
                    await new Promise((done) => setTimeout(done, 10));
                }
                return [window.evil === undefined, refused.map((name) => name.split("-")[0]).sort()];
            }"""
        )
        assert told == [True, ["connect", "script", "style"]]
